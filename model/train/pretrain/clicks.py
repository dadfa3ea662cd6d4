"""Simulated prompts of a user: boxes, first clicks and corrective clicks, drawn from target masks."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_JITTER = 0.08  # standard deviation of a box's corners, as a share of its sides


def draw_boxes(targets: NDArray[np.bool_], rng: np.random.Generator) -> Tensor:
    """Jittered bounding boxes (x1, y1, x2, y2) in pixels, float32 [M, 4], of masks [M, S, S] that are not empty."""
    boxes = np.zeros((len(targets), 4), np.float32)
    for box, target in zip(boxes, targets, strict=True):
        left, top, width, height = cv2.boundingRect(target.astype(np.uint8))
        corners = np.array([left, top, left + width, top + height])
        box[:] = np.clip(corners + rng.normal(0, _JITTER, 4) * ([width, height] * 2), 0, len(target))
    return torch.from_numpy(boxes)


def draw_clicks(
    targets: NDArray[np.bool_], masks: NDArray[np.bool_], rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """One click per mask, where a user would correct it: inside the largest region that is wrong.

    Args:
        targets: [M, S, S], what is wanted.
        masks: [M, S, S], what there is; all False for a first click.

    Returns:
        Points float32 [M, 1, 2] as (x, y) in pixels; labels long [M, 1], 1 to add and 0 to take away.
    """
    points, labels = np.zeros((len(targets), 1, 2), np.float32), np.ones((len(targets), 1), np.int64)
    for row, (target, mask) in enumerate(zip(targets, masks, strict=True)):
        wrong = target ^ mask
        if not wrong.any():
            wrong = target
        count, parts, stats, _ = cv2.connectedComponentsWithStats(wrong.astype(np.uint8), connectivity=4)
        largest = parts == 1 + int(np.argmax(stats[1:count, cv2.CC_STAT_AREA]))
        # A border of zeros: the picture's edge is an edge of the region, too.
        depth = cv2.distanceTransform(np.pad(largest.astype(np.uint8), 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
        candidates = np.argwhere(depth >= rng.uniform(0.3, 1) * depth.max())
        y, x = candidates[rng.integers(len(candidates))]
        points[row, 0], labels[row, 0] = (x, y), int(target[y, x])
    return torch.from_numpy(points), torch.from_numpy(labels)
