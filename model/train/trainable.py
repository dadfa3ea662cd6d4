"""Which weights learn: parts trained in full by name, LoRA inside decoder layers, everything else frozen."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import nn

from model.errors import MedPLIBError
from model.train.quantised import told_to_peft

if TYPE_CHECKING:
    from model.train.recipe import Lora

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

_ADAPTER = "default"
_LORA_PARAMETER = re.compile(r"\.lora_[AB]\.")


def lora_modules(model: nn.Module, targets: Iterable[str]) -> list[str]:
    """Full names of the linear layers that ``targets`` mean in this network, the mixture's experts included."""
    patterns = [re.compile(LORA_TARGETS[target]) for target in targets]
    return [name for name, _ in model.named_modules() if any(pattern.fullmatch(name) for pattern in patterns)]


def add_lora(model: nn.Module, lora: Lora) -> list[str]:
    """Put LoRA adapters into the network in place, and return the adapted modules; rank 0 adds none.

    Raises:
        MedPLIBError: the targets match nothing.
    """
    if not lora.rank:
        return []
    from peft import LoraConfig, inject_adapter_in_model

    names = lora_modules(model, lora.targets)
    if not names:
        raise MedPLIBError(f"lora.targets ({', '.join(lora.targets)}) match no module of this network")
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names)  # type: ignore[arg-type]
    told = told_to_peft(lora.quantise)
    vars(model).update(told)
    inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    for name in told:
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
