"""The CLIP tower: the chosen hidden state, nothing more computed than it needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import CLIPVisionConfig

from model.modeling.vision_tower import VisionTower


def tower(**options: Any) -> VisionTower:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=7
    )
    return VisionTower(config, **options).eval()


IMAGES = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("select_layer", [-1, -2, 0, 1])
def test_features_are_the_hidden_state_transformers_gives(select_layer: int) -> None:
    model = tower(select_layer=select_layer)
    states = model.clip(IMAGES, output_hidden_states=True).hidden_states
    assert_close(model(IMAGES), states[select_layer][:, 1:])


def test_the_class_token_is_kept_on_request() -> None:
    assert tower()(IMAGES).shape == (2, 16, 16)
    assert tower(select_feature="cls_patch")(IMAGES).shape == (2, 17, 16)


@pytest.mark.parametrize(("feature", "tokens"), [("patch", 16), ("cls_patch", 17)])
def test_no_image_gives_no_feature(feature: Any, tokens: int) -> None:
    assert tower(select_feature=feature)(torch.zeros(0, 3, 28, 28)).shape == (0, tokens, 16)


def test_layers_above_the_chosen_one_do_not_run() -> None:
    model = tower()

    def fail(*_: Any) -> None:
        raise AssertionError("the last layer ran")

    model.clip.encoder.layers[-1].register_forward_pre_hook(fail)
    model(IMAGES)


def test_a_graph_is_recorded_only_for_trainable_towers() -> None:
    model = tower()
    assert model(IMAGES).requires_grad
    assert not model.requires_grad_(False)(IMAGES).requires_grad


@pytest.mark.parametrize(("option", "value"), [("select_layer", 4), ("select_layer", -5), ("select_feature", "cls")])
def test_impossible_choices_are_refused(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"vision_{option}"):
        tower(**{option: value})
