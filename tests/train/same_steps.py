"""Short runs in one process and in two ranks that must come out alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoint import load
from model.train import Recipe, recipe_from, run
from model.train.recipe import PUBLISHED

_ALIKE: dict[str, Any] = {
    "lora": {"rank": 2, "dropout": 0.0, "targets": ["q", "up"]},
    "optimizer": {"clip": 0.1, "eps": 1e-4},  # without a floor, Adam makes a step of every rounding error
}


def one_process(values: Any, stage: int, folder: Path, **sections: Any) -> Recipe:
    """Train three steps of four micro-batches through plain PyTorch."""
    recipe = _recipe(values, stage, folder / f"one_{stage}", 4, {}, sections)
    run(recipe)
    return recipe


def two_ranks(values: Any, stage: int, output: Path, sections: dict[str, Any] | None = None, **engine: Any) -> Recipe:
    """The recipe of the same steps over two ranks of two micro-batches through DeepSpeed."""
    return _recipe(values, stage, output, 2, {"kind": "deepspeed", **engine}, sections or {})


def same_steps(alone: Recipe, recipe: Recipe, name: str) -> None:
    """Assert that two runs took the same steps and ended with the same checkpoint."""
    for row, same in zip(read_rows(alone), read_rows(recipe), strict=True):
        labelled = {key for key in row if "/" in key}  # ce/vqa and the like
        assert labelled and labelled == {key for key in same if "/" in key}, name
        for key in ("loss", "ce", "router_aux", "lr", "grad_norm", *labelled):
            assert same[key] == pytest.approx(row[key], rel=1e-5), f"{name}: {key} of step {row['step']}"
    assert read_rows(recipe, "router.jsonl") == read_rows(alone, "router.jsonl"), name
    found = load(recipe.merged)[0].state_dict()
    expected = load(alone.merged)[0].state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(
            found[key], value, rtol=0, atol=1e-7, msg=lambda text, key=key: f"{name} {key}: {text}"
        )


def read_rows(recipe: Recipe, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """What a run told of its steps, or of what its routers did."""
    path = recipe.folder / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _recipe(
    values: Any, stage: int, output: Path, accumulation: int, engine: dict[str, Any], sections: dict[str, Any]
) -> Recipe:
    chosen = values(
        stage,
        output=str(output),
        schedule={"batch_size": 1, "accumulation": accumulation, "max_steps": 3},
        **{**_ALIKE, **sections},
    )
    chosen["engine"] |= engine
    if stage == 4:
        chosen["model"]["grounding"] = chosen["model"]["base"]
        chosen["mixture"] = {"random_token_priority": False, "router_aux_loss_coef": 0.01, "num_experts": [4]}
        chosen["mixture"] |= {"projector_experts": 2, "projector_router_aux_loss_coef": 0.01}
        chosen["trainable"] = [*chosen.get("trainable", PUBLISHED[4]["trainable"]), "projector"]
    return recipe_from(chosen)
