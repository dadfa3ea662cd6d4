"""MedPLIB in lmms-eval, around the model: the command, its settings, the tasks' documents and their scores."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import model.eval.lmms as package
from model.data.image_io import read_image, read_mask
from model.errors import MedPLIBError
from model.eval.lmms import adapter, phantoms
from model.eval.lmms.__main__ import lmms_eval_arguments, main
from model.eval.lmms.adapter import (
    ModelArguments,
    Visuals,
    answer_in_order,
    own_device,
    own_seed,
    read_generation,
    read_model_arguments,
    read_visuals,
)
from model.eval.lmms.phantoms import PointedRegion, text_with_masks
from model.eval.metrics.scores import score_predictions
from model.eval.questions import Question, questions_of
from model.inference.answer import Answer, Mask
from model.inference.engine import Engine, Request
from tests.eval.phantom_questions import NANO, answers_to, as_document, held_out_questions, of_task, request_of


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained(NANO)


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return held_out_questions()


# --- without the harness --------------------------------------------------------------------------------------------


def test_without_the_harness_use_is_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(package, "find_spec", lambda name: None)
    for use in (package.manifest, lambda: adapter.MedPLIB(pretrained=str(NANO))):
        with pytest.raises(MedPLIBError, match="lmms-eval is not installed"):
            use()
    assert main(["--tasks", "medplib_phantoms"]) == 2
    assert capsys.readouterr().err.startswith("error: lmms-eval is not installed")


def test_another_series_of_the_harness_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "find_spec", lambda name: object())
    for found, fits in (("0.7", True), ("0.7.3", True), ("0.6.1", False), ("0.70", False), ("1.0", False)):
        monkeypatch.setattr(package, "version", lambda name, found=found: found)
        if fits:
            package.require_lmms_eval()
        else:
            with pytest.raises(MedPLIBError, match=f"version {found}, MedPLIB speaks 0.7"):
                package.require_lmms_eval()


def test_command_puts_model_and_tasks_in(tmp_path: Path) -> None:
    command, data = lmms_eval_arguments(["--tasks", "t", f"--data={tmp_path}", "--limit", "3"])
    assert command == ["--tasks", "t", "--limit", "3", "--model", "medplib", "--include_path", str(package.TASKS)]
    assert data == str(tmp_path)
    assert lmms_eval_arguments(["--model=dummy"]) == (["--model=dummy", "--include_path", str(package.TASKS)], None)
    for wrong in (["--data", str(tmp_path / "absent")], ["--data"], ["--include_path", "x"]):
        with pytest.raises(MedPLIBError):
            lmms_eval_arguments(wrong)


def test_model_arguments_are_all_used() -> None:
    read = read_model_arguments(
        {
            "pretrained": "runs/7",
            "device": "cpu",
            "dtype": "bfloat16",
            "slots": 3,
            "batch_size": 1,
            "max_batch_size": None,
            "max_length": 500,
            "threshold": 0.1,
            "seed": 7,
            "max_new_tokens": 9,
        }
    )
    assert read.loading == {"device": "cpu", "dtype": torch.bfloat16}
    assert (read.engine.slots, read.engine.max_length) == (3, 500)
    assert (read.pretrained, read.threshold, read.seed, read.max_new_tokens) == ("runs/7", 0.1, 7, 9)


@pytest.mark.parametrize(
    ("given", "slots"),
    [
        ({}, 8),
        ({"batch_size": 1}, 8),
        ({"batch_size": "4"}, 4),
        ({"batch_size": "auto"}, 8),
        ({"batch_size": "auto", "max_batch_size": 5}, 5),
        ({"batch_size": 2, "slots": 2}, 2),
    ],
)
def test_batch_size_means_slots(given: dict[str, Any], slots: int) -> None:
    assert read_model_arguments({"pretrained": "x", **given}).engine.slots == slots


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "pretrained=DIR"),
        ({"pretrained": "x", "slotz": 3}, "slotz"),
        ({"pretrained": "x", "slots": 2, "batch_size": 4}, "mean the same"),
        ({"pretrained": "x", "max_batch_size": 4}, "auto"),
        ({"pretrained": "x", "slots": 0}, "at least 1"),
        ({"pretrained": "x", "slots": "many"}, "give a number"),
        ({"pretrained": "x", "seed": 1.5}, "whole number"),
        ({"pretrained": "x", "dtype": "fp8"}, "fp32 or bf16"),
    ],
)
def test_wrong_model_arguments_are_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(MedPLIBError, match=told):
        read_model_arguments(given)


def test_each_process_of_a_machine_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [own_device(name) for name in ("cuda", "cuda:1", "cpu")] == ["cuda:3", "cuda:1", "cpu"]
    monkeypatch.delenv("LOCAL_RANK")
    assert own_device("cuda") == "cuda"


def test_generation_settings_mean_what_the_harness_means() -> None:
    known = ModelArguments("x", max_new_tokens=33, seed=5)

    def read(**values: Any) -> Any:
        return read_generation(values, known).settings

    plain = read(until=None, num_beams=1, top_p=None)
    assert (plain.max_new_tokens, plain.temperature, plain.top_p, plain.stop, plain.seed) == (33, 0.0, 1.0, (), 5)
    assert read(until="\n\n").stop == ("\n\n",)
    assert read(until=["", "###"], max_gen_toks=4).stop == ("###",)
    assert read(max_gen_toks=4).max_new_tokens == 4
    assert read(do_sample=False, temperature=0.7, top_p=0).temperature == 0.0
    assert read(do_sample=True).temperature == 1.0
    drawn = read(temperature=0.7, top_p=0.9, top_k=3.0, seed=11)
    assert (drawn.temperature, drawn.top_p, drawn.top_k, drawn.seed) == (0.7, 0.9, 3, 11)
    both = read_generation({"masks": "rle", "image_aspect_ratio": "pad"}, known)
    assert both.masks and both.ignored == ("image_aspect_ratio",)


@pytest.mark.parametrize(
    "values",
    [
        {"num_beams": 3},
        {"repetition_penalty": 1.2},
        {"until": 3},
        {"max_new_tokens": 0},
        {"temperature": "warm"},
        {"masks": "png"},
    ],
)
def test_what_cannot_be_done_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(MedPLIBError):
        read_generation(values, ModelArguments("x"))


def test_seeds_differ_between_requests_and_not_between_runs() -> None:
    seeds = {own_seed(base, request) for base in (0, 1) for request in ("a 0", "a 1", "b 0")}
    assert len(seeds) == 6 and own_seed(0, "a 0") == own_seed(0, "a 0")


def test_visuals_are_one_image_and_its_regions() -> None:
    image = Image.new("RGB", (4, 4))
    assert read_visuals(None) == read_visuals([]) == Visuals(None)
    assert read_visuals([image, PointedRegion("a.png")]) == Visuals(image, ("a.png",))
    for wrong in ([image, image], [{"array": 1}]):
        with pytest.raises(MedPLIBError):
            read_visuals(wrong)


# --- answers --------------------------------------------------------------------------------------------------------


def test_answers_come_in_order_and_failures_in_their_place(engine: Engine, questions: list[Question]) -> None:
    asked = questions[::20]

    def missing() -> Request:
        raise FileNotFoundError("gone.png")

    makers: list[Callable[[], Request]] = [lambda q=question: request_of(q) for question in asked]
    makers.insert(2, missing)
    makers.insert(4, lambda: Request("nowhere.png", "What is this?"))
    outcomes = answer_in_order(engine, makers)
    failed = [place for place, outcome in enumerate(outcomes) if isinstance(outcome, MedPLIBError)]
    assert failed == [2, 4]
    answers = [outcome for outcome in outcomes if isinstance(outcome, Answer)]
    alone = [engine.ask(request_of(question)) for question in asked]
    assert [answer.text for answer in answers] == [answer.text for answer in alone]


def test_masks_survive_as_text(questions: list[Question]) -> None:
    document = as_document(of_task(questions, "grounding")[0])
    shape = read_image(document["image"]).size
    arrays = [np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)]
    arrays[0][3:9, 4:22] = True
    masks = [Mask.from_array(array, label, 0.5) for array, label in zip(arrays, ('a</mask>"<', ""), strict=True)]
    text = text_with_masks(Answer("The liver is <SEG> and <SEG>.", masks))
    found = phantoms.prediction_of(document, f"  {text}\n")
    assert found.text == "The liver is <SEG> and <SEG>."
    assert found.masks == [mask.to_dict() for mask in masks]


@pytest.mark.parametrize(
    "answer",
    ["masks/a.png", "{}", "[1]", "{", '{"rle": {"size": [1, 1], "counts": [0, 1]}}', '{"rle": {"counts": "xyz"}}'],
)
def test_what_is_no_mask_is_no_mask(questions: list[Question], answer: str) -> None:
    document = as_document(of_task(questions, "grounding")[0])
    assert phantoms.prediction_of(document, f"<SEG><mask>{answer}</mask>").masks == []
    assert phantoms.score_masks(document, [f"<SEG><mask>{answer}</mask>"])["mDice"]["score"] == 0.0


def test_boxes_of_other_models_count_as_masks(questions: list[Question]) -> None:
    question = next(q for q in of_task(questions, "grounding") if len(q.masks or ()) == 1)
    document, (path,) = as_document(question), question.masks or ()
    wanted = read_mask(path)
    rows, columns = np.nonzero(wanted)
    box = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
    items = phantoms.score_masks(document, [f'```json\n[{{"bbox_2d": {box}, "label": "it"}}]\n```'])
    assert items[phantoms.BOX_METRIC]["score"] == 1.0
    inside = wanted.sum() / ((box[2] - box[0]) * (box[3] - box[1]))
    assert items["mIoU"]["score"] == pytest.approx(inside)
    nothing = phantoms.score_masks(document, ["[9999, 9999, 10000, 10000] and (5, 5, 1, 1)"])
    assert nothing["mIoU"]["score"] == nothing[phantoms.BOX_METRIC]["score"] == 0.0


def test_scores_equal_those_of_the_project(engine: Engine, questions: list[Question]) -> None:
    for task, names in (
        ("vqa", phantoms.TEXT_METRICS),
        ("region", phantoms.TEXT_METRICS),
        ("grounding", phantoms.MASK_METRICS),
    ):
        asked = of_task(questions, task)[::4]
        answers = answers_to(engine, asked)
        rows = [as_document(question) for question in asked]
        score = phantoms.score_masks if task == "grounding" else phantoms.score_text
        found: dict[str, list[Any]] = {}
        for row, answer in zip(rows, answers, strict=True):
            for name, item in score(row, [text_with_masks(answer)]).items():
                found.setdefault(name, []).append(json.loads(json.dumps(item)))
        texts = [text_with_masks(answer) for answer in answers]
        overall = score_predictions(map(phantoms.prediction_of, rows, texts), samples=0).overall
        expected = {name: measure.value for name, measure in overall.items() if name in names and measure.count}
        assert expected and {name: phantoms.total(items) for name, items in found.items() if name in names} == expected


# --- documents ------------------------------------------------------------------------------------------------------


def test_regions_are_pointed_at_for_us_and_drawn_for_others(questions: list[Question]) -> None:
    document = as_document(of_task(questions, "region")[0])
    assert phantoms.visuals(document, {"native": True}) == [document["image"], PointedRegion(document["regions"][0])]
    assert "<region></region>" in phantoms.asked(document, {"native": True})
    (drawn,) = phantoms.visuals(document)
    plain, region = read_image(document["image"]).pixels, read_mask(document["regions"][0])
    changed = (np.asarray(drawn) != plain).any(axis=-1)
    assert changed.any() and set(map(tuple, np.asarray(drawn)[changed])) == {(0, 255, 0)}
    rows, columns = np.nonzero(changed)
    inside_rows, inside_columns = np.nonzero(region)
    assert abs(rows.min() - inside_rows.min()) <= 2 and abs(columns.max() - inside_columns.max()) <= 2
    asked = phantoms.asked(document, {"pre_prompt": "Look. ", "post_prompt": " ({width}x{height})"})
    assert asked.startswith("Look. ") and "outlined in green" in asked
    assert asked.endswith(f"({plain.shape[1]}x{plain.shape[0]})")


def test_what_cannot_be_asked_is_named(tmp_path: Path) -> None:
    record = {"id": "a", "image": "gone.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}] * 2}
    (question, *_) = questions_of(record, 3, tmp_path)
    with pytest.raises(MedPLIBError, match=r"record 3 \(a\).*gone\.png"):
        phantoms.document_of(question, tmp_path / "x.json")


def read_task(path: Path) -> dict[str, Any]:
    """A task file with what it includes; functions as their dotted names."""
    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_constructor("!function", lambda reader, node: reader.construct_scalar(node))  # type: ignore[attr-defined]
    values = yaml.load(path.read_text(encoding="utf-8"), loader)
    included = values.pop("include", None)
    return {**(read_task(path.parent / included) if included else {}), **values}


def test_task_files_name_functions_and_metrics_that_are_there() -> None:
    tasks = {path.stem: read_task(path) for path in package.TASKS.glob("*.yaml")}
    parts = tasks.pop("medplib_phantoms")["task"]
    assert set(parts) < set(tasks)
    for name, task in tasks.items():
        assert task["task"] == name
        functions = [
            task[key] for key in ("process_docs", "doc_to_visual", "doc_to_text", "process_results") if key in task
        ]
        functions += [metric["aggregation"] for metric in task["metric_list"] if "." in metric["aggregation"]]
        for function in functions:
            module, attribute = function.rsplit(".", 1)
            assert callable(getattr(importlib.import_module(module), attribute))
        listed = [metric["metric"] for metric in task["metric_list"]]
        if task.get("process_results", "").endswith("score_text"):
            assert tuple(listed) == phantoms.TEXT_METRICS
        elif task.get("process_results", "").endswith("score_masks"):
            assert tuple(listed) == (*phantoms.MASK_METRICS, phantoms.BOX_METRIC)
    for name in parts:
        assert tasks[name]["lmms_eval_specific_kwargs"][package.MODEL_NAME] == {"native": True}
