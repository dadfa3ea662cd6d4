"""What a published config.json does not say is read off the tensors; contradictions are told, not followed."""

from __future__ import annotations

from typing import Any

import pytest

from model.checkpoint.loading import network_shapes
from model.checkpoint.names import native_to_published
from model.checkpoint.published_config import NATIVE_SECTION, infer_config, published_settings, text_config
from model.errors import MedPLIBError
from tests.tiny import tiny_model

Shapes = dict[str, tuple[int, ...]]


def published_shapes(**options: Any) -> Shapes:
    model = tiny_model(**options)
    kind = model.config.projector.type
    return {str(native_to_published(name, kind)): shape for name, shape in network_shapes(model).items()}


def settings(**options: Any) -> dict[str, Any]:
    """config.json as the published code writes it: without our own section."""
    values = published_settings(tiny_model(**options).config, "float32", "nowhere/clip")
    del values[NATIVE_SECTION]
    return values


def test_sizes_come_from_tensors() -> None:
    config = infer_config(settings(), published_shapes(), None, 130).config
    original = tiny_model().config
    assert config.moe.layers == original.moe.layers
    assert config.moe.num_experts == original.moe.num_experts
    assert config.text_config.vocab_size == original.text_config.vocab_size
    for name in ("hidden_size", "image_size", "patch_size", "num_hidden_layers", "intermediate_size"):
        assert getattr(config.vision_config, name) == getattr(original.vision_config, name)
    for name in ("hidden_size", "image_size", "num_attention_heads", "window_size", "global_attn_indexes"):
        assert getattr(config.sam_config.vision_config, name) == getattr(original.sam_config.vision_config, name)
    assert (config.mask.geometry, config.mask.threshold) == ("legacy", 0.1)
    assert config.seg_token_id == 130


def test_own_section_restores_the_configuration_whole() -> None:
    original = tiny_model(conversation_turns=4).config
    values = published_settings(original, "float32", "nowhere/clip")
    assert infer_config(settings(), published_shapes(), None, 0).config.conversation_turns == 1
    config = infer_config(values, published_shapes(), None, 0).config
    assert config.to_dict() == original.to_dict()


def test_tensors_decide_whether_there_is_a_mixture() -> None:
    inferred = infer_config(settings(experts=2), published_shapes(experts=0), None, 0)
    assert not inferred.config.moe.enabled
    assert any("no mixture" in note or "0 mixture layers" in note for note in inferred.notes)


@pytest.mark.parametrize(
    ("section", "said"), [({"num_experts": [4]}, "num_experts"), ({"moe_layers_idx": [1]}, "names mixture layers")]
)
def test_contradictions_in_the_moe_section_are_noted(section: dict[str, Any], said: str) -> None:
    values = settings()
    values["moe"] |= section
    inferred = infer_config(values, published_shapes(), None, 0)
    assert inferred.config.moe.num_experts == (2, 2)
    assert any(said in note for note in inferred.notes)


def test_one_expert_count_for_all_layers_is_no_contradiction() -> None:
    values = settings()
    values["moe"] |= {"num_experts": [2], "moe_layers_idx": None}
    assert not any("experts" in note for note in infer_config(values, published_shapes(), None, 0).notes)


@pytest.mark.parametrize("kind", ["linear", "mlp1x_gelu", "mlp3x_gelu"])
def test_projector_kind_follows_the_tensors(kind: str) -> None:
    shapes = published_shapes(projector={"type": kind})
    assert infer_config(settings() | {"mm_projector_type": "mlp2x_gelu"}, shapes, None, 0).config.projector.type == kind


@pytest.mark.parametrize("told", [{}, {"pad_token_id": None}, {"pad_token_id": -1}])
def test_padding_is_never_a_token_of_the_vocabulary_s_end(told: dict[str, Any]) -> None:
    settings = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9} | told
    assert text_config(settings, {}, []).pad_token_id == 0


def test_missing_sizes_are_one_sentence() -> None:
    with pytest.raises(MedPLIBError, match="lacks hidden_size"):
        infer_config({}, published_shapes(), None, 0)


def test_missing_clip_says_what_to_give() -> None:
    shapes = {name: shape for name, shape in published_shapes().items() if "vision_tower" not in name}
    with pytest.raises(MedPLIBError, match="--vision_tower"):
        infer_config(settings(), shapes, None, 0)
