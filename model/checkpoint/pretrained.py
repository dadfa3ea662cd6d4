"""Read checkpoints and pretrained parts: sizes, and tensors under our names, read when asked for.

``open_checkpoint`` takes a directory of either layout; the readers below it take what MedPLIB starts from, in the
formats it is published in: LLaMA, CLIP, SAM-Med2D, a LLaVA projector. They give names without a prefix of the network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, SamConfig

from model.checkpoint.directories import base_of, read_settings, resolve
from model.checkpoint.names import (
    is_empty_buffer,
    native_to_published,
    published_to_native,
    sam_config_from_state_dict,
    state_to_native,
)
from model.checkpoint.published_config import (
    NATIVE_SECTION,
    clip_config_from_shapes,
    infer_config,
    projector_type,
    text_config,
)
from model.checkpoint.report import Shape, understanding
from model.checkpoint.shards import WeightFiles, find_weights, read_tensors
from model.errors import MedPLIBError
from model.modeling.configuration import MaskConfig, MedPLIBConfig
from model.processing.special_tokens import SEG_TOKEN
from model.processing.tokens import build_tokenizer

CLIP_PREFIX = "model.vision_tower.clip."
SAM_PREFIX = "model.sam."
PROJECTOR_PREFIX = "model.projector."
Layout = Literal["native", "published"]
_EMBEDDING, _HEAD = "model.decoder.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint whose values are not read yet.

    Attributes:
        directory: where it lies.
        layout: ``native`` or ``published``.
        config: the network's sizes.
        shapes: shape of every tensor by our name.
        weights: its own weight files.
        unexpected: stored names that are nobody's.
        ignored: number of stored buffers without content.
        added: tensors by our name that came from elsewhere (CLIP directory, SAM file).
        tied: ``lm_head`` is not stored, it is the embedding.
        dtype: of the weights, by config.json; None where it does not say.
        notes: what was decided on the way.
    """

    directory: Path
    layout: Layout
    config: MedPLIBConfig
    shapes: Mapping[str, Shape]
    weights: WeightFiles
    unexpected: tuple[str, ...] = ()
    ignored: int = 0
    added: Mapping[str, Tensor] = field(default_factory=dict)
    tied: bool = False
    dtype: torch.dtype | None = None
    notes: tuple[str, ...] = ()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every known tensor by our name, one at a time."""
        for stored, value in self.weights.tensors():
            name = stored if self.layout == "native" else published_to_native(stored)
            if name is not None and name in self.shapes:
                yield name, value
            if self.tied and name == _EMBEDDING:
                yield _HEAD, value
        yield from self.added.items()


def is_native(settings: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of ours."""
    return settings.get("model_type") == MedPLIBConfig.model_type


def open_checkpoint(
    directory: str | Path,
    *,
    vision_tower: str | Path | None = None,
    sam: str | Path | None = None,
    base: str | Path | None = None,
) -> OpenedCheckpoint:
    """Open a native or published directory.

    Args:
        directory: the checkpoint, or anything that ``resolve`` finds one by; of a LoRA its base is opened.
        vision_tower: CLIP directory, for published checkpoints: sizes, and weights if the checkpoint has none.
        sam: SAM-Med2D file, for published checkpoints without SAM weights.
        base: what a LoRA was trained on, where that is not what its configuration names.

    Raises:
        MedPLIBError: the directory is no checkpoint, or a part is found nowhere.
    """
    directory = base_of(directory, base)
    settings = read_settings(directory)
    if is_native(settings):
        unread = tuple(f"{path} was not read: a native checkpoint is whole" for path in (vision_tower, sam) if path)
        with understanding(str(directory / "config.json"), "correct it or save the checkpoint again"):
            config = MedPLIBConfig.from_dict(settings)
        weights = find_weights(directory)
        shapes, tied = _with_tied_head(weights.shapes(), config)
        notes = (*unread, *weights.notes)
        return OpenedCheckpoint(
            directory, "native", config, shapes, weights, tied=tied, dtype=_dtype(settings), notes=notes
        )
    return _open_published(
        directory, settings, None if vision_tower is None else resolve(vision_tower), None if sam is None else Path(sam)
    )


