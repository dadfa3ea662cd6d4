"""The sections of a report (``templates/sections.html``): what their templates call, and those that other pages use."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from model.drawing.charts import calibration, calibration_error, curves, histogram, rounded
from model.drawing.pages import Markup, breakable, count, interval, number, percent, quoted
from model.eval.metrics.definitions import CONVENTIONS, Metric
from model.eval.metrics.scores import MEAN_ROW, UNNAMED, Measure, Measures
from model.eval.predictions import Prediction
from model.eval.results import TASK_TITLES, SetResult, SuiteResult, detail_tables, metric_title
from model.eval.suite import CURVE

MOST_UNFOLDED = 16
"""Groups that a table may have to be shown without being opened."""
MOST_GROUPS = 60
"""Rows of one table of groups; the CSV beside the report has all."""
GROUP_TITLES = {"modality": "Modality", "kind": "Kind of question", "structure": "Structure"}
GROUP_TITLES |= {"dataset": "Data set", "patient": "Patient"}
PLURALS = {name: f"{name}s" for name in GROUP_TITLES} | {"modality": "modalities", "dataset": "data sets"}
PICTURED_TITLES = {"best": "Best", "middle": "Around the median", "worst": "Worst"}

_MODALITY_TITLES = {"ct": "CT", "mr": "MR", "x_ray": "X-ray", "x": "X-ray", "pet": "PET"}


def one_headline_each(result: SuiteResult) -> bool:
    """Whether every set has a line of its own in the summary."""
    return all(len(part.headlines()) <= 1 for part in result.sets)


def metric_lines(part: SetResult, measures: Measures) -> tuple[list[list[tuple[Metric, Measure]]], list[float]]:
    """A line for each metric with its measure at each mask threshold, and the thresholds where any line has several."""
    lines: dict[str, list[tuple[Metric, Measure]]] = {}
    shown = {name.partition("@")[0] for name in part.item.headlines}
    for metric in part.scores.metrics:
        measure, name = measures.get(metric.name), metric.name.partition("@")[0]
        # a rate of mishaps that did not happen needs no line
        if measure is not None and (metric.higher_is_better or measure.value > 0 or name in shown):
            lines.setdefault(name, []).append((metric, measure))
    several = any(len(line) > 1 for line in lines.values())
    return list(lines.values()), list(part.item.thresholds) if several else []


def ranked_groups(part: SetResult, by: str) -> tuple[list[Metric], list[str], int]:
    """Headline metrics that more than one group of a dimension has, its groups from best to worst, and how many are
    known."""
    found = {
        name: {metric: measure for metric, measure in measures.items() if measure.count}
        for name, measures in part.scores.by(by).items()
        if name != UNNAMED
    }
    metrics = [metric for metric in part.headlines() if sum(metric.name in measures for measures in found.values()) > 1]

    def rank(name: str) -> list[float]:
        values = [(metric, found[name].get(metric.name)) for metric in metrics]
        return [math.inf if m is None else -m.value if metric.higher_is_better else m.value for metric, m in values]

    named = [name for name, measures in found.items() if any(metric.name in measures for metric in metrics)]
    return metrics, sorted(named, key=rank), len(found)


def group_title(by: str, name: str) -> str:
    """A group's name for people."""
    if by == "modality" and name in _MODALITY_TITLES:
        return _MODALITY_TITLES[name]
    words = name.replace("_", " ").strip()
    return words[:1].upper() + words[1:]


def masks_said(part: SetResult) -> str:
    """How many masks are good and how many poor."""
    poor, good = float((part.dice < 0.1).mean()), float((part.dice >= 0.9).mean())
    return (
        f"{percent(good)} reach 0.9 and {percent(poor)} stay below 0.1, at the threshold {part.item.thresholds[0]:g}; "
        "a target without a mask counts 0."
    )


def expected_said(part: SetResult) -> tuple[str, str]:
    """What the model expects of its masks, and how true that is."""
    error, mean = calibration_error(part.predicted_iou, part.real_iou), float(np.nanmean(part.predicted_iou))
    real, high = float(np.nanmean(part.real_iou)), float((part.predicted_iou >= 0.9).mean())
    return (
        f"Its own score of its masks; {percent(high)} are 0.9 or more.",
        f"On average the model expects an IoU of {number(mean, 2)} and reaches {number(real, 2)}; its expected "
        f"calibration error is {number(error, 3)}. Lines span the middle half, larger dots stand for more masks.",
    )


def threshold_curve(part: SetResult) -> tuple[dict[str, list[float]], str]:
    """Curves of mDice over the mask threshold by structure, and where that of all is best."""
    whole = part.curve[""]
    best = int(np.nanargmax(whole))
    at = CURVE.index(part.item.thresholds[0]) if part.item.thresholds[0] in CURVE else best
    said = (
        f"It is {number(whole[at])} at {CURVE[at]:g} and at most {number(whole[best])}, at {CURVE[best]:g}; "
        "a threshold chosen on the data that are scored flatters the model."
    )
    return dict(list(part.curve.items())[: 6 if len(part.curve) > 2 else 1]), said


def source_of(row: Prediction) -> str:
    """Where an answer is from."""
    known = (str(row.metadata[name]) for name in ("modality", "kind") if row.metadata.get(name))
    return " · ".join((str(row.question_id), *known, row.image_path))


def in_order(tasks: Iterable[str]) -> list[str]:
    """Names of tasks in the order of reports."""
    known = list(TASK_TITLES)
    return sorted(tasks, key=lambda task: (known.index(task) if task in known else len(known), task))


def metrics_used(result: SuiteResult) -> Mapping[str, Metric]:
    """Every metric of a report by its name in files, without a threshold."""
    used: dict[str, Metric] = {}
    for metric in (metric for part in result.sets for metric in part.scores.metrics):
        used.setdefault(metric.name.partition("@")[0], metric)
    return used


def sentence(text: str) -> str:
    """Text with a capital and a full stop."""
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def clamped(value: float, low: float = 0.0) -> float:
    """The nearest value from ``low`` to 1; NaN stays."""
    return value if math.isnan(value) else max(low, min(1.0, value))


_TEMPLATES = Environment(
    loader=PackageLoader("model.eval"), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
)
_TEMPLATES.globals |= {
    named.__name__: named
    for named in (
        *(breakable, count, interval, number, percent, quoted, calibration, curves, histogram, rounded),
        *(one_headline_each, detail_tables, metric_lines, ranked_groups, group_title, masks_said),
        *(expected_said, threshold_curve, source_of, in_order, metrics_used, sentence, clamped, metric_title),
    )
}
_TEMPLATES.globals |= {"CONVENTIONS": CONVENTIONS, "CURVE": CURVE, "TASK_TITLES": TASK_TITLES, "MEAN_ROW": MEAN_ROW}
_TEMPLATES.globals |= {"GROUP_TITLES": GROUP_TITLES, "PLURALS": PLURALS, "PICTURED_TITLES": PICTURED_TITLES}
_TEMPLATES.globals |= {"MOST_UNFOLDED": MOST_UNFOLDED, "MOST_GROUPS": MOST_GROUPS}


def render(template: str, **values: Any) -> Markup:
    """A template of this package, filled in; whatever is no ``Markup`` is escaped."""
    return Markup(_TEMPLATES.get_template(template).render(**values))


_SECTIONS: Any = _TEMPLATES.get_template("sections.html").module
facts, folded, gallery, failures = _SECTIONS.facts, _SECTIONS.folded, _SECTIONS.gallery, _SECTIONS.failures
"""Sections that other pages use: names and values, parts that open, masks on images, failures by kind."""
