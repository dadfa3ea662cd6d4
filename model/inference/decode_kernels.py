"""Triton kernels of a decoding pass: attention as far as a slot is filled, what lies between matrix products, and
products of few rows with plain or 8-bit weights.

Import it only where Triton is installed. A layer's small operations are what keeps decoding from the memory's speed;
here they are five launches a layer, and the products of a few rows two. Each row is computed by itself and in one
order, so its result depends neither on the batch nor on how far the cache is read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

MOST_TOKENS = 4
"""Up to so many rows ``FewTokenLinear`` is for; above, matrix products are the better tool."""
SPAN = 128
"""Cached tokens that one program attends to; more programs share a long row, and their results are joined."""
_BLOCK = 64  # of them at a time
_ROWS, _COLUMNS, _WARPS = 4, 1024, 4  # a tile of a weight matrix
INT8_ROWS = 64
"""Above so many rows a product with 8-bit weights is no longer bound by reading them, and a dense one does as well."""
_INT8_OUTPUTS, _INT8_STAGES = 32, 4  # each step reads 4 to 8 KiB of weights, several steps are in flight


@triton.jit
def _linear_kernel(  # type: ignore[no-untyped-def]
    tokens,
    table,
    ends,
    output,
    width,
    output_width,
    MATRICES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A block of the outputs of several matrices that read the same tokens; ``ROWS`` divides every matrix' height."""
    row = tl.program_id(0)  # fastest: programs that read the same weights run at the same time
    block = tl.program_id(1) * ROWS
    matrix = 0
    first = 0
    for number in tl.static_range(MATRICES - 1):
        end = tl.load(ends + number)
        beyond = block >= end
        matrix += beyond.to(tl.int32)
        first = tl.where(beyond, end, first)
    weight = tl.multiple_of(tl.load(table + matrix).to(tokens.dtype), 16)
    outputs = block - first + tl.arange(0, ROWS)
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, width, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        real = columns < width
        part = tl.load(weight + outputs[:, None] * width + columns[None, :], mask=real[None, :], other=0.0)
        token = tl.load(tokens + row * width + columns, mask=real, other=0.0).to(tl.float32)
        product += part.to(tl.float32) * token[None, :]
    places = row * output_width + block + tl.arange(0, ROWS)
    tl.store(output + places, tl.sum(product, axis=1).to(output.dtype.element_ty))


