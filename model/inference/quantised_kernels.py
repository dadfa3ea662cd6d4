"""Kernels for products with 8-bit and 4-bit weights: which of them serves a device, and how 4-bit codes are packed.

The layouts of torch's 4-bit kernels are torch's own affair and differ between devices. None of them is written down
here: which code ends up where is learnt by packing numbered codes once, so that packed weights can be read back (to
save or move them, or to multiply many rows at once, at which these kernels are slow).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

ANY = 1 << 62
_CPU_ROWS = 32  # beyond, a CPU that multiplies bfloat16 itself does better on a dense product
_CUDA_ROWS = 64  # beyond, dequantising for a dense product is cheaper than the 4-bit kernel's passes of 16 rows
_ALIGNMENT = 16  # torch's CPU kernel reads past the end of a row, and may crash, where this does not divide its length
_GROUPS = (32, 64, 128, 256)


@dataclass(frozen=True)
class Int8Kernel:
    """A kernel.

    Attributes:
        name: for people.
        multiply: products bfloat16 [M, N] of rows bfloat16 [M, K], codes int8 [N, K], scales bfloat16 [N].
        most_rows: it is not worth while beyond so many rows.
    """

    name: str
    multiply: Callable[[Tensor, Tensor, Tensor], Tensor]
    most_rows: int


def choose_int8_kernel(device: torch.device, inputs: int) -> Int8Kernel | None:
    """The kernel for weights [N, K] on a device; None where there is none."""
    if inputs % _ALIGNMENT:
        return None
    if device.type == "cpu":
        kernel = Int8Kernel("torch", _torch_kernel, _CPU_ROWS if multiplies_bfloat16() else ANY)
        return kernel if _has_fast_kernels() and _int8_works(kernel, device) else None
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from model.inference.decode_kernels import INT8_ROWS, multiply_int8

        kernel = Int8Kernel("Triton", multiply_int8, INT8_ROWS)
        return kernel if _int8_works(kernel, device) else None
    return None


def dense_type(device: torch.device) -> torch.dtype:
    """In which type dequantised weights are multiplied on a device."""
    return torch.float32 if device.type == "cpu" and not multiplies_bfloat16() else torch.bfloat16


@lru_cache(maxsize=1)
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 products."""
    asked = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(asked is not None and asked())


