"""Reports of suites: one self-contained HTML page, and the same as JSON and CSV for machines."""

from __future__ import annotations

import base64
import csv
import importlib.metadata
import io
import itertools
import math
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from model.data.builders.jobs import whole_file
from model.data.image_io import read_image, read_mask
from model.errors import MedPLIBError
from model.eval import pages
from model.eval.metrics.definitions import CONVENTIONS, Metric
from model.eval.metrics.scores import MEAN_ROW, UNNAMED, Measure, Measures
from model.eval.pages import Markup, calibration, count, element, number, percent
from model.eval.predictions import Key, Prediction, json_text
from model.eval.results import TASK_TITLES, SetResult, SuiteResult, detail_tables, metric_title, plain_cell
from model.eval.suite import CURVE
from model.visualize import decoded_masks, outlined

HTML_FILE, JSON_FILE, SCORES_FILE, ROWS_FILE = "report.html", "report.json", "scores.csv", "rows.csv"
MOST_MEGABYTES = 8.0
"""Of all pictures of a page together; each data set adds some hundred kilobytes of tables."""
MOST_PICTURES = 150
"""In one report; further ones are left out and the report says so."""
MOST_BYTES = 40_000
"""Of one picture as JPEG."""

assert 4 / 3 * MOST_PICTURES * MOST_BYTES <= MOST_MEGABYTES * 1e6


def write_report(result: SuiteResult, folder: Path) -> list[Path]:
    """Write ``report.html``, ``report.json`` and ``scores.csv``, each whole or not at all; returns them in order."""
    folder.mkdir(parents=True, exist_ok=True)
    budget = MOST_PICTURES // max(1, len(result.sets))
    parts = [(part, Pictures(part.images, part.regions, budget)) for part in result.sets]
    files = {"JSON_FILE": JSON_FILE, "SCORES_FILE": SCORES_FILE, "ROWS_FILE": ROWS_FILE}
    body = render("report.html", result=result, parts=parts, set_facts=_set_facts, **files)
    page = pages.page(f"{result.title}: {result.model}", body)
    whole = {HTML_FILE: page, JSON_FILE: json_text(as_json(result))}
    written = [write_text(folder / name, text) for name, text in whole.items()]
    return [*written, write_scores(result.sets, folder / SCORES_FILE)]


def _set_facts(part: SetResult) -> dict[str, str]:
    item = part.item
    return {
        "Questions": count(part.questions),
        "Split": item.split,
        "Version": item.version,
        "Source": item.source,
        "Licence of the data": item.licence,
        "Mask thresholds": ", ".join(f"{value:g}" for value in item.thresholds) if len(part.dice) else "",
        "Masks": "decoded for every request, said or not" if item.always_mask else "",
        "Prompt": "as in training" if item.prompt == "training" else "as in the published evaluation",
        "Answering took": f"{took:.1f} s, {part.questions / took:.1f} answers/s" if (took := part.seconds) else "",
    }


# --- for machines ---------------------------------------------------------------------------------------------------


def as_json(result: SuiteResult) -> dict[str, Any]:
    """All numbers of a report; what is not defined is null."""
    return {
        "format": 1,
        "suite": result.title,
        "model": result.model,
        "facts": dict(result.facts),
        "command": result.command,
        "sets": [_set_json(part) for part in result.sets],
    }


def _set_json(part: SetResult) -> dict[str, Any]:
    item = part.item
    blind = [
        {"by": by, "group": group, "metric": metric, "value": round(value, 6)}
        for (by, group, metric), value in part.blind.items()
    ]
    return {
        "name": item.name,
        "title": item.title,
        "task": item.task,
        "split": item.split,
        "version": item.version,
        "licence": item.licence,
        "source": item.source,
        "records": [str(path) for path in item.files()],
        "images": str(part.images),
        "prompt": item.prompt,
        "always_mask": item.always_mask,
        "thresholds": list(item.thresholds),
        "surface": item.surface,
        "headlines": list(item.headlines),
        "scores": part.scores.to_dict(),
        "blind": blind,
        "known": [{"metric": known.metric, "value": known.value, "who": known.who} for known in item.known],
        "failures": {
            found.name: {
                "count": found.count,
                "asked": found.asked,
                "examples": [row.question_id for _, row, _ in found.examples],
            }
            for found in part.failures
        },
        "baselines": [
            {"name": found.name, "how": found.how, "mDice": [[*group, dice] for group, dice in found.dice.items()]}
            for found in part.baselines
        ],
        "curve": {"thresholds": list(CURVE), "mDice": dict(part.curve)} if part.curve else None,
        "router": {task: shares.round(4).tolist() for task, shares in part.router.items()},
        "seconds": round(part.seconds, 3),
    }


