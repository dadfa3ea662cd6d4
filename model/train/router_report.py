"""``medplib router-report``: which expert serves which task and kind of position, as sentences and JSON.

Each record passes once, question and reference answer together; nothing is generated.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from model.checkpoint import load
from model.checkpoint.directories import resolve
from model.data.dataset import MedPLIBDataset, MixedDataset
from model.data.schema import TASKS
from model.errors import MedPLIBError
from model.modeling.projector import MoEProjector
from model.modeling.router_tally import RouterSummary, RouterTally
from model.modeling.splice import POSITION_KINDS
from model.train.balance import UNKNOWN
from model.train.checkpoints import network_of_run
from model.train.meters import tally_routers
from model.train.recipe_io import RECIPE_FILE, load_recipe
from model.train.run_record import write_through

_DIGITS = 5
_FORMULA = "I(group; expert) / log(min(groups, experts)), groups equally likely"
_MOST_OF = 0.8  # share of the positions from which on one expert is said to take a kind of position


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

    def merged(self, groups: Sequence[tuple[str | None, ...]]) -> RouterSummary:
        """Sums over groups of (task, modality, kind), where None means all; those of (task, modality) are the
        projector's.
        """
        labels = (self.tasks, self.modalities, POSITION_KINDS)[: len(groups[0])]
        names = [set(enumerate(name)) for name in product(*labels)]
        wanted = [{pair for pair in enumerate(group) if pair[1] is not None} for group in groups]
        summary = self.summary if len(labels) == 3 else self.projector
        assert summary is not None
        return summary.merged([[at for at, name in enumerate(names) if group <= name] for group in wanted])

    def by_layer(self, values: torch.Tensor) -> list[np.ndarray]:
        """What is given for each expert [layers, groups, experts], each layer without experts that it has not."""
        return [layer[:, :own].numpy() for layer, own in zip(values, self.experts, strict=True)]


# --- the command ------------------------------------------------------------------------------------------------------


def report(options: argparse.Namespace) -> int:
    """Read records, print what stands out and write all numbers.

    Raises:
        MedPLIBError: a number is below 1, there is no checkpoint with routers, or records or images are not named.
    """
    if options.samples < 1 or options.batch_size < 1:
        raise MedPLIBError("--samples and --batch-size must be at least 1")
    files, images = _data_of(options)
    network, processor, source = _open(options.source)
    dataset = MixedDataset([MedPLIBDataset(path, images, processor, training=False) for path in files])
    order = np.random.default_rng([0, 2]).permutation(len(dataset)).tolist()
    indices: list[int] = []  # the same every time
    for task in sorted(set(dataset.tasks)):
        indices += [index for index in order if dataset.tasks[index] == task][: options.samples]
    examined = examine(network.to(options.device), processor, source, dataset, sorted(indices), options.batch_size)
    out = options.out.with_suffix(".json")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_through(out, as_numbers(examined))
    sys.stdout.writelines(f"{sentence}\n" for sentence in findings(examined))
    sys.stdout.write(f"\nwrote {out}\n")
    return 0


def _data_of(options: argparse.Namespace) -> tuple[list[Path], Path]:
    """Record files and the folder of their images: those given, else those that a run was validated on."""
    run, source, remedy = options.source / RECIPE_FILE, options.source, "give --data FILE… and --images DIR"
    recipe = load_recipe(run).data if run.is_file() else None
    files = options.data or [Path(path) for path in (recipe.validation or recipe.train if recipe else ())]
    if not files:
        raise MedPLIBError(f"{source} is no run that names records; {remedy}")
    if not options.data and not files[0].exists():
        here = "call this from the folder that it was trained in, or"
        raise MedPLIBError(f"{source} names {files[0]}, which is not here; {here} {remedy}")
    images = options.images
    if images is None and recipe is not None and not options.data:
        roots = set(recipe.validation_images or recipe.images if recipe.validation else recipe.images)
        images = Path(roots.pop()) if len(roots) == 1 else None
    if images is None:
        raise MedPLIBError("--images is missing; give the folder that the records' paths start from")
    return files, images


def _open(path: Path) -> tuple[Any, Any, str]:
    """The network and processor of a checkpoint or of a run, finished or not, and where they lie."""
    source = resolve(path)
    unfinished = (path / RECIPE_FILE).is_file() or path.name.startswith("step_")
    from_run = unfinished and not (source / "config.json").is_file()
    network, processor = network_of_run(path) if from_run else load(source)
    if not (network.config.moe.enabled or isinstance(network.model.projector, MoEProjector)):
        raise MedPLIBError(f"{path} is a dense model without routers; name a mixture, as stage IV makes one")
    return network.eval(), processor, str(source)


@torch.no_grad()
def examine(
    network: Any, processor: Any, source: str, dataset: MixedDataset, indices: Sequence[int], batch_size: int
) -> Examination:
    """Let the network read items of a data set, so many a pass, and count what its routers do."""
    of_items = {index: (dataset.tasks[index], dataset.modalities[index] or UNKNOWN) for index in indices}
    tasks = tuple(task for task in TASKS if task in {task for task, _ in of_items.values()})
    modalities = tuple(sorted({modality for _, modality in of_items.values()}))
    places = {group: place for place, group in enumerate(product(tasks, modalities))}
    tally, projector = RouterTally(len(places) * len(POSITION_KINDS)), RouterTally(len(places))
    with tqdm(total=len(indices), unit="record", disable=None) as bar:
        for start in range(0, len(indices), batch_size):
            part = indices[start : start + batch_size]
            batch = _moved(processor.collate([dataset[index] for index in part]), network)
            rows = torch.tensor([places[of_items[index]] for index in part], device=network.device)  # [B]
            tally_routers(network(**batch), batch, network.config.seg_token_id, rows, tally, projector)
            bar.update(len(part))
    records = {task: sum(own == task for own, _ in of_items.values()) for task in tasks}
    moe, in_projector = network.config.moe, None if projector.sums is None else projector.summary()
    layers, experts = tuple(moe.layers), tuple(moe.num_experts)
    return Examination(source, layers, experts, records, tasks, modalities, tally.summary(), in_projector)


def _moved(batch: Mapping[str, Any], network: Any) -> dict[str, Any]:
    like = next(network.parameters())

    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
        return [move(item) for item in value] if isinstance(value, list) else value

    return {name: move(value) for name, value in batch.items()}


# --- what it means ----------------------------------------------------------------------------------------------------


def specialisation(load: Sequence[np.ndarray]) -> np.ndarray:
    """Mutual information of a token's group and its expert, [layers] in [0, 1].

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
        information = _entropy(present.mean(axis=0)) - float(np.mean([_entropy(group) for group in present]))
        found.append(max(0.0, information / math.log(min(present.shape))))
    return np.asarray(found)


