"""A run folder holds one run: it is begun, resumed or refused."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace

from model.errors import MedPLIBError
from model.train.checkpoints import list_checkpoints, read_progress
from model.train.journal import METRICS_FILE
from model.train.recipe import Recipe
from model.train.recipe_io import RECIPE_FILE, differences, load_recipe
from model.train.run_record import is_locked, told_as_taken


def check_run_folder(recipe: Recipe, *, resume: bool, processes: int) -> None:
    """Refuse to write over a run, or to go on with one of another recipe or number of processes.

    A run that left no checkpoint has nothing to go on with, so it may begin anew with any recipe.

    Raises:
        MedPLIBError: naming the folder, and the settings that differ or why it cannot be written.
    """
    folder = recipe.folder
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise MedPLIBError(f"{folder} cannot be written, because {place} is no folder to write to; name another output")
    if is_locked(folder):
        raise MedPLIBError(told_as_taken(folder))
    begun = [name for name in (METRICS_FILE, RECIPE_FILE) if (folder / name).exists()]
    if begun and not resume:
        raise MedPLIBError(f"{folder} holds a run already; add --resume to go on with it, or name another output")
    checkpoints = list_checkpoints(folder)
    if resume and (folder / RECIPE_FILE).is_file() and checkpoints:
        before = processes
        with suppress(MedPLIBError):  # a damaged one is put aside when the run begins
            before = read_progress(checkpoints[-1]).get("world_size", processes)
        if before != processes:
            raise MedPLIBError(
                f"{folder} was begun with {_counted(before)}, now {processes}; resume with {before}, or begin a new "
                f"run in another output whose model.base is what `medplib export {folder} DIR` writes (weights go on; "
                "optimiser, learning rate and data order begin anew)"
            )
        former = load_recipe(folder / RECIPE_FILE)
        if recipe.engine.kind == "auto":  # not decided yet, in a check before the launcher
            recipe = replace(recipe, engine=replace(recipe.engine, kind=former.engine.kind))
        changed = differences(former, recipe)
        if changed:
            raise MedPLIBError(f"{folder} was begun with other values of {', '.join(changed)}; resume with the same")


def _counted(processes: int) -> str:
    return "1 process" if processes == 1 else f"{processes} processes"
