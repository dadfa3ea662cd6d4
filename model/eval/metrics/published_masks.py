"""The published grounding numbers: IoU of each mask in single precision, Dice from it, means (reference §9)."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import PurePath

import numpy as np

from model.eval.metrics.masks import checked_rle, overlaps
from model.eval.predictions import Prediction


def published_iou(intersection: int, union: int) -> float:
    """|∩| / |∪| in float32, 0 when the union is empty. (The published code fails there; the reference says 0.)"""
    return float(np.float32(intersection) / np.float32(union)) if union else 0.0


def published_dice(iou: float) -> float:
    """Dice from IoU."""
    return 2 * iou / (1 + iou)


@dataclass
class PublishedMasks:
    """Gathers pairs of masks into the published mIoU and mDice, overall and by modality.

    Attributes:
        ious: IoU of each pair, by modality: the image's file name up to the first ``_`` (an X-ray's is ``x``).
    """

    ious: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    _all: list[float] = field(default_factory=list)

    def add(self, image_path: str, intersection: int, union: int) -> None:
        """Take in one pair of masks."""
        iou = published_iou(intersection, union)
        self.ious[PurePath(image_path).name.split("_")[0]].append(iou)
        self._all.append(iou)

    def add_prediction(self, prediction: Prediction) -> None:
        """Take in each reference mask of a row with the mask of the same number; a missing one is empty."""
        if not prediction.gt_masks:
            return
        wanted = [checked_rle(mask) for mask in prediction.gt_masks]
        painted = [] if prediction.failed else [checked_rle(mask["rle"]) for mask in prediction.masks]
        found = overlaps(painted, wanted)
        for index in range(len(wanted)):
            intersection, areas = found.pair(index if index < len(painted) else None, index)
            self.add(prediction.image_path, intersection, areas - intersection)

    @property
    def count(self) -> int:
        """Pairs taken in."""
        return len(self._all)

    @property
    def miou(self) -> float:
        """Mean IoU of all pairs; NaN without any."""
        return _mean(self._all)

    @property
    def mdice(self) -> float:
        """Mean Dice of all pairs; NaN without any."""
        return _mean([published_dice(iou) for iou in self._all])

    def by_modality(self) -> dict[str, dict[str, float]]:
        """Mean IoU and Dice of each modality, rounded to six places, in order of appearance."""
        return {
            name: {
                "iou": round(_mean(values), 6),
                "dice": round(_mean([published_dice(iou) for iou in values]), 6),
            }
            for name, values in self.ious.items()
        }

    def format(self) -> str:
        """The two lines as published."""
        return f"miou: {self.miou:f}, mDice: {self.mdice:f}\n{self.by_modality()}"


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else float("nan")
