"""Checkpoints to resume from, and export: the network that a run ends with, LoRA merged, native names, on rank 0."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from model.checkpoint import merge_lora
from model.checkpoint.loading import finish, init_empty
from model.checkpoint.lora import merge_lora_state
from model.errors import MedPLIBError
from model.modeling.configuration import MedPLIBConfig
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.processor import MedPLIBProcessor
from model.train.distributed import Process
from model.train.engine import TrainingEngine
from model.train.init_weights import is_quantized, merge_quantized, starting_network
from model.train.recipe import RECIPE_FILE, Recipe, load_recipe
from model.train.runs import disk_errors, read_record, sync, write_atomic

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
"""Folder inside a run that holds them, one ``step_…`` folder each."""
_STEP = re.compile(r"step_(\d+)")
WEIGHTS = "trainable.safetensors"
MANIFEST = "manifest.json"
"""File of a checkpoint that lists its other files with ``bytes`` and ``sha256``."""
_PROGRESS = "progress.json"


def save_checkpoint(
    engine: TrainingEngine, run_folder: Path, progress: Mapping[str, Any], keep: int, best: int | None = None
) -> Path:
    """Write a checkpoint under another name until it is whole and on the disk, then ``rotate``. Called by every rank.

    ``progress`` holds ``step`` and whatever a resumed run wants to know.

    Raises:
        MedPLIBError: the disk is full or the folder cannot be written; what was there before is untouched.
    """
    process, step = engine.process, progress["step"]
    final = checkpoint_of(run_folder, step)
    partial = final.with_suffix(".partial")
    kept = next((path.name for path in reversed(list_checkpoints(run_folder))), "none")
    with disk_errors(f"the checkpoint of step {step} in {final.parent} (newest whole one there: {kept})"):
        try:
            if process.is_first:
                for left in (run_folder / FOLDER).glob("step_*.*"):  # half done when the run was killed, or damaged
                    shutil.rmtree(left)
                partial.mkdir(parents=True)
            process.barrier()
            _write(engine, partial, {**progress, "world_size": process.world_size})
        except Exception:
            with suppress(OSError):
                for path in _file_names(partial):  # a writer that failed may hold its file open, removed or not
                    os.truncate(partial / path, 0)
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if process.is_first:
            replaced = final.with_suffix(".replaced")
            if final.exists():
                final.rename(replaced)
            partial.rename(final)
            sync(final.parent)
            shutil.rmtree(replaced, ignore_errors=True)
            rotate(run_folder, keep, best)
    process.barrier()
    return final


def _write(engine: TrainingEngine, folder: Path, progress: Mapping[str, Any]) -> None:
    process = engine.process
    engine.save(folder)
    torch.save(random_state(), folder / f"random_{process.rank}.pt")
    weights = engine.gather(trainable_only=True)
    if process.is_first:
        save_file({name: value.contiguous().cpu() for name, value in weights.items()}, folder / WEIGHTS)
        (folder / _PROGRESS).write_text(json.dumps(progress, indent=2) + "\n")
    process.barrier()
    own: dict[str, Any] = {}
    for name in _file_names(folder)[process.rank :: process.world_size]:
        with (folder / name).open("rb") as stream:
            os.fsync(stream.fileno())
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        own[name] = {"bytes": (folder / name).stat().st_size, "sha256": digest}
    files = {name: facts for part in process.gather(own) for name, facts in part.items()}
    if process.is_first:
        write_atomic(folder / MANIFEST, {"files": dict(sorted(files.items()))})
        sync(folder, *folder.rglob("*"))


def _file_names(folder: Path) -> list[str]:
    """Names of all files below a folder, relative to it and sorted; the manifest is left out."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name != MANIFEST)


def rotate(run_folder: Path, keep: int, best: int | None = None) -> None:
    """Remove all but the newest ``keep``, the newest that followed a good step, and that of step ``best``."""
    found = list_checkpoints(run_folder)
    staying = {*found[-keep:], *(path for path in found if step_of(path) == best)}
    for path in reversed(found):
        with suppress(MedPLIBError):
            if not read_progress(path).get("bad_steps", {}).get("in_a_row"):
                staying.add(path)
                break
    for old in found:
        if old not in staying:
            shutil.rmtree(old.rename(old.with_suffix(".removed")))


