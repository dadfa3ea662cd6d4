"""Extra visual inputs of in-context prompts: fewer tokens per image, and masks as tokens (reference §8)."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional


class TokenCompressor(nn.Module):
    """Shortens an image's token sequence by averaging neighbours (published: 576 → 256 tokens).

    Args:
        width: D of the tokens.
        tokens: how many leave.
    """

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        """Map [N, P, D] to [N, tokens, D]; N may be 0."""
        return self.proj(self.norm(_pool_tokens(features, self.tokens)))


class MaskTokenEncoder(nn.Module):
    """Turns an example's mask into tokens: four stride-2 convolutions, then averaging (published: 64 tokens).

    Args:
        width: D of the tokens.
        tokens: how many leave.
    """

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        channels = (1, 64, 128, 256, 256)
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(channels):
            layers += [nn.Conv2d(fan_in, fan_out, kernel_size=3, stride=2, padding=1), nn.GELU()]
        self.encoder = nn.Sequential(*layers)
        self.proj = nn.Linear(channels[-1], width)
        self.norm = nn.LayerNorm(width)

    def forward(self, masks: Tensor) -> Tensor:
        """Map masks [K, 1, H, W] in {0, 1} to [K, tokens, D]; K may be 0."""
        maps = self.encoder(masks.to(self.proj.weight.dtype))  # [K, 256, H / 16, W / 16]
        return self.norm(self.proj(_pool_tokens(maps.flatten(2).transpose(1, 2), self.tokens)))


def _pool_tokens(features: Tensor, tokens: int) -> Tensor:
    """Average neighbours of the sequence [N, P, D] into [N, tokens, D]."""
    if len(features) == 0:  # pooling refuses an empty batch
        return features[:, :1].expand(-1, tokens, -1)
    return functional.adaptive_avg_pool1d(features.transpose(1, 2), tokens).transpose(1, 2)
