"""Merging LoRA leaves the same function under the plain names."""

from __future__ import annotations

import pytest
import torch

from model.checkpoint.lora import merge_lora, merge_lora_state
from model.errors import MedPLIBError
from tests.tiny import tiny_model

IDS = torch.tensor([[1, 20, 30, 40]])
TARGETS = r".*decoder\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.experts\.\d+\.(gate|up|down)_proj)"


def wrapped(modules_to_save: list[str] | None = None):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS, modules_to_save=modules_to_save)
    model = get_peft_model(tiny_model(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_merged_network_is_plain_and_computes_the_same(modules_to_save: list[str] | None) -> None:
    plain = tiny_model()
    model = wrapped(modules_to_save)
    before = model.base_model.model(input_ids=IDS).logits
    merged = merge_lora(model)
    assert type(merged) is type(plain)
    assert merged.state_dict().keys() == plain.state_dict().keys()
    after = merged(input_ids=IDS).logits
    assert torch.allclose(before, after, atol=1e-4)
    assert not torch.allclose(after, plain(input_ids=IDS).logits, atol=1e-2)


def test_experts_are_merged_too() -> None:
    name = "model.decoder.layers.1.mlp.experts.1.down_proj.weight"
    assert not torch.equal(merge_lora(wrapped()).state_dict()[name], tiny_model().state_dict()[name])


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_state_dict_merges_like_the_network(modules_to_save: list[str] | None) -> None:
    model = wrapped(modules_to_save)
    merged = merge_lora_state(model.state_dict(), scaling=16 / 4)
    expected = merge_lora(model).state_dict()
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(merged[name], value, atol=1e-6), name


def test_half_an_adapter_is_refused() -> None:
    with pytest.raises(MedPLIBError, match="incomplete"):
        merge_lora_state({"a.base_layer.weight": torch.ones(2, 2), "a.lora_A.default.weight": torch.ones(1, 2)}, 1.0)
