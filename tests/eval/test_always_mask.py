"""A mask for each grounding question, whether or not the answer says ``<SEG>``: what is painted, and what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from model.errors import MedPLIBError
from model.eval.metrics.scores import score_predictions
from model.eval.options import InferenceOptions
from model.eval.predictions import Prediction, read_predictions
from model.eval.processes import Place
from model.eval.run import run_inference
from model.eval.vqa_infer import parse_flags
from model.inference.engine import Engine, Request
from model.inference.generation import GenerationSettings
from tests.eval.phantom_questions import NANO, SAMPLE

RECORDS: list[dict[str, Any]] = json.loads((SAMPLE / "held_out.json").read_text())
KINDS = ("modality", "region_name", "grounding", "grounding_absent")
ASKED = [next(record for record in RECORDS if record["kind"] == kind) for kind in KINDS]

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained(NANO)


def options(folder: Path, **changes: Any) -> InferenceOptions:
    data = folder / "data.json"
    data.write_text(json.dumps(ASKED))
    return InferenceOptions(NANO, data, SAMPLE, folder / "answers.jsonl", device="cpu", thresholds=(0.5,), **changes)


def rows_of(engine: Engine, chosen: InferenceOptions) -> list[Prediction]:
    run_inference(chosen, Place(), opener=lambda *_: engine)
    return list(read_predictions(chosen.answers))


def test_grounding_questions_alone_are_painted_in_any_case(engine: Engine, tmp_path: Path):
    plain = rows_of(engine, options(tmp_path))
    always = rows_of(engine, options(tmp_path, always_mask=True, overwrite=True))
    assert [row.text for row in always] == [row.text for row in plain]
    assert [len(row.masks) for row in plain] == [0, 0, 1, 0]
    assert [len(row.masks) for row in always] == [0, 0, 1, 1]
    assert plain[2].masks == always[2].masks
    assert always[3].masks[0]["spoken"] is False
    assert always[3].masks[0]["label"] in always[3].prompt.lower()
    assert always[3].masks_at == {"0.5": [always[3].masks[0]["rle"]]}
    scores = score_predictions(always, samples=0)
    assert scores.overall["false_SEG_rate"].value == 0  # nothing was said
    assert scores.overall["false_mask_rate"].value == float(always[3].masks[0]["area_px"] > 0)


def test_a_run_goes_on_only_as_it_began(engine: Engine, tmp_path: Path):
    rows_of(engine, options(tmp_path))
    with pytest.raises(MedPLIBError, match="always_mask was False, now True"):
        rows_of(engine, options(tmp_path, always_mask=True))


def test_the_flag_is_off_unless_it_is_given(tmp_path: Path):
    (tmp_path / "data.json").write_text(json.dumps(ASKED))
    command = [f"--version={NANO}", f"--val_data_path={tmp_path / 'data.json'}", f"--image_folder={SAMPLE}"]
    assert not parse_flags([*command, "--eval_seg"])[0].always_mask
    assert parse_flags([*command, "--eval_seg", "--always_mask"])[0].always_mask


def test_nothing_is_painted_for_whoever_has_left(engine: Engine):
    said: list[str] = []
    ticket = engine.submit(request(always_mask=True), said.append)
    while not said:
        engine.step()
    ticket.cancel()
    while engine.step():
        pass
    answer = ticket.result(0)
    assert answer.finish == "cancelled"
    assert answer.masks == []


def test_a_mask_whose_place_is_cut_off_counts_as_not_said(engine: Engine):
    whole = engine.ask(request())
    assert len(whole.masks) == 1
    stop = GenerationSettings(stop=("<SEG>",))
    assert engine.ask(request(settings=stop)).masks == []
    (mask,) = engine.ask(request(settings=stop, always_mask=True)).masks
    assert not mask.spoken
    assert mask.label == whole.masks[0].label


def request(**more: Any) -> Request:
    record = ASKED[2]
    question = record["conversations"][0]["value"].removeprefix("<image>\n")
    return Request(SAMPLE / record["image"], question, **more)
