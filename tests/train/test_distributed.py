"""Several ranks through DeepSpeed: right gradients whatever each rank's batch holds, and the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model.checkpoint import load
from model.train import Recipe, recipe_from, save_recipe
from model.train.process import Process
from tests.train.launching import launch
from tests.train.rank_gradients import gradients_of
from tests.train.same_steps import one_process, read_rows, same_steps, two_ranks

pytest.importorskip("deepspeed", reason="the train extra (deepspeed) is not installed")


def recipe_file(recipe: Recipe, folder: Path, **engine: Any) -> str:
    return str(save_recipe(replace(recipe, engine=replace(recipe.engine, **engine)), folder))


@pytest.mark.slow
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
    alone = replace(recipe, schedule=replace(recipe.schedule, accumulation=2))
    expected = gradients_of(alone, Process(0, 1, torch.device("cpu")))
    pair = recipe_file(recipe, tmp_path / "two", kind="deepspeed")
    both = launch(["tests/train/rank_gradients.py", pair, str(tmp_path), "0", "1", "2", "3", "1x2", "2x2"], processes=2)
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


@pytest.mark.slow
def test_two_ranks_train_and_hand_over(values: Any, tmp_path: Path) -> None:
    """By the command; that two ranks resume exactly is in ``test_killed.py``."""
    recipe = recipe_from(
        values(
            2,
            schedule={"batch_size": 1, "accumulation": 2, "max_steps": 3},
            engine={"kind": "deepspeed", "gradient_checkpointing": True},
        )
    )
    given = recipe_file(recipe, tmp_path / "given")
    ended = launch(["-m", "model.train", given, "logging.tensorboard=true"], processes=2)
    assert ended.returncode == 0, ended.stderr
    rows = read_rows(recipe)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["lr"] for row in rows] == pytest.approx([1e-4, 2e-4 / 3, 1e-4 / 3])
    assert list((recipe.folder / "tensorboard").iterdir())
    assert load(recipe.merged)[0].config.text_config.num_hidden_layers == 4


SAVING_MEMORY: dict[str, dict[str, Any]] = {  # stage of training, and what differs from plain data parallelism
    "2_zero1": {"zero_stage": 1},
    "2_zero2_offload": {"zero_stage": 2, "offload": "optimiser", "gradient_checkpointing": True},
    "2_zero3_offload": {"zero_stage": 3, "offload": "all"},
    "2_zero3_cached": {"zero_stage": 3},
    "4_zero1_offload": {"zero_stage": 1, "offload": "optimiser", "gradient_checkpointing": True},
    "4_zero2": {"zero_stage": 2},
    "4_zero3": {"zero_stage": 3, "gradient_checkpointing": True},
    "4_zero3_offload_cached": {"zero_stage": 3, "offload": "all", "gradient_checkpointing": True},
}
"""Each ZeRO stage with LoRA and full weights (stage II) and in a mixture (stage IV), both ways of offloading."""
VALIDATED = ("2_zero1", "2_zero3_offload", "4_zero2", "4_zero3")
"""Those that answer held-out questions, too: each rank by itself, or rank 0 on a whole copy."""


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one_process(values: Any, phantoms: Path, tmp_path: Path) -> None:
    """Two ranks of two micro-batches and one process of four: losses to 1e-5 of their size, weights to 1e-7.

    A relative error of float32 is 6e-8; the sums over ranks and micro-batches are made in another order. With the
    feature cache they are those of pixels, whose towers ZeRO-3 then never gathers, though ranks have images or not.
    """
    files = [str(phantoms / f"{name}.json") for name in ("vqa", "region", "grounding")]
    data = {"train": [*files, str(questions_without_images(tmp_path))]}
    held_out = {"validation": [str(phantoms / f"{name}.json") for name in ("grounding", "region")]}
    asked = {"samples": 5, "batch_size": 2, "max_new_tokens": 4, "every": 3}  # no two ranks have as many
    expected = {stage: one_process(values, stage, tmp_path, data=data | held_out, validation=asked) for stage in (2, 4)}
    recipes = {}
    for name, engine in SAVING_MEMORY.items():
        cache = str(tmp_path / "cache") if name.endswith("cached") else ""
        sections = {"data": {**data, "feature_cache": cache}}
        if name in VALIDATED:
            sections = {"data": {**data, **held_out}, "validation": asked}
        recipes[name] = two_ranks(values, int(name[0]), tmp_path / name, sections, **engine)
    given = [recipe_file(recipe, tmp_path / "given" / name) for name, recipe in recipes.items()]
    ended = launch(["tests/train/rank_runs.py", *given], processes=2)
    assert ended.returncode == 0, ended.stderr
    for name, recipe in recipes.items():
        same_steps(expected[int(name[0])], recipe, name)
        if name in VALIDATED:
            (scores,) = read_rows(expected[int(name[0])], "validation.jsonl")
            assert {"mDice", "seg_said", "region/region.json", "teacher_forced/ce"} <= set(scores)
            assert read_rows(recipe, "validation.jsonl") == [pytest.approx(scores, rel=1e-5)], name
    assert {path.name[:4] for path in (tmp_path / "cache").iterdir()} == {"clip", "sam-"}


def questions_without_images(folder: Path) -> Path:
    turns = [{"from": "human", "value": "Is the liver an organ?"}, {"from": "gpt", "value": "yes"}]
    path = folder / "text.json"
    path.write_text(json.dumps([{"id": f"text{number}", "conversations": turns} for number in range(8)]))
    return path
