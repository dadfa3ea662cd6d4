"""Published parameter names (reference §7) ↔ ours, as pure functions on names.

Values never change on the way: a published checkpoint is ours under other names, plus buffers that hold nothing
learnt. Names that neither side knows come back as None, so that loading can report them.
"""

from __future__ import annotations

import re

from model.checkpoint.sam_names import native_to_original, original_to_native
from model.modeling.configuration import MedPLIBConfig

_N = r"(\d+)"
_FFN = r"((?:gate|up|down)_proj\.weight)"
_LAYER, _NATIVE_LAYER = rf"model\.layers\.{_N}\.", rf"model\.decoder\.layers\.{_N}\."
_DEEPSPEED = r"mlp\.deepspeed_moe\."
_TAIL = r"(.+)"
_WEIGHTS = r"(weight|bias)"

# (published pattern, published template, native pattern, native template): a pattern's groups fill the other's slots.
_RULES = tuple(
    (re.compile(published), to_published, re.compile(native), to_native)
    for published, to_published, native, to_native in (
        (r"lm_head\.weight", "lm_head.weight", r"lm_head\.weight", "lm_head.weight"),
        (
            r"model\.(embed_tokens|norm)\.weight",
            "model.{}.weight",
            r"model\.decoder\.(embed_tokens|norm)\.weight",
            "model.decoder.{}.weight",
        ),
        (
            rf"{_LAYER}((?:input|post_attention)_layernorm\.weight|self_attn\.[qkvo]_proj\.(?:weight|bias))",
            "model.layers.{}.{}",
            rf"{_NATIVE_LAYER}((?:input|post_attention)_layernorm\.weight|self_attn\.[qkvo]_proj\.(?:weight|bias))",
            "model.decoder.layers.{}.{}",
        ),
        (
            rf"{_LAYER}mlp\.{_FFN}",
            "model.layers.{}.mlp.{}",
            rf"{_NATIVE_LAYER}mlp\.{_FFN}",
            "model.decoder.layers.{}.mlp.{}",
        ),
        (
            rf"{_LAYER}{_DEEPSPEED}gate\.wg\.weight",
            "model.layers.{}.mlp.deepspeed_moe.gate.wg.weight",
            rf"{_NATIVE_LAYER}mlp\.router\.weight",
            "model.decoder.layers.{}.mlp.router.weight",
        ),
        (
            rf"{_LAYER}{_DEEPSPEED}experts\.deepspeed_experts\.{_N}\.{_FFN}",
            "model.layers.{}.mlp.deepspeed_moe.experts.deepspeed_experts.{}.{}",
            rf"{_NATIVE_LAYER}mlp\.experts\.{_N}\.{_FFN}",
            "model.decoder.layers.{}.mlp.experts.{}.{}",
        ),
        (  # DeepSpeed's residual expert sits in the MoE layer as its own `mlp`
            rf"{_LAYER}mlp\.mlp\.{_FFN}",
            "model.layers.{}.mlp.mlp.{}",
            rf"{_NATIVE_LAYER}mlp\.residual_expert\.{_FFN}",
            "model.decoder.layers.{}.mlp.residual_expert.{}",
        ),
        (
            rf"{_LAYER}mlp\.coefficient\.{_WEIGHTS}",
            "model.layers.{}.mlp.coefficient.{}",
            rf"{_NATIVE_LAYER}mlp\.residual_coefficient\.{_WEIGHTS}",
            "model.decoder.layers.{}.mlp.residual_coefficient.{}",
        ),
        (
            rf"model\.vision_tower\.vision_tower\.vision_model\.{_TAIL}",
            "model.vision_tower.vision_tower.vision_model.{}",
            rf"model\.vision_tower\.clip\.{_TAIL}",
            "model.vision_tower.clip.{}",
        ),
        (
            rf"model\.mm_projector\.{_N}\.{_WEIGHTS}",
            "model.mm_projector.{}.{}",
            rf"model\.projector\.layers\.{_N}\.{_WEIGHTS}",
            "model.projector.layers.{}.{}",
        ),
        (
            rf"model\.region_fea_adapter\.{_WEIGHTS}",
            "model.region_fea_adapter.{}",
            rf"model\.region_adapter\.proj\.{_WEIGHTS}",
            "model.region_adapter.proj.{}",
        ),
        (
            rf"model\.text_hidden_fcs\.0\.{_N}\.{_WEIGHTS}",
            "model.text_hidden_fcs.0.{}.{}",
            rf"model\.mask_head\.query\.{_N}\.{_WEIGHTS}",
            "model.mask_head.query.{}.{}",
        ),
        (
            rf"model\.mm_token_compressor\.{_TAIL}",
            "model.mm_token_compressor.{}",
            rf"model\.token_compressor\.{_TAIL}",
            "model.token_compressor.{}",
        ),
        (
            rf"model\.mask_encoder\.{_TAIL}",
            "model.mask_encoder.{}",
            rf"model\.mask_encoder\.{_TAIL}",
            "model.mask_encoder.{}",
        ),
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
    for published, _, _, to_native in _RULES:
        if match := published.fullmatch(key):
            return to_native.format(*match.groups())
    return None


def native_to_published(key: str, projector_type: str = "mlp2x_gelu") -> str | None:
    """Published name of one of our parameters; None where the published layout has no place for it.

    Args:
        key: our name.
        projector_type: ``linear`` is published as a bare layer without an index.
    """
    if key.startswith(_NATIVE_SAM):
        inner = native_to_original(key.removeprefix(_NATIVE_SAM))
        return None if inner is None else _PUBLISHED_SAM + inner
    for _, to_published, native, _ in _RULES:
        if match := native.fullmatch(key):
            published = to_published.format(*match.groups())
            if projector_type == "linear":
                return published.replace("model.mm_projector.0.", "model.mm_projector.")
            return published
    return None


def published_buffers(config: MedPLIBConfig) -> dict[str, int]:
    """Names and lengths of the rotary buffers that a published directory holds beside its parameters."""
    text = config.text_config
    length = text.hidden_size // text.num_attention_heads // 2
    return {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": length for layer in range(text.num_hidden_layers)}
