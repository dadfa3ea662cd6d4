"""Answers without ``<SEG>`` are given the mask that the published evaluation paints then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model.checkpoint import load
from model.inference.answer import Answer
from model.inference.generation import GenerationSettings
from model.inference.predictor import Predictor
from model.inference.requests import Request

QUESTIONS = {
    "lisa_grd1": ("x_ray--odd--c.png", "Can you segment the left lung in this X-ray image?"),
    "lisa_vqa1": ("ct_00--tall--a.png", "What modality is used to take this image?"),
}


def ask(predictor: Predictor, golden: Path, file: str, question: str, most: int = 48) -> Answer:
    picture = np.asarray(Image.open(golden / "1_preprocess" / "inputs" / file).convert("RGB"))
    settings = GenerationSettings(most)
    return predictor.engine.ask(Request(picture, question, settings=settings, threshold=0.1, always_mask=True))


def assert_painted(answer: Answer, logits: np.ndarray) -> None:
    """One mask, that of recorded logits, but for pixels whose probability is 0.1 to rounding."""
    (mask,) = answer.masks
    assert not mask.spoken
    assert mask.to_dict()["spoken"] is False
    probability = torch.from_numpy(logits).sigmoid().numpy()
    clear = np.abs(probability - 0.1) > 1e-3
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(mask.to_array()[clear], (probability > 0.1)[clear])


@pytest.fixture(scope="module")
def predictor(golden: Path) -> Predictor:
    directory = golden / "4_generate" / "hf_checkpoint"
    return Predictor(
        *load(directory, vision_tower=golden / "models" / "clip-vit-tiny-patch14-336", dtype=torch.float32)
    )


def test_an_answer_that_ends_is_painted_from_what_its_last_token_was_chosen_from(
    predictor: Predictor, golden: Path
) -> None:
    cases: dict[str, Any] = json.loads((golden / "4_generate" / "generate.json").read_text())["cases"]
    arrays = np.load(golden / "4_generate" / "generate.npz")
    silent = {
        name: case for name, case in cases.items() if case.get("n_seg") == 0 and case["conv_template"] == "llava_v1"
    }
    assert len(silent) == 3
    for name, case in silent.items():
        question = case["sample"]["conversations"][0]["value"].removeprefix("<image>\n")
        answer = ask(predictor, golden, Path(case["image"]).name, question)
        assert answer.text == case["evaluate_text"]
        assert answer.masks[0].score == pytest.approx(float(arrays[f"{name}/iou_pred"].clip(0, 1).item()), abs=1e-3)
        assert_painted(answer, arrays[f"{name}/pred_mask"][0])


def test_an_answer_that_is_cut_off_is_painted_from_one_token_earlier(
    published_directories: dict[str, Path], golden: Path
) -> None:
    """The published code counts from the end of the states, and the state that would choose an end is not there."""
    tower = golden / "models" / "clip-vit-tiny-patch14-336"
    dense = Predictor(*load(published_directories["lisa"], vision_tower=tower, dtype=torch.float32))
    masks = np.load(golden / "4_generate" / "lisa_evaluate.npz")
    for name, (file, question) in QUESTIONS.items():
        answer = ask(dense, golden, file, question, most=10)
        assert answer.finish == "length"
        assert_painted(answer, masks[f"{name}/pred_mask"][0])


def test_what_is_spoken_is_painted_as_ever(predictor: Predictor, golden: Path) -> None:
    """Nor is anything painted where nobody asks for it."""
    question = "Please segment the tumor."
    answer = ask(predictor, golden, "mr_00--wide--b.png", question)
    assert answer.text == "<SEG>"
    plain = predictor.ask(golden / "1_preprocess" / "inputs" / "mr_00--wide--b.png", question, threshold=0.1)
    assert answer.to_dict()["masks"] == plain.to_dict()["masks"]
    assert "spoken" not in answer.to_dict()["masks"][0]
    silent = predictor.ask(golden / "1_preprocess" / "inputs" / "ct_00--tall--a.png", QUESTIONS["lisa_vqa1"][1])
    assert silent.masks == []
