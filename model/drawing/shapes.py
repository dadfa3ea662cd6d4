"""The parts of drawings: SVG elements whose colours are classes of ``assets/report.css``."""

from __future__ import annotations

from model.drawing.pages import Markup, element


def box(x: float, y: float, width: float, height: float, kind: str, note: str = "") -> Markup:
    """A rectangle; ``note`` shows where a pointer rests on it."""
    sides = {"x": rounded(x), "y": rounded(y), "width": rounded(width), "height": rounded(height)}
    return element("rect", element("title", note) if note else "", **sides, class_=kind)


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    """A straight line."""
    return element("line", x1=rounded(x1), y1=rounded(y1), x2=rounded(x2), y2=rounded(y2), class_=kind)


def circle(x: float, y: float, radius: float, kind: str, note: str) -> Markup:
    """A disc; ``note`` shows where a pointer rests on it."""
    return element("circle", element("title", note), cx=rounded(x), cy=rounded(y), r=rounded(radius), class_=kind)


def label(x: float, y: float, text: str, anchor: str, kind: str) -> Markup:
    """Text, its ``anchor`` (start, middle, end) at the place given."""
    return element("text", text, x=rounded(x), y=rounded(y), class_=f"{kind} {anchor}")


def rounded(value: float) -> str:
    """A coordinate in as few digits as do."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
