"""What a user points at — a mask, a box, a point — as a mask, and its place in the question."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from model.data.image_io import read_mask
from model.errors import MedPLIBError
from model.processing.special_tokens import REGION_MARKER

POINT_RADIUS = 0.03
"""Radius of the disc that a point stands for, as a share of the image's longer side (about one CLIP patch)."""

Region = str | Path | np.ndarray | tuple[str, tuple[float, ...]]


def region_to_mask(region: Region, size: tuple[int, int]) -> np.ndarray:
    """Turn a region into a mask.

    Args:
        region: a mask file, an array [H, W] (non-zero is inside), ``("box", (x1, y1, x2, y2))`` or
            ``("point", (x, y))``, in pixels of the image.
        size: (height, width) of the image.

    Returns:
        bool [H, W].

    Raises:
        MedPLIBError: the region is malformed, lies outside the image, has another size, or is empty.
    """
    if isinstance(region, str | Path):
        mask = read_mask(Path(region))
    elif isinstance(region, np.ndarray):
        mask = region.astype(bool)
    elif isinstance(region, tuple) and len(region) == 2 and region[0] in ("box", "point"):
        mask = _box(region[1], size) if region[0] == "box" else _point(region[1], size)
    else:
        raise MedPLIBError(
            f"a region is a mask file, an H×W array, ('box', (x1, y1, x2, y2)) or ('point', (x, y)); got {region!r:.80}"
        )
    if mask.shape != size:
        raise MedPLIBError(
            f"the region mask is {'×'.join(map(str, mask.shape))}, the image {size[0]}×{size[1]} (height×width); "
            "give them one size"
        )
    if not mask.any():
        raise MedPLIBError("the region is empty; mark at least one pixel")
    return mask


def place_region(question: str, count: int = 1) -> str:
    """The question with ``count`` region markers: kept if it has them, else put after “region”, else at its end."""
    present = question.count(REGION_MARKER)
    if present == count:
        return question
    if present:
        held = "once" if present == 1 else f"{present} times"
        marked = f"{count} regions are" if count > 1 else "1 region is" if count else "no region is"
        raise MedPLIBError(
            f"the question holds {REGION_MARKER} {held}, and {marked} marked; write it once for each region, or never"
        )
    markers = ", ".join([REGION_MARKER] * count)
    word = re.search(r"\bregions?\b", question, re.IGNORECASE)
    if word:
        return f"{question[: word.end()]} {markers}{question[word.end() :]}"
    body, end = (question[:-1], question[-1]) if question[-1:] in "?.!" and question else (question, "")
    return f"{body.rstrip()} {markers}{end}"


def _box(values: Any, size: tuple[int, int]) -> np.ndarray:
    x1, y1, x2, y2 = _numbers(values, 4, "a box is x1,y1,x2,y2")
    height, width = size
    if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
        raise MedPLIBError(
            f"the box {x1:g},{y1:g},{x2:g},{y2:g} is not inside the image of {width}×{height} (width×height); "
            "give x1 < x2 and y1 < y2 within it"
        )
    mask = np.zeros(size, dtype=bool)
    mask[int(y1) : int(np.ceil(y2)), int(x1) : int(np.ceil(x2))] = True
    return mask


def _point(values: Any, size: tuple[int, int]) -> np.ndarray:
    x, y = _numbers(values, 2, "a point is x,y")
    height, width = size
    if not (0 <= x < width and 0 <= y < height):
        raise MedPLIBError(f"the point {x:g},{y:g} lies outside the image of {width}×{height} (width×height)")
    rows, columns = np.ogrid[:height, :width]
    radius = max(0.5, POINT_RADIUS * max(size))
    mask = (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
    mask[int(y), int(x)] = True
    return mask


def _numbers(values: Any, count: int, form: str) -> list[float]:
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise MedPLIBError(f"{form} in pixels; got {values!r:.60}")
    return numbers
