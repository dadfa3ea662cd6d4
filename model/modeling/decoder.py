"""The language model: LLaMA layers whose feed-forward part may be a mixture of experts (reference §1, §5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

from model.modeling.configuration import MoEConfig
from model.modeling.moe import MoEFeedForward, RouterStats


class RotaryEmbedding(LlamaRotaryEmbedding):
    """LLaMA's rotary embedding, whose frequencies stay float32 whatever type the network is cast to.

    In bfloat16 a frequency is off by up to 0.4 %, at position 2048 by more than a whole turn: noise.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, value in exact.items():
            cast = getattr(self, name)
            if cast.dtype != value.dtype:
                setattr(self, name, value.to(cast.device))
        return self


class RMSNorm(LlamaRMSNorm):
    """LLaMA's normalisation; training in float32 takes half the passes over memory."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise hidden states [..., D]."""
        if torch.is_grad_enabled() and hidden_states.dtype == self.weight.dtype == torch.float32:
            return _NormWithGradient.apply(hidden_states, self.weight, self.variance_epsilon)
        return super().forward(hidden_states)


class _NormWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        scale = hidden.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        normed = hidden * scale
        ctx.save_for_backward(normed, weight, scale)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        normed, weight, scale = ctx.saved_tensors
        own = (gradient * normed).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        inner = gradient * weight
        return (inner - normed * (inner * normed).mean(-1, keepdim=True)).mul_(scale), own, None


@dataclass(frozen=True)
class DecoderOutput:
    """One pass of the decoder.

    Attributes:
        last_hidden_state: [B, T, D] after the final norm.
        past_key_values: the cache, this pass included; None without one.
        router_stats: per mixture layer, in order, what its router did.
        aux_loss: float32 scalar, the sum of the layers' load-balancing losses; 0 for a dense decoder.
    """

    last_hidden_state: Tensor
    past_key_values: Cache | None
    router_stats: tuple[RouterStats, ...]
    aux_loss: Tensor


class MedPLIBDecoderLayer(GradientCheckpointingLayer):
    """One LLaMA layer; ``mlp`` is a LLaMA feed-forward network or a mixture of them.

    Args:
        config: sizes of the language model.
        moe: which layers are mixtures, and of what kind.
        index: this layer's place in the decoder.
    """

    def __init__(self, config: LlamaConfig, moe: MoEConfig, index: int) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config=config, layer_idx=index)
        self.mlp = build_feed_forward(config, moe, index)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        token_mask: Tensor | None = None,
        needed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, RouterStats | None]:
        """Map hidden states [B, T, D]; a mixture layer also gives its load-balancing loss and router statistics.

        Args:
            hidden: [B, T, D].
            attention_mask: as ``create_causal_mask`` makes it.
            position_embeddings: rotary cosines and sines, each [B, T, head width].
            past_key_values: cache that takes this layer's keys and values.
            token_mask: bool [B, T], false at padding that no expert should see.
            needed: bool [B, T], where anyone reads this layer's output; elsewhere the feed-forward part is left out.
        """
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
        )
        hidden = hidden + attended
        normed = self.post_attention_layernorm(hidden)
        if not isinstance(self.mlp, MoEFeedForward):
            if needed is None:
                return hidden + self.mlp(normed), None, None
            return hidden.index_put((needed,), self.mlp(normed[needed]), accumulate=True), None, None
        mixed = self.mlp(normed, token_mask=token_mask, needed=needed)
        return hidden + mixed.hidden, mixed.aux_loss, mixed.router


