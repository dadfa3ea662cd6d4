"""This process among those of one launch, and the records that are its own.

Works under ``torchrun``, ``deepspeed`` and ``accelerate launch``, which tell each process its rank in the environment,
and alone. Processes speak to each other through files only, so nothing is set up and nobody waits for a network.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from model.errors import MedPLIBError


@dataclass(frozen=True)
class Place:
    """One process of a launch.

    Attributes:
        rank: its number among all, from 0; 0 joins the parts and reports.
        world_size: number of processes.
        local_rank: its number on this machine, which is also its GPU's.
        local_world_size: number of processes on this machine.
        launch: the same in all processes of one launch, another in the next.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launch: str = "alone"

    @property
    def is_first(self) -> bool:
        """Whether this process joins the parts and reports."""
        return self.rank == 0

    @classmethod
    def from_environment(cls, local_rank: int | None = None) -> Place:
        """What the launcher says; alone where there was none.

        Args:
            local_rank: as a launcher's ``--local_rank`` gives it, used where the environment does not say.

        Raises:
            MedPLIBError: the variables are no numbers, or contradict each other.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        try:
            found = {name: int(os.environ[name]) for name in names if name in os.environ}
        except ValueError as error:
            raise MedPLIBError(f"the launcher's variables {', '.join(names)} must be whole numbers; {error}") from error
        rank, world_size = found.get("RANK", 0), found.get("WORLD_SIZE", 1)
        if not 0 <= rank < world_size:
            raise MedPLIBError(f"RANK is {rank} and WORLD_SIZE {world_size}; ranks are counted from 0")
        local = found.get("LOCAL_RANK", local_rank if local_rank is not None and local_rank >= 0 else 0)
        local_size = found.get("LOCAL_WORLD_SIZE", world_size)
        return cls(rank, world_size, local, local_size, _launch(local_size == world_size))


def _launch(one_machine: bool) -> str:
    """Names the launch: processes of one have the same master, run and, on one machine, the same parent."""
    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_STEP_ID")
    parts = [os.environ.get(name, "") for name in names]
    if one_machine:
        parts += [str(os.getppid()), started(os.getppid())]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()


def started(process: int) -> str:
    """When a process of this machine began, in the kernel's clock ticks; empty where that cannot be told."""
    try:
        return Path(f"/proc/{process}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def choose_device(wanted: str, place: Place) -> torch.device:
    """The device of this process.

    Args:
        wanted: ``auto`` (CUDA where there is any), ``cpu``, ``cuda`` (each process its own) or one by name, ``cuda:1``.
        place: of this process.

    Raises:
        MedPLIBError: there is no such device, or fewer GPUs than processes.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted != "cuda":
        if wanted.startswith("cuda:") and place.local_world_size > 1:
            raise MedPLIBError(
                f"{place.local_world_size} processes cannot share the device {wanted}; give cuda, for each its own"
            )
        return torch.device(_checked(wanted))
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not visible:
        raise MedPLIBError("the device is cuda, but no GPU is visible here; use cpu")
    if place.local_rank >= visible:
        raise MedPLIBError(
            f"process {place.local_rank} has no GPU of its own, only {visible} are visible; launch fewer processes"
        )
    return torch.device("cuda", place.local_rank)


def _checked(name: str) -> str:
    try:
        torch.device(name)
    except RuntimeError as error:
        raise MedPLIBError(f"{name!r:.80} is no device; give auto, cpu, cuda or cuda:1") from error
    return name


def share_cores(place: Place) -> None:
    """Give each process of this machine its share of the CPU cores, unless the user has said how many threads."""
    if place.local_world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // place.local_world_size))


def chunk(total: int, num_chunks: int, index: int) -> range:
    """Record numbers of one of ``num_chunks`` runs of neighbours, cut as published: all but the last equally long."""
    size = -(-total // num_chunks)
    return range(min(index * size, total), min((index + 1) * size, total))


def shard(numbers: range, place: Place) -> range:
    """The records of one process: every ``world_size``-th."""
    return numbers[place.rank :: place.world_size]
