"""Masks know their name, box and area, and survive the way to JSON and back."""

from __future__ import annotations

import json

import numpy as np
import pytest

from model.inference.answer import Answer, Mask
from model.inference.targets import mask_labels


@pytest.mark.parametrize(
    ("text", "question", "labels"),
    [
        ("Sure, the liver is <SEG>.", "Please segment the liver.", ["liver"]),
        ("The left kidney is <SEG> and the spleen is <SEG>.", "Segment both.", ["left kidney", "spleen"]),
        (
            "Sure, the segmentation result is <SEG>.",
            "Can you segment the left lung in this X-ray image?",
            ["left lung"],
        ),
        ("Here is the optic disc <SEG>.", "Mark the optic disc, please.", ["optic disc"]),
        ("<SEG>", "Please segment the tumor.", ["tumor"]),
        ("It is <SEG>.", "What is it?", [""]),
        ("There is no pancreas in this image.", "Segment the pancreas.", []),
    ],
)
def test_masks_are_named(text: str, question: str, labels: list[str]) -> None:
    assert mask_labels(text, question, text.count("<SEG>")) == labels


def test_mask_round_trip() -> None:
    array = np.zeros((40, 30), dtype=bool)
    array[5:15, 10:14] = True
    mask = Mask.from_array(array, "lesion", 1.2, spacing_mm=(0.5, 0.5))
    assert (mask.area_px, mask.area_mm2, mask.score) == (40, 10.0, 1.0)
    assert mask.bbox == (10, 5, 14, 15)
    assert (mask.to_array() == array).all()
    assert mask.rle["size"] == [40, 30]


def test_answer_is_json() -> None:
    mask = Mask.from_array(np.eye(4, dtype=bool), "x", 0.5)
    answer = Answer("a <SEG>", [mask], {"total": 0.123456}, finish="length", new_tokens=3)
    printed = json.loads(json.dumps(answer.to_dict()))
    assert set(printed) == {"text", "masks", "finish", "new_tokens", "timing"}
    assert (printed["finish"], printed["new_tokens"], printed["timing"]) == ("length", 3, {"total": 0.1235})
    assert set(printed["masks"][0]) == {"label", "rle", "score", "bbox", "area_px"}


@pytest.mark.parametrize(
    "question",
    ["segment a" + " " * 19_000 + "§", "segment " * 2400 + "§", "where is " * 2000 + "§", "segment " + "a in " * 3800],
    ids=["blanks", "verbs", "places", "names"],
)
def test_no_question_keeps_the_search_for_a_name_busy(question: str) -> None:
    """Some of these took minutes."""
    assert len(mask_labels("<SEG>", question, 1)[0]) <= 80
    assert mask_labels(f"the liver{question} is <SEG>", "", 1)
