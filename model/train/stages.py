"""Settings of each stage: the published table (reference §6, arXiv 2412.09278), and a run's steps and learning rates.

The recipes under ``configs/stages`` repeat these values for the reader; a recipe file that leaves one out gets it from
here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.train.recipe import Optimiser, Recipe, Schedule

ATTENTION_AND_FFN = ("q", "k", "v", "o", "gate", "up", "down")

_ALIGNMENT: Mapping[str, Any] = {
    "stage": 1,
    "data": {"template": "plain", "max_length": 2048},
    "schedule": {"epochs": 1, "batch_size": 32, "accumulation": 1},
    "optimiser": {"lr": 1e-3},
    "lora": {"rank": 0},
    "trainable": ("projector",),
    "losses": {"ce": 1.0},
}

_VQA_EXPERT: Mapping[str, Any] = {
    "stage": 2,
    "data": {"template": "llava_v1", "max_length": 2048},
    "schedule": {"epochs": 3, "batch_size": 16, "accumulation": 2},
    "optimiser": {"lr": 1e-4},
    "lora": {"rank": 16, "alpha": 16.0, "targets": ATTENTION_AND_FFN},
    "trainable": ("lm_head", "embed_tokens", "layer_norms", "projector", "region_adapter"),
    "losses": {"ce": 1.0, "dice": 5.0, "bce": 1.0},
}

_GROUNDING_EXPERT: Mapping[str, Any] = {
    "stage": 3,
    "data": {"template": "llava_v1", "max_length": 2048},
    "schedule": {"epochs": 10, "batch_size": 32, "accumulation": 1},
    "optimiser": {"lr": 3e-4},
    "lora": {"rank": 8, "alpha": 16.0, "targets": ("gate", "up", "down")},
    "trainable": ("mask_decoder", "mask_head"),
    "losses": {"ce": 1.0, "dice": 5.0, "bce": 1.0, "focal": 1.0, "iou": 0.0},
}

_MIXTURE: Mapping[str, Any] = {
    "stage": 4,
    "data": {"template": "llava_v1", "max_length": 1024},
    "schedule": {"epochs": 3, "batch_size": 4, "accumulation": 8},
    "optimiser": {"lr": 3e-4},
    "lora": {"rank": 8, "alpha": 16.0, "targets": ("gate", "up", "down", "q", "v")},
    "trainable": ("router", "lm_head", "embed_tokens", "mask_decoder", "mask_head", "region_adapter"),
    "mixture": {"mode": "dense", "num_experts": (2,), "top_k": 1, "capacity_factor": 1.5, "eval_capacity_factor": 2.0},
    "losses": {"ce": 1.0, "dice": 0.5, "bce": 2.0, "focal": 0.0, "iou": 0.0},
}

PUBLISHED: Mapping[int, Mapping[str, Any]] = {1: _ALIGNMENT, 2: _VQA_EXPERT, 3: _GROUNDING_EXPERT, 4: _MIXTURE}
"""Published settings of each stage, as a recipe's nested values; what is not named is the recipe's plain default."""

PUBLISHED_GPUS = 4
"""That the published settings were used on."""

STAGE_NAMES: Mapping[int, str] = {1: "alignment", 2: "VQA expert", 3: "grounding expert", 4: "mixture of experts"}


def schedule_notes(recipe: Recipe, processes: int, steps_per_epoch: float) -> list[str]:
    """What is worth knowing about a run's length and batch: epochs that do not count, a batch unlike the published."""
    schedule, notes = recipe.schedule, []
    if schedule.max_steps:
        epochs = schedule.max_steps / steps_per_epoch
        notes.append(f"schedule.max_steps={schedule.max_steps} is {epochs:.3g} epochs; schedule.epochs is not used")
    settings = PUBLISHED[recipe.stage]["schedule"]
    published = PUBLISHED_GPUS * settings["batch_size"] * settings["accumulation"]
    forward = schedule.batch_size * processes
    if forward * schedule.accumulation != published:
        if published % forward == 0:
            advice = f"schedule.accumulation={published // forward} gives that"
        elif published % processes == 0:
            advice = f"schedule.batch_size={published // processes} schedule.accumulation=1 gives that"
        else:
            advice = f"no batch size gives that in {processes} processes"
        notes.append(
            f"global batch {forward * schedule.accumulation} ({schedule.batch_size} records × {schedule.accumulation} "
            f"accumulated × {processes} processes); published for stage {recipe.stage}: {published}; {advice}"
        )
    return notes


def epoch_steps(schedule: Schedule, records: int, processes: int) -> float:
    """Optimizer steps of one pass over so many records; the last batch of a pass is filled up."""
    return math.ceil(records / (schedule.batch_size * processes)) / schedule.accumulation


def total_steps(schedule: Schedule, steps_per_epoch: float) -> int:
    """Optimiser steps of a run: ``max_steps`` where it is set, else those of all epochs."""
    return schedule.max_steps or math.ceil(schedule.epochs * steps_per_epoch)


def rate_factor(optimiser: Optimiser, steps_per_epoch: float, total_steps: int) -> Callable[[int], float]:
    """What the peak learning rate is multiplied by at each step, for ``torch.optim.lr_scheduler.LambdaLR``.

    Step 0 is the first one and already learns; the last step, ``total_steps - 1``, still does.

    Returns:
        A function of the step, in (0, 1].
    """
    # Steps of rising learning rate: a share of one epoch's, at least one where the share is not zero.
    warmup = max(1, int(optimiser.warmup * steps_per_epoch)) if optimiser.warmup else 0
    decaying = max(1, total_steps - warmup + (warmup > 0))  # the last warm-up step is the peak itself

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if optimiser.decay == "constant":
            return 1.0
        left = max(0.0, (total_steps - step) / decaying)
        return left if optimiser.decay == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)

    return factor
