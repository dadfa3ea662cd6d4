"""``infer_parallel_medplib.sh``: one chunk a device, joined in order, loud about every failure."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from model.eval import join_chunks
from model.eval.shards import Journal

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "model" / "eval" / "infer_parallel_medplib.sh"
SAMPLE = ROOT / "data" / "sample"

STAND_IN = """#!/bin/sh
# Stands for the interpreter: notes its device and what it was given, and does as it is told.
echo "on=$CUDA_VISIBLE_DEVICES as=$$ $*" >> "$NOTES"
case "$*" in
    *--chunk-idx="$BROKEN"*) echo "first line"; echo "the disk is full" >&2; exit 9 ;;
    *--chunk-idx*) exec sleep "${NAP:-0}" ;;
esac
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """An interpreter that only takes notes, for what needs GPUs or failures."""
    path = tmp_path / "python"
    path.write_text(STAND_IN)
    path.chmod(0o755)
    return path


def environment(folder: Path, **more: str) -> dict[str, str]:
    names = ("GPUS", "CPU_PROCESSES", "CUDA_VISIBLE_DEVICES", "PYTHONPATH", "MODEL", "DATA", "IMAGES")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return {**kept, "ANSWERS": str(folder / "all.jsonl"), "NOTES": str(folder / "notes"), "BROKEN": "none", **more}


def launch(folder: Path, *flags: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(SCRIPT), *flags],
        cwd=folder,
        env=environment(folder, **more),
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


@pytest.mark.slow
def test_chunks_on_the_cpu_are_joined_in_order(tmp_path: Path):
    records = json.loads((SAMPLE / "held_out.json").read_text())
    asked = [records[86], {**records[0], "image": "images/absent.png"}, *records[1:3], records[87]]
    (tmp_path / "data.json").write_text(json.dumps(asked))
    more = {"DATA": str(tmp_path / "data.json"), "IMAGES": str(SAMPLE), "PYTHON": sys.executable, "CPU_PROCESSES": "2"}
    found = launch(tmp_path, "--eval_seg", **more)
    assert found.returncode == 3, found.stdout + found.stderr  # of the absent image
    rows = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [record["id"] for record in asked]
    assert [row["finish"] for row in rows] == ["end", "error", "end", "end", "end"]
    assert "joined 5 answers of 2 chunks" in found.stdout
    assert "miou: 0." in found.stdout
    assert "1 of them could not be given" in found.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.jsonl", "all.run.json", "data.json"]
    assert json.loads((tmp_path / "all.run.json").read_text())["rows"] == 5
    again = launch(tmp_path, **more)
    assert again.returncode == 2
    assert "is there already" in again.stderr


@pytest.mark.parametrize("listed", ["0,3, 1", "0 3 1"])
def test_every_gpu_gets_a_chunk_of_its_own(tmp_path: Path, stand_in: Path, listed: str):
    found = launch(
        tmp_path, "--eval_vqa", "--answer_type=open type", GPUS=listed, PYTHON=str(stand_in), SAM="a sam.pth", MODEL="m"
    )
    assert found.returncode == 0, found.stderr
    notes = sorted((tmp_path / "notes").read_text().splitlines())
    chunks = [note for note in notes if "vqa_infer.py" in note]
    assert [note.split()[0] for note in chunks] == ["on=0", "on=1", "on=3"]
    for gpu, index in (("0", 0), ("3", 1), ("1", 2)):
        (note,) = [note for note in chunks if note.startswith(f"on={gpu} ")]
        assert f"--num-chunks=3 --chunk-idx={index} " in note
        assert "--vision_pretrained=a sam.pth" in note
        assert "--device=cuda" in note
        assert note.endswith("--eval_vqa --answer_type=open type")
    (joining,) = [note for note in notes if "join_chunks" in note]
    places = [joining.index(f"all.chunk-{index}-of-3.jsonl") for index in range(3)]
    assert places == sorted(places)
    assert "--eval_vqa" in joining


def test_a_failed_chunk_is_named_with_the_end_of_its_log(tmp_path: Path, stand_in: Path):
    found = launch(tmp_path, GPUS="0,1,2", PYTHON=str(stand_in), BROKEN="1")
    assert found.returncode == 1
    assert "chunk 1 of 3 failed with exit code 9" in found.stderr
    assert "    the disk is full" in found.stderr
    assert "failed chunks: 1 of 3; nothing was joined" in found.stderr
    assert "join_chunks" not in (tmp_path / "notes").read_text()


def test_chunks_that_are_not_finished_are_not_joined(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    chunk = tmp_path / "all.chunk-0-of-1.jsonl"
    chunk.write_text("{}\n")  # an interpreter may end well and yet have finished nothing
    assert join_chunks.main([str(tmp_path / "all.jsonl"), str(chunk)]) == 2
    assert "all.chunk-0-of-1.jsonl is not finished" in capsys.readouterr().err
    Journal({"chunk": {"index": 1, "of": 2}}, state="finished", rows=1).write(chunk)
    assert join_chunks.main([str(tmp_path / "all.jsonl"), str(chunk)]) == 2
    assert "chunk.index was 1, now 0" in capsys.readouterr().err
    Journal({"chunk": {"index": 0, "of": 1}}, state="finished", rows=2).write(chunk)
    assert join_chunks.main([str(tmp_path / "all.jsonl"), str(chunk)]) == 2
    assert "the chunks hold 1 answers, their journals say 2" in capsys.readouterr().err
    assert not (tmp_path / "all.jsonl").exists()


def test_stopping_it_stops_its_chunks(tmp_path: Path, stand_in: Path):
    process = subprocess.Popen(
        ["sh", str(SCRIPT)],
        cwd=tmp_path,
        env=environment(tmp_path, GPUS="0,1", PYTHON=str(stand_in), NAP="60"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    notes = tmp_path / "notes"
    deadline = time.monotonic() + 20
    while not notes.exists() or notes.read_text().count("chunk-idx") < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "stopped; give the same command again" in told
    for note in notes.read_text().splitlines():
        with pytest.raises(ProcessLookupError):
            os.kill(int(note.split("as=")[1].split()[0]), 0)


@pytest.mark.parametrize(
    ("flags", "more", "told"),
    [
        ([], {"GPUS": "0", "CPU_PROCESSES": "2"}, "both set"),
        ([], {"CPU_PROCESSES": "two"}, "CPU_PROCESSES is two"),
        ([], {"CPU_PROCESSES": "0"}, "CPU_PROCESSES is 0"),
        (["--answers-file=x"], {"GPUS": "0"}, "set by ANSWERS"),
        (["--num-chunks", "3"], {"GPUS": "0"}, "set for every chunk"),
        (["--version=x"], {"GPUS": "0"}, "set by MODEL"),
        (["--device=cpu"], {"GPUS": "0"}, "set by GPUS or CPU_PROCESSES"),
        ([], {"GPUS": ","}, "no GPU was found"),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path: Path, flags: list[str], more: dict[str, str], told: str):
    found = launch(tmp_path, *flags, **more)
    assert found.returncode == 2
    assert told in found.stderr
