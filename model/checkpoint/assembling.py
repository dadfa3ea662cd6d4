"""Put a network together from its starting points: LLaMA or LLaVA, CLIP, SAM-Med2D, projector (reference §6)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint.building import convert, empty_network, fresh_parts, is_finite, network_shapes, refuse_faulty
from model.checkpoint.directories import resolve
from model.checkpoint.loading import finish
from model.checkpoint.processors import new_processor
from model.checkpoint.report import LoadReport, compare
from model.checkpoint.starting_points import (
    CLIP_PREFIX,
    SAM_PREFIX,
    read_clip_config,
    read_clip_tensors,
    read_language_model,
    read_projector,
    read_sam,
)
from model.errors import MedPLIBError
from model.modeling.configuration import MedPLIBConfig
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.processor import MedPLIBProcessor
from model.processing.special_tokens import SEG_TOKEN
from model.processing.tokens import build_tokenizer

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
    language = read_language_model(directory)
    tokenizer = build_tokenizer(directory)
    state, values = dict(language.state), dict(sections or {})
    for name in _VOCABULARY:
        state[name] = resize_vocabulary(state[name], len(tokenizer))
    language.config.vocab_size = len(tokenizer)
    values |= {"text_config": language.config, "seg_token_id": tokenizer.get_added_vocab()[SEG_TOKEN]}
    if language.projector:
        values["projector"] = {"type": language.projector}
    _add_vision_tower(vision_tower, values, state)
    _add_sam(sam, values, state)
    if projector is not None:
        kind, tensors = read_projector(Path(projector))
        values["projector"] = {"type": kind}
        state = {name: value for name, value in state.items() if not name.startswith("model.projector.")} | tensors
    try:
        config = MedPLIBConfig(**values)
    except (TypeError, ValueError) as error:
        raise MedPLIBError(f"the model's sizes are wrong: {error}") from error
    model, report = _fill(config, state, str(directory), language.notes, device, dtype)
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


def _add_vision_tower(directory: str | Path | None, values: dict[str, Any], state: dict[str, Tensor]) -> None:
    if directory is None:
        return
    values["vision_config"] = read_clip_config(Path(directory))
    state.update({CLIP_PREFIX + name: value for name, value in read_clip_tensors(Path(directory))})


def _add_sam(path: str | Path | None, values: dict[str, Any], state: dict[str, Tensor]) -> None:
    if path is None:
        return
    sizes, adapter, tensors = read_sam(Path(path))
    values["sam_config"] = sizes
    told = {name: getattr(adapter, name) for name in ("adapter", "adapter_mlp_ratio")}
    mask = values.get("mask") or {}
    values["mask"] = (dict(mask) if isinstance(mask, Mapping) else asdict(mask)) | told
    state.update({SAM_PREFIX + name: value for name, value in tensors.items()})


def _fill(
    config: MedPLIBConfig,
    state: dict[str, Tensor],
    source: str,
    notes: tuple[str, ...],
    device: str | torch.device,
    dtype: torch.dtype,
) -> tuple[MedPLIBForCausalLM, LoadReport]:
    model = empty_network(config)
    found = {name: tuple(value.shape) for name, value in state.items()}
    report = compare(source, found, network_shapes(model), notes=notes)
    parts = {name.split(".")[1] for name in report.missing if not name.startswith(_LANGUAGE_MODEL)}
    half = parts & {name.split(".")[1] for name in state}
    lost = tuple(name for name in report.missing if name.startswith(_LANGUAGE_MODEL) or name.split(".")[1] in half)
    replace(report, missing=lost).raise_unless_fits()  # a part is taken over whole or starts anew as a whole
    state |= fresh_parts(config, report.missing)
    return finish(model, convert(state.items(), device, dtype), device), report
