"""Metrics as plain text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model.eval.metrics.definitions import Metric
    from model.eval.metrics.scores import Measure

MEAN_ROW = "mean of these"


def overall_table(metrics: Sequence[Metric], measures: Mapping[str, Measure]) -> str:
    """One line for each metric: value, 95 % interval, number of things it is taken over."""
    lines = [["metric", "value", "95 % interval", "n", "meaning"]]
    for m in metrics:
        if (found := measures.get(m.name)) is not None:
            value = f"{number(found.value)} {m.unit}".strip()
            lines.append([m.name, value, span(found.low, found.high), str(found.count), m.meaning])
    return aligned(lines, left=(0, 2, 4))


def grouped_table(
    dimension: str, metrics: Sequence[Metric], groups: Mapping[str, Mapping[str, Measure]], means: Mapping[str, Measure]
) -> str:
    """The main metrics of each group with their intervals, and their unweighted mean where ``means`` has any."""
    shown = [m for m in metrics if m.headline and any(m.name in measures for measures in groups.values())]
    rows = [*groups.items(), *([(MEAN_ROW, means)] if means else [])]
    lines = [[dimension, *(metric.name for metric in shown)]]
    lines += [[name, *(_cell(measures.get(metric.name)) for metric in shown)] for name, measures in rows]
    return aligned(lines)


def number(value: float) -> str:
    """A value with four decimals, large ones with fewer; – for NaN."""
    if math.isnan(value):
        return "–"
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.1f}"


def span(low: float, high: float) -> str:
    """An interval in brackets; nothing where there is none."""
    return "" if math.isnan(low) else f"[{number(low)}, {number(high)}]"


def aligned(lines: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Cells in columns, a rule under the first line; columns are flush right but those in ``left``."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (lines[0], rule, *lines[1:])
    )


def _cell(measure: Measure | None) -> str:
    return "–" if measure is None else f"{number(measure.value)} {span(measure.low, measure.high)}".rstrip()
