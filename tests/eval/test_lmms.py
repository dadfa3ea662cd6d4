"""MedPLIB in lmms-eval: the command, settings, documents, scores, likelihoods, the model, and runs of the harness.

Where the harness is not installed, its base class and its result types are replaced by stand-ins of the same shape.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from model.data.image_io import read_image, read_mask
from model.errors import MedPLIBError
from model.eval import lmms
from model.eval.lmms import (
    ModelArguments,
    PointedRegion,
    Visuals,
    lmms_eval_arguments,
    own_device,
    read_generation,
    read_model_arguments,
    read_visuals,
    score_continuations,
    text_with_masks,
)
from model.eval.metrics.scores import score_predictions
from model.eval.questions import Question, questions_of
from model.inference.answer import Answer, Mask
from model.inference.engine import Engine
from model.modeling.configuration import IGNORE_INDEX
from model.processing.conversation import Turn
from model.processing.special_tokens import EOS_TOKEN, IMAGE_TOKEN
from tests.eval.phantom_questions import NANO, answers_to, as_document, of_task, request_of
from tests.tiny import tiny_checkpoint

INSTALLED = find_spec("lmms_eval") is not None
needs_harness = pytest.mark.skipif(not INSTALLED, reason="lmms-eval is not installed")


# --- without the harness --------------------------------------------------------------------------------------------


def test_use_without_the_right_harness_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lmms, "find_spec", lambda name: None)
    for use in (lmms.manifest, lambda: lmms.MedPLIB(pretrained=str(NANO))):
        with pytest.raises(MedPLIBError, match="lmms-eval is not installed"):
            use()
    assert lmms.main(["--tasks", "medplib_phantoms"]) == 2
    assert capsys.readouterr().err.startswith("error: lmms-eval is not installed")
    monkeypatch.setattr(lmms, "find_spec", lambda name: object())
    for found, fits in (("0.7", True), ("0.7.3", True), ("0.6.1", False), ("0.70", False), ("1.0", False)):
        monkeypatch.setattr(lmms, "version", lambda name, found=found: found)
        if fits:
            lmms.require_lmms_eval()
        else:
            with pytest.raises(MedPLIBError, match=f"version {found}, MedPLIB speaks 0.7"):
                lmms.require_lmms_eval()


def test_command_puts_model_and_tasks_in(tmp_path: Path) -> None:
    command, data = lmms_eval_arguments(["--tasks", "t", f"--data={tmp_path}", "--limit", "3"])
    assert command == ["--tasks", "t", "--limit", "3", "--model", "medplib", "--include_path", str(lmms.TASKS)]
    assert data == str(tmp_path)
    assert lmms_eval_arguments(["--model=dummy"]) == (["--model=dummy", "--include_path", str(lmms.TASKS)], None)
    for wrong in (["--data", str(tmp_path / "absent")], ["--data"], ["--include_path", "x"]):
        with pytest.raises(MedPLIBError):
            lmms_eval_arguments(wrong)


def test_model_arguments_are_all_used() -> None:
    given = {"pretrained": "runs/7", "device": "cpu", "dtype": "bfloat16", "slots": 3, "batch_size": 1, "seed": 7}
    given |= {"max_batch_size": None, "max_length": 500, "threshold": 0.1, "max_new_tokens": 9}
    read = read_model_arguments(given)
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


def test_visuals_are_one_image_and_its_regions() -> None:
    image = Image.new("RGB", (4, 4))
    assert read_visuals(None) == read_visuals([]) == Visuals(None)
    assert read_visuals([image, PointedRegion("a.png")]) == Visuals(image, ("a.png",))
    for wrong in ([image, image], [{"array": 1}]):
        with pytest.raises(MedPLIBError):
            read_visuals(wrong)


# --- answers --------------------------------------------------------------------------------------------------------


def test_masks_survive_as_text(questions: list[Question]) -> None:
    document = as_document(of_task(questions, "grounding")[0])
    shape = read_image(document["image"]).size
    arrays = [np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)]
    arrays[0][3:9, 4:22] = True
    masks = [Mask.from_array(array, label, 0.5) for array, label in zip(arrays, ('a</mask>"<', ""), strict=True)]
    text = text_with_masks(Answer("The liver is <SEG> and <SEG>.", masks))
    found = lmms.prediction_of(document, f"  {text}\n")
    assert found.text == "The liver is <SEG> and <SEG>."
    assert found.masks == [mask.to_dict() for mask in masks]


@pytest.mark.parametrize(
    "answer",
    ["masks/a.png", "{}", "[1]", "{", '{"rle": {"size": [1, 1], "counts": [0, 1]}}', '{"rle": {"counts": "xyz"}}'],
)
def test_what_is_no_mask_is_no_mask(questions: list[Question], answer: str) -> None:
    document = as_document(of_task(questions, "grounding")[0])
    assert lmms.prediction_of(document, f"<SEG><mask>{answer}</mask>").masks == []
    assert lmms.score_masks(document, [f"<SEG><mask>{answer}</mask>"])["mDice"]["score"] == 0.0


def test_boxes_of_other_models_count_as_masks(questions: list[Question]) -> None:
    question = next(q for q in of_task(questions, "grounding") if len(q.masks or ()) == 1)
    document, (path,) = as_document(question), question.masks or ()
    wanted = read_mask(path)
    rows, columns = np.nonzero(wanted)
    box = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
    items = lmms.score_masks(document, [f'```json\n[{{"bbox_2d": {box}, "label": "it"}}]\n```'])
    assert items[lmms.BOX_METRIC]["score"] == 1.0
    inside = wanted.sum() / ((box[2] - box[0]) * (box[3] - box[1]))
    assert items["mIoU"]["score"] == pytest.approx(inside)
    nothing = lmms.score_masks(document, ["[9999, 9999, 10000, 10000] and (5, 5, 1, 1)"])
    assert nothing["mIoU"]["score"] == nothing[lmms.BOX_METRIC]["score"] == 0.0


def test_scores_equal_those_of_the_project(engine: Engine, questions: list[Question]) -> None:
    for task, names in (("vqa", lmms.TEXT_METRICS), ("region", lmms.TEXT_METRICS), ("grounding", lmms.MASK_METRICS)):
        asked = of_task(questions, task)[::4]
        answers = answers_to(engine, asked)
        rows = [as_document(question) for question in asked]
        score = lmms.score_masks if task == "grounding" else lmms.score_text
        found: dict[str, list[Any]] = {}
        for row, answer in zip(rows, answers, strict=True):
            for name, item in score(row, [text_with_masks(answer)]).items():
                found.setdefault(name, []).append(json.loads(json.dumps(item)))
        texts = [text_with_masks(answer) for answer in answers]
        overall = score_predictions(map(lmms.prediction_of, rows, texts), samples=0).overall
        expected = {name: measure.value for name, measure in overall.items() if name in names and measure.count}
        assert expected and {name: lmms.total(items) for name, items in found.items() if name in names} == expected


# --- documents ------------------------------------------------------------------------------------------------------


def test_regions_are_pointed_at_for_us_and_drawn_for_others(questions: list[Question]) -> None:
    document = as_document(of_task(questions, "region")[0])
    assert lmms.visuals(document, {"native": True}) == [document["image"], PointedRegion(document["regions"][0])]
    assert "<region></region>" in lmms.asked(document, {"native": True})
    (drawn,) = lmms.visuals(document)
    plain, region = read_image(document["image"]).pixels, read_mask(document["regions"][0])
    changed = (np.asarray(drawn) != plain).any(axis=-1)
    assert changed.any() and set(map(tuple, np.asarray(drawn)[changed])) == {(0, 255, 0)}
    rows, columns = np.nonzero(changed)
    inside_rows, inside_columns = np.nonzero(region)
    assert abs(rows.min() - inside_rows.min()) <= 2 and abs(columns.max() - inside_columns.max()) <= 2
    asked = lmms.asked(document, {"pre_prompt": "Look. ", "post_prompt": " ({width}x{height})"})
    assert asked.startswith("Look. ") and "outlined in green" in asked
    assert asked.endswith(f"({plain.shape[1]}x{plain.shape[0]})")


def test_what_cannot_be_asked_is_named(tmp_path: Path) -> None:
    record = {"id": "a", "image": "gone.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}] * 2}
    (question, *_) = questions_of(record, 3, tmp_path)
    with pytest.raises(MedPLIBError, match=r"record 3 \(a\).*gone\.png"):
        lmms.document_of(question, tmp_path / "x.json")


def read_task(path: Path) -> dict[str, Any]:
    """A task file with what it includes; functions as their dotted names."""
    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_constructor("!function", lambda reader, node: reader.construct_scalar(node))  # type: ignore[attr-defined]
    values = yaml.load(path.read_text(encoding="utf-8"), loader)
    included = values.pop("include", None)
    return {**(read_task(path.parent / included) if included else {}), **values}


def test_task_files_name_functions_and_metrics_that_are_there() -> None:
    tasks = {path.stem: read_task(path) for path in lmms.TASKS.glob("*.yaml")}
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
            assert tuple(listed) == lmms.TEXT_METRICS
        elif task.get("process_results", "").endswith("score_masks"):
            assert tuple(listed) == (*lmms.MASK_METRICS, lmms.BOX_METRIC)
    for name in parts:
        assert tasks[name]["lmms_eval_specific_kwargs"][lmms.MODEL_NAME] == {"native": True}


# --- likelihoods ----------------------------------------------------------------------------------------------------


def teacher_forced(engine: Engine, visuals: Visuals, context: str, continuation: str) -> tuple[float, bool]:
    """The plain way: one pass of the whole network over prompt and answer."""
    images = [engine.prepare(visuals.image).data.pixels] if visuals.image is not None else []
    regions = [read_mask(path) for path in visuals.regions]
    turns = [Turn("human", f"{IMAGE_TOKEN}\n{context}" if images else context), Turn("gpt", continuation)]
    sample = engine.processor.encode(turns, images, regions)
    batch = engine.processor.collate([sample])
    labels = batch.pop("labels")
    keep = ("input_ids", "attention_mask", "pixel_values", "region_masks", "region_image")
    with torch.inference_mode():
        output = engine.model(**{name: batch[name] for name in keep})
    logits = output.logits[0].float()
    answer = [int(token) for token in labels[0] if token != IGNORE_INDEX]
    assert answer[-1] == engine.processor.tokenizer.convert_tokens_to_ids(EOS_TOKEN)
    answer = answer[:-1]
    begin = len(logits) - len(answer) - 2  # the position that predicts the first of them; one </s> is at the end
    predicted = logits[begin : begin + len(answer)]
    chosen = predicted.log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)]
    return float(chosen.double().sum()), bool((predicted.argmax(-1) == torch.tensor(answer)).all())


def test_likelihoods_are_those_of_the_whole_pass(engine: Engine, questions: list[Question]) -> None:
    region = of_task(questions, "region")[0]
    vqa = of_task(questions, "vqa")[1]
    for question in (vqa, region):  # shown alone, and with a region
        visuals = Visuals(str(question.image), tuple(map(str, question.regions)))
        texts = [" Yes", "No", " The large vertebra, I think.", "Yes"]
        found = score_continuations(engine, visuals, question.reference.prompt, texts)
        for text, one in zip(texts, found, strict=True):
            expected, greedy = teacher_forced(engine, visuals, question.reference.prompt, text.strip())
            assert one.log_probability == pytest.approx(expected, abs=1e-3)
            assert one.greedy == greedy
        assert found[0].log_probability == found[3].log_probability
        assert found[2].tokens > found[0].tokens


def test_the_greedy_answer_is_called_greedy(engine: Engine, questions: list[Question]) -> None:
    for question in of_task(questions, "vqa")[:4]:
        answer = engine.ask(request_of(question)).text
        found = score_continuations(engine, Visuals(str(question.image)), question.reference.prompt, [answer, "Zebra"])
        assert [one.greedy for one in found] == [True, False]
        assert found[0].log_probability > found[1].log_probability


def test_text_alone_and_no_answer_have_likelihoods(engine: Engine) -> None:
    visuals = Visuals(None)
    one, empty = score_continuations(engine, visuals, "Hello?", ["Yes", ""])
    assert one.log_probability == pytest.approx(teacher_forced(engine, visuals, "Hello?", "Yes")[0], abs=1e-3)
    assert (empty.log_probability, empty.greedy, empty.tokens) == (0.0, True, 0)
    (alone,) = score_continuations(engine, visuals, "Hello?", [""])
    assert alone == empty


def test_too_long_an_answer_is_refused(engine: Engine) -> None:
    with pytest.raises(MedPLIBError, match="tokens"):
        score_continuations(engine, Visuals(None), "Hello?", ["yes " * 3000])


def test_experts_that_drop_tokens_score_token_by_token(tmp_path: Path) -> None:
    """What is read together fills the experts; an answer is spoken token by token, alone, and so it is scored."""
    moe = {"layers": (0, 1), "num_experts": (2, 2), "drop_in_evaluation": True, "eval_capacity_factor": 0.5}
    engine = Engine.from_pretrained(tiny_checkpoint(tmp_path, experts=0, moe={**moe, "min_capacity": 1}))
    image = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    texts = ["no kidney is in the left region", "yes", "there is a tumour"]
    together = score_continuations(engine, Visuals(image), "What is this?", texts)
    for text, one in zip(texts, together, strict=True):
        assert score_continuations(engine, Visuals(image), "What is this?", [text]) == [one]
    assert abs(together[0].log_probability - teacher_forced(engine, Visuals(image), "What is this?", texts[0])[0]) > 0.1


# --- the adapter ----------------------------------------------------------------------------------------------------


@dataclass
class _Result:
    text: Any
    token_counts: Any = None


@dataclass
class _Counts:
    output_tokens: int | None = None


class _Model:
    def __init__(self) -> None:
        self._rank, self._world_size, self.task_dict = 0, 1, {}

    def clean(self) -> None:
        pass


def stand_ins() -> dict[str, ModuleType]:
    """Modules with what the adapter takes from lmms-eval 0.7."""
    contents: dict[str, dict[str, Any]] = {
        "lmms_eval": {"__path__": []},
        "lmms_eval.api": {"__path__": []},
        "lmms_eval.api.instance": {"GenerationResult": _Result, "TokenCounts": _Counts},
    }
    modules = {}
    for name, values in contents.items():
        modules[name] = ModuleType(name)
        modules[name].__spec__ = ModuleSpec(name, None)
        modules[name].__dict__.update(values)
    return modules


@pytest.fixture(scope="module")
def medplib() -> Iterator[Any]:
    """The nano as a model of the harness, or of its stand-ins."""
    patch, kind = pytest.MonkeyPatch(), lmms.MedPLIB
    if not INSTALLED:
        kind = type("MedPLIB", (lmms.MedPLIB, _Model), {})
        for name, module in stand_ins().items():
            patch.setitem(sys.modules, name, module)
    yield kind(pretrained=str(NANO), device="cpu", batch_size=1, max_batch_size=None)
    patch.undo()


@dataclass
class Asked:
    """A request as the harness makes it."""

    args: tuple[Any, ...]
    metadata: dict[str, Any] = field(default_factory=dict)


def ask(lm: Any, rows: list[dict[str, Any]], native: bool = True, **generation: Any) -> list[Asked]:
    lm.task_dict["t"] = {"test": rows}
    chosen = {"native": native}
    return [
        Asked((lmms.asked(row, chosen), generation, lambda row: lmms.visuals(row, chosen), number, "t", "test"))
        for number, row in enumerate(rows)
    ]


def test_adapter_answers_as_the_engine_does(medplib: Any, engine: Engine, questions: list[Question]) -> None:
    asked = questions[::12]
    requests = ask(medplib, [as_document(question) for question in asked], until=[])
    requests.insert(1, Asked(requests[0].args, {"__padding_only__": True}))
    assert (medplib.device.type, medplib.batch_size) == ("cpu", 8)
    with pytest.raises(MedPLIBError, match="apply_chat_template"):
        _ = medplib.chat_template
    results = medplib.generate_until(requests)
    assert results.pop(1).text == ""
    alone = answers_to(engine, asked)
    assert [result.text for result in results] == [answer.text for answer in alone]
    assert [result.token_counts.output_tokens for result in results] == [answer.new_tokens for answer in alone]


def test_stop_texts_length_and_masks_are_honoured(medplib: Any, questions: list[Question]) -> None:
    rows = [as_document(next(q for q in of_task(questions, "grounding") if len(q.masks or ()) == 1))]
    (whole,) = medplib.generate_until(ask(medplib, rows, masks="rle"))
    assert whole.text.count("<SEG>") == whole.text.count("<mask>") == 1
    (plain,) = medplib.generate_until(ask(medplib, rows))
    assert plain.text == whole.text.split("<mask>")[0]
    word = plain.text.split()[1]
    (stopped,) = medplib.generate_until(ask(medplib, rows, until=[word]))
    assert stopped.text == plain.text.split(word)[0].strip()
    (short,) = medplib.generate_until(ask(medplib, rows, max_new_tokens=2))
    assert short.token_counts.output_tokens == 2


def test_repeated_requests_are_drawn_anew_and_repeatably(medplib: Any, questions: list[Question]) -> None:
    rows = [as_document(next(q for q in questions if q.metadata["kind"] == "list"))]
    (request,) = ask(medplib, rows, do_sample=True, temperature=2.0, max_new_tokens=12)
    first = [result.text for result in medplib.generate_until([request] * 4)]
    assert len(set(first)) > 1
    assert [result.text for result in medplib.generate_until([request] * 4)] == first


def test_unanswerable_requests_are_told_and_count_as_wrong(
    medplib: Any, questions: list[Question], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [as_document(question) for question in questions[:3]]
    rows[1] = {**rows[1], "image": "gone.png"}
    texts = [result.text for result in medplib.generate_until(ask(medplib, rows, odd_setting=1))]
    assert [bool(text) for text in texts] == [True, False, True]
    assert "gone.png" in caplog.text and "1 of 3 questions" in caplog.text and "odd_setting" in caplog.text
    with pytest.raises(MedPLIBError, match="none of the 1 questions"):
        medplib.generate_until(ask(medplib, rows[1:2]))
    textual = [Asked(("Hi", {}, lambda row: None, 0, "t", "test"))]
    with pytest.raises(MedPLIBError, match="no image"):
        medplib.generate_until(textual)
    with pytest.raises(MedPLIBError, match="generate_until"):
        medplib.generate_until_multi_round(textual)
    assert medplib.generate_until([]) == []


def test_choices_get_losses_and_targets_log_probabilities(
    medplib: Any, engine: Engine, questions: list[Question]
) -> None:
    question = of_task(questions, "vqa")[1]
    row = as_document(question)
    (request,) = ask(medplib, [row])
    context, _, *rest = request.args
    answers: list[Any] = [" Yes", " No", lambda row: row["answer"]]
    requests = [Asked((context, answer, *rest)) for answer in answers]
    requests.insert(1, Asked(requests[0].args, {"__padding_only__": True}))
    results = [result.text for result in medplib.loglikelihood(requests)]
    visuals = Visuals(str(question.image))
    expected = score_continuations(engine, visuals, row["question"], ["Yes", "No", row["answer"]])
    signs = (-1, -1, 1)
    assert [results[0], *results[2:]] == [
        (pytest.approx(sign * one.log_probability, abs=1e-3), one.greedy)
        for sign, one in zip(signs, expected, strict=True)
    ]
    best = min(range(2), key=lambda place: (results[0], results[2])[place][0])
    assert (" Yes", " No")[best].strip() == engine.ask(request_of(question)).text
    with pytest.raises(MedPLIBError, match=r"t test 0 cannot be scored"):
        medplib.loglikelihood(ask_broken(medplib, row))


def ask_broken(lm: Any, row: dict[str, Any]) -> list[Asked]:
    (request,) = ask(lm, [{**row, "image": "gone.png"}])
    return [Asked((request.args[0], " Yes", *request.args[2:]))]


# --- the harness itself ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., dict[str, Any]]]:
    """Run tasks through the harness's own evaluation, offline."""
    patch = pytest.MonkeyPatch()
    patch.delenv("MEDPLIB_DATA", raising=False)
    patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("home")))
    patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.tasks import TaskManager

    MODEL_REGISTRY_V2.register_manifest(lmms.manifest(), overwrite=True)

    def run(model: Any, tasks: list[str], name: str = "medplib", **options: Any) -> dict[str, Any]:
        manager = TaskManager(include_path=[str(lmms.TASKS)], include_defaults=False, model_name=name)
        return simple_evaluate(model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0, **options)

    yield run
    patch.undo()


