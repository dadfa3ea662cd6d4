"""A user's own data without a suite file: what it is taken for, where its run goes, and what is measured on it."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from model.cli import main
from model.errors import MedPLIBError
from model.eval.baselines import mask_baselines
from model.eval.metrics.scores import score_predictions
from model.eval.predictions import Prediction
from model.eval.questions import questions_of
from model.eval.results import detail_tables, measure
from model.eval.shards import Journal, fingerprint
from model.eval.suite import CURVE, data_name, is_suite, own_run_folder, own_suite
from tests.eval.drawn import SIDE, painted, row, save, square
from tests.eval.phantom_questions import NANO, RECORDS, SAMPLE


def built(folder: Path, splits: dict[str, list[dict[str, Any]]], root: Path = SAMPLE) -> Path:
    """A folder as ``medplib data build`` leaves it, its images those of ``root``."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, records in splits.items():
        (folder / f"{split}.json").write_text(json.dumps(records))
    listed = {split: [f"{split}.json"] for split in splits}
    about = {"format": "medplib-dataset/1", "name": "mine", "summary": "Drawn.", "terms": "CC0"}
    (folder / "dataset.json").write_text(json.dumps({**about, "images_root": str(root), "splits": listed}))
    return folder


def of_task(task: str, number: int) -> list[dict[str, Any]]:
    found = [record for record in RECORDS if record["task"] == task]
    return [{**record, "patient": f"p{index // 2}"} for index, record in enumerate(found[:number])]


def refusal(data: Path, **values: Any) -> str:
    with pytest.raises(MedPLIBError) as caught:
        own_suite(data, **{"split": "test", "images": None, "cache": data / "cache", **values})
    return str(caught.value)


# --- what is evaluated ----------------------------------------------------------------------------------------------


def test_a_built_folder_is_asked_by_split(tmp_path: Path):
    folder = built(tmp_path / "mine", {"train": RECORDS[:2], "test": RECORDS[2:4]})
    item = own_suite(folder, split="test", images=None, cache=tmp_path).sets[0]
    assert (item.name, item.records, item.images) == ("mine", (folder / "test.json",), SAMPLE)
    assert (item.blind, item.detailed, item.licence) == ((folder / "train.json",), True, "CC0")
    assert own_suite(folder, split="train", images=None, cache=tmp_path).sets[0].blind == ()
    assert "has no split validation (it has: train, test); name one with --split" in refusal(folder, split="validation")


@pytest.mark.parametrize("name", ["a set.json", "a set.jsonl"])
def test_a_record_file_is_asked_whole(tmp_path: Path, name: str):
    lines = json.dumps(RECORDS[:2]) if name.endswith(".json") else "\n".join(map(json.dumps, RECORDS[:2]))
    (tmp_path / name).write_text(lines)
    item = own_suite(tmp_path / name, split="test", images=None, cache=tmp_path).sets[0]
    assert (item.name, item.title, item.images, item.split) == ("a-set", "a-set", tmp_path, "all records")
    assert own_suite(tmp_path / name, split="test", images=SAMPLE, cache=tmp_path).sets[0].images == SAMPLE


def test_suites_win_over_folders_of_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    built(tmp_path / "phantoms", {"test": RECORDS[:1]})
    assert is_suite("phantoms")
    assert is_suite("a.yaml")
    assert not is_suite("./phantoms")
    assert not is_suite("phantom")


def test_what_is_no_data_is_refused_in_a_sentence(tmp_path: Path):
    assert "there is no suite or data" in refusal(tmp_path / "nowhere")
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"0": "background"}, "numTraining": 3}))  # nnU-Net's
    assert "which several processes cannot do together" in refusal(tmp_path, may_build=False)
    (tmp_path / "dataset.json").write_text("{")
    assert "cannot be read" in refusal(tmp_path)


def test_a_stopped_run_goes_on_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    fresh = own_run_folder(NANO, data_name(tmp_path / "mine.json"))
    assert fresh.parent == Path("runs/eval/medplib-nano")
    assert fresh.name.startswith("mine-20")
    earlier = fresh.with_name("mine-2020-01-01")
    Journal({"model": {"digest": fingerprint(NANO)}}).write(earlier / "predictions" / "mine.jsonl")
    assert own_run_folder(NANO, "mine") == earlier
    assert own_run_folder(NANO, "mine", overwrite=True) == fresh
    (earlier / "report.html").write_text("")  # it is finished
    assert own_run_folder(NANO, "mine") == fresh


