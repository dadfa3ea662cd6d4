"""Published parameter names (reference §7) and SAM's original ones ↔ ours, as pure functions on names; SAM's sizes.

Values never change on the way: a published checkpoint is ours under other names, plus buffers that hold nothing
learnt. Names that neither side knows come back as None, so that loading can report them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from torch import Tensor
from transformers import SamConfig

from model.errors import MedPLIBError
from model.modeling.configuration import MaskConfig, MedPLIBConfig

Value = TypeVar("Value")

Rules = tuple[tuple[re.Pattern[str], str], ...]
_WILDCARDS = {"#": r"(\d+)", "*": "(.+)", "@": "(weight|bias)", "%": r"((?:gate|up|down)_proj\.weight)"}


def _compile_families(families: Sequence[tuple[str, str]]) -> tuple[Rules, Rules]:
    """Rules for ``_rename`` from pairs of families of names, in either direction.

    In a family ``#`` is an index, ``*`` the rest of the name, ``@`` weight or bias, ``%`` a matrix of a feed-forward
    network; the same on both sides.
    """

    def rules(pairs: Iterable[tuple[str, str]]) -> Rules:
        return tuple(
            (
                re.compile("".join(_WILDCARDS.get(sign) or re.escape(sign) for sign in source)),
                re.sub(r"[#*@%]", "{}", target),
            )
            for source, target in pairs
        )

    return rules(families), rules([(native, original) for original, native in families])


def _rename(key: str, rules: Rules) -> str | None:
    """The other name of a key; None where no rule knows it."""
    for pattern, template in rules:
        if match := pattern.fullmatch(key):
            return template.format(*match.groups())
    return None


_LAYER, _NATIVE = "model.layers.#.", "model.decoder.layers.#."
_DEEPSPEED = f"{_LAYER}mlp.deepspeed_moe."
# Published family, native family; see ``_compile_families``.
_TO_NATIVE, _TO_PUBLISHED = _compile_families(
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
    return _rename(key, _TO_NATIVE)


def native_to_published(key: str, projector_type: str = "mlp2x_gelu") -> str | None:
    """Published name of one of our parameters; None where the published layout has no place for it.

    Args:
        key: our name.
        projector_type: ``linear`` is published as a bare layer without an index.
    """
    if key.startswith(_NATIVE_SAM):
        inner = native_to_original(key.removeprefix(_NATIVE_SAM))
        return None if inner is None else _PUBLISHED_SAM + inner
    published = _rename(key, _TO_PUBLISHED)
    if published and projector_type == "linear":
        return published.replace("model.mm_projector.0.", "model.mm_projector.")
    return published


def published_buffers(config: MedPLIBConfig) -> dict[str, int]:
    """Names and lengths of the rotary buffers that a published directory holds beside its parameters."""
    text = config.text_config
    length = text.hidden_size // text.num_attention_heads // 2
    return {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": length for layer in range(text.num_hidden_layers)}


# --- SAM and SAM-Med2D ------------------------------------------------------------------------------------------------

_BLOCK, _NATIVE_BLOCK = "image_encoder.blocks.#.", "image_encoder.layers.#."
_MASK_EMBED = ("conv1", "layer_norm1", "conv2", "layer_norm2", "conv3")
_DECODER, _TWO_WAY = "mask_decoder.", "mask_decoder.transformer.layers.#."
_SAME = (  # families of the same name on both sides
    *("image_encoder.pos_embed", "prompt_encoder.not_a_point_embed.*", "prompt_encoder.no_mask_embed.*"),
    *(f"{_DECODER}{part}" for part in ("iou_token.*", "mask_tokens.*", "transformer.final_attn_token_to_image.*")),
    *(f"{_TWO_WAY}{part}.*" for part in ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token", "mlp")),
)
# Original family, native family; see ``_compile_families``.
_SAM_FAMILIES: tuple[tuple[str, str], ...] = (
    *((name, name) for name in _SAME),
    ("image_encoder.patch_embed.proj.*", "image_encoder.patch_embed.projection.*"),
    *((f"{_BLOCK}{part}.*", f"{_NATIVE_BLOCK}{part}.*") for part in ("attn", "mlp")),
    *((f"{_BLOCK}norm{i}.*", f"{_NATIVE_BLOCK}layer_norm{i}.*") for i in (1, 2)),
    (f"{_BLOCK}Adapter.*", f"{_NATIVE_BLOCK}adapter.*"),
    *((f"image_encoder.neck.{i}.*", f"image_encoder.neck.{name}.*") for i, name in enumerate(_MASK_EMBED[:4])),
    (
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
        "prompt_encoder.shared_embedding.positional_embedding",
    ),
    ("prompt_encoder.point_embeddings.#.*", "prompt_encoder.point_embed.#.*"),
    *(
        (f"prompt_encoder.mask_downscaling.{i}.*", f"prompt_encoder.mask_embed.{name}.*")
        for i, name in zip((0, 1, 3, 4, 6), _MASK_EMBED, strict=True)
    ),
    *((f"{_TWO_WAY}norm{i}.*", f"{_TWO_WAY}layer_norm{i}.*") for i in (1, 2, 3, 4)),
    (f"{_DECODER}transformer.norm_final_attn.*", f"{_DECODER}transformer.layer_norm_final_attn.*"),
    (f"{_DECODER}output_upscaling.0.*", f"{_DECODER}upscale_conv1.*"),
    (f"{_DECODER}output_upscaling.1.*", f"{_DECODER}upscale_layer_norm.*"),
    (f"{_DECODER}output_upscaling.3.*", f"{_DECODER}upscale_conv2.*"),
    *(
        (f"{_DECODER}{head}.layers.{i}.*", f"{_DECODER}{head}.{name}.*")
        for head in ("output_hypernetworks_mlps.#", "iou_prediction_head")
        for i, name in enumerate(("proj_in", "layers.0", "proj_out"))
    ),
)
_SAM_TO_NATIVE, _SAM_TO_ORIGINAL = _compile_families(_SAM_FAMILIES)


def original_to_native(key: str) -> str | None:
    """Our `SamMed2D` name of an original SAM or SAM-Med2D name; None if it is no such name."""
    return _rename(key, _SAM_TO_NATIVE)


def native_to_original(key: str) -> str | None:
    """Original SAM or SAM-Med2D name of one of our `SamMed2D` names; None if it is no such name."""
    return _rename(key, _SAM_TO_ORIGINAL)


def state_to_native(state: Mapping[str, Value]) -> dict[str, Value]:
    """Rename a whole original state dict; values pass through untouched.

    Raises:
        MedPLIBError: a name is not SAM's.
    """
    names = {key: original_to_native(key) for key in state}
    unknown = [key for key, name in names.items() if name is None]
    if unknown:
        shown = ", ".join(unknown[:5]) + (", …" if len(unknown) > 5 else "")
        raise MedPLIBError(
            f"{len(unknown)} of {len(state)} keys are not SAM's original names ({shown}); give the state dict of one "
            "SAM model"
        )
    return {name: state[key] for key, name in names.items() if name is not None}


def sam_config_from_state_dict(state: Mapping[str, Tensor]) -> tuple[SamConfig, MaskConfig]:
    """Read SAM's sizes off the shapes of an original-named state dict (meta tensors will do).

    Width, depth, heads, windows, global blocks, image size and adapter all follow from shapes. Two facts do not: the
    mask decoder's eight heads, which every published size shares, and the normalisation epsilons, of which the
    decoder's differs from transformers' default.

    Returns:
        Sizes, and a `MaskConfig` whose adapter fields are set and whose other fields are defaults.

    Raises:
        MedPLIBError: a tensor is missing or the shapes are not those of a SAM.
    """
    try:
        return _sam_config(state)
    except KeyError as error:
        raise MedPLIBError(
            f"the SAM weights lack {error.args[0]}; expected the names of segment-anything or SAM-Med2D, "
            "so give their .pth file or the checkpoint that holds them"
        ) from error


def _sam_config(state: Mapping[str, Tensor]) -> tuple[SamConfig, MaskConfig]:
    width, channels, patch, _ = state["image_encoder.patch_embed.proj.weight"].shape
    grid = state["image_encoder.pos_embed"].shape[1]
    depth = _count(state, r"image_encoder\.blocks\.(\d+)\.")
    reach = [(state[f"image_encoder.blocks.{i}.attn.rel_pos_h"].shape[0] + 1) // 2 for i in range(depth)]
    windows = {size for size in reach if size != grid}
    if len(windows) > 1:
        raise MedPLIBError(
            f"the SAM image encoder has attention windows of {sorted(windows)} patches; one size is supported"
        )
    mlp_width = state["image_encoder.blocks.0.mlp.lin1.weight"].shape[0]
    vision = {
        "hidden_size": width,
        "num_channels": channels,
        "patch_size": patch,
        "image_size": grid * patch,
        "num_hidden_layers": depth,
        "num_attention_heads": width // state["image_encoder.blocks.0.attn.rel_pos_h"].shape[1],
        "mlp_dim": mlp_width,
        "mlp_ratio": mlp_width / width,
        "qkv_bias": "image_encoder.blocks.0.attn.qkv.bias" in state,
        "window_size": windows.pop() if windows else grid,
        "global_attn_indexes": [i for i, size in enumerate(reach) if size == grid],
        "output_channels": state["image_encoder.neck.0.weight"].shape[0],
        "num_pos_feats": state["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"].shape[1],
    }
    prompt_width = state["prompt_encoder.no_mask_embed.weight"].shape[1]
    prompt = {
        "hidden_size": prompt_width,
        "image_size": grid * patch,
        "patch_size": patch,
        "mask_input_channels": state["prompt_encoder.mask_downscaling.3.weight"].shape[0],
        "num_point_embeddings": _count(state, r"prompt_encoder\.point_embeddings\.(\d+)\."),
    }
    first = "mask_decoder.transformer.layers.0"
    iou_depth = _count(state, r"mask_decoder\.iou_prediction_head\.layers\.(\d+)\.")
    if iou_depth != 3:
        raise MedPLIBError(f"the SAM mask decoder's IoU head has {iou_depth} layers; the known SAM models have 3")
    decoder = {
        "hidden_size": prompt_width,
        "mlp_dim": state[f"{first}.mlp.lin1.weight"].shape[0],
        "num_hidden_layers": _count(state, r"mask_decoder\.transformer\.layers\.(\d+)\."),
        "attention_downsample_rate": prompt_width // state[f"{first}.cross_attn_token_to_image.q_proj.weight"].shape[0],
        "num_multimask_outputs": state["mask_decoder.mask_tokens.weight"].shape[0] - 1,
        "iou_head_depth": iou_depth,
        "iou_head_hidden_dim": state["mask_decoder.iou_prediction_head.layers.0.weight"].shape[0],
        "layer_norm_eps": 1e-5,
    }
    gate = state.get("image_encoder.blocks.0.Adapter.channel.0.weight")  # [hidden, width]
    mask = MaskConfig(adapter=False)
    if gate is not None:
        mask = MaskConfig(adapter=True, adapter_mlp_ratio=gate.shape[0] / gate.shape[1])
    config = SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    return config, mask


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the largest index that ``pattern`` captures at the start of a key; 0 if none."""
    return max((int(match[1]) + 1 for key in state if (match := re.match(pattern, key))), default=0)
