"""Metrics of a run: losses by task and modality, router statistics, and the log of files, TensorBoard and progress.

Statistics come from the forward passes of the training: no second pass, and the host waits once a step. Passes in
evaluation mode are not counted; activation checkpointing runs layers again, not the network, and counts once.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from model.data.sampling import ResumableSampler
from model.modeling.losses import MASK_LOSSES
from model.modeling.outputs import MedPLIBOutput
from model.modeling.router_tally import RouterSummary, RouterTally
from model.modeling.splice import POSITION_KINDS, image_token_rows, position_kinds
from model.train.distributed import Process
from model.train.recipe import Logging
from model.train.runs import METRICS_FILE, ROUTER_FILE, VALIDATION_FILE, read_rows, score_lines
from model.train.sample_weights import UNKNOWN

logger = logging.getLogger(__name__)

_COLUMNS = ("rows", "ce", "tokens", "masks", *MASK_LOSSES)
_ROWS, _CE, _TOKENS, _MASKS = range(4)
_DIGITS = 4  # of a share


class Metrics:
    """Statistics of the passes of one network (``TrainingEngine.network``) in training.

    Args:
        sampler: the order of the records.
        tasks, modalities: labels of all records.
        every: steps that a row of router statistics, and of losses by modality, covers; 0 for none of them.
    """

    def __init__(
        self,
        network: nn.Module,
        sampler: ResumableSampler,
        tasks: Sequence[str],
        modalities: Sequence[str | None],
        every: int,
    ) -> None:
        self.sampler, self.every = sampler, every
        self.tasks, own_tasks = _numbered(tasks)
        self.modalities, own_modalities = _numbered([modality or UNKNOWN for modality in modalities])
        self._labels = torch.stack([own_tasks, own_modalities + len(self.tasks)])  # [2, N]
        self._order: Iterator[list[int]] = iter(())
        self._coming: deque[list[int]] = deque()
        count = len(self.tasks) + len(self.modalities)
        self._step = torch.zeros(count, len(_COLUMNS))
        self._window = torch.zeros(count, len(_COLUMNS), dtype=torch.float64)
        self._window_steps = 0
        self._tally = RouterTally(len(self.tasks) * len(POSITION_KINDS))
        self._projector_tally = RouterTally(len(self.tasks))
        self._config: Any = network.config
        network.register_forward_hook(self._count, with_kwargs=True)

    def expect(self) -> None:
        """Note that the network gets the sampler's next batch; call it before ``sampler.advance()``."""
        rows = next(self._order, None)
        if rows is None:  # an epoch begins
            self._order = iter(self.sampler)
            rows = next(self._order)
        self._coming.append(rows)

    def _count(self, network: nn.Module, inputs: Any, named: Mapping[str, Any], output: MedPLIBOutput) -> None:
        losses = output.row_losses
        if not network.training or losses is None or not self._coming:
            return
        device = losses.ce.device
        labels = self._labels[:, self._coming.popleft()]  # [2, B]
        if device.type == "cuda":  # without waiting for what the device is doing
            labels = labels.pin_memory().to(device, non_blocking=True)
        with torch.no_grad():
            assert output.mask_rows is not None
            self._step = self._step.to(device)
            per_row = losses.ce.new_zeros(len(losses.ce), len(_COLUMNS))
            per_row[:, _ROWS], per_row[:, _CE], per_row[:, _TOKENS] = 1, losses.ce, losses.tokens
            ones = torch.ones_like(losses.masks["dice"])
            per_mask = torch.stack([ones, *(losses.masks[name] for name in MASK_LOSSES)])
            per_row[:, _MASKS:].index_add_(0, output.mask_rows, per_mask.t().float())
            for own in labels:  # a row counts for its task and for its modality
                self._step.index_add_(0, own, per_row)
            if self.every:
                seg = self._config.seg_token_id
                tally_routers(output, named, seg, labels[0], self._tally, self._projector_tally)

    def step(self, process: Process, step: int, last: bool) -> dict[str, Any]:
        """Means over what all ranks saw of each label in this step; a label that was not seen is absent.

        ``rows/TASK``, ``ce/TASK`` (a mean over tokens) and ``bce``, ``dice``, ``focal`` and ``iou`` (over masks) are of
        this step; ``rows``, ``ce`` and ``dice`` by modality are of all steps since the last ones. Called by every rank.
        """
        sums = process.sum(self._step)
        self._step.zero_()
        whole = sums.isfinite().all(dim=1)  # a skipped step must not spoil the others
        self._window[whole] += sums[whole]
        self._window_steps += 1
        row = _means(self.tasks, sums[: len(self.tasks)])
        if self.is_due(step, last):
            row |= _means(self.modalities, self._window[len(self.tasks) :], ("dice",))
            self._window.zero_()
        return row

    def router_row(self, process: Process, step: int, last: bool) -> dict[str, Any] | None:
        """What routers did since the last row, for ``router.jsonl``; None where none is due. Called by every rank.

        ``load`` holds a share for each expert of each layer, ``dropped``, ``probability`` and ``entropy`` (nats) are
        means; all by kind of position and by task. A mixture in the projector has an entry ``projector`` of its own.
        """
        if not self.is_due(step, last):
            return None
        summaries = []
        for tally in (self._tally, self._projector_tally):
            summaries.append(None if tally.sums is None else RouterSummary.of(process.sum(tally.sums)))
            if tally.sums is not None:
                tally.clear()
        layers, projector = summaries
        if layers is None and projector is None:
            return None
        row: dict[str, Any] = {"step": step, "steps": self._window_steps, "layers": list(self._config.moe.layers)}
        self._window_steps = 0
        row |= {"kinds": {}, "tasks": {}}
        tasks, kinds = range(len(self.tasks)), len(POSITION_KINDS)
        if layers is not None:
            experts = self._config.moe.num_experts
            by_kind = layers.merged([[task * kinds + kind for task in tasks] for kind in range(kinds)])
            by_task = layers.merged([[task * kinds + kind for kind in range(kinds)] for task in tasks])
            for name, summary, labels in (("kinds", by_kind, POSITION_KINDS), ("tasks", by_task, self.tasks)):
                numbers = ((label, summary.numbers(at, experts, _DIGITS)) for at, label in enumerate(labels))
                row[name] = {label: one for label, one in numbers if one["tokens"]}  # those without tokens are absent
        if projector is not None and projector.tokens.any():
            own = self._config.projector.num_experts
            found = ((task, projector.numbers_of_one(at, own, _DIGITS)) for at, task in enumerate(self.tasks))
            row["projector"] = projector.merged([tasks]).numbers_of_one(0, own, _DIGITS)
            row["projector"]["tasks"] = {task: numbers for task, numbers in found if numbers["tokens"]}
        return row

    def state_dict(self, process: Process) -> dict[str, Any]:
        """What has come together since the last rows, in plain numbers. Called by every rank."""
        routers, projector = (
            None if tally.sums is None else process.sum(tally.sums).tolist()
            for tally in (self._tally, self._projector_tally)
        )
        labels = self._window.tolist()
        return {"steps": self._window_steps, "labels": labels, "routers": routers, "projector": projector}

    def load_state_dict(self, state: Mapping[str, Any], process: Process) -> None:
        """Go on from ``state_dict``; sums of all ranks go on at the first. Of other labels, begin anew."""
        labels = torch.tensor(state.get("labels", []), dtype=torch.float64)
        if labels.shape != self._window.shape:
            return
        self._window, self._window_steps = labels, state["steps"]
        for tally, name in ((self._tally, "routers"), (self._projector_tally, "projector")):
            if state.get(name) is not None:
                sums = torch.tensor(state[name], dtype=torch.float64, device=process.device)
                tally.sums = sums if process.is_first else torch.zeros_like(sums)

    def is_due(self, step: int, last: bool) -> bool:
        """Whether a row of the coarse interval ends with this step."""
        return bool(self.every) and (last or step % self.every == 0)


