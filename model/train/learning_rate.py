"""The learning rate of every step, exactly (reference §6: linear warm-up, then linear decay)."""

from __future__ import annotations

import math
from collections.abc import Callable

from model.train.recipe import Optimiser, Schedule


def total_steps(schedule: Schedule, steps_per_epoch: float) -> int:
    """Optimiser steps of a run: ``max_steps`` where it is set, else those of all epochs."""
    return schedule.max_steps or math.ceil(schedule.epochs * steps_per_epoch)


def warmup_steps(optimiser: Optimiser, steps_per_epoch: float) -> int:
    """Steps of rising learning rate: a share of one epoch's, at least one where the share is not zero."""
    return max(1, int(optimiser.warmup * steps_per_epoch)) if optimiser.warmup else 0


def rate_factor(optimiser: Optimiser, steps_per_epoch: float, total_steps: int) -> Callable[[int], float]:
    """What the peak learning rate is multiplied by at each step, for ``torch.optim.lr_scheduler.LambdaLR``.

    Step 0 is the first one and already learns; the last step, ``total_steps - 1``, still does.

    Returns:
        A function of the step, in (0, 1].
    """
    warmup = warmup_steps(optimiser, steps_per_epoch)
    decaying = max(1, total_steps - warmup + (warmup > 0))  # the last warm-up step is the peak itself

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if optimiser.decay == "constant":
            return 1.0
        left = max(0.0, (total_steps - step) / decaying)
        return left if optimiser.decay == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)

    return factor
