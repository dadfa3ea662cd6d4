"""Key-value cache of the running requests: one fixed slot each.

Requests in decoding always fill the first slots, so a step reads a plain slice and never gathers; prompts are read into
the slots beyond. What a slot needs is allocated once: memory has a bound that can be stated before the first request
(``slot_bytes``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig


def slot_bytes(config: LlamaConfig, max_length: int, dtype: torch.dtype) -> int:
    """Bytes of one slot: keys and values of every layer for ``max_length`` tokens."""
    heads, width = _kv_heads(config), head_width(config)
    return 2 * config.num_hidden_layers * heads * max_length * width * dtype.itemsize


def head_width(config: LlamaConfig) -> int:
    """Width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@dataclass(frozen=True)
class Prefix:
    """Keys and values [layers, heads, P, width] of the first P tokens of a prompt."""

    keys: Tensor
    values: Tensor

    @property
    def length(self) -> int:
        """Tokens P."""
        return self.keys.shape[2]

    @property
    def num_bytes(self) -> int:
        """Bytes of both."""
        return 2 * self.keys.nbytes


class SlotCache:
    """Keys and values, each [layers, slots, heads, max_length, width].

    Args:
        config: sizes of the language model.
        slots: requests read and decoded together.
        max_length: tokens a request may hold, prompt and answer.
        dtype: of the stored keys and values.
        device: where they live.
    """

    def __init__(
        self, config: LlamaConfig, slots: int, max_length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_hidden_layers, slots, _kv_heads(config), max_length, head_width(config))
        # Zeros, not rubbish: masked places are multiplied by a weight of zero, and zero times NaN is NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.slots, self.max_length = slots, max_length

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots."""
        return self.keys.nbytes + self.values.nbytes

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` tokens of one slot over another."""
        for store in (self.keys, self.values):
            store[:, target, :, :length] = store[:, source, :, :length]

    def clear(self, slot: int, start: int) -> None:
        """Forget what lies behind the first ``start`` tokens of a slot: masked, but a NaN of an earlier request there
        would come through.
        """
        for store in (self.keys, self.values):
            store[:, slot, :, start:].zero_()

    def swap(self, one: int, other: int, length: int) -> None:
        """Exchange the first ``length`` tokens of two slots."""
        for store in (self.keys, self.values):
            kept = store[:, one, :, :length].clone()
            store[:, one, :, :length] = store[:, other, :, :length]
            store[:, other, :, :length] = kept

    def take_prefix(self, slot: int, length: int) -> Prefix:
        """A copy of the first ``length`` tokens of a slot."""
        keys, values = (store[:, slot, :, :length].clone() for store in (self.keys, self.values))
        return Prefix(keys, values)

    def put_prefix(self, slot: int, prefix: Prefix) -> None:
        """Begin a slot with a prefix."""
        self.keys[:, slot, :, : prefix.length] = prefix.keys
        self.values[:, slot, :, : prefix.length] = prefix.values


def buckets(largest: int, smallest: int = 1) -> Sequence[int]:
    """Powers of two from ``smallest`` up to and including ``largest``, which need not be one."""
    sizes = []
    size = smallest
    while size < largest:
        sizes.append(size)
        size *= 2
    return [*sizes, largest]


def _kv_heads(config: LlamaConfig) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads
