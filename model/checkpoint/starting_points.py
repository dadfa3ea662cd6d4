"""Weights that MedPLIB starts from, in the formats they are published in: LLaMA, CLIP, SAM-Med2D, a LLaVA projector.

Each reader gives sizes and tensors under our names, without a prefix of the network around them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, SamConfig

from model.checkpoint.directories import read_settings, resolve
from model.checkpoint.names import is_empty_buffer, native_to_published, published_to_native
from model.checkpoint.published_config import clip_config_from_shapes, projector_type, text_config
from model.checkpoint.report import understanding
from model.checkpoint.sam_names import sam_config_from_state_dict, state_to_native
from model.checkpoint.shards import find_weights, read_tensors
from model.errors import MedPLIBError
from model.modeling.configuration import MaskConfig

CLIP_PREFIX = "model.vision_tower.clip."
SAM_PREFIX = "model.sam."
PROJECTOR_PREFIX = "model.projector."


@dataclass(frozen=True)
class LanguageModel:
    """A LLaMA, and the projector where the directory is a LLaVA's.

    Attributes:
        config: its sizes; the vocabulary as stored.
        state: decoder, ``lm_head`` and projector tensors under our full names.
        projector: ``mm_projector_type`` of the tensors, None without a projector.
        settings: its config.json.
        notes: contradictions found.
    """

    config: LlamaConfig
    state: dict[str, Tensor]
    projector: str | None
    settings: Mapping[str, Any]
    notes: tuple[str, ...]


def read_clip_config(directory: Path) -> CLIPVisionConfig:
    """CLIP's vision sizes from a directory of the whole CLIP or of its vision half.

    Raises:
        MedPLIBError: the directory is not CLIP's.
    """
    directory = resolve(directory)
    settings = read_settings(directory)
    vision = settings.get("vision_config", settings)
    if not isinstance(vision, dict) or "patch_size" not in vision:
        raise MedPLIBError(f"{directory / 'config.json'} is not CLIP's (no patch_size); give a CLIP directory")
    with understanding(str(directory / "config.json"), "fetch it again"):
        return CLIPVisionConfig(
            **{key: value for key, value in vision.items() if key not in ("model_type", "torch_dtype")}
        )


def read_clip_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """CLIP's vision tensors under the names of ``CLIPVisionModel`` (no ``vision_model.`` before them)."""
    for name, value in find_weights(resolve(directory)).tensors():
        inner = name.removeprefix("vision_model.")
        if not inner.startswith(("text_", "logit_scale", "visual_projection")) and not is_empty_buffer(inner):
            yield inner, value


def read_sam(path: Path) -> tuple[SamConfig, MaskConfig, dict[str, Tensor]]:
    """SAM or SAM-Med2D of any size: ``{"model": state_dict}``, a bare state dict, or safetensors.

    Returns:
        Sizes, the adapter's settings, and tensors under the names of ``SamMed2D``.

    Raises:
        MedPLIBError: the file is not SAM's.
    """
    state = dict(read_tensors(path))
    with understanding(str(path), "give a SAM or SAM-Med2D file"):
        sizes, mask = sam_config_from_state_dict(state)
    return sizes, mask, state_to_native(state)


def read_projector(path: Path) -> tuple[str, dict[str, Tensor]]:
    """A dense projector: LLaVA's ``mm_projector.bin``, or that of a whole checkpoint directory (our stage I's result).

    Returns:
        ``mm_projector_type`` of the tensors, and tensors under our full names.

    Raises:
        MedPLIBError: there is no dense projector, or a file holds something else too.
    """
    whole = path.is_dir()
    projector, others = {}, []
    for name, value in find_weights(path).tensors() if whole else read_tensors(path):
        native = name if name.startswith(PROJECTOR_PREFIX) else published_to_native(name)
        if native and native.startswith(f"{PROJECTOR_PREFIX}layers."):
            projector[native] = value
        else:
            others.append(name)
    if not projector or (others and not whole):
        raise MedPLIBError(f"{path} is no projector: expected model.mm_projector.* in it, got {others[:3]}")
    published = {native_to_published(name): tuple(value.shape) for name, value in projector.items()}
    return projector_type({}, {name: shape for name, shape in published.items() if name}), projector


def read_language_model(directory: Path) -> LanguageModel:
    """A LLaMA, Vicuna or LLaVA directory.

    Raises:
        MedPLIBError: it is not one, or holds tensors that belong to none of them.
    """
    settings = read_settings(directory)
    notes: list[str] = []
    weights = find_weights(directory)
    stored = {name: value for name, value in weights.tensors() if not is_empty_buffer(name)}
    shapes = {name: tuple(value.shape) for name, value in stored.items()}
    with understanding(str(directory / "config.json"), "fetch it again"):
        config = text_config(settings, shapes, notes)
    state: dict[str, Tensor] = {}
    strangers = []
    for name, value in stored.items():
        native = published_to_native(name)
        if native is None or not native.startswith(("lm_head.", "model.decoder.", PROJECTOR_PREFIX, CLIP_PREFIX)):
            strangers.append(name)
        else:
            state[native] = value
    if strangers or "model.decoder.embed_tokens.weight" not in state:
        what = f"{strangers[0]} in it" if strangers else "no model.embed_tokens.weight in it"
        raise MedPLIBError(f"{directory} is no LLaMA or LLaVA directory: {what}; give one, or load it as a checkpoint")
    state.setdefault("lm_head.weight", state["model.decoder.embed_tokens.weight"])  # tied
    has_projector = any(name.startswith(PROJECTOR_PREFIX) for name in state)
    kind = projector_type(settings, shapes) if has_projector else None
    return LanguageModel(config, state, kind, settings, (*weights.notes, *notes))


def find_vision_tower(named: str | None, directory: Path) -> Path | None:
    """The CLIP directory that a config.json names, if it is here: as named, beside the checkpoint, in the working
    directory or in the Hugging Face cache. Often it is a path of the authors' machine, so its last part is tried too.
    """
    if not named:
        return None
    places = [directory, directory.parent, Path.cwd()]
    candidates = [Path(named), *(place / name for name in (named, Path(named).name) for place in places)]
    return next((path for path in map(resolve, candidates) if path != directory and _holds_config(path)), None)


def _holds_config(directory: Path) -> bool:
    """Whether config.json is there; a folder that may not be entered (the authors' home) holds none for us."""
    try:
        return (directory / "config.json").is_file()
    except (OSError, ValueError):
        return False


def clip_difference(config: CLIPVisionConfig, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """How a CLIP directory's sizes differ from a published checkpoint's own CLIP tensors; None if they do not."""
    if not any(name.startswith("model.vision_tower.") for name in shapes):
        return None
    stored = clip_config_from_shapes(shapes)
    for name in ("hidden_size", "num_hidden_layers", "image_size", "patch_size", "intermediate_size"):
        if getattr(stored, name) != getattr(config, name):
            return f"its {name} is {getattr(config, name)}, that of the checkpoint's weights {getattr(stored, name)}"
    return None
