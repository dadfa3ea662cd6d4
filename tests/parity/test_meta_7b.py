"""The real 7B layouts, built on the meta device, have exactly the reference's keys and shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model.checkpoint.loading import init_empty, network_shapes
from model.checkpoint.names import native_to_published, published_buffers
from model.checkpoint.published_config import infer_config
from model.modeling.medplib import MedPLIBForCausalLM

SETTINGS: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32267,
    "rms_norm_eps": 1e-5,
    "mm_projector_type": "mlp2x_gelu",
    "region_fea_adapter": True,
}
Shapes = dict[str, tuple[int, ...]]


def reference(golden: Path, name: str) -> Shapes:
    return {key: tuple(shape) for key, shape in json.loads((golden / "0_shapes" / name).read_text()).items()}


def network(shapes: Shapes, **settings: Any) -> MedPLIBForCausalLM:
    """The network that our configuration reading makes of these shapes and a config.json without CLIP or SAM sizes."""
    inferred = infer_config({**SETTINGS, **settings}, shapes, clip=None, seg_token_id=32000)
    model = init_empty(inferred.config)
    assert all(parameter.is_meta for parameter in model.parameters())
    return model


def published_shapes(model: MedPLIBForCausalLM) -> Shapes:
    named = {native_to_published(name): shape for name, shape in network_shapes(model).items()}
    assert None not in named
    buffers = {name: (length,) for name, length in published_buffers(model.config).items()}
    return {str(name): shape for name, shape in named.items()} | buffers


@pytest.mark.parametrize("listing", ["medplib_7b_2e_moe.json", "lisa_7b_stage2.json"])
def test_every_key_and_shape(golden: Path, listing: str) -> None:
    expected = reference(golden, listing)
    assert published_shapes(network(expected)) == expected


def test_in_context_extras(golden: Path) -> None:
    expected = reference(golden, "medplib_7b_2e_moe.json") | reference(golden, "icl_extra_keys.json")
    assert published_shapes(network(expected)) == expected


def test_sizes_that_no_config_tells(golden: Path) -> None:
    config = network(reference(golden, "medplib_7b_2e_moe.json")).config
    assert (config.vision_config.image_size, config.vision_config.num_attention_heads) == (336, 16)
    assert config.vision_config.hidden_act == "quick_gelu"
    sam = config.sam_config.vision_config
    assert (sam.image_size, sam.num_attention_heads, list(sam.global_attn_indexes)) == (256, 12, [2, 5, 8, 11])
    assert (config.mask.geometry, config.mask.threshold) == ("legacy", 0.1)
    assert config.moe.layers == tuple(range(32))
    assert set(config.moe.num_experts) == {2}


def test_parameter_count_is_the_published_one(golden: Path) -> None:
    def millions(listing: str) -> int:
        return sum(p.numel() for p in network(reference(golden, listing)).parameters()) // 10**6

    assert 11_000 < millions("medplib_7b_2e_moe.json") < 12_500  # "12 B"
    assert 7_000 < millions("lisa_7b_stage2.json") < 7_600
