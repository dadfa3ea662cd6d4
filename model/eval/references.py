"""What a data file asks and what it takes for right, read from raw records without touching any other file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from model.data.schema import canonical, with_seg_spelled
from model.processing.special_tokens import IMAGE_TOKEN, REGION_MARKER

Turns = Literal["all", "first"]

_REGION_PATH = re.compile(r"<region>.*?</region>", re.DOTALL)
_MASK_PATH = re.compile(r"<mask>.*?</mask>", re.DOTALL)


@dataclass(frozen=True)
class Reference:
    """One question of a record and its reference answer.

    Attributes:
        question_id: the record's own id, as it stands there; its number in the file, from 0, where it has none.
        turn: which question of the conversation, from 0.
        prompt: the question, ``<region></region>`` where it points, without paths and ``<image>``.
        gt: the answer, ``<SEG>`` where it segments, without paths.
    """

    question_id: str | int
    turn: int
    prompt: str
    gt: str

    @property
    def key(self) -> tuple[str, int]:
        """See ``Prediction.key``."""
        return str(self.question_id), self.turn


def references_of(record: Mapping[str, Any], number: int, turns: Turns = "all") -> Iterator[Reference]:
    """The questions of one raw record in their order; one with empty texts where the record holds none.

    Args:
        record: of the published layout (reference §8).
        number: of the record in its file, from 0.
        turns: ``all`` questions of a conversation, or the ``first`` alone.
    """
    question_id = question_id_of(record, number)
    conversation = _conversation(record)
    count = max(1, (len(conversation) + 1) // 2) if turns == "all" else 1
    for turn in range(count):
        question, answer = ([*conversation[2 * turn : 2 * turn + 2], "", ""])[:2]
        yield Reference(question_id, turn, asked_text(question), answer_text(answer))


def question_id_of(record: Mapping[str, Any], number: int) -> str | int:
    """The record's own id, text or whole number; its number in the file where it has none."""
    for name in ("id", "question_id"):
        value = record.get(name) if isinstance(record, Mapping) else None
        if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
            return value
    return number


def asked_text(question: str) -> str:
    """A question of a record as it is asked: region paths and ``<image>`` markers are gone."""
    return _REGION_PATH.sub(REGION_MARKER, question).replace(IMAGE_TOKEN, "").strip()


def answer_text(answer: str) -> str:
    """An answer of a record without mask paths."""
    return _MASK_PATH.sub("", answer)


def _conversation(record: Mapping[str, Any]) -> list[str]:
    """Texts of the turns, questions at even places; empty where the record is malformed."""
    found = canonical(record).get("conversations") if isinstance(record, Mapping) else None
    if not isinstance(found, list | tuple) or not all(isinstance(entry, Mapping) for entry in found):
        return []
    texts = [entry.get("value") if isinstance(entry.get("value"), str) else "" for entry in found]
    return [with_seg_spelled(text) if place % 2 else text for place, text in enumerate(texts)]
