"""Whether the disk has room for what a run will write, told before its first step."""

from __future__ import annotations

import logging
import shutil

import torch
from torch import nn

from model.errors import MedPLIBError
from model.train.checkpoints import list_checkpoints
from model.train.engine import TrainingEngine
from model.train.recipe import Recipe

logger = logging.getLogger(__name__)

_MASTER, _MOMENTS = 4, 8  # bytes a trained weight: its float32 value, and AdamW's two means


def check_room(recipe: Recipe, engine: TrainingEngine) -> None:
    """Warn where the disk has less room than the run will need, and refuse where not even one checkpoint fits.

    Sizes are estimates from the number of weights; other programs fill disks too. Called by every rank.

    Raises:
        MedPLIBError: not even one checkpoint, or nothing beside the one that is there, would fit.
    """
    checkpoint, merged = expected_sizes(engine.network)
    place = next(path for path in (recipe.folder.absolute(), *recipe.folder.absolute().parents) if path.is_dir())
    free, there = engine.process.on_first(lambda: (shutil.disk_usage(place).free, len(list_checkpoints(recipe.folder))))
    results = merged * (1 + recipe.saving.published)
    needed = checkpoint * max(1, recipe.saving.keep + 1 - there) + (0 if recipe.merged.is_dir() else results)
    if free < checkpoint:
        raise MedPLIBError(
            f"{place} has {_told(free)} free, and one checkpoint of this run takes about "
            f"{_told(checkpoint)}; make room or name another output"
        )
    if free < needed and engine.process.is_first:
        logger.warning(
            "%s has %s free, but this run will need about %s for %d checkpoints and its result; make room",
            *(place, _told(free), _told(needed), recipe.saving.keep + 1),
        )


def expected_sizes(network: nn.Module) -> tuple[int, int]:
    """Bytes of one checkpoint to resume from, and of the merged result."""
    checkpoint = merged = 0
    for parameter in network.parameters():
        count = getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 keeps the true size apart
        size = count * parameter.element_size()
        merged += size
        if parameter.requires_grad:
            # The weights lie in it twice, for resuming and for export, and in bf16 a float32 copy beside them.
            checkpoint += count * _MOMENTS + 2 * size + (0 if parameter.dtype == torch.float32 else count * _MASTER)
    return checkpoint, merged


def _told(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
