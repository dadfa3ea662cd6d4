"""Which weights learn: parts trained in full by name, LoRA inside decoder layers, everything else frozen.

Under LoRA the frozen decoder weights may be kept in 8 or 4 bits (QLoRA, Dettmers et al. 2023), by bitsandbytes: the
linear layers of attention, feed-forward networks and experts; routers, projector, embeddings and ``lm_head`` stay. LoRA
is trained against the rounded weights, so merging adds it to those, dequantized: the checkpoint computes what was
trained.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from model.errors import MedPLIBError

if TYPE_CHECKING:
    from model.train.recipe import Lora

Scheme = Literal["none", "int8", "nf4"]

_KEPT = ("residual_coefficient",)  # like routers, a gate of a few numbers that decides much
_OUTLIERS = 6.0
"""On CUDA, int8 rounds activations too, but for those above (LLM.int8's own value); a CPU rounds weights alone."""

PARTS: Mapping[str, str] = {
    "lm_head": r"lm_head\.",
    "embed_tokens": r"model\.decoder\.embed_tokens\.",
    "layer_norms": r"model\.decoder\.layers\.\d+\.(input|post_attention)_layernorm\.",
    "final_norm": r"model\.decoder\.norm\.",
    "attention": r"model\.decoder\.layers\.\d+\.self_attn\.",
    "feed_forward": r"model\.decoder\.layers\.\d+\.mlp\.(?!router\.)",  # experts included
    "router": r"model\.decoder\.layers\.\d+\.mlp\.(router|residual_coefficient)\.",
    "decoder": r"model\.decoder\.",
    "projector": r"model\.projector\.",
    "region_adapter": r"model\.region_adapter\.",
    "mask_head": r"model\.mask_head\.",
    "mask_decoder": r"model\.sam\.mask_decoder\.",
    "prompt_encoder": r"model\.sam\.prompt_encoder\.",
    "sam_adapters": r"model\.sam\.image_encoder\.layers\.\d+\.adapter\.",
    "sam_image_encoder": r"model\.sam\.image_encoder\.",
    "vision_tower": r"model\.vision_tower\.",
    "token_compressor": r"model\.token_compressor\.",
    "mask_encoder": r"model\.mask_encoder\.",
}
"""Names that a recipe's ``trainable`` list takes, and the parameters (native names) that each means.

A list entry ``re:PATTERN`` names parameters by a regular expression of its own.
"""

_ATTENTION = r"model\.decoder\.layers\.\d+\.self_attn\.{}_proj"
_FEED_FORWARD = r"model\.decoder\.layers\.\d+\.mlp\.(experts\.\d+\.|residual_expert\.)?{}_proj"
LORA_TARGETS: Mapping[str, str] = {
    **{name: _ATTENTION.format(name) for name in ("q", "k", "v", "o")},
    **{name: _FEED_FORWARD.format(name) for name in ("gate", "up", "down")},
}
"""Names that ``lora.targets`` takes, and the modules that each means."""

_LORA_PARAMETER = re.compile(r"\.lora_[AB]\.")


def add_lora(model: nn.Module, lora: Lora) -> list[str]:
    """Put LoRA adapters into the network in place, and return the adapted modules; rank 0 adds none.

    Raises:
        MedPLIBError: the targets match nothing.
    """
    if not lora.rank:
        return []
    from peft import LoraConfig, inject_adapter_in_model

    patterns = [re.compile(LORA_TARGETS[target]) for target in lora.targets]
    names = [name for name, _ in model.named_modules() if any(pattern.fullmatch(name) for pattern in patterns)]
    if not names:
        raise MedPLIBError(f"lora.targets ({', '.join(lora.targets)}) match no module of this network")
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names)  # type: ignore[arg-type]
    loaded = {"is_loaded_in_8bit": lora.quantise == "int8", "is_loaded_in_4bit": lora.quantise == "nf4"}  # for peft
    vars(model).update(loaded)
    inject_adapter_in_model(config, model, adapter_name="default")
    for name in loaded:
        delattr(model, name)
    return names


def set_trainable(model: nn.Module, parts: Iterable[str]) -> None:
    """Freeze everything but LoRA weights and the named parts.

    Raises:
        MedPLIBError: a part matches no parameter of this network.
    """
    patterns = {part: re.compile(part.removeprefix("re:") if part.startswith("re:") else PARTS[part]) for part in parts}
    used: set[str] = set()
    for name, parameter in model.named_parameters():
        native = native_name(name)
        matching = [part for part, pattern in patterns.items() if pattern.match(native)]
        used.update(matching)
        if matching and not parameter.is_floating_point():
            raise MedPLIBError(f"trainable names {matching[0]}, but lora.quantise keeps {native} as integers")
        parameter.requires_grad_(bool(matching) or is_lora(name))
    unused = [part for part in patterns if part not in used]
    if unused:
        raise MedPLIBError(f"trainable names {', '.join(unused)}, which this network does not have")


