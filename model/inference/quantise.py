"""Weight-only quantisation of a loaded network: the decoder's linear layers in 8 or 4 bits, all else as it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import nn

from model.errors import MedPLIBError
from model.inference.quantised_linear import Int4Linear, Int8Linear, QuantisedLinear
from model.modeling.medplib import MedPLIBForCausalLM

Scheme = Literal["int8", "int4"]

GROUP_SIZES = (32, 64, 128)
DEFAULT_GROUP_SIZE = 64

_KEPT = ("residual_coefficient",)  # like routers, a gate of a few numbers that decides much


@torch.no_grad()
def quantise(
    model: MedPLIBForCausalLM, scheme: Scheme, *, group_size: int | None = None, include_projector: bool = False
) -> MedPLIBForCausalLM:
    """Quantise the decoder's attention, feed-forward networks and experts in place; one layer at a time.

    ``int8`` keeps a scale per output and is symmetric about zero. ``int4`` keeps a scale and a centre per group of
    inputs (asymmetric). Embeddings, ``lm_head``, norms, routers, CLIP, SAM and the mask head stay as they are.

    Args:
        model: on any device, in any floating type.
        scheme: ``int8`` or ``int4``.
        group_size: of ``int4``: 32, 64 (the default) or 128; small groups are more exact and larger.
        include_projector: quantise the projector too.

    Returns:
        The same network.

    Raises:
        MedPLIBError: it is quantised already, holds unmerged LoRA or no values, its sizes do not divide into groups, or
            the scheme is unknown. The network is untouched then.
    """
    group_size = _check_scheme(scheme, group_size)
    layers = dict(_layers(model, include_projector))
    _check_layers(model, layers, group_size)
    for name in list(layers):
        linear = layers.pop(name)  # so that its weight is free as soon as it is replaced
        bias = linear.bias
        replacement: QuantisedLinear = (
            Int8Linear(linear.weight, bias) if group_size is None else Int4Linear(linear.weight, bias, group_size)
        )
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, replacement.train(linear.training))
        del linear
    return model


def quantisation_of(model: nn.Module) -> Scheme | None:
    """The scheme that a network is quantised with, None for one that is not."""
    for module in model.modules():
        if isinstance(module, QuantisedLinear):
            return "int4" if isinstance(module, Int4Linear) else "int8"
    return None


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones counted once."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _check_scheme(scheme: str, group_size: int | None) -> int | None:
    """The group size to use; None for ``int8``."""
    if scheme not in get_args(Scheme):
        raise MedPLIBError(f"unknown quantisation {scheme!r:.80}; known: {', '.join(get_args(Scheme))}")
    if scheme == "int8":
        if group_size is not None:
            raise MedPLIBError(f"group_size is {group_size}, but int8 has one scale per output; leave it out")
        return None
    chosen = DEFAULT_GROUP_SIZE if group_size is None else group_size
    if chosen not in GROUP_SIZES:
        known = ", ".join(str(size) for size in GROUP_SIZES)
        raise MedPLIBError(f"group_size is {chosen}; the sizes known for int4 are {known}")
    return chosen


def _layers(model: MedPLIBForCausalLM, include_projector: bool) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers to quantise, by name; routers are of a type of their own and stay."""
    roots = ["model.decoder.layers", *(["model.projector"] if include_projector else [])]
    for root in roots:
        for name, module in model.get_submodule(root).named_modules(prefix=root):
            if type(module) is nn.Linear and name.rpartition(".")[2] not in _KEPT:
                yield name, module


def _check_layers(model: nn.Module, layers: dict[str, nn.Linear], group_size: int | None) -> None:
    already = quantisation_of(model)
    if already is not None:
        raise MedPLIBError(f"the network is quantised already ({already}); load it again to quantise it otherwise")
    lora = next((name for name, _ in model.named_parameters() if ".lora_" in name), None)
    if lora is not None:
        raise MedPLIBError(f"the network holds unmerged LoRA weights ({lora}, …); merge them before quantising")
    for name, linear in layers.items():
        if linear.weight.is_meta or not linear.weight.numel():
            raise MedPLIBError(f"{name} holds no values; load the network's weights before quantising")
        inputs = linear.in_features
        if group_size is not None and inputs % group_size:
            fitting = [str(size) for size in GROUP_SIZES if inputs % size == 0]
            instead = f"group_size {' or '.join(fitting)}" if fitting else "int8"
            raise MedPLIBError(
                f"{name} has {inputs} inputs, which do not divide into groups of {group_size}; try {instead}"
            )
        if not bool(linear.weight.isfinite().all()):
            raise MedPLIBError(f"{name} holds weights that are not finite numbers; the checkpoint is damaged")
