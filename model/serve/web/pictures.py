"""Overlays of an answer's masks for the page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from model.errors import MedPLIBError
from model.inference.answer import Mask
from model.visualize import ALPHA, PALETTE, blend, draw_contour

_INVISIBLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def plain(text: str) -> str:
    """A model's text without control characters and without those that reorder what stands around them (UAX #9)."""
    return _INVISIBLE.sub("", text)


def colour(number: int) -> tuple[int, int, int]:
    """(red, green, blue) of the mask with this number, 0 for the first; the palette begins again after seven."""
    return PALETTE[number % len(PALETTE)]


def read_masks(stored: Sequence[Mapping[str, Any]], spacing_mm: tuple[float, float] | None = None) -> list[Mask]:
    """Masks of an answer's last chunk.

    Args:
        stored: what ``Mask.to_dict`` made of each.
        spacing_mm: (row, column) spacing of the slice that was asked about; a PNG does not carry it to the model.

    Raises:
        MedPLIBError: one is malformed.
    """
    try:
        masks = [
            Mask(
                label=plain(str(item.get("label", ""))),
                rle=dict(item["rle"]),
                score=float(item.get("score", 0.0)),
                bbox=tuple(int(side) for side in item["bbox"]),  # type: ignore[arg-type]
                area_px=int(item["area_px"]),
                area_mm2=item.get("area_mm2"),
                presence=item.get("presence"),
                spoken=bool(item.get("spoken", True)),
                warning=plain(str(item.get("warning", ""))),
            )
            for item in stored
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise MedPLIBError(f"the answer holds a malformed mask ({error}); ask again") from error
    if spacing_mm is None:
        return masks
    return [replace(mask, area_mm2=mask.area_px * spacing_mm[0] * spacing_mm[1]) for mask in masks]


def overlay(
    pixels: np.ndarray,
    masks: Sequence[Mask | np.ndarray],
    shown: Sequence[bool] = (),
    opacity: float = ALPHA,
    contour: bool = True,
) -> np.ndarray:
    """Masks laid over an image, each in its own colour.

    Args:
        pixels: uint8 [H, W, 3]; kept as it is.
        masks: of the image's size.
        shown: whether each is drawn; masks beyond its length are.
        opacity: 0 leaves the image as it is, 1 covers it.
        contour: outline each mask too.

    Returns:
        uint8 [H, W, 3].

    Raises:
        MedPLIBError: a mask has another size than the image.
    """
    canvas = np.ascontiguousarray(pixels).copy()
    opacity = min(max(float(opacity), 0.0), 1.0)
    drawn = [
        (of_size(mask, canvas.shape[:2]), colour(number))
        for number, mask in enumerate(masks)
        if number >= len(shown) or shown[number]
    ]
    for inside, tint in drawn:
        blend(canvas, inside, tint, opacity)
    for inside, tint in drawn if contour else ():  # above every surface, so that none is hidden by the next mask
        draw_contour(canvas, inside, tint)
    return canvas


def of_size(mask: Mask | np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """A mask as bool [H, W].

    Raises:
        MedPLIBError: it is not of this (height, width).
    """
    inside = mask.to_array() if isinstance(mask, Mask) else np.asarray(mask).astype(bool)
    if inside.shape != tuple(size):
        got = "×".join(str(side) for side in inside.shape)
        raise MedPLIBError(f"a mask is {got}, the image {size[0]}×{size[1]} (height×width); show it on its own image")
    return inside
