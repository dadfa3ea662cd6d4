"""MedPLIB in lmms-eval, the model: likelihoods, the adapter, and, where the harness is installed, runs through it.

Where it is not, its base class and its result types are replaced by stand-ins of the same shape.
"""

from __future__ import annotations

import importlib
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
from PIL import Image

import model.eval.lmms as package
from model.data.image_io import read_mask
from model.errors import MedPLIBError
from model.eval.lmms import adapter, phantoms
from model.eval.lmms.adapter import Visuals, score_continuations
from model.eval.lmms.phantoms import text_with_masks
from model.eval.metrics.scores import score_predictions
from model.eval.questions import Question
from model.inference.engine import Engine
from model.modeling.configuration import IGNORE_INDEX
from model.processing.conversation import Turn
from model.processing.special_tokens import EOS_TOKEN, IMAGE_TOKEN
from tests.eval.phantom_questions import NANO, answers_to, as_document, held_out_questions, of_task, request_of
from tests.tiny import tiny_checkpoint

INSTALLED = find_spec("lmms_eval") is not None
needs_harness = pytest.mark.skipif(not INSTALLED, reason="lmms-eval is not installed")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained(NANO)


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return held_out_questions()


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


def test_experts_that_drop_tokens_read_an_answer_as_they_would_speak_it(tmp_path: Path) -> None:
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
        "lmms_eval.api.model": {"lmms": _Model},
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
    patch = pytest.MonkeyPatch()
    if not INSTALLED:
        for name, module in stand_ins().items():
            patch.setitem(sys.modules, name, module)
        importlib.reload(adapter)
    yield adapter.MedPLIB(pretrained=str(NANO), device="cpu", batch_size=1, max_batch_size=None)
    patch.undo()
    if not INSTALLED:
        importlib.reload(adapter)


@dataclass
class Asked:
    """A request as the harness makes it."""

    args: tuple[Any, ...]
    metadata: dict[str, Any] = field(default_factory=dict)


def ask(lm: Any, rows: list[dict[str, Any]], native: bool = True, **generation: Any) -> list[Asked]:
    lm.task_dict["t"] = {"test": rows}
    chosen = {"native": native}
    return [
        Asked((phantoms.asked(row, chosen), generation, lambda row: phantoms.visuals(row, chosen), number, "t", "test"))
        for number, row in enumerate(rows)
    ]


def test_adapter_answers_as_the_engine_does(medplib: Any, engine: Engine, questions: list[Question]) -> None:
    asked = questions[::12]
    requests = ask(medplib, [as_document(question) for question in asked], until=[])
    requests.insert(1, Asked(requests[0].args, {"__padding_only__": True}))
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


def test_adapter_tells_the_harness_what_it_asks(medplib: Any) -> None:
    assert medplib.device.type == "cpu"
    assert medplib.batch_size == 8
    with pytest.raises(MedPLIBError, match="apply_chat_template"):
        _ = medplib.chat_template


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

    MODEL_REGISTRY_V2.register_manifest(package.manifest(), overwrite=True)

    def run(model: Any, tasks: list[str], name: str = "medplib", **options: Any) -> dict[str, Any]:
        manager = TaskManager(include_path=[str(package.TASKS)], include_defaults=False, model_name=name)
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
        rows = [
            phantoms.prediction_of(as_document(question), text) for question, text in zip(asked, texts, strict=True)
        ]
        expected = {name: one.value for name, one in score_predictions(rows, samples=0).overall.items()}
        found = run["results"][f"medplib_phantoms_{task}"]
        names = phantoms.MASK_METRICS if task == "grounding" else phantoms.TEXT_METRICS
        assert {name: found[f"{name},none"] for name in names if f"{name},none" in found} == pytest.approx(
            {name: expected[name] for name in names if name in expected}
        )
        assert run["n-samples"][f"medplib_phantoms_{task}"]["effective"] == len(asked)
    closed = run["results"]["medplib_phantoms_vqa"]["closed_accuracy,none"]
    assert run["results"]["medplib_phantoms_choice"]["acc,none"] == pytest.approx(closed, abs=0.1)


@needs_harness
def test_any_other_model_can_be_asked(evaluate: Callable[..., dict[str, Any]]) -> None:
    from lmms_eval.api.model import lmms

    seen: list[tuple[str, Any]] = []

    class Boxer(lmms):
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
