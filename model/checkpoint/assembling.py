"""Put networks together: dense ones from LLaMA or LLaVA, CLIP, SAM-Med2D and a projector (reference §6), and stage IV's
mixture from the models of stages II and III (reference §5).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.checkpoint.directories import resolve
from model.checkpoint.loading import (
    convert,
    finish,
    fresh_parts,
    init_empty,
    network_shapes,
    new_processor,
    read_processor,
)
from model.checkpoint.pretrained import (
    CLIP_PREFIX,
    SAM_PREFIX,
    OpenedCheckpoint,
    open_checkpoint,
    read_clip_config,
    read_clip_tensors,
    read_language_model,
    read_projector,
    read_sam,
)
from model.checkpoint.report import LoadReport, compare, is_finite, refuse_faulty
from model.errors import MedPLIBError
from model.modeling.configuration import MedPLIBConfig, MoEConfig, ProjectorConfig
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.processor import MedPLIBProcessor
from model.processing.special_tokens import SEG_TOKEN
from model.processing.tokens import build_tokenizer

GROUNDING, VQA = 0, 1
"""Which expert comes from which model; further experts alternate between the two."""
_FFN = re.compile(r"(model\.decoder\.layers\.(\d+)\.mlp)\.((?:gate|up|down)_proj\.weight)")
_PROJECTOR = re.compile(r"model\.projector\.layers\.(.+)")
_FROM_GROUNDING = ("model.mask_head.", "model.sam.mask_decoder.")
_LANGUAGE_MODEL = ("model.decoder.", "lm_head.")
_VOCABULARY = ("model.decoder.embed_tokens.weight", "lm_head.weight")


def assemble(
    language_model: str | Path,
    *,
    vision_tower: str | Path | None = None,
    sam: str | Path | None = None,
    projector: str | Path | None = None,
    sections: Mapping[str, Any] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[MedPLIBForCausalLM, MedPLIBProcessor, LoadReport]:
    """Build a dense MedPLIB from its starting points; what no file holds starts from new values (torch's generator).

    The vocabulary grows by MedPLIB's own tokens, whose rows start at the mean of the old ones, as LLaVA does.

    Args:
        language_model: LLaMA, Vicuna or LLaVA directory with its tokenizer.
        vision_tower: CLIP directory; without one, a new tower of ``sections["vision_config"]``.
        sam: SAM-Med2D file of any size; without one, a new one of ``sections["sam_config"]``.
        projector: ``mm_projector.bin``; without one LLaVA's own, else a new one of ``sections["projector"]``.
        sections: further ``MedPLIBConfig`` arguments; sizes that a file tells override theirs.
        device: where the weights go.
        dtype: floating type of the weights.

    Returns:
        The network, its processor, and a report whose ``missing`` lists the tensors that are new.

    Raises:
        MedPLIBError: a file is not what it should be, or two parts do not fit each other.
    """
    directory = resolve(language_model)
    text_config, state, projector_type, notes = read_language_model(directory)
    tokenizer = build_tokenizer(directory)
    values = dict(sections or {})
    for name in _VOCABULARY:
        state[name] = resize_vocabulary(state[name], len(tokenizer))
    text_config.vocab_size = len(tokenizer)
    values |= {"text_config": text_config, "seg_token_id": tokenizer.get_added_vocab()[SEG_TOKEN]}
    if projector_type:
        values["projector"] = {"type": projector_type}
    if vision_tower is not None:
        values["vision_config"] = read_clip_config(Path(vision_tower))
        state |= {CLIP_PREFIX + name: value for name, value in read_clip_tensors(Path(vision_tower))}
    if sam is not None:
        values["sam_config"], adapter, tensors = read_sam(Path(sam))
        mask = values.get("mask") or {}
        values["mask"] = dict(mask) if isinstance(mask, Mapping) else asdict(mask)
        values["mask"] |= {name: getattr(adapter, name) for name in ("adapter", "adapter_mlp_ratio")}
        state |= {SAM_PREFIX + name: value for name, value in tensors.items()}
    if projector is not None:
        kind, tensors = read_projector(Path(projector))
        values["projector"] = {"type": kind}
        state = {name: value for name, value in state.items() if not name.startswith("model.projector.")} | tensors
    try:
        config = MedPLIBConfig(**values)
    except (TypeError, ValueError) as error:
        raise MedPLIBError(f"the model's sizes are wrong: {error}") from error
    model = init_empty(config)
    found = {name: tuple(value.shape) for name, value in state.items()}
    report = compare(str(directory), found, network_shapes(model), notes=notes)
    parts = {name.split(".")[1] for name in report.missing if not name.startswith(_LANGUAGE_MODEL)}
    half = parts & {name.split(".")[1] for name in state}
    lost = tuple(name for name in report.missing if name.startswith(_LANGUAGE_MODEL) or name.split(".")[1] in half)
    replace(report, missing=lost).raise_unless_fits()  # a part is taken over whole or starts anew as a whole
    state |= fresh_parts(config, report.missing)
    model = finish(model, convert(state.items(), device, dtype), device)
    return model, new_processor(tokenizer, config, directory), report


def resize_vocabulary(weight: Tensor, rows: int) -> Tensor:
    """Rows [V, D] → [``rows``, D]: new ones are the mean of the old, surplus ones (beyond the tokenizer) go."""
    if rows <= len(weight):
        return weight[:rows].clone()
    mean = weight.float().mean(dim=0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(rows - len(weight), -1)])


def lay_over(model: MedPLIBForCausalLM, *, projector: str | Path | None = None, sam: str | Path | None = None) -> None:
    """Replace a network's projector or SAM by a file's, in place; device and type stay the network's.

    Raises:
        MedPLIBError: the file's sizes are not the network's.
    """
    if projector is not None:
        _copy(model, read_projector(Path(projector))[1], "model.projector.", Path(projector))
    if sam is not None:
        tensors = {SAM_PREFIX + name: value for name, value in read_sam(Path(sam))[2].items()}
        _copy(model, tensors, SAM_PREFIX, Path(sam))


def _copy(model: MedPLIBForCausalLM, tensors: Mapping[str, Tensor], prefix: str, path: Path) -> None:
    own = {name: value for name, value in model.state_dict().items() if name.startswith(prefix)}
    compare(
        str(path),
        {name: tuple(value.shape) for name, value in tensors.items()},
        {name: tuple(value.shape) for name, value in own.items()},
    ).raise_unless_fits()
    refuse_faulty([name for name, value in tensors.items() if not is_finite(value)], str(path))
    with torch.no_grad():
        for name, value in tensors.items():
            own[name].copy_(value)


# --- stage IV ---------------------------------------------------------------------------------------------------------


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
    model = init_empty(config)
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
