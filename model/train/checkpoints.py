"""Checkpoints to resume from: weights that learn, optimiser, data order and random numbers; the newest few are kept."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from model.errors import MedPLIBError
from model.train.engine import TrainingEngine
from model.train.process import Process

FOLDER = "checkpoints"
"""Folder inside a run that holds them, one ``step_…`` folder each."""
_STEP = re.compile(r"step_(\d+)")
_WEIGHTS = "trainable.safetensors"
_PROGRESS = "progress.json"


def save_checkpoint(
    engine: TrainingEngine, run_folder: Path, step: int, data_order: Mapping[str, Any], keep: int
) -> Path:
    """Write the checkpoint of ``step`` (under another name until it is whole) and remove the oldest beyond ``keep``.

    Called by every rank.
    """
    process = engine.process
    final = run_folder / FOLDER / f"step_{step:07d}"
    partial = final.with_suffix(".partial")
    if process.is_first:
        for unfinished in (run_folder / FOLDER).glob("step_*.partial"):  # of a run that was killed while it saved
            shutil.rmtree(unfinished)
        partial.mkdir(parents=True)
    process.barrier()
    engine.save(partial)
    torch.save(_random_state(), partial / _random_file(process))
    weights = engine.gather(trainable_only=True)
    if process.is_first:
        save_file({name: value.contiguous().cpu() for name, value in weights.items()}, partial / _WEIGHTS)
        progress = {"step": step, "world_size": process.world_size, "data_order": dict(data_order)}
        (partial / _PROGRESS).write_text(json.dumps(progress, indent=2) + "\n")
    process.barrier()
    if process.is_first:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in list_checkpoints(run_folder)[:-keep]:
            shutil.rmtree(old)
    process.barrier()
    return final


def load_checkpoint(engine: TrainingEngine, folder: Path) -> dict[str, Any]:
    """Take up a checkpoint and return its progress: ``step`` and ``data_order``. Called by every rank.

    Raises:
        MedPLIBError: it was written by another number of processes or another engine, or is damaged.
    """
    process = engine.process
    try:
        progress = json.loads((folder / _PROGRESS).read_text())
    except (OSError, ValueError) as error:
        raise MedPLIBError(
            f"{folder} is not a whole training checkpoint: {error}; remove it to use an older one"
        ) from None
    if progress["world_size"] != process.world_size:
        raise MedPLIBError(
            f"{folder} was written by {progress['world_size']} processes, this run has {process.world_size}; "
            "resume with the same number"
        )
    engine.load(folder)
    _restore_random_state(torch.load(folder / _random_file(process), weights_only=True))
    return progress


def load_trainable(network: torch.nn.Module, folder: Path) -> None:
    """Lay a checkpoint's learnt weights over a network that was set up by the same recipe.

    Raises:
        MedPLIBError: the weights are not the network's trainable ones.
    """
    weights = load_file(folder / _WEIGHTS)
    expected = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    if set(weights) != expected:
        odd = sorted(set(weights) ^ expected)[0]
        raise MedPLIBError(f"{folder} does not fit its recipe: {odd} is on one side only")
    network.load_state_dict(weights, strict=False)


def list_checkpoints(run_folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    folder = run_folder / FOLDER
    found = [path for path in folder.iterdir() if _STEP.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def _random_file(process: Process) -> str:
    return f"random_{process.rank}.pt"


def _random_state() -> dict[str, Any]:
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
    }


def _restore_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    random.setstate(state["python"])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))
