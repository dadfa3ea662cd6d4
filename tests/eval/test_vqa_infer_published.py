"""A published checkpoint, asked as the published evaluation asked it, gives the rows and masks that were recorded."""

from __future__ import annotations

import json
from ast import literal_eval
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.eval.options import InferenceOptions
from model.eval.places import Place
from model.eval.predictions import Prediction, read_predictions
from model.eval.run import run_inference
from model.eval.telling import segmentation_scores


@pytest.fixture(scope="module")
def images(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded images and masks, laid out as the records name them."""
    folder = tmp_path_factory.mktemp("published")
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for file in (golden / "1_preprocess" / "inputs").glob("*.png"):
        kind = "masks" if file.name.startswith("mask_") else "images"
        (folder / kind / file.name.removeprefix("mask_")).symlink_to(file)
    return folder


def answered(golden: Path, images: Path, answers: Path, data: str, **changes: Any) -> list[Prediction]:
    options = InferenceOptions(
        model=golden / "4_generate" / "hf_checkpoint",
        vision_tower=golden / "models" / "clip-vit-tiny-patch14-336",
        data=golden / "4_generate" / data,
        images=images,
        answers=answers,
        template="v1",
        max_new_tokens=48,
        device="cpu",
        **changes,
    )
    run_inference(options, Place())
    return list(read_predictions(answers))


def test_answers_are_those_of_the_published_loop(golden: Path, images: Path, tmp_path: Path):
    """It shows no regions, and of a conversation it writes the first question beside the last answer."""
    rows = answered(golden, images, tmp_path / "a.jsonl", "validate_vqa_input.json", regions=False, answer_type="open")
    recorded = (golden / "4_generate" / "validate_vqa_answers.jsonl").read_text().splitlines()
    for line in recorded:
        published = json.loads(line)
        own = [row for row in rows if row.question_id == published["question_id"]]
        assert own[0].prompt == published["prompt"]
        assert own[0].gt == published["gt"]
        assert own[-1].text == published["text"]
        assert published["image_path"].endswith(own[0].image_path)
        assert own[0].answer_type == published["answer_type"]
    assert [row.key[1] for row in rows] == [0, 0, 0, 0, 0, 0, 1]


def test_a_region_that_is_shown_changes_the_answer(golden: Path, images: Path, tmp_path: Path):
    blind = answered(golden, images, tmp_path / "blind.jsonl", "validate_vqa_input.json", regions=False)
    seeing = answered(golden, images, tmp_path / "seeing.jsonl", "validate_vqa_input.json")
    changed = {index for index, (one, other) in enumerate(zip(blind, seeing, strict=True)) if one.text != other.text}
    assert changed
    assert changed <= {2, 3}


def test_masks_score_as_in_the_published_loop(golden: Path, images: Path, tmp_path: Path):
    """Where ``<SEG>`` was said; the published loop paints a mask in any case, ours is then empty and scores 0."""
    answers = tmp_path / "masks.jsonl"
    rows = answered(golden, images, answers, "validate_seg_input.json", moe=True, thresholds=(0.1, 0.5), workers=0)
    recorded = json.loads((golden / "4_generate" / "validate_and_margins.json").read_text())["validate_seg_patched"]
    published = literal_eval(recorded["stdout"].splitlines()[1])
    lines = list(segmentation_scores(answers, (0.1, 0.5)))
    assert lines[0] == "masks at 0.1:"
    found = literal_eval(lines[1].splitlines()[1])
    for modality in ("x", "mr", "fundus"):
        assert found[modality] == pytest.approx(published[modality], abs=2e-4)
    assert found["endoscopy"] == {"iou": 0.0, "dice": 0.0}
    assert [bool(row.masks) for row in rows] == [True, True, True, False, False]
    assert rows[3].failed  # its mask is not among the recorded files
    assert np.isfinite([row.masks[0]["score"] for row in rows[:3]]).all()
