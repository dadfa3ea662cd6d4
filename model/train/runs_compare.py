"""What differs between training runs, and their figures side by side."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from model.train.runs import Run, list_text

_BLOCKS = " ▁▂▃▄▅▆▇█"
_WIDTH = 40


def compare_text(runs: Sequence[Run], losses: Sequence[Sequence[float]]) -> str:
    """Status lines, differing settings, last and best figures, and loss curves.

    Args:
        runs: two or more.
        losses: of each run, by step.
    """
    names = [str(run.folder) for run in runs]
    parts = [list_text(runs)]
    sections = {
        "recipe": [flat(run.recipe) for run in runs],
        "code and machine": [flat(_environment(run)) for run in runs],
        "data": [flat(run.record.get("data") or {}) for run in runs],
    }
    for title, values in sections.items():
        rows = differing(values)
        parts.append(f"{title}: {'the same' if not rows else ''}".rstrip())
        if rows:
            parts[-1] += "\n" + _table(rows, names)
    figures = [{**_last(run), **{f"best {name}": value for name, value in run.best.items()}} for run in runs]
    keys = list(dict.fromkeys(key for values in figures for key in values))
    parts.append("figures:\n" + _table([(key, [_shown(values.get(key)) for values in figures]) for key in keys], names))
    low = min((min(curve) for curve in losses if curve), default=0.0)
    high = max((max(curve) for curve in losses if curve), default=1.0)
    curves = [f"  {sparkline(curve, low, high)}  {name}" for curve, name in zip(losses, names, strict=True)]
    parts.append(f"loss by step, from {low:.4g} to {high:.4g}:\n" + "\n".join(curves))
    return "\n\n".join(parts)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def differing(values: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Keys whose values are not the same in all, with the values."""
    keys = dict.fromkeys(key for mapping in values for key in mapping)
    rows = [(key, [_shown(mapping.get(key)) for mapping in values]) for key in keys]
    return [(key, shown) for key, shown in rows if len(set(shown)) > 1 and key != "output"]


def sparkline(values: Sequence[float], low: float, high: float) -> str:
    """A curve in block characters, means of equal spans of steps."""
    if not values:
        return "(no steps)".ljust(_WIDTH)
    count = min(_WIDTH, len(values))
    ends = [len(values) * index // count for index in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(ends)]
    reach = (high - low) or 1.0
    return "".join(_BLOCKS[1 + round((mean - low) / reach * 7)] for mean in means).ljust(_WIDTH)


def _environment(run: Run) -> dict[str, Any]:
    wanted = ("git", "versions", "host", "gpus", "world_size")
    return {key: run.attempt[key] for key in wanted if run.attempt.get(key) is not None}


def _last(run: Run) -> dict[str, Any]:
    return {key: value for key, value in run.last.items() if isinstance(value, (int, float))}


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.5g}"
    text = str(value)
    return text if len(text) <= 44 else f"{text[:20]}…{text[-20:]}"


def _table(rows: Sequence[tuple[str, list[str]]], names: Sequence[str]) -> str:
    lines = [["", *(_shown(name) for name in names)], *([key, *shown] for key, shown in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(names) + 1)]
    return "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