@triton.jit
def _add_norm_kernel(  # type: ignore[no-untyped-def]
    hidden,
    delta,
    weight,
    normed,
    router,
    shares,
    width,
    epsilon,
    HAS_DELTA: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """hidden += delta; normed = RMS norm of it; with experts also the share of the likeliest, zero for the others."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    real = columns < width
    places = row * width + columns
    kind = hidden.dtype.element_ty
    state = tl.load(hidden + places, mask=real, other=0.0).to(tl.float32)
    if HAS_DELTA:
        state += tl.load(delta + places, mask=real, other=0.0).to(tl.float32)
        state = state.to(kind).to(tl.float32)  # rounded as a sum of two tensors is
        tl.store(hidden + places, state.to(kind), mask=real)
    scale = tl.rsqrt(tl.sum(state * state, axis=0) / width + epsilon)
    state = (state * scale).to(kind).to(tl.float32) * tl.load(weight + columns, mask=real, other=0.0).to(tl.float32)
    tl.store(normed + places, state.to(kind), mask=real)
    if EXPERTS > 0:
        state = state.to(kind).to(tl.float32)
        numbers = tl.arange(0, EXPERTS_PADDED)
        logits = tl.full([EXPERTS_PADDED], float("-inf"), tl.float32)
        for expert in tl.static_range(EXPERTS):
            gate = tl.load(router + expert * width + columns, mask=real, other=0.0).to(tl.float32)
            logits = tl.where(numbers == expert, tl.sum(state * gate, axis=0), logits)
        powers = tl.exp(logits - tl.max(logits, axis=0))
        chosen = numbers == tl.argmax(logits, axis=0)
        share = tl.where(chosen, powers / tl.sum(powers, axis=0), 0.0)
        tl.store(shares + row * EXPERTS + numbers, share, mask=numbers < EXPERTS)


@triton.jit
def _rotate_store_kernel(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    cos,
    sin,
    lengths,
    keys,
    values,
    row_stride,
    head_stride,
    query_stride,
    key_stride,
    value_stride,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Turn a row's queries by its position, in place, and put its turned key and its value into its slot."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    place = tl.load(lengths + row)
    half = tl.arange(0, WIDTH // 2)
    whole = tl.arange(0, WIDTH)
    if head < HEADS + KEY_HEADS:
        cos_first = tl.load(cos + place * WIDTH + half).to(tl.float32)
        sin_first = tl.load(sin + place * WIDTH + half).to(tl.float32)
        cos_second = tl.load(cos + place * WIDTH + WIDTH // 2 + half).to(tl.float32)
        sin_second = tl.load(sin + place * WIDTH + WIDTH // 2 + half).to(tl.float32)
        if head < HEADS:
            source = query + row * query_stride + head * WIDTH
            target = source
        else:
            source = key + row * key_stride + (head - HEADS) * WIDTH
            target = keys + row.to(tl.int64) * row_stride + (head - HEADS) * head_stride + place * WIDTH
        first = tl.load(source + half).to(tl.float32)
        second = tl.load(source + WIDTH // 2 + half).to(tl.float32)
        kind = query.dtype.element_ty
        tl.store(target + half, (first * cos_first - second * sin_first).to(kind))
        tl.store(target + WIDTH // 2 + half, (second * cos_second + first * sin_second).to(kind))
    else:
        source = value + row * value_stride + (head - HEADS - KEY_HEADS) * WIDTH
        offset = row.to(tl.int64) * row_stride + (head - HEADS - KEY_HEADS) * head_stride + place * WIDTH
        tl.store(values + offset + whole, tl.load(source + whole))


@triton.jit
def _attend_kernel(  # type: ignore[no-untyped-def]
    query,
    keys,
    values,
    lengths,
    partial,
    sums,
    scale,
    row_stride,
    head_stride,
    query_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Attend to one span of a row's cached tokens: unnormalised average, weight and peak score of the span."""
    span = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2)
    filled = tl.load(lengths + row) + 1
    if span * SPAN < filled:
        columns = tl.arange(0, WIDTH)
        asked = tl.load(query + row * query_stride + head * WIDTH + columns).to(tl.float32) * scale
        base = row.to(tl.int64) * row_stride + (head // GROUP) * head_stride
        peak = float("-inf")
        weight = 0.0
        average = tl.zeros([WIDTH], tl.float32)
        end = tl.minimum(span * SPAN + SPAN, filled)
        for start in range(span * SPAN, end, BLOCK):
            tokens = start + tl.arange(0, BLOCK)
            held = tokens < end
            offsets = base + tokens[:, None] * WIDTH + columns[None, :]
            key = tl.load(keys + offsets, mask=held[:, None], other=0.0)
            value = tl.load(values + offsets, mask=held[:, None], other=0.0)
            scores = tl.where(held, tl.sum(key.to(tl.float32) * asked[None, :], axis=1), float("-inf"))
            higher = tl.maximum(peak, tl.max(scores, axis=0))
            powers = tl.exp(scores - higher)
            decay = tl.exp(peak - higher)
            weight = weight * decay + tl.sum(powers, axis=0)
            average = average * decay + tl.sum(powers[:, None] * value.to(tl.float32), axis=0)
            peak = higher
        place = (row * HEADS + head) * tl.num_programs(0) + span
        tl.store(partial + place * WIDTH + columns, average)
        tl.store(sums + place * 2, weight)
        tl.store(sums + place * 2 + 1, peak)


@triton.jit
def _join_kernel(  # type: ignore[no-untyped-def]
    partial,
    sums,
    lengths,
    attended,
    spans,
    HEADS: tl.constexpr,
    SPAN: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Join a head's spans, in order, to its attention output."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    columns = tl.arange(0, WIDTH)
    used = (tl.load(lengths + row) + SPAN) // SPAN  # of length + 1 tokens, rounded up
    first = (row * HEADS + head) * spans
    peak = tl.load(sums + first * 2 + 1)
    weight = tl.load(sums + first * 2)
    average = tl.load(partial + first * WIDTH + columns)
    for place in range(first + 1, first + used):
        other = tl.load(sums + place * 2 + 1)
        higher = tl.maximum(peak, other)
        decay = tl.exp(peak - higher)
        growth = tl.exp(other - higher)
        weight = weight * decay + tl.load(sums + place * 2) * growth
        average = average * decay + tl.load(partial + place * WIDTH + columns) * growth
        peak = higher
    kind = attended.dtype.element_ty
    tl.store(attended + (row * HEADS + head) * WIDTH + columns, (average / weight).to(kind))


@triton.jit
def _int8_kernel(  # type: ignore[no-untyped-def]
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


class FewTokenLinear:
    """Products of up to ``MOST_TOKENS`` rows with the weights of several bias-free linear layers at once.

    It keeps the addresses of the weights as they are now.

    Args:
        layers: linear layers that read the same states.

    Raises:
        ValueError: the layers are of another kind (``fits``).
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        if not self.fits(layers):
            raise ValueError("these layers are not plain linear layers of one input width and type")
        self._weights = [layer.weight.detach() for layer in layers]  # type: ignore[operator]  # kept alive
        device = self._weights[0].device
        self.width = self._weights[0].shape[1]
        self.heights = [len(weight) for weight in self._weights]
        ends = [sum(self.heights[: place + 1]) for place in range(len(self.heights))]
        self._table = torch.tensor([weight.data_ptr() for weight in self._weights], dtype=torch.int64, device=device)
        self._ends = torch.tensor(ends, dtype=torch.int32, device=device)

    @staticmethod
    def fits(layers: Sequence[nn.Module]) -> bool:
        """Whether all layers are plain linear ones without biases (not quantised, say) of one width and type."""
        kinds: set[tuple[object, ...]] = set()
        for layer in layers:
            if type(layer) is not nn.Linear or layer.bias is not None:
                return False
            weight = layer.weight
            if len(weight) % _ROWS or not weight.is_contiguous() or weight.data_ptr() % 16 or weight.numel() >= 2**31:
                return False
            if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
                return False
            kinds.add((weight.shape[1], weight.dtype, weight.device))
        return len(kinds) == 1

    def __call__(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Each layer's outputs [n, its height], views of one tensor, of states [n, D], contiguous."""
        height = sum(self.heights)
        output = tokens.new_empty(len(tokens), height)
        _linear_kernel[(len(tokens), height // _ROWS)](
            tokens,
            self._table,
            self._ends,
            output,
            self.width,
            height,
            MATRICES=len(self.heights),
            ROWS=_ROWS,
            COLUMNS=min(_COLUMNS, triton.next_power_of_2(self.width)),
            num_warps=_WARPS,
        )
        return output.split(self.heights, dim=1)


def add_norm(
    hidden: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float, router: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Add to states in place, and give their RMS norm and, with a router, the share of each row's likeliest expert.

    Args:
        hidden: [n, D], contiguous; ``delta`` is added to it.
        delta: [n, D], or None for nothing.
        weight: [D], of the norm.
        epsilon: of the norm.
        router: [E, D].

    Returns:
        Normed states [n, D], and float32 [n, E] or None.
    """
    count, width = hidden.shape
    experts = 0 if router is None else len(router)
    normed = torch.empty_like(hidden)
    shares = hidden.new_empty(count, experts, dtype=torch.float32) if experts else None
    block = triton.next_power_of_2(width)
    _add_norm_kernel[(count,)](
        hidden,
        hidden if delta is None else delta,
        weight,
        normed,
        weight if router is None else router,
        normed if shares is None else shares,
        width,
        epsilon,
        HAS_DELTA=delta is not None,
        EXPERTS=experts,
        EXPERTS_PADDED=triton.next_power_of_2(max(experts, 1)),
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
    )
    return normed, shares


def attend_slots(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor,
    keys: Tensor,
    values: Tensor,
    bucket: int,
    scale: float,
) -> Tensor:
    """Write one token of each row into its slot and attend to what the slot holds.

    Args:
        query: [n, H · W], not yet rotated; overwritten. Rows of the three may lie apart, as views of one tensor.
        key: [n, K · W], not yet rotated; K divides H.
        value: [n, K · W].
        cos, sin: rotary tables [L, W].
        lengths: long [n], tokens each slot holds; the new one is written there.
        keys, values: slots [≥ n, K, L, W] of one layer; W is a power of two.
        bucket: at least the largest of ``lengths`` plus one.
        scale: of the scores.

    Returns:
        [n, H · W].
    """
    count, (key_heads, width) = len(query), (keys.shape[1], keys.shape[3])
    heads = query.shape[1] // width
    strides = keys.stride()[:2]
    rows = [states.stride(0) for states in (query, key, value)]
    _rotate_store_kernel[(count, heads + 2 * key_heads)](
        query, key, value, cos, sin, lengths, keys, values, *strides, *rows, heads, key_heads, width, num_warps=1
    )
    spans = triton.cdiv(bucket, SPAN)
    partial = query.new_empty(count, heads, spans, width, dtype=torch.float32)
    sums = query.new_empty(count, heads, spans, 2, dtype=torch.float32)
    attended = query.new_empty(query.shape)
    sizes = (heads, heads // key_heads, SPAN, _BLOCK, width)
    _attend_kernel[(spans, heads, count)](query, keys, values, lengths, partial, sums, scale, *strides, rows[0], *sizes)
    _join_kernel[(count, heads)](partial, sums, lengths, attended, spans, heads, SPAN, width, num_warps=1)
    return attended


def multiply_int8(rows: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Products bfloat16 [M, N] with 8-bit weights, each read once, as a byte.

    Args:
        rows: bfloat16 [M, K], contiguous, M > 0; written for M up to ``INT8_ROWS``, K of at least 16.
        codes: int8 [N, K], contiguous.
        scale: bfloat16 [N].
    """
    count, inputs = rows.shape
    outputs = len(codes)
    products = torch.empty(count, outputs, dtype=rows.dtype, device=rows.device)
    tile = min(max(16, triton.next_power_of_2(count)), INT8_ROWS)  # a matrix unit takes no fewer than 16 rows
    depth = min(256 if tile == 16 else 128, triton.next_power_of_2(inputs))
    grid = (triton.cdiv(outputs, _INT8_OUTPUTS), triton.cdiv(count, tile))
    _int8_kernel[grid](
        rows,
        codes,
        scale,
        products,
        count,
        outputs,
        inputs,
        tile,
        _INT8_OUTPUTS,
        depth,
        num_stages=_INT8_STAGES,
        num_warps=_WARPS,
    )
    return products
