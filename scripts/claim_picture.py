"""The dot plot of ``claim_table.py``: one dot a seed, one row an arm, one panel a score; an SVG that stands alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from xml.sax.saxutils import escape

PANELS: Mapping[str, str] = {"VQA": "VQA accuracy", "region": "region accuracy", "mDice": "mDice, threshold 0.5"}
NAMES, PANEL, GAP, ROW, TOP, BOTTOM, EDGE = 320, 170, 26, 24, 34, 30, 8
DARK, GREY, LIGHT, DOT = "#141c26", "#44505e", "#d9dfe6", "#2868b4"


def dot_plot(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Scores of every seed by row and panel, with a tick at their mean.

    Args:
        rows: title → for each seed, its scores by column of the table.
    """
    width = NAMES + len(PANELS) * (PANEL + GAP)
    height = TOP + ROW * len(rows) + BOTTOM
    parts = [f'<rect width="{width}" height="{height}" fill="white"/>']
    for number, title in enumerate(rows):
        parts.append(_text(NAMES - 16, _middle(number), title, "end", DARK))
    for place, (column, title) in enumerate(PANELS.items()):
        parts += _panel(NAMES + place * (PANEL + GAP), title, [[one[column] for one in row] for row in rows.values()])
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f'{head} font-family="sans-serif" font-size="12">\n' + "\n".join(parts) + "\n</svg>\n"


def _panel(left: float, title: str, rows: Sequence[Sequence[float]]) -> list[str]:
    values = [value for row in rows for value in row]
    low, high = math.floor(min(values) * 20) / 20, math.ceil(max(values) * 20) / 20
    high = high if high > low else low + 0.05

    def across(value: float) -> float:
        return left + EDGE + (PANEL - 2 * EDGE) * (value - low) / (high - low)

    bottom = TOP + ROW * len(rows)
    parts = [_text(left + PANEL / 2, TOP - 16, title, "middle", DARK)]
    for number, row in enumerate(rows):
        y, mean = _middle(number), across(fmean(row))
        parts.append(_line(left, y, left + PANEL, y, LIGHT))
        parts.append(_line(mean, y - 8, mean, y + 8, DARK))
        parts += [
            f'<circle cx="{across(value):.1f}" cy="{y:.1f}" r="4" fill="{DOT}" fill-opacity="0.6"/>' for value in row
        ]
    for value in (low, (low + high) / 2, high):
        parts.append(_text(across(value), bottom + 16, f"{value:.3f}".rstrip("0").rstrip("."), "middle", GREY))
    return parts


def _middle(number: int) -> float:
    return TOP + ROW * (number + 0.5)


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _text(x: float, y: float, text: str, anchor: str, colour: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" dominant-baseline="middle" text-anchor="{anchor}"'
    return f'<text {place} fill="{colour}">{escape(text)}</text>'
