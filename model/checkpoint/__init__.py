"""Checkpoints: published and native directories, starting points, stage hand-over, LoRA merging.

``load`` reads either layout, ``save`` writes ours, ``export_published`` the published one; ``assemble`` starts a
network from a LLaMA, a CLIP and a SAM-Med2D, ``upcycle`` starts stage IV from the models of stages II and III.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.checkpoint.assembling import assemble, lay_over, upcycle
    from model.checkpoint.loading import describe, load, load_with_report
    from model.checkpoint.lora import merge_lora, merge_lora_state
    from model.checkpoint.report import LoadReport
    from model.checkpoint.saving import export_published, save, save_adapter

# Imported when first used: looking for a directory needs no torch.
_HOMES = {
    **dict.fromkeys(("assemble", "lay_over", "upcycle"), "assembling"),
    **dict.fromkeys(("describe", "load", "load_with_report"), "loading"),
    **dict.fromkeys(("merge_lora", "merge_lora_state"), "lora"),
    **dict.fromkeys(("export_published", "save", "save_adapter"), "saving"),
    "LoadReport": "report",
}

__all__ = ["LoadReport", "assemble", "describe", "export_published", "lay_over", "load", "load_with_report"]
__all__ += ["merge_lora", "merge_lora_state", "save", "save_adapter", "upcycle"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
