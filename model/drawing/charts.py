"""Small charts as inline SVG: histograms, curves, calibration.

Colours are classes of ``assets/report.css``, so that they follow the page's light or dark scheme. Charts are drawn for
about 300 pixels, at which their text is 11 pixels high. The strips in tables are macros of ``eval/templates``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from model.drawing.pages import Markup, count, element, number

_WIDTH, _HEIGHT = 304, 208
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 14, 20, 40  # margins of the plot: tick labels and axis titles
_PLOT_WIDTH, _PLOT_HEIGHT = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
_TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)


def histogram(values: Sequence[float] | np.ndarray, title: str, *, bins: int = 20, series: int = 1) -> Markup:
    """How values in [0, 1] are spread; a broken line marks their median.

    Args:
        values: numbers; those outside [0, 1] count in the outermost bars, those that are not numbers are left out.
        title: of the horizontal axis.
        bins: bars.
        series: colour, from 1.
    """
    finite = _numbers(values)
    heights, _ = np.histogram(np.clip(finite, 0, 1), bins=bins, range=(0.0, 1.0))
    top = _rounded_up(int(heights.max())) if len(finite) else 1
    width = _PLOT_WIDTH / bins
    shapes = _vertical_axis([(tick, count(round(tick * top))) for tick in _TICKS], "answers")
    for index, height in enumerate(heights.tolist()):
        if height:
            tall = _PLOT_HEIGHT * height / top
            note = f"{index / bins:.2f} to {(index + 1) / bins:.2f}: {count(height)}"
            left = _LEFT + index * width
            shapes.append(box(left + 0.75, _TOP + _PLOT_HEIGHT - tall, width - 1.5, tall, f"series-{series}", note))
    shapes += _horizontal_axis(title)
    if len(finite):
        middle = float(np.median(finite))
        shapes.append(line(_x(middle), _TOP, _x(middle), _TOP + _PLOT_HEIGHT, "median"))
        side = "end" if middle > 0.5 else "start"
        shapes.append(label(_x(middle), _TOP - 7, f"median {number(middle, 2)}", side, "reading"))
    return _chart(shapes, f"Histogram of {title} over {count(len(finite))} answers")


def curves(places: Sequence[float], values: Mapping[str, Sequence[float]], across: str, up: str) -> Markup:
    """Lines through values in [0, 1] over places in [0, 1], a colour for each name in order; NaN is left out."""
    shapes = [*_vertical_axis([(tick, number(tick, 2)) for tick in _TICKS], up), *_horizontal_axis(across)]
    for index, (name, heights) in enumerate(values.items()):
        known = [(x, y) for x, y in zip(places, heights, strict=True) if math.isfinite(y)]
        points = " ".join(f"{rounded(_x(x))},{rounded(_y(y))}" for x, y in known)
        drawn = f"series-{index % 6 + 1} curve"
        shapes.append(element("polyline", element("title", name), points=points, class_=drawn))
    return _chart(shapes, f"{up} over {across}")


def calibration(
    predicted: Sequence[float] | np.ndarray, actual: Sequence[float] | np.ndarray, *, bins: int = 10
) -> Markup:
    """Means of what was reached (vertical) over means of what was predicted, for equal steps of the prediction.

    The area of a dot grows with its answers, its line spans their middle half; on the diagonal predictions hold true.
    """
    pairs = np.column_stack([np.asarray(predicted, dtype=float), np.asarray(actual, dtype=float)])
    pairs = np.clip(pairs[np.isfinite(pairs).all(axis=1)], 0, 1)
    shapes = _vertical_axis([(tick, number(tick, 2)) for tick in _TICKS], "real IoU")
    shapes += _horizontal_axis("predicted IoU")
    shapes.append(line(_x(0), _y(0), _x(1), _y(1), "diagonal"))
    step = np.minimum((pairs[:, 0] * bins).astype(int), bins - 1)
    largest = int(np.bincount(step).max()) if len(pairs) else 1
    for index in np.unique(step).tolist():
        inside = pairs[step == index]
        across, up = (float(mean) for mean in inside.mean(axis=0))
        lower, upper = (float(edge) for edge in np.quantile(inside[:, 1], (0.25, 0.75)))
        radius = 2.5 + 5.5 * math.sqrt(len(inside) / largest)
        note = f"predicted {across:.2f}, real {up:.2f}, {count(len(inside))} masks"
        shapes.append(line(_x(across), _y(lower), _x(across), _y(upper), "spread"))
        place = {"cx": rounded(_x(across)), "cy": rounded(_y(up)), "r": rounded(radius)}
        shapes.append(element("circle", element("title", note), **place, class_="series-1 dot"))
    return _chart(shapes, f"Calibration of the predicted IoU over {count(len(pairs))} masks")


def calibration_error(
    predicted: Sequence[float] | np.ndarray, actual: Sequence[float] | np.ndarray, *, bins: int = 10
) -> float:
    """Expected calibration error in [0, 1]: mean distance of the means of ``calibration``, weighted by answers; NaN
    where there are none."""
    pairs = np.column_stack([np.asarray(predicted, dtype=float), np.asarray(actual, dtype=float)])
    pairs = pairs[np.isfinite(pairs).all(axis=1)]
    if not len(pairs):
        return math.nan
    step = np.clip((pairs[:, 0] * bins).astype(int), 0, bins - 1)
    gaps = [
        (len(pairs[step == i]), abs(float((pairs[step == i, 0] - pairs[step == i, 1]).mean()))) for i in np.unique(step)
    ]
    return sum(size * gap for size, gap in gaps) / len(pairs)


# --- the parts of a chart -------------------------------------------------------------------------------------------


def _chart(shapes: list[Markup], label: str) -> Markup:
    return element("svg", *shapes, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", class_="chart", role="img", aria_label=label)


def _vertical_axis(ticks: Sequence[tuple[float, str]], title: str) -> list[Markup]:
    shapes = []
    for share, text in ticks:
        shapes.append(line(_LEFT, _y(share), _WIDTH - _RIGHT, _y(share), "grid" if share else "axis"))
        shapes.append(label(_LEFT - 6, _y(share) + 4, text, "end", "tick"))
    middle = _TOP + _PLOT_HEIGHT / 2
    turned = f"rotate(-90 9 {rounded(middle)})"
    return [*shapes, element("text", title, x=9, y=rounded(middle), transform=turned, class_="axis-title middle")]


def _horizontal_axis(title: str) -> list[Markup]:
    below = _TOP + _PLOT_HEIGHT
    shapes = [label(_x(tick), below + 16, number(tick, 2), "middle", "tick") for tick in _TICKS]
    return [*shapes, label(_LEFT + _PLOT_WIDTH / 2, _HEIGHT - 6, title, "middle", "axis-title")]


def _x(value: float) -> float:
    return _LEFT + _PLOT_WIDTH * max(0.0, min(1.0, value))


def _y(value: float) -> float:
    return _TOP + _PLOT_HEIGHT * (1 - max(0.0, min(1.0, value)))


def _numbers(values: Sequence[float] | np.ndarray) -> np.ndarray:
    array = np.asarray(values, dtype=float).ravel()
    return array[np.isfinite(array)]


def _rounded_up(largest: int) -> int:
    """The next number whose quarters are whole and easily read."""
    power = 1
    while 80 * power < largest:
        power *= 10
    return next(factor * power for factor in (4, 8, 12, 16, 20, 40, 60, 80) if factor * power >= largest)


def box(x: float, y: float, width: float, height: float, kind: str, note: str = "") -> Markup:
    """A rectangle; ``note`` shows where a pointer rests on it."""
    sides = {"x": rounded(x), "y": rounded(y), "width": rounded(width), "height": rounded(height)}
    return element("rect", element("title", note) if note else "", **sides, class_=kind)


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    """A straight line."""
    return element("line", x1=rounded(x1), y1=rounded(y1), x2=rounded(x2), y2=rounded(y2), class_=kind)


def label(x: float, y: float, text: str, anchor: str, kind: str) -> Markup:
    """Text, its ``anchor`` (start, middle, end) at the place given."""
    return element("text", text, x=rounded(x), y=rounded(y), class_=f"{kind} {anchor}")


def rounded(value: float) -> str:
    """A coordinate in as few digits as do."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
