"""The shipped nano says and paints the same about the sample's pictures alone, in a batch, and by a plain loop."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import numpy as np
import pytest

from model import Predictor
from model.inference.answer import Answer
from model.inference.engine import Engine, EngineSettings, Request
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.processor import MedPLIBProcessor
from tests.conftest import ROOT
from tests.inference.mixtures import assert_same, plain_answer

NANO, SAMPLE = ROOT / "assets" / "medplib-nano", ROOT / "data" / "sample"


@cache
def parts() -> tuple[MedPLIBForCausalLM, MedPLIBProcessor]:
    predictor = Predictor.from_pretrained(NANO)
    return predictor.model, predictor.processor


@cache
def records() -> list[dict[str, Any]]:
    """A few held-out questions of every task, about several pictures."""
    every = json.loads((SAMPLE / "held_out.json").read_text())
    np.random.default_rng(0).shuffle(every)
    wanted = ("modality", "list", "side", "region_name", "region_check", "grounding", "grounding_absent")
    pairs = [record for record in every if record["kind"] == "grounding_pair"][:2]
    return [*(next(record for record in every if record["kind"] == kind) for kind in wanted), *pairs]


def request(record: dict[str, Any]) -> Request:
    asked = record["conversations"][0]["value"].removeprefix("<image>\n")
    regions = [SAMPLE / path for path in re.findall(r"<region>(.*?)</region>", asked)]
    question = re.sub(r"<region>.*?</region>", "<region></region>", asked)
    return Request(SAMPLE / record["image"], question, regions, thresholds=(0.1, 0.5), router_stats=True)


@cache
def wanted() -> list[Answer]:
    """What a plain loop answers."""
    return [plain_answer(*parts(), request(record)) for record in records()]


def test_the_questions_are_mixed() -> None:
    assert {record["task"] for record in records()} == {"vqa", "region", "grounding"}
    assert {0, 1, 2} == {len(answer.masks) for answer in wanted()}
    assert {answer.finish for answer in wanted()} == {"end"}


def test_alone() -> None:
    predictor = Predictor(*parts())
    for record, answer in zip(records(), wanted(), strict=True):
        assert_same(predictor.engine.ask(request(record)), answer)


@pytest.mark.parametrize(
    "options",
    [
        {"slots": 16, "lookahead": True, "prefill_chunk": 50},
        {"slots": 3, "prefix_cache_mb": 0, "image_cache_mb": 0},
    ],
)
def test_in_a_batch(options: dict[str, Any]) -> None:
    order = np.random.default_rng(len(options)).permutation(len(records())).tolist()
    engine = Engine(*parts(), EngineSettings(**options))
    found = dict(engine.answer_all(request(records()[index]) for index in order))
    for place, index in enumerate(order):
        answer = found[place]
        assert isinstance(answer, Answer)
        assert_same(answer, wanted()[index])
