"""Which expert serves what: a checkpoint reads records with their answers, and its routers are counted.

Each record passes once, question and reference answer together; nothing is generated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from model.checkpoint import load
from model.data.dataset import MedPLIBDataset, MixedDataset
from model.data.schema import TASKS
from model.drawing.pages import percent
from model.errors import MedPLIBError
from model.modeling.router_tally import RouterSummary, RouterTally
from model.modeling.splice import POSITION_KINDS, position_kinds
from model.train.balance import UNKNOWN
from model.train.handover import network_of_run
from model.train.starting import merged_of

_GAP = 0.15  # difference between two tasks' shares from which on it is told
KIND_TITLES: Mapping[str, str] = {"text": "text", "image": "image", "region": "region", "seg": "<SEG>"}
MOST_OF = 0.8
"""Share of the positions from which on one expert is said to take a kind of position."""


@dataclass(frozen=True)
class Examination:
    """What routers did with records.

    Attributes:
        source: the checkpoint.
        layers: numbers of the mixture layers.
        records: how many of each task were read.
        tasks, modalities: labels of the groups.
        summary: sums over groups (task, modality, kind), in that order, the last fastest.
    """

    source: str
    layers: tuple[int, ...]
    records: Mapping[str, int]
    tasks: tuple[str, ...]
    modalities: tuple[str, ...]
    summary: RouterSummary

    @property
    def experts(self) -> int:
        """The largest number of experts in a layer."""
        return int(self.summary.choices.shape[-1])

    def merged(self, groups: Sequence[tuple[str | None, str | None, str | None]]) -> RouterSummary:
        """Sums over groups of (task, modality, kind), where None means all of them."""
        places = [
            (place, (task, modality, kind))
            for place, (task, modality, kind) in enumerate(
                (task, modality, kind) for task in self.tasks for modality in self.modalities for kind in POSITION_KINDS
            )
        ]
        return self.summary.merged(
            [
                [at for at, names in places if all(w is None or w == n for w, n in zip(wanted, names, strict=True))]
                for wanted in groups
            ]
        )


def open_examined(path: Path) -> tuple[Any, Any, str]:
    """The network and processor of a checkpoint or of a run, finished or not, and where they lie.

    Raises:
        MedPLIBError: there is none, or it has no routers.
    """
    source = merged_of(path)
    unfinished = (path / "recipe.yaml").is_file() or path.name.startswith("step_")
    if unfinished and not (source / "config.json").is_file():
        network, processor = network_of_run(path)
    else:
        network, processor = load(source)
    if not network.config.moe.enabled:
        raise MedPLIBError(f"{path} is a dense model without routers; name a mixture, as stage IV makes one")
    return network.eval(), processor, str(source)


def open_records(files: Sequence[Path], images: Path, processor: Any) -> MixedDataset:
    """Records to be read, with their answers."""
    return MixedDataset([MedPLIBDataset(path, images, processor, training=False) for path in files])


def chosen_records(dataset: MixedDataset, samples: int, seed: int = 0) -> list[int]:
    """At most ``samples`` items of each task, the same every time."""
    order = np.random.default_rng([seed, 2]).permutation(len(dataset)).tolist()
    taken: list[int] = []
    for task in sorted(set(dataset.tasks)):
        taken += [index for index in order if dataset.tasks[index] == task][:samples]
    return sorted(taken)


def examine(
    network: Any,
    processor: Any,
    source: str,
    dataset: MixedDataset,
    indices: Sequence[int],
    *,
    device: str = "cpu",
    batch_size: int = 8,
    shown: bool = False,
) -> Examination:
    """Let the network read items of a data set and count what its routers do.

    Args:
        network, processor, source: from ``open_examined``.
        dataset, indices: which records.
        device: where it computes.
        batch_size: records a pass.
        shown: draw a bar.
    """
    tasks = tuple(task for task in TASKS if task in {dataset.tasks[index] for index in indices})
    modalities = tuple(sorted({dataset.modalities[index] or UNKNOWN for index in indices}))
    network = network.to(device)
    dtype = next(network.parameters()).dtype
    tally = RouterTally(len(tasks) * len(modalities) * len(POSITION_KINDS))
    with tqdm(total=len(indices), unit="record", disable=not shown) as bar, torch.no_grad():
        for start in range(0, len(indices), batch_size):
            part = indices[start : start + batch_size]
            batch = _moved(processor.collate([dataset[index] for index in part]), device, dtype)
            output = network(**batch)
            kinds = position_kinds(output.plan, batch["input_ids"], batch["labels"], network.config.seg_token_id)
            rows = [
                tasks.index(dataset.tasks[index]) * len(modalities)
                + modalities.index(dataset.modalities[index] or UNKNOWN)
                for index in part
            ]
            first = torch.tensor(rows, device=kinds.device)[:, None] * len(POSITION_KINDS)
            tally.add(output.router_stats, torch.where(kinds < 0, -1, first + kinds).flatten())
            bar.update(len(part))
    assert tally.sums is not None
    records = {task: sum(dataset.tasks[index] == task for index in indices) for task in tasks}
    layers = tuple(network.config.moe.layers)
    return Examination(source, layers, records, tasks, modalities, RouterSummary.of(tally.sums))


def _moved(batch: Mapping[str, Any], device: str, dtype: torch.dtype) -> dict[str, Any]:
    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device, dtype if value.is_floating_point() else value.dtype)
        return [move(item) for item in value] if isinstance(value, list) else value

    return {name: move(value) for name, value in batch.items()}


# --- what it means --------------------------------------------------------------------------------------------------


def specialisation(load: np.ndarray) -> np.ndarray:
    """How much the group of a token tells about its expert, [layers] in [0, 1].

    ``I(group; expert) / log(min(groups, experts))``, with every group as likely as the others and
    ``p(expert | group)`` the load: 0 where all groups use the experts alike, 1 where each keeps to one of its own.

    Args:
        load: [layers, groups, experts]; groups without a token (NaN) are left out.
    """
    found: list[float] = []
    for layer in load:
        present = layer[np.isfinite(layer).all(axis=-1)]
        if min(present.shape) < 2:
            found.append(math.nan)
            continue
        mean = present.mean(axis=0)
        information = _entropy(mean) - float(np.mean([_entropy(group) for group in present]))
        found.append(max(0.0, information / math.log(min(present.shape))))
    return np.asarray(found)


def _entropy(shares: np.ndarray) -> float:
    positive = shares[shares > 0]
    return float(-(positive * np.log(positive)).sum())


def by_task(examined: Examination, kind: str | None = None) -> np.ndarray:
    """Load [layers, tasks, experts] of positions of one kind, or of all."""
    return examined.merged([(task, None, kind) for task in examined.tasks]).load.numpy()


def by_kind(examined: Examination) -> np.ndarray:
    """Load [layers, kinds, experts] over all tasks."""
    return examined.merged([(None, None, kind) for kind in POSITION_KINDS]).load.numpy()


def findings(examined: Examination) -> list[str]:
    """What stands out, in sentences."""
    told = []
    for place, kind in enumerate(POSITION_KINDS):
        load = by_kind(examined)[:, place]
        told += [
            f"Expert {expert} takes {_percents(load[first : last + 1, expert])} of the {KIND_TITLES[kind]} positions "
            f"in {_layers(examined, first, last)}."
            for expert, first, last in _runs(load)
        ]
    if not told:
        told.append(f"No kind of position is left to one expert: none has {percent(MOST_OF)} of one in any layer.")
    of_task, of_kind = _means(examined)
    more = "more" if of_kind > of_task else "less"
    told.append(
        f"What kind of position it is decides {more} about the expert than which task: the specialisation is "
        f"{of_kind:.2f} by kind and {of_task:.2f} by task (0: all alike, 1: each its own expert)."
    )
    gap = _widest_gap(examined)
    return [*told, gap] if gap else told


def _means(examined: Examination) -> tuple[float, float]:
    """Specialisation by task (over all positions) and by kind of position, means over the layers."""
    task, kind = (specialisation(load) for load in (by_task(examined), by_kind(examined)))
    return _mean(task), _mean(kind)


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else 0.0


def _runs(load: np.ndarray) -> list[tuple[int, int, int]]:
    """Expert, first and last layer of each run of layers [layers, experts] in which it takes most."""
    runs: list[tuple[int, int, int]] = []
    for layer, shares in enumerate(load):
        if not np.isfinite(shares).all() or shares.max() < MOST_OF:
            continue
        expert = int(shares.argmax())
        if runs and runs[-1][0] == expert and runs[-1][2] == layer - 1:
            runs[-1] = (expert, runs[-1][1], layer)
        else:
            runs.append((expert, layer, layer))
    return runs


def _widest_gap(examined: Examination) -> str:
    """Where two tasks differ most in the same kind of position."""
    widest, told = _GAP, ""
    for kind in ("text", "image"):
        load = by_task(examined, kind)
        for layer, one, two in ((i, a, b) for i in range(len(load)) for a in range(load.shape[1]) for b in range(a)):
            gap = load[layer, one] - load[layer, two]
            if not np.isfinite(gap).all() or np.abs(gap).max() <= widest:
                continue
            expert = int(np.abs(gap).argmax())
            more, less = (one, two) if gap[expert] > 0 else (two, one)
            widest = float(np.abs(gap).max())
            told = (
                f"Tasks differ most in the {kind} positions of layer {examined.layers[layer]}: expert {expert} takes "
                f"{percent(load[layer, more, expert])} of those of {examined.tasks[more]} records and "
                f"{percent(load[layer, less, expert])} of those of {examined.tasks[less]} records."
            )
    return told


def _percents(shares: np.ndarray) -> str:
    low, high = round(100 * float(shares.min())), round(100 * float(shares.max()))
    return f"{low} %" if low == high else f"{low} to {high} %"


def _layers(examined: Examination, first: int, last: int) -> str:
    if first == last:
        return f"layer {examined.layers[first]}"
    return f"layers {examined.layers[first]} to {examined.layers[last]}"


def as_numbers(examined: Examination) -> dict[str, Any]:
    """All of it as plain numbers for machines; None where no token was."""
    both = [(task, kind) for task in (None, *examined.tasks) for kind in (None, *POSITION_KINDS)]
    groups: list[tuple[str | None, str | None, str | None]] = [(task, None, kind) for task, kind in both]
    groups += [(None, modality, kind) for modality in examined.modalities for kind in (None, *POSITION_KINDS)]
    summary = examined.merged(groups)
    rows = [
        {
            "task": task,
            "modality": modality,
            "positions": kind,
            "tokens": int(summary.tokens[0, at]),
            "load": _plain(summary.load[:, at]),
            "probability": _plain(summary.mean_probability[:, at]),
            "entropy": _plain(summary.mean_entropy[:, at]),
        }
        for at, (task, modality, kind) in enumerate(groups)
    ]
    return {
        "checkpoint": examined.source,
        "layers": list(examined.layers),
        "experts": examined.experts,
        "records": dict(examined.records),
        "findings": findings(examined),
        "specialisation": {
            "formula": "I(group; expert) / log(min(groups, experts)), groups equally likely",
            "by_task": _plain(torch.from_numpy(specialisation(by_task(examined)))),
            "by_kind": _plain(torch.from_numpy(specialisation(by_kind(examined)))),
            "by_task_mean": _means(examined)[0],
            "by_kind_mean": _means(examined)[1],
        },
        "groups": rows,
    }  # fmt: skip


def _plain(values: torch.Tensor) -> Any:
    if values.dim() > 1:
        return [_plain(row) for row in values]
    return [round(value, 5) if math.isfinite(value) else None for value in values.tolist()]