def _entropy(shares: np.ndarray) -> float:
    positive = shares[shares > 0]
    return float(-(positive * np.log(positive)).sum())


def by_task(examined: Examination) -> list[np.ndarray]:
    """Load [tasks, experts] of all positions, in each layer."""
    return examined.by_layer(examined.merged([(task, None, None) for task in examined.tasks]).load)


def by_kind(examined: Examination) -> list[np.ndarray]:
    """Load [kinds, experts] over all tasks, in each layer."""
    return examined.by_layer(examined.merged([(None, None, kind) for kind in POSITION_KINDS]).load)


def projector_by_task(examined: Examination) -> list[np.ndarray]:
    """Load [tasks, experts] of image tokens in the projector, as in a single layer."""
    return [examined.merged([(task, None) for task in examined.tasks]).load[0].numpy()]


def findings(examined: Examination) -> list[str]:
    """What stands out, in sentences."""
    sentences = _of_layers(examined) if examined.layers else []
    return [*sentences, _of_projector(examined)] if examined.projector is not None else sentences


def _of_layers(examined: Examination) -> list[str]:
    choices = examined.summary.choices.sum() / examined.summary.tokens.sum().clamp(min=1)  # experts of a token
    if max(examined.experts) <= round(float(choices)):
        return ["Every position goes to all experts of its layer, so that their shares mean nothing."]
    takers = examined.by_layer(examined.merged([(None, None, kind) for kind in POSITION_KINDS]).takers)
    sentences = []
    for place, kind in enumerate(POSITION_KINDS):
        shares = [layer[place] for layer in takers]
        experts = [  # that take most; None where there is no such one, or no choice among them
            int(layer.argmax()) if layer.max() >= _MOST_OF and layer.min() != 1 else None for layer in shares
        ]
        for expert, run in groupby(range(len(shares)), experts.__getitem__):
            if expert is not None:
                layers = list(run)
                low, high = (round(100 * float(of(shares[layer][expert] for layer in layers))) for of in (min, max))
                amount = f"{low} %" if low == high else f"{low} to {high} %"
                first, last = examined.layers[layers[0]], examined.layers[layers[-1]]
                span = f"layer {first}" if len(layers) == 1 else f"layers {first} to {last}"
                name = "<SEG>" if kind == "seg" else kind
                sentences.append(f"Expert {expert} takes {amount} of the {name} positions in {span}.")
    if not sentences:
        sentences = [f"No kind of position is left to one expert: none has {100 * _MOST_OF:.0f} % of one in any layer."]
    of_task, of_kind = (_mean(specialisation(of(examined))) for of in (by_task, by_kind))
    scale = "(0: all alike, 1: each its own expert)"
    if math.isfinite(of_task) and math.isfinite(of_kind):
        more = "more" if of_kind > of_task else "less"
        sentences.append(
            f"What kind of position it is decides {more} about the expert than which task: the specialisation is "
            f"{of_kind:.2f} by kind and {of_task:.2f} by task {scale}."
        )
    elif math.isfinite(of_kind):
        sentences.append(f"The specialisation by kind of position is {of_kind:.2f} {scale}.")
    silent = [layer for layer, tokens in zip(examined.layers, examined.summary.tokens, strict=True) if not tokens.any()]
    if silent:
        sentences.append(f"The routers of these layers give no finite probabilities: {', '.join(map(str, silent))}.")
    return sentences


