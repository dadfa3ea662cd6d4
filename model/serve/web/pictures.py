"""What the page shows of an answer: masks over the image, regions as they were drawn, and a legend."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import cv2
import numpy as np

from model.errors import MedPLIBError
from model.inference.answer import Mask
from model.inference.overlay import ALPHA, PALETTE, blend, draw_contour

_INK, _PAPER = (0, 0, 0), (255, 255, 255)


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
                label=str(item.get("label", "")),
                rle=dict(item["rle"]),
                score=float(item.get("score", 0.0)),
                bbox=tuple(int(side) for side in item["bbox"]),  # type: ignore[arg-type]
                area_px=int(item["area_px"]),
                area_mm2=item.get("area_mm2"),
                presence=item.get("presence"),
                spoken=bool(item.get("spoken", True)),
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


def region_outline(pixels: np.ndarray, regions: Sequence[np.ndarray]) -> np.ndarray:
    """Regions that were drawn, in white with a dark edge; numbered where there are several.

    Args:
        pixels: uint8 [H, W, 3]; kept as it is.
        regions: bool [H, W] each.

    Returns:
        uint8 [H, W, 3].

    Raises:
        MedPLIBError: a region has another size than the image.
    """
    canvas = np.ascontiguousarray(pixels).copy()
    for number, region in enumerate(regions, start=1):
        inside = of_size(region, canvas.shape[:2])
        draw_contour(canvas, inside, _INK, extra=2)
        draw_contour(canvas, inside, _PAPER)
        if len(regions) > 1 and inside.any():
            _write_number(canvas, inside, number)
    return canvas


def legend_html(masks: Sequence[Mask], shown: Sequence[bool] = ()) -> str:
    """A list of the masks: colour, label, score, area in pixels and in mm² where the spacing is known.

    Labels are text that a model wrote: nothing of them is taken for markup. A mask that is not shown is dimmed. The
    classes ``mask-legend``, ``mask-hidden`` and ``mask-swatch`` are there for a style sheet; it is readable without.
    """
    rows = []
    for number, mask in enumerate(masks):
        hidden = number < len(shown) and not shown[number]
        facts = [f"score {mask.score:.2f}", f"{mask.area_px:,} px"]
        if mask.area_mm2 is not None:
            facts.append(f"{mask.area_mm2:,.1f} mm²")
        if not mask.area_px:
            facts.append("empty")
        if hidden:
            facts.append("hidden")
        red, green, blue = colour(number)
        swatch = (
            f'<span class="mask-swatch" aria-hidden="true" style="display:inline-block;width:1em;height:1em;'
            f'margin-right:.5em;vertical-align:-.1em;border-radius:.2em;background:rgb({red},{green},{blue})"></span>'
        )
        name = html.escape(mask.label.strip() or f"mask {number + 1}")
        style = ' class="mask-hidden" style="opacity:.5"' if hidden else ""
        rows.append(f"<li{style}>{swatch}<strong>{name}</strong> · {html.escape(' · '.join(facts))}</li>")
    if not rows:
        return ""
    return f'<ul class="mask-legend" style="list-style:none;padding:0;margin:0">{"".join(rows)}</ul>'


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


def _write_number(canvas: np.ndarray, inside: np.ndarray, number: int) -> None:
    rows, columns = np.nonzero(inside)
    top = int(np.argmin(rows))
    scale = max(0.4, min(canvas.shape[:2]) / 600)
    height = round(24 * scale)
    place = (min(int(columns[top]), canvas.shape[1] - height), max(int(rows[top]) - 3, height))
    for tint, thickness in ((_INK, 3), (_PAPER, 1)):
        thickness = max(1, round(thickness * max(1.0, scale)))
        cv2.putText(canvas, str(number), place, cv2.FONT_HERSHEY_SIMPLEX, scale, tint, thickness, cv2.LINE_AA)
