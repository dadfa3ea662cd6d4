"""Linear layers whose weights are kept in 8 or 4 bits; activations stay floating-point.

However a product is computed, activations enter it in bfloat16, sums are kept in float32, and scales are numbers that
bfloat16 holds exactly. So the fast kernels of a CPU or a GPU and the plain way (dequantise, then multiply) agree up to
the order of their sums and the rounding of weights and results to bfloat16.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.inference.int4_layouts import Int4Layout, choose_layout, join_nibbles, split_nibbles
from model.inference.int8_kernels import Int8Kernel, choose_int8_kernel, dense_type

INT8_LIMIT = 127
"""Largest 8-bit code; the smallest is its negative."""
INT4_LEVELS = 16
INT4_CENTRE = 8
"""The 4-bit code that stands for a group's centre."""


class QuantisedLinear(nn.Module):
    """A linear layer with integer weights.

    State dicts hold the codes in one portable form; in memory they lie as the kernel of the device at hand wants them,
    and are rearranged when the layer moves. Conversions of the model to another floating type leave the scales alone.

    Attributes:
        codes: the integers.
        scale: bfloat16, what turns them into weights.
        bias: [N] in the model's type, or None.
        has_lost_weights: tells what writes checkpoints that these weights are no longer those that were loaded.
    """

    has_lost_weights = True

    codes: Tensor
    scale: Tensor

    def __init__(self, out_features: int, in_features: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self.bias = bias

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs [..., N] in the type of ``inputs`` [..., K]; there may be no rows at all."""
        shape = (*inputs.shape[:-1], self.out_features)
        rows = inputs.reshape(-1, self.in_features)
        if not len(rows):
            return inputs.new_zeros(shape)
        outputs = self.multiply(rows.to(torch.bfloat16).contiguous()).to(inputs.dtype)
        if self.bias is not None:
            outputs = outputs + self.bias
        return outputs.view(shape)

    @abstractmethod
    def multiply(self, rows: Tensor) -> Tensor:
        """Products [M, N], bfloat16 or float32, of rows bfloat16 [M, K], M > 0, by the fastest way at hand."""

    @abstractmethod
    def multiply_plainly(self, rows: Tensor) -> Tensor:
        """The same by dequantising first: what every kernel is held to, and what runs where there is none."""

    @abstractmethod
    def dequantise(self) -> Tensor:
        """The weights, float32 [N, K]."""

    @abstractmethod
    def portable_codes(self) -> Tensor:
        """The codes as state dicts hold them."""

    @property
    @abstractmethod
    def kernel_name(self) -> str:
        """What multiplies few rows here, for people."""

    @abstractmethod
    def arrange(self, arranged: bool = True) -> None:
        """Bring portable codes into the form that the device's kernel wants, or back."""

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
    """Weights in 8 bits: one scale for each output, symmetric about zero.

    Args:
        weight: [N, K], any floating type.
        bias: [N], or None.
    """

    def __init__(self, weight: Tensor, bias: nn.Parameter | None = None) -> None:
        super().__init__(weight.shape[0], weight.shape[1], bias)
        codes, scale = quantise_int8(weight)
        self.register_buffer("codes", codes)  # int8 [N, K]
        self.register_buffer("scale", scale)  # [N]
        self.kernel: Int8Kernel | None = None
        self.arrange()

    def multiply(self, rows: Tensor) -> Tensor:
        if self.kernel is None or len(rows) > self.kernel.most_rows:
            return self.multiply_plainly(rows)
        return self.kernel.multiply(rows, self.codes, self.scale)

    def multiply_plainly(self, rows: Tensor) -> Tensor:
        return functional.linear(rows.to(self.dense), self.codes.to(self.dense)).float() * self.scale.float()

    def dequantise(self) -> Tensor:
        return self.codes.float() * self.scale.float()[:, None]

    def portable_codes(self) -> Tensor:
        return self.codes

    @property
    def kernel_name(self) -> str:
        return "dequantised" if self.kernel is None else self.kernel.name

    def arrange(self, arranged: bool = True) -> None:
        self.kernel = choose_int8_kernel(self.codes.device, self.in_features) if arranged else None
        self.dense = dense_type(self.codes.device)


class Int4Linear(QuantisedLinear):
    """Weights in 4 bits: 16 evenly spaced levels for each group of neighbouring inputs, not symmetric about zero.

    A code q stands for (q − 8) · scale + centre. The two lie together in ``scale`` [K / group, N, 2], as torch's
    kernels on both kinds of device take them.

    Args:
        weight: [N, K], any floating type.
        bias: [N], or None.
        group_size: inputs that share a scale and a centre; divides K.
    """

    def __init__(self, weight: Tensor, bias: nn.Parameter | None = None, group_size: int = 64) -> None:
        super().__init__(weight.shape[0], weight.shape[1], bias)
        self.group_size = group_size
        codes, scale = quantise_int4(weight, group_size)
        self.register_buffer("codes", join_nibbles(codes))  # portable: uint8 [N, K / 2]
        self.register_buffer("scale", scale)
        self.layout: Int4Layout | None = None
        self.arrange()

    def multiply(self, rows: Tensor) -> Tensor:
        if self.layout is None or len(rows) > self.layout.most_rows:
            return self.multiply_plainly(rows)
        return self.layout.multiply(rows, self.codes, self.group_size, self.scale)

    def multiply_plainly(self, rows: Tensor) -> Tensor:
        dense = torch.float32 if rows.device.type == "cpu" else torch.bfloat16  # as the kernels there do
        return functional.linear(rows.to(dense), self.dequantise().to(dense))

    def dequantise(self) -> Tensor:
        groups = self._levels().view(self.out_features, -1, self.group_size)  # [N, K / group, group]
        scale, centre = self.scale.float().permute(2, 1, 0)[..., None]  # [N, K / group, 1] each
        return ((groups.float() - INT4_CENTRE) * scale + centre).view(self.out_features, self.in_features)

    def portable_codes(self) -> Tensor:
        return self.codes if self.layout is None else join_nibbles(self._levels())

    @property
    def kernel_name(self) -> str:
        return "dequantised" if self.layout is None else "torch"

    def arrange(self, arranged: bool = True) -> None:
        if not arranged:
            self.codes, self.layout = self.portable_codes(), None
            return
        layout = choose_layout(self.codes.device, self.out_features, self.in_features, self.group_size)
        if layout is not None:
            self.codes = layout.pack(split_nibbles(self.codes))
        self.layout = layout

    def _levels(self) -> Tensor:
        """Codes 0..15, uint8 [N, K]."""
        if self.layout is None:
            return split_nibbles(self.codes)
        return self.layout.unpack(self.codes, self.out_features, self.in_features)

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
