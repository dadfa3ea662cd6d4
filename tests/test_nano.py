"""The shipped nano answers about held-out sample pictures, through the engine, as its card says it does."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.cli import main
from model.data.image_io import read_mask
from model.inference.answer import Answer
from model.inference.engine import Engine, Request
from tests.conftest import ROOT

NANO, SAMPLE = ROOT / "assets" / "medplib-nano", ROOT / "data" / "sample"
LIMIT = 30 * 2**20  # bytes


@pytest.fixture(scope="module")
def scores() -> dict[str, float]:
    """Share of right answers by kind of question, and the mean Dice of masks, over ``held_out.json``."""
    records = json.loads((SAMPLE / "held_out.json").read_text())
    found: dict[str, list[float]] = defaultdict(list)
    for number, answer in Engine.from_pretrained(NANO).answer_all(map(request, records)):
        assert isinstance(answer, Answer)
        record, wanted = records[number], records[number]["conversations"][1]["value"]
        targets = re.findall(r"<mask>(.*?)</mask>", wanted)
        if record["task"] != "grounding":
            found[record["kind"]].append(answer.text == wanted)
        elif not targets:
            found["refusal"].append(not answer.masks)
        for place, target in enumerate(targets):
            painted = answer.masks[place].to_array() if place < len(answer.masks) else None
            found["dice"].append(dice(painted, read_mask(SAMPLE / target)))
    return {kind: float(np.mean(values)) for kind, values in found.items()}


def request(record: dict[str, Any]) -> Request:
    asked = record["conversations"][0]["value"].removeprefix("<image>\n")
    regions = [SAMPLE / path for path in re.findall(r"<region>(.*?)</region>", asked)]
    return Request(SAMPLE / record["image"], re.sub(r"<region>.*?</region>", "<region></region>", asked), regions)


def dice(painted: np.ndarray | None, target: np.ndarray) -> float:
    return 0.0 if painted is None else 2 * (painted & target).sum() / (painted.sum() + target.sum())


@pytest.mark.parametrize(
    ("kind", "least"),
    [("modality", 0.95), ("presence", 0.8), ("region_name", 0.85), ("refusal", 0.75), ("dice", 0.8)],
)
def test_it_is_as_good_as_it_should_be(scores: dict[str, float], kind: str, least: float) -> None:
    assert scores[kind] >= least


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in NANO.iterdir()) <= LIMIT


def test_it_is_the_default_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = next((SAMPLE / "images").glob("ultrasound*seed505*"))
    assert main(["ask", str(image), "What modality is used to take this image?", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == "Ultrasound"
