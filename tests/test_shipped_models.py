"""The shipped models answer about held-out pictures, through the engine, as their cards say they do."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model import Predictor
from model.checkpoint.directories import default_model
from model.cli import main
from model.data.image_io import read_mask
from model.inference.answer import Answer
from model.inference.engine import Engine, Request
from tests.conftest import ROOT

SAMPLE = ROOT / "data" / "sample"
MODELS = {ROOT / "assets" / "medplib-nano": 30 * 2**20, ROOT / "assets" / "medplib-mini": 40 * 2**20}  # most bytes


@pytest.fixture(scope="module", params=MODELS, ids=lambda path: path.name)
def scores(request: pytest.FixtureRequest) -> dict[str, float]:
    """Share of right answers by kind of question, and the mean Dice of masks, over ``held_out.json``."""
    records = json.loads((SAMPLE / "held_out.json").read_text())
    found: dict[str, list[float]] = defaultdict(list)
    for number, answer in Engine.from_pretrained(request.param).answer_all(map(asked, records)):
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


def asked(record: dict[str, Any]) -> Request:
    text = record["conversations"][0]["value"].removeprefix("<image>\n")
    regions = [SAMPLE / path for path in re.findall(r"<region>(.*?)</region>", text)]
    return Request(SAMPLE / record["image"], re.sub(r"<region>.*?</region>", "<region></region>", text), regions)


def dice(painted: np.ndarray | None, target: np.ndarray) -> float:
    return 0.0 if painted is None else 2 * (painted & target).sum() / (painted.sum() + target.sum())


@pytest.mark.parametrize(
    ("kind", "least"),
    [("modality", 0.95), ("presence", 0.8), ("region_name", 0.85), ("refusal", 0.75), ("dice", 0.8)],
)
def test_it_is_as_good_as_it_should_be(scores: dict[str, float], kind: str, least: float) -> None:
    assert scores[kind] >= least


@pytest.mark.parametrize("model", MODELS, ids=lambda path: path.name)
def test_it_is_small(model: Path) -> None:
    assert sum(path.stat().st_size for path in model.iterdir()) <= MODELS[model]


def test_the_mini_is_the_default_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MEDPLIB_MODEL")
    assert default_model().name == "medplib-mini"
    image = next((SAMPLE / "images").glob("ultrasound*seed505*"))
    assert main(["ask", str(image), "What modality is used to take this image?", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == "Ultrasound"


def test_the_mini_segments_real_pictures(tmp_path: Path) -> None:
    """Eight lungs and eight skin lesions of test patients."""
    real = Path(os.environ.get("MEDPLIB_REAL", ROOT.parent / "shared" / "real"))
    if not real.is_dir():
        pytest.skip(f"no real pictures at {real}; set MEDPLIB_REAL to their folder")
    found = []
    predictor = Predictor.from_pretrained(ROOT / "assets" / "medplib-mini")
    for name in ("cxr_lungs", "ph2"):
        shutil.unpack_archive(real / f"{name}.tar", tmp_path)
        with (tmp_path / name / "meta.csv").open(newline="", encoding="utf-8") as stream:
            rows = [row for row in csv.DictReader(stream) if row["split"] == "test"]
        for row in rows[:8]:
            answer = predictor.ask(tmp_path / name / row["image"], f"Please segment the {row['target']}.")
            painted = answer.masks[0].to_array() if answer.masks else None
            found.append(dice(painted, read_mask(tmp_path / name / row["mask"])))
    assert np.mean(found) > 0.85
