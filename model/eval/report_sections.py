"""The sections of a report: summary, scores, groups, masks, pictures, failures, router."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from model.drawing.charts import calibration, calibration_error, curves, histogram, interval_strip, share_strip
from model.drawing.pages import (
    Column,
    Markup,
    breakable,
    count,
    element,
    interval,
    joined,
    number,
    percent,
    quoted,
    table,
)
from model.eval.metrics.definitions import CONVENTIONS, Metric
from model.eval.metrics.scores import UNNAMED, Measure, Measures
from model.eval.metrics.tables import MEAN_ROW
from model.eval.pictures import Pictures
from model.eval.predictions import Prediction
from model.eval.results import (
    TASK_TITLES,
    Cell,
    Failures,
    RowScore,
    SetResult,
    SuiteResult,
    detail_tables,
    metric_title,
)
from model.eval.suite import CURVE

MOST_UNFOLDED = 16
"""Groups that a table may have to be shown without being opened."""
MOST_GROUPS = 60
"""Rows of one table of groups; the CSV beside the report has all."""

_MODALITY_TITLES = {"ct": "CT", "mr": "MR", "x_ray": "X-ray", "x": "X-ray", "pet": "PET"}
_GROUP_TITLES = {"modality": "Modality", "kind": "Kind of question", "structure": "Structure"}
_GROUP_TITLES |= {"dataset": "Data set", "patient": "Patient"}
_PLURALS = {name: f"{name}s" for name in _GROUP_TITLES} | {"modality": "modalities", "dataset": "data sets"}
_PICTURED_TITLES = {"best": "Best", "middle": "Around the median", "worst": "Worst"}


def summary(result: SuiteResult) -> Markup:
    """The headline metrics of every set in one table."""
    rows: list[list[object]] = []
    several = len(result.sets) > 1
    one_each = several and all(len(part.headlines()) <= 1 for part in result.sets)
    reported = any(part.item.known for part in result.sets)
    blind = any(part.blind for part in result.sets)
    columns = [Column("Score", "text"), Column("Value"), Column("95 % interval"), Column("", "strip")]
    columns += [Column("Blind", meaning="What is reached without seeing the image")] if blind else []
    columns += [Column("Reported elsewhere", "text")] if reported else []
    columns += [Column("n", meaning="How many questions or masks the value is taken over")]
    for part in result.sets:
        if several and not one_each:
            rows.append([_anchor(part)])
        for metric in part.headlines():
            measure, base = part.scores.overall[metric.name], part.blind.get(("", "", metric.name))
            named = joined([_anchor(part), element("span", metric_cell(metric), class_="label")])
            row: list[object] = [named if one_each else metric_cell(metric), _value(measure), _range(measure)]
            row += [_strip(measure, metric, base), *([number(base)] if blind else [])]
            row += [_known(part, metric.name)] if reported else []
            rows.append([*row, count(measure.count)])
    return joined([table(columns, rows, class_="headlines", label="Headline scores"), _key(blind)])


def details(part: SetResult) -> Iterator[Markup]:
    """The tables of a detailed set."""
    for found in detail_tables(part):
        columns = [Column(title, "number" if index else "text") for index, title in enumerate(found.columns)]
        rows = [list(map(_detail, row)) for row in found.rows]
        note = element("p", found.note, class_="about") if found.note else ""
        yield joined([element("h3", found.title), note, table(columns, rows, label=found.title, class_="dense")])


def _detail(cell: Cell) -> object:
    if isinstance(cell, str):
        return group_title("modality", cell) if cell.islower() else cell
    if isinstance(cell, int):
        return count(cell)
    found = cell if isinstance(cell, Measure) else Measure(cell, math.nan, math.nan, 0)
    digits = 1 if abs(found.value) >= 10 else 3
    ends = interval(found.low, found.high, min(digits, 2)) if not math.isnan(found.low) else ""
    shown = element("span", number(found.value, digits), class_="value" if isinstance(cell, Measure) else None)
    return joined([shown, element("span", ends, class_="label") if ends else ""], element("br") if ends else "")


def _threshold_curve(part: SetResult) -> Markup:
    whole = part.curve[""]
    best = int(np.nanargmax(whole))
    at = CURVE.index(part.item.thresholds[0]) if part.item.thresholds[0] in CURVE else best
    said = (
        f"It is {number(whole[at])} at {CURVE[at]:g} and at most {number(whole[best])}, at {CURVE[best]:g}; "
        "a threshold chosen on the data that are scored flatters the model."
    )
    named = dict(list(part.curve.items())[: 6 if len(part.curve) > 2 else 1])
    key = [
        element("span", name or "all targets", class_=f"series-{place}") for place, name in enumerate(named, start=1)
    ]
    drawn = curves(CURVE, named, "mask threshold", "mDice")
    return _figure(drawn, [element("div", *key, class_="key"), _title("mDice over the mask threshold. "), said])


def scores(part: SetResult) -> Markup:
    """Every metric of a set, task by task."""
    found = part.scores.by("task")
    tables = [_task_table(part, task, found[task], headed=len(found) > 1) for task in in_order(found)]
    if not tables:
        return element("p", "Nothing could be scored: this set holds no question.", class_="warning")
    return joined([element("h3", "All scores"), *tables])


def _task_table(part: SetResult, task: str, measures: Measures, *, headed: bool) -> Markup:
    """One line for each metric; a metric of several mask thresholds has a column for each."""
    title = TASK_TITLES.get(task, task)
    lines: dict[str, list[tuple[Metric, Measure]]] = {}
    shown = {name.partition("@")[0] for name in part.item.headlines}
    for metric in part.scores.metrics:
        measure, name = measures.get(metric.name), metric.name.partition("@")[0]
        # a rate of mishaps that did not happen needs no line
        if measure is not None and (metric.higher_is_better or measure.value > 0 or name in shown):
            lines.setdefault(name, []).append((metric, measure))
    marks = [f"{value:g}" for value in part.item.thresholds if any(len(line) > 1 for line in lines.values())]
    columns = [Column("Metric", "text"), Column(f"At {marks[0]}" if marks else "Value"), Column("95 % interval")]
    columns += [Column("", "strip")]
    for mark_ in marks[1:]:
        columns += [Column(f"At {mark_}"), Column("95 % interval")]
    rows = []
    for line in lines.values():
        (metric, measure), *others = line
        row: list[object] = [metric_cell(metric, named_threshold=False), _value(measure), _range(measure)]
        row.append(_strip(measure, metric, None))
        row += [cell for _, other in others for cell in (_value(other), _range(other))]
        row += [""] * (len(columns) - len(row))
        rows.append([*row, count(measure.count)])
    heading = element("h4", title) if headed else ""
    return joined([heading, table([*columns, Column("n")], rows, label=f"Scores: {title}", class_="dense")])


def groups(part: SetResult, by: str) -> Markup | None:
    """The headline metrics for each group of a dimension; None where fewer than two groups are known."""
    found = {
        name: {metric: measure for metric, measure in measures.items() if measure.count}
        for name, measures in part.scores.by(by).items()
        if name != UNNAMED
    }
    metrics = [metric for metric in part.headlines() if sum(metric.name in measures for measures in found.values()) > 1]
    if not metrics:
        return None
    title, drawn = f"By {_GROUP_TITLES[by].lower()}", _side_by_side(part, by, found, metrics)
    if len(found) <= MOST_UNFOLDED:
        return joined([element("h3", title), drawn])
    return joined([element("h3", title), folded(f"{count(len(found))} {_PLURALS[by]}", drawn)])


def _side_by_side(part: SetResult, by: str, found: Mapping[str, Measures], metrics: Sequence[Metric]) -> Markup:
    """A line for each group, with a value and a bar for each metric."""
    named = [name for name, measures in found.items() if any(metric.name in measures for metric in metrics)]
    ranked = sorted(named, key=lambda name: [_rank(found[name], metric) for metric in metrics])
    columns = [Column(_GROUP_TITLES[by], "text")]
    for metric in metrics:
        columns += [Column(metric_title(metric), "pair")]
    rows: list[list[object]] = []
    for name in ranked[:MOST_GROUPS]:
        rows.append([group_title(by, name), *_pairs(part, by, name, found[name], metrics)])
    if by == "modality":
        rows.append([MEAN_ROW.capitalize(), *_pairs(part, by, "", part.scores.mean_over(by), metrics)])
    left = len(ranked) - MOST_GROUPS
    note = element("p", f"{count(left)} more are in scores.csv.", class_="note") if left > 0 else ""
    return joined([table(columns, rows, label=f"By {by}", class_="groups"), note])


def _pairs(part: SetResult, by: str, name: str, measures: Measures, metrics: Sequence[Metric]) -> Iterator[object]:
    for metric in metrics:
        measure, blind = measures.get(metric.name), part.blind.get((by, name, metric.name)) if name else None
        if measure is None:
            yield element("span", "–", class_="absent")
            continue
        ends = interval(measure.low, measure.high, 2)
        parts = [ends if ends != "–" else "", f"n {count(measure.count)}" if name else f"{measure.count} groups"]
        below = element("span", " · ".join(part for part in parts if part), class_="label")
        bar = element("div", _strip(measure, metric, blind), below, class_="pair-bar")
        yield element("div", _value(measure), bar, class_="pair-cell")


def _rank(measures: Measures, metric: Metric) -> float:
    value = measures[metric.name].value if metric.name in measures else math.inf
    return -value if metric.higher_is_better and value != math.inf else value


def group_title(by: str, name: str) -> str:
    """A group's name for people."""
    if by == "modality" and name in _MODALITY_TITLES:
        return _MODALITY_TITLES[name]
    words = name.replace("_", " ").strip()
    return words[:1].upper() + words[1:]