def is_lora(name: str) -> bool:
    """Whether a parameter is a LoRA matrix."""
    return bool(_LORA_PARAMETER.search(name))


def native_name(name: str) -> str:
    """A parameter's name without what LoRA puts in it: ``q_proj.base_layer.weight`` is ``q_proj.weight``."""
    return name.replace(".base_layer.", ".")


def count_trainable(model: nn.Module) -> dict[str, int]:
    """Trainable parameters of each part, LoRA apart, with their ``total``; parts without any are left out."""
    counts: dict[str, int] = {}
    narrow_first = sorted(PARTS, key=lambda part: -len(PARTS[part]))
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        native = native_name(name)
        part = "lora" if is_lora(name) else next((p for p in narrow_first if re.match(PARTS[p], native)), "other")
        size = getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 keeps the true size apart
        size *= getattr(parameter, "ranks_of_experts", 1)  # as many again lie on each of the other ranks
        counts[part] = counts.get(part, 0) + size
    counts["total"] = sum(counts.values())
    return counts


# --- frozen weights in few bits ---------------------------------------------------------------------------------------


def missing_library(scheme: Scheme) -> list[str]:
    """The error where bitsandbytes is wanted and absent; empty otherwise."""
    if scheme == "none" or find_spec("bitsandbytes"):
        return []
    return [
        f"lora.quantise is {scheme}, which needs bitsandbytes, and that is not installed; install the gpu extra "
        "(pip install -e .[gpu]) or set lora.quantise=none"
    ]


def quantise_decoder(network: nn.Module, scheme: Scheme, device: str) -> None:
    """Quantise the decoder's linear layers in place, one at a time, before LoRA is added.

    Args:
        network: with floating-point weights, on any device.
        scheme: ``int8`` (a scale per output), ``nf4`` (4 bits, a scale per 64 weights, those scales in 8 bits), or
            ``none``, which changes nothing.
        device: where the layers are rounded and stay; other parts stay where they are.

    Raises:
        MedPLIBError: bitsandbytes is not installed.
    """
    if scheme == "none":
        return
    if problems := missing_library(scheme):
        raise MedPLIBError(problems[0])
    for name, linear in list(decoder_linears(network)):
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, _rounded(linear, scheme, device).to(device))


def is_quantised(network: nn.Module) -> bool:
    """Whether ``quantise_decoder`` rounded weights of this network."""
    return any(_is_rounded(module) for module in network.modules())


@torch.no_grad()
def merge_quantised(network: nn.Module) -> None:
    """Turn quantised layers, and LoRA on them, back into plain linear layers on the CPU, in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    dtype = network.get_parameter("lm_head.weight").dtype
    for name, module in list(network.named_modules()):
        adapted = isinstance(module, BaseTunerLayer)
        base = module.get_base_layer() if adapted else module
        if not _is_rounded(base) or (not adapted and name.endswith(".base_layer")):
            continue
        weight = _dequantised(base)
        if adapted:
            for adapter in module.active_adapters:
                weight += module.get_delta_weight(adapter).float()
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, _plain(weight.to(dtype).cpu(), base.bias))


def decoder_linears(network: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers that ``quantise_decoder`` rounds, by name."""
    root = "model.decoder.layers"
    for name, module in network.get_submodule(root).named_modules(prefix=root):
        if type(module) is nn.Linear and name.rpartition(".")[2] not in _KEPT:
            yield name, module


def _rounded(linear: nn.Linear, scheme: Scheme, device: str) -> nn.Module:
    import bitsandbytes

    layers: Any = bitsandbytes.nn
    sizes = (linear.in_features, linear.out_features, linear.bias is not None)
    if scheme == "int8":
        threshold = 0.0 if device == "cpu" else _OUTLIERS
        layer = layers.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=threshold, device="meta")
        layer.weight = layers.Int8Params(linear.weight.detach(), requires_grad=False, has_fp16_weights=False)
    else:
        layer = layers.Linear4bit(*sizes, compute_dtype=linear.weight.dtype, quant_type="nf4", device="meta")
        layer.support_avx512bf16_for_cpu = False  # it would round the scales anew at the first validation
        layer.weight = layers.Params4bit(linear.weight.detach(), requires_grad=False, quant_type="nf4", module=layer)
    layer.bias = linear.bias
    return layer


def _is_rounded(module: nn.Module) -> bool:
    return type(module).__module__.startswith("bitsandbytes.") and hasattr(module, "weight")


def _dequantised(layer: Any) -> torch.Tensor:
    """Float32 [outputs, inputs]."""
    from peft.utils.integrations import dequantize_bnb_weight

    return dequantize_bnb_weight(layer.weight, state=getattr(layer, "state", None)).detach().float().clone()


def _plain(weight: torch.Tensor, bias: nn.Parameter | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().cpu(), requires_grad=False)
    return linear
