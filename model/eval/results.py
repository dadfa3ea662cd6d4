"""Tables and examples of one data set's answers for the report; the answers are streamed."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from model.data.records import open_records
from model.data.schema import is_number
from model.eval.baselines import BlindScores, MaskBaseline, blind_scores, mask_baselines
from model.eval.metrics.definitions import Metric
from model.eval.metrics.rows import mark
from model.eval.metrics.scores import UNNAMED, Measure, Scores, score_predictions
from model.eval.predictions import Key, Prediction, read_predictions
from model.eval.questions import regions_of
from model.eval.suite import CURVE, DataSet

PICTURED = 4
"""Answers in each row of pictures."""
EXAMPLES = 4
"""Kept of each kind of failure."""

TASK_TITLES = {
    "vqa": "Questions about the image",
    "region": "Questions about a region",
    "grounding": "Requests for masks",
    "caption": "Captions",
}

ROW_COLUMNS = (
    *("set", "question_id", "turn", "task", "kind", "modality", "structure", "answer_type", "finish", "closed_right"),
    *("open_exact", "token_recall", "token_F1", "dice", "iou", "masks", "reference_masks", "predicted_iou"),
    *("new_tokens", "seconds", "image_path"),
)
"""Columns of ``rows.csv``; Dice and IoU are those of the first threshold."""


@dataclass(frozen=True)
class RowScore:
    """What one answer scored, as far as it applies."""

    right: bool | None = None  # of a closed question: the answer is the reference
    recall: float | None = None  # of an open question: share of the reference's words in the answer
    dice: float | None = None  # of a question with present targets: mean over them
    iou: float | None = None  # the same as intersection over union
    predicted_iou: float | None = None  # mean of the scores that the model gave its masks


Shown = tuple[int, Prediction, RowScore]
"""An answer that is shown: its place in the file, itself and what it scored."""


@dataclass
class Failures:
    """Answers of one kind of failure."""

    name: str
    title: str
    meaning: str
    asked: int = 0  # questions that could have failed so
    count: int = 0  # questions that did
    examples: list[Shown] = field(default_factory=list)  # drawn evenly from all, in the order of the file


Judge = Callable[[Prediction, RowScore], bool]
_KINDS = """
errors         | Questions that could not be asked | The image or the record could not be used.
wrong_closed   | Wrong closed answers              | The answer is not the reference, case and punctuation aside.
unrelated_open | Open answers without a right word | No word of the reference is in the answer.
refused        | Present targets without a mask    | The image holds what was asked for and the answer has no mask.
far_off        | Masks that lie elsewhere          | There is a mask, and its Dice with the reference is below 0.1.
false_masks    | False masks                       | The image does not hold the target, and there is a mask.
empty          | Empty answers                     | The answer has no text.
cut_off        | Answers that did not end          | The longest length was reached before the answer's end.
"""
_JUDGES: dict[str, tuple[Judge, Judge]] = {
    "errors": (lambda row, _: True, lambda row, _: row.failed),
    "wrong_closed": (lambda _, score: score.right is not None, lambda _, score: not score.right),
    "unrelated_open": (lambda _, score: score.recall is not None, lambda _, score: score.recall == 0),
    "refused": (lambda row, _: bool(row.gt_masks), lambda row, _: not row.masks),
    "far_off": (
        lambda row, score: bool(row.gt_masks and row.masks) and score.dice is not None,
        lambda _, score: score.dice is not None and score.dice < 0.1,
    ),
    "false_masks": (lambda row, _: row.gt_masks == [], lambda row, _: bool(row.masks)),
    "empty": (lambda row, _: True, lambda row, _: not row.text.strip()),
    "cut_off": (lambda row, _: True, lambda row, _: row.finish == "length"),
}
"""Which answered questions a kind of failure concerns, and of which of these it happened; errors concern all."""


class FailureCounter:
    """Counts failures as rows pass, and keeps a fair draw of examples of each kind, the same in every run."""

    def __init__(self, examples: int = EXAMPLES, seed: int = 0) -> None:
        lines = ([cell.strip() for cell in line.split("|")] for line in _KINDS.strip().splitlines())
        self._found = [Failures(name, title, meaning) for name, title, meaning in lines]
        self._most, self._chance = examples, random.Random(seed)

    def add(self, index: int, row: Prediction, score: RowScore) -> None:
        """Look at one answer; ``index`` is its place in the file."""
        for kind in self._found:
            concerns, happened = _JUDGES[kind.name]
            if (row.failed and kind.name != "errors") or not concerns(row, score):
                continue
            kind.asked += 1
            if not happened(row, score):
                continue
            kind.count += 1
            if len(kind.examples) < self._most:
                kind.examples.append((index, row, score))
            elif (place := self._chance.randrange(kind.count)) < self._most:
                kind.examples[place] = (index, row, score)

    def found(self) -> list[Failures]:
        """Every kind that concerned a question, its examples in the order of the file."""
        for kind in self._found:
            kind.examples.sort(key=lambda example: example[0])
        return [kind for kind in self._found if kind.asked]


@dataclass
class SetResult:
    """What was measured on one data set."""

    item: DataSet  # the data set
    scores: Scores  # every metric, overall and by group
    images: Path  # folder that image paths start from
    # of every question with a present target, at the first threshold.
    dice: np.ndarray = field(default_factory=lambda: np.zeros(0))
    # mean scores that the model gave its masks, one for each of ``real_iou``.
    predicted_iou: np.ndarray = field(default_factory=lambda: np.zeros(0))
    real_iou: np.ndarray = field(default_factory=lambda: np.zeros(0))  # what the masks of these answers reached
    failures: Sequence[Failures] = ()  # by kind
    pictured: Mapping[str, Sequence[Shown]] = field(default_factory=dict)  # best, middle and worst answers with masks
    # shares [layers, experts] of the tokens, by task; empty where it was not recorded.
    router: Mapping[str, np.ndarray] = field(default_factory=dict)
    blind: BlindScores = field(default_factory=dict)  # image-free baselines; empty where none were asked for
    baselines: Sequence[MaskBaseline] = ()  # of the masks of a detailed set
    # mean Dice at each threshold of ``CURVE`` of a detailed set, by structure, of all under "".
    curve: Mapping[str, list[float]] = field(default_factory=dict)
    # mask files of the regions that shown questions point at.
    regions: Mapping[Key, Sequence[Path]] = field(default_factory=dict)
    seconds: float = 0.0  # that answering took; 0 where it is not known

    @property
    def questions(self) -> int:
        """How many were asked."""
        return len(self.scores.keys)

    @property
    def errors(self) -> int:
        """How many of them could not be."""
        return int(self.scores.total("error"))

    def headlines(self) -> list[Metric]:
        """The metrics that stand for the set, those that it has anything to say about."""
        known = {metric.name: metric for metric in self.scores.metrics}
        return [known[name] for name in self.item.headlines if name in known]


@dataclass
class SuiteResult:
    """What was measured with one model on one suite."""

    title: str  # of the suite
    about: str  # what the suite is for
    model: str  # name of the checkpoint
    facts: Mapping[str, str]  # what else the header has, in order
    sets: Sequence[SetResult]  # results of the data sets
    command: str = ""  # that does it again


_UNIT = re.compile(r"_(mm|px)(?=@|$)")


def metric_title(metric: Metric) -> str:
    """A metric's name for people: ``false_mask_rate@0.5`` is “False mask rate at 0.5”."""
    name, at, threshold = _UNIT.sub("", metric.name).partition("@")
    words = name.replace("_", " ")
    if words.split()[0].islower():
        words = words[0].upper() + words[1:]
    known = _UNIT.search(metric.name)  # NSD is a share, of outlines within a distance in this unit
    unit = f" in {metric.unit}" if metric.unit else f" ({known[1]})" if known else ""
    return f"{words}{unit}{f' at {threshold}' if at else ''}"


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
    columns, records = row_scores(scores), open_records(questions)
    places = _pictured_places(scores, columns["dice"])
    result = SetResult(item, scores, images, columns["dice"][~np.isnan(columns["dice"])])
    result.blind = blind_scores(item, islice(records, limit), images, scores)
    counter, pictured, expected = FailureCounter(), {}, []
    wanted = {place for found in places.values() for place in found}
    router: dict[str, tuple[np.ndarray, int]] = {}
    for place, row in enumerate(read_predictions(answers)):
        values = {name: None if math.isnan(column[place]) else float(column[place]) for name, column in columns.items()}
        right = None if values["right"] is None else bool(values["right"])
        score = RowScore(right, values["recall"], values["dice"], values["iou"], predicted_iou(row))
        if score.predicted_iou is not None and score.iou is not None and len(row.masks) == len(row.gt_masks or ()):
            expected.append((score.predicted_iou, score.iou))
        counter.add(place, row, score)
        if place in wanted:
            pictured[place] = (place, row, score)
        if row.router:
            experts = max(map(len, row.router))  # layers with fewer experts than others get empty ones
            shares = np.array([[*layer, *[0.0] * (experts - len(layer))] for layer in row.router])
            task = str(row.metadata.get("task", "vqa"))
            total, count = router.get(task, (np.zeros_like(shares), 0))
            if total.shape == shares.shape:
                router[task] = (total + shares, count + 1)
    result.failures = counter.found()
    result.predicted_iou, result.real_iou = np.array(expected, dtype=np.float64).reshape(-1, 2).T
    result.pictured = {name: [pictured[place] for place in found] for name, found in places.items() if found}
    result.router = {task: total / count for task, (total, count) in router.items()}
    result.regions = regions_of(records, images, {row.key for kind in result.failures for _, row, _ in kind.examples})
    if item.detailed and len(result.dice):
        result.baselines = mask_baselines(answers, item.blind, item.images)
        best: dict[tuple[str, str], float] = {}
        for baseline in result.baselines:
            best |= {group: max(dice, best.get(group, 0.0)) for group, dice in baseline.dice.items()}
        at = f"mDice{mark(item.thresholds[0])}"
        result.blind = {**result.blind, **{(by, group, at): dice for (by, group), dice in best.items()}}
        curve = score_predictions(read_predictions(answers), thresholds=CURVE, samples=0)
        names = [f"mDice{mark(threshold)}" for threshold in CURVE]
        groups = {"": curve.overall, **curve.by("structure")}
        found = {group: [m[name].value for name in names if name in m] for group, m in groups.items()}
        result.curve = {group: values for group, values in found.items() if values}
    return result, _row_lines(item.name, answers, columns)


