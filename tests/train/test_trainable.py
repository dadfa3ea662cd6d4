"""What each stage trains, parameter by parameter, as the published table says (reference §6)."""

from __future__ import annotations

import re

import pytest

from model.errors import MedPLIBError
from model.train.recipe import Lora
from model.train.stages import PUBLISHED
from model.train.trainable import add_lora, count_trainable, is_lora, native_name, set_trainable
from tests.tiny import tiny_model

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
