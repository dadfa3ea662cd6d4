"""Whole runs of a tiny network, on one process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoint import load
from model.errors import MedPLIBError
from model.train import recipe_from, run
from model.train.handover import network_of_run


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_four_stages_follow_each_other(values: Any, tmp_path: Path, phantoms: Path) -> None:
    held_out = {"data": {**values(1)["data"], "validation": [str(phantoms / "grounding.json")]}}
    results = {}
    for stage in (1, 2, 3, 4):
        before = {1: {}, 2: {"base": str(tmp_path / "stage1")}, 3: {"base": str(tmp_path / "stage2")}}
        source = before.get(stage, {"base": str(tmp_path / "stage2"), "grounding": str(tmp_path / "stage3")})
        files = ("grounding",) if stage == 3 else ("vqa", "region", "grounding")
        sections: dict[str, Any] = {"model": {**values(stage)["model"], **source}}
        if stage == 3:
            sections |= held_out | {"validation": {"samples": 4, "every": 2}}
            sections["data"] = {**sections["data"], "train": [str(phantoms / "grounding.json")]}
        results[stage] = run(recipe_from(values(stage, files, **sections)))

    vqa, grounding = load(results[2])[0], load(results[3])[0]
    mixture, _ = load(results[4])
    assert mixture.config.moe.layers == (0, 1, 2, 3)
    assert not any("lora" in name or "base_layer" in name for name in mixture.state_dict())
    # What a stage does not train comes through unchanged; what it trains moves.
    assert torch.equal(
        vqa.model.decoder.layers[0].self_attn.q_proj.weight, grounding.model.decoder.layers[0].self_attn.q_proj.weight
    )
    assert not torch.equal(
        vqa.model.decoder.layers[0].mlp.up_proj.weight, grounding.model.decoder.layers[0].mlp.up_proj.weight
    )
    assert torch.equal(vqa.model.projector.layers[0].weight, mixture.model.projector.layers[0].weight)
    rows = metrics(tmp_path / "stage4")
    assert [row["step"] for row in rows] == [1, 2]
    assert {"loss", "ce", "dice", "bce", "lr", "samples_per_s"} <= set(rows[0])
    scores = json.loads((tmp_path / "stage3" / "validation.jsonl").read_text())
    assert {"dice@0.1", "dice@0.5", "ce", "seg_said"} <= set(scores)
    assert (tmp_path / "stage4" / "recipe.yaml").is_file()


def test_resuming_continues_the_loss_sequence_exactly(values: Any, tmp_path: Path) -> None:
    settings = {"schedule": {"batch_size": 2, "accumulation": 2, "max_steps": 4}, "saving": {"every": 2, "keep": 2}}
    recipe = recipe_from(values(4, mixture={"mode": "dense"}, model=_pair(values), **settings))
    run(recipe)
    whole = metrics(recipe.folder)
    trained = load(recipe.merged)[0].state_dict()

    shutil.rmtree(recipe.merged)
    shutil.rmtree(recipe.folder / "checkpoints" / "step_0000004")
    run(recipe, resume=True)
    again = metrics(recipe.folder)
    assert [row["step"] for row in again] == [1, 2, 3, 4]
    assert [row["loss"] for row in again] == [row["loss"] for row in whole]
    assert all(torch.equal(value, trained[name]) for name, value in load(recipe.merged)[0].state_dict().items())


def _pair(values: Any) -> dict[str, str]:
    base = values(4)["model"]["base"]
    return {"base": base, "grounding": base}


def test_loss_falls(values: Any) -> None:
    recipe = recipe_from(
        values(2, ("vqa",), schedule={"batch_size": 4, "max_steps": 12}, optimiser={"lr": 1e-2}, lora={"rank": 4})
    )
    run(recipe)
    losses = [row["ce"] for row in metrics(recipe.folder)]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_a_checkpoint_can_be_merged_without_its_run(values: Any) -> None:
    recipe = recipe_from(values(2, saving={"every": 2}))
    run(recipe)
    exported, _ = network_of_run(recipe.folder)
    merged = load(recipe.merged)[0].state_dict()
    for name, value in exported.state_dict().items():
        assert torch.equal(value, merged[name]), name


def test_a_run_folder_is_not_overwritten(values: Any) -> None:
    recipe = recipe_from(values(1))
    run(recipe)
    with pytest.raises(MedPLIBError, match="--resume"):
        run(recipe)
    with pytest.raises(MedPLIBError, match=r"optimiser\.lr"):
        run(recipe_from(values(1, optimiser={"lr": 0.5})), resume=True)


def test_missing_paths_are_told_at_once(values: Any) -> None:
    broken = values(2, model={"base": "nowhere", "sam": "no.pth"}, data={**values(2)["data"], "images": "void"})
    with pytest.raises(MedPLIBError) as caught:
        run(recipe_from(broken))
    assert all(text in str(caught.value) for text in ("nowhere", "no.pth", "void"))
