"""Self-contained HTML pages with inline SVG charts; whatever is no ``Markup`` is escaped.

Colors are classes of ``templates/report.css``, so that charts follow the page's light or dark scheme.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup, escape

LONGEST_TEXT = 600
"""Characters of a question or an answer that a page shows; the files beside it hold all of it."""

STYLE = Path(__file__).resolve().parent / "templates" / "report.css"
_VOID = frozenset(("br", "hr", "img", "meta", "link", "input", "col"))
_UNSEEN = frozenset(("Cc", "Cf", "Cs", "Co", "Cn"))
_MANY_BLANKS = re.compile(r"[^\S\n]{3,}|\n{3,}")


def element(name: str, /, *children: object, **attributes: object) -> Markup:
    """One element; children that are None or empty, and attributes that are None or False, are left out.

    Of attribute names a trailing underscore is dropped, others become hyphens; floats are rounded as coordinates.
    """
    named = "".join(
        f" {key.rstrip('_').replace('_', '-')}"
        + ("" if value is True else f'="{escape(rounded(value) if isinstance(value, float) else value)}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _VOID:
        return Markup(f"<{name}{named}>")
    return Markup(f"<{name}{named}>{joined(children)}</{name}>")


def joined(parts: Iterable[object]) -> Markup:
    """Parts one after the other, escaped where they are not ``Markup``."""
    return Markup("").join(escape(part) for part in parts if part is not None and part != "")


def quoted(value: str, longest: int = LONGEST_TEXT) -> Markup:
    """Text that a model or a data file wrote, made visible and harmless: cut to ``longest`` characters, unseen
    characters (control, direction, lone halves of pairs) replaced by their numbers, runs of blanks shortened."""
    shown = _MANY_BLANKS.sub(lambda match: match[0][:2], value[: longest + 1])
    shown = "".join(c if c == "\n" or unicodedata.category(c) not in _UNSEEN else f"⟨U+{ord(c):04X}⟩" for c in shown)
    rest, more = len(value) - longest, None
    if rest > 0:
        shown, more = shown[:longest], element("span", f" … {rest} more characters", class_="more")
    if not shown.strip():
        return element("span", "nothing", class_="nothing")
    return element("bdi", shown, more, class_="said")


def number(value: float | None, digits: int = 3, *, signed: bool = False) -> str:
    """A number with a fixed count of decimals and a true minus sign; a dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    shown = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    if not shown.strip("+-0."):  # no sign at a zero
        shown = shown.lstrip("+-")
    return shown.replace("-", "−")


def percent(share: float, digits: int = 0) -> str:
    """A share of 1 in hundredths, with the sign set off as everywhere on the pages."""
    return f"{100 * share:.{digits}f} %"


def interval(low: float, high: float, digits: int = 3, *, signed: bool = False) -> str:
    """A confidence interval; a dash where there is none."""
    if math.isnan(low) or math.isnan(high):
        return "–"
    return f"{number(low, digits, signed=signed)} to {number(high, digits, signed=signed)}"


def breakable(value: object) -> Markup:
    """Text, such as a path, that may break after its slashes."""
    return value if isinstance(value, Markup) else Markup(str(escape(value)).replace("/", "/<wbr>"))


def count(value: int) -> str:
    """A whole number with thin spaces between thousands."""
    return f"{value:,}".replace(",", "\u202f")


def page(title: str, body: object) -> str:
    """A whole page that needs nothing from anywhere else: the style is inside, scripts there are none."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("title", title),
        element("style", Markup(STYLE.read_text(encoding="utf-8"))),
    )
    return f"<!doctype html>\n{element('html', head, element('body', element('main', body)), lang='en')}\n"


_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Even a slip in this file could not make a page run or fetch anything."""


# --- charts ---------------------------------------------------------------------------------------------------------

_WIDTH, _HEIGHT = 304, 208
_LEFT, _RIGHT, _TOP, _BOTTOM = 48.0, 290.0, 20.0, 168.0  # edges of the plot; tick labels and axis titles lie outside
_TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)


def histogram(values: Sequence[float] | np.ndarray, title: str, *, bins: int = 20, series: int = 1) -> Markup:
    """How values in [0, 1] are spread, those that are not numbers left out; a broken line marks their median."""
    finite = np.asarray(values, dtype=float).ravel()
    finite = finite[np.isfinite(finite)]
    heights, _ = np.histogram(np.clip(finite, 0, 1), bins=bins, range=(0.0, 1.0))
    steps = (factor * 10**power for power in range(20) for factor in (4, 8, 12, 16, 20, 40, 60))
    top = next(step for step in steps if step >= max(1, heights.max()))  # its quarters are whole and easily read
    width = (_RIGHT - _LEFT) / bins
    shapes = _axes(title, "answers", [count(round(tick * top)) for tick in _TICKS])
    for index in np.flatnonzero(heights).tolist():
        note = element("title", f"{index / bins:.2f} to {(index + 1) / bins:.2f}: {count(int(heights[index]))}")
        y = _y(heights[index] / top)
        sides = {"x": _LEFT + index * width + 0.75, "y": y, "width": width - 1.5, "height": _BOTTOM - y}
        shapes.append(element("rect", note, **sides, class_=f"series-{series}"))
    if len(finite):
        middle = float(np.median(finite))
        shapes.append(_line(middle, 0, middle, 1, "median"))
        side = "end" if middle > 0.5 else "start"
        shapes.append(_label(_x(middle), _TOP - 7, f"median {number(middle, 2)}", f"reading {side}"))
    return _chart(shapes, f"Histogram of {title} over {count(len(finite))} answers")


