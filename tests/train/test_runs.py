"""``medplib runs``: every run folder tells how it stands, broken ones too."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from model.cli import main
from model.errors import MedPLIBError
from model.train import recipe_from, run
from model.train.metrics import RunLog
from model.train.recipe import Logging
from model.train.runs import METRICS_FILE, ROUTER_FILE, RunRecord, find_runs, read_record, read_rows, status_of
from model.train.runs import write_atomic as write


@pytest.fixture()
def folder(values: Any, phantoms: Path, tmp_path: Path) -> Path:
    """Two finished runs, one that failed, one killed long ago, and folders that are broken or none."""
    held_out = {**values(1)["data"], "validation": [str(phantoms / "vqa.json")]}
    for name, lr in (("a", 1e-3), ("b", 2e-3)):
        output = str(tmp_path / "runs" / name)
        run(recipe_from(values(1, output=output, optimizer={"lr": lr}, data=held_out, validation={"samples": 2})))
    bad = recipe_from(values(1, output=str(tmp_path / "runs/failed"), optimizer={"max_bad_steps": 1, "lr": 1e30}))
    with pytest.raises(MedPLIBError, match=r"in too many steps \(1 in a row\)"):
        run(bad)
    killed = tmp_path / "runs" / "deep" / "killed"
    killed.mkdir(parents=True)
    RunRecord(killed, 2).begin(2, 0, 50, {})
    broken = tmp_path / "runs" / "broken"
    broken.mkdir()
    (broken / "run.json").write_text('{"status": "fini')
    (broken / "metrics.jsonl").write_bytes(b'\xff\xfe{"step": 3, "loss": 1.0}\n{"step": 4, "loss": 0.5}\n{"st')
    (broken / "recipe.yaml").write_text(": : [")
    (tmp_path / "runs" / "empty").mkdir()
    return tmp_path / "runs"


def test_runs_are_listed_and_compared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    status = {Path(line.split()[0]).name: line for line in lines[1:6]}
    assert set(status) == {"a", "b", "failed", "killed", "broken"}
    assert "finished" in status["a"] and "2/2" in status["a"] and "not the model's own answers: ce " in status["a"]
    assert "closed " in status["a"] and "false_masks" not in status["a"]
    assert "failed" in status["failed"] and "killed" in status["killed"] and "4/?" in status["broken"]
    assert any("not finite in too many steps" in line for line in lines[6:])
    assert any("run.json is damaged, recipe.yaml is damaged" in line for line in lines[6:])

    assert main(["runs", "compare", str(folder / "a"), str(folder / "b")]) == 0
    printed = capsys.readouterr().out
    assert "optimizer.lr" in printed and "data: the same" in printed and "best teacher_forced/ce" in printed
    assert "schedule.batch_size" not in printed

    assert main(["runs", str(folder), "--json"]) == 0
    assert len([json.loads(line) for line in capsys.readouterr().out.splitlines()]) == 5


def test_wrong_runs_input_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(folder / "nowhere")]) == 2
    assert main(["runs", "compare", str(folder / "a")]) == 2
    assert main(["runs", "compare", str(folder / "a"), str(folder / "empty")]) == 2
    assert "no folder" in (told := capsys.readouterr().err) and "two or more" in told and "no run lies there" in told
    assert main(["runs", str(folder / "empty")]) == 0
    assert "no runs in" in capsys.readouterr().out


def test_run_json_describes_the_run(folder: Path) -> None:
    record = read_record(folder / "a")
    assert (record["stage"], record["status"], record["step"], record["total_steps"]) == (1, "finished", 2, 2)
    (attempt,) = record["attempts"]
    assert {"started", "ended", "host", "world_size", "from_step", "git", "versions", "gpus"} <= set(attempt)
    assert {"python", "torch", "transformers", "platform"} <= set(attempt["versions"])
    assert all({"sha256", "records", "files"} <= set(facts) for facts in record["data"].values())
    assert read_record(folder / "failed")["status"] == "failed"


def test_time_is_what_attempts_took_not_what_lay_between_them(tmp_path: Path) -> None:
    """Two attempts killed an hour apart, each a minute long, and a third that ended."""
    begun = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
    for number in range(3):
        record = RunRecord(tmp_path, 1)
        record.begin(1, 0, 9, {})
        record.content["attempts"][-1]["started"] = datetime.fromtimestamp(begun + 3600 * number, UTC).isoformat()
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
        os.utime(tmp_path / "metrics.jsonl", (begun + 3600 * number + 60,) * 2)
        write(tmp_path / "run.json", record.content)
        record.close()
    (found,) = find_runs(tmp_path)
    assert found.seconds == 180
    assert [attempt["status"] for attempt in found.record["attempts"]] == ["killed", "killed", "running"]


def test_lost_ranks_are_recognized() -> None:
    gone = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:16790")
    assert status_of(gone)[0] == "failed" and "lost the others" in status_of(gone)[1]
    assert status_of(RuntimeError("out of memory")) == ("failed", "out of memory")


def test_damaged_rows_do_not_block_resuming(tmp_path: Path) -> None:
    rows = [{"step": step, "kinds": {"text": {"tokens": step}}} for step in (1, 2, 3)]
    whole = "".join(json.dumps(row) + "\n" for row in rows)
    half = json.dumps({"step": 4, "kinds": {"text": {}}})[:-2]  # ends in a brace, as whole rows do
    for name in (METRICS_FILE, ROUTER_FILE):
        (tmp_path / name).write_bytes(whole.encode() + b"\0\0\0{}\n7\n\xff\n" + half.encode())
    RunLog(tmp_path, Logging(progress=False, tensorboard=False), 9, first_step=2, writes=True).close()
    for name in (METRICS_FILE, ROUTER_FILE):
        assert read_rows(tmp_path / name) == rows[:2]
        assert len((tmp_path / name).read_text().splitlines()) == 2
