"""Pictures to try the page on: the drawn phantoms of ``data/sample``, with questions that fit them."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2

from model.processing.special_tokens import IMAGE_TOKEN

SAMPLE = Path(__file__).resolve().parents[3] / "data" / "sample"
GENERAL_QUESTIONS = ("What kind of medical image is this?", "List the structures that you can see.")
REGION_QUESTION = "What is in the region?"
_NAMES = {"ct": "CT", "mr": "MR", "pet": "PET", "x_ray": "X-ray"}
_THUMBNAIL = 112  # pixels, longer side


@dataclass(frozen=True)
class Example:
    """A picture to try.

    Attributes:
        path: its file.
        label: what kind of picture it is.
        thumbnail: a small one as a data URI.
        questions: that can be asked about it.
    """

    path: Path
    label: str
    thumbnail: str
    questions: tuple[str, ...] = field(default=GENERAL_QUESTIONS)


def find_examples(folder: Path = SAMPLE) -> list[Example]:
    """One picture of each modality; none where the folder is not there, as in an installed package."""
    file = folder / "held_out.json"
    if not file.is_file():
        return []
    records: dict[str, list[dict[str, Any]]] = {}
    for record in json.loads(file.read_text(encoding="utf-8")):
        records.setdefault(record["image"], []).append(record)
    found: dict[str, Example] = {}
    for image, about in records.items():
        modality = about[0]["modality"]
        pixels = cv2.imread(str(folder / image))
        if modality not in found and pixels is not None:
            label = _NAMES.get(modality, modality.replace("_", " ").capitalize())
            found[modality] = Example(folder / image, label, _thumbnail(pixels), _questions(about))
    return list(found.values())


def _questions(records: list[dict[str, Any]]) -> tuple[str, ...]:
    asked = [GENERAL_QUESTIONS[0]]
    for kind in ("grounding", "presence", "list"):
        record = next((record for record in records if record.get("kind") == kind), None)
        if record is not None:
            asked.append(record["conversations"][0]["value"].replace(IMAGE_TOKEN, "").strip())
    return tuple(dict.fromkeys(asked))


def _thumbnail(pixels: Any) -> str:
    scale = _THUMBNAIL / max(pixels.shape[:2])
    small = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return "data:image/jpeg;base64," + base64.b64encode(cv2.imencode(".jpg", small)[1].tobytes()).decode("ascii")
