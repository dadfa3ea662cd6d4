"""Questions about the sample's held-out pictures, and the shipped nano's answers to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from model.data.records import open_records
from model.eval import lmms
from model.eval.questions import Question, questions_of
from model.inference.answer import Answer
from model.inference.engine import Engine, Request
from tests.conftest import ROOT

NANO, SAMPLE = ROOT / "assets" / "medplib-nano", ROOT / "data" / "sample"
RECORDS: list[dict[str, Any]] = json.loads((SAMPLE / "held_out.json").read_text())


def held_out_questions() -> list[Question]:
    """All of them, in the order of their file."""
    records = open_records(SAMPLE / "held_out.json")
    return [question for number, record in enumerate(records) for question in questions_of(record, number, SAMPLE)]


def of_task(questions: list[Question], task: str) -> list[Question]:
    """Those of one task."""
    return [question for question in questions if question.metadata["task"] == task]


def as_document(question: Question) -> dict[str, Any]:
    """A question as the row of a harness's task."""
    return lmms.document_of(question, SAMPLE / "held_out.json")


def request_of(question: Question) -> Request:
    """What MedPLIB is asked."""
    return Request(str(question.image), question.reference.prompt, tuple(map(str, question.regions)))


def answers_to(engine: Engine, asked: list[Question]) -> list[Answer]:
    """What the engine says, whoever asks it."""
    found = dict(engine.answer_all(request_of(question) for question in asked))
    return [answer for _, answer in sorted(found.items()) if isinstance(answer, Answer)]


def without_timing(path: Path) -> list[dict[str, Any]]:
    """The rows of a predictions file, which differ in nothing else between runs."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        del row["timing"]
    return rows
