"""What goes wrong in the middle of a run: steps that are not finite, full disks, damaged checkpoints."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model.train import recipe_from, save_recipe
from tests.train.launching import launch

CASES = ["0:bf16:loss", "0:fp32:gradient", "1:bf16:loss", "2:fp32:loss", "3:bf16:loss", "3:fp32:gradient"]


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(values: Any, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="the train extra (deepspeed) is not installed")
    recipe = recipe_from(
        values(
            2,
            ("vqa",),
            schedule={"batch_size": 1, "accumulation": 2},
            lora={"rank": 2, "dropout": 0.0, "targets": ["q", "up"]},
            optimiser={"lr": 1e-3, "eps": 1e-4},
        )
    )
    script = "tests/train/rank_bad_steps.py"
    pair = replace(recipe, engine=replace(recipe.engine, kind="deepspeed"))
    ended = launch([script, str(save_recipe(pair, tmp_path / "two")), str(tmp_path), *CASES], processes=2)
    assert ended.returncode == 0, ended.stderr
    alone = replace(recipe, schedule=replace(recipe.schedule, accumulation=4))
    ended = launch([script, str(save_recipe(alone, tmp_path / "one")), str(tmp_path), "0:fp32:loss"])
    assert ended.returncode == 0, ended.stderr
    expected = json.loads((tmp_path / "torch_0_fp32_loss_0.json").read_text())
    assert [row["skipped"] for row in expected] == [False, True, False]
    for case in CASES:
        for rank in (0, 1):
            rows = json.loads((tmp_path / f"deepspeed_{case.replace(':', '_')}_{rank}.json").read_text())
            assert [row["skipped"] for row in rows] == [False, True, False], case
            assert [row["same"] for row in rows] == ([False, True, False] if rank == 0 else [True] * 3), case
            assert [row["lr"] for row in rows] == pytest.approx([1e-3, 5e-4, 1e-3 / 3]), case
            if "fp32" in case and rows[2]["norm"] is not None:  # what was dropped leaves no trace
                assert rows[2]["norm"] == pytest.approx(expected[2]["norm"], rel=1e-3), case
