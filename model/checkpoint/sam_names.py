"""SAM and SAM-Med2D parameter names: the original packages' ↔ ours, and the sizes that a state dict implies.

Every original tensor is one of ours under another name, so both ways are bijective and no value is touched.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from torch import Tensor
from transformers import SamConfig

from model.errors import MedPLIBError
from model.modeling.configuration import MaskConfig

Value = TypeVar("Value")

# Original family, native family; see ``compile_families``.
_FAMILIES: tuple[tuple[str, str], ...] = (
    ("image_encoder.pos_embed", "image_encoder.pos_embed"),
    ("image_encoder.patch_embed.proj.*", "image_encoder.patch_embed.projection.*"),
    ("image_encoder.blocks.#.norm1.*", "image_encoder.layers.#.layer_norm1.*"),
    ("image_encoder.blocks.#.attn.*", "image_encoder.layers.#.attn.*"),
    ("image_encoder.blocks.#.norm2.*", "image_encoder.layers.#.layer_norm2.*"),
    ("image_encoder.blocks.#.mlp.*", "image_encoder.layers.#.mlp.*"),
    ("image_encoder.blocks.#.Adapter.*", "image_encoder.layers.#.adapter.*"),
    ("image_encoder.neck.0.*", "image_encoder.neck.conv1.*"),
    ("image_encoder.neck.1.*", "image_encoder.neck.layer_norm1.*"),
    ("image_encoder.neck.2.*", "image_encoder.neck.conv2.*"),
    ("image_encoder.neck.3.*", "image_encoder.neck.layer_norm2.*"),
    (
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
        "prompt_encoder.shared_embedding.positional_embedding",
    ),
    ("prompt_encoder.point_embeddings.#.*", "prompt_encoder.point_embed.#.*"),
    ("prompt_encoder.not_a_point_embed.*", "prompt_encoder.not_a_point_embed.*"),
    ("prompt_encoder.no_mask_embed.*", "prompt_encoder.no_mask_embed.*"),
    ("prompt_encoder.mask_downscaling.0.*", "prompt_encoder.mask_embed.conv1.*"),
    ("prompt_encoder.mask_downscaling.1.*", "prompt_encoder.mask_embed.layer_norm1.*"),
    ("prompt_encoder.mask_downscaling.3.*", "prompt_encoder.mask_embed.conv2.*"),
    ("prompt_encoder.mask_downscaling.4.*", "prompt_encoder.mask_embed.layer_norm2.*"),
    ("prompt_encoder.mask_downscaling.6.*", "prompt_encoder.mask_embed.conv3.*"),
    ("mask_decoder.iou_token.*", "mask_decoder.iou_token.*"),
    ("mask_decoder.mask_tokens.*", "mask_decoder.mask_tokens.*"),
    ("mask_decoder.transformer.layers.#.self_attn.*", "mask_decoder.transformer.layers.#.self_attn.*"),
    (
        "mask_decoder.transformer.layers.#.cross_attn_token_to_image.*",
        "mask_decoder.transformer.layers.#.cross_attn_token_to_image.*",
    ),
    (
        "mask_decoder.transformer.layers.#.cross_attn_image_to_token.*",
        "mask_decoder.transformer.layers.#.cross_attn_image_to_token.*",
    ),
    ("mask_decoder.transformer.layers.#.mlp.*", "mask_decoder.transformer.layers.#.mlp.*"),
    ("mask_decoder.transformer.layers.#.norm1.*", "mask_decoder.transformer.layers.#.layer_norm1.*"),
    ("mask_decoder.transformer.layers.#.norm2.*", "mask_decoder.transformer.layers.#.layer_norm2.*"),
    ("mask_decoder.transformer.layers.#.norm3.*", "mask_decoder.transformer.layers.#.layer_norm3.*"),
    ("mask_decoder.transformer.layers.#.norm4.*", "mask_decoder.transformer.layers.#.layer_norm4.*"),
    ("mask_decoder.transformer.final_attn_token_to_image.*", "mask_decoder.transformer.final_attn_token_to_image.*"),
    ("mask_decoder.transformer.norm_final_attn.*", "mask_decoder.transformer.layer_norm_final_attn.*"),
    ("mask_decoder.output_upscaling.0.*", "mask_decoder.upscale_conv1.*"),
    ("mask_decoder.output_upscaling.1.*", "mask_decoder.upscale_layer_norm.*"),
    ("mask_decoder.output_upscaling.3.*", "mask_decoder.upscale_conv2.*"),
    ("mask_decoder.output_hypernetworks_mlps.#.layers.0.*", "mask_decoder.output_hypernetworks_mlps.#.proj_in.*"),
    ("mask_decoder.output_hypernetworks_mlps.#.layers.1.*", "mask_decoder.output_hypernetworks_mlps.#.layers.0.*"),
    ("mask_decoder.output_hypernetworks_mlps.#.layers.2.*", "mask_decoder.output_hypernetworks_mlps.#.proj_out.*"),
    ("mask_decoder.iou_prediction_head.layers.0.*", "mask_decoder.iou_prediction_head.proj_in.*"),
    ("mask_decoder.iou_prediction_head.layers.1.*", "mask_decoder.iou_prediction_head.layers.0.*"),
    ("mask_decoder.iou_prediction_head.layers.2.*", "mask_decoder.iou_prediction_head.proj_out.*"),
)

Rules = tuple[tuple[re.Pattern[str], str], ...]
_WILDCARDS = {"#": r"(\d+)", "*": "(.+)", "@": "(weight|bias)", "%": r"((?:gate|up|down)_proj\.weight)"}


def compile_families(families: Sequence[tuple[str, str]]) -> tuple[Rules, Rules]:
    """Rules for ``rename`` from pairs of families of names, in either direction.

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


