"""A comparison of two runs as one self-contained page, as JSON and CSV, and as text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from model.drawing.pages import Markup, count, page
from model.eval import report_sections as sections
from model.eval.compare import EXAMPLES, FEWEST, SCORED, Change, Run, RunSet, SetComparison
from model.eval.metrics.comparing import Difference
from model.eval.metrics.scores import UNNAMED
from model.eval.pictures import MOST_PICTURES, Pictures
from model.eval.predictions import json_text
from model.eval.report import version, write_csv, write_text
from model.eval.results import plain_cell

HTML_FILE, JSON_FILE, CHANGES_FILE = "compare.html", "compare.json", "changes.csv"

WHAT_TITLES = {"right": "closed", "exact": "open", "dice": "with masks", "clean": "about absent targets"}


def write_comparison(first: Run, second: Run, found: Sequence[SetComparison], folder: Path) -> list[Path]:
    """Write ``compare.html``, ``compare.json`` and ``changes.csv``; each is there whole or not at all.

    Returns:
        The files, in that order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = (line for part in found for line in _change_lines(part))
    head = ["set", "question_id", "turn", "scored", "first", "second", "gain"]
    return [
        write_text(folder / HTML_FILE, comparison_page(first, second, found)),
        write_text(folder / JSON_FILE, as_json_text(first, second, found)),
        write_csv(folder / CHANGES_FILE, head, lines),
    ]


def verdict_text(found: Sequence[SetComparison]) -> str:
    """The headline differences and the number of changed answers, as text for a terminal."""
    parts = []
    for part in found:
        title = [part.title] if len(found) > 1 else []
        parts.append("\n".join([*title, part.found.table(only=part.headlines()), "", _changes_told(part)]))
    return "\n\n".join(parts)


def as_json_text(first: Run, second: Run, found: Sequence[SetComparison]) -> str:
    """All differences and changed answers; what is not defined is null."""
    content = {
        "format": 1,
        "first": {"path": str(first.path), "model": first.model},
        "second": {"path": str(second.path), "model": second.model},
        "sets": [_set_json(part) for part in found],
    }
    return json_text(content)


def comparison_page(first: Run, second: Run, found: Sequence[SetComparison]) -> str:
    """The whole page."""
    names = [run.model or run.path.stem for run in (first, second)]
    if names[0] == names[1]:
        names = [str(run.path) for run in (first, second)]
    title = f"{names[0]} and {names[1]}"
    facts = {
        "First": f"{names[0]}, {first.path}",
        "Second": f"{names[1]}, {second.path}",
        "Date": f"{datetime.now(UTC):%d %B %Y, %H:%M} UTC".lstrip("0"),
        "Version": version(),
    }
    body = sections.render(
        "compare.html",
        title=title,
        facts=facts,
        found=found,
        comparison_section=comparison_section,
        **{"FEWEST": FEWEST, "JSON_FILE": JSON_FILE, "CHANGES_FILE": CHANGES_FILE},
    )
    return page(title, body)


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
    most = MOST_PICTURES // (2 * sets) if part.images is not None else 0
    return sections.render(
        "compare_set.html",
        part=part,
        anchor=anchor,
        headlines=headlines,
        others=[metric for name, metric in metrics.items() if name in found and metric not in headlines],
        modalities=modalities,
        known=len(groups),
        pictures=[
            Pictures(run.images or part.images or Path(), part.regions, most) for run in (part.first, part.second)
        ],
        shown_of=lambda changes: [change for change in changes if change.place in part.examples],
        reach_of=lambda metrics: _reach(found[metric.name] for metric in metrics if not metric.unit),
        changes_told=_changes_told,
    )


def _reach(found: Iterable[Difference]) -> float:
    ends = [abs(end) for d in found for end in (d.difference, d.low, d.high) if not math.isnan(end)]
    return max([*ends, 0.01])


# --- for machines and terminals -------------------------------------------------------------------------------------


def _changes_told(part: SetComparison) -> str:
    better, worse = part.better(), part.worse()
    if not better and not worse:
        return f"None of the {count(part.questions)} answers scored differently."
    same = part.questions - len({change.place for change in part.changes})
    told_ = f"{_counted(better)} scored better{_by_what(better)}, {_counted(worse)} worse{_by_what(worse)}"
    return f"Of {count(part.questions)} answers {told_}, and {count(same)} as before."


def _counted(changes: Sequence[Change]) -> str:
    return count(len(changes)) if changes else "none"


def _by_what(changes: Sequence[Change]) -> str:
    counts = Counter(change.what for change in changes)
    parts = [f"{count(counts[what])} {WHAT_TITLES[what]}" for what in WHAT_TITLES if counts[what]]
    return f" ({', '.join(parts)})" if parts else ""


def _set_json(part: SetComparison) -> dict[str, Any]:
    return {
        "first": _run_json(part.first),
        "second": _run_json(part.second),
        "questions": part.questions,
        "better": len(part.better()),
        "worse": len(part.worse()),
        "differences": part.found.to_dict(),
        "changes": [
            {
                "question_id": part.found.first.keys[change.place][0],
                "turn": part.found.first.keys[change.place][1],
                "scored": change.what,
                "first": round(change.first, 6),
                "second": round(change.second, 6),
            }
            for change in part.changes
        ],
    }


def _run_json(run: RunSet) -> dict[str, Any]:
    return {"set": run.name, "answers": str(run.answers), "thresholds": list(run.thresholds)}


def _change_lines(part: SetComparison) -> Iterator[list[object]]:
    for change in part.changes:
        question, turn, _ = part.found.first.keys[change.place]
        values = (f"{value:.4f}" for value in (change.first, change.second, change.gain))
        yield [part.first.name, plain_cell(question), turn, change.what, *values]


assert 2 * 2 * EXAMPLES * len(SCORED) <= MOST_PICTURES
