"""What was drawn on the picture → regions, and back: the marks that the browser draws over it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import cv2
import numpy as np

from model.errors import MedPLIBError
from model.inference.regions import region_to_mask
from model.serve.web.state import Mark, MarkKind

MAX_POINTS = 5000
"""Of one outline; a browser sends a few hundred."""
_SMALLEST_BOX = 1.0  # pixels a side


def read_mark(drawn: Any, size: tuple[int, int]) -> Mark:
    """What a browser says was drawn.

    Args:
        drawn: ``{"kind": "point" | "box" | "free", "points": [[x, y], …]}`` in pixels of the picture.
        size: (height, width) of the picture.

    Raises:
        MedPLIBError: it is malformed, or covers nothing of the picture.
    """
    if not isinstance(drawn, Mapping) or drawn.get("kind") not in get_args(MarkKind):
        raise MedPLIBError("what was drawn cannot be read; mark a point, a box or an outline")
    kind: MarkKind = drawn["kind"]
    points = _points(drawn.get("points"))
    wanted = {"point": 1, "box": 2}.get(kind)
    if wanted is not None and len(points) != wanted:
        raise MedPLIBError(f"a {kind} was drawn with {len(points)} corners, expected {wanted}; draw it again")
    if kind == "point":
        return Mark(kind, tuple(points), region_to_mask(("point", points[0]), size))
    return Mark(kind, tuple(points), (_box if kind == "box" else _outline)(points, size))


def describe(mark: Mark, number: int, spent: bool = False) -> dict[str, Any]:
    """A mark as the browser draws it.

    Args:
        mark: what to draw.
        number: as people count, from 1.
        spent: it was asked about already.
    """
    return {"kind": mark.kind, "points": [list(point) for point in mark.points], "number": number, "spent": spent}


def _points(values: Any) -> list[tuple[float, float]]:
    if not isinstance(values, Sequence) or not 1 <= len(values) <= MAX_POINTS:
        raise MedPLIBError(f"an outline has 1 to {MAX_POINTS} points; draw it again")
    try:
        points = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        points = np.empty(0)
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
        raise MedPLIBError("the points that were drawn are not x and y in pixels; draw again")
    return [(float(x), float(y)) for x, y in points]


def _box(points: list[tuple[float, float]], size: tuple[int, int]) -> np.ndarray:
    """A box between two corners; what hangs over the picture's edge is cut off."""
    (first_x, first_y), (second_x, second_y) = points
    left, right = (min(max(x, 0.0), float(size[1])) for x in sorted((first_x, second_x)))
    top, bottom = (min(max(y, 0.0), float(size[0])) for y in sorted((first_y, second_y)))
    if right - left < _SMALLEST_BOX or bottom - top < _SMALLEST_BOX:
        raise MedPLIBError("the box lies outside the image or is smaller than a pixel; draw it over what is meant")
    return region_to_mask(("box", (left, top, right, bottom)), size)


def _outline(points: list[tuple[float, float]], size: tuple[int, int]) -> np.ndarray:
    """The inside of a closed outline and the outline itself, so that a mere stroke is a region too."""
    corners = np.clip(np.floor(np.asarray(points)), -(2**14), 2**15).astype(np.int32)
    canvas = np.zeros(size, dtype=np.uint8)
    cv2.fillPoly(canvas, [corners], 1)
    cv2.polylines(canvas, [corners], isClosed=False, color=1, thickness=max(1, round(max(size) / 200)))
    if not canvas.any():
        raise MedPLIBError("the outline lies outside the image; draw it over what is meant")
    return canvas.astype(bool)
