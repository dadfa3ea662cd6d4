"""Which expert serves what: a checkpoint reads records with their answers, and its routers are counted.

Each record passes once, question and reference answer together; nothing is generated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from model.checkpoint import load
from model.checkpoint.directories import resolve
from model.data.dataset import MedPLIBDataset, MixedDataset
from model.data.schema import TASKS
from model.drawing.pages import percent
from model.errors import MedPLIBError
from model.modeling.projector import MoEProjector
from model.modeling.router_tally import RouterSummary, RouterTally
from model.modeling.splice import POSITION_KINDS, image_token_rows, position_kinds
from model.train.balance import UNKNOWN
from model.train.handover import network_of_run

_DIGITS = 5
_FORMULA = "I(group; expert) / log(min(groups, experts)), groups equally likely"
_GAP = 0.15  # difference between two tasks' shares from which on it is told
KIND_TITLES: Mapping[str, str] = {"text": "text", "image": "image", "region": "region", "seg": "<SEG>"}
MOST_OF = 0.8
"""Share of the positions from which on one expert is said to take a kind of position."""


@dataclass(frozen=True)
class Examination:
    """What routers did with records.

    Attributes:
        source: the checkpoint.
        layers: numbers of the mixture layers; none where the projector alone is a mixture.
        experts: how many each of them has.
        records: how many of each task were read.
        tasks, modalities: labels of the groups.
        summary: sums over groups (task, modality, kind), in that order, the last fastest.
        projector: of a mixture in the projector, sums over groups (task, modality) of image tokens.
    """

    source: str
    layers: tuple[int, ...]
    experts: tuple[int, ...]
    records: Mapping[str, int]
    tasks: tuple[str, ...]
    modalities: tuple[str, ...]
    summary: RouterSummary
    projector: RouterSummary | None = None

    @property
    def most_experts(self) -> int:
        """The largest number of experts in a layer."""
        return max(self.experts, default=0)

    @property
    def choices(self) -> int:
        """Experts that a token goes to, before any is full."""
        return round(float(self.summary.choices.sum() / self.summary.tokens.sum().clamp(min=1)))

    def merged(self, groups: Sequence[tuple[str | None, str | None, str | None]]) -> RouterSummary:
        """Sums over groups of (task, modality, kind), where None means all of them."""
        return self.summary.merged(_places(groups, list(product(self.tasks, self.modalities, POSITION_KINDS))))

    def in_projector(self, groups: Sequence[tuple[str | None, str | None]]) -> RouterSummary:
        """Sums over the projector's groups of (task, modality), where None means all of them."""
        assert self.projector is not None
        return self.projector.merged(_places(groups, list(product(self.tasks, self.modalities))))

    @property
    def labels(self) -> list[tuple[str | None, str | None]]:
        """All records, those of each task, and those of each modality, as (task, modality)."""
        return [(None, None), *((task, None) for task in self.tasks), *((None, own) for own in self.modalities)]

    def by_layer(self, values: torch.Tensor) -> list[np.ndarray]:
        """What is given for each expert [layers, groups, experts], each layer without experts that it has not."""
        return [layer[:, :own].numpy() for layer, own in zip(values, self.experts, strict=True)]


def _places(wanted: Sequence[tuple[str | None, ...]], names: Sequence[tuple[str, ...]]) -> list[list[int]]:
    """Which of the named groups belong to each wanted one, where None means any."""
    return [
        [at for at, own in enumerate(names) if all(w is None or w == n for w, n in zip(group, own, strict=True))]
        for group in wanted
    ]


