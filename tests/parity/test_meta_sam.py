"""At the published ViT-B size, SAM-Med2D has exactly the reference's names and shapes (meta device, no weights)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from model.checkpoint.names import native_to_original, sam_config_from_state_dict, state_to_native
from model.modeling.configuration import MedPLIBConfig
from model.modeling.sam_med2d import SamMed2D


@pytest.fixture
def published(golden: Path) -> dict[str, tuple[int, ...]]:
    listed = json.loads((golden / "0_shapes" / "sam_med2d_vit_b_adapter_256.json").read_text())
    return {key: tuple(shape) for key, shape in listed.items()}


def shapes(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def test_the_default_configuration_is_the_published_model(published: dict[str, tuple[int, ...]]) -> None:
    config = MedPLIBConfig()
    with torch.device("meta"):
        sam = SamMed2D(config.sam_config, config.mask)
    original = {str(native_to_original(name)): value for name, value in sam.state_dict().items()}
    assert shapes(original) == published


def test_sizes_inferred_from_the_published_shapes_rebuild_it(published: dict[str, tuple[int, ...]]) -> None:
    state = {key: torch.empty(shape, device="meta") for key, shape in published.items()}
    sizes, mask = sam_config_from_state_dict(state)
    vision = sizes.vision_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (768, 12, 12)
    assert (vision.image_size, vision.window_size, vision.global_attn_indexes) == (256, 14, [2, 5, 8, 11])
    assert (mask.adapter, mask.adapter_mlp_ratio) == (True, 0.25)
    default = MedPLIBConfig().sam_config
    assert sizes.mask_decoder_config.to_dict() == default.mask_decoder_config.to_dict()
    assert sizes.prompt_encoder_config.to_dict() == default.prompt_encoder_config.to_dict()
    with torch.device("meta"):
        sam = SamMed2D(sizes, mask)
    assert shapes(sam.state_dict()) == shapes(state_to_native(state))