def predicted_iou(row: Prediction) -> float | None:
    """Mean of the scores that the model gave its masks; None without masks or scores."""
    found = [mask["score"] for mask in row.masks if is_number(mask.get("score"))]
    return float(np.mean(found)) if found else None


def row_scores(scores: Scores) -> dict[str, np.ndarray]:
    """What every answer scored: float64 [N] in [0, 1], larger is better, NaN where one does not apply.

    By name: ``right`` of closed questions; ``exact``, ``recall`` and ``f1`` of open ones; ``dice`` and ``iou`` of
    present targets at the first threshold; ``clean``: absent targets without a mask.
    """
    at = mark(scores.settings.thresholds[0])
    column = {name: scores.data[:, index] for index, name in enumerate(scores.columns)}
    count = column["mask"]

    def mean_over_masks(name: str) -> np.ndarray:
        return np.divide(column[f"{name}{at}"], count, out=np.full(len(count), np.nan), where=count > 0)

    return {
        "right": np.where(column["closed"] > 0, column["closed_hit"], np.nan),
        **{name: np.where(column["open"] > 0, column[name], np.nan) for name in ("exact", "recall", "f1")},
        **{name: mean_over_masks(name) for name in ("dice", "iou")},
        "clean": np.where(column["absent"] > 0, 1 - column[f"false_mask{at}"], np.nan),
    }


