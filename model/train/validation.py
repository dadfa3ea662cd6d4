"""Scores on held-out records while training: how well answers and masks follow when the reference answer is given.

Answers are scored under the reference prefix (one forward pass, no decoding): a row is right if every supervised token
is the most likely one, that is when greedy decoding would say exactly the reference. Masks are those at the reference
``<SEG>`` places. Scores of real answers come from ``model.eval``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.data.dataset import MixedDataset
from model.modeling.configuration import IGNORE_INDEX, IMAGE_PLACEHOLDER, MedPLIBConfig
from model.modeling.outputs import MedPLIBOutput
from model.modeling.splice import plan_splice, splice_labels
from model.train.balance import UNKNOWN
from model.train.engine import TrainingEngine
from model.train.recipe import Validation

_RIGHT, _ROWS = "right", "rows"


class Validator:
    """Validates a network on a fixed draw of records, shared out over the ranks.

    Args:
        dataset: held-out records.
        processor: collates them.
        settings: how many records, and the mask thresholds.
        seed: of the draw.
    """

    def __init__(self, dataset: MixedDataset, processor: Any, settings: Validation, seed: int) -> None:
        self.dataset, self.processor, self.settings = dataset, processor, settings
        count = min(settings.samples, len(dataset))
        self.indices = np.sort(np.random.default_rng([seed, 1]).permutation(len(dataset))[:count]).tolist()
        self._tasks = [dataset.tasks[index] for index in self.indices]
        self._modalities = [dataset.modalities[index] or UNKNOWN for index in self.indices]

    def run(
        self, engine: TrainingEngine, config: MedPLIBConfig, should_stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float]:
        """Scores by name, the same on every rank: ``ce``; ``dice@T`` per threshold, mean over masks;
        ``seg_said``, share of reference ``<SEG>`` that would be said; ``false_masks``, share of rows without ``<SEG>``
        that would say one; ``closed``, ``open``, ``region``: share of rows answered exactly; ``ce/LABEL`` of each task
        and modality and ``dice@T/MODALITY``. What has no row is absent.

        Args:
            engine, config: what is scored.
            should_stop: asked by all ranks before each batch; where it says so, nothing is scored.
        """
        was_training = engine.network.training
        engine.network.eval()
        names = self._names()
        sums = dict.fromkeys(names, 0.0)
        for indices, counted in self._batches(engine.process.rank, engine.process.world_size):
            if should_stop():
                sums.clear()
                break
            batch = self.processor.collate([self.dataset[index] for index in indices], share_images=True)
            with torch.no_grad():
                output = engine.forward(batch, return_logits=True)
            kinds = [self._kind(index) for index in indices]
            for name, value in score_batch(output, batch, config, kinds, counted, self.settings.thresholds):
                sums[name] += value
            for name, value in self._score_labels(output, batch, indices[:counted]):
                sums[name] += value
        engine.network.train(was_training)
        if not sums:
            return {}
        total = engine.process.sum(torch.tensor([sums[name] for name in names], dtype=torch.float64))
        return _means(dict(zip(names, total.tolist(), strict=True)))

    def _names(self) -> list[str]:
        means = ["ce", "seg_said", "false_masks", "closed", "open", "region"]
        means += [f"dice@{threshold:g}" for threshold in self.settings.thresholds]
        means += [f"ce/{label}" for label in dict.fromkeys((*self._tasks, *self._modalities))]
        means += [f"dice@{t:g}/{label}" for t in self.settings.thresholds for label in dict.fromkeys(self._modalities)]
        return [f"{mean}/{part}" for mean in means for part in (_RIGHT, _ROWS)]

    def _score_labels(
        self, output: MedPLIBOutput, batch: Mapping[str, Any], indices: Sequence[int]
    ) -> Iterator[tuple[str, float]]:
        """Named sums of the rows that are these items, by task and modality."""
        assert output.row_losses is not None
        items = dict(zip(self.indices, zip(self._tasks, self._modalities, strict=True), strict=True))
        losses = output.row_losses.ce.tolist(), output.row_losses.tokens.tolist()
        for index, loss, tokens in zip(indices, *losses, strict=False):
            for label in items[index]:
                yield f"ce/{label}/{_RIGHT}", loss
                yield f"ce/{label}/{_ROWS}", tokens
        for row, name, dice in _dices(output, batch, self.settings.thresholds):
            if row < len(indices):
                yield f"{name}/{items[indices[row]][1]}/{_RIGHT}", dice
                yield f"{name}/{items[indices[row]][1]}/{_ROWS}", 1.0

    def _kind(self, index: int) -> str:
        sample = self.dataset.sample(index)
        if sample.task in ("region", "grounding"):
            return sample.task
        return "closed" if sample.answer_type == "closed" else "open"

    def _batches(self, rank: int, world_size: int) -> Iterator[tuple[list[int], int]]:
        """Record numbers and how many of them count; every rank gets as many batches (ZeRO-3 needs that)."""
        size = self.settings.batch_size
        for start in range(0, len(self.indices), size * world_size):
            own = self.indices[start + rank * size : start + (rank + 1) * size]
            yield own or self.indices[:1], len(own)


def score_batch(
    output: Any,
    batch: Mapping[str, Any],
    config: MedPLIBConfig,
    kinds: Sequence[str],
    counted: int,
    thresholds: Iterable[float],
) -> Iterator[tuple[str, float]]:
    """Named sums of one batch: ``NAME/right`` and ``NAME/rows``; only the first ``counted`` rows count.

    Args:
        output: of a forward pass with ``return_logits``; logits [B, L, V].
        batch: what went in.
        config: of the network.
        kinds: per row ``closed``, ``open``, ``region`` or ``grounding``.
    """
    if not counted:
        return
    logits = output.logits[:counted, :-1]
    labels = grown_labels(batch, config)[:counted, 1:].to(logits.device)  # [B, L - 1]
    supervised = labels != IGNORE_INDEX
    said = logits.argmax(dim=-1)
    right = ((said == labels) | ~supervised).all(dim=1).tolist()
    yield "ce/right", float(_cross_entropy(logits[supervised], labels[supervised]))
    yield "ce/rows", float(supervised.sum())
    segments = (labels == config.seg_token_id) & supervised
    yield "seg_said/right", float(((said == labels) & segments).sum())
    yield "seg_said/rows", float(segments.sum())
    absent = ~segments.any(dim=1)
    yield "false_masks/right", float((((said == config.seg_token_id) & supervised).any(dim=1) & absent).sum())
    yield "false_masks/rows", float(absent.sum())
    for row in range(counted):
        if kinds[row] != "grounding":
            yield f"{kinds[row]}/right", float(right[row])
            yield f"{kinds[row]}/rows", 1.0
    yield from _score_masks(output, batch, counted, thresholds)


def grown_labels(batch: Mapping[str, Any], config: MedPLIBConfig) -> Tensor:
    """Labels at the places of the grown sequence, long [B, L] on the CPU."""
    ids, mask = batch["input_ids"].cpu(), batch["attention_mask"].cpu()
    images = int(((ids == IMAGE_PLACEHOLDER) & mask.bool()).sum())
    return splice_labels(plan_splice(ids, mask, [config.visual_tokens] * images), batch["labels"].cpu())


def _score_masks(
    output: Any, batch: Mapping[str, Any], counted: int, thresholds: Iterable[float]
) -> Iterator[tuple[str, float]]:
    for row, name, dice in _dices(output, batch, thresholds):
        if row < counted:
            yield f"{name}/{_RIGHT}", dice
            yield f"{name}/{_ROWS}", 1.0


def _dices(output: Any, batch: Mapping[str, Any], thresholds: Iterable[float]) -> Iterator[tuple[int, str, float]]:
    """Row, ``dice@T`` and Dice of each mask at each threshold."""
    targets = [mask for row in batch.get("mask_targets") or [] for mask in row]
    rows = output.mask_rows.tolist() if output.mask_rows is not None else []
    for logits, target, row in zip(output.mask_logits or [], targets, rows, strict=True):
        probability, truth = logits.float().sigmoid().cpu(), target.cpu() > 0.5
        for threshold in thresholds:
            found = probability > threshold
            area = int(found.sum() + truth.sum())
            yield row, f"dice@{threshold:g}", 2.0 * int((found & truth).sum()) / area if area else 0.0


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")


def _means(sums: Mapping[str, float]) -> dict[str, float]:
    names = [name.removesuffix(f"/{_ROWS}") for name in sums if name.endswith(f"/{_ROWS}")]
    return {name: sums[f"{name}/{_RIGHT}"] / sums[f"{name}/{_ROWS}"] for name in names if sums[f"{name}/{_ROWS}"]}
