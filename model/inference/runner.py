"""Passes of the decoder over slots: read a chunk of one prompt, or decode one token of every running request.

The arithmetic is that of ``MedPLIBDecoder``; what is left out is what only training needs. Shapes in decoding are fixed
for a (batch, length) pair, so that a pass can be compiled or captured as a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from model.inference.slots import SlotCache
from model.modeling.decoder import MedPLIBDecoder, MedPLIBDecoderLayer
from model.modeling.moe import MoEFeedForward, mix_by_scan


@dataclass(frozen=True)
class StepOutput:
    """One pass.

    Attributes:
        hidden: [n, D], the final state of each row's last token.
        choices: bool [mixture layers, n or T, E], who computed each token; None unless asked for.
    """

    hidden: Tensor
    choices: Tensor | None


class DecoderRunner:
    """Runs a decoder over a ``SlotCache``.

    Args:
        decoder: the network's decoder, in eval mode.
        cache: where keys and values go.
        drops_tokens: experts have a capacity in evaluation too, as published; it then counts over a whole prompt.
        batch_invariant: decode by kernels whose result for a row does not depend on the other rows.
    """

    def __init__(
        self, decoder: MedPLIBDecoder, cache: SlotCache, drops_tokens: bool = False, batch_invariant: bool = False
    ) -> None:
        self.decoder, self.cache, self.drops_tokens = decoder, cache, drops_tokens
        self.layers = [layer for layer in decoder.layers if isinstance(layer, MedPLIBDecoderLayer)]
        self.mixing = mix_by_scan if batch_invariant else None
        attention = self.layers[0].self_attn
        self.width = int(attention.head_dim)
        self.scaling = float(attention.scaling)
        self.shares_heads = int(attention.num_key_value_groups) > 1
        places = torch.arange(cache.max_length, device=cache.keys.device)
        self.places = places[None]  # [1, L]
        like = torch.empty(0, dtype=cache.keys.dtype, device=cache.keys.device)
        cos, sin = decoder.rotary_emb(like, position_ids=self.places)
        self.cos, self.sin = cos[0], sin[0]  # [L, width]

    def prefill(self, embeds: Tensor, start: int, observe: bool = False) -> StepOutput:
        """Read the next tokens of one prompt into the lane.

        Args:
            embeds: [1, T, D].
            start: tokens of the prompt that the lane holds already.
            observe: tell which experts computed which token.
        """
        length = embeds.shape[1]
        end = start + length
        keys, values = (
            store[:, self.cache.lane : self.cache.lane + 1] for store in (self.cache.keys, self.cache.values)
        )
        mask = None
        if start:  # without a past, the causal kernel needs no mask
            places = self.places[0, :end]
            mask = places[None] <= places[start:, None]  # [T, end]
        cos, sin = self.cos[None, start:end], self.sin[None, start:end]
        hidden, seen = embeds, []
        for index, layer in enumerate(self.layers):
            query, key, value = self._project(layer, hidden, cos, sin)  # [1, heads, T, width]
            keys[index, :, :, start:end], values[index, :, :, start:end] = key, value
            attended = self._attend(query, keys[index, :, :, :end], values[index, :, :, :end], mask, mask is None)
            hidden, choices = self._finish(layer, hidden, attended, whole_prompt=self.drops_tokens)
            if observe and choices is not None:
                seen.append(choices)
        return StepOutput(self.decoder.norm(hidden[:, -1]), _stack(seen))

    def decode(self, tokens: Tensor, lengths: Tensor, bucket: int, observe: bool = False) -> StepOutput:
        """Decode one token of the requests in the first n slots.

        Args:
            tokens: long [n], the last token of each.
            lengths: long [n], tokens each slot holds; the new one is written there.
            bucket: at least the largest of ``lengths`` plus one; how far the cache is read.
            observe: tell which experts computed which token.
        """
        count = len(tokens)
        hidden = self.decoder.embed_tokens(tokens)[:, None]  # [n, 1, D]
        cos, sin = self.cos[lengths][:, None], self.sin[lengths][:, None]  # [n, 1, width]
        mask = (self.places[:, :bucket] <= lengths[:, None])[:, None, None]  # [n, 1, 1, bucket]
        rows = torch.arange(count, device=tokens.device)
        seen = []
        for index, layer in enumerate(self.layers):
            query, key, value = self._project(layer, hidden, cos, sin)  # [n, heads, 1, width]
            keys, values = self.cache.keys[index, :count], self.cache.values[index, :count]
            keys[rows, :, lengths], values[rows, :, lengths] = key[:, :, 0], value[:, :, 0]
            attended = self._attend(query, keys[:, :, :bucket], values[:, :, :bucket], mask, False)
            hidden, choices = self._finish(layer, hidden, attended)
            if observe and choices is not None:
                seen.append(choices)
        return StepOutput(self.decoder.norm(hidden[:, 0]), _stack(seen))

    def _project(
        self, layer: MedPLIBDecoderLayer, hidden: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, each [B, heads, T, width]."""
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden)
        shape = (*normed.shape[:2], -1, self.width)
        query, key, value = (
            projection(normed).view(shape).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        return query, key, value

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        return functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=causal, scale=self.scaling, enable_gqa=self.shares_heads
        )

    def _finish(
        self, layer: MedPLIBDecoderLayer, hidden: Tensor, attended: Tensor, whole_prompt: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The rest of a layer after attention: states [B, T, D], and a mixture's choices, bool [B·T, E]."""
        joined = attended.transpose(1, 2).reshape(*hidden.shape[:2], -1)
        hidden = hidden + layer.self_attn.o_proj(joined)
        normed = layer.post_attention_layernorm(hidden)
        if not isinstance(layer.mlp, MoEFeedForward):
            return hidden + layer.mlp(normed), None
        if whole_prompt:
            mixed = layer.mlp(normed)
            return hidden + mixed.hidden, mixed.router.kept
        decoding = hidden.shape[1] == 1
        output, choices = layer.mlp.infer(normed.flatten(0, 1), self.mixing if decoding else None)
        return hidden + output.view_as(hidden), choices


def _stack(choices: list[Tensor]) -> Tensor | None:
    """Choices of all mixture layers, bool [layers, T, E]; layers with fewer experts are filled up with false."""
    if not choices:
        return None
    most = max(layer.shape[-1] for layer in choices)
    return torch.stack([functional.pad(layer, (0, most - layer.shape[-1])) for layer in choices])
