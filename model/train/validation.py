"""Scores on held-out records while training: how well answers and masks follow when the reference answer is given.

Answers are scored under the reference prefix (one forward pass, no decoding): a row is right if every supervised token
is the most likely one, that is when greedy decoding would say exactly the reference. Masks are those at the reference
``<SEG>`` places. Scores of real answers come from ``model.eval``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.data.dataset import MixedDataset
from model.modeling.configuration import IGNORE_INDEX, IMAGE_PLACEHOLDER, MedPLIBConfig
from model.modeling.splice import plan_splice, splice_labels
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

    def run(self, engine: TrainingEngine, config: MedPLIBConfig) -> dict[str, float]:
        """Scores by name, the same on every rank: ``ce``; ``dice@T`` per threshold, mean over masks;
        ``seg_said``, share of reference ``<SEG>`` that would be said; ``false_masks``, share of rows without ``<SEG>``
        that would say one; ``closed``, ``open``, ``region``: share of rows answered exactly. What has no row is absent.
        """
        was_training = engine.network.training
        engine.network.eval()
        names = self._names()
        sums = dict.fromkeys(names, 0.0)
        for indices, counted in self._batches(engine.process.rank, engine.process.world_size):
            batch = self.processor.collate([self.dataset[index] for index in indices])
            with torch.no_grad():
                output = engine.forward(batch, return_logits=True)
            kinds = [self._kind(index) for index in indices]
            for name, value in score_batch(output, batch, config, kinds, counted, self.settings.thresholds):
                sums[name] += value
        engine.network.train(was_training)
        total = engine.process.sum(torch.tensor([sums[name] for name in names], dtype=torch.float64))
        return _means(dict(zip(names, total.tolist(), strict=True)))

    def _names(self) -> list[str]:
        means = ["ce", "seg_said", "false_masks", "closed", "open", "region"]
        means += [f"dice@{threshold:g}" for threshold in self.settings.thresholds]
        return [f"{mean}/{part}" for mean in means for part in (_RIGHT, _ROWS)]

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
    targets = [mask for row in batch.get("mask_targets") or [] for mask in row]
    rows = output.mask_rows.tolist() if output.mask_rows is not None else []
    for logits, target, row in zip(output.mask_logits or [], targets, rows, strict=True):
        if row >= counted:
            continue
        probability, truth = logits.float().sigmoid().cpu(), target.cpu() > 0.5
        for threshold in thresholds:
            found = probability > threshold
            area = int(found.sum() + truth.sum())
            yield f"dice@{threshold:g}/right", 2.0 * int((found & truth).sum()) / area if area else 0.0
            yield f"dice@{threshold:g}/rows", 1.0


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")


def _means(sums: Mapping[str, float]) -> dict[str, float]:
    names = [name.removesuffix(f"/{_ROWS}") for name in sums if name.endswith(f"/{_ROWS}")]
    return {name: sums[f"{name}/{_RIGHT}"] / sums[f"{name}/{_ROWS}"] for name in names if sums[f"{name}/{_ROWS}"]}