def write_scores(sets: Iterable[SetResult], path: Path) -> Path:
    """One line for each set, group and metric: ``set,by,group,metric,value,low,high,count,blind``."""
    lines: list[list[object]] = []
    for part in sets:
        tables: list[tuple[str, str, Measures]] = [("", "", part.scores.overall)]
        tables += [("mean over patients", "", means)] if (means := part.scores.mean_over("patient")) else []
        tables += [(by, name, found) for by in part.scores.dimensions for name, found in part.scores.by(by).items()]
        for by, name, found in tables:
            for metric, measure in found.items():
                values = (_cell(value) for value in (measure.value, measure.low, measure.high))
                blind = _cell(part.blind.get((by, name, metric)))
                lines.append([part.item.name, by, plain_cell(name), metric, *values, measure.count, blind])
        for name, curve in part.curve.items():
            lines += [
                [part.item.name, "threshold", plain_cell(name), f"mDice@{at:g}", _cell(dice), "", "", "", ""]
                for at, dice in zip(CURVE, curve, strict=True)
            ]
    head = ["set", "by", "group", "metric", "value", "low", "high", "count", "blind"]
    return write_csv(path, head, lines)


def write_csv(path: Path, head: list[str], lines: Iterable[Iterable[object]]) -> Path:
    """A CSV file, whole or not at all."""
    with whole_file(path) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8", errors="replace", newline="")
        csv.writer(text).writerows(itertools.chain([head], lines))
        text.detach()
    return path


def _cell(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.6f}"


def write_text(path: Path, text: str) -> Path:
    """A text file, whole or not at all."""
    with whole_file(path, empty=True) as stream:
        stream.write(text.encode("utf-8", errors="replace"))
    return path


def version() -> str:
    """Of this code: the package's, and the commit where it is run from a checkout."""
    parts = []
    with suppress(importlib.metadata.PackageNotFoundError):
        parts.append(f"medplib {importlib.metadata.version('medplib')}")
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists():
        with suppress(OSError, subprocess.SubprocessError):
            command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
            found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
            parts.append(f"commit {found.stdout.strip()}")
    return ", ".join(parts)


# --- pictures -------------------------------------------------------------------------------------------------------


class Pictures:
    """Makes the pictures of one report and counts them.

    Args:
        images: folder that image paths start from.
        regions: mask files of the regions that a question points at, by its key.
        most: pictures before no more are made.

    Attributes:
        made: pictures so far.
        left_out: pictures that were asked for after that.
    """

    def __init__(self, images: Path, regions: Mapping[Key, Sequence[Path]] | None = None, most: int = MOST_PICTURES):
        self.images = images
        self.regions = regions or {}
        self.most = most
        self.made = 0
        self.left_out = 0

    def of(self, row: Prediction) -> Markup | None:
        """The image of an answer with its outlines; None where it cannot be read or the report is full."""
        if self.made >= self.most:
            self.left_out += 1
            return None
        pixels = None
        for name in (row.image_path, f"{row.image_path}.png"):  # some published records lack the suffix
            with suppress(MedPLIBError):
                pixels = pixels if pixels is not None else read_image(self.images / name).pixels
        if pixels is None:
            return None
        self.made += 1
        regions = []
        for path in self.regions.get(row.key, ()):
            with suppress(MedPLIBError):
                regions.append(read_mask(path))
        predicted, reference = decoded_masks(m.get("rle") for m in row.masks), decoded_masks(row.gt_masks or ())
        picture = outlined(pixels, predicted, reference, regions)
        drawn = f"{len(row.masks)} predicted"
        drawn += f" and {len(row.gt_masks)} reference" if row.gt_masks is not None else ""
        description = f"The image of question {row.question_id} with {drawn} outlines"
        return element("img", src=data_uri(picture), alt=description, loading="lazy", decoding="async")