class MedPLIBDecoder(PreTrainedModel):
    """LLaMA over ready-made embeddings.

    Padding tokens are not routed to experts, so a sequence's answer does not depend on what it is batched with. The
    published system routed them like any token; set ``moe.route_padding`` to reproduce its capacities and losses.

    Args:
        text_config: sizes of the language model.
        moe: which layers are mixtures, and of what kind; dense when absent.
    """

    config_class = LlamaConfig
    config: LlamaConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["MedPLIBDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, text_config: LlamaConfig, moe: MoEConfig | None = None) -> None:
        super().__init__(text_config)
        moe = moe or MoEConfig()
        depth = text_config.num_hidden_layers
        if any(not 0 <= layer < depth for layer in moe.layers):
            raise ValueError(f"moe.layers is {list(moe.layers)}; the decoder has layers 0 to {depth - 1}")
        self.embed_tokens = nn.Embedding(text_config.vocab_size, text_config.hidden_size, text_config.pad_token_id)
        self.layers = nn.ModuleList(MedPLIBDecoderLayer(text_config, moe, index) for index in range(depth))
        self.norm = RMSNorm(text_config.hidden_size, eps=text_config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config=text_config)
        self.route_padding = moe.route_padding
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value  # type: ignore[assignment]

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        needed: Tensor | None = None,
    ) -> DecoderOutput:
        """Run all layers.

        Args:
            inputs_embeds: [B, T, D].
            attention_mask: [B, past + T], nonzero at real tokens, padding on either side; or 4-d, ready-made.
            position_ids: long [B, T]; by default they count each row's real tokens.
            past_key_values: cache of earlier tokens, dynamic or static; this pass is added to it.
            use_cache: True makes a dynamic cache where none is given.
            needed: bool [B, T], the real tokens whose last hidden state is read; elsewhere it is not finished.
        """
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = _positions(inputs_embeds, attention_mask, past_key_values)
        token_mask = self._token_mask(inputs_embeds, attention_mask)
        # No real token sees what stands behind it: padding on the right, which nobody reads, needs no mask.
        causal = needed is not None and token_mask is not None and bool(token_mask[:, 0].all())
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=None if causal else attention_mask,
            past_key_values=past_key_values,
            position_ids=None if causal else position_ids,
        )
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids=position_ids)

        hidden, aux_losses, router_stats = inputs_embeds, [], []
        for index, layer in enumerate(self.layers):
            hidden, aux_loss, stats = layer(
                hidden,
                attention_mask=causal_mask,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                token_mask=token_mask,
                needed=needed if index == len(self.layers) - 1 else None,
            )  # [B, T, D]
            if stats is not None:
                aux_losses.append(aux_loss)
                router_stats.append(stats)
        aux = torch.stack(aux_losses).sum() if aux_losses else hidden.new_zeros((), dtype=torch.float32)
        return DecoderOutput(self.norm(hidden), past_key_values, tuple(router_stats), aux)

    def _token_mask(self, inputs_embeds: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        if self.route_padding or attention_mask is None or attention_mask.dim() != 2:
            return None
        return attention_mask[:, -inputs_embeds.shape[1] :].bool()


def build_feed_forward(config: LlamaConfig, moe: MoEConfig, index: int) -> nn.Module:
    """The feed-forward part of decoder layer ``index``: dense, or a mixture with as many experts as ``moe`` says."""
    num_experts = moe.experts_in(index)
    if not num_experts:
        return LlamaMLP(config)
    return MoEFeedForward(
        [LlamaMLP(config) for _ in range(num_experts)],
        config.hidden_size,
        top_k=moe.top_k,
        capacity_factor=moe.capacity_factor,
        eval_capacity_factor=moe.eval_capacity_factor,
        min_capacity=moe.min_capacity,
        random_token_priority=moe.random_token_priority,
        drop_tokens=moe.drop_tokens,
        drop_in_evaluation=moe.drop_in_evaluation,
        residual_expert=LlamaMLP(config) if moe.use_residual else None,
    )


def _positions(inputs_embeds: Tensor, attention_mask: Tensor | None, past_key_values: Cache | None) -> Tensor:
    """Positions, long [B or 1, T]: each row's real tokens counted from 0, so that left padding shifts nothing."""
    length = inputs_embeds.shape[1]
    if attention_mask is not None and attention_mask.dim() == 2:
        return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -length:]
    past = past_key_values.get_seq_length() if past_key_values is not None else 0
    return torch.arange(length, device=inputs_embeds.device)[None] + past
