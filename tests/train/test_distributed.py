"""Several ranks through DeepSpeed: right gradients whatever each rank's batch holds, and the command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model.checkpoint import load
from model.train import Recipe, recipe_from, run, save_recipe

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("deepspeed", reason="the train extra (deepspeed) is not installed")


def launch(arguments: list[str], processes: int = 1) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


def recipe_file(recipe: Recipe, folder: Path, **engine: Any) -> str:
    return str(save_recipe(replace(recipe, engine=replace(recipe.engine, **engine)), folder))


def test_ranks_with_unlike_batches_get_the_exact_mean_gradient(values: Any, tmp_path: Path) -> None:
    base = values(4)["model"]["base"]
    recipe = recipe_from(
        values(
            4,
            ("vqa", "grounding"),
            model={"base": base, "grounding": base},
            mixture={"random_token_priority": False, "projector_experts": 2},
            lora={"dropout": 0.0},
            trainable=["router", "lm_head", "embed_tokens", "mask_decoder", "mask_head", "region_adapter", "projector"],
            losses={"focal": 1.0, "iou": 1.0},
            optimiser={"clip": 0.0},
        )
    )
    script = "tests/train/rank_gradients.py"
    alone = recipe_file(replace(recipe, schedule=replace(recipe.schedule, accumulation=2)), tmp_path / "one")
    single = launch([script, alone, str(tmp_path), "0"])
    assert single.returncode == 0, single.stderr
    expected = load_file(tmp_path / "torch_0_0.safetensors")
    pair = recipe_file(recipe, tmp_path / "two", kind="deepspeed")
    both = launch([script, pair, str(tmp_path), "0", "1", "2", "3", "1x2", "2x2"], processes=2)
    assert both.returncode == 0, both.stderr

    for part in ("router", "experts.0", "experts.1", "projector", "mask_decoder", "mask_head", "embed_tokens"):
        assert any(part in name and value.abs().max() > 0 for name, value in expected.items()), part
    largest = max(value.abs().max().item() for value in expected.values())
    for stage in ("0", "1", "2", "3", "1x2", "2x2"):
        files = sorted(tmp_path.glob(f"deepspeed_{stage}_*.safetensors"))
        found = {name: value for file in files for name, value in load_file(file).items()}
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6 * largest, msg=f"ZeRO-{stage}: {name}")


def test_two_ranks_train_resume_and_hand_over(values: Any, tmp_path: Path) -> None:
    recipe = recipe_from(
        values(
            2,
            schedule={"batch_size": 1, "accumulation": 2, "max_steps": 3},
            saving={"every": 2},
            engine={"kind": "deepspeed", "gradient_checkpointing": True},
        )
    )
    arguments = ["-m", "model.train", recipe_file(recipe, tmp_path / "given")]
    first = launch(arguments, processes=2)
    assert first.returncode == 0, first.stderr
    whole = read_rows(recipe)
    network, _ = load(recipe.merged)
    assert [row["lr"] for row in whole] == pytest.approx([1e-4, 2e-4 / 3, 1e-4 / 3])

    shutil.rmtree(recipe.merged)
    shutil.rmtree(recipe.folder / "checkpoints" / "step_0000003")
    second = launch([*arguments, "--resume", "logging.tensorboard=true"], processes=2)
    assert second.returncode == 0, second.stderr
    again = read_rows(recipe)
    assert [row["step"] for row in again] == [1, 2, 3]
    assert again[2]["loss"] == whole[2]["loss"]
    assert list((recipe.folder / "tensorboard").iterdir())
    resumed = load(recipe.merged)[0].state_dict()
    for name, value in network.state_dict().items():
        assert torch.equal(value, resumed[name]), name


def test_accumulation_over_ranks_is_one_big_step(values: Any, tmp_path: Path) -> None:
    """Two ranks of two micro-batches take the steps of one process with four, up to the end of ZeRO-3's gathering."""
    sections = {
        "lora": {"rank": 2, "dropout": 0.0, "targets": ["q", "up"]},
        "optimiser": {"clip": 0.1, "eps": 1e-4},  # without a floor, Adam makes a step of every rounding error
    }
    alone = recipe_from(values(2, schedule={"batch_size": 1, "accumulation": 4, "max_steps": 2}, **sections))
    expected, _ = load(run(alone))
    pair = {"schedule": {"batch_size": 1, "accumulation": 2, "max_steps": 2}, "output": str(tmp_path / "pair")}
    recipe = recipe_from(values(2, **sections, **pair))
    given = recipe_file(recipe, tmp_path / "given", kind="deepspeed", zero_stage=3)
    ended = launch(["-m", "model.train", given], processes=2)
    assert ended.returncode == 0, ended.stderr
    for row, same in zip(read_rows(alone), read_rows(recipe), strict=True):
        for name in ("loss", "ce", "lr", "grad_norm"):
            assert same[name] == pytest.approx(row[name], rel=1e-3), name
    found = load(recipe.merged)[0].state_dict()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)


def read_rows(recipe: Recipe) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (recipe.folder / "metrics.jsonl").read_text().splitlines()]
