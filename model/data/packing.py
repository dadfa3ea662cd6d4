"""Tokens of records, counted without reading a pixel, and several records about one image as one conversation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from model.data.schema import Finding, Sample
from model.errors import MedPLIBError
from model.modeling.configuration import IMAGE_PLACEHOLDER
from model.processing.conversation import Turn, get_template, render
from model.processing.encoding import tokenize_conversation, truncate
from model.processing.processor import MedPLIBProcessor
from model.processing.special_tokens import IMAGE_START_TOKEN, IMAGE_TOKEN, REGION_MARKER
from model.processing.tokens import TokenCounter


class LengthCheck:
    """Tokens of records, counted as ``MedPLIBProcessor.encode`` makes them, and those that it would refuse or cut.

    Args:
        tokenizer, template, max_length: of the processor that will encode them; without a tokenizer none is
            counted.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast | None, template: str, max_length: int | None) -> None:
        self._tokenizer, self._template, self._max_length = tokenizer, template, max_length
        self._count = TokenCounter(tokenizer) if tokenizer is not None else lambda _: 0

    @classmethod
    def of(cls, processor: MedPLIBProcessor) -> LengthCheck:
        """The one that fits a processor."""
        return cls(processor.tokenizer, processor.settings.template, processor.settings.max_length)

    @property
    def shared(self) -> int:
        """Tokens at least that every record counts and a conversation of several has once: the template's opening."""
        return max(self._count(get_template(self._template).system) - 1, 0)  # its last piece may join what follows

    def __call__(self, sample: Sample) -> tuple[int, list[Finding]]:
        """Tokens of a record that training sees, an image counting as one; and what keeps it from being encoded whole:
        ``too_long`` (an error), ``answer_cut`` (a warning), ``region_not_asked`` (the template writes no questions)."""
        if sample.regions and not get_template(self._template).chat:
            message = f"it asks about regions, but the template {self._template} writes no questions"
            return 0, [Finding("region_not_asked", message)]
        tokens, longest = self._count(render(sample.turns, self._template)), self._max_length
        if self._tokenizer is None or longest is None or tokens <= longest:
            return tokens, []
        try:
            truncate(self._tokenizer, *tokenize_conversation(self._tokenizer, sample.turns, self._template), longest)
        except MedPLIBError as error:
            return tokens, [Finding("too_long", str(error))]
        message = f"the conversation has {tokens} tokens; its last answer is cut off after the first {longest}"
        return longest, [Finding("answer_cut", message, "warning")]


def real_tokens(batch: Mapping[str, Any], visual_tokens: int) -> tuple[int, int]:
    """Tokens of a collated batch in the decoder, images grown: real ones, and all of them with padding."""
    real = batch["attention_mask"].bool()
    images = ((batch["input_ids"] == IMAGE_PLACEHOLDER) & real).sum(dim=1)
    lengths = real.sum(dim=1) + images * (visual_tokens - 1)  # long [B]
    return int(lengths.sum()), int(lengths.max()) * len(lengths)


class Packing:
    """Draws further records for the conversation that a record opens.

    Args:
        pictures: uint64 [N], a number for the images of each record, 0 for a text alone (``RecordFacts.picture``).
        tokens: int64 [N], tokens of each record; 0 where they are not counted, and then no limit is kept.
        weights: float [N], relative chance of each record to be a further one; None for equal chances.
        turns: most questions of a conversation, unless one record has more.
        max_length: most tokens of a conversation; None for no limit.
        shared: tokens that each record counts and a conversation has once.
    """

    def __init__(
        self,
        pictures: np.ndarray,
        tokens: np.ndarray,
        weights: np.ndarray | None,
        turns: int,
        max_length: int | None,
        shared: int,
    ) -> None:
        self.pictures, self.tokens, self.weights = pictures, tokens, weights
        self.turns, self.max_length, self.shared = turns, max_length, shared
        self._by_picture = np.argsort(pictures, kind="stable")
        self._sorted = pictures[self._by_picture]

    def draw(self, index: int, sample_of: Callable[[int], Sample], rng: np.random.Generator) -> list[Sample]:
        """Record ``index`` and none to ``turns`` − 1 others of its pictures, in random order.

        No question comes twice, and the conversation fits ``max_length``, with fewer turns where it has to.

        Args:
            sample_of: gives the sample of a record's number.
            rng: all randomness comes from it.
        """
        chosen = [sample_of(index)]
        left = int(rng.integers(1, self.turns + 1)) - len(chosen[0].turns) // 2
        if left < 1 or not self.pictures[index] or not _joins(chosen[0]):
            return chosen
        room = np.inf if self.max_length is None else self.max_length - int(self.tokens[index])
        asked = set(_questions(chosen[0]))
        first, last = (np.searchsorted(self._sorted, self.pictures[index], side) for side in ("left", "right"))
        others = self._by_picture[first:last]
        weights = np.ones(len(others)) if self.weights is None else self.weights[others]
        others, weights = others[(weights > 0) & (others != index)], weights[(weights > 0) & (others != index)]
        # Draws without putting back: the likelier ones mostly first, those of no weight never.
        for other in others[np.argsort(rng.exponential(size=len(others)) / weights)]:
            more = int(self.tokens[other]) - self.shared
            if more > room:
                continue
            sample = sample_of(other)
            questions = set(_questions(sample))
            if len(sample.turns) // 2 <= left and _joins(sample) and not questions & asked:
                chosen.append(sample)
                asked |= questions
                left, room = left - len(sample.turns) // 2, room - more
            if left < 1:
                break
        return [chosen[place] for place in rng.permutation(len(chosen))]


def joined(parts: Sequence[Sample]) -> Sample:
    """Samples of the same pictures as one: their turns follow each other, and the first shows the pictures."""
    if len(parts) == 1:
        return parts[0]
    turns = list(parts[0].turns)
    for part in parts[1:]:
        turns += [Turn("human", part.turns[0].text.replace(IMAGE_TOKEN, "").strip()), *part.turns[1:]]
    return replace(
        parts[0],
        id="+".join(part.id for part in parts),
        turns=tuple(turns),
        regions=tuple(path for part in parts for path in part.regions),
        region_images=tuple(image for part in parts for image in part.region_images),
        masks=tuple(path for part in parts for path in part.masks),
    )


def _joins(sample: Sample) -> bool:
    """Whether the pictures of a record stand before its first question, where an earlier turn can show them instead."""
    first = sample.turns[0].text
    pictures = first.count(IMAGE_TOKEN)
    before = first.replace(IMAGE_TOKEN, " ").strip()
    leading = pictures == 1 or first.rstrip().endswith(before)
    return bool(before) and leading and pictures == len(sample.images) and IMAGE_START_TOKEN not in first


def _questions(sample: Sample) -> Iterator[tuple[str, ...]]:
    seen = 0
    for turn in sample.turns[::2]:
        count = turn.text.count(REGION_MARKER)
        words = " ".join(turn.text.replace(IMAGE_TOKEN, " ").lower().split())
        yield (words, *(str(path) for path in sample.regions[seen : seen + count]))
        seen += count
