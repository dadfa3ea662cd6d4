"""Compare two runs over the same questions: differences and their significance, changed answers, and the report.

A run is a prediction file of ``vqa_infer`` or the folder of ``medplib eval``; differences are the second run less the
first.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from model.data.records import open_records
from model.errors import MedPLIBError
from model.eval import report
from model.eval.metrics.comparing import Comparison, Difference
from model.eval.metrics.comparing import compare as compare_scores
from model.eval.metrics.rows import masks_by_threshold
from model.eval.metrics.scores import UNNAMED, RowKey, Scores, score_predictions
from model.eval.pages import Markup, count, page
from model.eval.predictions import Key, Prediction, json_text, read_predictions
from model.eval.questions import regions_of
from model.eval.results import plain_cell, row_scores
from model.eval.shards import read_journal

HTML_FILE, JSON_FILE, CHANGES_FILE = "compare.html", "compare.json", "changes.csv"
FEWEST = 0.1
"""By how much the Dice of an answer must differ to count as changed; right and wrong answers always do."""
SCORED = {"right": 0.0, "exact": 0.0, "dice": FEWEST, "clean": 0.0}
"""What an answer is scored by (see ``row_scores``), and by how much more it must differ to count as changed."""
WHAT_TITLES = {"right": "closed", "exact": "open", "dice": "with masks", "clean": "about absent targets"}
EXAMPLES = 3
"""Changed answers shown of each kind of score, of the better and of the worse each."""

assert 2 * 2 * EXAMPLES * len(SCORED) <= report.MOST_PICTURES


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
    what: str  # what was scored, a name of ``row_scores``
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
    def questions(self) -> int:
        """How many both answered."""
        return len(self.found.first.keys)

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

    def summary(self) -> str:
        """How many answers changed, in a sentence."""
        parts = []
        for changes in (self.better(), self.worse()):
            counts = Counter(change.what for change in changes)
            kinds = [f"{count(counts[what])} {title}" for what, title in WHAT_TITLES.items() if counts[what]]
            parts.append((count(len(changes)) if changes else "none", f" ({', '.join(kinds)})" if kinds else ""))
        if not self.changes:
            return f"None of the {count(self.questions)} answers scored differently."
        (better, of_better), (worse, of_worse) = parts
        same = count(self.questions - len({change.place for change in self.changes}))
        changed = f"{better} scored better{of_better}, {worse} worse{of_worse}"
        return f"Of {count(self.questions)} answers {changed}, and {same} as before."


def open_run(path: Path) -> Run:
    """A prediction file, or the folder of a suite's run.

    Raises:
        MedPLIBError: it is neither.
    """
    if path.is_file():
        first = next(read_predictions(path), None)
        return Run(path, first.model_id if first else "", {path.stem: _run_set(path, {})})
    files = sorted(file for file in (path / "predictions").glob("*.jsonl") if ".part-" not in file.name)
    if not files:
        raise MedPLIBError(f"{path} is no run; give a prediction file or a folder that medplib eval has written")
    written, reported = path / report.JSON_FILE, {}
    try:
        if written.is_file():  # a finished run; it says more of each set than the predictions
            reported = {str(entry["name"]): entry for entry in json.loads(written.read_text(encoding="utf-8"))["sets"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MedPLIBError(
            f"{written} is no report of medplib eval ({error}); remove it or run the suite again"
        ) from error
    sets = {file.stem: _run_set(file, reported.get(file.stem, {})) for file in files}
    first = next(read_predictions(files[0]), None)
    return Run(path, first.model_id if first else path.name, sets)


def _run_set(path: Path, reported: Mapping[str, Any]) -> RunSet:
    """What the file, the journal beside it and the report of its suite say."""
    thresholds: tuple[float, ...] = ()
    row = next((row for row in read_predictions(path) if row.masks_at), None)
    try:
        thresholds = tuple(masks_by_threshold(row)) if row is not None else ()
    except MedPLIBError as error:
        raise MedPLIBError(f"{path}, question {row and row.question_id}: {error}") from error
    journal = read_journal(path)
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
    result = SetComparison(left, right, found, list(_changes(*scores)))
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
    before, after = row_scores(first), row_scores(second)
    places = {key: place for place, key in enumerate(second.keys)}
    for place, key in enumerate(first.keys):
        for what, least in SCORED.items():
            old, new = before[what][place], after[what][places[key]]
            if abs(new - old) > least:  # never where one is not a number
                yield Change(place, what, float(old), float(new))


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


# --- the report -----------------------------------------------------------------------------------------------------


def verdict_text(found: Sequence[SetComparison]) -> str:
    """The headline differences and the number of changed answers, as text for a terminal."""
    parts = []
    for part in found:
        title = [part.title] if len(found) > 1 else []
        parts.append("\n".join([*title, part.found.table(only=part.headlines()), "", part.summary()]))
    return "\n\n".join(parts)


def write_comparison(first: Run, second: Run, found: Sequence[SetComparison], folder: Path) -> list[Path]:
    """Write ``compare.html``, ``compare.json`` and ``changes.csv``, each whole or not at all; returns them in order."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [run.model or run.path.stem for run in (first, second)]
    if names[0] == names[1]:
        names = [str(run.path) for run in (first, second)]
    title = f"{names[0]} and {names[1]}"
    facts = {
        "First": f"{names[0]}, {first.path}",
        "Second": f"{names[1]}, {second.path}",
        "Date": f"{datetime.now(UTC):%d %B %Y, %H:%M} UTC".lstrip("0"),
        "Version": report.version(),
    }
    files = {"FEWEST": FEWEST, "JSON_FILE": JSON_FILE, "CHANGES_FILE": CHANGES_FILE}
    sections = [comparison_section(part, f"set-{index}", len(found)) for index, part in enumerate(found)]
    body = report.render("compare.html", title=title, facts=facts, found=found, sections_of_sets=sections, **files)
    lines: list[list[object]] = []
    for part in found:
        for change in part.changes:
            question, turn, _ = part.found.first.keys[change.place]
            values = (f"{value:.4f}" for value in (change.first, change.second, change.gain))
            lines.append([part.first.name, plain_cell(question), turn, change.what, *values])
    head = ["set", "question_id", "turn", "scored", "first", "second", "gain"]
    return [
        report.write_text(folder / HTML_FILE, page(title, body)),
        report.write_text(folder / JSON_FILE, as_json_text(first, second, found)),
        report.write_csv(folder / CHANGES_FILE, head, lines),
    ]


