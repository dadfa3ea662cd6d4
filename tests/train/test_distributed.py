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
from model.errors import MedPLIBError
from model.modeling.moe import MoEFeedForward
from model.train import Recipe, recipe_from, save_recipe
from model.train.checkpoint import list_checkpoints, network_of_run
from model.train.distributed import Process, join
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
            optimizer={"clip": 0.0},
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
def test_two_ranks_train_and_export(values: Any, tmp_path: Path) -> None:
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
    "2_zero2_offload": {"zero_stage": 2, "offload": "optimizer", "gradient_checkpointing": True},
    "2_zero3_offload": {"zero_stage": 3, "offload": "all"},
    "2_zero3_cached": {"zero_stage": 3},
    "4_zero1_offload": {"zero_stage": 1, "offload": "optimizer", "gradient_checkpointing": True},
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


@pytest.mark.slow
def test_shared_experts_take_the_steps_of_whole_ones(values: Any, phantoms: Path, tmp_path: Path) -> None:
    sections = {
        "lora": {"rank": 2, "dropout": 0.0, "targets": ["q", "up"]},  # up: inside every expert
        "validation": {"samples": 6, "batch_size": 2},
        "saving": {"every": 2},
    }
    sections["data"] = {"validation": [str(phantoms / "grounding.json"), str(phantoms / "vqa.json")]}
    full = {"lora": {"rank": 0}, "trainable": ["feed_forward", "router", "lm_head", "mask_decoder"]}
    alone = one_process(values, 4, tmp_path / "lora", **sections)
    alone_full = one_process(values, 4, tmp_path / "full", **full)
    shared = {"expert_parallel": 2}
    zero1 = two_ranks(values, 4, tmp_path / "zero1", sections, zero_stage=1, **shared)
    zero2 = two_ranks(values, 4, tmp_path / "zero2", full, zero_stage=2, gradient_checkpointing=True, **shared)
    offload = two_ranks(values, 4, tmp_path / "offload", full, zero_stage=2, offload="optimizer", **shared)
    given = [str(save_recipe(recipe, tmp_path / "given" / recipe.folder.name)) for recipe in (zero1, zero2, offload)]
    ended = launch(["tests/train/rank_runs.py", *given, f"+{given[0]}"], processes=2)
    assert ended.returncode == 0, ended.stderr

    same_steps(alone, zero1, "ZeRO-1, resumed")
    same_steps(alone_full, zero2, "ZeRO-2")
    same_steps(alone_full, offload, "ZeRO-2, offloaded")
    assert [row["step"] for row in read_rows(zero1)] == [1, 2, 3]
    whole, apart = (read_rows(recipe, "validation.jsonl")[-1] for recipe in (alone, zero1))
    assert apart == pytest.approx(whole, rel=1e-5)
    network, _ = load(zero1.merged)
    assert sum(isinstance(module, MoEFeedForward) for module in network.model.decoder.modules()) == 4
    of_checkpoint, _ = network_of_run(list_checkpoints(zero1.folder)[-1])
    for name, value in network.state_dict().items():
        assert value.equal(of_checkpoint.state_dict()[name]), name


def test_processes_must_be_a_multiple(values: Any) -> None:
    chosen = values(4)
    chosen["engine"] |= {"kind": "deepspeed", "expert_parallel": 2}
    with pytest.raises(MedPLIBError, match="does not divide the number of processes, 1"):
        join(recipe_from(chosen).engine)


@pytest.mark.slow
def test_zero3_never_needs_room_for_the_whole_network(values: Any, tmp_path: Path) -> None:
    """DeepSpeed moves a network that it gets whole to each GPU whole; one that is shared out already stays so."""
    chosen = values(2)
    chosen["engine"] |= {"kind": "deepspeed", "zero_stage": 3}
    given = save_recipe(recipe_from(chosen), tmp_path / "given")
    ended = launch(["tests/train/rank_sharing.py", str(given)], processes=2)
    assert ended.returncode == 0, ended.stderr
    told = [line.split()[1:] for line in ended.stdout.splitlines() if line.startswith("held ")]
    assert len(told) == 2
    for whole, shares, numbers in (map(int, line) for line in told):
        assert whole == 0
        assert shares == pytest.approx(numbers / 2, rel=0.01)
