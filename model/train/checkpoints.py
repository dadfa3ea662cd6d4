"""Checkpoints to resume from: weights that learn, optimiser, data order and random numbers; the newest few are kept."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from model.errors import MedPLIBError
from model.train.durable import (
    MANIFEST,
    damage,
    disk_faults,
    facts_of,
    file_names,
    read_manifest,
    sync_folder,
    sync_tree,
    write_through,
)
from model.train.engine import TrainingEngine
from model.train.process import Process

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
"""Folder inside a run that holds them, one ``step_…`` folder each."""
_STEP = re.compile(r"step_(\d+)")
WEIGHTS = "trainable.safetensors"
_PROGRESS = "progress.json"


def save_checkpoint(
    engine: TrainingEngine, run_folder: Path, progress: Mapping[str, Any], keep: int, best: int | None = None
) -> Path:
    """Write a checkpoint under another name until it is whole and on the disk, then remove the oldest beyond ``keep``.

    The newest one that was written after a good step stays, however many came after it. Called by every rank.

    Args:
        progress: ``step``, and whatever a resumed run wants to know.
        keep: newest checkpoints that stay.
        best: step of one that stays besides.

    Raises:
        MedPLIBError: the disk is full or the folder cannot be written; what was there before is untouched.
    """
    process, step = engine.process, progress["step"]
    final = checkpoint_of(run_folder, step)
    partial = final.with_suffix(".partial")
    kept = next((path.name for path in reversed(list_checkpoints(run_folder))), "none")
    with disk_faults(f"the checkpoint of step {step} in {final.parent} (newest whole one there: {kept})"):
        try:
            if process.is_first:
                remove_leftovers(run_folder)
                partial.mkdir(parents=True)
            process.barrier()
            _write(engine, partial, {**progress, "world_size": process.world_size})
        except Exception:
            with suppress(OSError):
                for path in file_names(partial):  # a writer that failed may hold its file open, removed or not
                    os.truncate(partial / path, 0)
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if process.is_first:
            _put_in_place(partial, final)
            rotate(run_folder, keep, best)
    process.barrier()
    return final


def _write(engine: TrainingEngine, folder: Path, progress: Mapping[str, Any]) -> None:
    process = engine.process
    engine.save(folder)
    torch.save(random_state(), folder / _random_file(process))
    weights = engine.gather(trainable_only=True)
    if process.is_first:
        save_file({name: value.contiguous().cpu() for name, value in weights.items()}, folder / WEIGHTS)
        (folder / _PROGRESS).write_text(json.dumps(progress, indent=2) + "\n")
    process.barrier()
    own = facts_of(folder, file_names(folder)[process.rank :: process.world_size])
    files = {name: facts for part in process.gather(own) for name, facts in part.items()}
    if process.is_first:
        write_through(folder / MANIFEST, {"files": dict(sorted(files.items()))})
        sync_tree(folder)


def _put_in_place(partial: Path, final: Path) -> None:
    replaced = final.with_suffix(".replaced")
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def rotate(run_folder: Path, keep: int, best: int | None = None) -> None:
    """Remove all but the newest ``keep``, the newest that followed a good step, and that of step ``best``."""
    found = list_checkpoints(run_folder)
    staying = {*found[-keep:], *(path for path in found if step_of(path) == best)}
    staying.update(next(([path] for path in reversed(found) if _followed_a_good_step(path)), []))
    for old in found:
        if old not in staying:
            shutil.rmtree(old.rename(old.with_suffix(".removed")))


def _followed_a_good_step(folder: Path) -> bool:
    try:
        return not read_progress(folder).get("bad_steps", {}).get("in_a_row")
    except MedPLIBError:
        return False


def remove_leftovers(run_folder: Path) -> None:
    """Remove what a run left half done that was killed while it saved, or that is damaged."""
    for path in (run_folder / FOLDER).glob("step_*.*"):
        shutil.rmtree(path)


def find_whole_checkpoint(run_folder: Path, process: Process) -> Path | None:
    """The newest checkpoint whose files are as they were written; damaged ones are put aside with a warning.

    None where there is none. Rank 0 looks, and tells the others, whose file system may not show the same yet. Called by
    every rank.

    Raises:
        MedPLIBError: there are checkpoints, but all are damaged.
    """
    found = process.on_first(lambda: list_checkpoints(run_folder))
    damaged: list[Path] = []
    for folder in reversed(found):
        fault = _fault(folder, process)
        if not fault:
            process.on_first(partial(_put_aside, damaged))
            return folder
        if process.is_first:
            logger.warning("%s is damaged (%s), so an older checkpoint is looked for", folder, fault)
        damaged.append(folder)
    if found:  # they stay where they are: the next attempt must not take the run for one that saved nothing
        raise MedPLIBError(
            f"no checkpoint in {run_folder / FOLDER} is whole; begin again without --resume in another folder"
        )
    return None


def _put_aside(damaged: Sequence[Path]) -> None:
    for folder in damaged:
        aside = folder.with_suffix(".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)


def _fault(folder: Path, process: Process) -> str:
    """What is wrong with a checkpoint, the same on every rank; each rank reads its share of the files."""
    try:
        files = process.on_first(partial(_files_to_check, folder))
    except (OSError, MedPLIBError) as error:  # on every rank
        return str(error)
    own = damage(folder, dict(list(files.items())[process.rank :: process.world_size]))
    return next(filter(None, process.gather(own)), "")


def _files_to_check(folder: Path) -> dict[str, dict[str, Any]]:
    read_progress(folder)
    try:
        return read_manifest(folder)
    except (ValueError, KeyError, TypeError) as error:
        raise MedPLIBError(f"{folder / MANIFEST} is no list of files: {error}") from None


def read_progress(folder: Path) -> dict[str, Any]:
    """What a checkpoint says about itself: ``step``, ``world_size``, ``data_order`` and more.

    Raises:
        MedPLIBError: it says nothing.
    """
    try:
        progress = json.loads((folder / _PROGRESS).read_text())
    except (OSError, ValueError) as error:
        raise MedPLIBError(f"{folder} is not a whole training checkpoint: {error}") from None
    if not isinstance(progress, dict) or "step" not in progress:
        raise MedPLIBError(f"{folder} is not a whole training checkpoint: {_PROGRESS} names no step")
    return progress


def load_checkpoint(engine: TrainingEngine, folder: Path) -> dict[str, Any]:
    """Take up a checkpoint and return its progress. Called by every rank.

    Raises:
        MedPLIBError: it was written by another engine, or is damaged.
    """
    process = engine.process
    progress = process.on_first(lambda: read_progress(folder))
    engine.load(folder)
    restore_random_state(torch.load(folder / _random_file(process), weights_only=True))
    return progress


def load_trainable(network: torch.nn.Module, folder: Path) -> None:
    """Lay a checkpoint's learnt weights over a network that was set up by the same recipe.

    Raises:
        MedPLIBError: the weights are not the network's trainable ones.
    """
    weights = load_file(folder / WEIGHTS)
    expected = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    if set(weights) != expected:
        odd = sorted(set(weights) ^ expected)[0]
        raise MedPLIBError(f"{folder} does not fit its recipe: {odd} is on one side only")
    network.load_state_dict(weights, strict=False)


def list_checkpoints(run_folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    folder = run_folder / FOLDER
    found = [path for path in folder.iterdir() if _STEP.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=step_of)


def checkpoint_of(run_folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run_folder / FOLDER / f"step_{step:07d}"


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step_"))


def _random_file(process: Process) -> str:
    return f"random_{process.rank}.pt"


def random_state() -> dict[str, Any]:
    """Where all random number generators of this process stand."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Put the generators back to where ``random_state`` found them."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    random.setstate(state["python"])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))
