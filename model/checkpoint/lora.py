"""Merge low-rank adapters into the weights they adapt (W + (alpha / rank) · B · A), and read them as ``peft`` saves.

Beside the adapter of a directory there may be weights that were trained whole: ``peft``'s modules to save in the same
file, and the ``non_lora_trainables.bin`` of LLaVA-like training programs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.checkpoint.directories import ADAPTER_CONFIG
from model.checkpoint.names import published_to_native
from model.checkpoint.report import is_finite, refuse_faulty
from model.checkpoint.shards import read_tensors
from model.errors import MedPLIBError
from model.modeling.medplib import MedPLIBForCausalLM

MATRIX = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
_SAVED = re.compile(r"\.modules_to_save\.[^.]+\.")  # peft's trained copy, beside the untouched original_module
_WRAPPER = "base_model.model."
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_TRAINED_WHOLE = "non_lora_trainables.bin"
_PREFIX = re.compile(r"^(?:base_model\.model\.)?(?:module\.)?")
_OTHER_METHODS = ("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "lora_bias")


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


@torch.no_grad()
def merge_adapter(model: MedPLIBForCausalLM, directory: str | Path) -> MedPLIBForCausalLM:
    """Merge a LoRA directory into a network in place; nothing changes where the directory does not fit.

    Args:
        model: the network it was trained on, not quantised.
        directory: ``adapter_config.json`` and ``adapter_model.safetensors`` or ``.bin``, with our parameter names or
            the published ones.

    Returns:
        The same network.

    Raises:
        MedPLIBError: the directory holds no plain LoRA, or one of another network.
    """
    folder = Path(directory)
    scaling = _scaling(folder)
    parameters = dict(model.named_parameters())
    pairs, whole = _sorted(folder, parameters)
    for name, pair in pairs.items():
        if len(pair) != 2:
            raise _misfit(folder, f"{name} has only lora_{next(iter(pair))}")
        shape = parameters[name].shape
        fits = pair["A"].dim() == pair["B"].dim() == 2 and pair["A"].shape[0] == pair["B"].shape[1]
        if not fits or (pair["B"].shape[0], pair["A"].shape[1]) != tuple(shape):
            sizes = " and ".join(f"{list(pair[side].shape)}" for side in "BA")
            raise _misfit(folder, f"{name} is {list(shape)}, and its matrices are {sizes}")
    tensors = [*((name, value) for name, pair in pairs.items() for value in pair.values()), *whole.items()]
    refuse_faulty([name for name, value in tensors if not is_finite(value)], f"the LoRA weights in {folder}")
    for name, value in whole.items():
        if value.shape != parameters[name].shape:
            raise _misfit(folder, f"{name} is {list(value.shape)} there and {list(parameters[name].shape)} here")
    for name, value in whole.items():
        parameters[name].copy_(value)
    for name, pair in pairs.items():
        weight = parameters[name]
        state = {
            "x.weight": weight,
            **{f"x.lora_{side}.weight": value.to(weight.device) for side, value in pair.items()},
        }
        weight.copy_(merge_lora_state(state, scaling)["x.weight"])
    return model


def _scaling(folder: Path) -> float:
    try:
        config: Any = json.loads((folder / ADAPTER_CONFIG).read_bytes())
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MedPLIBError(f"{folder / ADAPTER_CONFIG} is no readable LoRA configuration; copy it again") from error
    other = [name for name in _OTHER_METHODS if config.get(name)]
    if config.get("peft_type", "LORA") != "LORA" or config.get("bias", "none") != "none" or other or rank < 1:
        what = ", ".join([str(config.get("peft_type")), *other])
        raise MedPLIBError(f"{folder} is not a plain LoRA ({what}); merge it with peft and give the whole network")
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _sorted(folder: Path, parameters: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """LoRA matrices A and B by the weight they change, and weights that were trained whole; by our names."""
    pairs: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    unknown = []
    weights = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise MedPLIBError(f"{folder} holds no {' or '.join(_WEIGHTS)}; copy it again")
    files = [path for path in (weights, folder / _TRAINED_WHOLE) if path.is_file()]
    for stored, value in (item for path in files for item in read_tensors(path)):
        name = _PREFIX.sub("", stored)
        match = MATRIX.fullmatch(name)
        wanted = f"{match['module']}.weight" if match else name
        ours = wanted if wanted in parameters else published_to_native(wanted)
        if ours is None or ours not in parameters:
            unknown.append(stored)
        elif match:
            pairs.setdefault(ours, {})[match["side"]] = value
        else:
            whole[ours] = value
    if unknown:
        raise _misfit(folder, f"{len(unknown)} of its tensors belong nowhere, such as {unknown[0]}")
    if not pairs:
        raise MedPLIBError(f"{folder} holds no LoRA weights; give the directory that peft saved")
    return pairs, whole


def _misfit(folder: Path, why: str) -> MedPLIBError:
    return MedPLIBError(f"the LoRA in {folder} is of another network: {why}; give the one that it was trained on")
