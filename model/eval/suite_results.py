"""Answers of one data set → everything its report shows; the answers are streamed twice and never held."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from model.data.builders.blind import blind_baseline, position_prior_dice
from model.data.records import open_records
from model.data.schema import is_number
from model.errors import MedPLIBError
from model.eval.metrics.definitions import mark
from model.eval.metrics.scores import Scores, score_predictions
from model.eval.predictions import Prediction, read_predictions
from model.eval.report import plain_cell
from model.eval.report_data import BlindScores, SetResult, Shown
from model.eval.report_failures import FailureCounter, RowScore
from model.eval.report_pictures import regions_of
from model.eval.suite import DataSet

PICTURED = 4
"""Answers in each row of pictures."""

_MASK = re.compile(r"<mask>(.*?)</mask>")

ROW_COLUMNS = (
    *("set", "question_id", "turn", "task", "kind", "modality", "structure", "answer_type", "finish", "closed_right"),
    *("open_exact", "token_recall", "token_F1", "dice", "iou", "masks", "reference_masks", "predicted_iou"),
    *("new_tokens", "seconds", "image_path"),
)
"""Columns of ``rows.csv``; Dice and IoU are those of the first threshold."""


@dataclass
class _Kept:
    """What is kept of the answers as they pass."""

    failures: FailureCounter = field(default_factory=FailureCounter)
    pictured: dict[int, Shown] = field(default_factory=dict)
    predicted_iou: list[float] = field(default_factory=list)
    real_iou: list[float] = field(default_factory=list)
    router: dict[str, tuple[np.ndarray, int]] = field(default_factory=dict)


def measure(
    item: DataSet, answers: Path, questions: Path, images: Path, *, limit: int | None = None, samples: int = 1000
) -> tuple[SetResult, Iterator[list[object]]]:
    """Score the answers to a data set.

    Args:
        item: the data set.
        answers: its predictions.
        questions: the records that they answer, see ``write_questions``.
        images: folder that the records' paths start from.
        limit: so many records were asked, the first ones; None: all of them.
        samples: bootstrap resamplings behind each interval.

    Returns:
        What its report shows, and its lines of ``rows.csv``, which may be taken once.

    Raises:
        MedPLIBError: the predictions are damaged, or a file of the blind baselines is.
    """
    scores = score_predictions(
        read_predictions(answers), thresholds=item.thresholds, surface=item.surface, samples=samples
    )
    rows = RowScores(scores)
    places = {name: rows.places(name) for name in ("best", "middle", "worst")}
    wanted = {place for found in places.values() for place in found}
    kept = _Kept()
    for place, row in enumerate(read_predictions(answers)):
        _keep(kept, place, row, rows.of(place), wanted)
    failures = kept.failures.found()
    records = open_records(questions)
    shown = {row.key for found in failures for _, row, _ in found.examples}
    result = SetResult(
        item=item,
        scores=scores,
        images=images,
        dice=rows.dice[~np.isnan(rows.dice)],
        predicted_iou=np.asarray(kept.predicted_iou),
        real_iou=np.asarray(kept.real_iou),
        failures=failures,
        pictured={name: [kept.pictured[place] for place in found] for name, found in places.items() if found},
        router={task: total / count for task, (total, count) in kept.router.items()},
        blind=blind_scores(item, islice(records, limit), images, scores),
        regions=regions_of(records, images, shown),
    )
    return result, row_lines(item.name, answers, rows)


class RowScores:
    """What every answer scored, read from the columns of ``Scores``; masks at its first threshold."""

    def __init__(self, scores: Scores) -> None:
        self._scores = scores
        at = mark(scores.settings.thresholds[0])
        column = {name: scores.data[:, index] for index, name in enumerate(scores.columns)}
        self.closed = np.where(column["closed"] > 0, column["closed_hit"], np.nan)
        opened = column["open"] > 0
        self.exact, self.recall, self.f1 = (
            np.where(opened, column[name], np.nan) for name in ("exact", "recall", "f1")
        )
        count = column["mask"]
        self.dice, self.iou = (
            np.divide(column[f"{name}{at}"], count, out=np.full(len(count), np.nan), where=count > 0)
            for name in ("dice", "iou")
        )
        self._painted = (column["seg"] > 0) & (column["error"] == 0)
        self.clean = np.where(column["absent"] > 0, 1 - column[f"false_mask{at}"], np.nan)

    def column(self, what: str) -> np.ndarray:
        """Scores of all answers, float64 [N] in [0, 1], larger is better, NaN where one does not apply.

        Args:
            what: ``right`` (closed questions), ``exact`` (open ones), ``dice`` (present targets) or ``clean`` (absent
                targets left unpainted).
        """
        return {"right": self.closed, "exact": self.exact, "dice": self.dice, "clean": self.clean}[what]

    def of(self, place: int) -> RowScore:
        """Scores of one answer."""
        closed = self.closed[place]
        return RowScore(
            right=None if math.isnan(closed) else bool(closed),
            recall=_number(self.recall[place]),
            dice=_number(self.dice[place]),
            iou=_number(self.iou[place]),
        )

    def places(self, which: str) -> list[int]:
        """Places of the best, middle or worst answers that painted something, no two about one image."""
        painted = np.flatnonzero(~np.isnan(self.dice) & self._painted)
        ranked = painted[np.argsort(-self.dice[painted], kind="stable")]
        if len(ranked) < 3 * PICTURED:  # too few to tell best from worst: all of them, once
            return [int(place) for place in ranked[: 3 * PICTURED]] if which == "best" else []
        if which == "middle":
            begin = len(ranked) // 2
            order = ranked[np.argsort(np.abs(np.arange(len(ranked)) - begin), kind="stable")]
        else:
            order = ranked if which == "best" else ranked[::-1]
        chosen: dict[int, int] = {}
        for place in order.tolist():
            chosen.setdefault(int(self._scores.images[place]), place)
            if len(chosen) == PICTURED:
                break
        return sorted(chosen.values(), key=lambda place: -self.dice[place])


def row_lines(name: str, answers: Path, rows: RowScores) -> Iterator[list[object]]:
    """Lines of ``rows.csv``, see ``ROW_COLUMNS``."""
    for place, row in enumerate(read_predictions(answers)):
        known = (plain_cell(str(row.metadata.get(key, ""))) for key in ("task", "kind", "modality", "structure"))
        scores = (rows.closed, rows.exact, rows.recall, rows.f1, rows.dice, rows.iou)
        yield [
            name,
            plain_cell(str(row.question_id)),
            row.key[1],
            *known,
            plain_cell(row.answer_type),
            row.finish,
            *("" if math.isnan(column[place]) else f"{column[place]:.4f}" for column in scores),
            len(row.masks),
            "" if row.gt_masks is None else len(row.gt_masks),
            "" if (mean := predicted_iou(row)) is None else f"{mean:.4f}",
            row.timing.get("new_tokens", ""),
            row.timing.get("total", ""),
            plain_cell(row.image_path),
        ]


def predicted_iou(row: Prediction) -> float | None:
    """Mean of the scores that the model gave its masks; None without masks or scores."""
    found = [mask["score"] for mask in row.masks if is_number(mask.get("score"))]
    return float(np.mean(found)) if found else None


def blind_scores(item: DataSet, records: Iterable[Mapping[str, Any]], images: Path, scores: Scores) -> BlindScores:
    """What answers reach that are learned from ``item.blind`` and never see an image; empty where it names no file.

    Accuracies by kind of question (``blind_baseline``) are averaged over the closed questions; masks painted from each
    structure's average place (``position_prior_dice``) stand beside the mean Dice.
    """
    if not item.blind:
        return {}
    try:
        train = [_placed(_with_kind(record), path.parent) for path in item.blind for record in open_records(path)]
        asked = [_with_kind(record) for record in records]
        guessed = blind_baseline(train, asked)
        closed = [guessed[r["kind"]] for r in asked if r.get("answer_type") == "closed" and r["kind"] in guessed]
        opened = [
            guessed[r["kind"]]
            for r in asked
            if r.get("answer_type") != "closed" and r.get("task") != "grounding" and r["kind"] in guessed
        ]
        blind = _blind_by_kind(guessed, asked)
        for metric, found in (("closed_accuracy", closed), ("open_exact_match", opened)):
            blind |= {("", "", metric): float(np.mean(found))} if found else {}
        if any(record.get("task") == "grounding" for record in asked):
            prior = position_prior_dice(train, [r for r in asked if r.get("task") == "grounding"], images)
            blind |= {("", "", f"mDice{mark(t)}"): prior for t in scores.settings.thresholds}
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise MedPLIBError(
            f"the blind baselines of {item.title} cannot be computed from {item.blind[0]} ({error}); leave blind out"
        ) from error
    return blind


def _blind_by_kind(
    guessed: Mapping[str, float], asked: Iterable[Mapping[str, Any]]
) -> dict[tuple[str, str, str], float]:
    metric_of = {
        r["kind"]: "closed_accuracy" if r.get("answer_type") == "closed" else "open_exact_match" for r in asked
    }
    return {("kind", kind, metric_of[kind]): value for kind, value in guessed.items()}


def _with_kind(record: Mapping[str, Any]) -> Mapping[str, Any]:
    return record if record.get("kind") else {**record, "kind": str(record.get("answer_type") or "open")}


def _placed(record: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """A record whose mask paths start from nowhere: those of the questions start from another folder."""
    turns = [
        {**turn, "value": _MASK.sub(lambda found: f"<mask>{folder / found[1]}</mask>", str(turn["value"]))}
        for turn in record["conversations"]
    ]
    return {**record, "conversations": turns}


def _keep(kept: _Kept, place: int, row: Prediction, score: RowScore, wanted: set[int]) -> None:
    mean = predicted_iou(row)
    if mean is not None and score.iou is not None and len(row.masks) == len(row.gt_masks or ()):
        kept.predicted_iou.append(mean)
        kept.real_iou.append(score.iou)
    score = RowScore(score.right, score.recall, score.dice, score.iou, mean)
    kept.failures.add(place, row, score)
    if place in wanted:
        kept.pictured[place] = (place, row, score)
    if row.router:
        _add_router(kept, str(row.metadata.get("task", "vqa")), row.router)


def _add_router(kept: _Kept, task: str, router: list[list[float]]) -> None:
    """Layers with fewer experts than others get empty ones, so that all answers have one shape."""
    experts = max(len(layer) for layer in router)
    shares = np.array([[*layer, *[0.0] * (experts - len(layer))] for layer in router])
    total, count = kept.router.get(task, (np.zeros_like(shares), 0))
    if total.shape == shares.shape:
        kept.router[task] = (total + shares, count + 1)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