def data_uri(picture: np.ndarray, most_bytes: int = MOST_BYTES) -> str:
    """A picture uint8 [H, W, 3] as JPEG in a ``data:`` address, its quality lowered until it is small enough."""
    content = b""
    for quality in (82, 70, 55, 40, 25):
        stream = io.BytesIO()
        Image.fromarray(picture).save(stream, format="JPEG", quality=quality, optimize=True)
        content = stream.getvalue()
        if len(content) <= most_bytes:
            break
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode('ascii')}"


# --- what the templates call ----------------------------------------------------------------------------------------

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


def dice_note(part: SetResult) -> str:
    """How many masks are good and how many poor."""
    poor, good = float((part.dice < 0.1).mean()), float((part.dice >= 0.9).mean())
    return (
        f"{percent(good)} reach 0.9 and {percent(poor)} stay below 0.1, at the threshold {part.item.thresholds[0]:g}; "
        "a target without a mask counts 0."
    )


def calibration_notes(part: SetResult) -> tuple[str, str, Markup]:
    """What the model expects of its masks, how true that is, and the chart."""
    chart, error = calibration(part.predicted_iou, part.real_iou)
    mean, real = float(np.nanmean(part.predicted_iou)), float(np.nanmean(part.real_iou))
    return (
        f"Its own score of its masks; {percent(float((part.predicted_iou >= 0.9).mean()))} are 0.9 or more.",
        f"On average the model expects an IoU of {number(mean, 2)} and reaches {number(real, 2)}; its expected "
        f"calibration error is {number(error, 3)}. Lines span the middle half, larger dots stand for more masks.",
        chart,
    )


def threshold_curve(part: SetResult) -> tuple[dict[str, list[float]], str]:
    """Curves of mDice over the mask threshold by structure, and where that of all is best."""
    whole = part.curve[""]
    best = int(np.nanargmax(whole))
    at = CURVE.index(part.item.thresholds[0]) if part.item.thresholds[0] in CURVE else best
    note = (
        f"It is {number(whole[at])} at {CURVE[at]:g} and at most {number(whole[best])}, at {CURVE[best]:g}; "
        "a threshold chosen on the data that are scored flatters the model."
    )
    return dict(list(part.curve.items())[: 6 if len(part.curve) > 2 else 1]), note


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
    function.__name__: function
    for function in (
        *(pages.breakable, count, pages.interval, number, percent, pages.quoted, pages.curves, pages.histogram),
        *(pages.rounded, one_headline_each, detail_tables, metric_lines, ranked_groups, group_title, dice_note),
        *(calibration_notes, threshold_curve, source_of, in_order, metrics_used, sentence, clamped, metric_title),
    )
}
_TEMPLATES.globals |= {
    **{"CONVENTIONS": CONVENTIONS, "CURVE": CURVE, "TASK_TITLES": TASK_TITLES, "MEAN_ROW": MEAN_ROW},
    **{"GROUP_TITLES": GROUP_TITLES, "PLURALS": PLURALS, "PICTURED_TITLES": PICTURED_TITLES},
    **{"MOST_UNFOLDED": MOST_UNFOLDED, "MOST_GROUPS": MOST_GROUPS},
}


def render(template: str, **values: Any) -> Markup:
    """A template of this package, filled in; whatever is no ``Markup`` is escaped."""
    return Markup(_TEMPLATES.get_template(template).render(**values))


_SECTIONS: Any = _TEMPLATES.get_template("sections.html").module
facts, folded, gallery, failures = _SECTIONS.facts, _SECTIONS.folded, _SECTIONS.gallery, _SECTIONS.failures
"""Sections that other pages use: names and values, parts that open, masks on images, failures by kind."""
