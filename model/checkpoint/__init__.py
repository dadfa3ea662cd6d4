"""Checkpoints: published and native directories, starting points, stage hand-over, LoRA merging.

``load`` reads either layout, ``save`` writes ours, ``export_published`` the published one; ``assemble`` starts a
network from a LLaMA, a CLIP and a SAM-Med2D, ``upcycle`` starts stage IV from the models of stages II and III.
"""

from model.checkpoint.assembling import assemble, lay_over
from model.checkpoint.describing import describe
from model.checkpoint.loading import load, load_with_report
from model.checkpoint.lora import merge_lora, merge_lora_state
from model.checkpoint.report import LoadReport
from model.checkpoint.saving import export_published, save
from model.checkpoint.upcycling import upcycle

__all__ = [
    "LoadReport",
    "assemble",
    "describe",
    "export_published",
    "lay_over",
    "load",
    "load_with_report",
    "merge_lora",
    "merge_lora_state",
    "save",
    "upcycle",
]
