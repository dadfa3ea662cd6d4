"""The page of ``medplib router-report``: which expert serves which task and which kind of position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from model.drawing.charts import share_strip
from model.drawing.heatmaps import share_map
from model.drawing.lines import Curve, curve_key, line_chart
from model.drawing.pages import Column, Markup, breakable, count, element, joined, number, page, percent, table
from model.modeling.splice import POSITION_KINDS
from model.train.router_report import KIND_TITLES, Examination, by_kind, by_task, findings, specialisation

_MOST_MOMENTS = 40  # columns of the drawing of a training


def router_page(examined: Examination, training: Sequence[Mapping[str, Any]] = ()) -> str:
    """The whole page.

    Args:
        examined: what was counted.
        training: rows of ``router.jsonl``, where a run was examined.
    """
    contents = [("What stands out", "findings"), ("Experts", "experts"), ("Modalities", "modalities")]
    contents += [("Over training", "training")] if training else []
    body = joined(
        [
            element(
                "header",
                element("p", "MedPLIB routers", class_="eyebrow"),
                element("h1", "Which expert serves what"),
                element(
                    "p", "A router sends every position of a sequence to its experts, layer by layer.", class_="lead"
                ),
                _facts(examined),
                element("nav", *(element("a", title, href=f"#{name}") for title, name in contents)),
            ),
            element("h2", "What stands out", id="findings"),
            element("ul", *(element("li", sentence) for sentence in findings(examined)), class_="findings"),
            element("h2", "Experts", id="experts"),
            *_maps(examined),
            *_specialisation(examined),
            element("h2", "Modalities", id="modalities"),
            *_modalities(examined),
            *(_training(training) if training else ()),
        ]
    )
    return page(f"Routers of {examined.source}", body)


def _facts(examined: Examination) -> Markup:
    tokens = examined.merged([(None, None, None)]).tokens[0, 0]
    pairs = {
        "Checkpoint": examined.source,
        "Records read": ", ".join(f"{number_} {task}" for task, number_ in examined.records.items()),
        "Positions": count(int(tokens)),
        "Mixture layers": ", ".join(map(str, examined.layers)),
        "Experts": str(examined.experts),
    }
    cells = (element("div", element("dt", name), element("dd", breakable(value))) for name, value in pairs.items())
    return element("dl", *cells, class_="facts")


def _maps(examined: Examination) -> list[Markup]:
    rows = [f"layer {layer}" for layer in examined.layers]
    figures = []
    for kind in POSITION_KINDS:
        load = by_task(examined, kind)
        present = [at for at in range(len(examined.tasks)) if np.isfinite(load[:, at]).any()]
        if not present:
            continue
        title = f"{KIND_TITLES[kind]} positions"
        drawing = share_map(
            load[:, present].tolist(), rows, [examined.tasks[at] for at in present], title, cell_width=66
        )
        tokens = int(examined.merged([(None, None, kind)]).tokens[0, 0])
        caption = element("figcaption", element("strong", _heading(kind)), f", {count(tokens)}")
        figures.append(element("figure", drawing, caption))
    about = element(
        "p",
        "A cell has the colour of the expert that takes most of a task's positions in that layer, and its share; the "
        "paler, the more evenly they are shared. A <SEG> position is the one whose state the mask is painted from.",
        class_="about",
    )
    return [about, _key(examined.experts), element("div", *figures, class_="maps")]


def _heading(kind: str) -> str:
    title = KIND_TITLES[kind]
    return f"{title[:1].upper()}{title[1:]} positions"


def _key(experts: int) -> Markup:
    return curve_key([f"expert {expert}" for expert in range(experts)])


def _specialisation(examined: Examination) -> list[Markup]:
    parts = {"by task": specialisation(by_task(examined)), "by kind of position": specialisation(by_kind(examined))}
    parts |= {"by task, text alone": specialisation(by_task(examined, "text"))}
    whole = examined.merged([(None, None, None)])
    columns = [Column("Layer", "text"), *(Column(name) for name in parts), Column("entropy"), Column("load", "strip")]
    names = [f"expert {expert}" for expert in range(examined.experts)]
    rows = [
        [
            str(layer),
            *(number(values[at], 2) for values in parts.values()),
            number(float(whole.mean_entropy[at, 0]), 2),
            share_strip(whole.load[at, 0].tolist(), names),
        ]
        for at, layer in enumerate(examined.layers)
    ]
    about = element(
        "p",
        "Specialisation is I(group; expert) / log(min(groups, experts)), groups counting alike: 0 where all groups "
        "use the experts alike, 1 where each keeps to one of its own. Entropy, in nats, says how unsure the router is: "
        f"{number(float(np.log(max(examined.experts, 1))), 2)} is a toss-up.",
        class_="about",
    )
    return [element("h3", "Specialisation"), about, table(columns, rows, label="Specialisation", class_="dense")]


def _modalities(examined: Examination) -> list[Markup]:
    kinds = [kind for kind in POSITION_KINDS if examined.merged([(None, None, kind)]).tokens[0, 0]]
    names = [f"expert {expert}" for expert in range(examined.experts)]
    rows = []
    for modality in examined.modalities:
        summary = examined.merged([(None, modality, kind) for kind in kinds])
        cells: list[object] = [modality]
        for at in range(len(kinds)):
            shares = summary.choices[:, at].sum(dim=0)
            total = float(shares.sum())
            cells.append(_shares((shares / total).tolist(), names) if total else "–")
        rows.append(cells)
    columns = [Column("Modality", "text"), *(Column(KIND_TITLES[kind], "pair") for kind in kinds)]
    about = element("p", "Shares over all layers together; the number is that of expert 0.", class_="about")
    return [about, _key(examined.experts), table(columns, rows, label="Shares by modality")]


def _shares(shares: list[float], names: list[str]) -> Markup:
    bar = element("div", share_strip(shares, names), class_="pair-bar")
    return element("div", element("span", percent(shares[0]), class_="value"), bar, class_="pair-cell")


def _training(rows: Sequence[Mapping[str, Any]]) -> list[Markup]:
    return [
        element("h2", "Over training", id="training"),
        element("p", "The same shares while the run went on, from its first step to its last.", class_="about"),
        element("div", *development(rows), class_="maps"),
    ]


def development(rows: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """A map of layers by moments of a training for each kind of position, from rows of ``router.jsonl``."""
    moments = [rows[at] for at in np.unique(np.linspace(0, len(rows) - 1, _MOST_MOMENTS).round().astype(int))]
    layers = [f"layer {layer}" for layer in rows[0]["layers"]]
    experts = max(len(load) for row in rows for kind in row["kinds"].values() for load in kind["load"])
    empty = [float("nan")] * experts
    figures = []
    for kind in POSITION_KINDS:
        if not any(kind in row["kinds"] for row in moments):
            continue
        loads = [row["kinds"][kind]["load"] if kind in row["kinds"] else [empty] * len(layers) for row in moments]
        shares = [[[float("nan") if s is None else s for s in load[at]] for load in loads] for at in range(len(layers))]
        steps = [f"step {row['step']}" if at in (0, len(moments) - 1) else "" for at, row in enumerate(moments)]
        width = max(8, min(40, 360 / len(moments)))
        title = f"{KIND_TITLES[kind]} positions over training"
        drawing = share_map(shares, layers, steps if width * len(moments) > 120 else [""] * len(moments), title,
                            cell_width=width, numbers=False)  # fmt: skip
        said = f", step {moments[0]['step']} to {moments[-1]['step']}"
        caption = element("figcaption", element("strong", _heading(kind)), said)
        figures.append(element("figure", drawing, caption))
    return figures


def entropy_chart(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """How sure routers are while a run goes on, a curve for each kind of position."""
    curves = []
    for kind in POSITION_KINDS:
        own = [(row["step"], row["kinds"][kind]["entropy"]) for row in rows if kind in row["kinds"]]
        means = [float(np.mean([value for value in values if value is not None] or [np.nan])) for _, values in own]
        curves.append(Curve(KIND_TITLES[kind], [step for step, _ in own], means))
    return joined([line_chart(curves, "Entropy of the routers"), curve_key([curve.name for curve in curves])])
