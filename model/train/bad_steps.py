"""Steps that were skipped because their loss or a gradient was not finite, and how many of them are too many."""

from __future__ import annotations

from dataclasses import dataclass

from model.errors import MedPLIBError

IN_ALL = 10
"""A run may take so many times more bad steps in all than in a row."""


@dataclass
class BadSteps:
    """Counts of one run.

    Attributes:
        limit: so many in a row end the run, and ``IN_ALL`` times as many in all.
        total: so far.
        in_a_row: up to now.
    """

    limit: int
    total: int = 0
    in_a_row: int = 0

    def note(self, *, skipped: bool) -> bool:
        """Count one step; True where it is the first bad one, which is worth a sentence."""
        self.total += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        return skipped and self.total == 1

    def check(self, step: int) -> None:
        """End a run that does not recover.

        Raises:
            MedPLIBError: telling how many steps were bad and what helps.
        """
        if self.in_a_row < self.limit and self.total < IN_ALL * self.limit:
            return
        counted = f"{self.in_a_row} in a row" if self.in_a_row >= self.limit else f"{self.total} in all"
        raise MedPLIBError(
            f"stopped at step {step}: losses or gradients were not finite in too many steps ({counted}), none of "
            "which moved the weights; begin again with a lower optimiser.lr or engine.precision=fp32, or check the data"
        )