def _pictured_places(scores: Scores, dice: np.ndarray) -> dict[str, list[int]]:
    """Places of the best, middle and worst answers with a mask, no two of a kind about one image."""
    columns = [scores.data[:, scores.columns.index(name)] for name in ("seg", "error")]
    masked = np.flatnonzero(~np.isnan(dice) & (columns[0] > 0) & (columns[1] == 0))
    ranked = masked[np.argsort(-dice[masked], kind="stable")]
    if len(ranked) < 3 * PICTURED:  # too few to rank: all of them, once
        return {"best": ranked.tolist()}
    from_middle = np.argsort(np.abs(np.arange(len(ranked)) - len(ranked) // 2), kind="stable")
    found = {}
    for name, order in (("best", ranked), ("middle", ranked[from_middle]), ("worst", ranked[::-1])):
        chosen: dict[int, int] = {}
        for place in order.tolist():
            if len(chosen) < PICTURED:
                chosen.setdefault(int(scores.images[place]), place)
        found[name] = sorted(chosen.values(), key=lambda place: -dice[place])
    return found


def plain_cell(text: str) -> str:
    """Text for a spreadsheet, which would otherwise run what begins like a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def _row_lines(name: str, answers: Path, columns: Mapping[str, np.ndarray]) -> Iterator[list[object]]:
    """Lines of ``rows.csv``, see ``ROW_COLUMNS``."""
    for place, row in enumerate(read_predictions(answers)):
        known = (plain_cell(str(row.metadata.get(key, ""))) for key in ("task", "kind", "modality", "structure"))
        scores = (columns[what][place] for what in ("right", "exact", "recall", "f1", "dice", "iou"))
        yield [
            name,
            plain_cell(str(row.question_id)),
            row.key[1],
            *known,
            plain_cell(row.answer_type),
            row.finish,
            *("" if math.isnan(score) else f"{score:.4f}" for score in scores),
            len(row.masks),
            "" if row.gt_masks is None else len(row.gt_masks),
            "" if (mean := predicted_iou(row)) is None else f"{mean:.4f}",
            row.timing.get("new_tokens", ""),
            row.timing.get("total", ""),
            plain_cell(row.image_path),
        ]


# --- tables of a detailed set ---------------------------------------------------------------------------------------

Cell = str | int | float | Measure

ABSENT_TITLES = {
    "picture": "(a) absent from the picture itself",
    "target": "(b) another target of the same modality",
    "modality": "(c) a target of another modality",
}
"""Why a target is absent, as a record's ``absent_kind`` says it; (a) where it does not."""


@dataclass
class Table:
    """A table for pages and terminals: its title, a sentence on it, headings, and cells."""

    title: str
    note: str
    columns: list[str]
    rows: list[list[Cell]]


def detail_tables(part: SetResult) -> list[Table]:
    """Masks by target and modality, means over patients, false masks by reason, questions by kind; those with rows."""
    tables = [*(_mask_table(part, by) for by in ("structure", "modality")), _patients(part)]
    return [table for table in (*tables, _false_masks(part), _questions(part)) if table.rows]


def _mask_table(part: SetResult, by: str) -> Table:
    at = mark(part.item.thresholds[0])
    titles = {f"mDice{at}": "mDice", f"mIoU{at}": "mIoU"}
    for unit in ("mm", "px"):
        titles |= {f"HD95_{unit}{at}": f"HD95, {unit}", f"NSD_{unit}{at}": f"NSD, {unit}"}
    titles |= {"refused_rate": "Refused", f"false_mask_rate{at}": "False masks"}
    overall = part.scores.overall
    shown = [name for name in titles if name in overall and overall[name].count]
    groups = {name: found for name, found in part.scores.by(by).items() if any(key in found for key in shown)}
    if by == "modality" and len(groups) < 2:
        groups = {}
    rows: list[list[Cell]] = []
    for name, found in [*groups.items(), *([("All", overall)] if len(groups) > 1 else [])]:
        row: list[Cell] = [name, found[f"mDice{at}"].count if f"mDice{at}" in found else 0]
        key = ("", "") if found is overall else (by, name if name != UNNAMED else "")
        bases = [baseline.dice.get(key, math.nan) for baseline in part.baselines]
        cells: list[Cell] = [found.get(metric, math.nan) for metric in shown]
        rows.append([*row, *cells[:1], *bases, *cells[1:]])
    names = [titles[name] for name in shown]
    columns = [by.capitalize(), "n", *names[:1], *(baseline.name for baseline in part.baselines), *names[1:]]
    settings = part.scores.settings
    note = (
        f"Masks cut at {part.item.thresholds[0]:g}; a target without a mask counts 0. Refused: present targets without "
        f"a mask. NSD within {settings.tolerance_mm:g} mm, {settings.tolerance_px:g} px without a known spacing."
    )
    if how := "; ".join(f"{baseline.name}: {baseline.how}" for baseline in part.baselines):
        note += f" {how}."
    title = "Masks by target" if by == "structure" else f"Masks by {by}"
    return Table(title, note if by == "structure" else "", columns, rows if shown else [])


def _patients(part: SetResult) -> Table:
    means, overall = part.scores.mean_over("patient"), part.scores.overall
    rows: list[list[Cell]] = [
        [metric_title(metric), overall[metric.name], means[metric.name], means[metric.name].count]
        for metric in part.headlines()
        if metric.name in means
    ]
    note = "Each patient counts once on the right, each mask or question once on the left."
    return Table("Mean over patients", note, ["Metric", "Mean over all", "Mean over patients", "Patients"], rows)


def _false_masks(part: SetResult) -> Table:
    name = f"false_mask_rate{mark(part.item.thresholds[0])}"
    known = {group: found[name] for group, found in part.scores.by("absent_kind").items() if name in found}
    rows: list[list[Cell]] = []
    for group, found in sorted(known.items()):
        title = ABSENT_TITLES.get("picture" if group == UNNAMED else group, group)
        rows.append([title, found, found.count])
    note = "Share of the questions about an absent target with a mask; lower is better."
    return Table("False masks on absent targets", note, ["Why it is absent", "False masks", "n"], rows)


def _questions(part: SetResult) -> Table:
    rows: list[list[Cell]] = []
    for by in ("task", "kind"):
        for group, found in part.scores.by(by).items():
            for name, title in (("closed_accuracy", "right (closed)"), ("open_exact_match", "exact (open)")):
                if name in found and found[name].count:
                    blind = part.blind.get((by, group, name), math.nan)
                    label = TASK_TITLES.get(group, group) if by == "task" else group.replace("_", " ")
                    rows.append([label, title, found[name], blind, found[name].count])
    learned = "learned from the training split" if part.item.blind else "the commonest answer of each kind here"
    note = f"Blind: what is reached without seeing the image ({learned})."
    return Table("Questions", note, ["Kind", "Scored", "Value", "Blind", "n"], rows)