def tally_routers(
    output: MedPLIBOutput,
    inputs: Mapping[str, Any],
    seg_token_id: int,
    labels: Tensor,
    decoder: RouterTally,
    projector: RouterTally,
) -> None:
    """Count what the routers of one pass did, by ``labels`` (long [B], a number for each row).

    Groups of ``decoder`` are ``label · kinds + kind of position``; those of ``projector``, a mixture there, are the
    labels.
    """
    assert output.plan is not None
    ids, stats = inputs["input_ids"], output.projector_stats
    if output.router_stats:
        kinds = position_kinds(output.plan, ids, inputs["labels"], seg_token_id)  # [B, L]
        groups = torch.where(kinds < 0, -1, labels[:, None] * len(POSITION_KINDS) + kinds)
        decoder.add(output.router_stats, groups.flatten())
    if stats is not None:
        rows = image_token_rows(output.plan, ids, len(stats.kept), inputs.get("visual_kinds"))
        projector.add([stats], labels[rows])


def _means(names: Sequence[str], sums: Tensor, mask_losses: Sequence[str] = MASK_LOSSES) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, own in zip(names, sums.tolist(), strict=True):
        if own[_ROWS]:
            row[f"rows/{name}"] = round(own[_ROWS])
        if own[_TOKENS]:
            row[f"ce/{name}"] = own[_CE] / own[_TOKENS]
        if own[_MASKS]:
            row |= {f"{part}/{name}": own[_COLUMNS.index(part)] / own[_MASKS] for part in mask_losses}
    return row


