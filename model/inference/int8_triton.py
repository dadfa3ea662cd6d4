"""Products of few rows with 8-bit weights on a GPU, as a Triton kernel that reads every weight once, as a byte.

Import it only where Triton is installed: it comes with torch's CUDA build.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_ROWS = 64
"""Above so many rows the product is no longer bound by reading weights, and a dense one does as well."""

_OUTPUTS, _STAGES, _WARPS = 32, 4, 4  # each step reads 4 to 8 KiB of weights, several steps are in flight


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    rows,
    codes,
    scale,
    products,
    count,
    outputs,
    inputs,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """products[row, n] = scale[n] · Σ_k rows[row, k] · codes[n, k], a block of outputs a program."""
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, INPUTS)
    wanted_rows, wanted_outputs = (row < count)[:, None], (n < outputs)[None, :]
    row_start = rows + row.to(tl.int64)[:, None] * inputs  # 64 bits: a weight may have more than 2³¹ codes
    code_start = codes + n.to(tl.int64)[None, :] * inputs
    sums = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for start in range(0, inputs, INPUTS):
        place = start + k
        real = place < inputs
        left = tl.load(row_start + place[None, :], mask=wanted_rows & real[None, :], other=0.0)
        right = tl.load(code_start + place[:, None], mask=wanted_outputs & real[:, None], other=0)
        sums = tl.dot(left, right.to(left.dtype), sums)  # whole numbers up to 127 are exact in bfloat16
    factor = tl.load(scale + n, mask=n < outputs, other=0.0).to(tl.float32)
    target = products + row.to(tl.int64)[:, None] * outputs + n[None, :]
    tl.store(target, (sums * factor[None, :]).to(products.dtype.element_ty), mask=wanted_rows & wanted_outputs)


def multiply_int8(rows: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Products bfloat16 [M, N].

    Args:
        rows: bfloat16 [M, K], contiguous, M > 0; written for M up to ``MOST_ROWS``, K of at least 16.
        codes: int8 [N, K], contiguous.
        scale: bfloat16 [N].
    """
    count, inputs = rows.shape
    outputs = len(codes)
    products = torch.empty(count, outputs, dtype=rows.dtype, device=rows.device)
    tile = min(max(16, triton.next_power_of_2(count)), MOST_ROWS)  # a matrix unit takes no fewer than 16 rows
    depth = min(256 if tile == 16 else 128, triton.next_power_of_2(inputs))
    grid = (triton.cdiv(outputs, _OUTPUTS), triton.cdiv(count, tile))
    _kernel[grid](
        rows,
        codes,
        scale,
        products,
        count,
        outputs,
        inputs,
        tile,
        _OUTPUTS,
        depth,
        num_stages=_STAGES,
        num_warps=_WARPS,
    )
    return products
