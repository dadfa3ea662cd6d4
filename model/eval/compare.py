"""Two runs over the same questions: what differs, whether by more than chance, and which answers changed.

A run is a prediction file of ``vqa_infer`` or the folder of ``medplib eval``; differences are the second run less the
first.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.data.records import open_records
from model.errors import MedPLIBError
from model.eval.metrics.comparing import Comparison
from model.eval.metrics.comparing import compare as compare_scores
from model.eval.metrics.rows import masks_by_threshold
from model.eval.metrics.scores import RowKey, Scores, score_predictions
from model.eval.pictures import regions_of
from model.eval.predictions import Key, Prediction, read_predictions
from model.eval.processes import journal_path, read_journal
from model.eval.report import JSON_FILE
from model.eval.results import RowScores

FEWEST = 0.1
"""By how much the Dice of an answer must differ to count as changed; right and wrong answers always do."""
SCORED = {"right": 0.0, "exact": 0.0, "dice": FEWEST, "clean": 0.0}
"""What an answer is scored by (columns of ``RowScores``), and by how much more it must differ to count as changed."""
EXAMPLES = 3
"""Changed answers shown of each kind of score, of the better and of the worse each."""


@dataclass(frozen=True)
class RunSet:
    """Predictions of one run on one data set."""

    name: str  # of the data set
    answers: Path  # prediction file
    thresholds: tuple[float, ...] = ()  # mask thresholds that they were made with; empty: not known
    surface: bool = False  # whether outline distances were measured
    headlines: tuple[str, ...] = ()  # metrics that stand for the set; empty: not known
    images: Path | None = None  # folder of the image paths; None: not known
    questions: Path | None = None  # the records that were asked; None: not known
    title: str = ""  # of the data set, for people


@dataclass(frozen=True)
class Run:
    """One run."""

    path: Path  # as the user named it
    model: str  # name of its checkpoint
    sets: Mapping[str, RunSet]  # its data sets by name


@dataclass(frozen=True)
class Change:
    """An answer that scored differently."""

    place: int  # of the question in the first run's file
    what: str  # what was scored, a column of ``RowScores``
    first: float  # its score in the first run, 0 to 1, larger is better
    second: float  # its score in the second run

    @property
    def gain(self) -> float:
        """Second score less first."""
        return self.second - self.first


@dataclass
class SetComparison:
    """One data set of two runs."""

    first: RunSet  # the first run's predictions
    second: RunSet  # the second run's
    found: Comparison  # differences of all metrics
    changes: list[Change]  # answers that scored differently, in the order of the first file
    questions: int  # how many both answered
    # the first and second answers to shown questions, by place.
    examples: dict[int, tuple[Prediction, Prediction]] = field(default_factory=dict)
    # mask files of the regions that shown questions point at.
    regions: Mapping[Key, Sequence[Path]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Of the data set."""
        if self.first.title or self.second.title:
            return self.first.title or self.second.title
        return self.first.name if self.first.name == self.second.name else "Answers"

    @property
    def images(self) -> Path | None:
        """Folder of the image paths; None where neither run knows it."""
        return self.first.images or self.second.images

    def better(self) -> list[Change]:
        """Answers that the second run got better, most gained first."""
        return sorted((change for change in self.changes if change.gain > 0), key=lambda change: -change.gain)

    def worse(self) -> list[Change]:
        """Answers that the second run got worse, most lost first."""
        return sorted((change for change in self.changes if change.gain < 0), key=lambda change: change.gain)

    def headlines(self) -> list[str]:
        """Metrics that stand for the set."""
        known = {metric.name: metric.headline for metric in self.found.metrics}
        named = [name for name in (*self.first.headlines, *self.second.headlines) if name in known]
        return list(dict.fromkeys(named)) or [name for name, shown in known.items() if shown]


