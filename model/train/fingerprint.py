"""What a run's data looked like, so that a data set that changed since is noticed before training goes on with it.

Record files are known by their contents, the images and masks that records name by their names and sizes: pixels are
not read. The sizes are taken while the records are checked anyway. A million records of an image each cost 5 s of that
check (which takes about a minute of one core), half a second more for the contents, and 8 MB of memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from model.data.dataset import MedPLIBDataset
from model.errors import MedPLIBError

MARKS_FILE = "data_marks.npz"
"""File of a run folder with the mark of every record, by which the ones that changed are named."""

Fingerprint = dict[str, dict[str, Any]]
"""By record file: ``bytes`` and ``sha256`` of it, usable ``records``, and ``files``, a checksum of what they name."""


def fingerprint(datasets: Sequence[MedPLIBDataset]) -> Fingerprint:
    """Of the record files and all that their usable records name.

    Raises:
        OSError: a file cannot be read.
    """
    return {str(dataset.path): _facts(dataset) for dataset in datasets}


def _facts(dataset: MedPLIBDataset) -> dict[str, Any]:
    with dataset.path.open("rb") as stream:
        contents = hashlib.file_digest(stream, "sha256").hexdigest()
    return {
        "bytes": dataset.path.stat().st_size,
        "sha256": contents,
        "records": len(dataset),
        "files": hashlib.sha256(dataset.marks.tobytes()).hexdigest(),
    }


def save_marks(datasets: Sequence[MedPLIBDataset], folder: Path) -> None:
    """Keep the mark of every record in the run folder."""
    partial = folder / f".{MARKS_FILE}"
    with partial.open("wb") as stream:
        np.savez(stream, **{str(number): dataset.marks for number, dataset in enumerate(datasets)})  # type: ignore[arg-type]
    partial.replace(folder / MARKS_FILE)


def check_unchanged(saved: Mapping[str, Any], datasets: Sequence[MedPLIBDataset], folder: Path) -> None:
    """Refuse data other than a checkpoint was trained on.

    Args:
        saved: the fingerprint in the checkpoint; files that it does not know are let through.
        datasets: what would be trained on now.
        folder: the run folder, with the marks of its records.

    Raises:
        MedPLIBError: naming what changed.
    """
    changed = []
    for number, dataset in enumerate(datasets):
        before, now = saved.get(str(dataset.path)), _facts(dataset)
        if before is not None and before != now:
            changed.append(_difference(before, now, dataset, _saved_marks(folder, number)))
    if changed:
        raise MedPLIBError(
            f"the data set changed since the checkpoint was written: {'; '.join(changed)}; put it back as it was, "
            "or go on with it all the same by --allow-changed-data"
        )


def _difference(
    before: Mapping[str, Any], now: Mapping[str, Any], dataset: MedPLIBDataset, marks: np.ndarray | None
) -> str:
    name = str(dataset.path)
    if before["records"] != now["records"]:
        return f"{name} had {before['records']} usable records and has {now['records']}"
    if before["sha256"] != now["sha256"]:
        return f"the records in {name} are others"
    if marks is None or marks.shape != dataset.marks.shape:
        return f"files that {name} names have other sizes"
    other = np.flatnonzero(marks != dataset.marks)
    if not len(other):
        return f"files that {name} names have other sizes"
    first = dataset.sample(int(other[0]))
    named = next((str(path) for path in (*first.images, *first.masks)), "no file")
    return f"{len(other)} records of {name} name files of another size, the first is {first.id} ({named})"


def _saved_marks(folder: Path, number: int) -> np.ndarray | None:
    try:
        with np.load(folder / MARKS_FILE) as saved:
            return saved[str(number)]
    except (OSError, KeyError, ValueError):
        return None