def open_examined(path: Path) -> tuple[Any, Any, str]:
    """The network and processor of a checkpoint or of a run, finished or not, and where they lie.

    Raises:
        MedPLIBError: there is none, or it has no routers.
    """
    source = resolve(path)
    unfinished = (path / "recipe.yaml").is_file() or path.name.startswith("step_")
    if unfinished and not (source / "config.json").is_file():
        network, processor = network_of_run(path)
    else:
        network, processor = load(source)
    if not (network.config.moe.enabled or isinstance(network.model.projector, MoEProjector)):
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
    places = {group: place for place, group in enumerate(product(tasks, modalities))}
    tally, projector = RouterTally(len(places) * len(POSITION_KINDS)), RouterTally(len(places))
    with tqdm(total=len(indices), unit="record", disable=not shown) as bar, torch.no_grad():
        for start in range(0, len(indices), batch_size):
            part = indices[start : start + batch_size]
            batch = _moved(processor.collate([dataset[index] for index in part]), device, dtype)
            output = network(**batch)
            ids, stats = batch["input_ids"], output.projector_stats
            kinds = position_kinds(output.plan, ids, batch["labels"], network.config.seg_token_id)
            groups = [places[dataset.tasks[index], dataset.modalities[index] or UNKNOWN] for index in part]
            rows = torch.tensor(groups, device=kinds.device)  # [B]
            tally.add(
                output.router_stats, torch.where(kinds < 0, -1, rows[:, None] * len(POSITION_KINDS) + kinds).flatten()
            )
            if stats is not None:
                seen = image_token_rows(output.plan, ids, len(stats.kept), batch.get("visual_kinds"))
                projector.add([stats], rows[seen])
            bar.update(len(part))
    records = {task: sum(dataset.tasks[index] == task for index in indices) for task in tasks}
    return Examination(
        source,
        tuple(network.config.moe.layers),
        tuple(network.config.moe.num_experts),
        records,
        tasks,
        modalities,
        tally.summary(),
        None if projector.sums is None else projector.summary(),
    )


def _moved(batch: Mapping[str, Any], device: str, dtype: torch.dtype) -> dict[str, Any]:
    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device, dtype if value.is_floating_point() else value.dtype)
        return [move(item) for item in value] if isinstance(value, list) else value

    return {name: move(value) for name, value in batch.items()}


# --- what it means --------------------------------------------------------------------------------------------------