def _torch_kernel(rows: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return torch._weight_int8pack_mm(rows, codes, scale)


def _has_fast_kernels() -> bool:
    """There are CPU kernels for anything, but those for these are the fast ones."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def _is_right(multiply: Callable[[Tensor], Tensor], weight: Tensor) -> bool:
    """Whether ``multiply`` gives the products of a few rows bfloat16 [3, K] with a weight float32 [N, K]."""
    inputs = weight.shape[1]
    rows = ((torch.arange(3 * inputs, device=weight.device) * 31 % 17 - 8).view(3, inputs) / 8).to(torch.bfloat16)
    expected = functional.linear(rows.float(), weight)
    return torch.allclose(multiply(rows).float(), expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))


@lru_cache(maxsize=16)
def _int8_works(kernel: Int8Kernel, device: torch.device) -> bool:
    """Whether a kernel is there and gives the right products; tried on a small weight."""
    inputs, outputs = 4 * _ALIGNMENT, 24
    codes = (torch.arange(outputs * inputs, device=device) * 37 % 255 - 127).to(torch.int8).view(outputs, inputs)
    scale = torch.full((outputs,), 0.125, dtype=torch.bfloat16, device=device)
    try:
        return _is_right(lambda rows: kernel.multiply(rows, codes, scale), codes.float() * 0.125)
    except Exception:  # noqa: BLE001 - not in this build, not for this device, or it does not compile on this machine
        return False


# --- 4 bits -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Int4Layout:
    """One kernel and its packing.

    Attributes:
        device: type of device it runs on.
        block: outputs that are packed together, each block in the same way.
        tiles: the parameter of torch's packing; 16 · tiles inputs are packed together.
        most_rows: it is not worth while beyond so many rows.
    """

    device: Literal["cpu", "cuda"]
    block: int
    tiles: int
    most_rows: int
    name = "torch"

    def pack(self, codes: Tensor) -> Tensor:
        """Packed form of codes 0..15, uint8 [N, K]; half as many bytes."""
        if self.device == "cpu":
            return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), self.tiles)
        return torch.ops.aten._convert_weight_to_int4pack(join_nibbles(codes), self.tiles)

    def unpack(self, packed: Tensor, outputs: int, inputs: int) -> Tensor:
        """Codes 0..15, uint8 [N, K], of a packed weight."""
        places = _places(self, inputs, packed.device)  # [block · K]
        blocks = _stored_nibbles(packed).view(outputs // self.block, -1)
        return blocks[:, places].view(outputs, inputs)

    def multiply(self, rows: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
        """Products bfloat16 [M, N] of rows bfloat16 [M, K], contiguous; scales bfloat16 [K / group, N, 2]."""
        group_size = rows.shape[1] // len(scale)
        if self.device == "cpu":
            return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, group_size, scale)
        return torch.ops.aten._weight_int4pack_mm(rows, packed, group_size, scale)


def choose_layout(device: torch.device, outputs: int, inputs: int, group_size: int) -> Int4Layout | None:
    """The layout of a weight [N, K] on a device; None where its kernel does not take such a weight, or is not there."""
    if group_size not in _GROUPS or inputs % group_size:
        return None
    if device.type == "cpu":
        layout = Int4Layout("cpu", block=64, tiles=1, most_rows=ANY)
    elif device.type == "cuda":
        fitting = [tiles for tiles in (8, 4, 2) if inputs % (16 * tiles) == 0]
        if not fitting:
            return None
        layout = Int4Layout("cuda", block=8, tiles=fitting[0], most_rows=_CUDA_ROWS)
    else:
        return None
    return layout if outputs % layout.block == 0 and _int4_works(layout, inputs, group_size, device) else None


def join_nibbles(codes: Tensor) -> Tensor:
    """Two codes in each byte, the first in the upper half: uint8 [..., K / 2] of codes 0..15, uint8 [..., K]."""
    return codes[..., ::2] << 4 | codes[..., 1::2]


def split_nibbles(pairs: Tensor) -> Tensor:
    """Codes 0..15, uint8 [..., K], of bytes [..., K / 2]."""
    return torch.stack([pairs >> 4, pairs & 15], dim=-1).flatten(-2)


def _stored_nibbles(packed: Tensor) -> Tensor:
    return split_nibbles(packed.contiguous().view(torch.uint8).flatten())


@lru_cache(maxsize=32)
def _places(layout: Int4Layout, inputs: int, device: torch.device) -> Tensor:
    """Where each code of a block [block, K] is stored, long [block · K].

    Raises:
        RuntimeError: packing does not merely rearrange.
    """
    numbers = torch.arange(layout.block * inputs, device=device)
    stored = torch.zeros_like(numbers)
    for shift in range(0, int(numbers[-1]).bit_length(), 4):  # packed codes have four bits: number them digit by digit
        digit = ((numbers >> shift) & 15).to(torch.uint8).view(layout.block, inputs)
        stored += _stored_nibbles(layout.pack(digit)).long() << shift
    places = torch.empty_like(numbers)
    places[stored.clamp(max=len(numbers) - 1)] = numbers
    if not torch.equal(places.sort().values, numbers) or not torch.equal(stored[places], numbers):
        raise RuntimeError(f"torch's 4-bit packing for {layout.device} does not merely rearrange")
    return places


@lru_cache(maxsize=64)
def _int4_works(layout: Int4Layout, inputs: int, group_size: int, device: torch.device) -> bool:
    """Whether packing can be undone and the kernel gives the right products; tried on two blocks of a small weight."""
    if layout.device == "cpu" and not _has_fast_kernels():
        return False
    outputs = 2 * layout.block
    numbers = torch.arange(outputs * inputs, device=device)
    codes = (numbers * 7919 % 1009 % 16).to(torch.uint8).view(outputs, inputs)
    scale = torch.ones(inputs // group_size, outputs, 2, dtype=torch.bfloat16, device=device)
    scale[..., 0], scale[..., 1] = 0.25, -0.5
    try:
        packed = layout.pack(codes)
        right = _is_right(lambda rows: layout.multiply(rows, packed, scale), (codes.float() - 8) * 0.25 - 0.5)
        return right and torch.equal(layout.unpack(packed, outputs, inputs), codes)
    except (RuntimeError, AttributeError):  # not in this build of torch, or not for this device
        return False
