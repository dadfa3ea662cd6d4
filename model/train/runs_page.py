"""The page of ``medplib runs compare --out``: the curves of several runs over one another."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from model.data.schema import TASKS
from model.drawing.lines import curve_key, line_chart
from model.drawing.pages import Column, Markup, breakable, element, joined, page, table
from model.errors import MedPLIBError
from model.train.curves import curve_of
from model.train.journal import METRICS_FILE, read_rows
from model.train.runs import HEADINGS, Run, cells_of
from model.train.runs_compare import differing, flat

_TOGETHER = 6  # runs in one chart: as many colours are told apart
_LOSSES = {
    "Loss": "loss",
    **{f"Cross-entropy, {task}": f"ce/{task}" for task in TASKS},
    "Dice loss of masks": "dice/grounding",
}
_PACE = {"Learning rate": "lr", "Gradient norm": "grad_norm", "Samples a second": "samples_per_s"}

_Rows = Sequence[Mapping[str, Any]]


def comparison_page(runs: Sequence[Run]) -> str:
    """The whole page; runs that have no step yet stand in its table alone.

    Raises:
        MedPLIBError: none of them has one.
    """
    steps = [read_rows(run.folder / METRICS_FILE) for run in runs]
    if not any(steps):
        raise MedPLIBError(f"none of these runs holds a step ({METRICS_FILE}), so there is nothing to draw")
    names = short_names(runs)
    title = f"{len(runs)} runs compared"
    head = element("header", element("p", "MedPLIB training", class_="eyebrow"), element("h1", title))
    body = [head, _standing(runs, names), _settings(runs, names)]
    for start in range(0, len(runs), _TOGETHER):
        some = slice(start, start + _TOGETHER)
        body += _curves(names[some], [run.validations for run in runs[some]], steps[some])
    return page(title, joined(body))


def short_names(runs: Sequence[Run]) -> list[str]:
    """Paths of the runs below the folder that they share."""
    places = [run.folder.absolute() for run in runs]
    shared = os.path.commonpath([place.parent for place in places])
    return [place.relative_to(shared).as_posix() for place in places]


def _standing(runs: Sequence[Run], names: Sequence[str]) -> Markup:
    columns = [Column(heading.capitalize().replace("utc", "UTC"), "text") for heading in HEADINGS]
    rows = [(breakable(name), *cells_of(run)[1:]) for name, run in zip(names, runs, strict=True)]
    return table(columns, rows, label="How the runs stand", class_="dense")


def _settings(runs: Sequence[Run], names: Sequence[str]) -> Markup:
    rows = differing([flat(run.recipe) for run in runs])
    if not rows:
        return element("p", "Their recipes are the same.", class_="about")
    columns = [Column("Setting", "text"), *(Column(name, "text") for name in names)]
    cells = [(key, *(breakable(value) for value in values)) for key, values in rows]
    return joined(
        [element("h2", "What differs in their recipes"), table(columns, cells, label="Settings", class_="dense")]
    )


def _curves(names: Sequence[str], scores: Sequence[_Rows], steps: Sequence[_Rows]) -> list[Markup]:
    kinds = sorted({key for rows in scores for row in rows for key in row if key != "step" and "/" not in key})
    sections = {
        "Losses": _charts(names, steps, _LOSSES),
        "On held-out records": _charts(names, scores, {kind: kind for kind in kinds}),
        "Pace": _charts(names, steps, _PACE),
    }
    return [
        joined([element("h2", title), curve_key(names), element("div", *charts, class_="charts")])
        for title, charts in sections.items()
        if charts
    ]


def _charts(names: Sequence[str], rows: Sequence[_Rows], wanted: Mapping[str, str]) -> list[Markup]:
    """A chart for each kind of value that some run has; a run keeps its colour where it has none."""
    charts = []
    for title, key in wanted.items():
        curves = [curve_of(name, own, key) for name, own in zip(names, rows, strict=True)]
        if any(curve.steps for curve in curves):
            charts.append(element("figure", line_chart(curves, title), element("figcaption", element("strong", title))))
    return charts
