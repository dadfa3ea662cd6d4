"""From CLIP patch features to decoder embeddings: linear, MLP, identity, or a mixture of MLPs (reference §1)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor, nn

from model.modeling.configuration import ProjectorConfig
from model.modeling.moe import MoEFeedForward, RouterStats


@dataclass(frozen=True)
class ProjectorOutput:
    """Projected patch features.

    Attributes:
        features: [N, P, D].
        aux_loss: scalar load-balancing loss over image tokens; None for a dense projector.
        router: what the router did; None for a dense projector.
    """

    features: Tensor
    aux_loss: Tensor | None = None
    router: RouterStats | None = None


class DenseProjector(nn.Module):
    """A plain projector.

    Args:
        layers: maps [..., Dv] to [..., D].
    """

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, features: Tensor) -> ProjectorOutput:
        """Project patch features [N, P, Dv]; N may be 0."""
        return ProjectorOutput(self.layers(features))


class MoEProjector(MoEFeedForward):
    """A mixture of MLPs over image tokens, with its own router.

    It differs from the decoder's mixture in two ways, because no residual connection runs beside a projector: a token
    is never dropped (it would vanish from the image), and a token's shares sum to one (a share p < 1 would scale the
    embedding that the decoder has learnt to read). Hence a projector up-cycled from a dense one starts out equal to it.

    Args:
        config: number of experts and experts per token.
        experts: MLPs that map [n, Dv] to [n, D].
        vision_dim: width Dv of the patch features.
    """

    def __init__(self, config: ProjectorConfig, experts: list[nn.Sequential], vision_dim: int) -> None:
        super().__init__(experts, vision_dim, top_k=config.top_k, drop_tokens=False, renormalise=True)

    def forward(self, features: Tensor) -> ProjectorOutput:  # type: ignore[override]
        """Project patch features [N, P, Dv]; N may be 0."""
        output = super().forward(features)
        return ProjectorOutput(output.hidden, output.aux_loss, output.router)


def build_projector(config: ProjectorConfig, vision_dim: int, text_dim: int) -> DenseProjector | MoEProjector:
    """The projector that ``config.type`` names: ``linear``, ``mlpNx_gelu``, ``identity`` or ``moe_mlpNx_gelu``.

    Raises:
        ValueError: the type is unknown, or ``identity`` is asked to change the width.
    """
    if config.type.startswith("moe_"):
        experts = [_layers(config.type.removeprefix("moe_"), vision_dim, text_dim) for _ in range(config.num_experts)]
        return MoEProjector(config, experts, vision_dim)
    return DenseProjector(_layers(config.type, vision_dim, text_dim))


def _layers(kind: str, vision_dim: int, text_dim: int) -> nn.Sequential:
    if kind == "identity":
        if vision_dim != text_dim:
            raise ValueError(f"an identity projector cannot turn width {vision_dim} into {text_dim}")
        return nn.Sequential()
    depth = 1 if kind == "linear" else _mlp_depth(kind)
    layers: list[nn.Module] = [nn.Linear(vision_dim, text_dim)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(text_dim, text_dim)]
    return nn.Sequential(*layers)


def _mlp_depth(kind: str) -> int:
    match = re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind)
    if match is None:
        raise ValueError(f"unknown projector type {kind!r:.80}; known: linear, mlpNx_gelu, identity, moe_mlpNx_gelu")
    return int(match[1])
