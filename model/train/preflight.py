"""Preflight: paths, run folder, DeepSpeed's file, records and disk space of a recipe, and the plan of ``--check``."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from model.checkpoint.directories import resolve
from model.data.dataset import UnusableRecords, usable_records
from model.data.packing import LengthCheck
from model.data.validate import RecordFacts, record_bar
from model.errors import MedPLIBError
from model.processing.conversation import TEMPLATES
from model.processing.tokens import build_tokenizer
from model.settings import count_problems
from model.train.checkpoint import list_checkpoints, read_progress
from model.train.datasets import data_files, open_dataset
from model.train.distributed import Process, launched_processes
from model.train.engine import TrainingEngine, deepspeed_config, make_engine
from model.train.init_weights import count_trainable, path_problems, starting_network
from model.train.plan import find_sizes, planned_network
from model.train.recipe import (
    PUBLISHED,
    PUBLISHED_GPUS,
    RECIPE_FILE,
    STAGE_NAMES,
    Recipe,
    check_values,
    differences,
    load_recipe,
)
from model.train.runs import METRICS_FILE, is_locked, locked_error
from model.train.sample_weights import labels_by_kind, share_problems
from model.train.validation import even_shares

if TYPE_CHECKING:
    from model.processing.processor import MedPLIBProcessor

logger = logging.getLogger(__name__)

_MASTER, _MOMENTS = 4, 8  # bytes a trained weight: its float32 value, and AdamW's two means
_WEIGHTS = (".safetensors", ".bin")
_TIMED_BYTES = 2 << 30
"""Weights of a starting point that ``--check`` loads to time a pass."""


def start_problems(recipe: Recipe, *, resume: bool, processes: int = 0) -> list[str]:
    """Everything that is found without loading a network or reading records, for ``processes`` (0: this launch's)."""
    problems = path_problems(recipe)
    checks: list[Callable[[], Any]] = []
    if recipe.engine.deepspeed and not any(problem.startswith("engine.deepspeed ") for problem in problems):
        checks.append(lambda: deepspeed_config(recipe))
    if recipe.output:
        checks.append(lambda: check_run_folder(recipe, resume=resume, processes=processes or launched_processes()))
    for check in checks:
        try:
            check()
        except MedPLIBError as error:
            problems.append(str(error))
    return problems


def check_start(recipe: Recipe, *, resume: bool) -> None:
    """Refuse a recipe that cannot start.

    Raises:
        MedPLIBError: naming everything that is in the way.
    """
    problems = start_problems(recipe, resume=resume)
    if problems:
        raise MedPLIBError(f"stage {recipe.stage} cannot start: it has {count_problems(problems)}")


def record_problems(recipe: Recipe, facts_of: dict[str, list[RecordFacts]] | None = None) -> list[str]:
    """Everything that training would refuse about the records themselves, without a network, a sentence each.

    A path that does not exist is left to ``start_problems``. Shares are tried against the records where every training
    file has some that can be used. ``facts_of`` gets the facts of the usable records of each file.
    """
    problems: list[str] = []
    tokenizer, data = None, recipe.data
    with suppress(MedPLIBError):  # what is wrong with it, or with the template, is reported elsewhere
        tokenizer = build_tokenizer(resolve(recipe.model.base))
    lengths = LengthCheck(tokenizer, data.template, data.max_length) if data.template in TEMPLATES else None
    kept = {} if facts_of is None else facts_of
    for path, images in (*data_files(recipe, training=True), *data_files(recipe, training=False)):
        kept[path] = []
        if not path or not images or not Path(path).exists() or not Path(images).exists():
            continue
        usable: Sequence[tuple[Any, RecordFacts]] = ()
        try:
            with record_bar(f"checking {path}", shown=recipe.logging.progress) as progress:
                _, usable, _ = usable_records(path, images, recipe.data.on_bad_record, progress, lengths)
        except UnusableRecords as error:
            problems.append(str(error))
            usable = error.usable
        except MedPLIBError as error:
            problems.append(str(error))
        kept[path] = [fact for _, fact in usable]
    found = [kept[path] for path in data.train]
    if found and all(found):
        files = [(path, len(facts)) for path, facts in zip(data.train, found, strict=True)]
        facts = [fact for part in found for fact in part]
        kinds = labels_by_kind(files, [fact.task for fact in facts], [fact.modality for fact in facts])
        # Shares that are wrong whatever the records are have been reported already.
        reported = check_values(recipe)
        empty: dict[str, Any] = {"shares": (), "task_shares": {}, "modality_shares": {}}
        wrong = [name for name in empty if any(problem.startswith(f"data.{name}") for problem in reported)]
        problems += share_problems(kinds, replace(data, **{name: empty[name] for name in wrong}))
    return problems


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
        raise locked_error(folder)
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
                f"{folder} was begun with {before} process{'es' * (before > 1)}, now {processes}; resume with "
                f"{before}, or begin a new run in another output whose model.base is what `medplib export {folder} "
                "DIR` writes (weights go on; optimizer, learning rate and data order begin anew)"
            )
        former = load_recipe(folder / RECIPE_FILE)
        if recipe.engine.kind == "auto":  # not decided yet, in a check before the launcher
            recipe = replace(recipe, engine=replace(recipe.engine, kind=former.engine.kind))
        changed = differences(former, recipe)
        if changed:
            raise MedPLIBError(f"{folder} was begun with other values of {', '.join(changed)}; resume with the same")


