"""A small folder in the published layout that the data tests change to their ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

IMAGE = "images/ct_00--Set--case_1--x_0001.png"
OTHER = "images/x_ray--Set--case_2--2d_none.png"
MASK = "masks/ct_00--Set--case_1--x_0001--0003_000.png"


class Folder:
    """Writes images, masks and records under one root."""

    image, other, mask = IMAGE, OTHER, MASK

    def __init__(self, root: Path) -> None:
        self.root = root

    def write_image(self, name: str, size: tuple[int, int] = (12, 16)) -> Path:
        rng = np.random.default_rng(len(name))
        return self._save(name, rng.integers(0, 256, (*size, 3), dtype=np.uint8))

    def write_mask(
        self, name: str, size: tuple[int, int] = (12, 16), box: tuple[int, int, int, int] = (2, 3, 7, 9)
    ) -> Path:
        pixels = np.zeros(size, dtype=np.uint8)
        pixels[box[0] : box[2], box[1] : box[3]] = 255
        return self._save(name, pixels)

    def write_records(self, records: list[Any], name: str = "data.json") -> Path:
        path = self.root / name
        path.write_text(json.dumps(records), encoding="utf-8")
        return path

    def _save(self, name: str, pixels: np.ndarray) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        return path

    @staticmethod
    def record(question: str, answer: Any, image: Any = IMAGE, **more: Any) -> dict[str, Any]:
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        return {"id": "r", "image": image, "conversations": turns, "answer_type": "open", **more}

    def vqa(self, **more: Any) -> dict[str, Any]:
        return self.record("<image>\nWhich modality is this?", "CT", **more)

    def region(self, **more: Any) -> dict[str, Any]:
        return self.record(f"<image>\nWhat is in <region>{MASK}</region>?", "The liver.", **more)

    def grounding(self, **more: Any) -> dict[str, Any]:
        return self.record("<image>\nSegment the liver.", f"Sure, it is <SEG>.<mask>{MASK}</mask>", **more)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Two images, and a mask of the first."""
    files = Folder(tmp_path)
    files.write_image(IMAGE)
    files.write_image(OTHER)
    files.write_mask(MASK)
    return files
