"""Losses by task and modality and router statistics, accumulated on the device during training.

The meters look at what each forward pass of the training gives anyway: no second pass, and the host waits once a step.
Passes in evaluation mode are not counted; activation checkpointing runs layers again, not the network, and counts once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model.data.sampling import ResumableSampler
from model.modeling.losses import MASK_LOSSES
from model.modeling.outputs import MedPLIBOutput
from model.modeling.router_tally import RouterSummary, RouterTally
from model.modeling.splice import POSITION_KINDS, image_token_rows, position_kinds
from model.train.balance import UNKNOWN
from model.train.process import Process

_COLUMNS = ("rows", "ce", "tokens", "masks", *MASK_LOSSES)
_ROWS, _CE, _TOKENS, _MASKS = range(4)
_DIGITS = 4  # of a share


class Meters:
    """Watches one network in training.

    Args:
        network: whose passes are watched, as ``TrainingEngine.network``.
        sampler: says which records come, in which order.
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
        network.register_forward_hook(self._watch, with_kwargs=True)

    def expect(self) -> None:
        """Tell that the network sees the sampler's next batch; call it before ``sampler.advance()``."""
        rows = next(self._order, None)
        if rows is None:  # an epoch begins
            self._order = iter(self.sampler)
            rows = next(self._order)
        self._coming.append(rows)

    # --- while the network runs ---------------------------------------------------------------------------------------

    def _watch(self, network: nn.Module, inputs: Any, named: Mapping[str, Any], output: MedPLIBOutput) -> None:
        if not network.training or output.row_losses is None or not self._coming:
            return
        labels = _moved(self._labels[:, self._coming.popleft()], output.row_losses.ce.device)  # [2, B]
        with torch.no_grad():
            self._add_losses(output, labels)
            if self.every:
                seg = self._config.seg_token_id
                tally_routers(output, named, seg, labels[0], self._tally, self._projector_tally)

    def _add_losses(self, output: MedPLIBOutput, labels: Tensor) -> None:
        losses, rows = output.row_losses, output.mask_rows
        assert losses is not None and rows is not None
        self._step = self._step.to(losses.ce.device)
        per_row = losses.ce.new_zeros(len(losses.ce), len(_COLUMNS))
        per_row[:, _ROWS], per_row[:, _CE], per_row[:, _TOKENS] = 1, losses.ce, losses.tokens
        per_mask = torch.stack([torch.ones_like(losses.masks["dice"]), *(losses.masks[name] for name in MASK_LOSSES)])
        per_row[:, _MASKS:].index_add_(0, rows, per_mask.t().float())
        for own in labels:  # a row counts for its task and for its modality
            self._step.index_add_(0, own, per_row)

    # --- once a step --------------------------------------------------------------------------------------------------

    def step(self, process: Process, step: int, last: bool) -> dict[str, Any]:
        """Means over what all ranks saw of each label in this step; a label that was not seen is absent.

        ``rows/TASK``, ``ce/TASK`` (a mean over tokens) and ``bce``, ``dice``, ``focal`` and ``iou`` (over masks) are of
        this step; ``rows``, ``ce`` and ``dice`` by modality are of all steps since the last ones. Called by every rank.

        Args:
            process: this rank.
            step: number of the step.
            last: it is the run's last, whose rows are due whatever its number.
        """
        sums = process.sum(self._step)
        self._step.zero_()
        whole = sums.isfinite().all(dim=1)  # what a step that was skipped gave says nothing about the others
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
        layers, projector = (_taken(tally, process) for tally in (self._tally, self._projector_tally))
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
            row["kinds"] = _by_name(by_kind, POSITION_KINDS, experts)
            row["tasks"] = _by_name(by_task, self.tasks, experts)
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
    """Count what the routers of one pass did.

    Args:
        output, inputs: of the pass.
        labels: long [B], a number for each row.
        decoder: its groups are ``label · kinds + kind of position``.
        projector: of a mixture in the projector; its groups are the labels.
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


def _taken(tally: RouterTally, process: Process) -> RouterSummary | None:
    """What a tally counted on all ranks, which begins anew; None before the first pass."""
    if tally.sums is None:
        return None
    summary = RouterSummary.of(process.sum(tally.sums))
    tally.clear()
    return summary


def _by_name(summary: RouterSummary, names: Sequence[str], experts: Sequence[int]) -> dict[str, Any]:
    """Each group in plain numbers, under its name; what has no token is absent."""
    found = ((name, summary.numbers(group, experts, _DIGITS)) for group, name in enumerate(names))
    return {name: numbers for name, numbers in found if numbers["tokens"]}


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


def _moved(values: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for what it is doing."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values
