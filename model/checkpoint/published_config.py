"""The published config.json ↔ ``MedPLIBConfig`` (reference §7).

The published file holds neither CLIP nor SAM sizes; those come from a CLIP directory or from tensor shapes, and where
config.json and the tensors disagree about the mixture, the tensors are right.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig

from model.checkpoint.names import sam_config_from_state_dict
from model.checkpoint.report import Shape, understanding
from model.errors import MedPLIBError
from model.modeling.configuration import (
    InContextConfig,
    LayerMode,
    MedPLIBConfig,
    MoEConfig,
    ProjectorConfig,
    RegionConfig,
)

NATIVE_SECTION = "medplib_native"
"""Key under which an exported config.json keeps what the published layout cannot say; published code ignores it."""
PUBLISHED_THRESHOLD = 0.1
_CLIP = "model.vision_tower.vision_tower.vision_model."
_SAM = "model.visual_model."
_TEXT_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "attention_bias",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
_NATIVE_KEYS = (
    *("text_config", "vision_config", "sam_config", "projector", "moe", "region", "mask", "in_context", "loss"),
    *("vision_select_layer", "vision_select_feature", "seg_token_id", "conversation_turns"),
)
# Settings of the LLaVA family that published code looks for and that are the same in every MedPLIB.
_PUBLISHED_CONSTANTS: dict[str, Any] = {
    "freeze_mm_mlp_adapter": True,
    "freeze_mm_vision_resampler": False,
    "image_grid_pinpoints": None,
    "max_length": 4096,
    "mm_resampler_type": None,
    "pretrain_mm_mlp_adapter": None,
    "pretraining_tp": 1,
    "tune_mm_mlp_adapter": False,
    "tune_mm_vision_resampler": False,
    "unfreeze_mm_vision_tower": False,
}


@dataclass(frozen=True)
class Inferred:
    """A configuration and the sentences about how it was found."""

    config: MedPLIBConfig
    notes: tuple[str, ...] = ()


def infer_config(
    settings: Mapping[str, Any], shapes: Mapping[str, Shape], clip: CLIPVisionConfig | None, seg_token_id: int
) -> Inferred:
    """Sizes and behaviour of a published checkpoint.

    Args:
        settings: its config.json.
        shapes: shape of every tensor under its published name; SAM's must be among them.
        clip: CLIP's sizes, where a CLIP directory is known; None reads them off the shapes.
        seg_token_id: id of ``<SEG>`` in the checkpoint's tokenizer.

    Raises:
        MedPLIBError: a size can be found nowhere, or a section is not understood.
    """
    kept = settings.get(NATIVE_SECTION)
    if isinstance(kept, Mapping):
        with understanding(f"{NATIVE_SECTION} in config.json", "export it again"):
            return Inferred(MedPLIBConfig(**kept))
    notes: list[str] = []
    text = text_config(settings, shapes, notes)
    if clip is None:
        clip = clip_config_from_shapes(shapes)
        notes.append("CLIP's sizes were read off the tensors; heads and activation are those of ViT-L/14 (64 per head)")
    sam, mask = sam_config_from_state_dict(_below(shapes, _SAM))
    config = MedPLIBConfig(
        text_config=text,
        vision_config=clip,
        sam_config=sam,
        projector=ProjectorConfig(type=projector_type(settings, shapes)),
        moe=_moe(settings, shapes, notes),
        region=_region(settings, shapes, notes),
        mask=replace(mask, geometry="legacy", threshold=PUBLISHED_THRESHOLD),
        in_context=InContextConfig(
            token_compressor=any(key.startswith("model.mm_token_compressor.") for key in shapes),
            compressed_tokens=int(settings.get("mm_compressed_token_count") or 256),
            mask_encoder=any(key.startswith("model.mask_encoder.") for key in shapes),
            mask_encoder_tokens=int(settings.get("mask_encoder_token_count") or 64),
        ),
        vision_select_layer=int(settings.get("mm_vision_select_layer", -2)),
        vision_select_feature=settings.get("mm_vision_select_feature", "patch"),
        seg_token_id=seg_token_id,
    )
    return Inferred(config, tuple(notes))


def text_config(settings: Mapping[str, Any], shapes: Mapping[str, Shape], notes: list[str]) -> LlamaConfig:
    """LLaMA's sizes from a config.json in the old style; the vocabulary from the embedding's own rows."""
    absent = [name for name in ("hidden_size", "num_hidden_layers", "num_attention_heads") if name not in settings]
    if absent:
        raise MedPLIBError(
            f"config.json lacks {', '.join(absent)}; expected the config.json of a LLaMA-based checkpoint"
        )
    values = {name: settings[name] for name in _TEXT_KEYS if settings.get(name) is not None}
    rope = dict(settings.get("rope_parameters") or settings.get("rope_scaling") or {})
    rope.setdefault("rope_theta", settings.get("rope_theta", 10000.0))
    rope.setdefault("rope_type", rope.pop("type", "default"))
    embedding = shapes.get("model.embed_tokens.weight")
    vocabulary = int(embedding[0] if embedding else settings.get("vocab_size", 0))
    if vocabulary != settings.get("vocab_size", vocabulary):
        notes.append(f"config.json says vocab_size {settings['vocab_size']}, the embedding has {vocabulary} rows")
    if values.get("pad_token_id", -1) < 0:  # older LLaMAs say -1, which would make the last token padding
        values["pad_token_id"] = 0
    return LlamaConfig(**values, vocab_size=vocabulary, rope_parameters=rope, use_cache=True)


def clip_config_from_shapes(shapes: Mapping[str, Shape], prefix: str = _CLIP) -> CLIPVisionConfig:
    """CLIP's sizes from its tensors; heads of 64 and quick GELU, as in ViT-L/14, since no shape tells them.

    Raises:
        MedPLIBError: the checkpoint holds no CLIP tensors.
    """
    clip = _below(shapes, prefix)
    try:
        width, channels, patch, _ = clip["embeddings.patch_embedding.weight"].shape
        positions = clip["embeddings.position_embedding.weight"].shape[0]
        intermediate = clip["encoder.layers.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise MedPLIBError(
            "the checkpoint holds no CLIP weights and its mm_vision_tower is not here; "
            "give the CLIP directory (vision_tower=, --vision_tower)"
        ) from error
    layers = {int(match[1]) for key in clip if (match := re.match(r"encoder\.layers\.(\d+)\.", key))}
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=len(layers),
        num_attention_heads=max(1, width // 64),
        num_channels=channels,
        image_size=math.isqrt(positions - 1) * patch,
        patch_size=patch,
        projection_dim=768,
        hidden_act="quick_gelu",
    )


def projector_type(settings: Mapping[str, Any], shapes: Mapping[str, Shape]) -> str:
    """The projector's kind: by its tensors, else by ``mm_projector_type``."""
    named = str(settings.get("mm_projector_type") or "linear")
    keys = [key for key in shapes if key.startswith("model.mm_projector.") and key.endswith("weight")]
    if not keys:
        return named
    if "model.mm_projector.weight" in keys:
        return "linear"
    return f"mlp{len(keys)}x_gelu"