@needs_harness
def test_the_harness_gives_the_projects_scores(
    evaluate: Callable[..., dict[str, Any]], engine: Engine, questions: list[Question]
) -> None:
    tasks = ["medplib_phantoms", "medplib_phantoms_choice"]
    run = evaluate("medplib", tasks, model_args=f"pretrained={NANO},slots=4", device="cpu")
    for task in ("vqa", "region", "grounding"):
        asked = of_task(questions, task)
        texts = [text_with_masks(answer) for answer in answers_to(engine, asked)]
        rows = [lmms.prediction_of(as_document(question), text) for question, text in zip(asked, texts, strict=True)]
        expected = {name: one.value for name, one in score_predictions(rows, samples=0).overall.items()}
        found = run["results"][f"medplib_phantoms_{task}"]
        names = lmms.MASK_METRICS if task == "grounding" else lmms.TEXT_METRICS
        assert {name: found[f"{name},none"] for name in names if f"{name},none" in found} == pytest.approx(
            {name: expected[name] for name in names if name in expected}
        )
        assert run["n-samples"][f"medplib_phantoms_{task}"]["effective"] == len(asked)
    closed = run["results"]["medplib_phantoms_vqa"]["closed_accuracy,none"]
    assert run["results"]["medplib_phantoms_choice"]["acc,none"] == pytest.approx(closed, abs=0.1)