def _seg_token_id(directory: Path, vocabulary: int) -> int:
    """Id of ``<SEG>`` in a published directory, whose tokenizer must fit the embedding's rows.

    Raises:
        MedPLIBError: it does not, or stored ids contradict the order in which MedPLIB adds its tokens.
    """
    tokenizer = build_tokenizer(directory)
    if len(tokenizer) > vocabulary:
        raise MedPLIBError(
            f"the tokenizer of {directory} has {len(tokenizer)} tokens with MedPLIB's own, but the embedding has "
            f"{vocabulary} rows; give a MedPLIB checkpoint, or assemble one from this directory first"
        )
    token_id = tokenizer.get_added_vocab()[SEG_TOKEN]
    stored = directory / "added_tokens.json"
    with understanding(str(stored), "fetch it again"):
        listed = dict(json.loads(stored.read_bytes())) if stored.is_file() else {}
    if listed.get(SEG_TOKEN, token_id) != token_id:
        raise MedPLIBError(
            f"{stored} gives {SEG_TOKEN} the id {listed[SEG_TOKEN]}, the tokenizer {token_id}; "
            "use the tokenizer files that belong to these weights"
        )
    return token_id


def _open_published(
    directory: Path, settings: dict[str, Any], vision_tower: Path | None, sam: Path | None
) -> OpenedCheckpoint:
    weights = find_weights(directory)
    stored = weights.shapes()
    if lora := next((name for name in stored if re.search(r"\.lora_[AB]\.", name)), None):
        raise MedPLIBError(f"{directory} holds unmerged LoRA weights ({lora}, …); merge them into the weights first")
    seg_token_id = _seg_token_id(directory, stored.get("model.embed_tokens.weight", (0,))[0])
    notes = list(weights.notes)
    clip_directory, clip = _clip(directory, settings, stored, vision_tower, notes)
    added = _missing_parts(directory, stored, clip_directory, sam, notes)
    shapes = {**stored, **{str(native_to_published(name)): tuple(value.shape) for name, value in added.items()}}
    with understanding(str(directory / "config.json"), "fetch it again"):
        inferred = infer_config(settings, shapes, clip, seg_token_id)
    named = {name: published_to_native(name) for name in stored}
    native = {str(ours): stored[name] for name, ours in named.items() if ours is not None}
    native, tied = _with_tied_head(native, inferred.config)
    return OpenedCheckpoint(
        directory=directory,
        layout="published",
        config=inferred.config,
        shapes={**native, **{name: tuple(value.shape) for name, value in added.items()}},
        weights=weights,
        unexpected=tuple(name for name, ours in named.items() if ours is None and not is_empty_buffer(name)),
        ignored=sum(map(is_empty_buffer, stored)),
        added=added,
        tied=tied,
        dtype=_dtype(settings),
        notes=(*notes, *inferred.notes),
    )


def _with_tied_head(shapes: dict[str, Shape], config: MedPLIBConfig) -> tuple[dict[str, Shape], bool]:
    """The shapes, with that of an ``lm_head`` which is not stored because it is the embedding; and whether it is so."""
    tied = config.text_config.tie_word_embeddings and _HEAD not in shapes and _EMBEDDING in shapes
    return ({**shapes, _HEAD: shapes[_EMBEDDING]} if tied else shapes), tied


def _clip(
    directory: Path,
    settings: Mapping[str, Any],
    stored: Mapping[str, Shape],
    vision_tower: Path | None,
    notes: list[str],
) -> tuple[Path | None, CLIPVisionConfig | None]:
    """The CLIP directory in use and its sizes: the one given, else the one config.json names if it is here and fits."""
    found = vision_tower or find_vision_tower(settings.get("mm_vision_tower"), directory)
    if found is None:
        return None, None
    config = read_clip_config(found)
    difference = clip_difference(config, stored) if NATIVE_SECTION not in settings else None
    if difference and vision_tower:
        raise MedPLIBError(f"{found} is another CLIP: {difference}; give the directory it was trained with")
    if difference:
        notes.append(f"{found} was not used, it is another CLIP: {difference}")
        return None, None
    notes.append(f"CLIP's sizes come from {found}")
    return found, config


