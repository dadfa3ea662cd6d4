"""The page of ``medplib router-report``: which expert serves which task and which kind of position."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from model.drawing.charts import share_strip
from model.drawing.heatmaps import share_map
from model.drawing.lines import Curve, curve_key, line_chart
from model.drawing.pages import Column, Markup, breakable, count, element, joined, number, page, percent, table
from model.modeling.splice import POSITION_KINDS
from model.train.router_report import (
    KIND_TITLES,
    Examination,
    by_kind,
    by_task,
    findings,
    projector_by_task,
    specialisation,
)

_CELL = 66  # width
_MOST_MOMENTS = 40  # columns of the drawing of a training


def router_page(examined: Examination, training: Sequence[Mapping[str, Any]] = ()) -> str:
    """The whole page.

    Args:
        examined: what was counted.
        training: rows of ``router.jsonl``, where a run was examined.
    """
    contents = [("What stands out", "findings")]
    contents += [("Experts", "experts"), ("Modalities", "modalities")] if examined.layers else []
    contents += [("Projector", "projector")] if examined.projector is not None else []
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
            *(_layers(examined) if examined.layers else ()),
            *(_projector(examined) if examined.projector is not None else ()),
            *(_training(training) if training else ()),
        ]
    )
    return page(f"Routers of {examined.source}", body)


def _facts(examined: Examination) -> Markup:
    pairs = {
        "Checkpoint": examined.source,
        "Records read": ", ".join(f"{number_} {task}" for task, number_ in examined.records.items()),
    }
    if examined.layers:
        tokens = examined.merged([(None, None, None)]).tokens[0, 0]
        pairs |= {
            "Positions": count(int(tokens)),
            "Mixture layers": ", ".join(map(str, examined.layers)),
            "Experts": _counts(examined.experts),
        }
    if examined.projector is not None:
        pairs["Experts of the projector"] = str(examined.projector.choices.shape[-1])
    cells = (element("div", element("dt", name), element("dd", breakable(value))) for name, value in pairs.items())
    return element("dl", *cells, class_="facts")


def _counts(experts: Sequence[int]) -> str:
    """One number where all layers have as many, else that of each."""
    return str(experts[0]) if len(set(experts)) == 1 else ", ".join(map(str, experts))


def _layers(examined: Examination) -> list[Markup]:
    return [
        element("h2", "Experts", id="experts"),
        *_maps(examined),
        *_specialisation(examined),
        element("h2", "Modalities", id="modalities"),
        *_modalities(examined),
    ]


def _maps(examined: Examination) -> list[Markup]:
    rows = [f"layer {layer}" for layer in examined.layers]
    figures = []
    for kind in POSITION_KINDS:
        load = by_task(examined, kind)
        present = [at for at in range(len(examined.tasks)) if any(np.isfinite(layer[at]).any() for layer in load)]
        if not present:
            continue
        title = f"{KIND_TITLES[kind]} positions"
        shares = [layer[present].tolist() for layer in load]
        drawing = share_map(shares, rows, [examined.tasks[at] for at in present], title, cell_width=_CELL)
        tokens = int(examined.merged([(None, None, kind)]).tokens[0, 0])
        caption = element("figcaption", element("strong", _heading(kind)), f", {count(tokens)}")
        figures.append(element("figure", drawing, caption))
    about = element(
        "p",
        "A cell has the colour of the expert that takes most of a task's positions in that layer, and its share; the "
        "paler, the more evenly they are shared. A <SEG> position is the one whose state the mask is painted from.",
        class_="about",
    )
    return [about, _key(examined.most_experts), element("div", *figures, class_="maps")]


def _heading(kind: str) -> str:
    title = KIND_TITLES[kind]
    return f"{title[:1].upper()}{title[1:]} positions"


def _key(experts: int) -> Markup:
    return curve_key(_names(experts))


def _names(experts: int) -> list[str]:
    return [f"expert {expert}" for expert in range(experts)]


def _specialisation(examined: Examination) -> list[Markup]:
    parts = {"by task": specialisation(by_task(examined)), "by kind of position": specialisation(by_kind(examined))}
    parts |= {"by task, text alone": specialisation(by_task(examined, "text"))}
    whole = examined.merged([(None, None, None)])
    columns = [Column("Layer", "text"), *(Column(name) for name in parts), Column("entropy"), Column("load", "strip")]
    names = _names(examined.most_experts)
    load = examined.by_layer(whole.load)
    rows = [
        [
            str(layer),
            *(number(values[at], 2) for values in parts.values()),
            number(float(whole.mean_entropy[at, 0]), 2),
            share_strip(load[at][0].tolist(), names[: examined.experts[at]]) if np.isfinite(load[at][0]).all() else "–",
        ]
        for at, layer in enumerate(examined.layers)
    ]
    about = element(
        "p",
        "Specialisation is I(group; expert) / log(min(groups, experts)), groups counting alike: 0 where all groups "
        "use the experts alike, 1 where each keeps to one of its own. Entropy, in nats, says how unsure the router is: "
        f"{_toss_ups(examined.experts)}.",
        class_="about",
    )
    return [element("h3", "Specialisation"), about, table(columns, rows, label="Specialisation", class_="dense")]


def _toss_ups(experts: Sequence[int]) -> str:
    """The entropy at which all experts are as likely."""
    each = {own: number(math.log(own), 2) for own in sorted(set(experts))}
    if len(each) == 1:
        return f"{each[experts[0]]} is a toss-up"
    return ", ".join(f"{entropy} is a toss-up of {own}" for own, entropy in each.items())


def _modalities(examined: Examination) -> list[Markup]:
    kinds = [kind for kind in POSITION_KINDS if examined.merged([(None, None, kind)]).tokens[0, 0]]
    names = _names(examined.most_experts)
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
    return [about, _key(examined.most_experts), table(columns, rows, label="Shares by modality")]


def _projector(examined: Examination) -> list[Markup]:
    """The mixture in the projector: a map by task as of the layers, and all figures by task and by modality."""
    summary = examined.in_projector(examined.labels)
    experts = summary.choices.shape[-1]
    names = _names(experts)
    heading = element("h2", "Projector", id="projector")
    if not summary.tokens.any():
        return [heading, element("p", "No image token with finite figures was read.", class_="about")]
    load = projector_by_task(examined)
    present = [at for at in range(len(examined.tasks)) if np.isfinite(load[at]).all()]
    drawing = share_map(
        [load[present].tolist()], ["projector"], [examined.tasks[at] for at in present], "projector", cell_width=_CELL
    )
    rows: list[list[object]] = []
    for at, (task, modality) in enumerate(examined.labels):
        tokens = int(summary.tokens[0, at])
        if tokens:
            shares, likely = summary.load[0, at].tolist(), summary.mean_probability[0, at].tolist()
            entropy, dropped = float(summary.mean_entropy[0, at]), float(summary.dropped[0, at])
            rows.append([task or modality or "all", count(tokens), _shares(shares, names), _shares(likely, names),
                         number(entropy, 2), percent(dropped, 1)])  # fmt: skip
    columns = [Column("Records", "text"), Column("image tokens"), Column("load", "pair"), Column("probability", "pair"),
               Column("entropy"), Column("dropped")]  # fmt: skip
    about = element(
        "p",
        "The projector turns what the vision tower sees into the model's own tokens. It is a mixture too, with experts "
        "and a router of its own; they have nothing to do with those of a layer. The number beside a bar is that of "
        f"expert 0; an entropy of {_toss_ups([experts])}.",
        class_="about",
    )
    caption = element("figcaption", element("strong", "Image tokens"), f", {count(int(summary.tokens[0, 0]))}")
    return [
        heading,
        about,
        _key(experts),
        element("div", element("figure", drawing, caption), class_="maps"),
        table(columns, rows, label="The projector by task and by modality"),
    ]


def _shares(shares: list[float], names: list[str]) -> Markup:
    bar = element("div", share_strip(shares, names), class_="pair-bar")
    return element("div", element("span", percent(shares[0]), class_="value"), bar, class_="pair-cell")


def _training(rows: Sequence[Mapping[str, Any]]) -> list[Markup]:
    return [
        element("h2", "Over training", id="training"),
        element("p", "The same shares while the run went on, from its first step to its last.", class_="about"),
        development_key(rows),
        element("div", *development(rows), class_="maps"),
    ]


def development(rows: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """A map of layers by moments of a training for each kind of position, from rows of ``router.jsonl``.

    A mixture in the projector has a map of its own.
    """
    moments = [rows[at] for at in np.unique(np.linspace(0, len(rows) - 1, _MOST_MOMENTS).round().astype(int))]
    layers = [f"layer {layer}" for layer in rows[0]["layers"]]
    maps = []
    for kind in POSITION_KINDS:
        if any(kind in row["kinds"] for row in moments):
            loads = [row["kinds"][kind]["load"] if kind in row["kinds"] else [[]] * len(layers) for row in moments]
            maps.append(_moments_map(_heading(kind), layers, loads, moments))
    if any("projector" in row for row in moments):
        loads = [[row["projector"]["load"]] if "projector" in row else [[]] for row in moments]
        maps.append(_moments_map("Image tokens in the projector", ["projector"], loads, moments))
    return maps


def _moments_map(
    title: str, names: Sequence[str], loads: Sequence[Any], moments: Sequence[Mapping[str, Any]]
) -> Markup:
    """Loads [moments][names][experts]; an empty one, or one that holds None, is an empty cell."""
    shares = [[[math.nan if s is None else s for s in load[at]] for load in loads] for at in range(len(names))]
    steps = [f"step {row['step']}" for row in moments]
    width = max(8, min(40, 360 / len(moments)))
    drawing = share_map(shares, names, steps, f"{title} over training", cell_width=width, numbers=False)
    said = f", step {moments[0]['step']} to {moments[-1]['step']}"
    return element("figure", drawing, element("figcaption", element("strong", title), said))


def development_key(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Which colour is whose in ``development``."""
    loads = [load for row in rows for kind in row["kinds"].values() for load in kind["load"]]
    loads += [row["projector"]["load"] for row in rows if "projector" in row]
    return _key(max(map(len, loads), default=0))


def entropy_chart(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """How sure routers are while a run goes on, a curve for each kind of position and one for the projector's."""
    own = {KIND_TITLES[kind]: [(row["step"], row["kinds"][kind]["entropy"]) for row in rows if kind in row["kinds"]]
           for kind in POSITION_KINDS}  # fmt: skip
    projector = [(row["step"], [row["projector"]["entropy"]]) for row in rows if "projector" in row]
    curves = []
    for name, found in (own | ({"projector": projector} if projector else {})).items():
        means = [float(np.mean([value for value in values if value is not None] or [np.nan])) for _, values in found]
        curves.append(Curve(name, [step for step, _ in found], means))
    return joined([line_chart(curves, "Entropy of the routers"), curve_key([curve.name for curve in curves])])