def specialisation(load: Sequence[np.ndarray]) -> np.ndarray:
    """How much the group of a token tells about its expert, [layers] in [0, 1].

    ``I(group; expert) / log(min(groups, experts))``, with every group as likely as the others and
    ``p(expert | group)`` the load: 0 where all groups use the experts alike, 1 where each keeps to one of its own.

    Args:
        load: [groups, experts] of each layer; groups without a token (NaN) are left out.
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


def by_task(examined: Examination, kind: str | None = None) -> list[np.ndarray]:
    """Load [tasks, experts] of positions of one kind, or of all, in each layer."""
    return examined.by_layer(examined.merged([(task, None, kind) for task in examined.tasks]).load)


def by_kind(examined: Examination) -> list[np.ndarray]:
    """Load [kinds, experts] over all tasks, in each layer."""
    return examined.by_layer(examined.merged([(None, None, kind) for kind in POSITION_KINDS]).load)


def projector_by_task(examined: Examination) -> np.ndarray:
    """Load [tasks, experts] of image tokens in the projector."""
    return examined.in_projector([(task, None) for task in examined.tasks]).load[0].numpy()


def findings(examined: Examination) -> list[str]:
    """What stands out, in sentences."""
    told = _of_layers(examined) if examined.layers else []
    return [*told, _of_projector(examined)] if examined.projector is not None else told


def _of_layers(examined: Examination) -> list[str]:
    if examined.most_experts <= examined.choices:
        return ["Every position goes to all experts of its layer, so that their shares tell nothing."]
    takers = examined.by_layer(examined.merged([(None, None, kind) for kind in POSITION_KINDS]).takers)
    told = [
        f"Expert {expert} takes {_percents([takers[layer][place, expert] for layer in range(first, last + 1)])} of the "
        f"{KIND_TITLES[kind]} positions in {_layers(examined, first, last)}."
        for place, kind in enumerate(POSITION_KINDS)
        for expert, first, last in _runs([layer[place] for layer in takers])
    ]
    if not told:
        told.append(f"No kind of position is left to one expert: none has {percent(MOST_OF)} of one in any layer.")
    return [*told, *filter(None, (_means_told(examined), _widest_gap(examined), _broken(examined)))]


def _means_told(examined: Examination) -> str:
    """What decides more about the expert, task or kind of position; of a single task or kind nothing can be told."""
    of_task, of_kind = _means(examined)
    scale = "(0: all alike, 1: each its own expert)"
    if math.isfinite(of_task) and math.isfinite(of_kind):
        more = "more" if of_kind > of_task else "less"
        return (
            f"What kind of position it is decides {more} about the expert than which task: the specialisation is "
            f"{of_kind:.2f} by kind and {of_task:.2f} by task {scale}."
        )
    return f"The specialisation by kind of position is {of_kind:.2f} {scale}." if math.isfinite(of_kind) else ""


def _broken(examined: Examination) -> str:
    """Which layers have no figures though they read the records."""
    silent = [layer for layer, tokens in zip(examined.layers, examined.summary.tokens, strict=True) if not tokens.any()]
    named = ", ".join(map(str, silent))
    return f"The routers of these layers give no finite probabilities: {named}." if silent else ""


def _of_projector(examined: Examination) -> str:
    takers = examined.in_projector([(None, None)]).takers[0, 0].numpy()
    if not np.isfinite(takers).all():
        return "The projector's router gave no figures: no image was read, or its probabilities are not finite."
    if takers.min() == 1:
        return "Every image token goes to all experts of the projector, so that their shares tell nothing."
    expert = int(takers.argmax())
    (by_own_task,) = specialisation([projector_by_task(examined)])
    told = f"In the projector expert {expert} takes {percent(takers[expert])} of the image tokens, the most"
    if not math.isfinite(by_own_task):
        return f"{told}."
    return f"{told}; the specialisation there is {by_own_task:.2f} by task."


def _means(examined: Examination) -> tuple[float, float]:
    """Specialisation by task (over all positions) and by kind of position, means over the layers; NaN of one alone."""
    task, kind = (specialisation(load) for load in (by_task(examined), by_kind(examined)))
    return _mean(task), _mean(kind)


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def _runs(takers: Sequence[np.ndarray]) -> list[tuple[int, int, int]]:
    """Expert, first and last layer of each run of layers in which it takes most; of each layer, shares [experts]."""
    runs: list[tuple[int, int, int]] = []
    for layer, shares in enumerate(takers):
        if not np.isfinite(shares).all() or shares.max() < MOST_OF or shares.min() == 1:  # no choice among them
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
        takers = examined.by_layer(examined.merged([(task, None, kind) for task in examined.tasks]).takers)
        for layer, one, two in product(range(len(takers)), range(len(examined.tasks)), range(len(examined.tasks))):
            gap = takers[layer][one] - takers[layer][two]
            if not np.isfinite(gap).all() or np.abs(gap).max() <= widest:
                continue
            expert = int(np.abs(gap).argmax())
            more, less = (one, two) if gap[expert] > 0 else (two, one)
            widest = float(np.abs(gap).max())
            told = (
                f"Tasks differ most in the {kind} positions of layer {examined.layers[layer]}: expert {expert} takes "
                f"{percent(takers[layer][more, expert])} of those of {examined.tasks[more]} records and "
                f"{percent(takers[layer][less, expert])} of those of {examined.tasks[less]} records."
            )
    return told


def _percents(shares: Sequence[float]) -> str:
    low, high = round(100 * float(min(shares))), round(100 * float(max(shares)))
    return f"{low} %" if low == high else f"{low} to {high} %"


def _layers(examined: Examination, first: int, last: int) -> str:
    if first == last:
        return f"layer {examined.layers[first]}"
    return f"layers {examined.layers[first]} to {examined.layers[last]}"


def as_numbers(examined: Examination) -> dict[str, Any]:
    """All of it as plain numbers for machines; None where no token was."""
    groups = [(*label, kind) for label in examined.labels for kind in (None, *POSITION_KINDS)]
    numbers: dict[str, Any] = {
        "checkpoint": examined.source,
        "layers": list(examined.layers),
        "experts": examined.most_experts,
        "records": dict(examined.records),
        "findings": findings(examined),
    }
    if examined.layers:
        of_task, of_kind = _plain(np.asarray(_means(examined)))
        summary = examined.merged(groups)
        numbers["specialisation"] = {
            "formula": _FORMULA,
            "by_task": _plain(specialisation(by_task(examined))),
            "by_kind": _plain(specialisation(by_kind(examined))),
            "by_task_mean": of_task,
            "by_kind_mean": of_kind,
        }
        numbers["groups"] = [
            {"task": task, "modality": modality, "positions": kind, **summary.numbers(at, examined.experts, _DIGITS)}
            for at, (task, modality, kind) in enumerate(groups)
        ]
    if examined.projector is not None:
        numbers["projector"] = _projector_numbers(examined)
    return numbers


def _projector_numbers(examined: Examination) -> dict[str, Any]:
    labels = examined.labels
    summary = examined.in_projector(labels)
    experts = summary.choices.shape[-1]
    return {
        "experts": experts,
        "specialisation": {"formula": _FORMULA, "by_task": _plain(specialisation([projector_by_task(examined)]))[0]},
        "groups": [
            {"task": task, "modality": modality, **summary.numbers_of_one(at, experts, _DIGITS)}
            for at, (task, modality) in enumerate(labels)
        ],
    }


def _plain(values: np.ndarray) -> list[float | None]:
    return [round(value, _DIGITS) if math.isfinite(value) else None for value in values.tolist()]