def _missing_parts(
    directory: Path, stored: Mapping[str, Shape], clip_directory: Path | None, sam: Path | None, notes: list[str]
) -> dict[str, Tensor]:
    """CLIP's and SAM's tensors where the checkpoint lacks them."""
    added: dict[str, Tensor] = {}
    if clip_directory is not None and not any(name.startswith("model.vision_tower.") for name in stored):
        added.update({CLIP_PREFIX + name: value for name, value in read_clip_tensors(clip_directory)})
        notes.append(f"the checkpoint holds no CLIP weights; they come from {clip_directory}")
    if not any(name.startswith("model.visual_model.") for name in stored):
        if sam is None:
            raise MedPLIBError(f"{directory} holds no SAM weights; give the SAM-Med2D file (sam=, --vision_pretrained)")
        added.update({SAM_PREFIX + name: value for name, value in read_sam(sam)[2].items()})
        notes.append(f"the checkpoint holds no SAM weights; they come from {sam}")
    elif sam is not None:
        notes.append(f"{sam} was not read: the checkpoint holds its own SAM weights")
    return added


def _dtype(settings: Mapping[str, Any]) -> torch.dtype | None:
    name = settings.get("dtype") or settings.get("torch_dtype")
    dtype = getattr(torch, str(name).removeprefix("torch."), None) if name else None
    return dtype if isinstance(dtype, torch.dtype) else None


# --- pretrained parts -------------------------------------------------------------------------------------------------


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


def read_language_model(directory: Path) -> tuple[LlamaConfig, dict[str, Tensor], str | None, tuple[str, ...]]:
    """A LLaMA, Vicuna or LLaVA directory.

    Returns:
        Its sizes, with the vocabulary as stored; decoder, ``lm_head`` and projector tensors under our full names;
        ``mm_projector_type`` of those, None without a projector; contradictions found.

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
    unknown = []
    for name, value in stored.items():
        native = published_to_native(name)
        if native is None or not native.startswith(("lm_head.", "model.decoder.", PROJECTOR_PREFIX, CLIP_PREFIX)):
            unknown.append(name)
        else:
            state[native] = value
    if unknown or _EMBEDDING not in state:
        what = f"{unknown[0]} in it" if unknown else "no model.embed_tokens.weight in it"
        raise MedPLIBError(f"{directory} is no LLaMA or LLaVA directory: {what}; give one, or load it as a checkpoint")
    state.setdefault(_HEAD, state[_EMBEDDING])  # tied
    has_projector = any(name.startswith(PROJECTOR_PREFIX) for name in state)
    return config, state, projector_type(settings, shapes) if has_projector else None, (*weights.notes, *notes)


def find_vision_tower(named: str | None, directory: Path) -> Path | None:
    """The CLIP directory that a config.json names, if it is here: as named, beside the checkpoint, in the working
    directory or in the Hugging Face cache. Often it is a path of the authors' machine, so its last part is tried too.
    """
    if not named:
        return None
    places = [directory, directory.parent, Path.cwd()]
    candidates = [Path(named), *(place / name for name in (named, Path(named).name) for place in places)]
    for path in map(resolve, candidates):
        with suppress(OSError, ValueError):  # a folder that may not be entered, such as the authors' home
            if path != directory and (path / "config.json").is_file():
                return path
    return None


def clip_difference(config: CLIPVisionConfig, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """How a CLIP directory's sizes differ from a published checkpoint's own CLIP tensors; None if they do not."""
    if not any(name.startswith("model.vision_tower.") for name in shapes):
        return None
    stored = clip_config_from_shapes(shapes)
    for name in ("hidden_size", "num_hidden_layers", "image_size", "patch_size", "intermediate_size"):
        if getattr(stored, name) != getattr(config, name):
            return f"its {name} is {getattr(config, name)}, that of the checkpoint's weights {getattr(stored, name)}"
    return None