def _moe(settings: Mapping[str, Any], shapes: Mapping[str, Shape], notes: list[str]) -> MoEConfig:
    """The mixture: which layers and how many experts by the tensors, the rest from the ``moe`` section."""
    gate = re.compile(r"model\.layers\.(\d+)\.mlp\.deepspeed_moe\.gate\.wg\.weight")
    found = {int(match[1]): int(shape[0]) for key, shape in shapes.items() if (match := gate.fullmatch(key))}
    layers = tuple(sorted(found))
    experts = tuple(found[layer] for layer in layers)
    section = settings.get("moe") or {}
    if not isinstance(section, Mapping):
        raise MedPLIBError(f"config.json's moe is {type(section).__name__}; expected a mapping")
    _note_moe_contradictions(section, layers, experts, notes)
    residual = any(key.endswith(".mlp.coefficient.weight") for key in shapes)
    return MoEConfig(
        layers=layers,
        num_experts=experts,
        top_k=int(section.get("top_k_experts", 1)),
        capacity_factor=float(section.get("capacity_factor", 1.5)),
        eval_capacity_factor=float(section.get("eval_capacity_factor", 2.0)),
        min_capacity=int(section.get("min_capacity", 0)),
        use_residual=residual if layers else False,
        router_aux_loss_coef=float(section.get("router_aux_loss_coef", 0.0)),
    )


