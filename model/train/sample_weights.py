"""Sample weights: shares by file, task and modality become one weight a record.

Each kind of shares fixes the sums over its labels. Where several are given, iterative proportional fitting finds the
weights that keep all of them and change the natural mix, every record alike, least.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from model.data.dataset import MixedDataset
from model.data.sampling import balanced_weights
from model.errors import MedPLIBError
from model.train.recipe import OTHER, Data

UNKNOWN = "unknown"
"""Label of records whose modality is not known."""

_ROUNDS = 2000
_TOLERANCE = 1e-3  # of all draws; a share that misses more than this cannot be had


class Draws(NamedTuple):
    """How often one label is drawn."""

    kind: str  # file, task or modality
    label: str
    records: int  # that carry it
    share: float  # of all draws, in [0, 1]
    passes: float  # how often each of its records is seen over the whole run, on average


def draw_weights(dataset: MixedDataset, data: Data) -> np.ndarray | None:
    """The chance of each record, float64 [N] summing to 1; None where every record is seen once an epoch.

    Raises:
        MedPLIBError: shares leave out a label that records have, name one that none has, or contradict each other.
    """
    if not data.task_shares and not data.modality_shares:
        return dataset.weights
    return _weights_of(labels_of(dataset), data)


def share_problems(kinds: Mapping[str, Sequence[str]], data: Data) -> list[str]:
    """What ``draw_weights`` would refuse for records with these labels (``labels_by_kind``), a sentence each."""
    problems = []
    given = _label_shares(data)
    for kind, shares in given.items():
        try:
            whole_shares(kinds[kind], shares, f"data.{kind}_shares")
        except MedPLIBError as error:
            problems.append(str(error))
    if given and not problems:
        try:
            _weights_of(kinds, data)
        except MedPLIBError as error:
            problems.append(str(error))
    return problems


def _label_shares(data: Data) -> dict[str, Mapping[str, float]]:
    shares = {"task": data.task_shares, "modality": data.modality_shares}
    return {kind: given for kind, given in shares.items() if given}


def _weights_of(kinds: Mapping[str, Sequence[str]], data: Data) -> np.ndarray:
    wanted = {
        kind: whole_shares(kinds[kind], shares, f"data.{kind}_shares") for kind, shares in _label_shares(data).items()
    }
    if data.shares:
        files = dict.fromkeys(kinds["file"])
        wanted["file"] = {name: float(share) for name, share in zip(files, data.shares, strict=True)}
    if len(wanted) == 1:
        ((kind, shares),) = wanted.items()
        return balanced_weights(kinds[kind], shares)
    return fitted_weights({kind: kinds[kind] for kind in wanted}, wanted)


def whole_shares(labels: Sequence[str], shares: Mapping[str, float], name: str) -> dict[str, float]:
    """A share for every label: ``other`` is divided among those not named in ``shares``, by their sizes.

    ``labels`` has one a record; ``name`` is what errors call the shares.

    Raises:
        MedPLIBError: as ``draw_weights``.
    """
    sizes = Counter(labels)
    known = ", ".join(sorted(sizes))
    absent = sorted(set(shares) - set(sizes) - {OTHER})
    if absent:
        raise MedPLIBError(f"{name} names {', '.join(absent)}, but no training record is so; the labels are {known}")
    rest = sorted(set(sizes) - set(shares))
    if rest and OTHER not in shares:
        raise MedPLIBError(
            f"{name} leaves out {', '.join(rest)}; give a share, or {OTHER} for all that are not named (0: never drawn)"
        )
    total = sum(sizes[label] for label in rest)
    whole = {label: float(share) for label, share in shares.items() if label != OTHER}
    whole |= {label: shares[OTHER] * sizes[label] / total for label in rest}
    if not sum(whole.values()):
        raise MedPLIBError(f"{name} gives no label of the training records a share; the labels are {known}")
    return whole


def fitted_weights(labels: Mapping[str, Sequence[str]], shares: Mapping[str, Mapping[str, float]]) -> np.ndarray:
    """Weights, float64 [N] summing to 1, that keep shares of several kinds (iterative proportional fitting).

    ``labels`` has one a record, by kind; ``shares`` a relative share of each label, by kind. Records that agree in all
    labels have the same weight.

    Raises:
        MedPLIBError: no weights keep them all.
    """
    names, codes = {}, []
    for kind in shares:
        names[kind], code = np.unique(np.asarray(labels[kind], dtype=str), return_inverse=True)
        codes.append(code)
    cells, cell_of, sizes = np.unique(np.stack(codes), axis=1, return_inverse=True, return_counts=True)
    targets = [np.asarray([shares[kind][name] for name in names[kind].tolist()]) for kind in shares]
    targets = [target / target.sum() for target in targets]
    weights = sizes / sizes.sum()  # of each cell of records that agree in all labels
    for _ in range(_ROUNDS):
        for cell, target in zip(cells, targets, strict=True):
            have = np.bincount(cell, weights, minlength=len(target))
            weights = weights * np.divide(target, have, out=np.zeros_like(target), where=have > 0)[cell]
        misses = [
            target - np.bincount(cell, weights, minlength=len(target))
            for cell, target in zip(cells, targets, strict=True)
        ]
        if max(float(np.abs(miss).max()) for miss in misses) < _TOLERANCE / 1000:
            break
    kinds = list(shares)
    worst = int(np.argmax([miss.max() for miss in misses]))
    label = int(misses[worst].argmax())
    short, wanted = float(misses[worst][label]), float(targets[worst][label])
    if short >= _TOLERANCE:
        named = " and ".join("data.shares" if kind == "file" else f"data.{kind}_shares" for kind in kinds)
        raise MedPLIBError(
            f"{named} contradict each other for these records: {kinds[worst]} {names[kinds[worst]][label]} is to have "
            f"{wanted:.1%} of the draws and would get {wanted - short:.1%}; loosen one of them"
        )
    return (weights / sizes)[np.reshape(cell_of, -1)] / weights.sum()


def labels_of(dataset: MixedDataset) -> dict[str, list[str]]:
    """Labels of every record by kind: ``file``, ``task``, ``modality``."""
    files = [(str(part.path), len(part)) for part in dataset.datasets]
    return labels_by_kind(files, dataset.tasks, dataset.modalities)


def labels_by_kind(
    files: Sequence[tuple[str, int]], tasks: Sequence[str], modalities: Sequence[str | None]
) -> dict[str, list[str]]:
    """As ``labels_of``, from (path, number of records) of each file; a path that is named twice gets a number."""
    seen: Counter[str] = Counter()
    names: list[str] = []
    for path, records in files:
        seen[path] += 1
        names += [f"{path} ({seen[path]})" if seen[path] > 1 else path] * records
    return {"file": names, "task": list(tasks), "modality": [modality or UNKNOWN for modality in modalities]}


def draw_table(dataset: MixedDataset, weights: np.ndarray | None, draws: int) -> list[Draws]:
    """What the weights of ``draw_weights`` make of each file, task and modality in ``draws`` draws of all ranks."""
    kinds = labels_of(dataset)
    chances = np.full(len(kinds["task"]), 1 / len(kinds["task"])) if weights is None else weights / weights.sum()
    table = []
    for kind, labels in kinds.items():
        names, codes = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
        sizes, shares = np.bincount(codes), np.bincount(codes, chances)
        for name, size, share in zip(names.tolist(), sizes.tolist(), shares.tolist(), strict=True):
            table.append(Draws(kind, name, size, share, draws * share / size))
    return table


def draw_lines(table: Sequence[Draws]) -> Iterator[str]:
    """The table in lines for people; of files only where there are several."""
    for kind in ("file", "task", "modality"):
        rows = [row for row in table if row.kind == kind]
        if kind == "file" and len(rows) < 2:
            continue
        width = max(len(row.label) for row in rows)
        for row in rows:
            yield (
                f"  {kind:8} {row.label:{width}}  {row.records:>9,} records  {row.share:6.1%} of the draws  "
                f"each seen {row.passes:.2f} times"
            )
