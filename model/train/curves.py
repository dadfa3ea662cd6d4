"""The page of ``medplib curves``: what a run's metrics.jsonl, validation.jsonl and router.jsonl hold, drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model.data.schema import TASKS
from model.drawing.lines import Curve, curve_key, line_chart
from model.drawing.pages import Markup, breakable, count, element, joined, number, page
from model.errors import MedPLIBError
from model.train.journal import METRICS_FILE, ROUTER_FILE, VALIDATION_FILE, read_rows
from model.train.router_page import development, development_key, entropy_chart

_RATES = {
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "samples_per_s": "Samples a second",
    "padding": "Padding",
}
_PARTS = ("ce", "router_aux", "bce", "dice", "focal", "iou")


def curves_page(run: Path) -> str:
    """The whole page of a run, finished or not.

    Raises:
        MedPLIBError: the folder holds no step of a run.
    """
    rows = read_rows(run / METRICS_FILE)
    if not rows:
        raise MedPLIBError(f"{run} holds no steps of a run ({METRICS_FILE}); name a recipe's output folder")
    scores, routers = read_rows(run / VALIDATION_FILE), read_rows(run / ROUTER_FILE)
    tasks = [task for task in TASKS if any(f"ce/{task}" in row for row in rows)]
    facts = {"Run": str(run), "Steps": count(rows[-1]["step"]), "Loss at the end": number(rows[-1]["loss"])}
    cells = (element("div", element("dt", name), element("dd", breakable(value))) for name, value in facts.items())
    body = [
        element(
            "header",
            element("p", "MedPLIB training", class_="eyebrow"),
            element("h1", run.name or str(run)),
            element("dl", *cells, class_="facts"),
        ),
        _section("Losses", _losses(rows, tasks)),
        _section("On held-out records", _scores(scores)) if scores else "",
        _section("Pace", [_figure(title, rows, {title: name}) for name, title in _RATES.items()]),
        *(_routers(routers) if routers else ()),
    ]
    return page(f"{run.name}: curves", joined(body))


def _losses(rows: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> list[Markup | None]:
    parts = {name: name for name in _PARTS if any(row.get(name) for row in rows)}
    modalities = _labels(rows, "ce", without=tasks)
    return [
        _figure("Loss", rows, {"loss": "loss"}),
        _figure("Cross-entropy by task", rows, {task: f"ce/{task}" for task in tasks}),
        _figure("Mask losses, over masks", rows, _masks(rows)),
        _figure("Parts of the loss, unweighted", rows, parts),
        _figure("Cross-entropy by modality", rows, {label: f"ce/{label}" for label in modalities}),
        _figure("Dice loss by modality", rows, {label: f"dice/{label}" for label in modalities}),
    ]


def _masks(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    return {
        name: f"{name}/grounding" for name in ("dice", "bce", "focal") if any(f"{name}/grounding" in r for r in rows)
    }


def _scores(rows: Sequence[Mapping[str, Any]]) -> list[Markup | None]:
    names = [name for row in rows for name in row]
    dices = sorted({name for name in names if name.startswith("dice@") and "/" not in name})
    shares = ("closed", "open", "region", "seg_said", "false_masks")
    by_task = [task for task in TASKS if f"ce/{task}" in names]
    return [
        _figure("Cross-entropy by task", rows, {task: f"ce/{task}" for task in by_task}),
        _figure("Dice of masks", rows, {name: name for name in dices}),
        _figure("Rows answered exactly, and <SEG>", rows, {name: name for name in shares if name in names}),
        *(
            _figure(f"{name} by modality", rows, {label: f"{name}/{label}" for label in _labels(rows, name)})
            for name in dices[-1:]
        ),
    ]


def _labels(rows: Sequence[Mapping[str, Any]], name: str, without: Sequence[str] = ()) -> list[str]:
    found = {key.partition("/")[2] for row in rows for key in row if key.startswith(f"{name}/")}
    return sorted(found - set(without))


def _figure(title: str, rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> Markup | None:
    curves = [curve for told, name in names.items() if (curve := curve_of(told, rows, name)).steps]
    if not curves:
        return None
    pages = [curves[start : start + 6] for start in range(0, len(curves), 6)]  # six colours are told apart
    charts = []
    for part in pages:
        key = curve_key([curve.name for curve in part]) if len(curves) > 1 else None
        heading = element("figcaption", element("strong", title))
        charts.append(element("figure", line_chart(part, title), key, heading))
    return joined(charts)


def curve_of(told: str, rows: Sequence[Mapping[str, Any]], name: str) -> Curve:
    """What rows hold under a name, by their steps; values that are no finite numbers are left out."""
    own = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), (int, float))]
    own = [(step, value) for step, value in own if math.isfinite(value)]
    return Curve(told, [step for step, _ in own], [value for _, value in own])


def _section(title: str, figures: Sequence[Markup | None]) -> Markup:
    return joined([element("h2", title), element("div", *figures, class_="charts")])


def _routers(rows: Sequence[Mapping[str, Any]]) -> list[Markup]:
    chart = element("figure", entropy_chart(rows), element("figcaption", element("strong", "Entropy of the routers")))
    about = "Colour: the expert that takes most of the positions; the paler, the more evenly they are shared."
    return [
        element("h2", "Routers"),
        element("p", about, class_="about"),
        development_key(rows),
        element("div", *development(rows), class_="maps"),
        element("div", chart, class_="charts"),
    ]
