"""The published grounding numbers: IoU of each mask in single precision, Dice from it, means (reference §9)."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import numpy as np


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
        ious: IoU of each pair, by modality. As published, that is the image's file name up to the first ``_`` (an
            X-ray's is ``x``), unless the record itself names another.
    """

    ious: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    _all: list[float] = field(default_factory=list)

    def add(self, image_path: str, intersection: int, union: int, modality: str = "") -> None:
        """Take in one pair of masks."""
        iou = published_iou(intersection, union)
        self.ious[modality or PurePath(image_path).name.split("_")[0]].append(iou)
        self._all.append(iou)

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

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready mapping."""
        return {"masks": self.count, "mIoU": self.miou, "mDice": self.mdice, "modality": self.by_modality()}

    def format(self) -> str:
        """The two lines as published."""
        return f"miou: {self.miou:f}, mDice: {self.mdice:f}\n{self.by_modality()}"


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else float("nan")
