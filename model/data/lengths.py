"""How long records are, known without reading a pixel; and how much of a batch is padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerFast

from model.data.schema import Finding, Sample
from model.errors import MedPLIBError
from model.modeling.configuration import IMAGE_PLACEHOLDER
from model.processing.conversation import get_template, render
from model.processing.encoding import tokenize_conversation, truncate
from model.processing.processor import MedPLIBProcessor
from model.processing.tokens import TokenCounter


class LengthCheck:
    """Tokens of records, counted as ``MedPLIBProcessor.encode`` makes them, and those that it would refuse or cut.

    Args:
        tokenizer, template, max_length: of the processor that will encode them; without a tokenizer none is counted.
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
        ``too_long`` (an error), ``answer_cut`` (a warning), ``region_not_asked`` (the template writes no questions).
        """
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
