"""What a recipe's data files, where they are here, tell about a run's length."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.data.records import open_records
from model.data.schema import canonical
from model.errors import MedPLIBError
from model.modeling.configuration import MedPLIBConfig
from model.processing.tokens import TokenCounter, build_tokenizer
from model.train.recipe import Recipe
from model.train.starting import merged_of

_LOOKED_AT = 2000
_LETTERS_PER_TOKEN = 4.0
_TEMPLATE_TOKENS = 45
"""What the system text and the marks of a turn add, about."""


@dataclass(frozen=True)
class DataSummary:
    """The records of a recipe.

    Attributes:
        records: of all train files.
        tokens: text tokens of a record on average, the image counting as one.
        longest: most of those that were looked at.
        visual_tokens: places that an image takes in the decoder.
        counted: whether they were counted by the model's tokenizer, not guessed from letters.
    """

    records: int
    tokens: float
    longest: int
    visual_tokens: int
    counted: bool

    def steps_per_epoch(self, recipe: Recipe, ranks: int) -> float:
        """Optimiser steps of one pass over the records, whose last batch is filled up; a step may belong to two."""
        schedule = recipe.schedule
        return math.ceil(self.records / (schedule.batch_size * ranks)) / schedule.accumulation

    def steps(self, recipe: Recipe, ranks: int) -> int:
        """Of the whole run."""
        every = math.ceil(recipe.schedule.epochs * self.steps_per_epoch(recipe, ranks))
        return min(recipe.schedule.max_steps or every, every)

    @property
    def length(self) -> float:
        """Places of a record in the decoder, on average."""
        return self.tokens + self.visual_tokens - 1


def summarise_data(recipe: Recipe, config: MedPLIBConfig) -> DataSummary | None:
    """Count records and look at some of them; None where a file is not here or cannot be read."""
    paths = [Path(path) for path in recipe.data.train]
    if not paths or not all(path.is_file() for path in paths):
        return None
    counter = _counter(recipe)
    lengths: list[int] = []
    total = 0
    try:
        for path in paths:
            records = open_records(path)
            total += len(records)
            chosen = np.linspace(0, len(records) - 1, min(len(records), _LOOKED_AT // len(paths))).astype(int)
            lengths += [_length(records[int(place)], counter) for place in chosen]
    except MedPLIBError:
        return None
    limited = np.minimum(lengths or [0], recipe.data.max_length)
    visual = config.vision_grid**2
    return DataSummary(total, float(limited.mean()), int(limited.max()), visual, counter is not None)


def _counter(recipe: Recipe) -> TokenCounter | None:
    try:
        return TokenCounter(build_tokenizer(merged_of(recipe.model.base)))
    except MedPLIBError:
        return None


def _length(record: Any, counter: TokenCounter | None) -> int:
    turns = canonical(record).get("conversations")
    texts = [str(turn.get("value", "")) for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    text = "\n".join(texts)
    tokens = counter(text) if counter is not None else math.ceil(len(text) / _LETTERS_PER_TOKEN)
    return tokens + _TEMPLATE_TOKENS
