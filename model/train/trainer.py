"""The training loop of every stage."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from model.checkpoint import export_published, save
from model.data.packing import LengthCheck, real_tokens
from model.data.sampling import ResumableSampler
from model.errors import MedPLIBError
from model.modeling.medplib import MedPLIBForCausalLM
from model.train.checkpoint import (
    checkpoint_of,
    find_whole_checkpoint,
    list_checkpoints,
    load_checkpoint,
    merged_network,
    random_state,
    read_progress,
    restore_random_state,
    rotate,
    save_checkpoint,
    step_of,
)
from model.train.datasets import (
    cached_features,
    check_unchanged,
    fingerprint,
    in_shared_memory,
    open_dataset,
    save_marks,
    taken_from,
)
from model.train.distributed import join, launched_processes, leave
from model.train.engine import BadSteps, StepResult, make_engine
from model.train.init_weights import count_trainable, starting_network
from model.train.metrics import Metrics, RunLog
from model.train.preemption import SIGNALS, RunStopped, StopRequest, leave_signals_to_the_parent
from model.train.preflight import check_disk_space, check_start, schedule_notes
from model.train.recipe import STAGE_NAMES, Recipe, save_recipe
from model.train.runs import VALIDATION_FILE, RunRecord, disk_errors, read_rows, sync
from model.train.sample_weights import draw_lines, draw_table, draw_weights
from model.train.validation import Best, Validator, best_of, is_better

logger = logging.getLogger(__name__)


class Trainer:
    """Trains one stage: ``set_up``, ``train``, ``close``."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe.resolved(launched_processes())
        self.step_number = 0  # optimizer steps done
        self.bad_steps = BadSteps(recipe.optimizer.max_bad_steps)
        self.stop = StopRequest()
        self.log: RunLog | None = None
        self.record: RunRecord | None = None  # on rank 0
        self.best: Best | None = None  # by saving.best
        self.waited = 0  # validations since then
        self.seconds_validating = 0.0
        self._former_total = 0  # steps of the schedule that a resumed run had before
        self.begun = time.monotonic()
        self._saved_at = -1
        self._loader: DataLoader | None = None
        self._batches: Iterator[dict[str, Any]] | None = None

    # --- before -----------------------------------------------------------------------------------------------------

    def set_up(self, resume: bool = False, allow_changed_data: bool = False) -> None:
        """Check paths, build network, data and engine, and load the newest whole checkpoint to resume.

        Raises:
            MedPLIBError: something the recipe names cannot be used, or the run folder holds another run.
        """
        self.stop.listen()
        check_start(self.recipe, resume=resume)
        self.process = join(self.recipe.engine)
        network, self.processor = starting_network(self.recipe)
        self.config = network.config
        self._set_up_data()
        self.data = fingerprint(self.dataset.datasets)
        checkpoint = self._find_checkpoint(allow_changed_data) if resume else None
        self.dataset.use_features(cached_features(self.recipe, network, self.processor, self.dataset, self.process))
        self._set_up_engine(network)
        check_disk_space(self.recipe, self.engine)
        if checkpoint is not None:
            self._load_checkpoint(checkpoint)
        self._begin_record()
        if self.recipe.saving.best:
            self.process.on_first(self._check_best)
            self.best, self.waited = self.process.on_first(self._best_so_far)
        self._log_plan()
        self.stop.defer()

    def _set_up_data(self) -> None:
        data, schedule = self.recipe.data, self.recipe.schedule
        shown = self.process.is_first and self.recipe.logging.progress
        self.dataset = open_dataset(self.recipe, self.processor, training=True, shown=shown)
        weights = draw_weights(self.dataset, data)
        shared = LengthCheck.of(self.processor).shared
        self.dataset.pack(data.conversation_turns, weights, self.processor.settings.max_length, shared)
        lengths = np.zeros(len(self.dataset), np.int64)
        if data.group_by_length:
            lengths = self.dataset.tokens + self.dataset.images * (self.config.visual_tokens - 1)
        self.sampler = ResumableSampler(
            lengths,
            seed=self.recipe.seed,
            batch_size=schedule.batch_size,
            rank=self.process.rank,
            world_size=self.process.world_size,
            weights=weights,
            group_by_length=data.group_by_length,
        )
        self.steps_per_epoch = len(self.sampler) / schedule.accumulation
        self.total_steps = schedule.total_steps(self.steps_per_epoch)
        self.validator: Validator | None = None
        if data.validation and self.recipe.validation.samples:
            held_out = open_dataset(self.recipe, self.processor, training=False, shown=shown)
            self.validator = Validator(held_out, self.processor, self.recipe.validation, self.recipe.seed)

    def _set_up_engine(self, network: MedPLIBForCausalLM) -> None:
        if self.recipe.engine.gradient_checkpointing:
            # transformers 5.23 renamed it
            enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        factor = self.recipe.optimizer.rate_factor(self.steps_per_epoch, self.total_steps)
        self.engine = make_engine(network.train(), self.recipe, self.process, factor)
        labels = self.dataset.tasks, self.dataset.modalities
        self.metrics = Metrics(self.engine.network, self.sampler, *labels, self.recipe.logging.router_every)
        torch.manual_seed(self.recipe.seed + 1 + self.process.rank)  # dropout and token priority differ by rank

    def _find_checkpoint(self, allow_changed_data: bool) -> Path | None:
        found = find_whole_checkpoint(self.recipe.folder, self.process)
        if found is None:
            logger.info("no checkpoint to resume from in %s; starting anew", self.recipe.folder)
        elif not allow_changed_data:
            data, folder = self.dataset.datasets, self.recipe.folder
            self.process.on_first(lambda: check_unchanged(read_progress(found).get("data", {}), data, folder))
        return found

    def _load_checkpoint(self, checkpoint: Path) -> None:
        progress = load_checkpoint(self.engine, checkpoint)
        self.step_number = self._saved_at = progress["step"]
        self.bad_steps = replace(self.bad_steps, **progress.get("bad_steps", {}))
        self.metrics.load_state_dict(progress.get("meters", {}), self.process)
        order = progress["data_order"]
        if progress.get("data", self.data) != self.data and order["records"] != len(self.dataset):
            order = {**order, "records": len(self.dataset), "consumed": 0}
            logger.warning("the data changed in size, so this epoch begins again, in an order of its own")
        self.sampler.load_state_dict(order)

    def _begin_record(self) -> None:
        """Set up the logs of the run folder."""
        folder, process, step = self.recipe.folder, self.process, self.step_number

        def begin() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            self.record = RunRecord(folder, self.recipe.stage)
            self._former_total = int(self.record.content.get("total_steps") or 0) if step else 0
            save_recipe(self.recipe, folder)
            save_marks(self.dataset.datasets, folder)
            self.record.begin(process.world_size, step, self.total_steps, self.data)

        with disk_errors(f"the run folder {folder}"):
            process.on_first(begin)
            self.log = RunLog(folder, self.recipe.logging, self.total_steps, step, writes=process.is_first)

    def _check_best(self) -> None:
        assert self.validator is not None
        names, best = self.validator.names(), self.recipe.saving.best
        if best not in names:
            raise MedPLIBError(
                f"saving.best is {best}, which the records of data.validation do not give; they give {', '.join(names)}"
            )

    def _best_so_far(self) -> tuple[Best | None, int]:
        """The best validation whose checkpoint is there, and how many came after it."""
        folder, metric = self.recipe.folder, self.recipe.saving.best
        kept = {step_of(path) for path in list_checkpoints(folder)}
        rows = [row for row in read_rows(folder / VALIDATION_FILE) if metric in row]
        best = best_of(rows, metric, kept)
        return best, sum(best is None or row["step"] > best.step for row in rows)

    def _log_plan(self) -> None:
        assert self.log is not None
        counts = count_trainable(self.engine.network)
        parts = ", ".join(f"{part} {count:,}" for part, count in counts.items())
        self.log.log(
            f"stage {self.recipe.stage} ({STAGE_NAMES[self.recipe.stage]}): {len(self.dataset)} records, "
            f"{self.total_steps} steps of {self._samples_per_step} records; training {parts} parameters"
        )
        for line in schedule_notes(self.recipe, self.process.world_size, self.steps_per_epoch):
            self.log.log(line)
        if self.step_number:
            self.log.log(f"going on after step {self.step_number}, from its checkpoint")
        former = self._former_total
        if former not in (0, self.total_steps):
            self.log.log(
                f"the schedule has {self.total_steps} steps now, it had {former}: from here on the learning rate is "
                "that of the new length, so the run is not the one that had it from the beginning"
            )
        if self.validator is not None:
            self.log.log(self.validator.plan())
        draws = self.total_steps * self._samples_per_step
        for line in draw_lines(draw_table(self.dataset, self.sampler.weights, draws)):
            self.log.log(line)
        if self.dataset.rejected or self.dataset.repaired:
            rejected, repaired = self.dataset.rejected, self.dataset.repaired
            self.log.log(f"{rejected} bad records are skipped, {repaired} that were mended are used")

    @property
    def _samples_per_step(self) -> int:
        return self.sampler.global_batch * self.recipe.schedule.accumulation

    # --- during -----------------------------------------------------------------------------------------------------

    def train(self) -> Path:
        """Train to the end, write the merged checkpoint and return its directory.

        Raises:
            RunStopped: after SIGTERM, SIGUSR1 or Ctrl-C; what was done is saved and can be resumed.
            MedPLIBError: too many steps were not finite, or the disk is full.
        """
        log = self.log
        assert log is not None
        # A run may have been ended between the newest checkpoint and the validation of its step.
        due = self.step_number > 0 and self.is_due(self.recipe.validation.every)
        if due and self.process.on_first(lambda: log.last_validation) < self.step_number:
            self.validate()
        while self.step_number < self.total_steps and not self.is_out_of_patience():
            self.train_step()
            if self.is_due(self.recipe.saving.every):
                self.save()
            if self.is_due(self.recipe.validation.every):
                self.validate()
            self.stop_if_requested()
        return self.export()

    def is_out_of_patience(self) -> bool:
        """Whether ``validation.patience`` validations in a row were no better than the best before them."""
        return 0 < self.recipe.validation.patience <= self.waited

    def train_step(self) -> None:
        """One optimizer step over ``accumulation`` micro-batches."""
        begun = time.perf_counter()
        parts: dict[str, torch.Tensor] = {}
        feed = torch.zeros(3, dtype=torch.float64)  # seconds that data were waited for, tokens, tokens with padding
        for _ in range(self.recipe.schedule.accumulation):
            fetching = time.perf_counter()
            batch = self.next_batch()
            waited = time.perf_counter() - fetching
            feed += torch.tensor([waited, *real_tokens(batch, self.config.visual_tokens)], dtype=torch.float64)
            for name, value in self.engine.accumulate(batch).items():
                parts[name] = parts.get(name, 0.0) + value.float()
        result = self.engine.step()
        self.step_number += 1
        self._report(parts, result, feed, time.perf_counter() - begun)

    def next_batch(self) -> dict[str, Any]:
        """The next collated micro-batch of this rank; a new epoch begins when one is used up."""
        while True:
            if self._batches is None:
                self._loader = self._loader or DataLoader(
                    self.dataset,
                    batch_sampler=self.sampler,  # type: ignore[arg-type]
                    collate_fn=partial(in_shared_memory, partial(self.processor.collate, share_images=True)),
                    num_workers=self.recipe.data.workers,
                    persistent_workers=self.recipe.data.workers > 0,
                    pin_memory=self.process.device.type == "cuda",
                    worker_init_fn=leave_signals_to_the_parent,
                    generator=torch.Generator(),  # the loader's own draws must not move the global random numbers
                )
                self.dataset.set_epoch(self.sampler.epoch)  # no worker is reading now: they read up to an epoch's end
                self._batches = iter(self._loader)
            batch, fault = taken_from(self._batches)
            if fault:
                raise MedPLIBError(fault)
            if batch is not None:
                self.metrics.expect()
                self.sampler.advance()
                return batch
            self._batches = None

    def _report(self, parts: dict[str, torch.Tensor], result: StepResult, feed: torch.Tensor, seconds: float) -> None:
        """Report the step: losses are means over its micro-batches and ranks."""
        assert self.log is not None
        total = self.process.sum(torch.stack(list(parts.values())))
        means = total / (self.recipe.schedule.accumulation * self.process.world_size)
        row: dict[str, Any] = {"step": self.step_number, **dict(zip(parts, means.tolist(), strict=True))}
        row |= {"lr": result.lr, "grad_norm": result.grad_norm, "epoch": self.step_number / self.steps_per_epoch}
        row |= {"seconds": seconds, "samples_per_s": self._samples_per_step / seconds}
        waited, real, padded = self.process.sum(feed).tolist()
        row |= {"data_seconds": waited / self.process.world_size, "padding": 1 - real / padded}
        row["tokens_per_s"] = real / seconds
        last = self.step_number == self.total_steps
        row |= self.metrics.step(self.process, self.step_number, last)
        first = self.bad_steps.note(skipped=result.skipped)
        self.log.step(row | {"skipped_steps": self.bad_steps.total})
        self.log.router(self.metrics.router_row(self.process, self.step_number, last))
        if first:
            self.log.log(
                f"step {self.step_number} was skipped: its loss or a gradient is not finite; the weights stay as they "
                "were (metrics.jsonl counts such steps)"
            )
        self.bad_steps.check(self.step_number)

    def is_due(self, every: int) -> bool:
        """Whether something done every so many steps (0: once an epoch), and at the end, is due after this step."""
        done, batches, accumulation = self.step_number, len(self.sampler), self.recipe.schedule.accumulation
        if every:
            return done % every == 0 or done == self.total_steps
        # In whole numbers: an epoch may end within a step, and quotients that are whole need not be so in floats.
        new_epoch = done * accumulation // batches > (done - 1) * accumulation // batches
        return new_epoch or done == self.total_steps

    def validate(self) -> dict[str, float]:
        """Score the held-out draw and note it; nothing without validation files, or where the run is to stop.

        The random numbers of training go on as if there had been no validation.
        """
        if self.validator is None:
            return {}
        assert self.log is not None
        before, begun = random_state(), time.monotonic()
        scores = self.validator.run(self.engine, self.config, self.stop_signal)
        restore_random_state(before)
        if scores:
            self._keep_best(scores)
            seconds = time.monotonic() - begun
            self.seconds_validating += seconds
            share = self.seconds_validating / max(time.monotonic() - self.begun, 1e-9)
            best = self.best
            note = f"best {best.metric} so far {best.value:.3f}, of step {best.step}; " if best else ""
            note += f"validation took {seconds:.1f} s; validations are {share:.0%} of this run's time so far"
            if self.validator.errors:
                note += (
                    f"; {len(self.validator.errors)} questions failed on rank 0, the first: {self.validator.errors[0]}"
                )
            names = list(self.validator.counts) if self.validator.by_file else []
            self.log.validation({"step": self.step_number, **scores}, names, note)
        return scores

    def _keep_best(self, scores: dict[str, float]) -> None:
        """Let the checkpoint of this step stay where the score of ``saving.best`` has no better one."""
        metric = self.recipe.saving.best
        if not metric:
            return
        value = scores.get(metric, math.nan)
        self.waited += 1
        if is_better(metric, value, self.best):
            self.best, self.waited = Best(self.step_number, metric, value), 0
            if self._saved_at != self.step_number:
                self.save()  # so a resumed run never begins before its best checkpoint
            self.process.on_first(lambda: rotate(self.recipe.folder, self.recipe.saving.keep, self.step_number))

    def save(self) -> None:
        """Write a checkpoint to resume from."""
        assert self.log is not None
        progress = {
            "step": self.step_number,
            "data_order": self.sampler.state_dict(),
            "bad_steps": {"total": self.bad_steps.total, "in_a_row": self.bad_steps.in_a_row},
            "data": self.data,
            "meters": self.metrics.state_dict(self.process),
        }
        self.log.sync()
        best = None if self.best is None else self.best.step
        save_checkpoint(self.engine, self.recipe.folder, progress, self.recipe.saving.keep, best)
        self._saved_at = self.step_number

    def stop_signal(self) -> int:
        """The signal that any rank got to stop, 0 for none; a scheduler's goes before a Ctrl-C."""
        came = self.process.sum(torch.tensor([float(self.stop.number == number) for number in SIGNALS]))
        return next((number for number, count in zip(SIGNALS, came.tolist(), strict=True) if count), 0)

    def stop_if_requested(self) -> None:
        """Save and raise ``RunStopped``, if any rank got a signal to stop."""
        if number := self.stop_signal():
            if self._saved_at != self.step_number:
                self.save()
            raise RunStopped(number, f"stopped and saved at step {self.step_number}; go on with --resume")

    # --- after ------------------------------------------------------------------------------------------------------

    def export(self) -> Path:
        """Merge LoRA and write the directory that the next stage starts from, of the best checkpoint if one is kept."""
        best = self.best if self.best is not None and self.best.step != self.step_number else None
        checkpoint = None if best is None else checkpoint_of(self.recipe.folder, best.step)
        skipped = self.dataset.rejected + self._count_flagged(self.dataset.unreadable)
        shortened = self._count_flagged(self.dataset.shortened)
        network = merged_network(self.engine, self.config, self.recipe, checkpoint)
        if network is not None:
            for left in (*self.recipe.folder.glob(".*.partial"), *self.recipe.folder.glob(".*.replaced")):
                if left.is_dir():  # of a run that was killed while it wrote its result
                    shutil.rmtree(left)
            with disk_errors(f"the merged result {self.recipe.merged}"):
                save(network, self.processor, self.recipe.merged)
                if self.recipe.saving.published:
                    export_published(network, self.processor, self.recipe.folder / "published")
                sync(self.recipe.merged, *self.recipe.merged.rglob("*"))
            logger.info(
                "wrote %s; %d records were skipped, %d answers cut off at %d tokens",
                *(self.recipe.merged, skipped, shortened, self.recipe.data.max_length),
            )
            result: dict[str, Any] = {"step": self.step_number}
            if self.best is not None:
                result = {"step": self.best.step, "metric": self.best.metric, "value": self.best.value}
                logger.info("it is the checkpoint of step %d, with the best %s, %.4f", *result.values())
            if self.is_out_of_patience():
                result["ended"] = f"{self.waited} validations without a better {self.recipe.saving.best}"
                logger.info("the run ended at step %d, after %s", self.step_number, result["ended"])
            if self.record is not None:
                self.record.content["merged"] = result
        self.process.barrier()
        return self.recipe.merged

    def _count_flagged(self, flags: torch.Tensor) -> int:
        """Records that any rank flagged."""
        return int((self.process.sum(flags) > 0).sum())

    def close(self, failure: BaseException | None = None) -> None:
        """Note how the run ended, give the signals back and part from the other ranks.

        Args:
            failure: what ended the run; None after its end.
        """
        if self.record is not None:
            self.record.end(failure, self.step_number)
        if self.log is not None:
            self.log.close()
        self.stop.release()
        # The loader's processes end now, whatever else refers to it (an error of theirs does): collected as garbage, it
        # would close the queues through which it ends them.
        getattr(self._batches, "_shutdown_workers", lambda: None)()
        self._batches = self._loader = None
        leave()
