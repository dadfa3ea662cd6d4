"""Text and pixels ↔ tensors, used unchanged by training, evaluation, serving and the command line."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Imported when first used: who only words prompts, a server say, does not wait for torch.
_HOMES = {
    "EncodedSample": "model.processing.batching",
    "MedPLIBProcessor": "model.processing.processor",
    "ProcessorSettings": "model.processing.processor",
    "Turn": "model.processing.conversation",
    "build_tokenizer": "model.processing.tokens",
    "collate": "model.processing.batching",
    "train_tokenizer": "model.processing.tokens",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'model.processing' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
