"""Published parameter names (reference §7) ↔ ours, as pure functions on names.

Values never change on the way: a published checkpoint is ours under other names, plus buffers that hold nothing
learnt. Names that neither side knows come back as None, so that loading can report them.
"""

from __future__ import annotations

import re

from model.checkpoint.sam_names import compile_families, native_to_original, original_to_native, rename
from model.modeling.configuration import MedPLIBConfig

_LAYER, _NATIVE = "model.layers.#.", "model.decoder.layers.#."
_DEEPSPEED = f"{_LAYER}mlp.deepspeed_moe."
# Published family, native family; see ``compile_families``.
_TO_NATIVE, _TO_PUBLISHED = compile_families(
    (
        ("lm_head.weight", "lm_head.weight"),
        ("model.embed_tokens.weight", "model.decoder.embed_tokens.weight"),
        ("model.norm.weight", "model.decoder.norm.weight"),
        (f"{_LAYER}input_layernorm.weight", f"{_NATIVE}input_layernorm.weight"),
        (f"{_LAYER}post_attention_layernorm.weight", f"{_NATIVE}post_attention_layernorm.weight"),
        *((f"{_LAYER}self_attn.{side}_proj.@", f"{_NATIVE}self_attn.{side}_proj.@") for side in "qkvo"),
        (f"{_LAYER}mlp.%", f"{_NATIVE}mlp.%"),
        (f"{_DEEPSPEED}gate.wg.weight", f"{_NATIVE}mlp.router.weight"),
        (f"{_DEEPSPEED}experts.deepspeed_experts.#.%", f"{_NATIVE}mlp.experts.#.%"),
        # DeepSpeed's residual expert sits in the MoE layer as its own `mlp`
        (f"{_LAYER}mlp.mlp.%", f"{_NATIVE}mlp.residual_expert.%"),
        (f"{_LAYER}mlp.coefficient.@", f"{_NATIVE}mlp.residual_coefficient.@"),
        ("model.vision_tower.vision_tower.vision_model.*", "model.vision_tower.clip.*"),
        ("model.mm_projector.#.@", "model.projector.layers.#.@"),
        ("model.region_fea_adapter.@", "model.region_adapter.proj.@"),
        ("model.text_hidden_fcs.0.#.@", "model.mask_head.query.#.@"),
        ("model.mm_token_compressor.*", "model.token_compressor.*"),
        ("model.mask_encoder.*", "model.mask_encoder.*"),
    )
)
_PUBLISHED_SAM, _NATIVE_SAM = "model.visual_model.", "model.sam."
_LINEAR_PROJECTOR = re.compile(r"model\.mm_projector\.(weight|bias)")  # a bare Linear, not a Sequential
_EMPTY_BUFFER = re.compile(r"(?:.+\.)?(?:rotary_emb\.inv_freq|embeddings\.position_ids)")


def is_empty_buffer(key: str) -> bool:
    """Whether a name is a buffer that follows from the sizes (``inv_freq``, ``position_ids``): never loaded."""
    return _EMPTY_BUFFER.fullmatch(key) is not None


def published_to_native(key: str) -> str | None:
    """Our name of a published parameter; None for a buffer that holds nothing learnt and for unknown names."""
    if is_empty_buffer(key):
        return None
    if key.startswith(_PUBLISHED_SAM):
        inner = original_to_native(key.removeprefix(_PUBLISHED_SAM))
        return None if inner is None else _NATIVE_SAM + inner
    if match := _LINEAR_PROJECTOR.fullmatch(key):
        return f"model.projector.layers.0.{match[1]}"
    return rename(key, _TO_NATIVE)


def native_to_published(key: str, projector_type: str = "mlp2x_gelu") -> str | None:
    """Published name of one of our parameters; None where the published layout has no place for it.

    Args:
        key: our name.
        projector_type: ``linear`` is published as a bare layer without an index.
    """
    if key.startswith(_NATIVE_SAM):
        inner = native_to_original(key.removeprefix(_NATIVE_SAM))
        return None if inner is None else _PUBLISHED_SAM + inner
    published = rename(key, _TO_PUBLISHED)
    if published and projector_type == "linear":
        return published.replace("model.mm_projector.0.", "model.mm_projector.")
    return published


def published_buffers(config: MedPLIBConfig) -> dict[str, int]:
    """Names and lengths of the rotary buffers that a published directory holds beside its parameters."""
    text = config.text_config
    length = text.hidden_size // text.num_attention_heads // 2
    return {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": length for layer in range(text.num_hidden_layers)}
