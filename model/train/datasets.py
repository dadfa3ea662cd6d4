"""The records that a recipe names: checked before anything expensive starts, with a bar while it lasts."""

from __future__ import annotations

import numpy as np

from model.data.dataset import MedPLIBDataset, MixedDataset
from model.data.lengths import LengthCheck
from model.data.progress import record_bar
from model.modeling.configuration import MedPLIBConfig
from model.processing.processor import MedPLIBProcessor
from model.train.recipe import Recipe


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


def pack_conversations(
    recipe: Recipe, dataset: MixedDataset, processor: MedPLIBProcessor, weights: np.ndarray | None
) -> None:
    """Let training items be conversations of up to ``data.conversation_turns`` questions.

    Args:
        weights: the chance of each record; the further questions of a conversation are drawn by it, too.
    """
    shared = LengthCheck.of(processor).shared
    dataset.pack(recipe.data.conversation_turns, weights, processor.settings.max_length, shared)


def item_lengths(recipe: Recipe, dataset: MixedDataset, config: MedPLIBConfig) -> np.ndarray:
    """Length of every item in the decoder, int64 [N]; zeros where the recipe does not group by it."""
    if not recipe.data.group_by_length:
        return np.zeros(len(dataset), dtype=np.int64)
    return dataset.tokens + dataset.images * (config.visual_tokens - 1)


def data_files(recipe: Recipe, *, training: bool) -> list[tuple[str, str]]:
    """Record files, each with the folder of its images."""
    data = recipe.data
    files, roots = (data.train, data.images) if training else (data.validation, data.validation_images or data.images)
    if not training and not recipe.validation.samples:
        return []
    each = roots if len(roots) > 1 else (roots or ("",)) * len(files)
    return list(zip(files, each, strict=False))  # as many, see recipe_checks
