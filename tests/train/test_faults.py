"""What goes wrong in the middle of a run: steps that are not finite, full disks, damaged checkpoints."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.errors import MedPLIBError
from model.train import recipe_from, run, save_recipe
from model.train.__main__ import main
from model.train.checkpoint import damage, list_checkpoints, read_manifest
from model.train.distributed import Process
from model.train.runs import read_record
from model.train.trainer import Trainer
from tests.train.launching import launch
from tests.train.rank_bad_steps import steps_of

CASES = ["0:bf16:loss", "0:fp32:gradient", "1:bf16:loss", "2:fp32:loss", "3:bf16:loss", "3:fp32:gradient"]


@pytest.mark.slow
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(values: Any, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="the train extra (deepspeed) is not installed")
    recipe = recipe_from(
        values(
            2,
            ("vqa",),
            schedule={"batch_size": 1, "accumulation": 2},
            lora={"rank": 2, "dropout": 0.0, "targets": ["q", "up"]},
            optimizer={"lr": 1e-3, "eps": 1e-4},
        )
    )
    script = "tests/train/rank_bad_steps.py"
    pair = replace(recipe, engine=replace(recipe.engine, kind="deepspeed"))
    ended = launch([script, str(save_recipe(pair, tmp_path / "two")), str(tmp_path), *CASES], processes=2)
    assert ended.returncode == 0, ended.stderr
    alone = replace(recipe, schedule=replace(recipe.schedule, accumulation=4))
    expected = steps_of(alone, Process(0, 1, torch.device("cpu")), "loss")
    assert [row["skipped"] for row in expected] == [False, True, False]
    for case in CASES:
        for rank in (0, 1):
            rows = json.loads((tmp_path / f"deepspeed_{case.replace(':', '_')}_{rank}.json").read_text())
            assert [row["skipped"] for row in rows] == [False, True, False], case
            assert [row["same"] for row in rows] == ([False, True, False] if rank == 0 else [True] * 3), case
            assert [row["lr"] for row in rows] == pytest.approx([1e-3, 5e-4, 1e-3 / 3]), case
            if "fp32" in case and rows[2]["norm"] is not None:  # what was dropped leaves no trace
                assert rows[2]["norm"] == pytest.approx(expected[2]["norm"], rel=1e-3), case


@pytest.fixture()
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB, where it can be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m,nr_inodes=0", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_full_disk_is_one_error_and_keeps_last_checkpoint(
    values: Any, small_disk: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe = recipe_from(values(2, output=str(small_disk / "run"), saving={"every": 1, "keep": 9}, **LONG))
    given = str(save_recipe(recipe, tmp_path / "given"))
    assert main([given]) == 2
    told = capsys.readouterr().err
    assert "could not be written" in told and "--resume" in told and "Traceback" not in told
    record = read_record(recipe.folder)
    assert record["status"] == "failed" and "could not be written" in record["reason"]
    kept = list_checkpoints(recipe.folder)
    assert kept and all(not damage(folder, read_manifest(folder)) for folder in kept)
    assert not list((recipe.folder / "checkpoints").glob("*.partial"))

    fill(small_disk / "filler")
    assert main([given, "--resume"]) == 2
    told = capsys.readouterr().err
    assert "iB free" in told or "No space left" in told
    (small_disk / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    trainer = Trainer(recipe)
    trainer.set_up(resume=True)
    fill(small_disk / "filler")
    with pytest.raises((MedPLIBError, OSError), match="No space left") as caught:  # of a row of metrics.jsonl
        for _ in range(300):
            trainer.log.step({"step": 12, "loss": 1.0, "lr": 0.1})
    trainer.close(caught.value)
    assert read_record(recipe.folder)["status"] == "failed" and "No space" in read_record(recipe.folder)["reason"]
    (small_disk / "filler").unlink()
    assert main([given, "--resume"]) == 0
    assert [json.loads(line)["step"] for line in (recipe.folder / "metrics.jsonl").read_text().splitlines()] == [
        *range(1, 13)
    ]


LONG: dict[str, Any] = {"schedule": {"batch_size": 1, "max_steps": 12}, "lora": {"rank": 2, "targets": ["q", "up"]}}


def fill(path: Path) -> None:
    """Let a file grow until nothing goes on the disk any more."""
    for size in (65536, 1024, 1):
        with path.open("ab", buffering=0) as stream, suppress(OSError):
            while True:
                stream.write(b"0" * size)


def test_changed_data_is_refused_unless_allowed(values: Any, phantoms: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(phantoms, data)
    files = {**values(1)["data"], "train": [str(data / "vqa.json")], "images": str(data)}
    recipe = recipe_from(values(1, data=files, schedule={"batch_size": 2, "max_steps": 3}))
    run(recipe)
    records = json.loads((data / "vqa.json").read_text())
    image = data / records[0]["image"]
    image.write_bytes(image.read_bytes() + b"more")
    with pytest.raises(MedPLIBError, match=r"changed since .* records of .*vqa.json name files of another size"):
        run(recipe, resume=True)
    (data / "vqa.json").write_text(json.dumps(records[:-1]))
    with pytest.raises(MedPLIBError, match=rf"had {len(records)} usable records and has {len(records) - 1}"):
        run(recipe, resume=True)
    assert run(recipe, resume=True, allow_changed_data=True) == recipe.merged


def test_too_many_bad_steps_end_run_with_whole_checkpoint(values: Any) -> None:
    sections = {"saving": {"every": 1, "keep": 1}, "schedule": {"batch_size": 2, "max_steps": 9}}
    recipe = recipe_from(values(1, optimizer={"max_bad_steps": 2, "lr": 1e4, "warmup": 0.0, "clip": 0.0}, **sections))
    trainer = Trainer(recipe)
    trainer.set_up()
    trainer.train_step()
    trainer.save()
    for parameter in trainer.engine.network.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(MedPLIBError, match=r"too many steps \(2 in a row\)") as caught:
        trainer.train()
    trainer.close(caught.value)
    rows = [json.loads(line) for line in (recipe.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped_steps"] for row in rows] == [0, 1, 2]
    # One checkpoint is asked for; the one after the last good step stays beside it.
    assert [path.name for path in list_checkpoints(recipe.folder)] == ["step_0000001", "step_0000002"]
    assert read_record(recipe.folder)["status"] == "failed"
