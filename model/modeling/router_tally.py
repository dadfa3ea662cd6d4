"""How routers treat groups of tokens: sums that stay on the device, and the shares that come of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.modeling.moe import RouterStats

_PER_EXPERT = 3  # choices, tokens kept, probability
_ALONE = 2  # entropy, tokens


class RouterTally:
    """Sums over many forward passes, by mixture layer and group of tokens, without waiting for the host.

    Args:
        groups: how many groups there are; what they are is the caller's business.

    Attributes:
        sums: float64 [layers, groups, 3 · experts + 2] on the device of what was added, so that ranks can add theirs;
            None before the first pass. Read it with ``RouterSummary.of``. In float32, sums over millions of tokens
            would be off by percents.
    """

    def __init__(self, groups: int) -> None:
        self.groups = groups
        self.sums: Tensor | None = None

    def add(self, layers: Sequence[RouterStats], groups: Tensor) -> None:
        """Count one forward pass.

        Args:
            layers: what each router did, in order; layers may differ in their number of experts.
            groups: long [T], the group of each token; −1 leaves it out, as a probability that is not finite does.
        """
        if not layers:
            return
        experts = max(stats.kept.shape[1] for stats in layers)
        if self.sums is None:
            width = _PER_EXPERT * experts + _ALONE
            self.sums = torch.zeros(len(layers), self.groups + 1, width, dtype=torch.float64, device=groups.device)
        for own, stats in zip(self.sums, layers, strict=True):
            left_out = (groups < 0) | ~stats.probabilities.isfinite().all(dim=-1)  # as in a step that is skipped
            features = _features(stats, experts).nan_to_num().double()
            own.index_add_(0, torch.where(left_out, self.groups, groups), features)  # into a bin of its own

    def summary(self) -> RouterSummary:
        """What was added here; of no layer before the first pass."""
        sums = torch.zeros(0, self.groups + 1, _ALONE) if self.sums is None else self.sums
        return RouterSummary.of(sums)

    def clear(self) -> None:
        """Begin anew."""
        if self.sums is not None:
            self.sums.zero_()


@dataclass(frozen=True)
class RouterSummary:
    """What came together in a tally, on the CPU in float64.

    Attributes:
        choices: [layers, groups, experts], tokens that chose each expert, before any was dropped (twice a token with
            two choices).
        kept: the same, tokens that the expert took.
        probability: the same, sums of the router's probabilities.
        entropy: [layers, groups], sums of the entropy of those, in nats.
        tokens: [layers, groups].
    """

    choices: Tensor
    kept: Tensor
    probability: Tensor
    entropy: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, sums: Tensor) -> RouterSummary:
        """Of the ``sums`` of a tally, or of several tallies added up."""
        sums = sums.to("cpu", torch.float64, copy=True)[:, :-1]
        experts = (sums.shape[-1] - _ALONE) // _PER_EXPERT
        choices, kept, probability, entropy, tokens = sums.split([experts, experts, experts, 1, 1], dim=-1)
        return cls(choices, kept, probability, entropy[..., 0], tokens[..., 0])

    def merged(self, groups: Sequence[Sequence[int]]) -> RouterSummary:
        """Groups put together: the g-th of the result is the sum of those that ``groups[g]`` lists."""
        parts = [list(part) for part in groups]

        def put_together(values: Tensor) -> Tensor:
            return torch.stack([values[:, part].sum(dim=1) for part in parts], dim=1)

        return RouterSummary(
            *(put_together(part) for part in (self.choices, self.kept, self.probability, self.entropy, self.tokens))
        )

    @property
    def load(self) -> Tensor:
        """Share of the choices that fell on each expert [layers, groups, experts]; NaN where no token was."""
        return self.choices / self.choices.sum(dim=-1, keepdim=True)

    @property
    def takers(self) -> Tensor:
        """Share of the tokens that chose each expert [layers, groups, experts]; sums to the choices of a token."""
        return self.choices / self.tokens[..., None]

    @property
    def dropped(self) -> Tensor:
        """Share of the choices that found their expert full [layers, groups]; NaN where no token was."""
        return 1 - self.kept.sum(dim=-1) / self.choices.sum(dim=-1)

    @property
    def mean_probability(self) -> Tensor:
        """Mean probability that the router gives each expert [layers, groups, experts]."""
        return self.probability / self.tokens[..., None]

    @property
    def mean_entropy(self) -> Tensor:
        """Mean entropy of the router's probabilities [layers, groups], in nats: 0 sure, log of the experts unsure."""
        return self.entropy / self.tokens

    def numbers(self, group: int, experts: Sequence[int], digits: int) -> dict[str, Any]:
        """What a group's tokens did, in plain numbers by layer; None for one that no token gives.

        Args:
            group: which one.
            experts: how many each layer has.
            digits: to round to.
        """

        def by_expert(values: Tensor) -> list[list[float | None]]:
            return [_plain(row[:own], digits) for row, own in zip(values[:, group], experts, strict=True)]

        return {
            "tokens": int(self.tokens[:, group].max()),
            "load": by_expert(self.load),
            "probability": by_expert(self.mean_probability),
            "entropy": _plain(self.mean_entropy[:, group], digits),
            "dropped": _plain(self.dropped[:, group], digits),
        }

    def numbers_of_one(self, group: int, experts: int, digits: int) -> dict[str, Any]:
        """The same where there is one layer, without the lists by layer."""
        numbers = self.numbers(group, [experts], digits)
        return {name: value if name == "tokens" else value[0] for name, value in numbers.items()}


def _plain(values: Tensor, digits: int) -> list[float | None]:
    return [round(value, digits) if math.isfinite(value) else None for value in values.tolist()]


def _features(stats: RouterStats, experts: int) -> Tensor:
    """What is summed for each token, float32 [T, 3 · experts + 2]."""
    tokens, own = stats.kept.shape
    parts = torch.zeros(tokens, _PER_EXPERT, experts, device=stats.kept.device)
    parts[:, 0, :own] = stats.choices.sum(dim=0)
    parts[:, 1, :own] = stats.kept
    parts[:, 2, :own] = stats.probabilities
    entropy = torch.special.entr(stats.probabilities).sum(dim=-1, keepdim=True)
    return torch.cat([parts.flatten(1), entropy, torch.ones_like(entropy)], dim=1)
