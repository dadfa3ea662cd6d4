"""Runs that are killed at any moment go on as if nothing had been: the same losses, the same weights, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoint import load
from model.errors import MedPLIBError
from model.train import Recipe, recipe_from, run, save_recipe
from model.train.checkpoint import list_checkpoints
from model.train.runs import read_record
from tests.train.launching import begin, launch, wait_until

SETTINGS: dict[str, Any] = {
    "schedule": {"batch_size": 1, "accumulation": 2, "max_steps": 5},
    "saving": {"every": 1, "keep": 1},
    "lora": {"rank": 2, "dropout": 0.1, "targets": ["q", "up"]},
}


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    path = folder / name
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def kill(running: subprocess.Popen[str]) -> None:
    """All ranks at once, without a word."""
    os.killpg(running.pid, signal.SIGKILL)
    running.communicate()


@pytest.fixture()
def recipe(values: Any, phantoms: Path) -> Recipe:
    data = {**values(2)["data"], "validation": [str(phantoms / "grounding.json")]}
    return recipe_from(values(2, data=data, validation={"samples": 4, "every": 2}, **SETTINGS))


def moments(folder: Path) -> dict[str, Callable[[], bool]]:
    """By name: what can be seen in the run folder at some moments of a run."""
    saved = folder / "checkpoints"
    return {
        "in a step": lambda: len(rows(folder)) == 1,
        "while an engine writes": lambda: any(saved.glob("step_0000002.partial/torch.pt")),
        "while the old one goes": lambda: any(saved.glob("*.removed")) or (saved / "step_0000003").is_dir(),
        "in validation": lambda: len(rows(folder)) == 4 and (saved / "step_0000004").is_dir(),
        "while merging": lambda: any(folder.glob(".merged.*")) or (folder / "merged").is_dir(),
    }


@pytest.mark.slow
def test_run_killed_repeatedly_resumes_exactly(recipe: Recipe, tmp_path: Path) -> None:
    whole = replace(recipe, output=str(tmp_path / "whole"))
    run(whole)
    arguments = ["-m", "model.train", str(save_recipe(recipe, tmp_path / "b")), "--resume"]
    for moment, reached in moments(recipe.folder).items():
        running = begin(arguments)
        wait_until(reached, running)
        kill(running)
        kept = [path for path in (recipe.folder / "checkpoints").glob("step_*") if not path.suffix]
        assert kept or moment in ("in a step", "while an engine writes"), moment
    ended = launch(arguments)
    assert ended.returncode == 0, ended.stderr
    assert_same(whole.folder, recipe.folder)
    record = read_record(recipe.folder)
    assert (record["status"], record["step"]) == ("finished", 5)
    assert [attempt["status"] for attempt in record["attempts"]][-1] == "finished"
    assert [path.name for path in (recipe.folder / "checkpoints").iterdir()] == ["step_0000005"]
    assert not [path for path in recipe.folder.iterdir() if "partial" in path.name]


def assert_same(expected: Path, found: Path) -> None:
    for name in ("loss", "lr", "grad_norm"):
        assert [row[name] for row in rows(found)] == [row[name] for row in rows(expected)], name
    assert rows(found, "validation.jsonl") == rows(expected, "validation.jsonl")
    one, other = (load(folder / "merged")[0].state_dict() for folder in (expected, found))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.slow
def test_two_ranks_killed_while_saving_resume_exactly(values: Any, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="the train extra (deepspeed) is not installed")
    engine = {**values(2)["engine"], "kind": "deepspeed"}
    recipe = recipe_from(values(2, engine=engine, **{**SETTINGS, "schedule": {"batch_size": 1, "max_steps": 4}}))
    whole = replace(recipe, output=str(tmp_path / "whole"))
    given, given_whole = str(save_recipe(recipe, tmp_path / "a")), str(save_recipe(whole, tmp_path / "b"))
    killed = launch(["tests/train/rank_runs.py", given_whole, f"!{given}"], processes=2)
    assert killed.returncode != 0 and "SIGKILL" in killed.stderr, killed.stderr
    assert [row["step"] for row in rows(recipe.folder)] == [1, 2]
    found = sorted(path.name for path in (recipe.folder / "checkpoints").iterdir())
    assert found == ["step_0000001", "step_0000002.partial"]
    assert read_record(recipe.folder)["status"] == "running"

    ended = launch(["-m", "model.train", given, "--resume"], processes=2)
    assert ended.returncode == 0, ended.stderr
    assert "going on after step 1" in ended.stderr
    assert [row["step"] for row in rows(recipe.folder)] == [1, 2, 3, 4]
    assert_same(whole.folder, recipe.folder)


@pytest.mark.slow
def test_zero3_resumes_beyond_next_save_in_stages_3_and_4(values: Any, tmp_path: Path) -> None:
    """The decoder reads weights of modules that never run, which ZeRO-3 must notice before it fixes their order."""
    pytest.importorskip("deepspeed", reason="the train extra (deepspeed) is not installed")
    engine = {**values(3)["engine"], "kind": "deepspeed", "zero_stage": 3}
    schedule = {"batch_size": 1, "max_steps": 3}
    sections = {**SETTINGS, "schedule": schedule, "saving": {"every": 1, "keep": 3}}
    model = {"base": values(4)["model"]["base"], "grounding": values(4)["model"]["base"]}
    recipes = [
        recipe_from(values(3, engine=engine, **sections)),
        recipe_from(values(4, engine=engine, model=model, **sections)),
    ]
    given = [str(save_recipe(recipe, tmp_path / "given" / recipe.folder.name)) for recipe in recipes]
    ended = launch(["tests/train/rank_runs.py", *given, *(f"++{path}" for path in given)], processes=2)
    assert ended.returncode == 0, ended.stderr
    for recipe in recipes:
        for name in ("loss", "lr", "grad_norm"):
            expected = [row[name] for row in rows(recipe.folder, "first.jsonl")]
            assert [row[name] for row in rows(recipe.folder)] == expected, name
        assert len(expected) == 3
        one, other = (load(recipe.folder / name)[0].state_dict() for name in ("first", "merged"))
        assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.slow
def test_signal_in_validation_saves_and_exits_0(recipe: Recipe, tmp_path: Path) -> None:
    recipe = replace(recipe, saving=replace(recipe.saving, every=100))
    arguments = ["-m", "model.train", str(save_recipe(recipe, tmp_path / "given"))]
    running = begin(arguments)
    wait_until(lambda: len(rows(recipe.folder)) == 2, running)
    running.send_signal(signal.SIGUSR1)
    told, _ = running.communicate(timeout=120)
    assert running.returncode == 0, told
    assert "--resume" in told and "Traceback" not in told
    assert not recipe.merged.exists()
    assert read_record(recipe.folder)["status"] == "preempted"
    run(recipe, resume=True)
    assert [row["step"] for row in rows(recipe.folder, "validation.jsonl")] == [2, 4, 5]


def test_damaged_checkpoint_falls_back_to_older_one(recipe: Recipe, caplog: pytest.LogCaptureFixture) -> None:
    recipe = replace(recipe, saving=replace(recipe.saving, every=2, keep=3))
    run(recipe)
    before = rows(recipe.folder)
    for name in ("step_0000005/torch.pt", "step_0000004/random_0.pt"):
        victim = recipe.folder / "checkpoints" / name
        victim.write_bytes(victim.read_bytes()[:-7])
    run(recipe, resume=True)
    assert "step_0000005 is damaged (torch.pt has" in caplog.text and "step_0000004 is damaged" in caplog.text
    assert [row["loss"] for row in rows(recipe.folder)] == [row["loss"] for row in before]
    found = sorted(path.name for path in (recipe.folder / "checkpoints").iterdir())
    assert found == ["step_0000002", "step_0000004", "step_0000005"]


def test_all_checkpoints_damaged_is_refused(recipe: Recipe) -> None:
    run(recipe)
    for folder in list_checkpoints(recipe.folder):
        (folder / "torch.pt").unlink()
    before = rows(recipe.folder)
    for _ in range(2):
        with pytest.raises(MedPLIBError, match="is whole"):
            run(recipe, resume=True)
    assert rows(recipe.folder) == before