def curves(places: Sequence[float], values: Mapping[str, Sequence[float]], across: str, up: str) -> Markup:
    """Lines through values in [0, 1] over places in [0, 1], a color for each name in order; NaN is left out."""
    shapes = _axes(across, up)
    for index, (name, heights) in enumerate(values.items()):
        known = [(x, y) for x, y in zip(places, heights, strict=True) if math.isfinite(y)]
        points = " ".join(f"{rounded(_x(x))},{rounded(_y(y))}" for x, y in known)
        color = f"series-{index % 6 + 1} curve"
        shapes.append(element("polyline", element("title", name), points=points, class_=color))
    return _chart(shapes, f"{up} over {across}")


def calibration(predicted: np.ndarray, actual: np.ndarray, *, bins: int = 10) -> tuple[Markup, float]:
    """Means of what was reached (vertical) over means of what was predicted, for equal steps of the prediction.

    The area of a dot grows with its answers, its line spans their middle half; on the diagonal predictions hold true.

    Returns:
        The chart, and the expected calibration error in [0, 1]: the mean distance of these means, weighted by answers;
        NaN where there are none.
    """
    pairs = np.column_stack([np.asarray(predicted, dtype=float), np.asarray(actual, dtype=float)])
    pairs = pairs[np.isfinite(pairs).all(axis=1)]
    step = np.clip((pairs[:, 0] * bins).astype(int), 0, bins - 1)
    parts = [pairs[step == index] for index in np.unique(step)]
    shapes = [*_axes("predicted IoU", "real IoU"), _line(0, 0, 1, 1, "diagonal")]
    for part in (np.clip(part, 0, 1) for part in parts):
        across, up = part.mean(axis=0)
        shapes.append(_line(across, np.quantile(part[:, 1], 0.25), across, np.quantile(part[:, 1], 0.75), "spread"))
        note = element("title", f"predicted {across:.2f}, real {up:.2f}, {count(len(part))} masks")
        radius = 2.5 + 5.5 * math.sqrt(len(part) / max(map(len, parts)))
        shapes.append(element("circle", note, cx=_x(across), cy=_y(up), r=radius, class_="series-1 dot"))
    error = sum(len(part) * abs(float((part[:, 0] - part[:, 1]).mean())) for part in parts)
    chart = _chart(shapes, f"Calibration of the predicted IoU over {count(len(pairs))} masks")
    return chart, error / len(pairs) if len(pairs) else math.nan


def _chart(shapes: list[Markup], label: str) -> Markup:
    return element("svg", *shapes, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", class_="chart", role="img", aria_label=label)


def _axes(across: str, up: str, ticks: Sequence[str] = ()) -> list[Markup]:
    """Grid, ticks and titles; the vertical ticks are shares unless given."""
    middle, shapes = (_TOP + _BOTTOM) / 2, []
    for tick, text in zip(_TICKS, ticks or [number(tick, 2) for tick in _TICKS], strict=True):
        shapes.append(_line(0, tick, 1, tick, "grid" if tick else "axis"))
        shapes.append(_label(_LEFT - 6, _y(tick) + 4, text, "tick end"))
        shapes.append(_label(_x(tick), _BOTTOM + 16, number(tick, 2), "tick middle"))
    shapes.append(_label(9.0, middle, up, "axis-title middle", transform=f"rotate(-90 9 {rounded(middle)})"))
    return [*shapes, _label((_LEFT + _RIGHT) / 2, _HEIGHT - 6.0, across, "axis-title middle")]


def _x(value: float) -> float:
    return _LEFT + (_RIGHT - _LEFT) * max(0.0, min(1.0, value))


def _y(value: float) -> float:
    return _BOTTOM - (_BOTTOM - _TOP) * max(0.0, min(1.0, value))


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return element("line", x1=_x(x1), y1=_y(y1), x2=_x(x2), y2=_y(y2), class_=kind)


def _label(x: float, y: float, text: str, kind: str, **attributes: str) -> Markup:
    return element("text", text, x=x, y=y, class_=kind, **attributes)


def rounded(value: float) -> str:
    """A coordinate in as few digits as do."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
