"""The training loop of every stage, one verb a method."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader

from model.checkpoint import export_published, save
from model.data.sampling import ResumableSampler
from model.errors import MedPLIBError
from model.modeling.medplib import MedPLIBForCausalLM
from model.train.checkpoints import list_checkpoints, load_checkpoint, save_checkpoint
from model.train.datasets import item_lengths, open_dataset
from model.train.engine import StepResult, make_engine
from model.train.feeding import Feed
from model.train.handover import merged_network
from model.train.journal import Journal
from model.train.learning_rate import rate_factor
from model.train.process import join, leave, resolved
from model.train.recipe import Recipe
from model.train.recipe_io import save_recipe
from model.train.run_folder import check_run_folder
from model.train.stages import STAGE_NAMES
from model.train.starting import check_paths, starting_network
from model.train.trainable import count_trainable
from model.train.validation import Validator

logger = logging.getLogger(__name__)

_ECHO_SECONDS = 3.0  # a launcher passes on the Ctrl-C that its processes got from the terminal already
_ERROR_NAME = f"{MedPLIBError.__module__}.{MedPLIBError.__name__}: "


class Trainer:
    """Trains one stage: ``set_up``, ``train``, ``close``.

    Args:
        recipe: the whole run.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = replace(recipe, engine=resolved(recipe.engine))
        self.step_number = 0  # optimiser steps done
        self.interrupted: float | None = None  # when the run was told to end
        self.journal: Journal | None = None
        self._loader: DataLoader | None = None
        self._batches: Iterator[dict[str, Any]] | None = None
        self._previous_handlers: dict[int, Any] = {}

    # --- before -----------------------------------------------------------------------------------------------------

    def set_up(self, resume: bool = False) -> None:
        """Check paths, build network, data and engine, and take up the newest checkpoint if asked to.

        Raises:
            MedPLIBError: something the recipe names cannot be used, or the run folder holds another run.
        """
        check_paths(self.recipe)
        check_run_folder(self.recipe, resume=resume)
        self.process = join(self.recipe.engine)
        network, self.processor = starting_network(self.recipe)
        self.config = network.config
        self._set_up_data()
        self._set_up_engine(network)
        if resume:
            self._resume()
        if self.process.is_first:
            save_recipe(self.recipe, self.recipe.folder)
        self.journal = Journal(
            self.recipe.folder, self.recipe.logging, self.total_steps, self.step_number, self.process.is_first
        )
        self._tell_plan()
        self._catch_signals()

    def _set_up_data(self) -> None:
        data, schedule = self.recipe.data, self.recipe.schedule
        shown = self.process.is_first and self.recipe.logging.progress
        self.dataset = open_dataset(self.recipe, self.processor, training=True, shown=shown)
        lengths = item_lengths(self.recipe, self.dataset, self.processor, self.config, self.process)
        self.sampler = ResumableSampler(
            lengths,
            seed=self.recipe.seed,
            batch_size=schedule.batch_size,
            rank=self.process.rank,
            world_size=self.process.world_size,
            weights=self.dataset.weights,
            group_by_length=data.group_by_length,
        )
        self.steps_per_epoch = len(self.sampler) / schedule.accumulation
        every_epoch = math.ceil(schedule.epochs * self.steps_per_epoch)
        self.total_steps = min(schedule.max_steps or every_epoch, every_epoch)
        self.validator: Validator | None = None
        if data.validation and self.recipe.validation.samples:
            held_out = open_dataset(self.recipe, self.processor, training=False, shown=shown)
            self.validator = Validator(held_out, self.processor, self.recipe.validation, self.recipe.seed)

    def _set_up_engine(self, network: MedPLIBForCausalLM) -> None:
        if self.recipe.engine.gradient_checkpointing:
            # transformers 5.23 renamed it
            enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        factor = rate_factor(self.recipe.optimiser, self.steps_per_epoch, self.total_steps)
        self.engine = make_engine(network.train(), self.recipe, self.process, factor)
        torch.manual_seed(self.recipe.seed + 1 + self.process.rank)  # dropout and token priority differ by rank

    def _resume(self) -> None:
        found = list_checkpoints(self.recipe.folder)
        if not found:
            logger.info("no checkpoint to resume from in %s; starting anew", self.recipe.folder)
            return
        progress = load_checkpoint(self.engine, found[-1])
        self.step_number = progress["step"]
        self.sampler.load_state_dict(progress["data_order"])

    def _tell_plan(self) -> None:
        assert self.journal is not None
        counts = count_trainable(self.engine.network)
        parts = ", ".join(f"{part} {count:,}" for part, count in counts.items())
        self.journal.say(
            f"stage {self.recipe.stage} ({STAGE_NAMES[self.recipe.stage]}): {len(self.dataset)} records, "
            f"{self.total_steps} steps of {self._samples_per_step} records; training {parts} parameters"
        )
        if self.dataset.rejected or self.dataset.repaired:
            rejected, repaired = self.dataset.rejected, self.dataset.repaired
            self.journal.say(f"{rejected} bad records are skipped, {repaired} that lack .png in a path are used")

    @property
    def _samples_per_step(self) -> int:
        return self.sampler.global_batch * self.recipe.schedule.accumulation

    # --- during -----------------------------------------------------------------------------------------------------

    def train(self) -> Path:
        """Train to the end, write the merged checkpoint and return its directory.

        Raises:
            SystemExit: 143, after a termination signal; what was done is saved and can be resumed.
        """
        while self.step_number < self.total_steps:
            self.train_step()
            stopping = self.should_stop()
            if stopping or self.is_due(self.recipe.saving.every):
                self.save()
            if stopping:
                logger.info("stopped and saved at step %d; go on with --resume", self.step_number)
                raise SystemExit(128 + signal.SIGTERM)
            if self.is_due(self.recipe.validation.every):
                self.validate()
        return self.hand_over()

    def train_step(self) -> None:
        """One optimiser step over ``accumulation`` micro-batches."""
        begun = time.perf_counter()
        parts: dict[str, torch.Tensor] = {}
        feed = Feed(self.config.visual_tokens)
        for _ in range(self.recipe.schedule.accumulation):
            for name, value in self.engine.accumulate(feed.take(self.next_batch)).items():
                parts[name] = parts.get(name, 0.0) + value.float()
        result = self.engine.step()
        self.step_number += 1
        self._note(parts, result, feed, time.perf_counter() - begun)

    def next_batch(self) -> dict[str, Any]:
        """The next collated micro-batch of this rank; a new epoch begins when one is used up."""
        while True:
            if self._batches is None:
                self._loader = self._loader or self._make_loader()
                self.dataset.set_epoch(self.sampler.epoch)  # no worker is reading now: they read up to an epoch's end
                self._batches = iter(self._loader)
            try:
                batch = next(self._batches, None)
            except MedPLIBError as error:  # from a loader process it comes wrapped in that process's traceback
                raise MedPLIBError(str(error).strip().splitlines()[-1].removeprefix(_ERROR_NAME)) from None
            if batch is not None:
                self.sampler.advance()
                return batch
            self._batches = None

    def _make_loader(self) -> DataLoader:
        return DataLoader(
            self.dataset,
            batch_sampler=self.sampler,  # type: ignore[arg-type]
            collate_fn=self.processor.collate,
            num_workers=self.recipe.data.workers,
            persistent_workers=self.recipe.data.workers > 0,
            pin_memory=self.process.device.type == "cuda",
            generator=torch.Generator(),  # the loader's own draws must not move the global random numbers
        )

    def _note(self, parts: dict[str, torch.Tensor], result: StepResult, feed: Feed, seconds: float) -> None:
        """Report the step: losses are means over its micro-batches and ranks."""
        assert self.journal is not None
        total = self.process.sum(torch.stack(list(parts.values())))
        means = total / (self.recipe.schedule.accumulation * self.process.world_size)
        row: dict[str, Any] = {"step": self.step_number, **dict(zip(parts, means.tolist(), strict=True))}
        if not math.isfinite(row["loss"]):
            raise MedPLIBError(
                f"the loss is {row['loss']} at step {self.step_number}; lower optimiser.lr or use precision fp32"
            )
        row |= {"lr": result.lr, "grad_norm": result.grad_norm, "epoch": self.step_number / self.steps_per_epoch}
        row |= {"seconds": seconds, "samples_per_s": self._samples_per_step / seconds}
        row |= feed.report(self.process, seconds)
        self.journal.step(row)

    def is_due(self, every: int) -> bool:
        """Whether something done every so many steps (0: once an epoch), and at the end, is due after this step."""
        done, batches, accumulation = self.step_number, len(self.sampler), self.recipe.schedule.accumulation
        if every:
            return done % every == 0 or done == self.total_steps
        # In whole numbers: an epoch may end within a step, and quotients that are whole need not be so in floats.
        new_epoch = done * accumulation // batches > (done - 1) * accumulation // batches
        return new_epoch or done == self.total_steps

    def validate(self) -> dict[str, float]:
        """Score the held-out draw and note it; nothing without validation files."""
        if self.validator is None:
            return {}
        assert self.journal is not None
        scores = self.validator.run(self.engine, self.config)
        self.journal.validation({"step": self.step_number, **scores})
        return scores

    def save(self) -> Path:
        """Write a checkpoint to resume from."""
        return save_checkpoint(
            self.engine, self.recipe.folder, self.step_number, self.sampler.state_dict(), self.recipe.saving.keep
        )

    def should_stop(self) -> bool:
        """Whether any rank was told to end."""
        return bool(self.process.sum(torch.tensor(float(self.interrupted is not None))) > 0)

    # --- after ------------------------------------------------------------------------------------------------------

    def hand_over(self) -> Path:
        """Merge LoRA and write the directory that the next stage starts from."""
        skipped = self.dataset.rejected + self._noted(self.dataset.unreadable)
        shortened = self._noted(self.dataset.shortened)
        network = merged_network(self.engine, self.config, self.recipe)
        if network is not None:
            save(network, self.processor, self.recipe.merged)
            if self.recipe.saving.published:
                export_published(network, self.processor, self.recipe.folder / "published")
            logger.info(
                "wrote %s; %d records were skipped, %d answers cut off at %d tokens",
                *(self.recipe.merged, skipped, shortened, self.recipe.data.max_length),
            )
        self.process.barrier()
        return self.recipe.merged

    def _noted(self, flags: torch.Tensor) -> int:
        """Records that any rank flagged."""
        return int((self.process.sum(flags) > 0).sum())

    def close(self) -> None:
        """Finish the journal, give the signals back and part from the other ranks."""
        if self.journal is not None:
            self.journal.close()
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers.clear()
        self._batches = self._loader = None
        leave()

    def _catch_signals(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._previous_handlers = {
                number: signal.signal(number, self._interrupt) for number in (signal.SIGTERM, signal.SIGINT)
            }

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """Ask for an orderly end after this step; a later second Ctrl-C ends at once."""
        now = time.monotonic()
        if self.interrupted is None:
            self.interrupted = now
        elif number == signal.SIGINT and now - self.interrupted > _ECHO_SECONDS:
            raise KeyboardInterrupt
