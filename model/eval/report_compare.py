"""A comparison of two runs as one self-contained page, as JSON and CSV, and as text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from model.drawing.charts import difference_strip
from model.drawing.pages import Column, Markup, count, element, interval, joined, number, page, quoted, table
from model.eval import report_sections as sections
from model.eval.compare import EXAMPLES, FEWEST, SCORED, Change, Run, RunSet, SetComparison
from model.eval.metrics.comparing import Difference
from model.eval.metrics.definitions import Metric
from model.eval.metrics.scores import UNNAMED
from model.eval.pictures import MOST_PICTURES, Pictures
from model.eval.predictions import Prediction, json_text
from model.eval.report import version, write_csv, write_text
from model.eval.results import plain_cell

HTML_FILE, JSON_FILE, CHANGES_FILE = "compare.html", "compare.json", "changes.csv"

WHAT_TITLES = {"right": "closed", "exact": "open", "dice": "with masks", "clean": "about absent targets"}
_PRICE = (
    "P-values are of single tests and not corrected for their number: of twenty metrics one is below 0.05 by chance."
)


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


def told(found: Sequence[SetComparison]) -> str:
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
    questions = sum(part.questions for part in found)
    links = (element("a", part.title, href=f"#set-{index}") for index, part in enumerate(found))
    body = joined(
        [
            element(
                "header",
                element("p", "MedPLIB comparison", class_="eyebrow"),
                element("h1", title),
                element("p", f"{count(questions)} questions that both answered; second less first", class_="lead"),
                sections.facts(facts),
                element("nav", *links, aria_label="Contents") if len(found) > 1 else "",
            ),
            *(comparison_section(part, f"set-{index}", len(found)) for index, part in enumerate(found)),
            _reading(found),
        ]
    )
    return page(title, body)


# --- parts of the page ----------------------------------------------------------------------------------------------


def comparison_section(part: SetComparison, anchor: str, sets: int) -> Markup:
    """Differences and changed answers of one data set, of so many on the page."""
    metrics = {metric.name: metric for metric in part.found.metrics}
    found = part.found.overall
    shown = [metrics[name] for name in part.headlines() if name in found]
    # without rates of mishaps that happened in neither run
    headlines = [m for m in shown if m.higher_is_better or found[m.name].first or found[m.name].second]
    others = [metric for name, metric in metrics.items() if name in part.found.overall and metric not in headlines]
    most = MOST_PICTURES // (2 * sets) if part.images is not None else 0
    pictures = [Pictures(run.images or part.images or Path(), part.regions, most) for run in (part.first, part.second)]
    parts = [
        element("h2", part.title, id=anchor),
        _differences(part.found.overall, headlines, "Headline differences", "headlines differences"),
        element("p", _changes_told(part), class_="about"),
        _by_modality(part, headlines),
        _examples("Better in the second run", part.better(), part, pictures),
        _examples("Worse in the second run", part.worse(), part, pictures),
    ]
    if others:
        whole = _differences(part.found.overall, others, "All other metrics", "dense")
        parts += [element("h3", "All other metrics"), sections.folded(f"{len(others)} metrics", whole)]
    return element("section", *parts)


def _differences(found: Mapping[str, Difference], metrics: Sequence[Metric], label: str, kind: str) -> Markup:
    """One line for each metric; metrics between 0 and 1 share one scale."""
    reach = _reach([found[metric.name] for metric in metrics if not metric.unit])
    rows = [[sections.metric_cell(metric), *_cells(found[metric.name], metric, reach)] for metric in metrics]
    return table([Column("Metric", "text"), *_COLUMNS], rows, label=label, class_=kind)


_COLUMNS = [
    Column("First"),
    Column("Second"),
    Column("Difference"),
    Column("95 % interval"),
    Column("", "strip"),
    Column("p", meaning="Of exchanging the two runs' answers image by image"),
    Column("n"),
]


def _cells(d: Difference, metric: Metric, reach: float) -> Iterator[object]:
    yield from (number(d.first), number(d.second))
    yield element("span", number(d.difference, signed=True), class_="value")
    yield element("span", interval(d.low, d.high, signed=True), class_="interval")
    better = d.difference > 0 if metric.higher_is_better else d.difference < 0
    yield "" if metric.unit else difference_strip(d.difference, d.low, d.high, reach, better=better)
    yield "–" if math.isnan(d.p_value) else f"{d.p_value:.3f}" if d.p_value >= 0.001 else "< 0.001"
    yield count(d.count)


def _reach(found: Sequence[Difference]) -> float:
    ends = [abs(end) for d in found for end in (d.difference, d.low, d.high) if not math.isnan(end)]
    return max([*ends, 0.01])


def _by_modality(part: SetComparison, metrics: Sequence[Metric]) -> Markup | None:
    groups = {name: found for name, found in part.found.by("modality").items() if name != UNNAMED}
    rows: list[list[object]] = []
    for metric in metrics:
        lines = [(name, found[metric.name]) for name, found in groups.items() if metric.name in found]
        if len(lines) < 2:
            continue
        reach = _reach([difference for _, difference in lines])
        rows.append([sections.metric_cell(metric)])
        for name, d in sorted(lines, key=lambda line: -line[1].difference):
            rows.append([sections.group_title("modality", name), *_cells(d, metric, reach)])
    if not rows:
        return None
    whole = table([Column("Modality", "text"), *_COLUMNS], rows, label="By modality", class_="dense")
    return joined([element("h3", "By modality"), sections.folded(f"{len(groups)} modalities", whole)])


def _examples(
    title: str, changes: Sequence[Change], part: SetComparison, pictures: Sequence[Pictures]
) -> Markup | None:
    shown = [change for change in changes if change.place in part.examples]
    if not shown:
        return None
    drawn = [_example(change, *part.examples[change.place], pictures) for change in shown]
    whole = "1 answer." if len(changes) == 1 else f"{count(len(changes))} answers."
    note = (
        whole if len(shown) == len(changes) else f"{whole[:-1]}, {len(shown)} of them shown: those that changed most."
    )
    return joined([element("h3", title), element("p", note, class_="about"), element("div", *drawn, class_="changes")])


def _example(change: Change, first: Prediction, second: Prediction, pictures: Sequence[Pictures]) -> Markup:
    rows = (first, second) if first.masks or second.masks or first.gt_masks else (first,)
    drawn = [picture for row, maker in zip(rows, pictures, strict=False) if (picture := maker.of(row)) is not None]
    scored = f"{number(change.first, 2)} to {number(change.second, 2)}"
    facts = [
        ("question", quoted(first.prompt)),
        ("reference", quoted(first.gt)),
        ("first", quoted(first.error or "" if first.failed else first.text)),
        ("second", quoted(second.error or "" if second.failed else second.text)),
        ("Dice" if change.what == "dice" else "score", scored),
    ]
    listed = element("dl", *(joined([element("dt", name), element("dd", value)]) for name, value in facts))
    where = element("span", quoted(f"{first.question_id} · {first.image_path}", 200), class_="source")
    return element("div", element("div", *drawn, class_="both"), listed, where, class_="change")


def _reading(found: Sequence[SetComparison]) -> Markup:
    samples = found[0].found.first.samples
    permutations = found[0].found.permutations
    told_ = [
        f"Intervals are of a paired bootstrap: {count(samples)} times as many images are drawn anew, the same in both "
        f"runs. P-values are of {count(permutations)} random exchanges of the two runs' answers, image by image. "
        f"{_PRICE}",
        "Blue bars are improvements, orange ones are not. The bars of a table share one scale with zero in the middle.",
        f"An answer about masks counts as changed where its Dice differs by more than {FEWEST:g}. All numbers are in "
        f"{JSON_FILE} beside this page, all changed answers in {CHANGES_FILE}.",
    ]
    key = element(
        "div",
        element("span", "predicted", class_="predicted"),
        element("span", "reference", class_="reference"),
        class_="key",
    )
    paragraphs = (element("p", text) for text in told_)
    return element("footer", element("h3", "How to read this", id="reading"), *paragraphs, key)


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