def test_the_command_evaluates_a_built_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    asked = [*of_task("grounding", 6), *of_task("vqa", 4)]
    built(tmp_path / "mine", {"train": of_task("grounding", 12), "test": asked})
    assert main(["eval", str(NANO), "mine", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    for told in ("Masks by target", "Centre blob", "Position prior", "Mean over patients", "Questions", "threshold"):
        assert told in printed
    (folder,) = (tmp_path / "runs" / "eval" / "medplib-nano").iterdir()
    (part,) = json.loads((folder / "report.json").read_text())["sets"]
    assert part["scores"]["patients"] == 3
    assert [found["name"] for found in part["baselines"]] == ["Centre blob", "Position prior"]
    assert part["curve"]["thresholds"] == list(CURVE)
    at_half = part["curve"]["mDice"][""][CURVE.index(0.5)]
    assert at_half == pytest.approx(part["scores"]["overall"]["mDice@0.5"]["value"])
    with (folder / "scores.csv").open(newline="") as stream:
        assert {line["by"] for line in csv.DictReader(stream)} >= {"mean over patients", "threshold", "patient"}
    assert main(["eval", str(NANO), "mine", "--device", "cpu"]) == 0  # nothing is asked again
    assert capsys.readouterr().out == printed


# --- what is measured -----------------------------------------------------------------------------------------------


def of_patient(one: Prediction, patient: str, **values: str) -> Prediction:
    return replace(one, metadata={**one.metadata, "patient": patient, **values})


def test_patients_count_once_and_are_drawn_whole():
    masks = [of_patient(painted(n, 10), "a") for n in range(3)] + [of_patient(painted(3, None), "b")]
    found = score_predictions(masks, thresholds=(0.5,))
    assert found.overall["mDice@0.5"].value == 0.75
    mean = found.mean_over("patient")["mDice@0.5"]
    assert (mean.value, mean.count, mean.low, mean.high) == (0.5, 2, 0.0, 1.0)
    assert found.overall["mDice@0.5"].high == 1.0
    alone = score_predictions([of_patient(painted(n, 10 + n), "a") for n in range(3)], thresholds=(0.5,))
    assert np.isnan(alone.overall["mDice@0.5"].low)  # one patient says nothing about others
    assert found.overall["refused_rate"].value == 0.25


def test_spacing_and_patient_come_from_the_record():
    record = {**RECORDS[0], "spacing": [0.5, 0.7], "patient": 7, "absent_kind": "target"}
    (question,) = questions_of(record, 0, SAMPLE)
    assert question.spacing_mm == (0.5, 0.7)
    assert (question.metadata["patient"], question.metadata["absent_kind"]) == ("7", "target")
    for odd in ([1], [0, 1], ["a", 1], 3):
        assert questions_of({**record, "spacing": odd}, 0, SAMPLE)[0].spacing_mm is None


def test_blob_of_other_patients_and_prior_of_the_training_masks(tmp_path: Path):
    wide = square(22)
    answers = [of_patient(replace(painted(n, 10), gt_masks=[wide]), f"p{n}") for n in (0, 2)]
    path = save(tmp_path / "answers.jsonl", answers)
    (blob,) = mask_baselines(path, (), tmp_path)
    assert "other patients" in blob.how
    assert 0.8 < blob.dice[("", "")] < 0.9  # an ellipse of 400 px against a square in the middle, a little aside
    assert mask_baselines(save(tmp_path / "one.jsonl", answers[:1]), (), tmp_path) == []
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[20:40, 22:42] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(np.stack([mask] * 3, axis=-1)).save(tmp_path / "image.png")
    turns = [{"from": "human", "value": "<image>\n?"}, {"from": "gpt", "value": "<SEG><mask>mask.png</mask>"}]
    about = {"task": "grounding", "modality": "ct", "about": "liver"}
    (tmp_path / "train.json").write_text(json.dumps([{"image": "image.png", "conversations": turns, **about}]))
    path = save(path, [*answers, replace(painted(1, 10), gt_masks=[wide])])
    prior = mask_baselines(path, (tmp_path / "train.json",), tmp_path)[1]
    assert prior.dice[("modality", "ct")] > 0.95
    assert prior.dice[("modality", "mr")] == 0  # it was not trained on


def test_tables_of_false_masks_by_reason_and_of_questions(tmp_path: Path):
    Image.fromarray(np.zeros((SIDE, SIDE, 3), np.uint8)).save(tmp_path / "x.png")
    absent = [painted(n, 30 if n < 2 else None, absent=True) for n in range(4)]
    absent = [of_patient(one, f"p{n}", **({"absent_kind": "modality"} if n else {})) for n, one in enumerate(absent)]
    closed = [
        row(n, gt=gt, text="Yes", answer_type="closed", metadata={"task": "vqa", "kind": "presence"})
        for n, gt in ((4, "Yes"), (5, "Yes"), (6, "No"))
    ]
    present = [painted(7, 10), painted(8, 10)]
    asked = [
        {
            "id": one.question_id,
            "image": "x.png",
            "answer_type": one.answer_type,
            "kind": one.metadata["kind"],
            "task": one.metadata["task"],
            "conversations": [{"from": "human", "value": "<image>\n?"}, {"from": "gpt", "value": one.gt}],
        }
        for one in (*absent, *closed, *present)
    ]
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    item = own_suite(tmp_path / "asked.json", split="test", images=None, cache=tmp_path).sets[0]
    rows = [
        replace(one, masks_at={f"{at:g}": [mask["rle"] for mask in one.masks] for at in CURVE})
        for one in (*absent, *closed, *present)
    ]
    answers = save(tmp_path / "answers.jsonl", rows)
    part, _ = measure(item, answers, tmp_path / "asked.json", tmp_path, samples=50)
    tables = {table.title: table.rows for table in detail_tables(part)}
    (away, rest) = tables["False masks on absent targets"]
    assert away[0] == "(a) absent from the picture itself"
    assert (away[1].value, away[2]) == (1.0, 1)  # type: ignore[union-attr]
    assert rest[0] == "(c) a target of another modality"
    assert rest[1].value == pytest.approx(1 / 3)  # type: ignore[union-attr]
    kind = tables["Questions"][-1]
    assert (kind[0], kind[2].value, kind[3], kind[4]) == ("presence", 2 / 3, 2 / 3, 3)  # type: ignore[union-attr]