def open_run(path: Path) -> Run:
    """A prediction file, or the folder of a suite's run.

    Raises:
        MedPLIBError: it is neither.
    """
    if path.is_file():
        first = next(read_predictions(path), None)
        return Run(path, first.model_id if first else "", {path.stem: _file_set(path)})
    files = sorted(file for file in (path / "predictions").glob("*.jsonl") if ".part-" not in file.name)
    if not files:
        raise MedPLIBError(f"{path} is no run; give a prediction file or a folder that medplib eval has written")
    report, reported = path / JSON_FILE, {}
    try:
        if report.is_file():  # a finished run; it says more of each set than the predictions
            reported = {str(entry["name"]): entry for entry in json.loads(report.read_text(encoding="utf-8"))["sets"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MedPLIBError(
            f"{report} is no report of medplib eval ({error}); remove it or run the suite again"
        ) from error
    sets = {file.stem: _file_set(file, reported.get(file.stem, {})) for file in files}
    first = next(read_predictions(files[0]), None)
    return Run(path, first.model_id if first else path.name, sets)


def compare_runs(first: Run, second: Run, *, samples: int = 1000, permutations: int = 2000) -> list[SetComparison]:
    """Compare every data set of two runs.

    Args:
        first: the run that is compared with.
        second: the run whose gain is asked for.
        samples: bootstrap resamplings behind each interval.
        permutations: behind each p-value.

    Raises:
        MedPLIBError: the runs are of different data sets or questions; the first differences are named.
    """
    pairs = [(first.sets[name], second.sets[name]) for name in first.sets if name in second.sets]
    if len(first.sets) == 1 and len(second.sets) == 1:  # files may have any names
        pairs = list(zip(first.sets.values(), second.sets.values(), strict=True))
    elif first.sets.keys() != second.sets.keys():
        sets = " and ".join(f"{run.path} has {', '.join(run.sets)}" for run in (first, second))
        raise MedPLIBError(f"the runs are of different data sets: {sets}; compare runs of the same sets, or two files")
    return [_compare(*pair, samples, permutations) for pair in pairs]


def _compare(left: RunSet, right: RunSet, samples: int, permutations: int) -> SetComparison:
    # thresholds that both runs wrote masks for, in the first one's order; else masks as they were written
    shared = [threshold for threshold in left.thresholds if threshold in right.thresholds] or None
    surface = left.surface and right.surface
    scores = [
        score_predictions(read_predictions(run.answers), thresholds=shared, surface=surface, samples=samples)
        for run in (left, right)
    ]
    found = compare_scores(scores[0], scores[1], permutations=permutations)
    result = SetComparison(left, right, found, list(_changes(*scores)), len(scores[0].keys))
    shown = {change.place for change in (*_shown(result.better(), scores[0]), *_shown(result.worse(), scores[0]))}
    keys = {scores[0].keys[place]: place for place in shown}
    answers = [_answers(run.answers, keys) for run in (left, right)]
    result.examples = {place: (answers[0][place], answers[1][place]) for place in sorted(shown)}
    questions = left.questions or right.questions
    if questions is not None and result.images is not None:
        asked = {row.key for row, _ in result.examples.values()}
        result.regions = regions_of(open_records(questions), result.images, asked)
    return result


def _changes(first: Scores, second: Scores) -> Iterator[Change]:
    """Answers that scored differently, question by question."""
    rows = (RowScores(first), RowScores(second))
    places = {key: place for place, key in enumerate(second.keys)}
    for place, key in enumerate(first.keys):
        for what, least in SCORED.items():
            before, after = rows[0].column(what)[place], rows[1].column(what)[places[key]]
            if abs(after - before) > least:  # never where one is not a number
                yield Change(place, what, float(before), float(after))


def _shown(changes: Sequence[Change], scores: Scores) -> list[Change]:
    """The largest changes of each kind of score, first those of images that none before is about."""
    shown = []
    for what in SCORED:
        seen: Counter[int] = Counter()
        ranked = []
        for number, change in enumerate(change for change in changes if change.what == what):
            image = int(scores.images[change.place])
            ranked.append((seen[image], number, change))
            seen[image] += 1
        shown += [change for _, _, change in sorted(ranked, key=lambda item: item[:2])[:EXAMPLES]]
    return shown


def _answers(path: Path, keys: Mapping[RowKey, int]) -> dict[int, Prediction]:
    """The predictions of some questions, by their place in the first run."""
    seen: Counter[Key] = Counter()
    found = {}
    for row in read_predictions(path):
        key = (*row.key, seen[row.key])
        seen[row.key] += 1
        if key in keys:
            found[keys[key]] = row
    return found


# --- where runs lie -------------------------------------------------------------------------------------------------


def _file_set(path: Path, reported: Mapping[str, Any] | None = None) -> RunSet:
    """What the file, the journal beside it and the report of its suite say."""
    reported = reported or {}
    thresholds: tuple[float, ...] = ()
    for row in read_predictions(path):
        if row.masks_at:
            try:
                thresholds = tuple(masks_by_threshold(row))
            except MedPLIBError as error:
                raise MedPLIBError(f"{path}, question {row.question_id}: {error}") from error
            break
    journal = read_journal(path) if journal_path(path).is_file() else None
    images = reported.get("images") or (journal.settings.get("images") if journal else None)
    questions = path.parent.parent / "questions" / path.name  # as medplib eval lays them out
    return RunSet(
        name=path.stem,
        answers=path,
        thresholds=tuple(reported.get("thresholds", thresholds)),
        surface=bool(reported.get("surface", False)),
        headlines=tuple(reported.get("headlines", ())),
        images=Path(str(images)) if images else None,
        questions=questions if questions.is_file() else None,
        title=str(reported.get("title", "")),
    )