def comparison_section(part: SetComparison, anchor: str, sets: int) -> Markup:
    """Differences and changed answers of one data set, of so many on the page."""
    metrics, found = {metric.name: metric for metric in part.found.metrics}, part.found.overall
    shown = [metrics[name] for name in part.headlines() if name in found]
    # without rates of mishaps that happened in neither run
    headlines = [m for m in shown if m.higher_is_better or found[m.name].first or found[m.name].second]
    groups = {name: group for name, group in part.found.by("modality").items() if name != UNNAMED}
    modalities = []
    for metric in headlines:
        lines = [(name, group[metric.name]) for name, group in groups.items() if metric.name in group]
        if len(lines) > 1:
            lines.sort(key=lambda line: -line[1].difference)
            modalities.append((metric, lines, _reach(d for _, d in lines)))
    most = report.MOST_PICTURES // (2 * sets) if part.images is not None else 0
    folders = [run.images or part.images or Path() for run in (part.first, part.second)]
    return report.render(
        "compare_set.html",
        part=part,
        anchor=anchor,
        headlines=headlines,
        others=[metric for name, metric in metrics.items() if name in found and metric not in headlines],
        modalities=modalities,
        known=len(groups),
        pictures=[report.Pictures(folder, part.regions, most) for folder in folders],
        shown_of=lambda changes: [change for change in changes if change.place in part.examples],
        reach_of=lambda metrics: _reach(found[metric.name] for metric in metrics if not metric.unit),
    )


def _reach(found: Iterable[Difference]) -> float:
    ends = [abs(end) for d in found for end in (d.difference, d.low, d.high) if not math.isnan(end)]
    return max([*ends, 0.01])


def as_json_text(first: Run, second: Run, found: Sequence[SetComparison]) -> str:
    """All differences and changed answers; what is not defined is null."""
    sets = [
        {
            "first": _run_json(part.first),
            "second": _run_json(part.second),
            "questions": part.questions,
            "better": len(part.better()),
            "worse": len(part.worse()),
            "differences": part.found.to_dict(),
            "changes": _change_rows(part),
        }
        for part in found
    ]
    runs = {name: {"path": str(run.path), "model": run.model} for name, run in (("first", first), ("second", second))}
    return json_text({"format": 1, **runs, "sets": sets})


def _run_json(run: RunSet) -> dict[str, Any]:
    return {"set": run.name, "answers": str(run.answers), "thresholds": list(run.thresholds)}


def _change_rows(part: SetComparison) -> list[dict[str, Any]]:
    keys = part.found.first.keys
    return [
        {
            "question_id": keys[change.place][0],
            "turn": keys[change.place][1],
            "scored": change.what,
            "first": round(change.first, 6),
            "second": round(change.second, 6),
        }
        for change in part.changes
    ]
