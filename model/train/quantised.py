"""Frozen decoder weights in 8 or 4 bits under LoRA (QLoRA, Dettmers et al. 2023), by bitsandbytes.

Only the linear layers of attention, feed-forward networks and experts are quantised; routers, projector, embeddings and
``lm_head`` stay. LoRA is trained against the rounded weights, so merging adds it to those, dequantised: the checkpoint
that is handed on computes what was trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn

from model.errors import MedPLIBError

Scheme = Literal["none", "int8", "nf4"]

_KEPT = ("residual_coefficient",)  # like routers, a gate of a few numbers that decides much
_OUTLIERS = 6.0
"""On CUDA, int8 rounds activations too, but for those above (LLM.int8's own value); a CPU rounds weights alone."""


def missing_library(scheme: Scheme) -> list[str]:
    """What to tell where bitsandbytes is wanted and not there; nothing otherwise."""
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


def told_to_peft(scheme: Scheme) -> dict[str, bool]:
    """Attributes by which ``peft`` knows how a network's weights are kept."""
    return {"is_loaded_in_8bit": scheme == "int8", "is_loaded_in_4bit": scheme == "nf4"}


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