def masks(part: SetResult) -> Markup | None:
    """How good the masks are and how well the model knows it; None where the set has no present target."""
    if not len(part.dice):
        return None
    threshold = part.item.thresholds[0]
    poor, good = float((part.dice < 0.1).mean()), float((part.dice >= 0.9).mean())
    told = (
        f"{percent(good)} reach 0.9 and {percent(poor)} stay below 0.1, at the threshold {threshold:g}; "
        "a target without a mask counts 0."
    )
    charts = [_figure(histogram(part.dice, "Dice"), [_title("Dice of every present target. "), told])]
    if len(part.real_iou):
        error, mean = calibration_error(part.predicted_iou, part.real_iou), float(np.nanmean(part.predicted_iou))
        real = float(np.nanmean(part.real_iou))
        told = (
            f"On average the model expects an IoU of {number(mean, 2)} and reaches {number(real, 2)}; its expected "
            f"calibration error is {number(error, 3)}. Lines span the middle half, larger dots stand for more masks."
        )
        high = f"Its own score of its masks; {percent(float((part.predicted_iou >= 0.9).mean()))} are 0.9 or more."
        expected = [_title("What the model expects. "), high]
        charts.append(_figure(histogram(part.predicted_iou, "predicted IoU", series=3), expected))
        charts.append(_figure(calibration(part.predicted_iou, part.real_iou), [_title("Calibration. "), told]))
    if part.curve:
        charts.append(_threshold_curve(part))
    return joined([element("h3", "Masks"), element("div", *charts, class_="charts")])


