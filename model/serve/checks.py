"""Checks before a model is loaded: whether it exists, and whether it fits the memory."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from model.checkpoint.directories import base_of, is_adapter, read_settings, regular_files, resolve
from model.errors import MedPLIBError

BESIDE_WEIGHTS = 600 * 2**20
"""Bytes that a worker takes beside its weights: libraries, caches, a picture or two."""
_CGROUP = Path("/sys/fs/cgroup")
_GIB = 2**30


@dataclass(frozen=True)
class Stored:
    """A checkpoint as it lies on the disk.

    Attributes:
        size: bytes of its weights.
        half: whether they take two a number.
        regions: whether it can look at regions.
    """

    size: int
    half: bool
    regions: bool = False


def check_checkpoint(directory: Path, base: Path | None = None) -> Stored:
    """Facts of a checkpoint from its configuration; the weights are not read.

    Args:
        directory: the checkpoint, or a LoRA.
        base: the checkpoint that the LoRA was trained on.

    Raises:
        MedPLIBError: it is no directory with a configuration and weights, or the base is missing.
    """
    directory = resolve(directory)
    if not directory.is_dir():
        raise MedPLIBError(f"there is no directory {directory}; name a checkpoint with --model DIR")
    if is_adapter(directory):
        return check_checkpoint(base_of(directory, base))
    settings = read_settings(directory)
    weights = regular_files(directory, "*.safetensors")[0] or regular_files(directory, "*.bin")[0]
    size = sum(path.stat().st_size for path in weights)
    if size == 0:
        raise MedPLIBError(f"{directory} holds no weights (*.safetensors or *.bin); copy the checkpoint again")
    region = settings.get("region")
    regions = bool(region.get("enabled") if isinstance(region, dict) else settings.get("region_fea_adapter"))
    return Stored(size, "16" in str(settings.get("dtype") or settings.get("torch_dtype") or ""), regions)


def check_memory(weights: Stored, devices: Sequence[str], *, dtype: str | None = None, bits: int = 16) -> None:
    """Whether the workers fit the memory that is free now; what is unknown is left to them.

    Args:
        weights: of their checkpoint.
        devices: of each worker: ``cpu``, ``cuda``, ``cuda:1`` …, ``auto``.
        dtype: that was asked for; a CPU takes 32 bits where none was.
        bits: a weight takes on a GPU once it is loaded.

    Raises:
        MedPLIBError: they do not.
    """
    on_cpu = weights.size * (2 if weights.half and dtype in (None, "fp32") else 1) + BESIDE_WEIGHTS
    if shutil.which("nvidia-smi") is None:
        devices = ["cpu" if device == "auto" else device for device in devices]
    for device in dict.fromkeys(devices):
        count = devices.count(device)
        needed = count * (on_cpu if device == "cpu" else weights.size * min(bits, 16) // 16)
        free = free_memory() if device == "cpu" else _free_gpu_memory(device)
        if free is not None and needed > free:
            workers = "1 worker needs" if count == 1 else f"{count} workers need"
            raise MedPLIBError(
                f"{workers} about {needed / _GIB:.1f} GiB of memory and {device} has {free / _GIB:.1f} GiB free; "
                "stop other programs, start fewer workers, or take a smaller checkpoint"
            )


def free_memory() -> int | None:
    """Bytes that this machine, or the container it is, can still give; None where that is unknown."""
    found = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    with contextlib.suppress(OSError, ValueError):  # the limit may be "max"
        most, taken = (int((_CGROUP / f"memory.{name}").read_text(encoding="ascii")) for name in ("max", "current"))
        found.append(max(0, most - taken))
    return min(found, default=None)


def _free_gpu_memory(device: str) -> int | None:
    """Free bytes of a GPU by nvidia-smi; None where it is unknown, or which GPU is meant."""
    program = shutil.which("nvidia-smi")
    if program is None or device == "auto" or os.environ.get("CUDA_VISIBLE_DEVICES"):
        return None
    number = device.partition(":")[2] or "0"
    command = [program, "--query-gpu=memory.free", "--format=csv,noheader,nounits", f"--id={number}"]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return int(printed.strip()) * 2**20
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
