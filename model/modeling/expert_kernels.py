"""Feed-forward experts for a few tokens, as Triton kernels that read the weights of the chosen experts alone.

Import it only where Triton is installed. Which expert a token goes to is read on the device, so nothing waits for the
host and the kernels can be part of a CUDA graph; the weights stay where they are and are found by their addresses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

MOST_TOKENS = 4
"""Above so many tokens nearly every expert is needed anyway, and matrix products are the better tool."""

_ROWS, _COLUMNS, _WARPS = 4, 1024, 4
"""A tile of a weight matrix: a thread keeps eight 16-byte loads in flight, and tokens are read in the same layout."""


@triton.jit
def _chosen_expert(shares, row, choice, EXPERTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The expert with a row's ``choice``-th share that is not zero, −1 where there is none, and the share."""
    expert = -1
    share = 0.0
    seen = 0
    for candidate in tl.static_range(EXPERTS):
        value = tl.load(shares + row * EXPERTS + candidate)
        mine = (value != 0) & (seen == choice)
        expert = tl.where(mine, candidate, expert)
        share = tl.where(mine, value, share)
        seen += (value != 0).to(tl.int32)
    return expert, share


@triton.jit
def _weight(table, expert, which, like):  # type: ignore[no-untyped-def]
    """Address of an expert's gate (0), up (1) or down (2) weight; torch aligns storages to far more than 16 bytes."""
    return tl.multiple_of(tl.load(table + expert * 3 + which).to(like.dtype), 16)


@triton.jit
def _gate_up_kernel(  # type: ignore[no-untyped-def]
    tokens,
    shares,
    table,
    inner,
    width,
    inner_width,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """inner[row, choice] = silu(gate · x) ⊙ (up · x), a block of outputs a program."""
    place = tl.program_id(0)  # fastest: programs that read the same weights run at the same time
    row = place // CHOICES
    expert, _ = _chosen_expert(shares, row, place % CHOICES, EXPERTS)
    if expert >= 0:
        gate_weight = _weight(table, expert, 0, tokens)
        up_weight = _weight(table, expert, 1, tokens)
        outputs = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        inside = outputs < inner_width
        gate = tl.zeros([ROWS, COLUMNS], tl.float32)
        up = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, width, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            real = columns < width
            offsets = outputs[:, None] * width + columns[None, :]
            mask = inside[:, None] & real[None, :]
            first = tl.load(gate_weight + offsets, mask=mask, other=0.0)
            second = tl.load(up_weight + offsets, mask=mask, other=0.0)
            token = tl.load(tokens + row * width + columns, mask=real, other=0.0).to(tl.float32)[None, :]
            gate += first.to(tl.float32) * token
            up += second.to(tl.float32) * token
        gated = tl.sum(gate, axis=1)
        gated = gated * tl.sigmoid(gated) * tl.sum(up, axis=1)
        tl.store(inner + place * inner_width + outputs, gated.to(inner.dtype.element_ty), mask=inside)


@triton.jit
def _down_kernel(  # type: ignore[no-untyped-def]
    inner,
    shares,
    table,
    mixed,
    width,
    inner_width,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """mixed[row] = Σ share · (down · inner[row, choice]) over a row's choices, a block of outputs a program."""
    row = tl.program_id(0)
    outputs = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = outputs < width
    total = tl.zeros([ROWS], tl.float32)
    for choice in tl.static_range(CHOICES):
        expert, share = _chosen_expert(shares, row, choice, EXPERTS)
        if expert >= 0:
            down_weight = _weight(table, expert, 2, inner)
            product = tl.zeros([ROWS, COLUMNS], tl.float32)
            for start in range(0, inner_width, COLUMNS):
                columns = start + tl.arange(0, COLUMNS)
                real = columns < inner_width
                mask = inside[:, None] & real[None, :]
                weight = tl.load(down_weight + outputs[:, None] * inner_width + columns[None, :], mask=mask, other=0.0)
                place = (row * CHOICES + choice) * inner_width
                state = tl.load(inner + place + columns, mask=real, other=0.0).to(tl.float32)
                product += weight.to(tl.float32) * state[None, :]
            total += tl.sum(product, axis=1) * share
    tl.store(mixed + row * width + outputs, total.to(mixed.dtype.element_ty), mask=inside)


class FewTokenExperts:
    """Mixes gated SiLU experts for up to ``MOST_TOKENS`` tokens; a ``Mixing`` (``model/modeling/moe.py``).

    It keeps the addresses of the weights as they are now: make a new one after the network was moved or converted.

    Args:
        experts: LLaMA feed-forward networks without biases, of one size and type, on one device.
        choices: experts a token goes to at most.

    Raises:
        ValueError: the experts are of another kind (``fits``).
    """

    def __init__(self, experts: Sequence[nn.Module], choices: int) -> None:
        if not self.fits(experts):
            raise ValueError("these experts are not plain LLaMA feed-forward networks of one size and type")
        self._weights = [weight.detach() for expert in experts for weight in _weights(expert)]  # kept alive
        self.inner_width, self.width = self._weights[0].shape
        self.experts, self.choices = len(experts), min(choices, len(experts))
        addresses = [weight.data_ptr() for weight in self._weights]
        self._table = torch.tensor(addresses, dtype=torch.int64, device=self._weights[0].device)

    @staticmethod
    def fits(experts: Iterable[nn.Module]) -> bool:
        """Whether all experts are plain LLaMA feed-forward networks (not quantised, say) of one size and type."""
        kinds: set[tuple[object, ...]] = set()
        for expert in experts:
            if type(expert) is not LlamaMLP or expert.config.hidden_act not in ("silu", "swish"):
                return False
            layers = (expert.gate_proj, expert.up_proj, expert.down_proj)
            if any(type(layer) is not nn.Linear or layer.bias is not None for layer in layers):
                return False
            weights = _weights(expert)
            if not all(weight.is_contiguous() and weight.data_ptr() % 16 == 0 for weight in weights):
                return False
            kinds |= {(weights[0].shape, weight.dtype, weight.device) for weight in weights}
            if weights[0].numel() >= 2**31 or weights[0].dtype not in (torch.bfloat16, torch.float16, torch.float32):
                return False
        return len(kinds) == 1

    def __call__(
        self, tokens: Tensor, combine: Tensor, kept: Tensor | None = None, experts: Iterable[nn.Module] = ()
    ) -> Tensor:
        """Mixed outputs [T, D] of tokens [T, D] with shares, float32 [T, E]; the rest is not looked at."""
        del kept, experts
        tokens, combine = tokens.contiguous(), combine.contiguous()
        count = len(tokens)
        inner = tokens.new_empty(count * self.choices, self.inner_width)
        mixed = torch.empty_like(tokens)
        sizes = (self.width, self.inner_width, self.experts, self.choices, _ROWS)
        grid = (count * self.choices, triton.cdiv(self.inner_width, _ROWS))
        _gate_up_kernel[grid](tokens, combine, self._table, inner, *sizes, _columns(self.width), num_warps=_WARPS)
        grid = (count, triton.cdiv(self.width, _ROWS))
        _down_kernel[grid](inner, combine, self._table, mixed, *sizes, _columns(self.inner_width), num_warps=_WARPS)
        return mixed


def _weights(expert: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(getattr(expert, name).weight for name in ("gate_proj", "up_proj", "down_proj"))  # type: ignore[return-value]


def _columns(width: int) -> int:
    return min(_COLUMNS, triton.next_power_of_2(width))
