"""Open a recipe's records, check them before training, and resume with the same ones."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

from model.data.dataset import MedPLIBDataset, MixedDataset
from model.data.packing import LengthCheck
from model.data.validate import record_bar
from model.errors import MedPLIBError
from model.processing.processor import MedPLIBProcessor
from model.train.recipe import Recipe

MARKS_FILE = "data_marks.npz"
"""File of a run folder with the mark of every record, by which the ones that changed are named."""

Fingerprint = dict[str, dict[str, Any]]
"""By record file: ``bytes`` and ``sha256`` of it, usable ``records``, and ``files``, a checksum of what they name."""
_SHARED = Path("/dev/shm")
_NO_SHARED_MEMORY = re.compile(r"unable to (mmap|resize|allocate|open|write).*(/torch_|shared)|Bus error|shared memory")


def open_dataset(recipe: Recipe, processor: MedPLIBProcessor, *, training: bool, shown: bool = False) -> MixedDataset:
    """The training files, or the validation files, as one data set; ``shown`` draws a bar while they are checked.

    Raises:
        MedPLIBError: a file is unreadable, or has unusable records and the recipe does not skip them.
    """
    datasets = []
    for path, images in data_files(recipe, training=training):
        with record_bar(f"checking {path}", shown=shown) as progress:
            dataset = MedPLIBDataset(
                path,
                images,
                processor,
                training=training,
                on_bad_record=recipe.data.on_bad_record,
                seed=recipe.seed,
                progress=progress,
                lengths=LengthCheck.of(processor),
                augmentation=recipe.augmentation,
            )
        datasets.append(dataset)
    return MixedDataset(datasets, (recipe.data.shares or None) if training else None)


def data_files(recipe: Recipe, *, training: bool) -> list[tuple[str, str]]:
    """Record files, each with the folder of its images."""
    data = recipe.data
    files, roots = (data.train, data.images) if training else (data.validation, data.validation_images or data.images)
    if not training and not recipe.validation.samples:
        return []
    each = roots if len(roots) > 1 else (roots or ("",)) * len(files)
    return list(zip(files, each, strict=False))  # as many, see recipe_io


# --- whether the data changed -----------------------------------------------------------------------------------------


def fingerprint(datasets: Sequence[MedPLIBDataset]) -> Fingerprint:
    """Of the record files and all that their usable records name: files of records by their contents, images and masks
    by names and sizes that were taken when the records were checked; pixels are not read.

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
            marks = np.zeros(0)
            with suppress(OSError, KeyError, ValueError), np.load(folder / MARKS_FILE) as kept:
                marks = kept[str(number)]
            changed.append(_difference(before, now, dataset, marks))
    if changed:
        raise MedPLIBError(
            f"the data set changed since the checkpoint was written: {'; '.join(changed)}; put it back as it was, "
            "or go on with it all the same by --allow-changed-data"
        )


def _difference(before: Mapping[str, Any], now: Mapping[str, Any], dataset: MedPLIBDataset, marks: np.ndarray) -> str:
    name = str(dataset.path)
    if before["records"] != now["records"]:
        return f"{name} had {before['records']} usable records and has {now['records']}"
    if before["sha256"] != now["sha256"]:
        return f"the records in {name} are others"
    other = np.flatnonzero(marks != dataset.marks) if marks.shape == dataset.marks.shape else marks[:0]
    if not len(other):
        return f"files that {name} names have other sizes"
    first = dataset.sample(int(other[0]))
    named = next((str(path) for path in (*first.images, *first.masks)), "no file")
    return f"{len(other)} records of {name} name files of another size, the first is {first.id} ({named})"


# --- batches ----------------------------------------------------------------------------------------------------------


def taken_from(batches: Iterator[dict[str, Any]]) -> tuple[dict[str, Any] | None, str]:
    """The next batch, None after the last one; and what a record is refused for.

    A sentence instead of an exception: that would hold the loader, whose processes could then not be ended.
    """
    try:
        return next(batches, None), ""
    except MedPLIBError as error:  # from a loader process it comes wrapped in that process's traceback
        name = f"{MedPLIBError.__module__}.{MedPLIBError.__name__}: "
        return None, str(error).strip().splitlines()[-1].removeprefix(name)
    except RuntimeError as error:
        fault = short_of_shared_memory(error)
        if not fault:
            raise
        return None, fault


def short_of_shared_memory(error: BaseException) -> str:
    """The sentence about an error that comes of a too small /dev/shm; empty about any other."""
    if not (isinstance(error, RuntimeError) and _NO_SHARED_MEMORY.search(str(error))):
        return ""
    free = shutil.disk_usage(_SHARED).free / 2**20 if _SHARED.is_dir() else 0.0
    return (
        f"shared memory is full: loader processes pass batches through {_SHARED}, which has {free:.1f} MiB free; "
        "enlarge it (docker run --shm-size=8g, or --ipc=host), or load in the training process by data.workers=0"
    )


def in_shared_memory(collate: Callable[[list[Any]], Any], samples: list[Any]) -> Any:
    """A batch that a loader process put into shared memory itself.

    Left to the queue between the processes, a failure would be printed by a thread of the loader and the training would
    wait for the batch for ever; raised here, it reaches the training.
    """
    batch = collate(samples)
    if get_worker_info() is not None:
        _share(batch)
    return batch


def _share(value: Any) -> None:
    if isinstance(value, torch.Tensor):
        value.share_memory_()
    elif isinstance(value, Mapping):
        _share(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            _share(item)
