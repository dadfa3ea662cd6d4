"""Load a checkpoint with one call, strictly, without holding its weights twice."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from model.checkpoint.adapters import merge_adapter
from model.checkpoint.building import (
    Attention,
    choose_attention,
    convert,
    empty_network,
    fresh_parts,
    network_shapes,
    take_over,
)
from model.checkpoint.directories import is_adapter
from model.checkpoint.opening import OpenedCheckpoint, open_checkpoint
from model.checkpoint.processors import read_processor
from model.checkpoint.report import LoadReport, compare
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.processor import MedPLIBProcessor

logger = logging.getLogger(__name__)


def load(
    directory: str | Path,
    *,
    vision_tower: str | Path | None = None,
    sam: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    strict: bool = True,
    attention: Attention = "sdpa",
    base: str | Path | None = None,
) -> tuple[MedPLIBForCausalLM, MedPLIBProcessor]:
    """Load a native or published checkpoint directory.

    Args:
        directory: config.json, weights (safetensors or ``.bin``, whatever an index says) and tokenizer; or a LoRA,
            which is merged into its base.
        vision_tower: CLIP directory, for published checkpoints: CLIP's sizes, and its weights if they are not inside.
        sam: SAM-Med2D file, for published checkpoints without SAM weights.
        device: where the weights go.
        dtype: floating type of the weights; the one config.json names when absent.
        strict: refuse any missing, unexpected or mis-shaped tensor. Otherwise parts around the language model that are
            missing start from new values (see ``load_with_report`` for what happened).
        attention: of the decoder: ``sdpa``, ``eager`` or ``flash_attention_2`` (CUDA with flash-attn, the gpu extra).
        base: what a LoRA was trained on, where that is not what its configuration names.

    Returns:
        The network in eval mode, and its processor.

    Raises:
        MedPLIBError: the directory is no checkpoint, or something does not fit; the message lists it.
    """
    model, processor, _ = load_with_report(
        directory,
        vision_tower=vision_tower,
        sam=sam,
        device=device,
        dtype=dtype,
        strict=strict,
        attention=attention,
        base=base,
    )
    return model, processor


def load_with_report(
    directory: str | Path,
    *,
    vision_tower: str | Path | None = None,
    sam: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    strict: bool = True,
    attention: Attention = "sdpa",
    base: str | Path | None = None,
) -> tuple[MedPLIBForCausalLM, MedPLIBProcessor, LoadReport]:
    """The same as ``load``, and what was found (which is logged too)."""
    opened = open_checkpoint(directory, vision_tower=vision_tower, sam=sam, base=base)
    processor = read_processor(opened)
    model = empty_network(opened.config)
    report = check(opened, model)
    if strict:
        report.raise_unless_fits()
    dtype = dtype or opened.dtype or torch.float32
    usable = ((name, value) for name, value in opened.tensors() if name not in report.misshaped)
    state = convert(usable, device, dtype, f"the weights of {opened.directory}")
    notes, lacking = [*report.notes], [*report.missing, *report.misshaped]
    state.update(convert(fresh_parts(opened.config, lacking).items(), device, dtype))
    if lacking:
        notes.append(f"{len(lacking)} tensors start from new values")
    ties = opened.config.text_config.tie_word_embeddings
    finish(model, state, device)
    if ties and not model.config.text_config.tie_word_embeddings:
        notes.append("config.json says tie_word_embeddings, but the stored lm_head is not the embedding; it was kept")
    if is_adapter(directory):
        merge_adapter(model, directory)
        notes.append(f"the LoRA in {directory} is merged")
    report = replace(report, notes=tuple(notes))
    choose_attention(model, attention, device)
    logger.info("%s", report)
    return model, processor, report


def check(opened: OpenedCheckpoint, model: MedPLIBForCausalLM) -> LoadReport:
    """How an opened checkpoint fits a network, by names and shapes alone."""
    return compare(
        str(opened.directory),
        opened.shapes,
        network_shapes(model),
        unexpected=opened.unexpected,
        ignored=opened.ignored,
        notes=opened.notes,
    )


def finish(
    model: MedPLIBForCausalLM, state: Mapping[str, Tensor], device: str | torch.device = "cpu"
) -> MedPLIBForCausalLM:
    """Fill an empty network with a complete state dict and make it ready for use, in eval mode.

    A head that is not the embedding is never tied to it, whatever the configuration says, which is corrected.
    """
    take_over(model, state)
    if model.config.text_config.tie_word_embeddings:
        embedding = model.get_input_embeddings().weight
        if torch.equal(model.lm_head.weight, embedding):
            model.lm_head.weight = embedding
        else:
            model.config.text_config.tie_word_embeddings = model.config.tie_word_embeddings = False
    nn.Module.to(model, device)  # buffers; the weights are there already
    model.config.dtype = model.lm_head.weight.dtype
    model.config.architectures = [type(model).__name__]
    return model.eval()
