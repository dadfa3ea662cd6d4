"""Which changes to a recipe would make it fit, the cheapest in speed first; or on how many GPUs it would."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from model.train.plan import Plan, fits
from model.train.plan_memory import Machine, Memory
from model.train.recipe import Recipe
from model.train.recipe_checks import check_values

_SHOWN = 4
_MOST_GPUS = 64
_HALVING, _CHECKPOINTING, _QUANTISED, _SHARED_EXPERTS = 1.04, 1.33, {"none": 1.0, "int8": 1.6, "nf4": 1.35}, 1.15
_ZERO = {0: 1.0, 1: 1.0, 2: 1.03, 3: 1.3}
_OFFLOAD = {"none": 1.0, "optimiser": 1.4, "all": 3.0}
"""Slow-downs by which changes are put in order: rules of thumb, none of them measured."""


@dataclass(frozen=True)
class Change:
    """A variant of a recipe.

    Attributes:
        overrides: what makes it, as the command line takes it.
        recipe: it itself.
        memory: what it would take.
        slower: about how many times as long a step lasts.
    """

    overrides: tuple[str, ...]
    recipe: Recipe
    memory: Memory
    slower: float


def advise(plan: Plan) -> list[Change]:
    """The few changes at the same global batch that make a plan fit, cheapest first; the best of each set of keys."""
    fitting = [change for change in _changes(plan) if fits(change.memory, plan.machine)]
    chosen: list[Change] = []
    for change in sorted(fitting, key=lambda one: (one.slower, len(one.overrides), one.memory.peak)):
        if not any(_same_keys(known, change) or {*known.overrides} <= {*change.overrides} for known in chosen):
            chosen.append(change)
    return chosen[:_SHOWN]


def smallest(plan: Plan) -> Change | None:
    """The change that takes least GPU memory of those that the hosts have the memory for."""
    found = [one for one in _changes(plan) if one.memory.host_total <= plan.machine.host_memory]
    return min(found, key=lambda change: change.memory.peak, default=None)


def gpus_needed(plan: Plan) -> tuple[Machine, Change | None] | None:
    """The fewest GPUs, by doubling, on which the recipe fits: as it is (no change), or with the cheapest change."""
    machine = plan.machine
    while machine.ranks * 2 <= _MOST_GPUS:
        machine = _doubled(machine)
        spread = _spread(plan, machine)
        if spread is None:
            return None
        bigger = replace(plan, machine=machine, recipe=spread, memory=plan.planner.memory(spread, machine))
        if bigger.fits:
            return machine, None
        found = advise(bigger)
        if found:
            return machine, found[0]
    return None


def _doubled(machine: Machine) -> Machine:
    return replace(machine, gpus=machine.gpus * 2) if machine.gpus < 8 else replace(machine, nodes=machine.nodes * 2)


def _spread(plan: Plan, machine: Machine) -> Recipe | None:
    """The recipe on more GPUs at the same global batch, or None where there are fewer records than GPUs."""
    per_rank, left = divmod(plan.global_batch, machine.ranks)
    if left or not per_rank:
        return None
    batch = next(size for size in range(min(plan.recipe.schedule.batch_size, per_rank), 0, -1) if not per_rank % size)
    schedule = replace(plan.recipe.schedule, batch_size=batch, accumulation=per_rank // batch)
    engine = plan.recipe.engine
    return replace(plan.recipe, schedule=schedule, engine=replace(engine, kind="deepspeed"))


def _changes(plan: Plan) -> Iterator[Change]:
    """Every variant that is a valid recipe on this machine."""
    recipe, engine = plan.recipe, plan.recipe.engine
    recomputed = [True] if engine.gradient_checkpointing else [False, True]
    ways = itertools.product(recomputed, _zero_stages(plan), _offloads(plan), _schemes(plan), _expert_shares(plan))
    for again, stage, offload, scheme, experts in ways:
        changed: Any = replace(
            engine, gradient_checkpointing=again, zero_stage=stage, offload=offload, expert_parallel=experts
        )
        lora = replace(recipe.lora, quantise=scheme)
        for batch, halvings in _batches(recipe):
            accumulation = recipe.schedule.accumulation * recipe.schedule.batch_size // batch
            schedule = replace(recipe.schedule, batch_size=batch, accumulation=accumulation)
            variant = replace(recipe, engine=changed, schedule=schedule, lora=lora)
            overrides = _overrides(recipe, variant)
            if overrides and not check_values(variant):
                slower = _slower(recipe, variant) * _HALVING**halvings
                yield Change(overrides, variant, plan.planner.memory(variant, plan.machine), slower)


def _zero_stages(plan: Plan) -> list[int]:
    own = plan.recipe.engine.zero_stage
    if plan.recipe.engine.kind != "deepspeed":
        return [own]
    useful = {2, 3} if plan.machine.ranks > 1 else {3}  # one process alone shares nothing, but can offload weights
    return sorted({own, *(stage for stage in useful if stage > own)})


def _offloads(plan: Plan) -> list[Any]:
    own, ways = plan.recipe.engine.offload, ["none", "optimiser", "all"]
    if plan.recipe.engine.kind != "deepspeed" or plan.machine.device == "cpu":
        return [own]
    return ways[ways.index(own) :]


def _schemes(plan: Plan) -> list[Any]:
    lora = plan.recipe.lora
    free = lora.rank and lora.quantise == "none" and plan.machine.device == "cuda"
    return ["none", "int8", "nf4"] if free else [lora.quantise]


def _batches(recipe: Recipe) -> list[tuple[int, int]]:
    """Batch sizes from the recipe's own down by halves, with the number of halvings."""
    batch = recipe.schedule.batch_size
    found: list[tuple[int, int]] = []
    while True:
        found.append((batch, len(found)))
        if batch % 2:
            return found
        batch //= 2


def _expert_shares(plan: Plan) -> list[int]:
    own = plan.recipe.engine.expert_parallel
    if plan.recipe.stage != 4 or plan.recipe.engine.kind != "deepspeed":
        return [own]
    counts = {*plan.recipe.mixture.num_experts}
    return sorted({own, *(n for n in range(2, min(counts) + 1) if not plan.machine.ranks % n)}) if own == 1 else [own]


def _slower(recipe: Recipe, variant: Recipe) -> float:
    """How many times as long a step of the variant lasts, about."""
    before, after = recipe.engine, variant.engine
    factor = _CHECKPOINTING if after.gradient_checkpointing and not before.gradient_checkpointing else 1.0
    factor *= _ZERO[after.zero_stage] / _ZERO[before.zero_stage]
    factor *= _OFFLOAD[after.offload] / _OFFLOAD[before.offload]
    factor *= _QUANTISED[variant.lora.quantise] / _QUANTISED[recipe.lora.quantise]
    return factor * (_SHARED_EXPERTS if after.expert_parallel > before.expert_parallel else 1.0)


def _overrides(recipe: Recipe, variant: Recipe) -> tuple[str, ...]:
    """What the command line needs to make the variant of the recipe."""
    keys = (
        *("schedule.batch_size", "schedule.accumulation", "engine.gradient_checkpointing", "engine.zero_stage"),
        *("engine.offload", "engine.expert_parallel", "lora.quantise"),
    )
    told = []
    for key in keys:
        section, _, name = key.partition(".")
        before, after = (getattr(getattr(one, section), name) for one in (recipe, variant))
        if before != after:
            told.append(f"{key}={str(after).lower() if isinstance(after, bool) else after}")
    return tuple(told)


def _same_keys(one: Change, other: Change) -> bool:
    return {text.partition("=")[0] for text in one.overrides} == {text.partition("=")[0] for text in other.overrides}
