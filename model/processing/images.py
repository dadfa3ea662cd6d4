"""Pixels → network inputs: longest side resized, padded to a centred square, normalised (reference §3)."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from model.errors import MedPLIBError

Size = tuple[int, int]
"""(height, width)."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CLIP_PAD_COLOUR = (122, 116, 104)
SAM_MEAN = (123.675, 116.28, 103.53)
SAM_STD = (58.395, 57.12, 57.375)


def check_image(image: np.ndarray) -> None:
    """Refuse anything but uint8 [H, W, 3].

    Raises:
        MedPLIBError: type, dtype or shape is another.
    """
    if not isinstance(image, np.ndarray):
        raise MedPLIBError(f"an image is {type(image).__name__}; give a uint8 array H×W×3")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        shape = "×".join(map(str, image.shape))
        raise MedPLIBError(
            f"an image is a {image.dtype} array of {shape}; give uint8 H×W×3 (RGB), read it with read_image"
        )


def resized_size(size: Size, longest: int) -> Size:
    """(height, width) after the longer side became ``longest``; rounds half up, never below one pixel."""
    scale = longest / max(size)
    height, width = (max(1, int(side * scale + 0.5)) for side in size)
    return height, width


def centre_offset(size: Size, square: int) -> Size:
    """(top, left) padding that centres ``size`` in a square; an odd pixel goes to the bottom or right."""
    return (square - size[0]) // 2, (square - size[1]) // 2


def resize_longest_side(image: np.ndarray, longest: int) -> np.ndarray:
    """uint8 [H, W, 3] → uint8 [h, w, 3] whose longer side is ``longest`` (PIL bilinear, antialiased)."""
    height, width = resized_size(image.shape[:2], longest)  # type: ignore[arg-type]
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def clip_input(
    image: np.ndarray,
    size: int = 336,
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
    pad_colour: tuple[int, ...] = CLIP_PAD_COLOUR,
) -> torch.Tensor:
    """CLIP input of an image.

    Args:
        image: uint8 [H, W, 3], RGB.
        size: side S of the input in pixels.
        mean, std: per channel, for values in [0, 1].
        pad_colour: integer grey levels of the centred padding.

    Returns:
        float32 [3, S, S].

    Raises:
        MedPLIBError: the image is not uint8 [H, W, 3].
    """
    check_image(image)
    resized = resize_longest_side(image, size)  # [h, w, 3]
    square = np.empty((size, size, 3), dtype=np.uint8)
    square[:] = np.asarray(pad_colour, dtype=np.uint8)
    _place_centred(square, resized)
    scaled = (square * np.float64(1 / 255)).astype(np.float32)  # the CLIP processor's own order of operations
    normalised = (scaled - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return torch.from_numpy(np.ascontiguousarray(normalised.transpose(2, 0, 1)))


def sam_input(
    image: np.ndarray,
    size: int = 256,
    mean: tuple[float, ...] = SAM_MEAN,
    std: tuple[float, ...] = SAM_STD,
) -> tuple[torch.Tensor, Size]:
    """SAM-Med2D input of an image; unlike CLIP's it is normalised before the padding, which is zero.

    Args:
        image: uint8 [H, W, 3], RGB.
        size: side S of the input in pixels.
        mean, std: per channel, for values in [0, 255].

    Returns:
        float32 [3, S, S], and the (height, width) of the image in it.

    Raises:
        MedPLIBError: the image is not uint8 [H, W, 3].
    """
    check_image(image)
    resized = resize_longest_side(image, size)  # [h, w, 3]
    square = np.zeros((size, size, 3), dtype=np.float32)
    _place_centred(square, (resized - np.asarray(mean, np.float32)) / np.asarray(std, np.float32))
    return torch.from_numpy(np.ascontiguousarray(square.transpose(2, 0, 1))), resized.shape[:2]  # type: ignore[return-value]


def _place_centred(square: np.ndarray, inner: np.ndarray) -> None:
    height, width = inner.shape[:2]
    top, left = centre_offset((height, width), square.shape[0])
    square[top : top + height, left : left + width] = inner
