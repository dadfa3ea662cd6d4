"""Rows and tables of benchmark reports, and a type of command-line values, for the benchmarks beside it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

HEAD = (
    "what",
    "unit",
    "engine",
    "plain",
    "engine is × plain",
    "limit",
    "of the limit",
    "engine peak MB",
    "plain peak MB",
    "note",
)


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        what: was measured.
        unit: ``ms``, of which fewer are better, or ``a second``, of which more are.
        engine, plain, limit: in that unit.
        engine_peak, plain_peak: bytes of memory, weights included.
        note: whatever else is to be known.
    """

    what: str
    unit: Literal["ms", "a second"]
    engine: float
    plain: float
    limit: float
    engine_peak: int
    plain_peak: int
    note: str = ""

    @property
    def gain(self) -> float:
        """How many times as fast the engine is as plain generation."""
        return self.plain / self.engine if self.unit == "ms" else self.engine / self.plain

    @property
    def share(self) -> float:
        """Which part of the best that the hardware allows the engine reaches."""
        return self.limit / self.engine if self.unit == "ms" else self.engine / self.limit

    def cells(self) -> tuple[str, ...]:
        """As the table shows it."""
        return (
            self.what,
            self.unit,
            number(self.engine),
            number(self.plain),
            f"{self.gain:.2f}",
            number(self.limit),
            f"{self.share:.0%}" if self.share >= 0.095 else f"{self.share:.1%}",
            number(self.engine_peak / 1e6),
            number(self.plain_peak / 1e6),
            self.note,
        )


def number(value: float) -> str:
    """Three digits or all before the point."""
    places = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:,.{places}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def verdict(claim: str, value: float, bound: float, *, at_most: bool = False) -> str:
    """A line that tells whether a target was met."""
    met = value <= bound if at_most else value >= bound
    return f"- {claim}: {number(value)}, {'met' if met else 'missed'}."


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is too few; give at least 1")
    return value
