"""The start of stage IV: a mixture whose experts are the models of stages II and III (reference §5)."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from model.checkpoint.building import convert, empty_network, network_shapes
from model.checkpoint.loading import finish
from model.checkpoint.opening import OpenedCheckpoint, open_checkpoint
from model.checkpoint.processors import read_processor
from model.checkpoint.report import compare
from model.errors import MedPLIBError
from model.modeling.configuration import MedPLIBConfig, MoEConfig, ProjectorConfig
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.processor import MedPLIBProcessor

GROUNDING, VQA = 0, 1
"""Which expert comes from which model; further experts alternate between the two."""
_FFN = re.compile(r"(model\.decoder\.layers\.(\d+)\.mlp)\.((?:gate|up|down)_proj\.weight)")
_PROJECTOR = re.compile(r"model\.projector\.layers\.(.+)")
_FROM_GROUNDING = ("model.mask_head.", "model.sam.mask_decoder.")


def upcycle(
    stage2: str | Path,
    stage3: str | Path,
    *,
    moe: MoEConfig,
    projector: ProjectorConfig | None = None,
    vision_tower: str | Path | None = None,
    sam: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> tuple[MedPLIBForCausalLM, MedPLIBProcessor]:
    """Build the stage IV network from two dense checkpoints.

    Experts 0, 2, … start as the FFN of the grounding model, experts 1, 3, … (and a residual expert) as that of the VQA
    model; mask decoder and mask head come from the grounding model, everything else from the VQA model. Routers are
    drawn anew from torch's generator.

    Args:
        stage2: the VQA model.
        stage3: the grounding model.
        moe: the mixture to build.
        projector: with a ``moe_…`` type, every projector expert starts as the VQA model's projector.
        vision_tower, sam, device, dtype: as for ``load``.

    Raises:
        MedPLIBError: one of the two is a mixture already, or their sizes differ.
    """
    vqa = open_checkpoint(stage2, vision_tower=vision_tower, sam=sam)
    grounding = open_checkpoint(stage3, vision_tower=vision_tower, sam=sam)
    _check_pair(vqa, grounding, moe)
    config = copy.deepcopy(vqa.config)
    config.moe = moe
    config.projector = projector or config.projector
    dtype = dtype or vqa.dtype or torch.float32
    state = convert(_expert_tensors(grounding, vqa, moe), device, dtype)
    state |= convert(_other_tensors(grounding, vqa, config), device, dtype)
    state |= convert(_new_tensors(vqa, config), device, dtype)
    model = empty_network(config)
    found = {name: tuple(value.shape) for name, value in state.items()}
    compare(str(stage2), found, network_shapes(model)).raise_unless_fits()
    return finish(model, state, device), read_processor(vqa)


def _check_pair(vqa: OpenedCheckpoint, grounding: OpenedCheckpoint, moe: MoEConfig) -> None:
    for opened in (vqa, grounding):
        if opened.config.moe.enabled:
            raise MedPLIBError(f"{opened.directory} is a mixture already; stage IV starts from two dense checkpoints")
    depth = vqa.config.text_config.num_hidden_layers
    if moe.layers and max(moe.layers) >= depth:
        raise MedPLIBError(f"the mixture names layer {max(moe.layers)}, but the model has layers 0 to {depth - 1}")
    for name, shape in vqa.shapes.items():
        if (_FFN.fullmatch(name) or name.startswith(_FROM_GROUNDING)) and grounding.shapes.get(name) != shape:
            raise MedPLIBError(
                f"{name} is {list(shape)} in {vqa.directory} but {list(grounding.shapes.get(name, ()))} in "
                f"{grounding.directory}; give two stages of one model"
            )


def _expert_tensors(grounding: OpenedCheckpoint, vqa: OpenedCheckpoint, moe: MoEConfig) -> Iterator[tuple[str, Tensor]]:
    """FFNs of both models as experts; every expert has memory of its own."""
    for parity, opened in ((GROUNDING, grounding), (VQA, vqa)):
        for name, value in opened.tensors():
            match = _FFN.fullmatch(name)
            if match is None or int(match[2]) not in moe.layers:
                continue
            for expert in range(parity, moe.experts_in(int(match[2])), 2):
                yield f"{match[1]}.experts.{expert}.{match[3]}", value.clone()
            if moe.use_residual and parity == VQA:
                yield f"{match[1]}.residual_expert.{match[3]}", value.clone()


def _other_tensors(
    grounding: OpenedCheckpoint, vqa: OpenedCheckpoint, config: MedPLIBConfig
) -> Iterator[tuple[str, Tensor]]:
    for name, value in grounding.tensors():
        if name.startswith(_FROM_GROUNDING):
            yield name, value
    moe_projector = _projector_becomes_mixture(vqa, config)
    for name, value in vqa.tensors():
        ffn, layer = _FFN.fullmatch(name), _PROJECTOR.fullmatch(name)
        if name.startswith(_FROM_GROUNDING) or (ffn and int(ffn[2]) in config.moe.layers):
            continue
        if layer and moe_projector:
            for expert in range(config.projector.num_experts):
                yield f"model.projector.experts.{expert}.{layer[1]}", value.clone()
        else:
            yield name, value


def _projector_becomes_mixture(vqa: OpenedCheckpoint, config: MedPLIBConfig) -> bool:
    return config.projector.type.startswith("moe_") and not vqa.config.projector.type.startswith("moe_")


def _new_tensors(vqa: OpenedCheckpoint, config: MedPLIBConfig) -> Iterable[tuple[str, Tensor]]:
    """Routers, and the residual expert's weighing, as DeepSpeed's layer starts them (torch's own default)."""
    width = config.text_config.hidden_size
    for layer in config.moe.layers:
        stem = f"model.decoder.layers.{layer}.mlp"
        yield f"{stem}.router.weight", nn.Linear(width, config.moe.experts_in(layer), bias=False).weight.detach()
        if config.moe.use_residual:
            coefficient = nn.Linear(width, 2)
            yield f"{stem}.residual_coefficient.weight", coefficient.weight.detach()
            yield f"{stem}.residual_coefficient.bias", coefficient.bias.detach()
    if _projector_becomes_mixture(vqa, config):
        router = nn.Linear(config.vision_config.hidden_size, config.projector.num_experts, bias=False)
        yield "model.projector.router.weight", router.weight.detach()