def _of_projector(examined: Examination) -> str:
    takers = examined.merged([(None, None)]).takers[0, 0].numpy()
    if not np.isfinite(takers).all():
        return "The projector's router gave no figures: no image was read, or its probabilities are not finite."
    if takers.min() == 1:
        return "Every image token goes to all experts of the projector, so that their shares mean nothing."
    expert, of_task = int(takers.argmax()), float(specialisation(projector_by_task(examined))[0])
    more = f"; the specialisation there is {of_task:.2f} by task" if math.isfinite(of_task) else ""
    return f"In the projector expert {expert} takes {100 * takers[expert]:.0f} % of the image tokens, the most{more}."


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def as_numbers(examined: Examination) -> dict[str, Any]:
    """All of it as plain numbers for machines; None where no token was."""
    labels: list[tuple[str | None, str | None]] = [(None, None), *((task, None) for task in examined.tasks)]
    labels += [(None, modality) for modality in examined.modalities]
    numbers: dict[str, Any] = {
        "checkpoint": examined.source,
        "layers": list(examined.layers),
        "experts": max(examined.experts, default=0),
        "records": dict(examined.records),
        "findings": findings(examined),
    }
    if examined.layers:
        of_task, of_kind = specialisation(by_task(examined)), specialisation(by_kind(examined))
        numbers["specialisation"] = {
            "formula": _FORMULA,
            "by_task": _plain(of_task),
            "by_kind": _plain(of_kind),
            "by_task_mean": _plain([_mean(of_task)])[0],
            "by_kind_mean": _plain([_mean(of_kind)])[0],
        }
        groups = [(*label, kind) for label in labels for kind in (None, *POSITION_KINDS)]
        summary = examined.merged(groups)
        numbers["groups"] = [
            {"task": task, "modality": modality, "positions": kind, **summary.numbers(at, examined.experts, _DIGITS)}
            for at, (task, modality, kind) in enumerate(groups)
        ]
    if examined.projector is not None:
        summary, experts = examined.merged(labels), examined.projector.choices.shape[-1]
        of_task = specialisation(projector_by_task(examined))
        numbers["projector"] = {
            "experts": experts,
            "specialisation": {"formula": _FORMULA, "by_task": _plain(of_task)[0]},
            "groups": [
                {"task": task, "modality": modality, **summary.numbers_of_one(at, experts, _DIGITS)}
                for at, (task, modality) in enumerate(labels)
            ],
        }
    return numbers


def _plain(values: Sequence[float] | np.ndarray) -> list[float | None]:
    return [round(float(value), _DIGITS) if math.isfinite(value) else None for value in values]