def find_whole_checkpoint(run_folder: Path, process: Process) -> Path | None:
    """The newest checkpoint whose files are as written, None without any; damaged ones are put aside with a warning.

    Rank 0 looks and broadcasts to the others, whose file system may not show the same yet. Called by every rank.

    Raises:
        MedPLIBError: there are checkpoints, but all are damaged.
    """
    found = process.on_first(lambda: list_checkpoints(run_folder))
    damaged: list[Path] = []

    def put_aside() -> None:
        for folder in damaged:
            aside = folder.with_suffix(".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)

    for folder in reversed(found):
        fault = _fault(folder, process)
        if not fault:
            process.on_first(put_aside)
            return folder
        if process.is_first:
            logger.warning("%s is damaged (%s), so an older checkpoint is looked for", folder, fault)
        damaged.append(folder)
    if found:  # they stay where they are: the next attempt must not take the run for one that saved nothing
        raise MedPLIBError(
            f"no checkpoint in {run_folder / FOLDER} is whole; begin again without --resume in another folder"
        )
    return None


def _fault(folder: Path, process: Process) -> str:
    """What is wrong with a checkpoint, the same on every rank; each rank reads its share of the files."""
    try:
        files = process.on_first(partial(read_manifest, folder))
    except (OSError, MedPLIBError) as error:  # on every rank
        return str(error)
    own = damage(folder, dict(list(files.items())[process.rank :: process.world_size]))
    return next(filter(None, process.gather(own)), "")


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """What a checkpoint's manifest lists; nothing for one of an older version, which has no manifest."""
    read_progress(folder)
    path = folder / MANIFEST
    try:
        return json.loads(path.read_text(encoding="utf-8"))["files"] if path.is_file() else {}
    except (ValueError, KeyError, TypeError) as error:
        raise MedPLIBError(f"{path} is no list of files: {error}") from None


def damage(folder: Path, facts: dict[str, dict[str, Any]]) -> str:
    """What is wrong with the first of these files that differs from the manifest; empty where all are."""
    for name, expected in facts.items():
        try:
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            with (folder / name).open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != expected["sha256"]:
                    return f"{name} holds other bytes than were written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"
    return ""


def read_progress(folder: Path) -> dict[str, Any]:
    """Progress in a checkpoint: ``step``, ``world_size``, ``data_order`` and more.

    Raises:
        MedPLIBError: there is none.
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
    restore_random_state(torch.load(folder / f"random_{process.rank}.pt", weights_only=True))
    return progress


def load_trainable(network: nn.Module, folder: Path) -> None:
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


# --- the network that a run ends with ---------------------------------------------------------------------------------


def shares_weights(recipe: Recipe) -> bool:
    """Whether a rank's network holds only a share of the weights."""
    return recipe.engine.kind == "deepspeed" and (recipe.engine.zero_stage == 3 or recipe.engine.expert_parallel > 1)


def merged_network(
    engine: TrainingEngine, config: MedPLIBConfig, recipe: Recipe, checkpoint: Path | None = None
) -> MedPLIBForCausalLM | None:
    """The trained network without LoRA on rank 0, None elsewhere. Called by every rank.

    It has the weights of ``checkpoint`` where one is given. Where ranks share weights out it is a copy; elsewhere it
    is the engine's network, which cannot train any more.
    """
    if shares_weights(recipe):
        state = engine.gather(trainable_only=False)
        if not engine.process.is_first:
            return None
        if checkpoint is not None:
            state |= load_file(checkpoint / WEIGHTS)
        scaling = recipe.lora.alpha / recipe.lora.rank if recipe.lora.rank else 1.0
        return finish(init_empty(config), merge_lora_state(state, scaling))
    if not engine.process.is_first:
        return None
    if checkpoint is not None:
        load_trainable(engine.network, checkpoint)
    return _merged(engine.network)


def network_of_run(folder: Path) -> tuple[MedPLIBForCausalLM, MedPLIBProcessor]:
    """The merged network of an unfinished run, see ``unmerged_network``."""
    network, processor, _ = unmerged_network(folder)
    return _merged(network), processor


def unmerged_network(folder: Path) -> tuple[MedPLIBForCausalLM, MedPLIBProcessor, Recipe]:
    """Network (LoRA apart), processor and recipe of a run, or of one ``step_…`` folder of its checkpoints.

    Of a run it is the checkpoint that ``merged/`` is of, or else the newest.

    Raises:
        MedPLIBError: there is no checkpoint, or its starting points are gone.
    """
    run_folder = folder.parent.parent if folder.parent.name == FOLDER else folder
    checkpoint = folder if run_folder is not folder else next(reversed(list_checkpoints(folder)), None)
    best = (read_record(folder).get("merged") or {}).get("step")
    if best is not None and checkpoint_of(folder, best) in list_checkpoints(folder):
        checkpoint = checkpoint_of(folder, best)
    if checkpoint is None or not (run_folder / RECIPE_FILE).is_file():
        raise MedPLIBError(f"{folder} holds no training checkpoint; expected {RECIPE_FILE} and {FOLDER}/step_…")
    recipe = load_recipe(run_folder / RECIPE_FILE)
    engine = replace(recipe.engine, attention="sdpa")  # merging needs no attention, and may happen without a GPU
    network, processor = starting_network(replace(recipe, engine=engine))
    load_trainable(network, checkpoint)
    return network, processor, recipe


def _merged(network: nn.Module) -> MedPLIBForCausalLM:
    if is_quantized(network):
        merge_quantized(network)
        network.to("cpu")
    plain = merge_lora(network)
    assert isinstance(plain, MedPLIBForCausalLM)
    plain.eval().requires_grad_(False)
    return plain
