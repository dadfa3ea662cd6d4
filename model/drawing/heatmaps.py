"""Grids of cells whose colour says which of several takes most, and whose strength says by how much."""

from __future__ import annotations

import math
from collections.abc import Sequence

from model.drawing.pages import Markup, element, percent
from model.drawing.shapes import box, label

_CELL_HEIGHT, _TOP, _CHARACTER = 24, 22, 6.6


def share_map(
    shares: Sequence[Sequence[Sequence[float]]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    *,
    cell_width: float = 58,
    numbers: bool = True,
    names: str = "expert",
) -> Markup:
    """A cell for each row and column, in the colour of what has the largest share there.

    Colours are those of the series of other charts. A cell is as strong as its largest share is above an even one.

    Args:
        shares: [rows][columns][parts], each cell's parts summing to 1; NaN leaves a cell empty.
        rows, columns: what they are called.
        title: what the whole shows, for those who do not see it.
        cell_width: in pixels.
        numbers: write the largest share into each cell and the names over the columns; without, there may be too
            many columns for texts, and a cell tells both when it is pointed at.
        names: what the parts are.
    """
    left = 10 + _CHARACTER * max(map(len, rows), default=0)
    shapes = [
        label(left + cell_width * (at + 0.5), _TOP - 8, name, "middle", "tick")
        for at, name in enumerate(columns if numbers else ())
    ]
    for down, row in enumerate(rows):
        top = _TOP + _CELL_HEIGHT * down
        shapes.append(label(left - 8, top + 16, row, "end", "tick"))
        for across, cell in enumerate(shares[down]):
            place = left + cell_width * across
            shapes += _cell(place, top, cell_width, cell, f"{row}, {columns[across]}", names, numbers)
    width, height = left + cell_width * len(columns), _TOP + _CELL_HEIGHT * len(rows)
    drawing = element(
        "svg",
        *shapes,
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        width=f"{width:.0f}",
        height=f"{height:.0f}",
        class_="map",
        role="img",
        aria_label=title,
    )
    return element("div", drawing, class_="scroll", tabindex="0", role="region", aria_label=title)


def _cell(
    left: float, top: float, width: float, parts: Sequence[float], where: str, names: str, numbers: bool
) -> list[Markup]:
    gap = 1.5 if numbers else 0.5
    sides = left + gap / 2, top + gap / 2, width - gap, _CELL_HEIGHT - gap
    shapes = [box(*sides, "track")]
    if not all(math.isfinite(part) for part in parts) or not parts:
        return shapes
    largest = max(range(len(parts)), key=lambda part: parts[part])
    strength = 1.0 if len(parts) == 1 else max(0.0, (parts[largest] - 1 / len(parts)) / (1 - 1 / len(parts)))
    told = ", ".join(f"{names} {part} {percent(share, 1)}" for part, share in enumerate(parts))
    step = round(strength * 10)  # as a class: the page's colours follow its light or dark scheme
    shapes.append(box(*sides, f"series-{largest % 6 + 1} strength-{step}", f"{where}: {told}"))
    if numbers:
        kind = "on" if step >= 8 else "reading"
        shapes.append(label(left + width / 2, top + 16, percent(parts[largest]), "middle", kind))
    return shapes
