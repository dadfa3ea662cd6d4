"""Prefill a prompt, then decode token by token, keeping only the hidden states that a ``<SEG>`` needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from model.errors import MedPLIBError
from model.modeling.medplib import MedPLIBForCausalLM


@dataclass(frozen=True)
class GenerationSettings:
    """How an answer is drawn from the model.

    Attributes:
        max_new_tokens: hard end of an answer, ≥ 1.
        temperature: 0 is greedy (the default); above, tokens are sampled.
        top_p: nucleus in (0, 1]; 1 keeps all. Only with temperature above 0.
        seed: makes sampling repeatable.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise MedPLIBError(f"max_new_tokens is {self.max_new_tokens}; give at least 1")
        if self.temperature < 0:
            raise MedPLIBError(f"temperature is {self.temperature}; give 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise MedPLIBError(f"top_p is {self.top_p}; give a number above 0 and up to 1")


@dataclass
class Generation:
    """One row's answer: its new token ids (without the end token) and a state [D] per ``<SEG>`` among them."""

    token_ids: list[int] = field(default_factory=list)
    seg_states: list[torch.Tensor] = field(default_factory=list)
    finished: bool = False


@torch.inference_mode()
def generate(
    model: MedPLIBForCausalLM,
    prompt: dict[str, Any],
    settings: GenerationSettings,
    on_token: Callable[[int, int], None] | None = None,
) -> list[Generation]:
    """Answer a batch of prompts.

    Args:
        model: the network, in eval mode.
        prompt: left-padded prompt inputs for ``MedPLIBForCausalLM.splice`` (``input_ids``, ``attention_mask``,
            ``image_features``, ``region_masks``, ``region_image``, …).
        settings: how tokens are chosen.
        on_token: called with (row, token id) as each token is chosen.

    Returns:
        One ``Generation`` per row.
    """
    sampler = torch.Generator(device="cpu")
    if settings.seed is not None:
        sampler.manual_seed(settings.seed)
    else:
        sampler.seed()
    spliced = model.splice(**prompt)
    attention, positions = spliced.plan.attention_mask, spliced.plan.position_ids
    cache = DynamicCache(config=model.config.text_config)
    rows = [Generation() for _ in range(len(attention))]
    end_ids, seg_id = _end_ids(model), model.config.seg_token_id

    embeds = spliced.embeds  # [B, L, D], then [B, 1, D]
    for _ in range(settings.max_new_tokens):
        decoded = model.model.decoder(
            embeds, attention_mask=attention, position_ids=positions, past_key_values=cache, use_cache=True
        )
        state = decoded.last_hidden_state[:, -1]  # [B, D]
        chosen = choose_tokens(model.lm_head(state).float(), settings, sampler)  # [B]
        for index, (row, token) in enumerate(zip(rows, chosen.tolist(), strict=True)):
            if row.finished or token in end_ids:
                row.finished = True
                continue
            row.token_ids.append(token)
            if token == seg_id:
                row.seg_states.append(state[index])
            if on_token is not None:
                on_token(index, token)
        if all(row.finished for row in rows):
            break
        embeds = model.get_input_embeddings()(chosen[:, None])
        attention = torch.cat([attention, attention.new_ones(len(rows), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return rows


def choose_tokens(logits: torch.Tensor, settings: GenerationSettings, sampler: torch.Generator) -> torch.Tensor:
    """Next token of each row, long [B], from float logits [B, V]: arg-max, or a draw from the nucleus."""
    if settings.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities, order = (logits / settings.temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    before = probabilities.cumsum(dim=-1) - probabilities  # mass ahead of each token; the first is always kept
    probabilities = probabilities.masked_fill(before >= settings.top_p, 0.0)
    draw = torch.multinomial(probabilities.cpu(), 1, generator=sampler).to(order.device)
    return order.gather(-1, draw).squeeze(-1)


def _end_ids(model: MedPLIBForCausalLM) -> set[int]:
    ends = model.config.eos_token_id
    return set(ends) if isinstance(ends, list | tuple) else {2 if ends is None else ends}
