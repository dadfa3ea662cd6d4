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
        return coco.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)
    return {"size": [height, width], "counts": _as_bytes(counts)}


def _as_bytes(counts: str | bytes) -> bytes:
    return counts.encode("ascii") if isinstance(counts, str) else bytes(counts)


def _runs(data: bytes) -> np.ndarray:
    """Run lengths of COCO's compressed counts, int64: 5 bits a character, bit 5 continues, then differences."""
    if not data or data.translate(None, _LAST + _CONTINUED) or data[-1] not in _LAST:
        raise ValueError("the counts are no COCO counts")
    bits = np.frombuffer(data, dtype=np.uint8).astype(np.int64)
    bits -= 48
    ends = np.flatnonzero(bits < 32)
    lengths = ends.copy()
    lengths[1:] -= ends[:-1]
    lengths[0] += 1
    if lengths.max() > 7:
        raise ValueError("the counts hold a run beyond every size")
    starts = ends - lengths + 1
    shifts = 5 * (np.arange(bits.size) - np.repeat(starts, lengths))
    runs = np.add.reduceat((bits & 31) << shifts, starts)
    runs -= (bits[ends] & 16) << (5 * lengths - 4)  # the highest bit is the sign
    for first in (1, 2):  # from the fourth on, each is the difference to the one before the last
        runs[first::2].cumsum(out=runs[first::2])
    return runs


_LAST, _CONTINUED = bytes(range(48, 80)), bytes(range(80, 112))


@dataclass(frozen=True)
class Overlaps:
    """Areas and intersections of P predicted and G reference masks, in pixels.

    Attributes:
        predicted: P areas.
        wanted: G areas.
        intersections: P rows of G.
    """

    predicted: list[int]
    wanted: list[int]
    intersections: list[list[int]]

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
        told = " and ".join(f"{height}×{width}" for height, width in sorted(sizes))
        raise MedPLIBError(f"masks of one question are {told}; predictions must have the size of the reference")
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
