"""Merge low-rank adapters into the weights they adapt: merged = W + (alpha / rank) · B · A."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from model.errors import MedPLIBError

MATRIX = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
_SAVED = re.compile(r"\.modules_to_save\.[^.]+\.")  # peft's trained copy, beside the untouched original_module
_WRAPPER = "base_model.model."


def merge_lora(model: nn.Module) -> nn.Module:
    """Merge every ``peft`` LoRA layer, inside experts too, and give back the plain network.

    Args:
        model: a ``PeftModel``, or a network that LoRA layers were injected into.

    Returns:
        The network without any trace of ``peft``: its state dict has the native names again.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    for name, module in list(plain.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            replacement = module.get_base_layer()
        elif isinstance(module, ModulesToSaveWrapper):
            (active,) = module.active_adapters
            replacement = module.modules_to_save[active]
        else:
            continue
        parent, _, attribute = name.rpartition(".")
        setattr(plain.get_submodule(parent), attribute, replacement)
    for leftover in ("peft_config", "_hf_peft_config_loaded"):
        if leftover in vars(plain):
            delattr(plain, leftover)
    return plain


def merge_lora_state(state: Mapping[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """Merge the LoRA tensors of a state dict as ``peft`` names them, and take its wrapper off the names.

    Products are computed in float32 and stored in the weight's own type.

    Args:
        state: with ``X.base_layer.weight`` (or ``X.weight``) beside ``X.lora_A.default.weight`` and ``lora_B``.
        scaling: alpha / rank.

    Raises:
        MedPLIBError: an adapter lacks its other half or its weight.
    """
    plain = {name.removeprefix(_WRAPPER): value for name, value in state.items() if ".original_module." not in name}
    pairs: dict[str, dict[str, Tensor]] = {}
    merged: dict[str, Tensor] = {}
    for name, value in plain.items():
        if match := MATRIX.fullmatch(name):
            pairs.setdefault(match["module"], {})[match["side"]] = value
        else:
            merged[_SAVED.sub(".", name).replace(".base_layer.", ".")] = value
    for module, pair in pairs.items():
        weight = merged.get(f"{module}.weight")
        if weight is None or len(pair) != 2:
            raise MedPLIBError(f"the LoRA of {module} is incomplete; expected lora_A, lora_B and the weight itself")
        update = scaling * (pair["B"].float() @ pair["A"].float())
        merged[f"{module}.weight"] = (weight.float() + update).to(weight.dtype)
    return merged
