"""Rank and world size of this process, launched by ``deepspeed``, ``torchrun``, or alone."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import distributed

from model.errors import MedPLIBError
from model.train.recipe import Engine

T = TypeVar("T")


@dataclass(frozen=True)
class Process:
    """One rank of a run."""

    rank: int  # 0 writes files
    world_size: int  # number of processes
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            distributed.barrier()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over all ranks, float64 on the CPU; a tensor of its own, and ``values`` stay as they are."""
        total = values.detach().to(self.device if self.world_size > 1 else "cpu", torch.float64, copy=True)
        if self.world_size > 1:
            distributed.all_reduce(total)
        return total.cpu()

    def on_first(self, work: Callable[[], T]) -> T:
        """Do something on rank 0 alone; every rank gets what it returns (anything that can be pickled).

        Raises:
            MedPLIBError, OSError: rank 0 raised it; every rank raises the same.
        """
        done: list[Any] = [None, None]
        if self.is_first:
            try:
                done[0] = work()
            except (MedPLIBError, OSError) as error:
                done[1] = error
        if self.world_size > 1:
            distributed.broadcast_object_list(done)
        value, failure = done
        if failure is not None:
            raise failure
        return value

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value (anything that can be pickled), on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        distributed.all_gather_object(values, value)
        return values


def launched_processes() -> int:
    """Processes of this launch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(engine: Engine) -> Process:
    """Find the launcher's variables (or set them for one process) and join the other ranks.

    Raises:
        MedPLIBError: no CUDA device, fewer GPUs than processes, or the torch engine launched more than once.
    """
    wants_cuda = engine.device == "cuda" or (engine.device == "auto" and torch.cuda.is_available())
    if wants_cuda and not torch.cuda.is_available():
        raise MedPLIBError("engine.device is cuda, but no CUDA device is visible; use engine.device=cpu")
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if wants_cuda else torch.device("cpu")
    if wants_cuda and local_rank >= torch.cuda.device_count():
        raise MedPLIBError(
            f"process {local_rank} has no GPU of its own, only {torch.cuda.device_count()} are visible; launch fewer"
        )
    if wants_cuda:
        torch.cuda.set_device(device)
    if world_size % engine.expert_parallel:
        raise MedPLIBError(
            f"engine.expert_parallel is {engine.expert_parallel}, which does not divide the number of processes, "
            f"{world_size}; launch more or set it to 1"
        )
    if engine.kind == "torch" and world_size > 1:
        raise MedPLIBError(
            f"engine.kind=torch trains in one process, but {world_size} were launched; use engine.kind=deepspeed"
        )
    if engine.kind == "deepspeed":
        _init_deepspeed(device)
    return Process(rank, world_size, device)


def _init_deepspeed(device: torch.device) -> None:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
    try:
        import deepspeed
    except ImportError as error:
        raise MedPLIBError(
            "DeepSpeed is not installed; install the train extra (pip install -e .[train]), or use engine.kind=torch"
        ) from error
    if device.type == "cpu":
        # DeepSpeed's shared-memory all-reduce is compiled with g++ for a minute at its first use; gloo needs nothing.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not distributed.is_initialized():
        backend = "gloo" if device.type == "cpu" else "nccl"
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def leave() -> None:
    """Part from the other ranks."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
