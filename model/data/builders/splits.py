"""Splits by data set and case, never by slice: neighbouring slices of a case are nearly the same picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from model.errors import MedPLIBError

DEFAULT_SHARES = {"train": 0.9, "validation": 0.05, "test": 0.05}
ZERO_SHOT = "zero_shot"
"""The split of data sets that are held out whole."""


@dataclass(frozen=True)
class SplitPlan:
    """Which split a case belongs to; it depends on data set, case and seed alone, whatever else is in the set.

    Attributes:
        shares: split → share, summing to 1.
        seed: another one draws other cases.
        hold_out: data sets that go to ``ZERO_SHOT`` as a whole.
    """

    shares: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_SHARES))
    seed: int = 0
    hold_out: frozenset[str] = frozenset()

    @property
    def names(self) -> tuple[str, ...]:
        """All splits, in the order given."""
        return (*self.shares, ZERO_SHOT) if self.hold_out else tuple(self.shares)

    def of(self, dataset: str, case: str) -> str:
        """The split of one case."""
        if dataset in self.hold_out:
            return ZERO_SHOT
        place = fraction(self.seed, dataset, case)
        end = 0.0
        for name, share in self.shares.items():
            end += share
            if place < end:
                return name
        return list(self.shares)[-1]  # sums of floats may end just below 1

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the settings of a build."""
        return {"splits": dict(self.shares), "split_seed": self.seed, "hold_out": sorted(self.hold_out)}


def parse_splits(text: str) -> dict[str, float]:
    """Shares from ``train=0.9,validation=0.05,test=0.05``.

    Raises:
        MedPLIBError: it is not of that form, or the shares do not sum to 1.
    """
    shares: dict[str, float] = {}
    for entry in text.split(","):
        name, _, number = (word.strip() for word in entry.partition("="))
        try:
            share = float(number)
        except ValueError:
            share = math.nan
        if not name.isidentifier() or name in shares or not 0 < share <= 1 or name == ZERO_SHOT:
            raise MedPLIBError(f"--splits holds {entry!r:.80}; give shares such as train=0.9,validation=0.05,test=0.05")
        shares[name] = share
    if not math.isclose(sum(shares.values()), 1.0, abs_tol=1e-6):
        raise MedPLIBError(f"--splits sums to {sum(shares.values()):g}; give shares that sum to 1")
    return shares


def fraction(seed: int, *words: str) -> float:
    """A number in [0, 1) that is drawn by seed and words, the same on every machine."""
    return draw(seed, *words) / 2.0**64


def draw(seed: int, *words: str) -> int:
    """The same as an integer of 64 bits."""
    return int.from_bytes(blake2b("\0".join((str(seed), *words)).encode(), digest_size=8).digest(), "big")


def exact_sizes(shares: Mapping[str, float], count: int) -> dict[str, int]:
    """How many of ``count`` things each split gets: its share rounded; one each first, to the largest shares first."""
    if count < len(shares):
        return {name: int(name in sorted(shares, key=lambda one: -shares[one])[:count]) for name in shares}
    sizes = {name: max(int(share * count + 1e-9), 1) for name, share in shares.items()}
    while (missing := count - sum(sizes.values())) != 0:  # to whom most is owed, from who has most too much
        change = 1 if missing > 0 else -1
        able = [name for name in shares if change > 0 or sizes[name] > 1]
        sizes[max(able, key=lambda name: change * (shares[name] * count - sizes[name]))] += change
    return sizes


def spread(wanted: int, available: Iterable[int]) -> list[int]:
    """Take ``wanted`` things out of boxes as evenly as their contents allow; the first boxes give what is left over."""
    boxes = list(available)
    taken = [0] * len(boxes)
    left = min(wanted, sum(boxes))
    open_boxes = [number for number, size in enumerate(boxes) if size]
    while left:
        each, extra = divmod(left, len(open_boxes))
        for place, number in enumerate(open_boxes):
            more = min(each + (place < extra), boxes[number] - taken[number])
            taken[number] += more
            left -= more
        open_boxes = [number for number in open_boxes if boxes[number] > taken[number]]
    return taken
