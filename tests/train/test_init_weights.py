"""What each stage trains (reference §6), and QLoRA: frozen weights in 8 or 4 bits while LoRA learns."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoint import load
from model.errors import MedPLIBError
from model.train import recipe_from, run, save_recipe
from model.train.checkpoint import list_checkpoints, network_of_run
from model.train.init_weights import (
    add_lora,
    count_trainable,
    is_lora,
    is_quantized,
    native_name,
    path_problems,
    set_trainable,
    starting_network,
)
from model.train.recipe import PUBLISHED, Lora
from model.train.trainer import Trainer
from tests.tiny import tiny_model
from tests.train.launching import launch
from tests.train.same_steps import read_rows

LAYER = r"model\.decoder\.layers\.\d+\."
FULL = {
    1: [r"model\.projector\..*"],
    2: [
        r"lm_head\.weight",
        r"model\.decoder\.embed_tokens\.weight",
        LAYER + r"(input|post_attention)_layernorm\.weight",
        r"model\.projector\..*",
        r"model\.region_adapter\..*",
    ],
    3: [r"model\.sam\.mask_decoder\..*", r"model\.mask_head\..*"],
    4: [
        LAYER + r"mlp\.router\.weight",
        r"lm_head\.weight",
        r"model\.decoder\.embed_tokens\.weight",
        r"model\.sam\.mask_decoder\..*",
        r"model\.mask_head\..*",
        r"model\.region_adapter\..*",
    ],
}
ADAPTED = {
    1: None,
    2: LAYER + r"(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj",
    3: LAYER + r"mlp\.(gate|up|down)_proj",
    4: LAYER + r"(self_attn\.[qv]|mlp\.experts\.\d+\.(gate|up|down))_proj",
}


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_each_stage_trains_the_published_set_and_nothing_else(stage: int) -> None:
    network = tiny_model(experts=2 if stage == 4 else 0)
    modules = [name for name, _ in network.named_modules()]
    parameters = [name for name, _ in network.named_parameters()]
    settings = PUBLISHED[stage]
    adapted = add_lora(network, Lora(**settings["lora"]))
    set_trainable(network, settings["trainable"])

    pattern = ADAPTED[stage]
    assert sorted(adapted) == sorted(name for name in modules if pattern and re.fullmatch(pattern, name))
    full = {name for name in parameters if any(re.fullmatch(wanted, name) for wanted in FULL[stage])}
    learning = {name for name, value in network.named_parameters() if value.requires_grad}
    assert {native_name(name) for name in learning if not is_lora(name)} == full
    assert {name for name in learning if is_lora(name)} == {
        f"{name}.lora_{side}.default.weight" for name in adapted for side in "AB"
    }
    counts = count_trainable(network)
    assert counts["total"] == sum(value.numel() for value in network.parameters() if value.requires_grad)
    assert counts["total"] == sum(count for part, count in counts.items() if part != "total")


def test_a_part_the_network_lacks_is_named() -> None:
    network = tiny_model(experts=0)
    with pytest.raises(MedPLIBError, match="router"):
        set_trainable(network, ["router", "projector"])


def test_parts_can_be_named_by_a_pattern() -> None:
    network = tiny_model(experts=0)
    set_trainable(network, [r"re:model\.decoder\.layers\.1\."])
    learning = [name for name, value in network.named_parameters() if value.requires_grad]
    assert learning and all(name.startswith("model.decoder.layers.1.") for name in learning)


installed = pytest.mark.skipif(not find_spec("bitsandbytes"), reason="the gpu extra (bitsandbytes) is not installed")
LORA = {"rank": 2, "dropout": 0.0, "targets": ["q", "v", "gate", "up", "down"]}
SCHEMES = pytest.mark.parametrize("scheme", ["int8", "nf4"])


def quantised(values: Any, scheme: str, stage: int = 4, **sections: Any) -> dict[str, Any]:
    chosen = values(stage, lora={**LORA, "quantize": scheme}, **sections)
    if stage == 4:
        chosen["model"]["grounding"] = chosen["model"]["base"]
        chosen["mixture"] = {"random_token_priority": False, **chosen.get("mixture", {})}
    return chosen


@installed
@SCHEMES
def test_what_is_handed_on_computes_what_was_trained(values: Any, scheme: str) -> None:
    trainer = Trainer(recipe_from(quantised(values, scheme, optimizer={"lr": 1e-2}, mixture={"use_residual": True})))
    trainer.set_up()
    try:
        trainer.train_step()
        trainer.train_step()
        batch = trainer.next_batch()
        with torch.no_grad():
            expected = trainer.engine.forward(batch, return_logits=True).logits
        weights = dict(trainer.engine.network.named_parameters())
        learnt = weights["model.decoder.layers.0.mlp.experts.0.up_proj.lora_B.default.weight"]  # from zero
        assert learnt.abs().max() > 0
        integers = [name for name, value in weights.items() if not value.is_floating_point()]
        merged, _ = load(trainer.export())
    finally:
        trainer.close()
    assert len(integers) == 4 * (4 + 3 * 3)  # layers × (attention, two experts and the residual one)
    with torch.no_grad():
        found = merged.train()(**batch, return_logits=True).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@installed
def test_eight_bits_lose_little(values: Any, tmp_path: Path) -> None:
    schedule = {"schedule": {"batch_size": 2, "accumulation": 1, "max_steps": 3}}
    whole, rounded = (
        recipe_from(quantised(values, scheme, output=str(tmp_path / scheme), **schedule)) for scheme in ("none", "int8")
    )
    run(whole)
    run(rounded)
    for row, same in zip(read_rows(whole), read_rows(rounded), strict=True):
        assert same["loss"] == pytest.approx(row["loss"], rel=1e-2)
    checkpoint, _ = network_of_run(list_checkpoints(rounded.folder)[-1])
    assert not is_quantized(checkpoint)
    for name, value in load(rounded.merged)[0].state_dict().items():
        assert value.equal(checkpoint.state_dict()[name]), name


@installed
def test_two_ranks_train_and_resume(values: Any, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="the train extra (deepspeed) is not installed")
    recipes, arguments = [], []
    for scheme in ("int8", "nf4"):
        chosen = quantised(values, scheme, output=str(tmp_path / scheme), saving={"every": 2})
        chosen["schedule"] = {"batch_size": 1, "accumulation": 1, "max_steps": 3}
        chosen["engine"] |= {"kind": "deepspeed", "zero_stage": 2, "gradient_checkpointing": True}
        recipes.append(recipe_from(chosen))
        given = save_recipe(recipes[-1], tmp_path / "given" / scheme)
        arguments += [str(given), f"+{given}"]
    ended = launch(["tests/train/rank_runs.py", *arguments], processes=2)
    assert ended.returncode == 0, ended.stderr
    for recipe in recipes:
        first = [json.loads(line)["loss"] for line in (recipe.folder / "first.jsonl").read_text().splitlines()]
        assert [row["loss"] for row in read_rows(recipe)] == first
        merged = load(recipe.folder / "first")[0].state_dict()
        for name, value in load(recipe.merged)[0].state_dict().items():
            assert value.equal(merged[name]), name


@installed
def test_integers_do_not_learn(values: Any) -> None:
    chosen = quantised(values, "int8", stage=2, trainable=["re:.*self_attn.*"])
    with pytest.raises(MedPLIBError, match=r"keeps model.decoder.layers.0.self_attn.q_proj.weight as integers"):
        starting_network(recipe_from(chosen))


@pytest.mark.skipif(bool(find_spec("bitsandbytes")), reason="bitsandbytes is installed")
def test_without_the_library_nothing_is_loaded(values: Any) -> None:
    (problem,) = path_problems(recipe_from(quantised(values, "nf4")))
    assert "needs bitsandbytes, and that is not installed; install the gpu extra" in problem
