"""Where torch's 4-bit kernels want which code: packing, the kernels themselves, and the way back.

The kernels' layouts are torch's own affair and differ between devices. None of them is written down here: which code
ends up where is learnt by packing numbered codes once, so that packed weights can be read back (to save or move them,
or to multiply many rows at once, at which these kernels are slow).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

ANY = 1 << 62
_CUDA_ROWS = 64  # beyond, dequantising for a dense product is cheaper than the kernel's passes of 16 rows
_GROUPS = (32, 64, 128, 256)


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

    def multiply(self, rows: Tensor, packed: Tensor, group_size: int, scale: Tensor) -> Tensor:
        """Products bfloat16 [M, N] of rows bfloat16 [M, K], contiguous; scales bfloat16 [K / group, N, 2]."""
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
    return layout if outputs % layout.block == 0 and _works(layout, inputs, group_size, device) else None


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
def _works(layout: Int4Layout, inputs: int, group_size: int, device: torch.device) -> bool:
    """Whether packing can be undone and the kernel gives the right products; tried on two blocks of a small weight."""
    if layout.device == "cpu" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return False  # there are kernels for anything, but these are the fast ones
    outputs = 2 * layout.block
    numbers = torch.arange(outputs * inputs, device=device)
    codes = (numbers * 7919 % 1009 % 16).to(torch.uint8).view(outputs, inputs)
    rows = ((torch.arange(3 * inputs, device=device) * 31 % 17 - 8).view(3, inputs) / 8).to(torch.bfloat16)
    scale = torch.ones(inputs // group_size, outputs, 2, dtype=torch.bfloat16, device=device)
    scale[..., 0], scale[..., 1] = 0.25, -0.5
    try:
        packed = layout.pack(codes)
        found = layout.multiply(rows, packed, group_size, scale)
        if not torch.equal(layout.unpack(packed, outputs, inputs), codes):
            return False
    except (RuntimeError, AttributeError):  # not in this build of torch, or not for this device
        return False
    expected = functional.linear(rows.float(), (codes.float() - 8) * 0.25 - 0.5)
    return torch.allclose(found.float(), expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))
