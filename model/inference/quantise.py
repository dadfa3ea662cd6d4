"""Weight-only quantisation of a loaded network: the decoder's linear layers in 8 or 4 bits, all else as it was.

However a product is computed, activations enter it in bfloat16, sums are kept in float32, and scales are numbers that
bfloat16 holds exactly. So the fast kernels of a CPU or a GPU and the plain way (dequantise, then multiply) agree up to
the order of their sums and the rounding of weights and results to bfloat16.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.errors import MedPLIBError
from model.inference.quantised_kernels import (
    Int4Layout,
    Int8Kernel,
    choose_int8_kernel,
    choose_layout,
    dense_type,
    join_nibbles,
    split_nibbles,
)
from model.modeling.medplib import MedPLIBForCausalLM

Scheme = Literal["int8", "int4"]

GROUP_SIZES = (32, 64, 128)
DEFAULT_GROUP_SIZE = 64
INT8_LIMIT = 127
"""Largest 8-bit code; the smallest is its negative."""
INT4_LEVELS = 16
INT4_CENTRE = 8
"""The 4-bit code that stands for a group's centre."""

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
    if scheme not in get_args(Scheme):
        raise MedPLIBError(f"unknown quantisation {scheme!r:.80}; known: {', '.join(get_args(Scheme))}")
    if scheme == "int8" and group_size is not None:
        raise MedPLIBError(f"group_size is {group_size}, but int8 has one scale per output; leave it out")
    if scheme == "int4":
        group_size = DEFAULT_GROUP_SIZE if group_size is None else group_size
        if group_size not in GROUP_SIZES:
            known = ", ".join(str(size) for size in GROUP_SIZES)
            raise MedPLIBError(f"group_size is {group_size}; the sizes known for int4 are {known}")
    roots = ["model.decoder.layers", *(["model.projector"] if include_projector else [])]
    modules = [named for root in roots for named in model.get_submodule(root).named_modules(prefix=root)]
    layers = {  # routers are of a type of their own and stay
        name: one for name, one in modules if type(one) is nn.Linear and name.rpartition(".")[2] not in _KEPT
    }
    del modules  # a layer's weight is to be free as soon as it is replaced
    _check_layers(model, layers, group_size)
    for name in list(layers):
        linear = layers.pop(name)
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


# --- layers -----------------------------------------------------------------------------------------------------------


class QuantisedLinear(nn.Module):
    """A linear layer with integer weights.

    State dicts hold the codes in one portable form; in memory they lie as the kernel of the device at hand wants them,
    and are rearranged when the layer moves. Conversions of the model to another floating type leave the scales alone.

    Attributes:
        codes: the integers.
        scale: bfloat16, what turns them into weights.
        bias: [N] in the model's type, or None.
        kernel: what multiplies few rows here; None where there is no such kernel.
        has_lost_weights: shows writers of checkpoints that these weights are no longer those that were loaded.
    """

    has_lost_weights = True

    codes: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, codes: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.kernel: Int8Kernel | Int4Layout | None = None
        self.arrange()

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs [..., N] in the type of ``inputs`` [..., K]; there may be no rows at all."""
        shape = (*inputs.shape[:-1], self.out_features)
        rows = inputs.reshape(-1, self.in_features)
        if not len(rows):
            return inputs.new_zeros(shape)
        rows = rows.to(torch.bfloat16).contiguous()
        if self.kernel is None or len(rows) > self.kernel.most_rows:
            outputs = self.multiply_plainly(rows)
        else:
            outputs = self.kernel.multiply(rows, self.codes, self.scale)
        outputs = outputs.to(inputs.dtype)
        if self.bias is not None:
            outputs = outputs + self.bias
        return outputs.view(shape)

    @abstractmethod
    def multiply_plainly(self, rows: Tensor) -> Tensor:
        """Products [M, N], bfloat16 or float32, of rows bfloat16 [M, K], M > 0, by dequantising first: what every
        kernel is held to, and what runs where there is none.
        """

    @abstractmethod
    def dequantise(self) -> Tensor:
        """The weights, float32 [N, K]."""

    @abstractmethod
    def portable_codes(self) -> Tensor:
        """The codes as state dicts hold them."""

    @abstractmethod
    def arrange(self, arranged: bool = True) -> None:
        """Bring portable codes into the form that the device's kernel wants, or back."""

    @property
    def kernel_name(self) -> str:
        """What multiplies few rows here, for people."""
        return "dequantised" if self.kernel is None else self.kernel.name

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantisedLinear:
        self.arrange(False)
        exact = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != exact.dtype:
            self.scale = exact.to(self.codes.device)
        self.arrange()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "codes"] = self.portable_codes()

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        self.arrange(False)
        super()._load_from_state_dict(*arguments, **options)
        self.arrange()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Int8Linear(QuantisedLinear):
    """Weights in 8 bits: codes int8 [N, K], one scale for each output, [N], symmetric about zero.

    Args:
        weight: [N, K], any floating type.
        bias: [N], or None.
    """

    def __init__(self, weight: Tensor, bias: nn.Parameter | None = None) -> None:
        super().__init__(weight, bias, *quantise_int8(weight))

    def multiply_plainly(self, rows: Tensor) -> Tensor:
        dense = dense_type(rows.device)
        return functional.linear(rows.to(dense), self.codes.to(dense)).float() * self.scale.float()

    def dequantise(self) -> Tensor:
        return self.codes.float() * self.scale.float()[:, None]

    def portable_codes(self) -> Tensor:
        return self.codes

    def arrange(self, arranged: bool = True) -> None:
        self.kernel = choose_int8_kernel(self.codes.device, self.in_features) if arranged else None


