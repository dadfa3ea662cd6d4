"""From a ``<SEG>`` hidden state to a mask prompt, and from low-resolution logits to a mask at image size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.utils.generic import maybe_autocast

Geometry = Literal["exact", "legacy"]
Size = tuple[int, int]


class MaskHead(nn.Module):
    """Turns the decoder's hidden state before ``<SEG>`` into SAM's text prompt (published: ``text_hidden_fcs``).

    Args:
        text_dim: width D of the language model.
        query_dim: width C of SAM's prompts.
    """

    def __init__(self, text_dim: int, query_dim: int) -> None:
        super().__init__()
        self.query = nn.Sequential(nn.Linear(text_dim, text_dim), nn.ReLU(), nn.Linear(text_dim, query_dim))

    def forward(self, seg_hidden: Tensor) -> Tensor:
        """Map hidden states [M, D] to prompts [M, C]; M may be 0."""
        return self.query(seg_hidden)


def restore_masks(
    low_res: Tensor,
    resized: Sequence[Size],
    originals: Sequence[Size],
    input_size: int,
    geometry: Geometry = "exact",
) -> list[Tensor]:
    """Bring low-resolution mask logits back to the size of the images they belong to (reference §3).

    ``exact`` inverts the preprocessing: up-sample to the S × S input, crop the centred padding, resize. ``legacy`` is
    the published read-out, which the released weights were trained with.

    Args:
        low_res: logits [M, 1, l, l].
        resized: per mask, (height, width) of the image inside the padded input.
        originals: per mask, (height, width) of the image on disk.
        input_size: side S of the padded square input.
        geometry: ``exact`` or ``legacy``.

    Returns:
        M tensors [H, W] of logits, float32.
    """
    if not len(low_res) == len(resized) == len(originals):
        raise ValueError(f"{len(low_res)} masks need as many sizes, got {len(resized)} and {len(originals)}")
    if geometry not in ("exact", "legacy"):
        raise ValueError(f"unknown mask geometry {geometry!r:.80}; known: exact, legacy")
    restored = []
    with maybe_autocast(low_res.device.type, enabled=False):
        for mask, inner, original in zip(low_res, resized, originals, strict=True):
            rows, columns = (
                _resampling(mask, side, wanted, input_size if geometry == "exact" else mask.shape[-1])
                for side, wanted in zip(inner, original, strict=True)
            )
            restored.append(rows.t() @ mask[0].float() @ columns)
    return restored


def _resampling(mask: Tensor, inner: int, original: int, padded: int) -> Tensor:
    """The read-out along one axis as a matrix [l, original]: bilinear resizing and cropping are linear and separable,
    and two products are several times as fast as two interpolations, above all backwards.

    The odd pixel of centred padding is at the right and at the bottom. ``legacy`` crops the l × l mask (``padded`` = l)
    by sizes that are meant for the S × S input: where the image is larger than l the offset is negative and counts from
    the far edge, so of a 82-pixel-wide image only columns 55 to 64 of 64 survive. The released weights were trained so.
    """
    axis = torch.eye(mask.shape[-1], device=mask.device)[None]  # [1, l, l]
    if padded != mask.shape[-1]:
        axis = functional.interpolate(axis, padded, mode="linear", align_corners=False)
    start = (padded - inner) // 2
    return functional.interpolate(axis[..., start : start + inner], original, mode="linear", align_corners=False)[0]
