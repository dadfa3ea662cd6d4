"""Grounding questions about SA-Med2D-20M in our record format, present targets and absent ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from model.data.builders.phantom_questions import refusal
from model.data.builders.sa_med2d_source import spoken_name
from model.data.builders.splits import draw, fraction

MODALITY_WORDS = {
    "ct": "CT",
    "mr": "MR",
    "x_ray": "X-ray",
    "pet": "PET",
    "fundus": "fundus",
    "dermoscopy": "dermoscopy",
    "endoscopy": "endoscopy",
    "ultrasound": "ultrasound",
}
_QUESTIONS = (
    "Segment the {name} in this {modality} image.",
    "Please give me a mask of the {name}.",
    "Can you outline the {name} here?",
    "In this {modality} image, mark the {name}.",
    "I need the {name} delineated. Please do that.",
    "Which pixels belong to the {name}?",
    "Find the {name} and segment it.",
    "Could you show the {name} as a mask?",
)
_ANSWERS = (
    "Here is the mask of the {name}: <SEG>.",
    "The {name}: <SEG>.",
    "Sure, the mask of the {name} is <SEG>.",
    "I have marked the {name}: <SEG>.",
)

Classes = Mapping[int, str]
"""Class id → name, of one data set and modality."""


def target_record(row: Mapping[str, Any], merged: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """A question for one class that the image holds."""
    name = spoken_name(merged["class_name"]) or ""
    chance = draw(seed, "wording", row["path"], name)
    answer = _ANSWERS[chance // 64 % len(_ANSWERS)].format(name=name)
    answer += f"<mask>{merged['file']}</mask>"
    return _record(row, f"{merged['class_id']:04d}", _question(row, name, chance), answer, "grounding", name)


def absent_record(
    row: Mapping[str, Any], merged: Mapping[str, Any], classes: Classes, share: float, seed: int
) -> dict[str, Any] | None:
    """A question for a class that the image does not hold, beside the question for ``merged``; None mostly.

    Args:
        row: an image of the index.
        merged: one of its classes.
        classes: all classes of its data set in its modality.
        share: of such questions among all, 0 … 0.5.
        seed: of the choice.
    """
    about = f"{merged['class_id']:04d}"
    if fraction(seed, "absent", row["path"], about) >= share / (1 - share):
        return None
    names = absent_names([entry["class_name"] for entry in row["merged"]], classes)
    if not names:
        return None
    chance = draw(seed, "absent name", row["path"], about)
    name = names[chance % len(names)]
    answer = refusal(name, np.random.default_rng(chance))
    return _record(row, f"{about}-absent", _question(row, name, chance // 4096), answer, "grounding_absent", name)


def absent_names(present: Sequence[str | None], classes: Classes) -> list[str]:
    """Classes that are surely not in an image with the classes ``present``, as questions call them.

    A name that contains a present one, or is contained in one, may mean the same thing or a part of it: with a
    "left lung" there is a "lung" too.
    """
    words = [frozenset(name.removeprefix("union_").split("_")) for name in present if name]
    names = []
    for class_name in classes.values():
        spoken, own = spoken_name(class_name), frozenset(class_name.split("_"))
        if spoken and not any(own <= other or other <= own for other in words):
            names.append(spoken)
    return sorted(set(names))


def _question(row: Mapping[str, Any], name: str, chance: int) -> str:
    modality = MODALITY_WORDS.get(row["modality"], row["modality"])
    return _QUESTIONS[chance % len(_QUESTIONS)].format(name=name, modality=modality)


def _record(row: Mapping[str, Any], suffix: str, question: str, answer: str, kind: str, about: str) -> dict[str, Any]:
    stem = row["path"].removeprefix("images/").removesuffix(".png")
    return {
        "id": f"{stem}--{suffix}",
        "image": row["path"],
        "conversations": [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}],
        "answer_type": "open",
        "task": "grounding",
        "kind": kind,
        "modality": row["modality"],
        "dataset": row["dataset"],
        "about": about,
    }
