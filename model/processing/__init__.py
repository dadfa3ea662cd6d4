"""Text and pixels ↔ tensors, used unchanged by training, evaluation, serving and the command line."""

from __future__ import annotations

from model.processing.batching import EncodedSample, collate
from model.processing.conversation import Turn
from model.processing.processor import MedPLIBProcessor, ProcessorSettings
from model.processing.tokens import build_tokenizer, train_tokenizer

__all__ = [
    "EncodedSample",
    "MedPLIBProcessor",
    "ProcessorSettings",
    "Turn",
    "build_tokenizer",
    "collate",
    "train_tokenizer",
]
