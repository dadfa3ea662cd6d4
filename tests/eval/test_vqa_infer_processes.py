"""The command as processes: launched twofold it writes what one process writes, and a killed one goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from model.eval import vqa_infer
from model.eval.options import InferenceOptions
from model.eval.run import Outcome, run_inference
from model.eval.shards import Rank
from tests.conftest import ROOT
from tests.eval.phantom_questions import NANO, SAMPLE, without_timing

SCRIPT = "model/eval/vqa_infer.py"
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "PYTHONPATH")


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def flags(answers: Path, data: Path) -> list[str]:
    return [f"--version={NANO}", f"--val_data_path={data}", f"--image_folder={SAMPLE}", f"--answers-file={answers}"]


def here(answers: Path, data: Path) -> Outcome:
    return run_inference(InferenceOptions(NANO, data, SAMPLE, answers, device="cpu"), Rank())


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path: Path):
    records = json.loads((SAMPLE / "held_out.json").read_text())
    data = tmp_path / "data.json"
    data.write_text(json.dumps([*records[:4], *records[40:43], *records[86:90], {"id": "broken"}]))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT]
    found = subprocess.run(
        [*launch, *flags(tmp_path / "two.jsonl", data), "--eval_seg"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert found.returncode != 0  # of the broken record; torchrun makes one code of all failures
    assert "wrote 12 answers" in found.stdout
    assert "miou: 0." in found.stdout
    assert "1 of them could not be given" in found.stdout
    assert here(tmp_path / "one.jsonl", data).errors == 1
    assert without_timing(tmp_path / "two.jsonl") == without_timing(tmp_path / "one.jsonl")
    assert sorted(path.name for path in tmp_path.glob("two*")) == ["two.jsonl", "two.run.json"]
    assert vqa_infer.main(flags(tmp_path / "two.jsonl", data)) == 3  # alone it tells the true code


@pytest.mark.slow
def test_a_killed_process_loses_and_doubles_nothing(tmp_path: Path):
    answers, data = tmp_path / "killed.jsonl", tmp_path / "data.json"
    data.write_text(json.dumps(json.loads((SAMPLE / "held_out.json").read_text())[60:110]))
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *flags(answers, data)], cwd=ROOT, env=environment(), stderr=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + 90
        while not answers.exists() or answers.read_bytes().count(b"\n") < 5:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    before = answers.read_bytes()
    assert 5 <= before.count(b"\n") < 50
    assert here(answers, data).rows == 50
    assert answers.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    here(tmp_path / "whole.jsonl", data)
    assert without_timing(answers) == without_timing(tmp_path / "whole.jsonl")
