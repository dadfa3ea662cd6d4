"""Questions about phantoms: true, balanced, and not to be guessed without the picture."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np
import pytest

from model.data.builders.blind import blind_baseline
from model.data.builders.phantom import PhantomStream, record_of
from model.data.builders.phantom_questions import Question
from model.data.builders.phantom_scenes import CLASS_NAMES, Scene

TRAINING, HELD_OUT = 1000, 500
CLOSED = {"modality", "presence", "side", "relation", "region_check", "region_side"}

Case = tuple[Scene, list[Question]]


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """Many tiny scenes with their questions: the questions do not depend on how finely a scene is drawn."""
    stream = PhantomStream(21, size=64)
    return [stream.item(index) for index in range(TRAINING + HELD_OUT)]


def _records(cases: list[Case]) -> list[dict[str, Any]]:
    return [
        record_of(question, str(index), "images/x.png", scene.modality, "masks/{}.png".format)
        for index, (scene, questions) in enumerate(cases)
        for question in questions
    ]


def test_no_kind_can_be_answered_blind(cases: list[Case]) -> None:
    accuracy = blind_baseline(_records(cases[:TRAINING]), _records(cases[TRAINING:]))
    assert set(accuracy) >= {*CLOSED, "region_name", "list", "place", "finding"}
    assert max(accuracy.values()) <= 0.6, accuracy


def test_blind_baseline_sees_a_leak() -> None:
    """A set whose answer follows from the question is found out, one of coin flips is not."""
    rng = np.random.default_rng(0)

    def record(question: str, answer: str) -> dict[str, Any]:
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        return {"kind": question[0], "task": "vqa", "about": "", "conversations": turns}

    leaky = [record(f"a{n % 2} <region>masks/{n}.png</region>", ("Yes", "No")[n % 2]) for n in range(100)]
    fair = [record("b", ("Yes", "No")[int(rng.integers(2))]) for _ in range(400)]
    accuracy = blind_baseline(leaky + fair[:200], leaky + fair[200:])
    assert accuracy["a"] == 1.0
    assert accuracy["b"] < 0.6


def test_presence_questions_are_true_balanced_and_hard(cases: list[Case]) -> None:
    answers: Counter[str] = Counter()
    for scene, questions in cases:
        for question in (one for one in questions if one.kind in {"presence"}):
            assert (question.about in scene.present) == (question.answer == "Yes")
            answers[question.answer] += 1
            answers["other modality"] += question.about not in scene.plan.structures
    assert answers["Yes"] == answers["No"] > 500
    assert 0.15 * answers["No"] < answers["other modality"] < 0.35 * answers["No"]


@pytest.mark.parametrize("kind", ["presence", "region_check"])
def test_no_name_gives_its_yes_or_no_away(cases: list[Case], kind: str) -> None:
    yes: dict[str, list[bool]] = {}
    for _, questions in cases:
        for question in (one for one in questions if one.kind == kind):
            yes.setdefault(question.about, []).append(question.answer == "Yes")
    assert all(0.35 < np.mean(answers) < 0.65 for answers in yes.values()), {k: np.mean(v) for k, v in yes.items()}


def test_sides_are_true(cases: list[Case]) -> None:
    checked = 0
    for scene, questions in cases[:300]:
        for question in questions:
            if question.kind in {"side", "region_side"}:
                x, y = scene.structure(question.about).centre
                expected = {"Left": x < 0.5, "Right": x > 0.5, "Upper": y < 0.5, "Lower": y > 0.5}
                assert expected[question.answer]
                assert question.answer.lower() in question.question
                checked += 1
    assert checked > 200


def test_relations_are_true(cases: list[Case]) -> None:
    checked = 0
    for scene, questions in cases[:300]:
        for question in (one for one in questions if one.kind == "relation"):
            named = [name for name in scene.present if re.search(rf"\b{name}\b", question.question)]
            (other,) = [name for name in named if name != question.about]
            (x, y), (other_x, other_y) = scene.structure(question.about).centre, scene.structure(other).centre
            expected = {"Left": x < other_x, "Right": x > other_x, "Above": y < other_y, "Below": y > other_y}
            assert expected[question.answer]
            checked += 1
    assert checked > 100


def test_modality_is_not_in_the_question_that_asks_for_it(cases: list[Case]) -> None:
    for scene, questions in cases[:100]:
        (question,) = [one for one in questions if one.kind == "modality"]
        assert question.answer.lower() == scene.plan.spoken.lower()
        assert question.answer.lower() not in re.findall(r"[\w-]+", question.question.lower())


def test_grounding_writes_the_name_before_the_marker(cases: list[Case]) -> None:
    kinds: Counter[str] = Counter()
    for scene, questions in cases:
        for question in (one for one in questions if one.task == "grounding"):
            kinds[question.kind] += 1
            assert question.answer.count("<SEG>") == len(question.targets)
            pieces = question.answer.split("<SEG>")
            for name, before in zip(question.targets, pieces, strict=False):
                assert name in before
                assert name in scene.present
            if question.kind == "grounding_absent":
                assert question.about not in scene.present
                assert question.about in question.answer
                kinds["other modality"] += question.about not in scene.plan.structures
    assert 0.2 < kinds["other modality"] / kinds["grounding_absent"] < 0.45
    absent = kinds["grounding_absent"] / (sum(kinds.values()) - kinds["other modality"])
    assert 0.2 <= absent <= 0.3
    assert kinds["grounding_pair"] > 100


def test_every_kind_is_asked_in_several_ways(cases: list[Case]) -> None:
    wordings: dict[str, set[str]] = {}
    names = "|".join(sorted(CLASS_NAMES[1:], key=len, reverse=True))
    for _, questions in cases[:400]:
        for question in questions:
            bare = re.sub(rf"\b({names}|left|right|upper|lower|above|below|of|an?)\b", "", question.question)
            wordings.setdefault(question.kind, set()).add(bare)
    assert all(len(found) >= 4 for found in wordings.values()), {kind: len(found) for kind, found in wordings.items()}


def test_published_markup_names_the_files() -> None:
    two = Question("grounding_pair", "grounding", "Both?", "A <SEG> and b <SEG>.", "open", "a", (), ("a", "b"))
    region = Question("region_name", "region", "What is <region></region>?", "A", "open", "a", ("a",))
    assert two.published("masks/{}.png".format)[1] == (
        "A <SEG> and b <SEG>.<mask>masks/a.png</mask><mask>masks/b.png</mask>"
    )
    assert region.published("masks/{}.png".format)[0] == "What is <region>masks/a.png</region>?"
