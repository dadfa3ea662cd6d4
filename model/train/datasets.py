"""The records that a recipe names: checked before anything expensive starts, with a bar while it lasts."""

from __future__ import annotations

from model.data.dataset import Encoder, MedPLIBDataset, MixedDataset, usable_records
from model.data.progress import record_bar
from model.train.recipe import Recipe


def check_data(recipe: Recipe) -> None:
    """Refuse what ``open_dataset`` would refuse, without a network.

    Raises:
        MedPLIBError: a file is unreadable, or has unusable records and the recipe does not skip them.
    """
    for training in (True, False):
        for path, images in _files(recipe, training=training):
            with record_bar(f"checking {path}", shown=recipe.logging.progress) as progress:
                usable_records(path, images, recipe.data.on_bad_record, progress)


def open_dataset(recipe: Recipe, processor: Encoder, *, training: bool, shown: bool = False) -> MixedDataset:
    """The training files, or the validation files, as one data set; ``shown`` draws a bar while they are checked.

    Raises:
        MedPLIBError: as ``check_data``.
    """
    datasets = []
    for path, images in _files(recipe, training=training):
        with record_bar(f"checking {path}", shown=shown) as progress:
            datasets.append(
                MedPLIBDataset(
                    path,
                    images,
                    processor,
                    training=training,
                    on_bad_record=recipe.data.on_bad_record,
                    seed=recipe.seed,
                    progress=progress,
                )
            )
    return MixedDataset(datasets, (recipe.data.shares or None) if training else None)


def _files(recipe: Recipe, *, training: bool) -> list[tuple[str, str]]:
    """Record files, each with the folder of its images."""
    data = recipe.data
    if training:
        return [(path, data.images) for path in data.train]
    return [(path, data.validation_images or data.images) for path in data.validation if recipe.validation.samples]
