"""Names go from the published layout to ours and back without loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model.checkpoint.names import is_empty_buffer, native_to_published, published_to_native

PAIRS = [
    ("lm_head.weight", "lm_head.weight"),
    ("model.embed_tokens.weight", "model.decoder.embed_tokens.weight"),
    ("model.norm.weight", "model.decoder.norm.weight"),
    ("model.layers.31.self_attn.q_proj.weight", "model.decoder.layers.31.self_attn.q_proj.weight"),
    ("model.layers.0.post_attention_layernorm.weight", "model.decoder.layers.0.post_attention_layernorm.weight"),
    ("model.layers.3.mlp.down_proj.weight", "model.decoder.layers.3.mlp.down_proj.weight"),
    ("model.layers.3.mlp.deepspeed_moe.gate.wg.weight", "model.decoder.layers.3.mlp.router.weight"),
    (
        "model.layers.3.mlp.deepspeed_moe.experts.deepspeed_experts.1.up_proj.weight",
        "model.decoder.layers.3.mlp.experts.1.up_proj.weight",
    ),
    ("model.layers.3.mlp.mlp.gate_proj.weight", "model.decoder.layers.3.mlp.residual_expert.gate_proj.weight"),
    ("model.layers.3.mlp.coefficient.bias", "model.decoder.layers.3.mlp.residual_coefficient.bias"),
    (
        "model.vision_tower.vision_tower.vision_model.encoder.layers.2.mlp.fc1.bias",
        "model.vision_tower.clip.encoder.layers.2.mlp.fc1.bias",
    ),
    ("model.mm_projector.2.bias", "model.projector.layers.2.bias"),
    ("model.region_fea_adapter.weight", "model.region_adapter.proj.weight"),
    ("model.text_hidden_fcs.0.2.weight", "model.mask_head.query.2.weight"),
    ("model.visual_model.image_encoder.pos_embed", "model.sam.image_encoder.pos_embed"),
    ("model.mm_token_compressor.norm.bias", "model.token_compressor.norm.bias"),
    ("model.mask_encoder.encoder.6.weight", "model.mask_encoder.encoder.6.weight"),
]


@pytest.mark.parametrize(("published", "native"), PAIRS)
def test_known_names_map_both_ways(published: str, native: str) -> None:
    assert published_to_native(published) == native
    assert native_to_published(native) == published


def test_bare_linear_projector_has_no_index_when_published() -> None:
    assert published_to_native("model.mm_projector.weight") == "model.projector.layers.0.weight"
    assert native_to_published("model.projector.layers.0.weight", "linear") == "model.mm_projector.weight"
    assert native_to_published("model.projector.layers.0.weight", "mlp1x_gelu") == "model.mm_projector.0.weight"


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.vision_tower.vision_tower.vision_model.embeddings.position_ids",
    ],
)
def test_buffers_without_content_are_named_as_such(key: str) -> None:
    assert is_empty_buffer(key)
    assert published_to_native(key) is None


@pytest.mark.parametrize("key", ["model.layers.0.mlp.surprise.weight", "model.visual_model.nonsense", "optimizer"])
def test_unknown_names_are_neither_ours_nor_buffers(key: str) -> None:
    assert published_to_native(key) is None
    assert not is_empty_buffer(key)


@pytest.mark.parametrize(
    "key",
    [
        "model.projector.router.weight",
        "model.projector.experts.1.0.weight",
        "model.region_adapter.sampler.flatten_projection.weight",
    ],
)
def test_parts_of_ours_have_no_published_name(key: str) -> None:
    assert native_to_published(key) is None


@pytest.mark.parametrize("listing", ["medplib_7b_2e_moe.json", "lisa_7b_stage2.json", "icl_extra_keys.json"])
def test_every_published_name_returns_unchanged(golden: Path, listing: str) -> None:
    keys = [key for key in json.loads((golden / "0_shapes" / listing).read_text()) if not is_empty_buffer(key)]
    native = [published_to_native(key) for key in keys]
    assert None not in native
    assert len(set(native)) == len(keys)
    assert [native_to_published(name) for name in native if name] == keys
