"""Projectors: shapes, names, up-cycling."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from model.modeling.configuration import ProjectorConfig
from model.modeling.projector import DenseProjector, build_projector

VISION, TEXT = 6, 10


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("linear", {"layers.0.weight", "layers.0.bias"}),
        ("mlp1x_gelu", {"layers.0.weight", "layers.0.bias"}),
        ("mlp3x_gelu", {f"layers.{i}.{part}" for i in (0, 2, 4) for part in ("weight", "bias")}),
        (
            "moe_mlp2x_gelu",
            {"router.weight"} | {f"experts.{e}.{i}.{p}" for e in (0, 1) for i in (0, 2) for p in ("weight", "bias")},
        ),
    ],
)
def test_projectors_have_the_checkpoint_names_and_shapes(kind: str, names: set[str]) -> None:
    projector = build_projector(ProjectorConfig(type=kind), VISION, TEXT)
    assert set(projector.state_dict()) == names
    assert projector(torch.randn(2, 4, VISION)).features.shape == (2, 4, TEXT)
    assert projector(torch.zeros(0, 4, VISION)).features.shape == (0, 4, TEXT)


def test_identity_passes_features_through() -> None:
    projector = build_projector(ProjectorConfig(type="identity"), VISION, VISION)
    features = torch.randn(2, 4, VISION)
    assert torch.equal(projector(features).features, features)
    assert not projector.state_dict()


@pytest.mark.parametrize(
    ("kind", "message"), [("mlp0x_gelu", "unknown"), ("qformer", "unknown"), ("identity", "width")]
)
def test_impossible_projectors_are_refused(kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_projector(ProjectorConfig(type=kind), VISION, TEXT)


@pytest.mark.parametrize(("num_experts", "top_k"), [(2, 1), (4, 1), (4, 2)])
@pytest.mark.parametrize("training", [True, False])
def test_experts_equal_to_a_dense_projector_compute_what_it_does(num_experts: int, top_k: int, training: bool) -> None:
    torch.manual_seed(0)
    dense = build_projector(ProjectorConfig(), VISION, TEXT)
    assert isinstance(dense, DenseProjector)
    config = ProjectorConfig(type="moe_mlp2x_gelu", num_experts=num_experts, top_k=top_k)
    mixture = build_projector(config, VISION, TEXT).train(training)
    for expert in mixture.experts:
        expert.load_state_dict(dense.layers.state_dict())
    features = torch.randn(3, 5, VISION)
    assert_close(mixture(features).features, dense(features).features)


def test_image_tokens_teach_the_router_and_load_is_reported() -> None:
    torch.manual_seed(0)
    projector = build_projector(ProjectorConfig(type="moe_mlp2x_gelu"), VISION, TEXT)
    output = projector(torch.randn(3, 5, VISION))
    output.features.square().sum().backward()
    assert projector.router.weight.grad.abs().sum() > 0
    assert output.aux_loss is not None and output.aux_loss >= 0
    assert output.router is not None and int(output.router.expert_counts.sum()) == 15
