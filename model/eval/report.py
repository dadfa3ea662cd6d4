"""One self-contained HTML page of a suite's results, and the same as JSON and CSV for machines."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import itertools
import math
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from model.data.builders.jobs import whole_file
from model.drawing.pages import count, page
from model.eval import report_sections as sections
from model.eval.metrics.scores import Measures
from model.eval.pictures import MOST_BYTES, MOST_PICTURES, Pictures
from model.eval.predictions import json_text
from model.eval.results import SetResult, SuiteResult, plain_cell
from model.eval.suite import CURVE

HTML_FILE, JSON_FILE, SCORES_FILE, ROWS_FILE = "report.html", "report.json", "scores.csv", "rows.csv"
MOST_MEGABYTES = 8.0
"""Of all pictures of a page together; each data set adds some hundred kilobytes of tables."""

assert 4 / 3 * MOST_PICTURES * MOST_BYTES <= MOST_MEGABYTES * 1e6


def write_report(result: SuiteResult, folder: Path) -> list[Path]:
    """Write ``report.html``, ``report.json`` and ``scores.csv``; each is there whole or not at all.

    Returns:
        The files, in that order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole = {HTML_FILE: suite_page(result), JSON_FILE: json_text(as_json(result))}
    files = [write_text(folder / name, text) for name, text in whole.items()]
    return [*files, write_scores(result.sets, folder / SCORES_FILE)]


def suite_page(result: SuiteResult) -> str:
    """The whole page."""
    budget = MOST_PICTURES // max(1, len(result.sets))
    parts = [(part, Pictures(part.images, part.regions, budget)) for part in result.sets]
    files = {"JSON_FILE": JSON_FILE, "SCORES_FILE": SCORES_FILE, "ROWS_FILE": ROWS_FILE}
    body = sections.render("report.html", result=result, parts=parts, set_facts=_set_facts, **files)
    return page(f"{result.title}: {result.model}", body)


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
            found.kind.name: {
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
