"""Passes of the decoder over slots: a step reads stretches of prompts and decodes one token of every running request.

All their tokens go through the linear layers packed, so weights are read once; attention is each request's own. The
arithmetic is that of ``MedPLIBDecoder``; what is left out is what only training needs. A pass that only decodes has
fixed shapes for a (batch, length) pair, so that it can be compiled or captured as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from model.inference.slots import SlotCache
from model.modeling.decoder import MedPLIBDecoder, MedPLIBDecoderLayer
from model.modeling.moe import MoEFeedForward, mix_by_scan


@dataclass(frozen=True, eq=False)
class Piece:
    """A stretch of a prompt.

    Attributes:
        embeds: [T, D].
        slot: where its request lies.
        start: tokens of the prompt that the slot holds already.
    """

    embeds: Tensor
    slot: int
    start: int

    @property
    def end(self) -> int:
        """Tokens the slot holds afterwards."""
        return self.start + len(self.embeds)


@dataclass(frozen=True, eq=False)
class Rows:
    """One token each of the requests in the first n slots.

    Attributes:
        tokens: long [n], the last token of each.
        lengths: long [n], tokens each slot holds; the new one is written there.
        bucket: at least the largest of ``lengths`` plus one; how far the cache is read.
    """

    tokens: Tensor
    lengths: Tensor
    bucket: int


@dataclass(frozen=True)
class StepOutput:
    """One pass.

    Attributes:
        hidden: [n + p, D], the final states of the n rows, then of the last token of each of the p pieces.
        choices: bool [mixture layers, T, E], who computed each of the packed tokens, rows first; None unless asked for.
        logits: [n, V], where the pass has them computed already.
    """

    hidden: Tensor
    choices: Tensor | None = None
    logits: Tensor | None = None


class DecoderRunner:
    """Runs a decoder over a ``SlotCache``.

    Args:
        decoder: the network's decoder, in eval mode.
        cache: where keys and values go.
        drops_tokens: experts have a capacity in evaluation too, as published; it counts over a whole prompt, so a pass
            with pieces then has one piece, a whole prompt, and nothing else.
        batch_invariant: decode by kernels whose result for a row does not depend on the other rows.
    """

    def __init__(
        self, decoder: MedPLIBDecoder, cache: SlotCache, drops_tokens: bool = False, batch_invariant: bool = False
    ) -> None:
        self.decoder, self.cache, self.drops_tokens = decoder, cache, drops_tokens
        self.layers = [layer for layer in decoder.layers if isinstance(layer, MedPLIBDecoderLayer)]
        self.batch_invariant = batch_invariant
        self.mixing = mix_by_scan if batch_invariant else None
        attention = self.layers[0].self_attn
        self.width = int(attention.head_dim)
        self.scaling = float(attention.scaling)
        self.shares_heads = int(attention.num_key_value_groups) > 1
        self.places = torch.arange(cache.max_length, device=cache.keys.device)  # [L]
        like = torch.empty(0, dtype=cache.keys.dtype, device=cache.keys.device)
        cos, sin = decoder.rotary_emb(like, position_ids=self.places[None])
        self.cos, self.sin = cos[0], sin[0]  # [L, width]

    def run(self, pieces: Sequence[Piece], rows: Rows | None = None, observe: bool = False) -> StepOutput:
        """Read the pieces, in order, and decode a token of the rows.

        Args:
            pieces: a slot's pieces follow one another; none is a slot of ``rows``.
            rows: what is decoded.
            observe: report which experts computed which token.
        """
        decoded = 0 if rows is None else len(rows.tokens)
        ends = [decoded]  # of the rows and of each piece among the packed tokens
        for piece in pieces:
            ends.append(ends[-1] + len(piece.embeds))
        embeds, places = [piece.embeds for piece in pieces], [self.places[piece.start : piece.end] for piece in pieces]
        row_mask = None
        if rows is not None:
            embeds.insert(0, self.decoder.embed_tokens(rows.tokens))
            places.insert(0, rows.lengths)
            row_mask = (self.places[: rows.bucket] <= rows.lengths[:, None])[:, None, None]  # bool [n, 1, 1, bucket]
        hidden = embeds[0] if len(embeds) == 1 else torch.cat(embeds)  # [T, D], rows first
        at = torch.cat(places)  # [T]
        cos, sin = self.cos[at][None], self.sin[at][None]  # [1, T, width]
        masks = [self._past_mask(piece) for piece in pieces]
        seen = []
        for index, layer in enumerate(self.layers):
            query, key, value = self._project(layer, hidden, cos, sin)  # [heads, T, width]
            attended = []
            if rows is not None:
                attended.append(self._decode_rows(index, rows, row_mask, query, key, value))
            for piece, mask, start, end in zip(pieces, masks, ends, ends[1:], strict=False):
                span = slice(start, end)
                attended.append(self._read_piece(index, piece, mask, query[:, span], key[:, span], value[:, span]))
            joined = attended[0] if len(attended) == 1 else torch.cat(attended)
            hidden, choices = self._finish(layer, hidden, joined, reads=bool(pieces))
            if observe and choices is not None:
                seen.append(choices)
        states = torch.cat([hidden[:decoded], *(hidden[end - 1 : end] for end in ends[1:])]) if pieces else hidden
        if not seen:
            return StepOutput(self.decoder.norm(states))
        most = max(layer.shape[-1] for layer in seen)  # layers with fewer experts are filled up with false
        choices = torch.stack([functional.pad(layer, (0, most - layer.shape[-1])) for layer in seen])
        return StepOutput(self.decoder.norm(states), choices)

    def decode(self, tokens: Tensor, lengths: Tensor, bucket: int, observe: bool = False) -> StepOutput:
        """Decode one token of the first n slots; see ``Rows``."""
        return self.run((), Rows(tokens, lengths, bucket), observe)

    def _project(
        self, layer: MedPLIBDecoderLayer, hidden: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, each [heads, T, width], of states [T, D]."""
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden)
        query, key, value = (
            projection(normed).view(len(hidden), -1, self.width).transpose(0, 1)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = apply_rotary_pos_emb(query[None], key[None], cos, sin)
        return query[0], key[0], value

    def _decode_rows(
        self, index: int, rows: Rows, mask: Tensor | None, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """Write the rows' keys and values and attend, [n, heads · width]; the first n tokens are theirs."""
        count = len(rows.tokens)
        query, key, value = (part[:, :count].transpose(0, 1) for part in (query, key, value))  # [n, heads, width]
        put = _put_token_compiled if torch.compiler.is_compiling() else put_token
        put(self.cache.keys, self.cache.values, index, rows.lengths, key, value)
        keys, values = (store[index, :count, :, : rows.bucket] for store in (self.cache.keys, self.cache.values))
        attended = self._attend(query[:, :, None], keys, values, mask, False)  # [n, heads, 1, width]
        return attended.reshape(count, -1)

    def _past_mask(self, piece: Piece) -> Tensor | None:
        """What the tokens of a piece may look at, bool [T, end], or what flash attention takes for it.

        None where it has no past: the causal kernel needs no mask.
        """
        if not piece.start:
            return None
        if self.places.is_cuda and not self.shares_heads:
            return causal_lower_right(len(piece.embeds), piece.end)
        return self.places[: piece.end] <= self.places[piece.start : piece.end, None]

    def _read_piece(
        self, index: int, piece: Piece, mask: Tensor | None, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """Write a piece's keys and values and attend, [T, heads · width]; arguments [heads, T, width]."""
        keys, values = (store[index, piece.slot, :, : piece.end] for store in (self.cache.keys, self.cache.values))
        keys[:, piece.start :], values[:, piece.start :] = key, value
        attended = self._attend(query[None], keys[None], values[None], mask, mask is None)
        return attended[0].transpose(0, 1).reshape(len(piece.embeds), -1)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        return functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=causal, scale=self.scaling, enable_gqa=self.shares_heads
        )

    def _finish(
        self, layer: MedPLIBDecoderLayer, hidden: Tensor, attended: Tensor, reads: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The rest of a layer after attention: states [T, D], and a mixture's choices, bool [T, E]."""
        hidden = hidden + layer.self_attn.o_proj(attended)
        normed = layer.post_attention_layernorm(hidden)
        if not isinstance(layer.mlp, MoEFeedForward):
            return hidden + layer.mlp(normed), None
        if reads and self.drops_tokens:
            mixed = layer.mlp(normed)
            return hidden + mixed.hidden, mixed.router.kept
        output, choices = layer.mlp.infer(normed, None if reads else self.mixing)
        return hidden + output, choices


def put_token(keys: Tensor, values: Tensor, layer: int, lengths: Tensor, key: Tensor, value: Tensor) -> None:
    """Write one token of each of the first n slots, in place.

    Args:
        keys, values: [layers, slots, heads, L, width].
        layer: which layer's.
        lengths: long [n], where.
        key, value: [n, heads, width].
    """
    rows = torch.arange(len(lengths), device=lengths.device)
    keys[layer][rows, :, lengths] = key
    values[layer][rows, :, lengths] = value


# What a compiler makes of writing through a view is a copy of the whole cache; an operator of its own stays one write.
_put_token_compiled = torch.library.custom_op("medplib::put_token", put_token, mutates_args=("keys", "values"))


@_put_token_compiled.register_fake
def _(keys: Tensor, values: Tensor, layer: int, lengths: Tensor, key: Tensor, value: Tensor) -> None:
    del keys, values, layer, lengths, key, value