def gallery(part: SetResult, pictures: Pictures) -> Markup | None:
    """Answers with masks from best to worst, with outlines."""
    rows = []
    for name, examples in part.pictured.items():
        figures = [_pictured(row, score, pictures) for _, row, score in examples]
        if figures:
            rows += [element("h4", _PICTURED_TITLES.get(name, name)), element("div", *figures, class_="pictures")]
    if not rows:
        return None
    key = element(
        "div",
        element("span", "predicted", class_="predicted"),
        element("span", "reference", class_="reference"),
        class_="key",
    )
    return joined([element("h3", "Masks on images"), key, *rows])


def _pictured(row: Prediction, score: RowScore, pictures: Pictures) -> Markup:
    told = [element("strong", f"Dice {number(score.dice, 2)}")]
    if score.predicted_iou is not None:
        told.append(Markup(f"predicted IoU {number(score.predicted_iou, 2)}"))
    picture = pictures.of(row) or element("p", "No picture.", class_="nothing")
    return element("figure", picture, element("figcaption", joined(told, ", "), element("br"), quoted(row.prompt, 120)))


def failures(part: SetResult, pictures: Pictures) -> Markup:
    """Every kind of failure with its count and examples, folded; kinds that did not occur in one sentence."""
    rows = [_failure(found, pictures) for found in part.failures if found.count]
    told = "Each kind counts the questions that could fail in that way, and opens to show some that did."
    clean = [f"{found.kind.title.lower()} (of {count(found.asked)})" for found in part.failures if not found.count]
    none = element("p", f"There were no {', no '.join(clean)}.", class_="note spaced") if clean else ""
    return joined([element("h3", "Failures"), element("p", told, class_="about") if rows else "", *rows, none])


def _failure(found: Failures, pictures: Pictures) -> Markup:
    share = f"{count(found.count)} of {count(found.asked)}, {percent(found.count / found.asked, 1)}"
    heading = element(
        "summary",
        element("span", found.kind.title, class_="kind"),
        element("span", share, class_="tally"),
        element("span", found.kind.meaning, class_="meaning"),
    )
    shown = (example(row, score, pictures) for _, row, score in found.examples)
    return element("details", heading, element("div", *shown, class_="examples"))


def example(row: Prediction, score: RowScore, pictures: Pictures | None) -> Markup:
    """One answer with its picture, question, reference and what it scored."""
    picture = pictures.of(row) if pictures is not None else None
    facts: list[tuple[str, object]] = [("question", quoted(row.prompt)), ("reference", quoted(row.gt))]
    facts.append(("answer", quoted(row.text)) if not row.failed else ("error", quoted(row.error or "")))
    if score.dice is not None and row.masks:
        facts.append(("Dice", number(score.dice, 2)))
    listed = element("dl", *(joined([element("dt", name), element("dd", value)]) for name, value in facts))
    known = (str(row.metadata[name]) for name in ("modality", "kind") if row.metadata.get(name))
    where = " · ".join((str(row.question_id), *known, row.image_path))
    return element(
        "div",
        picture,
        listed,
        element("span", quoted(where, 200), class_="source"),
        class_="example" if picture is not None else "example plain",
    )