def _note_moe_contradictions(
    section: Mapping[str, Any], layers: tuple[int, ...], experts: tuple[int, ...], notes: list[str]
) -> None:
    enabled = bool(section.get("moe_enable", bool(section)))
    if enabled != bool(layers):
        says = "a mixture" if enabled else "no mixture"
        notes.append(f"config.json says {says}, but the weights hold {len(layers)} mixture layers; the weights decide")
        return
    named = section.get("moe_layers_idx")
    if layers and named is not None and tuple(named) != layers:
        notes.append(f"config.json names mixture layers {list(named)}, the weights hold {list(layers)}")
    count = section.get("num_experts")
    counts = [count] if isinstance(count, int) else list(count or [])
    if layers and counts and tuple(counts * len(layers) if len(counts) == 1 else counts) != experts:
        notes.append(f"config.json says num_experts {counts}, the gates have {list(experts)}")


def _region(settings: Mapping[str, Any], shapes: Mapping[str, Shape], notes: list[str]) -> RegionConfig:
    present = "model.region_fea_adapter.weight" in shapes
    if present != bool(settings.get("region_fea_adapter", present)):
        holds = "hold" if present else "lack"
        notes.append(f"config.json and the weights disagree about the region adapter; the weights {holds} it")
    return RegionConfig(enabled=present, max_points=int(settings.get("max_sample_point") or 512))


def _below(shapes: Mapping[str, Shape], prefix: str) -> dict[str, torch.Tensor]:
    """Meta tensors of the names below ``prefix``."""
    return {
        key.removeprefix(prefix): torch.empty(shape, device="meta")
        for key, shape in shapes.items()
        if key.startswith(prefix)
    }


def published_settings(config: MedPLIBConfig, dtype: str, vision_tower: str) -> dict[str, Any]:
    """The published config.json of a network, as the published code writes and reads it.

    Args:
        config: the network's.
        dtype: of its weights, as torch names it (``float32``, ``bfloat16``).
        vision_tower: CLIP directory or hub name to put down.
    """
    values, text = config.to_dict(), config.text_config.to_dict()
    rope = text.get("rope_parameters") or {}
    settings = {name: text[name] for name in _TEXT_KEYS if name in text}
    return (
        settings
        | _PUBLISHED_CONSTANTS
        | {
            "architectures": ["MedPLIBForCausalLM"],
            "model_type": "medplib_moe_llama",
            "vocab_size": config.text_config.vocab_size,
            "rope_theta": rope.get("rope_theta", 10000.0),
            "rope_scaling": None if rope.get("rope_type", "default") == "default" else dict(rope),
            "torch_dtype": dtype,
            "use_cache": False,
            "image_aspect_ratio": "square",
            "mm_hidden_size": config.vision_config.hidden_size,
            "mm_projector_type": config.projector.type,
            "mm_use_im_patch_token": False,
            "mm_use_im_start_end": True,
            "mm_vision_select_feature": config.vision_select_feature,
            "mm_vision_select_layer": config.vision_select_layer,
            "mm_vision_tower": vision_tower,
            "vision_tower": vision_tower,
            "use_mm_proj": True,
            "out_dim": config.mask_query_dim,
            "train_mask_decoder": True,
            "region_fea_adapter": config.region.enabled,
            "region_geo_sampler": False,
            "sampler_pooler_mode": config.region.pooler,
            "max_sample_point": config.region.max_points,
            "mm_token_compress": config.in_context.token_compressor,
            "mm_compressed_token_count": config.in_context.compressed_tokens,
            "icl_mask_encoder": config.in_context.mask_encoder,
            "mask_encoder_token_count": config.in_context.mask_encoder_tokens,
            "moe": _published_moe(config),
            NATIVE_SECTION: {name: values[name] for name in _NATIVE_KEYS},
        }
    )


def _published_moe(config: MedPLIBConfig) -> dict[str, Any]:
    moe, depth = config.moe, config.text_config.num_hidden_layers
    modes: tuple[LayerMode, ...] = ("dense", "first_half", "second_half", "sparse")
    return {
        "moe_enable": moe.enabled,
        "moe_mode": next((mode for mode in modes if MoEConfig.layers_for(mode, depth) == moe.layers), "dense"),
        "moe_layers_idx": list(moe.layers),
        "num_experts": list(moe.num_experts),
        "top_k_experts": moe.top_k,
        "capacity_factor": moe.capacity_factor,
        "eval_capacity_factor": moe.eval_capacity_factor,
        "min_capacity": moe.min_capacity,
        "use_residual": moe.use_residual,
        "router_aux_loss_coef": moe.router_aux_loss_coef,
        "ep_size": 1,
    }