def _numbered(labels: Sequence[str]) -> tuple[list[str], Tensor]:
    """The labels there are, in order, and the number of each record's."""
    names = sorted(set(labels))
    places = {name: place for place, name in enumerate(names)}
    return names, torch.tensor([places[label] for label in labels], dtype=torch.long)


# --- the log ----------------------------------------------------------------------------------------------------------


class RunLog:
    """metrics.jsonl, validation.jsonl, router.jsonl, TensorBoard, and a progress bar or lines; rank 0 alone ``writes``.

    Rows after ``first_step``, of an earlier attempt, are cut off.
    """

    def __init__(self, folder: Path, settings: Logging, total_steps: int, first_step: int, writes: bool) -> None:
        self.folder, self.writes = folder, writes
        self.last_validation = 0  # step of the newest row
        shown, terminal = writes and settings.progress, sys.stderr.isatty()
        self.bar = tqdm(
            total=total_steps, initial=first_step, unit="step", disable=not (shown and terminal), smoothing=0.1
        )
        self._lines_every = settings.every if shown and not terminal else 0
        self._first_step, self._total_steps, self._begun = first_step, total_steps, time.monotonic()
        self.board: Any = None
        if writes and settings.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                logger.warning("TensorBoard is not installed, so no event files are written; install the train extra")
            else:  # hides what will be done again
                self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        for path in (folder / name for name in (METRICS_FILE, ROUTER_FILE, VALIDATION_FILE) if writes):
            if not path.is_file():
                continue
            kept = [row for row in read_rows(path) if row["step"] <= first_step]  # damaged rows go, too
            partial = path.with_name(f".{path.name}.partial")
            try:
                partial.write_text("".join(f"{json.dumps(row)}\n" for row in kept))
                partial.replace(path)
            except OSError:
                partial.unlink(missing_ok=True)
                raise
            if path.name == VALIDATION_FILE and kept:
                self.last_validation = kept[-1]["step"]

    def step(self, row: Mapping[str, Any]) -> None:
        """Note one optimizer step."""
        self._write(METRICS_FILE, row, "train")
        self.bar.set_postfix(loss=f"{row['loss']:.3f}", lr=f"{row['lr']:.1e}", refresh=False)
        self.bar.update()
        step, last = row["step"], self._total_steps
        if self._lines_every and (step % self._lines_every == 0 or step == last):
            pace = (time.monotonic() - self._begun) / (step - self._first_step)
            left = timedelta(seconds=round(pace * (last - step)))
            rate = f"lr {row['lr']:.1e}, {pace:.2f} s a step, {left} left"
            self.log(f"step {step}/{last} ({step / last:.0%}): loss {row['loss']:.4f}, {rate}")

    def validation(self, row: Mapping[str, Any], files: Sequence[str], note: str) -> None:
        """Note the scores of one validation, with a line for each of several ``files``, and ``note`` after them."""
        self._write(VALIDATION_FILE, row, "validation")
        if self.writes:
            for line in score_lines(row, files):
                self.log(f"step {row['step']}: {line}")
            self.log(f"step {row['step']}: {note}")

    def router(self, row: Mapping[str, Any] | None) -> None:
        """Note what routers did, if there is anything to note."""
        if row is None:
            return
        self._write(ROUTER_FILE, row, "router")
        if self.board is None:
            return
        for group, found in {**row["kinds"], **row["tasks"], "projector": row.get("projector")}.items():
            for measure in ("load", "probability", "entropy", "dropped") if found else ():
                values = [found[measure]] if group == "projector" else found[measure]
                layers = [f"{group}/layer {layer}" for layer in row["layers"]]
                for place, value in zip(["projector"] if group == "projector" else layers, values, strict=True):
                    for expert, one in enumerate(value if isinstance(value, list) else [value]):
                        tag = f"router_{measure}/{place}" + f"/expert {expert}" * isinstance(value, list)
                        if one is not None:
                            self.board.add_scalar(tag, one, row["step"])

    def log(self, text: str) -> None:
        """Log a line without tearing the progress bar."""
        if self.writes:
            with tqdm.external_write_mode():
                logger.info("%s", text)

    def sync(self) -> None:
        """Flush what was noted to the disk, before a checkpoint counts its step as done."""
        for name in (METRICS_FILE, ROUTER_FILE, VALIDATION_FILE):
            if self.writes and (self.folder / name).is_file():
                with (self.folder / name).open("rb") as stream:
                    os.fsync(stream.fileno())

    def close(self) -> None:
        """Finish the bar and the board."""
        self.bar.close()
        if self.board is not None:
            self.board.close()

    def _write(self, name: str, row: Mapping[str, Any], group: str) -> None:
        if not self.writes:
            return
        row = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
        }
        with (self.folder / name).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, allow_nan=False) + "\n")
        if self.board is not None:
            for key, value in row.items():
                if isinstance(value, float):
                    self.board.add_scalar(f"{group}/{key}", value, row["step"])