class Int4Linear(QuantisedLinear):
    """Weights in 4 bits: 16 evenly spaced levels for each group of neighbouring inputs, not symmetric about zero.

    A code q stands for (q − 8) · scale + centre. The two lie together in ``scale`` [K / group, N, 2], as torch's
    kernels on both kinds of device take them; portable codes are uint8 [N, K / 2].

    Args:
        weight: [N, K], any floating type.
        bias: [N], or None.
        group_size: inputs that share a scale and a centre; divides K.
    """

    kernel: Int4Layout | None

    def __init__(self, weight: Tensor, bias: nn.Parameter | None = None, group_size: int = 64) -> None:
        codes, scale = quantise_int4(weight, group_size)
        self.group_size = group_size
        super().__init__(weight, bias, join_nibbles(codes), scale)

    def multiply_plainly(self, rows: Tensor) -> Tensor:
        dense = torch.float32 if rows.device.type == "cpu" else torch.bfloat16  # as the kernels there do
        return functional.linear(rows.to(dense), self.dequantise().to(dense))

    def dequantise(self) -> Tensor:
        groups = self._levels().view(self.out_features, -1, self.group_size)  # [N, K / group, group]
        scale, centre = self.scale.float().permute(2, 1, 0)[..., None]  # [N, K / group, 1] each
        return ((groups.float() - INT4_CENTRE) * scale + centre).view(self.out_features, self.in_features)

    def portable_codes(self) -> Tensor:
        return self.codes if self.kernel is None else join_nibbles(self._levels())

    def arrange(self, arranged: bool = True) -> None:
        if not arranged:
            self.codes, self.kernel = self.portable_codes(), None
            return
        kernel = choose_layout(self.codes.device, self.out_features, self.in_features, self.group_size)
        if kernel is not None:
            self.codes = kernel.pack(split_nibbles(self.codes))
        self.kernel = kernel

    def _levels(self) -> Tensor:
        """Codes 0..15, uint8 [N, K]."""
        if self.kernel is None:
            return split_nibbles(self.codes)
        return self.kernel.unpack(self.codes, self.out_features, self.in_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group_size={self.group_size}"


def quantise_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [N, K] in ±127 and scales bfloat16 [N] of a weight [N, K], rounded to the nearest."""
    values = weight.detach().float()
    scale = _rounded(values.abs().amax(dim=1) / INT8_LIMIT)
    codes = (values / scale.float()[:, None]).round().clamp(-INT8_LIMIT, INT8_LIMIT)
    return codes.to(torch.int8), scale


def quantise_int4(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes 0..15, uint8 [N, K], and (scale, centre) bfloat16 [K / group, N, 2] of a weight [N, K].

    The levels of a group reach from its smallest to its largest weight.
    """
    groups = weight.detach().float().view(len(weight), -1, group_size)  # [N, K / group, group]
    low, high = groups.amin(dim=-1), groups.amax(dim=-1)
    centre = (low + (high - low) * (INT4_CENTRE / (INT4_LEVELS - 1))).to(torch.bfloat16)
    # The centre is rounded; the scale makes up for it, so that both ends stay within reach.
    reach = torch.maximum(
        (centre.float() - low) / INT4_CENTRE, (high - centre.float()) / (INT4_LEVELS - 1 - INT4_CENTRE)
    )
    scale = _rounded(reach)
    steps = (groups - centre.float()[..., None]) / scale.float()[..., None]
    codes = (steps.round() + INT4_CENTRE).clamp(0, INT4_LEVELS - 1)
    return codes.to(torch.uint8).view(weight.shape), torch.stack([scale, centre], dim=-1).transpose(0, 1).contiguous()


def _rounded(scale: Tensor) -> Tensor:
    """Scales as bfloat16; 1 where all weights are the same, so that nothing is divided by zero."""
    rounded = scale.to(torch.bfloat16)
    return torch.where(rounded > 0, rounded, torch.ones_like(rounded))
