"""Decoding pass with Triton kernels, the arithmetic of ``DecoderRunner.decode``; needs Triton."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from model.inference.decode_kernels import MOST_TOKENS, FewTokenLinear, add_norm, attend_slots
from model.inference.slots import SlotCache
from model.modeling.decoder import MedPLIBDecoder, MedPLIBDecoderLayer
from model.modeling.expert_kernels import FewTokenExperts
from model.modeling.moe import Mixing, MoEFeedForward, mix_by_scan


class FusedPass:
    """Decodes one token of each row; nothing in it waits for the host, so it can be captured as a CUDA graph.

    It keeps the addresses of the decoder's weights as they are now.

    Args:
        decoder: the network's decoder, in eval mode.
        cache: where keys and values go.
        cos, sin: rotary tables [L, head width].
        batch_invariant: compute a row the same way however many there are.
    """

    def __init__(
        self, decoder: MedPLIBDecoder, cache: SlotCache, cos: Tensor, sin: Tensor, batch_invariant: bool = False
    ) -> None:
        self.decoder, self.cache, self.cos, self.sin = decoder, cache, cos, sin
        self.few = 0 if batch_invariant else MOST_TOKENS
        self.layers = [
            FusedLayer(layer, self.few) for layer in decoder.layers if isinstance(layer, MedPLIBDecoderLayer)
        ]

    def __call__(self, tokens: Tensor, lengths: Tensor, bucket: int) -> Tensor:
        """Final states [n, D]; the arguments are those of ``DecoderRunner.decode``."""
        hidden = self.decoder.embed_tokens(tokens)  # [n, D]
        delta = None
        for index, layer in enumerate(self.layers):
            normed, _ = add_norm(hidden, delta, *layer.input_norm)
            query, key, value = layer.project(normed)
            slots = self.cache.keys[index], self.cache.values[index]
            attended = attend_slots(query, key, value, self.cos, self.sin, lengths, *slots, bucket, layer.scale)
            normed, shares = add_norm(hidden, layer.join_heads(attended), *layer.inner_norm, layer.router)
            delta = layer.feed_forward(normed, shares)
        norm = self.decoder.norm
        return add_norm(hidden, delta, norm.weight, norm.variance_epsilon)[0]


class FusedLayer:
    """What a decoder layer computes between the kernels of attention and norms, by the number of rows.

    Args:
        layer: the decoder layer.
        few: up to so many rows its weights are read by kernels made for few rows; 0 leaves them to matrix products.
    """

    def __init__(self, layer: MedPLIBDecoderLayer, few: int) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.few, self.mlp = few, mlp
        self.scale = float(attention.scaling)
        self.input_norm, self.inner_norm = (
            (norm.weight, norm.variance_epsilon) for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        )
        self.projections: Sequence[nn.Module] = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.output: nn.Module = attention.o_proj
        self.few_projections = FewTokenLinear(self.projections) if FewTokenLinear.fits(self.projections) else None
        self.few_output = FewTokenLinear([self.output]) if FewTokenLinear.fits([self.output]) else None
        self.router: Tensor | None = None
        self.few_experts: Mixing | None = None
        if isinstance(mlp, MoEFeedForward):
            if mlp.top_k == 1 and not mlp.renormalise and not hasattr(mlp, "residual_expert"):
                self.router = mlp.router.weight
            if FewTokenExperts.fits(mlp.experts):
                self.few_experts = FewTokenExperts(list(mlp.experts), mlp.top_k)

    def project(self, normed: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values of states [n, D]."""
        if self.few_projections is not None and len(normed) <= self.few:
            return self.few_projections(normed)
        return tuple(projection(normed) for projection in self.projections)

    def join_heads(self, attended: Tensor) -> Tensor:
        """What attention adds to the states [n, D]."""
        if self.few_output is not None and len(attended) <= self.few:
            return self.few_output(attended)[0]
        return self.output(attended)

    def feed_forward(self, normed: Tensor, shares: Tensor | None) -> Tensor:
        """What the feed-forward part adds to the states [n, D]; ``shares`` [n, E] where the router has been asked."""
        if not isinstance(self.mlp, MoEFeedForward):
            return self.mlp(normed)
        few = self.few_experts if len(normed) <= self.few else None
        mixing = few or mix_by_scan
        if shares is None:
            return self.mlp.infer(normed, mixing)[0]
        return mixing(normed, shares, shares > 0, self.mlp.experts)
