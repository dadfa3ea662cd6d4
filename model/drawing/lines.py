"""Curves over steps: a line of means for each name, and a band where half of the values lie."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from model.drawing.pages import Markup, element
from model.drawing.shapes import label, line, rounded

_WIDTH, _HEIGHT = 304, 196
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 12, 36
_BINS = 80
_BAND = 4  # values in a step of the drawing from which on a band says more than the line alone


@dataclass(frozen=True)
class Curve:
    """Values over steps; those that are not finite are left out."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]


def line_chart(curves: Sequence[Curve], title: str, *, across: str = "step") -> Markup:
    """Curves in one frame, in the colours of the series, in their order.

    Args:
        curves: at most six are told apart by colour.
        title: what the chart shows, for those who do not see it.
        across: title of the horizontal axis.
    """
    drawn = [(curve.name, _binned(curve)) for curve in curves]
    points = np.concatenate([found for _, found in drawn if len(found)] or [np.zeros((1, 4))])
    low, high = float(points[:, 2].min()), float(points[:, 3].max())
    first, last = float(points[:, 0].min()), float(points[:, 0].max())
    ticks = _ticks(low, high)
    low, high, last = min(low, ticks[0]), max(high, ticks[-1]), max(last, first + 1)

    def x(value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (value - first) / (last - first)

    def y(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - value) / ((high - low) or 1)

    shapes = []
    for tick in ticks:
        shapes.append(line(_LEFT, y(tick), _WIDTH - _RIGHT, y(tick), "grid"))
        shapes.append(label(_LEFT - 6, y(tick) + 4, f"{tick:.6g}".replace("-", "−"), "end", "tick"))
    for tick, side in ((first, "start"), (last, "end")):
        shapes.append(label(x(tick), _HEIGHT - _BOTTOM + 16, f"{tick:,.0f}".replace(",", "\u202f"), side, "tick"))
    shapes.append(label((x(first) + x(last)) / 2, _HEIGHT - 6, across, "middle", "axis-title"))
    for at, (name, found) in enumerate(drawn):
        shapes += _curve(name, found, at % 6 + 1, x, y)
    return element("svg", *shapes, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", class_="chart", role="img", aria_label=title)


def curve_key(names: Sequence[str]) -> Markup:
    """Which colour is whose."""
    spans = (element("span", name, class_=f"series-{at % 6 + 1}") for at, name in enumerate(names))
    return element("div", *spans, class_="key")


def _curve(
    name: str, found: np.ndarray, series: int, x: Callable[[float], float], y: Callable[[float], float]
) -> list[Markup]:
    if not len(found):
        return []

    def path(column: int, order: slice = slice(None)) -> list[str]:
        return [f"{rounded(x(point[0]))},{rounded(y(point[column]))}" for point in found[order]]

    shapes = []
    if (found[:, 3] > found[:, 2]).any():
        around = " ".join([*path(3), *path(2, slice(None, None, -1))])
        shapes.append(element("polygon", points=around, class_=f"series-{series} band"))
    note = element("title", f"{name}: {found[-1, 1]:.4g} at the end")
    if len(found) == 1:
        ((at, value, _, _),) = found.tolist()
        return [element("circle", note, cx=rounded(x(at)), cy=rounded(y(value)), r=3, class_=f"series-{series}")]
    return [*shapes, element("polyline", note, points=" ".join(path(1)), class_=f"curve line-{series}")]


def _binned(curve: Curve) -> np.ndarray:
    """Step, mean, and first and third quartile of runs of values, float64 [points, 4]."""
    pairs = np.column_stack([np.asarray(curve.steps, dtype=float), np.asarray(curve.values, dtype=float)])
    pairs = pairs[np.isfinite(pairs).all(axis=1)]
    if not len(pairs):
        return np.zeros((0, 4))
    rows = []
    for part in np.array_split(pairs, min(_BINS, len(pairs))):
        middle, mean = part.mean(axis=0)
        few = len(part) < _BAND
        lower, upper = (mean, mean) if few else np.quantile(part[:, 1], (0.25, 0.75))
        rows.append((middle, mean, min(lower, mean), max(upper, mean)))
    return np.asarray(rows)


def _ticks(low: float, high: float) -> list[float]:
    """Four or five round values from at or below ``low`` to at or above ``high``."""
    spread = (high - low) or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(spread / 4))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if spread / (factor * power) <= 4)
    start, end = math.floor(low / step), math.ceil(high / step)
    return [round(at * step, 12) for at in range(start, end + 1)]
