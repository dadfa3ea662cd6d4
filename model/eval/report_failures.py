"""Answers that went wrong, by kind, with a few examples of each kept while rows stream past."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from model.eval.predictions import Prediction

EXAMPLES = 4
"""Kept of each kind."""

FAR_OFF = 0.1
"""A mask whose Dice is below this lies elsewhere."""


@dataclass(frozen=True)
class RowScore:
    """What one answer scored, as far as it applies.

    Attributes:
        right: of a closed question: the answer is the reference.
        recall: of an open question: share of the reference's words in the answer.
        dice: of a question with present targets: mean over them.
        iou: the same as intersection over union.
        predicted_iou: mean of the scores that the model gave its masks.
    """

    right: bool | None = None
    recall: float | None = None
    dice: float | None = None
    iou: float | None = None
    predicted_iou: float | None = None


@dataclass(frozen=True)
class FailureKind:
    """One way to fail: of which questions it is a failure, and of which of these it happened."""

    name: str
    title: str
    meaning: str
    concerns: Callable[[Prediction, RowScore], bool]
    happened: Callable[[Prediction, RowScore], bool]


@dataclass
class Failures:
    """Answers of one kind of failure.

    Attributes:
        kind: what went wrong.
        asked: questions that could have failed so.
        count: questions that did.
        examples: some of those, drawn evenly from all, in the order of the file.
    """

    kind: FailureKind
    asked: int = 0
    count: int = 0
    examples: list[tuple[int, Prediction, RowScore]] = field(default_factory=list)


def _always(_row: Prediction, _score: RowScore) -> bool:
    return True


def _answered(row: Prediction, _score: RowScore) -> bool:
    return not row.failed


KINDS = (
    FailureKind(
        "errors",
        "Questions that could not be asked",
        "The image or the record could not be used.",
        _always,
        lambda row, _: row.failed,
    ),
    FailureKind(
        "wrong_closed",
        "Wrong closed answers",
        "The answer is not the reference, case and punctuation aside.",
        lambda row, score: not row.failed and score.right is not None,
        lambda _, score: not score.right,
    ),
    FailureKind(
        "unrelated_open",
        "Open answers without a right word",
        "No word of the reference is in the answer.",
        lambda row, score: not row.failed and score.recall is not None,
        lambda _, score: score.recall == 0,
    ),
    FailureKind(
        "refused",
        "Present targets without a mask",
        "The image holds what was asked for and the answer painted nothing.",
        lambda row, _: not row.failed and bool(row.gt_masks),
        lambda row, _: not row.masks,
    ),
    FailureKind(
        "far_off",
        "Masks that lie elsewhere",
        f"A mask was painted and its Dice with the reference is below {FAR_OFF}.",
        lambda row, score: not row.failed and bool(row.gt_masks) and bool(row.masks) and score.dice is not None,
        lambda _, score: score.dice is not None and score.dice < FAR_OFF,
    ),
    FailureKind(
        "false_masks",
        "False masks",
        "The image does not hold what was asked for and the answer painted it.",
        lambda row, _: not row.failed and row.gt_masks == [],
        lambda row, _: bool(row.masks),
    ),
    FailureKind("empty", "Empty answers", "The model said nothing.", _answered, lambda row, _: not row.text.strip()),
    FailureKind(
        "cut_off",
        "Answers that did not end",
        "The longest length was reached before the answer's end.",
        _answered,
        lambda row, _: row.finish == "length",
    ),
)


class FailureCounter:
    """Counts failures as rows pass, and keeps a fair draw of examples of each kind, the same in every run."""

    def __init__(self, examples: int = EXAMPLES, seed: int = 0) -> None:
        self._found = [Failures(kind) for kind in KINDS]
        self._most = examples
        self._chance = random.Random(seed)

    def add(self, index: int, row: Prediction, score: RowScore) -> None:
        """Look at one answer; ``index`` is its place in the file."""
        for failures in self._found:
            if not failures.kind.concerns(row, score):
                continue
            failures.asked += 1
            if not failures.kind.happened(row, score):
                continue
            failures.count += 1
            if len(failures.examples) < self._most:
                failures.examples.append((index, row, score))
            elif (place := self._chance.randrange(failures.count)) < self._most:
                failures.examples[place] = (index, row, score)

    def found(self) -> list[Failures]:
        """Every kind that concerned a question, its examples in the order of the file."""
        for failures in self._found:
            failures.examples.sort(key=lambda example: example[0])
        return [failures for failures in self._found if failures.asked]