def check_disk_space(recipe: Recipe, engine: TrainingEngine) -> None:
    """Warn where the disk has less room than the run will need, by the number of its weights. Called by every rank.

    Raises:
        MedPLIBError: not even one checkpoint, or nothing beside the one that is there, would fit.
    """
    checkpoint = merged = 0
    for parameter in engine.network.parameters():
        count = getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 keeps the true size apart
        size = count * parameter.element_size()
        merged += size
        if parameter.requires_grad:
            # The weights lie in it twice, for resuming and for export, and in bf16 a float32 copy beside them.
            checkpoint += count * _MOMENTS + 2 * size + (0 if parameter.dtype == torch.float32 else count * _MASTER)
    place = next(path for path in (recipe.folder.absolute(), *recipe.folder.absolute().parents) if path.is_dir())
    free, there = engine.process.on_first(lambda: (shutil.disk_usage(place).free, len(list_checkpoints(recipe.folder))))
    results = merged * (1 + recipe.saving.published)
    needed = checkpoint * max(1, recipe.saving.keep + 1 - there) + (0 if recipe.merged.is_dir() else results)
    if free < checkpoint:
        raise MedPLIBError(
            f"{place} has {_as_size(free)} free, and one checkpoint of this run takes about "
            f"{_as_size(checkpoint)}; make room or name another output"
        )
    if free < needed and engine.process.is_first:
        logger.warning(
            "%s has %s free, but this run will need about %s for %d checkpoints and its result; make room",
            *(place, _as_size(free), _as_size(needed), recipe.saving.keep + 1),
        )


