"""What optimiser steps are fed with: how long they wait for it, and how much of it is padding."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import get_worker_info

from model.data.lengths import real_tokens
from model.errors import MedPLIBError
from model.train.process import Process

_SHARED = Path("/dev/shm")
_NO_SHARED_MEMORY = re.compile(r"unable to (mmap|resize|allocate|open|write).*(/torch_|shared)|Bus error|shared memory")


def taken_from(batches: Iterator[dict[str, Any]]) -> tuple[dict[str, Any] | None, str]:
    """The next batch, None after the last one; and what a record is refused for.

    A sentence instead of an exception: that would hold the loader, whose processes could then not be ended.
    """
    try:
        return next(batches, None), ""
    except MedPLIBError as error:  # from a loader process it comes wrapped in that process's traceback
        name = f"{MedPLIBError.__module__}.{MedPLIBError.__name__}: "
        return None, str(error).strip().splitlines()[-1].removeprefix(name)
    except RuntimeError as error:
        fault = short_of_shared_memory(error)
        if not fault:
            raise
        return None, fault


def short_of_shared_memory(error: BaseException) -> str:
    """The sentence about an error that comes of a too small /dev/shm; empty about any other."""
    if not (isinstance(error, RuntimeError) and _NO_SHARED_MEMORY.search(str(error))):
        return ""
    free = shutil.disk_usage(_SHARED).free / 2**20 if _SHARED.is_dir() else 0.0
    return (
        f"shared memory is full: loader processes pass batches through {_SHARED}, which has {free:.1f} MiB free; "
        "enlarge it (docker run --shm-size=8g, or --ipc=host), or load in the training process by data.workers=0"
    )


def in_shared_memory(collate: Callable[[list[Any]], Any], samples: list[Any]) -> Any:
    """A batch that a loader process put into shared memory itself.

    Left to the queue between the processes, a failure would be printed by a thread of the loader and the training would
    wait for the batch for ever; raised here, it reaches the training.
    """
    batch = collate(samples)
    if get_worker_info() is not None:
        _share(batch)
    return batch


def _share(value: Any) -> None:
    if isinstance(value, torch.Tensor):
        value.share_memory_()
    elif isinstance(value, Mapping):
        _share(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            _share(item)


class Feed:
    """Batches of one optimiser step on this rank.

    Args:
        visual_tokens: places that an image takes, see ``MedPLIBConfig.visual_tokens``.
    """

    def __init__(self, visual_tokens: int) -> None:
        self.visual_tokens = visual_tokens
        self.waited, self.real, self.places = 0.0, 0, 0

    def take(self, next_batch: Callable[[], dict[str, Any]]) -> Mapping[str, Any]:
        """The next batch; what it holds and the wait for it are noted."""
        begun = time.perf_counter()
        batch = next_batch()
        self.waited += time.perf_counter() - begun
        real, places = real_tokens(batch, self.visual_tokens)
        self.real, self.places = self.real + real, self.places + places
        return batch

    def report(self, process: Process, seconds: float) -> dict[str, float]:
        """Over all ranks: ``data_seconds`` waited for data (a mean), ``padding`` as a share of all tokens, and
        ``tokens_per_s``, padding not counted. Called by every rank.

        Args:
            seconds: what the whole step took.
        """
        sums = process.sum(torch.tensor([self.waited, self.real, self.places], dtype=torch.float64))
        waited, real, places = sums.tolist()
        return {
            "data_seconds": waited / process.world_size,
            "padding": 1 - real / places,
            "tokens_per_s": real / seconds,
        }
