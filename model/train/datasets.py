"""The records that a recipe names: checked before anything expensive starts, with a bar while it lasts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from model.data.dataset import Encoder, MedPLIBDataset, MixedDataset
from model.data.lengths import sequence_length
from model.data.progress import record_bar
from model.errors import MedPLIBError
from model.modeling.configuration import MedPLIBConfig
from model.processing.conversation import TEMPLATES
from model.processing.processor import MedPLIBProcessor
from model.train.process import Process
from model.train.recipe import Recipe

_SHOWN_EVERY = 256  # records between two moves of a bar


def open_dataset(recipe: Recipe, processor: Encoder, *, training: bool, shown: bool = False) -> MixedDataset:
    """The training files, or the validation files, as one data set; ``shown`` draws a bar while they are checked.

    Raises:
        MedPLIBError: a file is unreadable, has unusable records and the recipe does not skip them, or asks about
            regions where the template writes no questions.
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
            )
        check_template(recipe, path, dataset.tasks)
        datasets.append(dataset)
    return MixedDataset(datasets, (recipe.data.shares or None) if training else None)


def item_lengths(
    recipe: Recipe, dataset: MixedDataset, processor: MedPLIBProcessor, config: MedPLIBConfig, process: Process
) -> np.ndarray:
    """Length of every item in the decoder, int64 [N]; zeros where the recipe does not group by it.

    Lengths are counted anew by every run, each rank its share: that takes about as long as the check of the records,
    and nothing that is kept could be out of date. Called by every rank.
    """
    lengths = np.zeros(len(dataset), dtype=np.int64)
    if not recipe.data.group_by_length:
        return lengths
    measure = sequence_length(processor, config.visual_tokens)
    own = range(process.rank, len(dataset), process.world_size)
    with record_bar("measuring records", shown=process.is_first and recipe.logging.progress) as progress:
        for done, index in enumerate(own, start=1):
            lengths[index] = measure(dataset.sample(index).turns)
            if done % _SHOWN_EVERY == 0 or done == len(own):
                progress(done, len(own))
    return process.sum(torch.from_numpy(lengths)).numpy().astype(np.int64)


def check_template(recipe: Recipe, path: str, tasks: Sequence[str]) -> None:
    """Refuse, before the first step, records that the recipe's template cannot write.

    Raises:
        MedPLIBError: naming the file.
    """
    regions = sum(task == "region" for task in tasks)
    if regions and not TEMPLATES[recipe.data.template].chat:
        raise MedPLIBError(
            f"{path} has {regions} records that ask about regions, but data.template={recipe.data.template} writes no "
            "questions; give a file of captions, or data.template=llava_v1"
        )


def data_files(recipe: Recipe, *, training: bool) -> list[tuple[str, str]]:
    """Record files, each with the folder of its images."""
    data = recipe.data
    files, roots = (data.train, data.images) if training else (data.validation, data.validation_images or data.images)
    if not training and not recipe.validation.samples:
        return []
    each = roots if len(roots) > 1 else (roots or ("",)) * len(files)
    return list(zip(files, each, strict=False))  # as many, see recipe_checks