def _as_size(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def plan_lines(recipe: Recipe, path: Path, facts_of: Mapping[str, list[RecordFacts]], processes: int) -> list[str]:
    """What a checked recipe would do: records (``facts_of`` each file), steps, batch, what learns, estimated time."""
    schedule = recipe.schedule
    train = [facts_of[name] for name in recipe.data.train]
    records = sum(map(len, train))
    per_epoch = schedule.epoch_steps(records, processes)
    steps = schedule.total_steps(per_epoch)
    tasks = Counter(fact.task for facts in train for fact in facts)
    rows = {
        "run": f"stage {recipe.stage} ({STAGE_NAMES[recipe.stage]}) into {recipe.output}",
        "records": f"{records:,} ({', '.join(f'{task} {count:,}' for task, count in sorted(tasks.items()))})",
        "steps": f"{steps:,} of {processes} x {schedule.batch_size} x {schedule.accumulation} = "
        f"{processes * schedule.batch_size * schedule.accumulation} records; {per_epoch:.4g} steps are an epoch",
    }
    files = data_files(recipe, training=False)
    if files:
        sizes = [len(facts_of[name]) for name, _ in files]
        drawn = zip(files, even_shares(sizes, recipe.validation.samples), strict=True)
        every = f"every {recipe.validation.every} steps" if recipe.validation.every else "once an epoch"
        rows["validation"] = f"{', '.join(f'{count} of {name}' for (name, _), count in drawn)}, {every} and at the end"
    else:
        rows["validation"] = "none; give data.validation records of cases that are not trained on"
    best = f"the checkpoint with the best {recipe.saving.best}" if recipe.saving.best else "the last step"
    rows["best"] = f"merged/ is {best}" + " (saving.best names a score to choose by)" * (not recipe.saving.best)
    rows["memory"] = f"not estimated here; `medplib plan {path}` does"
    weights = sum(file.stat().st_size for file in resolve(recipe.model.base).iterdir() if file.suffix in _WEIGHTS)
    if weights > _TIMED_BYTES:
        counted: nn.Module = planned_network(recipe, find_sizes(recipe, path)[0])
        rows["time"] = (
            f"not measured: model.base holds {weights / 2**30:.1f} GiB, which a check does not load; the first steps "
            "of the run show it (schedule.max_steps=5 output=DIR)"
        )
    else:
        network, processor = starting_network(recipe)
        counted = network
        seconds = _time_pass(recipe, network, processor) * schedule.accumulation
        rows["time"] = (
            f"about {timedelta(seconds=round(steps * seconds))}, an estimate from one forward and backward pass of "
            f"{schedule.batch_size} records in this process ({seconds / schedule.accumulation:.2f} s), without "
            "optimizer, other processes, validation and saving"
        )
    counts = count_trainable(counted).items()
    rows["trainable"] = ", ".join(f"{part} {count:,}" for part, count in counts) + " parameters"
    width = max(map(len, rows))
    return [f"{name:<{width}}  {text}" for name, text in rows.items()] + schedule_notes(recipe, processes, per_epoch)


def schedule_notes(recipe: Recipe, processes: int, steps_per_epoch: float) -> list[str]:
    """What is worth knowing about a run's length and batch: epochs that do not count, a batch unlike the published."""
    schedule, notes = recipe.schedule, []
    if schedule.max_steps:
        epochs = schedule.max_steps / steps_per_epoch
        notes.append(f"schedule.max_steps={schedule.max_steps} is {epochs:.3g} epochs; schedule.epochs is not used")
    settings = PUBLISHED[recipe.stage]["schedule"]
    published = PUBLISHED_GPUS * settings["batch_size"] * settings["accumulation"]
    forward = schedule.batch_size * processes
    if forward * schedule.accumulation != published:
        if published % forward == 0:
            advice = f"schedule.accumulation={published // forward} gives that"
        elif published % processes == 0:
            advice = f"schedule.batch_size={published // processes} schedule.accumulation=1 gives that"
        else:
            advice = f"no batch size gives that in {processes} processes"
        notes.append(
            f"global batch {forward * schedule.accumulation} ({schedule.batch_size} records × {schedule.accumulation} "
            f"accumulated × {processes} processes); published for stage {recipe.stage}: {published}; {advice}"
        )
    return notes


def _time_pass(recipe: Recipe, network: nn.Module, processor: MedPLIBProcessor) -> float:
    """Seconds of the second forward and backward pass over the first records, on the recipe's device."""
    dataset = open_dataset(recipe, processor, training=True)
    indices = [index % len(dataset) for index in range(recipe.schedule.batch_size)]
    device = "cuda" if recipe.engine.device != "cpu" and torch.cuda.is_available() else "cpu"
    one = replace(recipe, engine=replace(recipe.engine, kind="torch"))
    engine = make_engine(network.train(), one, Process(0, 1, torch.device(device)), lambda step: 1.0)
    for _ in range(2):  # the first one pays for what is set up once
        begun = time.perf_counter()
        engine.accumulate(processor.collate([dataset[index] for index in indices], share_images=True))
        if device == "cuda":
            torch.cuda.synchronize()
    return time.perf_counter() - begun
