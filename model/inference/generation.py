"""Sampling: settings of a request, and the choice of the next tokens on the device, row by row."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.errors import MedPLIBError

_SEEDS = 2**63


@dataclass(frozen=True)
class GenerationSettings:
    """How an answer is drawn from the model.

    Attributes:
        max_new_tokens: hard end of an answer, ≥ 1.
        temperature: 0 is greedy (the default); above, tokens are sampled.
        top_p: nucleus in (0, 1] of what ``top_k`` leaves; 1 keeps all. Only with temperature above 0.
        top_k: draw from so many most likely tokens; 0 keeps all. Only with temperature above 0.
        seed: makes sampling repeatable; a request draws the same alone and in a batch.
        stop: the answer ends before the first of these texts.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise MedPLIBError(f"max_new_tokens is {self.max_new_tokens}; give at least 1")
        if not 0 <= self.temperature < math.inf:
            raise MedPLIBError(f"temperature is {self.temperature}; give 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise MedPLIBError(f"top_p is {self.top_p}; give a number above 0 and up to 1")
        if self.top_k < 0:
            raise MedPLIBError(f"top_k is {self.top_k}; give 0 (all tokens) or more")
        if self.seed is not None and not 0 <= self.seed < _SEEDS:
            raise MedPLIBError(f"seed is {self.seed}; give a whole number from 0 to 2^63 - 1")
        if isinstance(self.stop, str) or not all(self.stop):
            raise MedPLIBError(f"stop is {self.stop!r:.80}; give a tuple of texts that are not empty")
        object.__setattr__(self, "stop", tuple(self.stop))


@dataclass(frozen=True)
class Draw:
    """One row's next choice: its settings, the seed it draws with, and how many tokens it has drawn."""

    settings: GenerationSettings
    seed: int
    step: int


def seed_of(settings: GenerationSettings) -> int:
    """The settings' seed, or a fresh one."""
    return secrets.randbelow(_SEEDS) if settings.seed is None else settings.seed


def choose_tokens(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Next token of each row, long [n], from logits [n, V]: the arg-max, or a draw; −1 where logits are not finite.

    A draw adds to each log-probability Gumbel noise that is a function of (seed, step, token) alone, and takes the
    largest: an exact sample that needs no generator, no host, and does not depend on the row's neighbours.
    """
    largest, best = logits.max(dim=-1)  # NaN counts as the largest
    best = best.where(largest.isfinite(), -1)
    if all(draw.settings.temperature == 0 for draw in draws):
        return best
    settings = [draw.settings for draw in draws]

    def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(logits.device, non_blocking=True)[:, None]

    temperature = column([min(max(one.temperature, 1e-30), 1e30) for one in settings])  # what float32 can divide by
    below = logits.float() - logits.float().amax(dim=-1, keepdim=True)  # ≤ 0, so that dividing cannot overflow to +inf
    probabilities, order = (below / temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(logits.shape[-1], device=logits.device)
    likely = ranks < column([one.top_k or logits.shape[-1] for one in settings], torch.long)
    mass = probabilities.where(likely, 0).cumsum(dim=-1)
    # Mass ahead of each token, as a share of what top_k left; the first token is always kept.
    kept = likely & (mass - probabilities < column([one.top_p for one in settings]) * mass[:, -1:])
    seeds = column([draw.seed for draw in draws], torch.long)
    noise = gumbel_noise(seeds, column([draw.step for draw in draws], torch.long), order)
    scores = (probabilities.double().log() + noise).masked_fill(~kept, -torch.inf)
    sampled = order.gather(-1, scores.argmax(dim=-1, keepdim=True))[:, 0]
    greedy = column([one.temperature == 0 for one in settings], torch.bool)[:, 0]
    return torch.where(greedy | (best < 0), best, sampled)


def gumbel_noise(seeds: Tensor, steps: Tensor, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise, float64, a function of (seed, step, token); integer tensors that broadcast together."""
    mixed = _scramble(_scramble(_scramble(seeds) + steps) + tokens)
    uniform = (_shift(mixed, 12).double() + 0.5) * 2.0**-52  # in (0, 1), and exact: never rounded to 1
    return -(-uniform.log()).log()


def _scramble(values: Tensor) -> Tensor:
    """The finaliser of the SplitMix64 generator (Steele, Lea and Flood, 2014), on wrapping int64."""
    values = values - 0x61C8864680B583EB  # adds 0x9E3779B97F4A7C15 modulo 2^64
    values = (values ^ _shift(values, 30)) * -0x40A7B892E31B1A47
    values = (values ^ _shift(values, 27)) * -0x6B2FB644ECCEEE15
    return values ^ _shift(values, 31)


def _shift(values: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
