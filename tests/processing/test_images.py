"""Image geometry and normalisation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import CLIPImageProcessorPil

from model.errors import MedPLIBError
from model.processing.images import (
    CLIP_PAD_COLOUR,
    SAM_MEAN,
    SAM_STD,
    clip_input,
    resize_longest_side,
    resized_size,
    sam_input,
)


@pytest.mark.parametrize(
    ("size", "longest", "expected"),
    [
        ((2516, 3027), 256, (213, 256)),
        ((257, 255), 336, (336, 333)),
        ((17, 23), 256, (189, 256)),
        ((1, 3000), 256, (1, 256)),
    ],
)
def test_longest_side_is_scaled_and_rounded_half_up(
    size: tuple[int, int], longest: int, expected: tuple[int, int]
) -> None:
    assert resized_size(size, longest) == expected


def test_normalisation_is_the_clip_processors(image: np.ndarray) -> None:
    processor = CLIPImageProcessorPil(do_resize=False, do_center_crop=False, do_convert_rgb=False)
    square = np.full((60, 60, 3), CLIP_PAD_COLOUR, dtype=np.uint8)
    square[10:50] = image
    expected = processor(square, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(clip_input(image, size=60), expected, rtol=0, atol=0)


def test_sam_input_is_normalised_before_it_is_padded_with_zeros(image: np.ndarray) -> None:
    pixels, size = sam_input(image, size=63)  # 40 × 60 → 42 × 63: odd padding of 21 rows, the odd one below
    assert size == (42, 63)
    assert pixels.shape == (3, 63, 63)
    assert pixels.dtype == torch.float32
    assert (pixels[:, :10] == 0).all()
    assert (pixels[:, 52:] == 0).all()
    resized = resize_longest_side(image, 63)
    restored = pixels[:, 10:52].permute(1, 2, 0) * torch.tensor(SAM_STD) + torch.tensor(SAM_MEAN)
    np.testing.assert_allclose(restored.numpy(), resized, atol=1e-3)


def test_sizes_are_free(image: np.ndarray) -> None:
    assert clip_input(image, size=140).shape == (3, 140, 140)
    assert clip_input(image[:, :1], size=28).shape == (3, 28, 28)


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((4, 4), dtype=np.uint8),
        np.zeros((4, 4, 4), dtype=np.uint8),
        np.zeros((4, 4, 3), dtype=np.float32),
        np.zeros((0, 4, 3), dtype=np.uint8),
        "scan.png",
    ],
)
def test_anything_but_rgb_bytes_is_refused(wrong: object) -> None:
    for prepare in (clip_input, sam_input):
        with pytest.raises(MedPLIBError, match="give"):
            prepare(wrong)  # type: ignore[operator]
