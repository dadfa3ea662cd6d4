"""Overlaps of run-length encoded masks, computed on the runs by the COCO library without decoding a pixel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco

from model.errors import MedPLIBError
from model.processing.masks import MAX_MASK_PIXELS

Rle = Mapping[str, Any]
CocoRle = dict[str, Any]


def checked_rle(rle: Rle) -> CocoRle:
    """A mask as the COCO library takes it: ``{"size": [h, w], "counts": bytes}``, compressed.

    The library trusts what it is given: runs that do not fill the size make it hang or leave its memory.

    Args:
        rle: ``{"size": [h, w], "counts": …}``, counts compressed (str or bytes) or a list of run lengths.

    Raises:
        MedPLIBError: it is malformed, or its runs do not fill its size.
    """
    try:
        height, width = (int(side) for side in rle["size"])
        counts = rle["counts"]
        runs = np.asarray(counts, dtype=np.int64) if isinstance(counts, list) else _runs(_as_bytes(counts))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise MedPLIBError(
            f"a mask encoding is malformed ({error}); expected COCO's {{'size': [h, w], 'counts': …}}"
        ) from error
    if height < 1 or width < 1 or height * width > MAX_MASK_PIXELS:
        raise MedPLIBError(f"a mask encoding is of {height}×{width}; expected 1 to {MAX_MASK_PIXELS} pixels")
    if runs.ndim != 1 or not runs.size or runs.min() < 0 or runs.sum() != height * width:
        raise MedPLIBError(f"the runs of a mask encoding do not fill its {height}×{width} pixels; it is damaged")
    if isinstance(counts, list):
        return coco.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return {"size": [height, width], "counts": _as_bytes(counts)}


def _as_bytes(counts: str | bytes) -> bytes:
    return counts.encode("ascii") if isinstance(counts, str) else bytes(counts)


def _runs(data: bytes) -> np.ndarray:
    """Run lengths of COCO's compressed counts, int64: 5 bits a character, bit 5 continues, then differences."""
    bits = np.frombuffer(data, dtype=np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(bits & 32 == 0)
    if not ends.size or ends[-1] != bits.size - 1 or bits.min() < 0 or bits.max() > 63:
        raise ValueError("the counts are no COCO counts")
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if lengths.max() > 7:
        raise ValueError("the counts hold a run beyond every size")
    shifts = 5 * (np.arange(bits.size) - np.repeat(starts, lengths))
    runs = np.add.reduceat((bits & 31) << shifts, starts)
    runs -= np.where(bits[ends] & 16, 1 << 5 * lengths, 0)
    for first in (1, 2):  # from the fourth on, each is the difference to the one before the last
        runs[first::2] = np.cumsum(runs[first::2])
    return runs


@dataclass(frozen=True)
class Overlaps:
    """Areas and intersections of P predicted and G reference masks, in pixels.

    Attributes:
        predicted: int64 [P], areas.
        wanted: int64 [G], areas.
        intersections: int64 [P, G].
    """

    predicted: np.ndarray
    wanted: np.ndarray
    intersections: np.ndarray

    def pair(self, prediction: int | None, reference: int) -> tuple[int, int]:
        """Intersection and sum of areas of one pair; a prediction of None is an empty mask."""
        if prediction is None:
            return 0, int(self.wanted[reference])
        areas = int(self.predicted[prediction]) + int(self.wanted[reference])
        return int(self.intersections[prediction, reference]), areas

    def ious(self) -> np.ndarray:
        """float64 [P, G]; two empty masks have 1."""
        unions = self.predicted[:, None] + self.wanted[None, :] - self.intersections
        return np.where(unions == 0, 1.0, self.intersections / np.maximum(unions, 1))


def overlaps(predicted: Sequence[CocoRle], wanted: Sequence[CocoRle]) -> Overlaps:
    """Areas and intersections of checked masks, all of one size.

    Raises:
        MedPLIBError: the masks differ in size.
    """
    sizes = {tuple(mask["size"]) for mask in (*predicted, *wanted)}
    if len(sizes) > 1:
        told = " and ".join(f"{height}×{width}" for height, width in sorted(sizes))
        raise MedPLIBError(f"masks of one question are {told}; predictions must have the size of the reference")
    areas = [np.asarray(coco.area(list(masks)), dtype=np.int64) for masks in (predicted, wanted)]
    if not len(predicted) or not len(wanted):
        return Overlaps(areas[0], areas[1], np.zeros((len(predicted), len(wanted)), dtype=np.int64))
    ious = np.asarray(coco.iou(list(predicted), list(wanted), [0] * len(wanted)))
    sums = areas[0][:, None] + areas[1][None, :]
    return Overlaps(areas[0], areas[1], np.rint(ious * sums / (1 + ious)).astype(np.int64))  # I = iou·U, U = sum − I


def merged(masks: Sequence[CocoRle]) -> list[CocoRle]:
    """The masks' union as a list of one mask; an empty list stays empty."""
    return list(masks) if len(masks) < 2 else [coco.merge(list(masks))]


def best_matching(gains: np.ndarray) -> list[tuple[int, int]]:
    """The one-to-one pairs (row, column) with the largest sum of gains; min(P, G) pairs, in order of the columns.

    Args:
        gains: float [P, G], non-negative.
    """
    if gains.shape[0] > gains.shape[1]:
        return sorted(((row, column) for column, row in best_matching(gains.T)), key=lambda pair: pair[1])
    if gains.shape[0] == 1:
        return [(0, int(gains[0].argmax()))]
    return sorted(_assign(-gains), key=lambda pair: pair[1])


def _assign(costs: np.ndarray) -> list[tuple[int, int]]:
    """Cheapest assignment of rows to columns (the Hungarian method: potentials, shortest augmenting paths)."""
    rows, columns = costs.shape
    row_price = np.zeros(rows)
    column_price = np.zeros(columns)
    owner = np.full(columns, -1)
    for start in range(rows):
        distance = np.full(columns, np.inf)
        previous = np.full(columns, -1)
        done = np.zeros(columns, dtype=bool)
        row, reached, column = start, 0.0, -1
        while True:
            offered = reached + costs[row] - row_price[row] - column_price
            closer = ~done & (offered < distance)
            distance[closer], previous[closer] = offered[closer], column
            column = int(np.where(done, np.inf, distance).argmin())
            reached = float(distance[column])
            done[column] = True
            if owner[column] < 0:
                break
            row = int(owner[column])
        settled = np.flatnonzero(done)
        owned = settled[owner[settled] >= 0]
        row_price[owner[owned]] += reached - distance[owned]
        row_price[start] += reached
        column_price[settled] -= reached - distance[settled]
        while column >= 0:
            before = int(previous[column])
            owner[column] = start if before < 0 else owner[before]
            column = before
    return [(int(owner[column]), int(column)) for column in np.flatnonzero(owner >= 0)]