def router(part: SetResult) -> Markup | None:
    """Which share of the tokens each expert computed, layer by layer, for each task; None where it is not known."""
    if not part.router:
        return None
    tasks = in_order(part.router)
    experts = part.router[tasks[0]].shape[1]
    names = [f"expert {index}" for index in range(experts)]
    columns = [Column("Layer", "text"), *(Column(TASK_TITLES.get(task, task), "pair") for task in tasks)]
    rows: list[list[object]] = []
    for layer in range(len(part.router[tasks[0]])):
        row: list[object] = [str(layer)]
        for shares in (part.router[task][layer].tolist() for task in tasks):
            bar = element("div", share_strip(shares, names), class_="pair-bar")
            row.append(element("div", element("span", percent(shares[0]), class_="value"), bar, class_="pair-cell"))
        rows.append(row)
    key = element("div", *(element("span", n, class_=f"series-{i % 6 + 1}") for i, n in enumerate(names)), class_="key")
    about = element(
        "p",
        "The share of all tokens, those of the question and the image included, that each expert computed; the number "
        "is that of expert 0. Layers are the mixture layers, counted from the input on.",
        class_="about",
    )
    return joined([element("h3", "Router"), about, key, table(columns, rows, label="Shares of the experts")])


def in_order(tasks: Iterable[str]) -> list[str]:
    """Names of tasks in the order of reports."""
    known = list(TASK_TITLES)
    return sorted(tasks, key=lambda task: (known.index(task) if task in known else len(known), task))


def facts(pairs: Mapping[str, object]) -> Markup:
    """Names and values side by side; empty values are left out."""
    cells = (
        element("div", element("dt", name), element("dd", breakable(value))) for name, value in pairs.items() if value
    )
    return element("dl", *cells, class_="facts")


def meanings(result: SuiteResult) -> Markup:
    """What each metric is, in a sentence, and what the numbers take for granted; folded."""
    used: dict[str, Metric] = {}
    for metric in (metric for part in result.sets for metric in part.scores.metrics):
        used.setdefault(metric.name.partition("@")[0], metric)
    rows = [
        [metric_title(metric).partition(" at ")[0], element("code", name), _sentence(metric.meaning)]
        for name, metric in used.items()
    ]
    columns = [Column("Metric", "text"), Column("In files", "text"), Column("Meaning", "text")]
    taken = [(name, text) for name, text in CONVENTIONS.items() if name != "intervals"]
    return joined(
        [
            folded("What each metric is", table(columns, rows, label="What each metric is", class_="dense")),
            folded(
                "Conventions", *(element("p", element("strong", _sentence(name)), f" {text}") for name, text in taken)
            ),
        ]
    )


def folded(title: str, *parts: Markup) -> Markup:
    """Parts that show when their title is opened."""
    return element("details", element("summary", element("span", title, class_="kind")), *parts)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


# --- cells ----------------------------------------------------------------------------------------------------------


def metric_cell(metric: Metric, *, named_threshold: bool = True) -> Markup:
    """A metric's name, and a word where less of it is better."""
    direction = "" if metric.higher_is_better else element("span", "lower is better", class_="direction")
    title = metric_title(metric)
    return joined([title if named_threshold else title.partition(" at ")[0], direction], " ")


def _value(measure: Measure) -> Markup:
    return element("span", number(measure.value), class_="value")


def _range(measure: Measure) -> Markup:
    return element("span", interval(measure.low, measure.high), class_="interval")


def _strip(measure: Measure, metric: Metric, blind: float | None) -> Markup:
    """A bar, for what lies between 0 and 1."""
    if metric.unit or not measure.count:
        return Markup()
    worse = not metric.higher_is_better
    return interval_strip(measure.value, measure.low, measure.high, baseline=blind, worse=worse)


def _known(part: SetResult, metric: str) -> Markup:
    said = [f"{number(known.value)} {known.who}" for known in part.item.known if known.metric == metric]
    return joined([element("span", text, class_="label") for text in said]) if said else Markup("–")


def _anchor(part: SetResult) -> Markup:
    return element("a", part.item.title, href=f"#{part.item.name}")


def _key(blind: bool) -> Markup:
    spans = [element("span", "95 % interval", class_="range")]
    if blind:
        spans.append(element("span", "what an answerer reaches that does not see the image", class_="blind"))
    return element("div", *spans, class_="key")


def _title(text: str) -> Markup:
    return element("strong", text)


def _figure(chart: Markup, caption: object) -> Markup:
    parts = caption if isinstance(caption, list) else [caption]
    return element("figure", chart, element("figcaption", *parts))
