"""Result of a question: text, masks and timings."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from model.processing.masks import bounding_box, decode_rle, encode_rle


@dataclass(frozen=True)
class Mask:
    """One mask at image size.

    Attributes:
        label: what the answer calls it; empty when it has no name.
        rle: COCO run-length encoding, ``{"size": [h, w], "counts": str}``.
        score: the model's own estimate of the mask's IoU, in [0, 1].
        bbox: ``[x1, y1, x2, y2]`` in pixels, right and bottom exclusive; zeros for an empty mask.
        area_px: foreground pixels.
        area_mm2: the same in mm² where the file knows its spacing.
        presence: calibrated probability that the target is in the image, where the checkpoint has a classifier of it.
        spoken: False where the answer has no ``<SEG>`` for it and ``Request.always_mask`` demands it.
        warning: where the question asked for something else; see ``Request.every_target``.
    """

    label: str
    rle: dict[str, Any]
    score: float
    bbox: tuple[int, int, int, int]
    area_px: int
    area_mm2: float | None = None
    presence: float | None = None
    spoken: bool = True
    warning: str = ""

    @classmethod
    def from_array(
        cls,
        mask: np.ndarray,
        label: str,
        score: float,
        spacing_mm: tuple[float, float] | None = None,
        presence: float | None = None,
        spoken: bool = True,
    ) -> Mask:
        """Mask of a bool array [H, W]; ``spacing_mm`` is (row, column) spacing."""
        area = int(mask.sum())
        area_mm2 = area * spacing_mm[0] * spacing_mm[1] if spacing_mm and all(map(math.isfinite, spacing_mm)) else None
        box = tuple(int(side) for side in bounding_box(mask))
        score = float(np.clip(score, 0.0, 1.0))
        return cls(label, encode_rle(mask), score, box, area, area_mm2, presence, spoken)  # type: ignore[arg-type]

    def to_array(self) -> np.ndarray:
        """The mask as bool [H, W] at image size."""
        return decode_rle(self.rle)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready mapping."""
        output = {
            "label": self.label,
            "rle": self.rle,
            "score": round(self.score, 4) if math.isfinite(self.score) else None,  # JSON has no NaN
            "bbox": list(self.bbox),
            "area_px": self.area_px,
        }
        if self.area_mm2 is not None:
            output["area_mm2"] = round(self.area_mm2, 2)
        if self.presence is not None:
            output["presence"] = round(self.presence, 4)
        if not self.spoken:
            output["spoken"] = False
        if self.warning:
            output["warning"] = self.warning
        return output


def dropped_note(dropped_turns: int) -> list[str]:
    """What to say of questions that were left out of a conversation; empty where none were."""
    which = "the oldest question was" if dropped_turns == 1 else f"the {dropped_turns} oldest questions were"
    return [f"{which} left out: the conversation is longer than the model reads"] if dropped_turns else []


Finish = Literal["end", "length", "stop", "cancelled"]


@dataclass(frozen=True)
class Answer:
    """What a question gives back.

    Attributes:
        text: the answer.
        masks: in the order of their ``<SEG>`` in the text; see ``Request.always_mask`` for a text without any.
        timing: seconds by part.
        finish: what ended it: the model itself, the length it may have, a stop text, or the caller.
        new_tokens: tokens generated, the end token not counted.
        masks_at: for each further threshold asked for, the masks' COCO run lengths.
        router_stats: for each mixture layer, the share of the tokens that each expert computed, if asked for.
        prompt_tokens: of the conversation before it, the image's included.
        dropped_turns: oldest questions of the history that were left out because not all of it fits.
        notes: what else a reader should know, a phrase each.
    """

    text: str
    masks: list[Mask] = field(default_factory=list)
    timing: dict[str, float] = field(default_factory=dict)
    finish: Finish = "end"
    new_tokens: int = 0
    masks_at: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    router_stats: list[list[float]] | None = None
    prompt_tokens: int = 0
    dropped_turns: int = 0
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready mapping, as ``medplib ask --json`` prints it."""
        output = {
            "text": self.text,
            "masks": [mask.to_dict() for mask in self.masks],
            "finish": self.finish,
            "new_tokens": self.new_tokens,
            "timing": {name: round(seconds, 4) for name, seconds in self.timing.items()},
        }
        if self.dropped_turns:
            output["dropped_turns"] = self.dropped_turns
        if self.notes:
            output["notes"] = list(self.notes)
        return output
