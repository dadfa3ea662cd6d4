"""SAM's original names ↔ ours, and sizes read off shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import SamConfig

from model.checkpoint.names import (
    native_to_original,
    original_to_native,
    sam_config_from_state_dict,
    state_to_native,
)
from model.errors import MedPLIBError
from model.modeling.configuration import MaskConfig
from model.modeling.sam_med2d import SamMed2D

State = dict[str, torch.Tensor]


def state_to_original(state: State) -> State:
    return {str(native_to_original(name)): value for name, value in state.items()}


def config_of(width: int = 24, depth: int = 3, heads: int = 2, prompt: int = 32, **vision: Any) -> SamConfig:
    """Sizes chosen so that no two facts share a number by accident."""
    return SamConfig(
        vision_config={
            "hidden_size": width,
            "num_hidden_layers": depth,
            "num_attention_heads": heads,
            "mlp_dim": 40,
            "image_size": 64,
            "patch_size": 8,
            "window_size": 5,
            "global_attn_indexes": [0, 2],
            "output_channels": prompt,
            "num_pos_feats": prompt // 2,
            **vision,
        },
        prompt_encoder_config={"hidden_size": prompt, "image_size": 64, "patch_size": 8, "mask_input_channels": 12},
        mask_decoder_config={
            "hidden_size": prompt,
            "mlp_dim": 56,
            "num_hidden_layers": 3,
            "num_multimask_outputs": 2,
            "iou_head_hidden_dim": 28,
            "layer_norm_eps": 1e-5,
        },
    )


def state_of(config: SamConfig, mask: MaskConfig | None = None) -> State:
    with torch.device("meta"):
        return SamMed2D(config, mask or MaskConfig()).state_dict()


@pytest.mark.parametrize(
    ("original", "native"),
    [
        ("image_encoder.pos_embed", "image_encoder.pos_embed"),
        ("image_encoder.patch_embed.proj.bias", "image_encoder.patch_embed.projection.bias"),
        ("image_encoder.blocks.11.norm2.weight", "image_encoder.layers.11.layer_norm2.weight"),
        ("image_encoder.blocks.3.attn.rel_pos_h", "image_encoder.layers.3.attn.rel_pos_h"),
        ("image_encoder.blocks.3.Adapter.channel.0.weight", "image_encoder.layers.3.adapter.channel.0.weight"),
        ("image_encoder.neck.3.bias", "image_encoder.neck.layer_norm2.bias"),
        (
            "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
            "prompt_encoder.shared_embedding.positional_embedding",
        ),
        ("prompt_encoder.point_embeddings.2.weight", "prompt_encoder.point_embed.2.weight"),
        ("prompt_encoder.mask_downscaling.6.weight", "prompt_encoder.mask_embed.conv3.weight"),
        ("mask_decoder.transformer.layers.1.norm4.bias", "mask_decoder.transformer.layers.1.layer_norm4.bias"),
        (
            "mask_decoder.output_hypernetworks_mlps.3.layers.1.weight",
            "mask_decoder.output_hypernetworks_mlps.3.layers.0.weight",
        ),
        ("mask_decoder.iou_prediction_head.layers.2.bias", "mask_decoder.iou_prediction_head.proj_out.bias"),
        ("mask_decoder.output_upscaling.3.weight", "mask_decoder.upscale_conv2.weight"),
    ],
)
def test_known_pairs(original: str, native: str) -> None:
    assert original_to_native(original) == native
    assert native_to_original(native) == original


@pytest.mark.parametrize("adapter", [True, False])
def test_every_parameter_goes_there_and_back_unchanged(adapter: bool) -> None:
    torch.manual_seed(0)
    state = SamMed2D(config_of(), MaskConfig(adapter=adapter)).state_dict()
    original = state_to_original(state)
    returned = state_to_native(original)
    assert list(returned) == list(state)
    assert len(original) == len(state)
    assert all(returned[key] is state[key] for key in state)  # not even a copy


@pytest.mark.parametrize(
    "key",
    [
        "image_encoder.blocks.x.norm1.weight",
        "image_encoder.layers.0.layer_norm1.weight",
        "image_encoder.blocks.0.adapter.norm.weight",
        "mask_decoder.iou_prediction_head.layers.3.weight",
        "model.visual_model.image_encoder.pos_embed",
        "prompt_encoder.point_embeddings.weight",
        "pixel_mean",
        "",
    ],
)
def test_names_of_another_kind_are_none(key: str) -> None:
    assert original_to_native(key) is None


def test_an_unknown_key_is_named() -> None:
    with pytest.raises(MedPLIBError, match=r"1 of 2 keys are not SAM's original names \(pixel_mean\)"):
        state_to_native({"pixel_mean": 0, "image_encoder.pos_embed": 1})


@pytest.mark.parametrize(
    "config",
    [
        config_of(),
        config_of(width=36, heads=3, depth=2, global_attn_indexes=[1]),
        config_of(global_attn_indexes=[0, 1, 2], window_size=8),
        config_of(global_attn_indexes=[]),
    ],
    ids=["mixed", "three heads", "all global", "all windows"],
)
def test_sizes_are_read_off_shapes(config: SamConfig) -> None:
    found, mask = sam_config_from_state_dict(state_to_original(state_of(config, MaskConfig(adapter_mlp_ratio=0.5))))
    vision, expected = found.vision_config.to_dict(), config.vision_config.to_dict()
    ratio, expected["mlp_ratio"] = vision["mlp_ratio"], vision["mlp_ratio"]
    assert vision == expected
    assert ratio * vision["hidden_size"] == vision["mlp_dim"] == 40
    assert found.prompt_encoder_config.to_dict() == config.prompt_encoder_config.to_dict()
    assert found.mask_decoder_config.to_dict() == config.mask_decoder_config.to_dict()
    assert (mask.adapter, mask.adapter_mlp_ratio) == (True, 0.5)


def test_a_plain_sam_has_no_adapter() -> None:
    state = state_to_original(state_of(config_of(), MaskConfig(adapter=False)))
    found, mask = sam_config_from_state_dict(state)
    assert not mask.adapter
    assert set(state_of(found, mask)) == set(state_to_native(state))


def test_a_missing_tensor_is_named() -> None:
    state = state_to_original(state_of(config_of()))
    del state["image_encoder.blocks.1.attn.rel_pos_h"]
    with pytest.raises(MedPLIBError, match=r"lack image_encoder\.blocks\.1\.attn\.rel_pos_h"):
        sam_config_from_state_dict(state)
    with pytest.raises(MedPLIBError, match="lack image_encoder"):
        sam_config_from_state_dict({})


def test_windows_of_two_sizes_are_refused() -> None:
    state = state_to_original(state_of(config_of(global_attn_indexes=[])))
    state["image_encoder.blocks.1.attn.rel_pos_h"] = torch.empty(5, 12, device="meta")
    with pytest.raises(MedPLIBError, match=r"\[3, 5\] patches"):
        sam_config_from_state_dict(state)
