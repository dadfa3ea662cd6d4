"""A published checkpoint, asked as the published evaluation asked it, gives the rows and masks that were recorded."""

from __future__ import annotations

import json
from ast import literal_eval
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from model.eval.metrics.scores import score_predictions
from model.eval.options import InferenceOptions
from model.eval.predictions import Prediction, read_predictions
from model.eval.run import run_inference, segmentation_scores
from model.eval.shards import Rank


@pytest.fixture(scope="module")
def images(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded images and masks, laid out as the records name them."""
    folder = tmp_path_factory.mktemp("published")
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for file in (golden / "1_preprocess" / "inputs").glob("*.png"):
        kind = "masks" if file.name.startswith("mask_") else "images"
        (folder / kind / file.name.removeprefix("mask_")).symlink_to(file)
    reference = np.load(golden / "4_generate" / "generate.npz")["llava_v1/new_ground/gt_mask"]
    Image.fromarray(reference * 255).save(folder / "masks" / "pet_00--odd2--h.png")
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
    run_inference(options, Rank())
    return list(read_predictions(answers))


def recorded_masks(golden: Path) -> dict[str, Any]:
    return json.loads((golden / "4_generate" / "validate_and_margins.json").read_text())["validate_seg_patched"]


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
    """Where ``<SEG>`` was said; where not, ours is empty and scores 0 unless a mask is asked for in any case."""
    answers = tmp_path / "masks.jsonl"
    rows = answered(golden, images, answers, "validate_seg_input.json", moe=True, thresholds=(0.1, 0.5), workers=0)
    recorded = recorded_masks(golden)
    published = literal_eval(recorded["stdout"].splitlines()[1])
    lines = list(segmentation_scores(answers, (0.1, 0.5)))
    assert lines[0] == "masks at 0.1:"
    found = literal_eval(lines[1].splitlines()[1])
    for modality in ("x", "mr", "fundus"):
        assert found[modality] == pytest.approx(published[modality], abs=2e-4)
    assert found["endoscopy"] == found["pet"] == {"iou": 0.0, "dice": 0.0}
    assert [bool(row.masks) for row in rows] == [True, True, True, False, False]
    assert np.isfinite([row.masks[0]["score"] for row in rows[:3]]).all()


def test_masks_painted_in_any_case_score_as_published(golden: Path, images: Path, tmp_path: Path):
    """With ``always_mask`` an answer without ``<SEG>`` has a mask too, and every published number comes out."""
    recorded = recorded_masks(golden)
    answers = tmp_path / "always.jsonl"
    rows = answered(golden, images, answers, "validate_seg_input.json", always_mask=True, thresholds=(0.1,))
    assert ["<SEG>" in row.text for row in rows] == [True, True, True, False, False]
    assert [mask.get("spoken", True) for row in rows for mask in row.masks] == [True, True, True, False, False]
    lines = list(segmentation_scores(answers, (0.1,)))
    published, found = (literal_eval(text.splitlines()[1]) for text in (recorded["stdout"], lines[1]))
    assert found.keys() == published.keys()
    for modality, scores in published.items():
        assert found[modality] == pytest.approx(scores, abs=2e-4), modality
    scores = score_predictions(rows, thresholds=(0.1,), samples=0)
    assert scores.published_masks[0.1].miou == pytest.approx(recorded["miou"], abs=1e-4)
    assert scores.published_masks[0.1].mdice == pytest.approx(recorded["mDice"], abs=1e-4)
    assert scores.overall["SEG_emission_rate"].value == pytest.approx(0.6)
    assert lines[2] == "2 of 5 answers say no <SEG>; without --always_mask their masks are empty"