@needs_harness
def test_any_other_model_can_be_asked(evaluate: Callable[..., dict[str, Any]]) -> None:
    from lmms_eval.api.model import lmms as Base

    seen: list[tuple[str, Any]] = []

    class Boxer(Base):
        """Sees the whole picture as every structure, and says yes to everything else."""

        def generate_until(self, requests: Any) -> list[str]:
            answers = []
            for request in requests:
                context, _, doc_to_visual, number, task, split = request.args
                (image,) = doc_to_visual(self.task_dict[task][split][number])
                seen.append((context, image))
                answers.append(f"[0, 0, {image.width}, {image.height}]" if "bounding box" in context else "Yes.")
            return answers

        def loglikelihood(self, requests: Any) -> Any:
            raise NotImplementedError

        def generate_until_multi_round(self, requests: Any) -> Any:
            raise NotImplementedError

    run = evaluate(Boxer(), ["medplib_phantoms"], name="boxer")
    assert all(isinstance(image, Image.Image) and "<region>" not in context for context, image in seen)
    grounding = run["results"]["medplib_phantoms_grounding"]
    assert 0 < grounding["mIoU,none"] <= grounding["box_mIoU,none"] < 1
    assert grounding["false_mask_rate,none"] == 1.0
    assert 0 < run["results"]["medplib_phantoms_vqa"]["closed_accuracy,none"] < 1
