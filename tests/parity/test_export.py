"""The published way from a LoRA run to a merged directory, reproduced: names, shapes, arithmetic, configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from model.checkpoint.loading import init_empty, network_shapes
from model.checkpoint.lora import merge_lora, merge_lora_state
from model.checkpoint.names import native_to_published, published_buffers
from model.checkpoint.pretrained import read_clip_config
from model.checkpoint.published_config import NATIVE_SECTION, infer_config, published_settings

WRITERS_OWN = ("_name_or_path", "transformers_version")


@pytest.fixture(scope="module")
def export(golden: Path) -> dict[str, Any]:
    return json.loads((golden / "10_export" / "export.json").read_text())


@pytest.fixture(scope="module")
def numbers(golden: Path) -> dict[str, torch.Tensor]:
    return load_file(golden / "10_export" / "numeric_check.safetensors")


def test_merging_a_lora_run_gives_the_published_names(export: dict[str, Any]) -> None:
    combined = {name: torch.zeros(shape) for name, shape in export["combined_keys"].items()}
    merged = merge_lora_state(combined, scaling=2.0)
    assert {name: list(value.shape) for name, value in merged.items()} == export["merged_keys"]


@pytest.mark.parametrize("prefix", ["", "q_"])
def test_merged_numbers_are_the_published_ones(numbers: dict[str, torch.Tensor], prefix: str) -> None:
    state = {
        "x.base_layer.weight": numbers[f"{prefix}W"],
        "x.lora_A.default.weight": numbers[f"{prefix}A"],
        "x.lora_B.default.weight": numbers[f"{prefix}B"],
    }
    merged = merge_lora_state(state, scaling=16 / 8)["x.weight"]
    torch.testing.assert_close(merged, numbers[f"{prefix}merged"], rtol=1e-5, atol=1e-7)


def test_merging_layers_gives_the_published_numbers(numbers: dict[str, torch.Tensor]) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    plain = nn.Sequential()
    plain.add_module("gate_proj", nn.Linear(64, 128, bias=False))
    model = inject_adapter_in_model(LoraConfig(r=8, lora_alpha=16, target_modules=["gate_proj"]), plain)
    with torch.no_grad():
        model.gate_proj.base_layer.weight.copy_(numbers["W"])
        model.gate_proj.lora_A["default"].weight.copy_(numbers["A"])
        model.gate_proj.lora_B["default"].weight.copy_(numbers["B"])
    merged = merge_lora(model).state_dict()
    assert list(merged) == ["gate_proj.weight"]
    torch.testing.assert_close(merged["gate_proj.weight"], numbers["merged"], rtol=1e-5, atol=1e-7)


def test_network_has_exactly_the_exported_keys(golden: Path, export: dict[str, Any]) -> None:
    clip = read_clip_config(golden / "models" / "clip-vit-tiny-patch14-336")
    shapes = {name: tuple(shape) for name, shape in export["merged_keys"].items()}
    inferred = infer_config(export["config"], shapes, clip, seg_token_id=640)
    model = init_empty(inferred.config)
    ours = {native_to_published(name): shape for name, shape in network_shapes(model).items()}
    ours |= {name: (length,) for name, length in published_buffers(model.config).items()}
    assert ours == shapes
    assert not inferred.notes


def test_exported_configuration_says_what_the_published_one_says(golden: Path, export: dict[str, Any]) -> None:
    clip = read_clip_config(golden / "models" / "clip-vit-tiny-patch14-336")
    shapes = {name: tuple(shape) for name, shape in export["merged_keys"].items()}
    config = infer_config(export["config"], shapes, clip, seg_token_id=640).config
    ours = published_settings(config, "float32", export["config"]["vision_tower"])
    del ours[NATIVE_SECTION]
    stated = {name: value for name, value in export["config"].items() if name not in WRITERS_OWN}
    assert {name: ours.get(name, "absent") for name in stated} == stated
    assert set(ours) - set(stated) <= {"rope_theta", "attention_bias"}  # later versions state these
