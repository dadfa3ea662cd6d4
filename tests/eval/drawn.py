"""Answers of no model, and a page read back: shared by the tests of reports and comparisons."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from model.eval.predictions import Prediction, PredictionWriter
from model.processing.masks import encode_rle

VOID = {"meta", "img", "br", "wbr"}
SIDE = 64
EVIL = '</dd><script>alert(1)</script><img src=x onerror="alert(2)">\u202edessert\x00'


def square(left: int, side: int = 20) -> dict[str, Any]:
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    mask[20 : 20 + side, left : left + side] = True
    return encode_rle(mask)


def row(number_: int, **values: Any) -> Prediction:
    known = {"modality": ("ct", "mr")[number_ % 2], "turn": 0, **values.pop("metadata", {})}
    plain = {"image_path": f"images/{number_ % 6}.png", "prompt": f"Question {number_}?", "model_id": "nano"}
    return Prediction(**{"question_id": f"q{number_}", "metadata": known, **plain, **values})  # type: ignore[arg-type]


def painted(number_: int, left: int | None, *, absent: bool = False) -> Prediction:
    """An answer about a liver that lies at 10, or is absent; the painted mask begins at ``left``."""
    masks = [] if left is None else [square(left)]
    return row(
        number_,
        gt="There is no liver." if absent else "The liver is <SEG>.",
        text="The liver is <SEG>." if masks else "There is no liver.",
        masks=[{"label": "liver", "rle": rle, "score": 0.9, "bbox": [0, 0, 1, 1], "area_px": 400} for rle in masks],
        masks_at={"0.5": masks, "0.1": masks},
        gt_masks=[] if absent else [square(10)],
        metadata={"task": "grounding", "kind": "grounding", "structure": "liver"},
    )


def rows() -> list[Prediction]:
    """22 answers: 6 closed (4 right), 4 open, 11 about masks (2 of absent targets), and a closed one that failed."""
    closed = [
        row(
            n,
            gt="Yes",
            text="Yes" if n < 4 else "No",
            answer_type="closed",
            metadata={"task": "vqa", "kind": "presence"},
        )
        for n in range(6)
    ]
    texts = ("Liver and kidney", EVIL, "", "=2+3 liver")
    opened = [
        row(6 + n, gt="Liver and kidney", text=text, answer_type="open", metadata={"task": "vqa", "kind": "list"})
        for n, text in enumerate(texts)
    ]
    masks = [painted(10 + n, left) for n, left in enumerate((10, 11, 12, 13, 14, 15, 16, 17, None))]
    absent = [painted(19, None, absent=True), painted(20, 30, absent=True)]
    failed = row(21, gt="Yes", text="", answer_type="closed", finish="error", error="the image is <gone>")
    shares = [[[0.25, 0.75], [0.5, 0.5]], [[0.75, 0.25], [0.5, 0.5]]]
    return [
        replace(r, router=shares[n % 2]) if n < 6 else r for n, r in enumerate([*closed, *opened, *masks, *absent])
    ] + [failed]


def save(path: Path, answers: Iterable[Prediction]) -> Path:
    """Write a predictions file."""
    with PredictionWriter(path, "overwrite") as writer:
        for answer in answers:
            writer.write(answer)
    return path


class Outline(HTMLParser):
    """Tags that are open, every tag with its attributes, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())
