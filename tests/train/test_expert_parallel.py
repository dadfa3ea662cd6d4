"""Experts shared out over two ranks: the same steps as one process with native layers, resumed and handed on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model.checkpoint import load
from model.errors import MedPLIBError
from model.modeling.moe import MoEFeedForward
from model.train import recipe_from, save_recipe
from model.train.checkpoints import list_checkpoints, network_of_run
from model.train.process import join
from tests.train.launching import launch
from tests.train.same_steps import one_process, read_rows, same_steps, two_ranks

pytest.importorskip("deepspeed", reason="the train extra (deepspeed) is not installed")


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
    offload = two_ranks(values, 4, tmp_path / "offload", full, zero_stage=2, offload="optimiser", **shared)
    given = [str(save_recipe(recipe, tmp_path / "given" / recipe.folder.name)) for recipe in (zero1, zero2, offload)]
    ended = launch(["tests/train/rank_runs.py", *given, f"+{given[0]}"], processes=2)
    assert ended.returncode == 0, ended.stderr

    same_steps(alone, zero1, "ZeRO-1, resumed")
    same_steps(alone_full, zero2, "ZeRO-2")
    same_steps(alone_full, offload, "ZeRO-2, offloaded")
    assert [row["step"] for row in read_rows(zero1)] == [1, 2, 3]
    whole, apart = (read_validation(recipe.folder) for recipe in (alone, zero1))
    assert apart == pytest.approx(whole, rel=1e-5)
    network, _ = load(zero1.merged)
    assert sum(isinstance(module, MoEFeedForward) for module in network.model.decoder.modules()) == 4
    of_checkpoint, _ = network_of_run(list_checkpoints(zero1.folder)[-1])
    for name, value in network.state_dict().items():
        assert value.equal(of_checkpoint.state_dict()[name]), name


ENGINES = {
    "needs engine.zero_stage 1 or 2": {"kind": "deepspeed", "zero_stage": 3, "expert_parallel": 2},
    "engine.kind is torch": {"kind": "torch", "zero_stage": 2, "expert_parallel": 2},
    "expected a divisor of mixture.num_experts": {"kind": "deepspeed", "zero_stage": 2, "expert_parallel": 3},
    "expected at least 1": {"kind": "deepspeed", "zero_stage": 2, "expert_parallel": 0},
}


@pytest.mark.parametrize("said", ENGINES)
def test_impossible_sharing_is_refused(values: Any, said: str) -> None:
    chosen = values(4, mixture={"num_experts": [4]})
    chosen["engine"] |= ENGINES[said]
    with pytest.raises(MedPLIBError, match=said):
        recipe_from(chosen)


def test_processes_must_be_a_multiple(values: Any) -> None:
    chosen = values(4)
    chosen["engine"] |= {"kind": "deepspeed", "expert_parallel": 2}
    with pytest.raises(MedPLIBError, match="does not divide the number of processes, 1"):
        join(recipe_from(chosen).engine)


def read_validation(folder: Path) -> dict[str, float]:
    return json.loads((folder / "validation.jsonl").read_text().splitlines()[-1])
