"""From a ``<SEG>`` hidden state to a mask prompt, and from low-resolution logits to a mask at image size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

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
    restore = {"exact": _restore_exact, "legacy": _restore_legacy}.get(geometry)
    if restore is None:
        raise ValueError(f"unknown mask geometry {geometry!r:.80}; known: exact, legacy")
    return [
        restore(mask[None].float(), inner, original, input_size)[0, 0]
        for mask, inner, original in zip(low_res, resized, originals, strict=True)
    ]


def _restore_exact(mask: Tensor, inner: Size, original: Size, input_size: int) -> Tensor:
    return _resize(_crop_centre(_resize(mask, (input_size, input_size)), inner, input_size), original)


def _restore_legacy(mask: Tensor, inner: Size, original: Size, input_size: int) -> Tensor:
    """Crop the l × l mask by sizes that are meant for the S × S input, then resize.

    Where the image is larger than l the offset is negative and counts from the far edge, so of a 82-pixel-wide image
    only columns 55 to 64 of 64 survive. The released weights were trained through exactly this.
    """
    del input_size  # the published read-out never up-samples to it
    return _resize(_crop_centre(mask, inner, mask.shape[-1]), original)


def _crop_centre(mask: Tensor, inner: Size, side: int) -> Tensor:
    """Cut off centred padding, whose odd pixel is at the right and at the bottom."""
    top, left = (side - inner[0]) // 2, (side - inner[1]) // 2
    return mask[..., top : top + inner[0], left : left + inner[1]]


def _resize(mask: Tensor, size: Size) -> Tensor:
    return functional.interpolate(mask, size, mode="bilinear", align_corners=False)
