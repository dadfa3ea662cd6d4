"""Overlaps and outline distances of run-length encoded masks; overlaps are computed on the runs by the COCO library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools import mask as coco
from scipy.ndimage import binary_erosion, distance_transform_edt
from scipy.optimize import linear_sum_assignment

from model.errors import MedPLIBError
from model.processing.masks import CocoRle

Spacing = tuple[float, float]


@dataclass(frozen=True)
class Overlaps:
    """Areas and intersections of P predicted and G reference masks, in pixels."""

    predicted: list[int]  # P areas
    wanted: list[int]  # G areas
    intersections: list[list[int]]  # P rows of G

    def pair(self, prediction: int | None, reference: int) -> tuple[int, int]:
        """Intersection and union of one pair; a prediction of None is an empty mask."""
        if prediction is None:
            return 0, self.wanted[reference]
        inter = self.intersections[prediction][reference]
        return inter, self.predicted[prediction] + self.wanted[reference] - inter

    def ious(self) -> np.ndarray:
        """float64 [P, G]; two empty masks have 1."""
        shape = len(self.predicted), len(self.wanted)
        inter = np.array(self.intersections, dtype=np.float64).reshape(shape)
        unions = np.array(self.predicted)[:, None] + np.array(self.wanted)[None, :] - inter
        return np.where(unions == 0, 1.0, inter / np.maximum(unions, 1))


def overlaps(predicted: Sequence[CocoRle], wanted: Sequence[CocoRle]) -> Overlaps:
    """Areas and intersections of checked masks, all of one size.

    Raises:
        MedPLIBError: the masks differ in size.
    """
    sizes = {(mask["size"][0], mask["size"][1]) for mask in (*predicted, *wanted)}
    if len(sizes) > 1:
        found = " and ".join(f"{height}×{width}" for height, width in sorted(sizes))
        swapped = len({tuple(sorted(size)) for size in sizes}) == 1
        hint = "is size given as [width, height]? COCO's is [height, width]" if swapped else "resize the predictions"
        raise MedPLIBError(f"masks of one question are {found}, but must have the size of the reference; {hint}")
    areas = [int(coco.area(mask)) for mask in predicted], [int(coco.area(mask)) for mask in wanted]
    inter = [
        [
            int(coco.area(coco.merge([mask, reference], True))) if area and other else 0
            for reference, other in zip(wanted, areas[1], strict=True)
        ]
        for mask, area in zip(predicted, areas[0], strict=True)
    ]
    return Overlaps(*areas, inter)


def merged(masks: Sequence[CocoRle]) -> list[CocoRle]:
    """The masks' union as a list of one mask; an empty list stays empty."""
    return list(masks) if len(masks) < 2 else [coco.merge(list(masks))]


def best_matching(gains: np.ndarray) -> list[tuple[int, int]]:
    """The one-to-one pairs (row, column) with the largest sum of gains; min(P, G) pairs, in order of the columns.

    Args:
        gains: float [P, G], non-negative.
    """
    rows, columns = linear_sum_assignment(gains, maximize=True)
    return sorted(zip(rows.tolist(), columns.tolist(), strict=True), key=lambda pair: pair[1])


def surface_scores(
    predicted: CocoRle | None, wanted: CocoRle, spacing: Spacing = (1.0, 1.0), tolerance: float = 2.0
) -> tuple[float, float]:
    """HD95 and normalised surface Dice of a predicted and a non-empty reference mask.

    HD95 is the larger of the two directed 95th percentiles of outline distances. The surface Dice is the share of
    outline pixels of both masks that lie within the tolerance of the other outline. Where nothing is predicted, HD95
    is the diagonal of the image and the surface Dice 0, so that a missing mask is never better than a poor one.

    Args:
        predicted: checked run lengths of the reference's size; None or an empty mask where nothing is predicted.
        wanted: checked run lengths with at least one pixel.
        spacing: row and column distance of pixels, (1, 1) for distances in pixels.
        tolerance: in the unit of the spacing.

    Returns:
        HD95 in the unit of the spacing, and the surface Dice in [0, 1].
    """
    if predicted is None or not int(coco.area(predicted)):
        height, width = wanted["size"]
        return math.hypot(height * spacing[0], width * spacing[1]), 0.0
    boxes = np.asarray(coco.toBbox([predicted, wanted]))
    x1, y1 = boxes[:, :2].min(axis=0).astype(int)
    x2, y2 = (boxes[:, :2] + boxes[:, 2:]).max(axis=0).astype(int)
    left, right = (coco.decode(mask)[y1:y2, x1:x2].astype(bool) for mask in (predicted, wanted))
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
    first, second = outline(left), outline(right)
    to_second, to_first = (distance_transform_edt(~mask, sampling=spacing) for mask in (second, first))
    return to_second[first], to_first[second]


def outline(mask: np.ndarray) -> np.ndarray:
    """Pixels of a mask with one of the four neighbours outside it, bool [H, W]; beyond the array is outside."""
    return mask & ~binary_erosion(mask)
