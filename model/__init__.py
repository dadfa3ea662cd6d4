"""MedPLIB: ask a biomedical multimodal model about an image, a region of it, or for a mask.

>>> from model import Predictor
>>> predictor = Predictor.from_pretrained("assets/medplib-mini")
>>> answer = predictor.ask("scan.png", "Please segment the liver.")
>>> answer.text, answer.masks[0].to_array()

Importing ``MedPLIBForCausalLM`` makes transformers' ``AutoModelForCausalLM`` and ``AutoConfig`` know the model.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# Imported when first used, so that `medplib --help` does not wait for torch.
_HOMES = {
    "Predictor": "model.inference.predictor",
    "Answer": "model.inference.answer",
    "Mask": "model.inference.answer",
    "MedPLIBForCausalLM": "model.modeling.medplib",
    "MedPLIBConfig": "model.modeling.configuration",
    "MedPLIBProcessor": "model.processing.processor",
    "MedPLIBError": "model.errors",
    "load": "model.checkpoint",
}

__all__ = ["__version__", *_HOMES]


def shipped(name: str) -> Path:
    """A file that ships with the package, such as ``assets/medplib-mini``: inside it, or beside it in a checkout."""
    inside = Path(__file__).parent / "shipped" / name
    return inside if inside.exists() else Path(__file__).parents[1] / name


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'model' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)
