"""Distances between the outlines of two masks: HD95 and normalised surface Dice."""

from __future__ import annotations

import math

import numpy as np
from pycocotools import mask as coco

from model.eval.metrics.masks import CocoRle

Spacing = tuple[float, float]

_AT_ONCE = 1 << 22  # distances held at a time: bounds memory for long outlines


def surface_scores(
    predicted: CocoRle | None, wanted: CocoRle, spacing: Spacing = (1.0, 1.0), tolerance: float = 2.0
) -> tuple[float, float]:
    """HD95 and normalised surface Dice of a predicted and a non-empty reference mask.

    HD95 is the larger of the two directed 95th percentiles of outline distances. The surface Dice is the share of
    outline pixels of both masks that lie within the tolerance of the other outline. Where nothing is predicted, HD95
    is the diagonal of the image and the surface Dice 0, so that a missing mask is never better than a poor one.

    Args:
        predicted: checked run lengths of the reference's size; None or an empty mask where nothing is painted.
        wanted: checked run lengths with at least one pixel.
        spacing: row and column distance of pixels, (1, 1) for distances in pixels.
        tolerance: in the unit of the spacing.

    Returns:
        HD95 in the unit of the spacing, and the surface Dice in [0, 1].
    """
    if predicted is None or not int(coco.area(predicted)):
        height, width = wanted["size"]
        return math.hypot(height * spacing[0], width * spacing[1]), 0.0
    left, right = _cropped(predicted, wanted)
    to_right, to_left = outline_distances(left, right, spacing)
    hd95 = max(float(np.percentile(distances, 95)) for distances in (to_right, to_left))
    near = np.count_nonzero(to_right <= tolerance) + np.count_nonzero(to_left <= tolerance)
    return hd95, near / (to_right.size + to_left.size)


def outline_distances(left: np.ndarray, right: np.ndarray, spacing: Spacing) -> tuple[np.ndarray, np.ndarray]:
    """Distance of every outline pixel of each mask to the nearest outline pixel of the other, both in reading order.

    Args:
        left: bool [H, W], not empty.
        right: bool [H, W], not empty.
        spacing: row and column distance of pixels.
    """
    outlines = [outline(mask) for mask in (left, right)]
    return _to_nearest(outlines[0], outlines[1], spacing), _to_nearest(outlines[1], outlines[0], spacing)


def outline(mask: np.ndarray) -> np.ndarray:
    """Pixels of a mask with one of the four neighbours outside it, bool [H, W]; beyond the array is outside."""
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def _cropped(*masks: CocoRle) -> list[np.ndarray]:
    """The masks decoded, bool [h, w], cut to the box that holds all of them."""
    boxes = np.asarray(coco.toBbox(list(masks)))
    x1, y1 = boxes[:, :2].min(axis=0).astype(int)
    x2, y2 = (boxes[:, :2] + boxes[:, 2:]).max(axis=0).astype(int)
    return [coco.decode(mask)[y1:y2, x1:x2].astype(bool) for mask in masks]


def _to_nearest(points: np.ndarray, targets: np.ndarray, spacing: Spacing) -> np.ndarray:
    """Exact distances from the set pixels of one array to the nearest of another, for any spacing.

    The nearest target of a column is known from two sweeps over the rows; what is left is a minimum over columns.
    """
    along = _row_distance(targets) * spacing[0]
    rows, columns = np.nonzero(points)
    across = np.arange(targets.shape[1]) * spacing[1]
    found = np.empty(rows.size)
    step = max(1, _AT_ONCE // targets.shape[1])
    for start in range(0, rows.size, step):
        chosen = slice(start, start + step)
        sideways = across[columns[chosen], None] - across[None, :]
        found[chosen] = np.sqrt((sideways**2 + along[rows[chosen]] ** 2).min(axis=1))
    return found


def _row_distance(targets: np.ndarray) -> np.ndarray:
    """Rows from each pixel to the nearest set pixel of its column, float64 [H, W]; infinite in an empty column."""
    height = targets.shape[0]
    places = np.arange(height, dtype=np.float64)[:, None]
    above = np.maximum.accumulate(np.where(targets, places, -np.inf), axis=0)
    below = np.minimum.accumulate(np.where(targets, places, np.inf)[::-1], axis=0)[::-1]
    return np.minimum(places - above, below - places)
