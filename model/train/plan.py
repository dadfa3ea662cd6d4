"""What a training run needs before it is started: memory by part, disk, steps; from its recipe alone."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from model.errors import MedPLIBError
from model.train.plan_activations import ActivationModel, Pass, Records
from model.train.plan_data import DataSummary, summarise_data
from model.train.plan_memory import Machine, Memory, memory_of
from model.train.plan_network import Sizes, Weight, find_sizes, open_environment, planned_network, weights_of
from model.train.recipe import Recipe
from model.train.recipe_io import load_recipe

_MASKS = {1: 0, 2: 0, 3: 1, 4: 1}
_REGIONS = {1: 0, 2: 1, 3: 0, 4: 1}
"""Of a record, by stage: grounding records have one mask a turn, region questions one region."""


@dataclass(frozen=True)
class Assumptions:
    """What a recipe does not say about its records.

    Attributes:
        tokens: text tokens of the longest record, its image counting as one; None means ``data.max_length``.
        supervised: share of the tokens that carry a loss.
        image_size: side of the images on disk in pixels, at which mask losses are computed.
    """

    tokens: int | None = None
    supervised: float = 0.5
    image_size: int = 512


class Planner:
    """Memory of a recipe and of its variants; the network is looked at once.

    Args:
        recipe: as it was loaded.
        sizes: of its network.
        assumptions: about its records.
        device: ``cuda`` or ``cpu``.

    Raises:
        MedPLIBError: the recipe names parts that the network does not have.
    """

    def __init__(self, recipe: Recipe, sizes: Sizes, assumptions: Assumptions, device: str) -> None:
        self.recipe, self.sizes, self.device = recipe, sizes, device
        self.weights: Sequence[Weight] = weights_of(planned_network(recipe, sizes.config))
        self.records = records_of(recipe, assumptions)
        self.activations = ActivationModel(recipe, sizes.config, self.records, device)

    def memory(self, recipe: Recipe, machine: Machine) -> Memory:
        """Of a variant of the recipe: other batch, engine, precision or quantisation."""
        recipe = resolved_for(recipe, machine)
        return memory_of(recipe, self.weights, machine, self._pass(recipe))

    def _pass(self, recipe: Recipe) -> Pass:
        engine, batch = recipe.engine, recipe.schedule.batch_size
        types = [torch.bfloat16] if engine.precision == "bf16" else [torch.float32]
        if engine.precision == "bf16" and engine.kind == "torch":
            types.append(torch.float32)  # under autocast norms and sums stay in float32: about half of what is kept
        found = [
            self.activations.measure(batch, engine.gradient_checkpointing, engine.attention, dtype) for dtype in types
        ]
        return Pass(sum(one.peak for one in found) / len(found), sum(one.tail for one in found) / len(found))


@dataclass(frozen=True)
class Plan:
    """A recipe on a machine.

    Attributes:
        recipe: with its engine resolved.
        machine: what it would run on.
        planner: what knows its network.
        memory: of the recipe as it is.
        data: its records, where the files are here.
        placeholders: environment variables that are not set.
    """

    recipe: Recipe
    machine: Machine
    planner: Planner
    memory: Memory
    data: DataSummary | None
    placeholders: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether both the GPUs' and the hosts' memory suffice."""
        return fits(self.memory, self.machine)

    @property
    def global_batch(self) -> int:
        """Records per optimiser step over all GPUs."""
        schedule = self.recipe.schedule
        return schedule.batch_size * schedule.accumulation * self.machine.ranks


def make_plan(
    path: str | Path,
    overrides: Sequence[str],
    machine: Machine,
    assumptions: Assumptions | None = None,
    sizes: Path | None = None,
) -> Plan:
    """Plan a recipe file; neither weights nor data need be here.

    Raises:
        MedPLIBError: as ``load_recipe``, but for environment variables that are not set; or sizes cannot be read.
    """
    environment = open_environment(Path(path), overrides, os.environ)
    recipe = load_recipe(path, overrides, environment)
    device = "cpu" if recipe.engine.device == "cpu" else "cuda"
    machine = replace(machine, device=device)
    if recipe.engine.kind == "torch" and machine.ranks > 1:
        raise MedPLIBError(
            f"engine.kind=torch trains in one process, but there are {machine.ranks} GPUs; use engine.kind=deepspeed"
        )
    if recipe.engine.deepspeed and not Path(recipe.engine.deepspeed).is_file():
        raise MedPLIBError(
            f"engine.deepspeed is {recipe.engine.deepspeed}, which does not exist; name the file or leave it empty"
        )
    found = find_sizes(recipe, Path(path), sizes)
    planner = Planner(recipe, found, assumptions or Assumptions(), device)
    placeholders = tuple(sorted(set(environment) - set(os.environ)))
    recipe = resolved_for(recipe, machine)
    return Plan(
        recipe, machine, planner, planner.memory(recipe, machine), summarise_data(recipe, found.config), placeholders
    )


def records_of(recipe: Recipe, assumptions: Assumptions) -> Records:
    """What a batch of the recipe is planned to be made of."""
    tokens = min(assumptions.tokens or recipe.data.max_length, recipe.data.max_length)
    return Records(
        tokens=tokens,
        supervised=max(1, min(tokens - 1, math.ceil(tokens * assumptions.supervised))),
        regions=_REGIONS[recipe.stage],
        masks=_MASKS[recipe.stage],
        image_size=assumptions.image_size,
    )


def resolved_for(recipe: Recipe, machine: Machine) -> Recipe:
    """The recipe with ``engine.kind: auto`` decided by the number of processes."""
    if recipe.engine.kind != "auto":
        return recipe
    alone = machine.ranks == 1 and recipe.engine.offload == "none"
    return replace(recipe, engine=replace(recipe.engine, kind="torch" if alone else "deepspeed"))


def fits(memory: Memory, machine: Machine) -> bool:
    """Whether GPUs and hosts have the memory."""
    return memory.peak <= machine.gpu_memory and memory.host_total <= machine.host_memory
