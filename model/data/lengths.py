"""How long records are as the decoder sees them, known without reading a pixel; and how much of a batch is padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from model.modeling.configuration import IMAGE_PLACEHOLDER
from model.processing.conversation import Turn, render
from model.processing.processor import MedPLIBProcessor
from model.processing.tokens import TokenCounter


def sequence_length(processor: MedPLIBProcessor, visual_tokens: int) -> Callable[[Sequence[Turn]], int]:
    """What tells the length of a conversation in the decoder: exactly that of the encoded sample, images grown.

    Args:
        processor: encodes the conversations.
        visual_tokens: places that an image takes, see ``MedPLIBConfig.visual_tokens``.
    """
    count, settings = TokenCounter(processor.tokenizer), processor.settings

    def length(turns: Sequence[Turn]) -> int:
        tokens, images = count(render(turns, settings.template))
        return min(tokens, settings.max_length or tokens) + images * (visual_tokens - 1)

    return length


def row_lengths(batch: Mapping[str, Any], visual_tokens: int) -> torch.Tensor:
    """Tokens of each row of a collated batch in the decoder, images grown, padding not counted: long [B]."""
    real = batch["attention_mask"].bool()
    images = ((batch["input_ids"] == IMAGE_PLACEHOLDER) & real).sum(dim=1)
    lengths: torch.Tensor = real.sum(dim=1) + images * (visual_tokens - 1)
    return lengths


def real_tokens(batch: Mapping[str, Any], visual_tokens: int) -> tuple[int, int]:
    """Tokens of a collated batch in the decoder, images grown: real ones, and all of them with padding."""
    lengths = row_lengths(batch, visual_tokens)
    return int(lengths.sum()), int(lengths.max()) * len(lengths)
