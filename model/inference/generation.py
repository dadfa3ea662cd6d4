"""Prefill a prompt, then decode token by token, keeping only the hidden states that a ``<SEG>`` needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
        seed: makes sampling repeatable; a row draws the same alone and in a batch.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise MedPLIBError(f"max_new_tokens is {self.max_new_tokens}; give at least 1")
        if not 0 <= self.temperature < math.inf:
            raise MedPLIBError(f"temperature is {self.temperature}; give 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise MedPLIBError(f"top_p is {self.top_p}; give a number above 0 and up to 1")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise MedPLIBError(f"seed is {self.seed}; give a whole number from 0 to 2^63 - 1")


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

    Raises:
        ValueError: a prompt is padded on the right.
    """
    spliced = model.splice(**prompt)
    positions = spliced.plan.position_ids
    attention = padding_mask(spliced.plan.attention_mask)
    cache = DynamicCache(config=model.config.text_config)
    rows = [Generation() for _ in range(len(positions))]
    samplers = _samplers(settings.seed, len(rows))
    end_ids, seg_id = _end_ids(model), model.config.seg_token_id

    embeds = spliced.embeds  # [B, L, D], then [B, 1, D]
    for _ in range(settings.max_new_tokens):
        decoded = model.model.decoder(
            embeds, attention_mask=attention, position_ids=positions, past_key_values=cache, use_cache=True
        )
        state = decoded.last_hidden_state[:, -1]  # [B, D]
        chosen = choose_tokens(model.lm_head(state).float(), settings, samplers)  # [B]
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
        if attention is not None:
            attention = torch.cat([attention, attention.new_ones(len(rows), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return rows


def padding_mask(attention_mask: torch.Tensor) -> torch.Tensor | None:
    """The mask [B, L] of left-padded prompts; None where nothing is padded, which spares every step its mask.

    Raises:
        ValueError: a prompt is padded on the right, so its last position is not its last token.
    """
    if not bool(attention_mask[:, -1].all()):
        raise ValueError("prompts to be continued are padded on the right; collate them with padding_side='left'")
    return None if bool(attention_mask.all()) else attention_mask


def choose_tokens(
    logits: torch.Tensor, settings: GenerationSettings, samplers: Sequence[torch.Generator]
) -> torch.Tensor:
    """Next token of each row, long [B], from float logits [B, V]: arg-max, or a draw from the nucleus.

    Args:
        logits: of the last position.
        settings: temperature and nucleus.
        samplers: one CPU generator per row, so that a row's draws do not depend on its neighbours.
    """
    if settings.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities, order = (logits / settings.temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    before = probabilities.cumsum(dim=-1) - probabilities  # mass ahead of each token; the first is always kept
    probabilities = probabilities.masked_fill(before >= settings.top_p, 0.0)
    draws = [
        torch.multinomial(row, 1, generator=sampler) for row, sampler in zip(probabilities.cpu(), samplers, strict=True)
    ]
    return order.gather(-1, torch.stack(draws).to(order.device)).squeeze(-1)


def _samplers(seed: int | None, number: int) -> list[torch.Generator]:
    samplers = [torch.Generator(device="cpu") for _ in range(number)]
    for sampler in samplers:
        if seed is None:
            sampler.seed()
        else:
            sampler.manual_seed(seed)
    return samplers


def _end_ids(model: MedPLIBForCausalLM) -> set[int]:
    ends = model.config.eos_token_id
    return set(ends) if isinstance(ends, list | tuple) else {2 if ends is None else ends}
