"""Products with 8-bit weights: the kernels at hand, and which of them serves a device."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

ANY = 1 << 62
_CPU_ROWS = 32  # beyond, a CPU that multiplies bfloat16 itself does better on a dense product
_ALIGNMENT = 16  # torch's CPU kernel reads past the end of a row, and may crash, where this does not divide its length


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
        fast = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
        return kernel if fast and _works(kernel, device) else None
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from model.inference.int8_triton import MOST_ROWS, multiply_int8

        kernel = Int8Kernel("Triton", multiply_int8, MOST_ROWS)
        return kernel if _works(kernel, device) else None
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


def _cannot_run() -> tuple[type[Exception], ...]:
    """What is raised where a kernel is not in this build, not for this device, or does not compile on this machine."""
    kinds: tuple[type[Exception], ...] = (RuntimeError, AttributeError, OSError, subprocess.SubprocessError)
    if importlib.util.find_spec("triton") is not None:
        from triton.errors import TritonError

        kinds = (*kinds, TritonError)
    return kinds


@lru_cache(maxsize=16)
def _works(kernel: Int8Kernel, device: torch.device) -> bool:
    """Whether a kernel is there and gives the right products; tried on a small weight."""
    inputs, outputs = 4 * _ALIGNMENT, 24
    codes = (torch.arange(outputs * inputs, device=device) * 37 % 255 - 127).to(torch.int8).view(outputs, inputs)
    rows = ((torch.arange(3 * inputs, device=device) * 31 % 17 - 8).view(3, inputs) / 8).to(torch.bfloat16)
    scale = torch.full((outputs,), 0.125, dtype=torch.bfloat16, device=device)
    try:
        found = kernel.multiply(rows, codes, scale)
    except _cannot_run():
        return False
    expected = functional.linear(rows.float(), codes.float()) * 0.125
    return torch.allclose(found.float(), expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))