def rename(key: str, rules: Rules) -> str | None:
    """The other name of a key; None where no rule knows it."""
    for pattern, template in rules:
        if match := pattern.fullmatch(key):
            return template.format(*match.groups())
    return None


_TO_NATIVE, _TO_ORIGINAL = compile_families(_FAMILIES)


def original_to_native(key: str) -> str | None:
    """Our `SamMed2D` name of an original SAM or SAM-Med2D name; None if it is no such name."""
    return rename(key, _TO_NATIVE)


def native_to_original(key: str) -> str | None:
    """Original SAM or SAM-Med2D name of one of our `SamMed2D` names; None if it is no such name."""
    return rename(key, _TO_ORIGINAL)


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
        return _sam_config(state), _mask_config(state)
    except KeyError as error:
        raise MedPLIBError(
            f"the SAM weights lack {error.args[0]}; expected the names of segment-anything or SAM-Med2D, "
            "so give their .pth file or the checkpoint that holds them"
        ) from error


def _sam_config(state: Mapping[str, Tensor]) -> SamConfig:
    vision = _vision_sizes(state)
    prompt_width = state["prompt_encoder.no_mask_embed.weight"].shape[1]
    return SamConfig(
        vision_config=vision,
        prompt_encoder_config={
            "hidden_size": prompt_width,
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "mask_input_channels": state["prompt_encoder.mask_downscaling.3.weight"].shape[0],
            "num_point_embeddings": _count(state, r"prompt_encoder\.point_embeddings\.(\d+)\."),
        },
        mask_decoder_config=_decoder_sizes(state, prompt_width),
    )


def _vision_sizes(state: Mapping[str, Tensor]) -> dict:
    width, channels, patch, _ = state["image_encoder.patch_embed.proj.weight"].shape
    grid = state["image_encoder.pos_embed"].shape[1]
    depth = _count(state, r"image_encoder\.blocks\.(\d+)\.")
    reach = [(state[f"image_encoder.blocks.{i}.attn.rel_pos_h"].shape[0] + 1) // 2 for i in range(depth)]
    windows = {size for size in reach if size != grid}
    if len(windows) > 1:
        raise MedPLIBError(
            f"the SAM image encoder has attention windows of {sorted(windows)} patches; one size is supported"
        )
    head_width = state["image_encoder.blocks.0.attn.rel_pos_h"].shape[1]
    mlp_width = state["image_encoder.blocks.0.mlp.lin1.weight"].shape[0]
    return {
        "hidden_size": width,
        "num_channels": channels,
        "patch_size": patch,
        "image_size": grid * patch,
        "num_hidden_layers": depth,
        "num_attention_heads": width // head_width,
        "mlp_dim": mlp_width,
        "mlp_ratio": mlp_width / width,
        "qkv_bias": "image_encoder.blocks.0.attn.qkv.bias" in state,
        "window_size": windows.pop() if windows else grid,
        "global_attn_indexes": [i for i, size in enumerate(reach) if size == grid],
        "output_channels": state["image_encoder.neck.0.weight"].shape[0],
        "num_pos_feats": state["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"].shape[1],
    }


def _decoder_sizes(state: Mapping[str, Tensor], width: int) -> dict:
    first = "mask_decoder.transformer.layers.0"
    iou_depth = _count(state, r"mask_decoder\.iou_prediction_head\.layers\.(\d+)\.")
    if iou_depth != 3:
        raise MedPLIBError(f"the SAM mask decoder's IoU head has {iou_depth} layers; the known SAM models have 3")
    return {
        "hidden_size": width,
        "mlp_dim": state[f"{first}.mlp.lin1.weight"].shape[0],
        "num_hidden_layers": _count(state, r"mask_decoder\.transformer\.layers\.(\d+)\."),
        "attention_downsample_rate": width // state[f"{first}.cross_attn_token_to_image.q_proj.weight"].shape[0],
        "num_multimask_outputs": state["mask_decoder.mask_tokens.weight"].shape[0] - 1,
        "iou_head_depth": iou_depth,
        "iou_head_hidden_dim": state["mask_decoder.iou_prediction_head.layers.0.weight"].shape[0],
        "layer_norm_eps": 1e-5,
    }


def _mask_config(state: Mapping[str, Tensor]) -> MaskConfig:
    gate = state.get("image_encoder.blocks.0.Adapter.channel.0.weight")  # [hidden, width]
    if gate is None:
        return MaskConfig(adapter=False)
    return MaskConfig(adapter=True, adapter_mlp_ratio=gate.shape[0] / gate.shape[1])


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the largest index that ``pattern`` captures at the start of a key; 0 if none."""
    return max((int(match[1]) + 1 for key in state if (match := re.match(pattern, key))), default=0)
