"""How likely the model finds given answers: the log-probability of each, summed over its tokens."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from model.errors import MedPLIBError
from model.eval.lmms.answering import Visuals
from model.inference.engine import Engine
from model.inference.regions import place_region, region_to_mask
from model.modeling.configuration import IGNORE_INDEX
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.conversation import Turn
from model.processing.encoding import tokenize_conversation
from model.processing.processor import MedPLIBProcessor
from model.processing.special_tokens import IMAGE_TOKEN


@dataclass(frozen=True)
class Likelihood:
    """Of one continuation.

    Attributes:
        log_probability: natural logarithm, summed over its tokens; ≤ 0. The end token is not part of it.
        greedy: whether greedy decoding would begin the answer with it.
        tokens: number of its tokens.
    """

    log_probability: float
    greedy: bool
    tokens: int


@dataclass(frozen=True)
class _Row:
    """Token ids behind the shared opening [S], and which of them are the continuation's, bool [S]."""

    ids: Tensor
    counted: Tensor


@torch.inference_mode()
def score_continuations(
    engine: Engine, visuals: Visuals, context: str, continuations: Sequence[str]
) -> list[Likelihood]:
    """Score continuations of one question; its image and prompt are read once for all of them.

    Args:
        engine: whose network, processor and image cache are used.
        visuals: image and regions of the question; no image for a text alone.
        context: the question.
        continuations: answers to it; the space that stands before an answer in the prompt is not part of them.

    Raises:
        MedPLIBError: image or regions are malformed, or prompt and answer are too long.
    """
    model, processor = engine.model, engine.processor
    turn, inputs = _question(engine, visuals, context)
    encoded = [_encode(processor, turn, text) for text in continuations]
    opening, rows = _split(encoded)
    spliced = model.splice(torch.tensor([opening], device=model.device), None, **inputs)
    length = spliced.embeds.shape[1]
    longest = max(len(row.ids) for row in rows)
    if length + longest > engine.max_length:
        raise MedPLIBError(
            f"prompt and answer have {length + longest} tokens and a request may hold {engine.max_length}; "
            "ask shorter, or give a larger max_length"
        )
    cache = DynamicCache(config=model.config.text_config)
    decoded = model.model.decoder(
        spliced.embeds, position_ids=spliced.plan.position_ids, past_key_values=cache, use_cache=True
    )
    last = decoded.last_hidden_state[:, -1:]  # [1, 1, D], predicts the first token behind the opening
    found: list[Likelihood] = []
    together = 1 if _drops(model) else engine.settings.slots
    for start in range(0, len(rows), together):
        found += _score(model, copy.deepcopy(cache), last, length, rows[start : start + together])
    return found


def _question(engine: Engine, visuals: Visuals, context: str) -> tuple[Turn, dict[str, Tensor | None]]:
    """The question as a turn, and what ``splice`` needs to put its image and regions in place."""
    model, processor = engine.model, engine.processor
    if visuals.image is None:
        if visuals.regions:
            raise MedPLIBError("the question points at a region of no image; give its image")
        return Turn("human", context), {}
    prepared = engine.prepare(visuals.image)
    if prepared.image_features is None:
        prepared.image_features = model.encode_images(prepared.clip_input.to(model.device, model.dtype))
    regions = [region_to_mask(region, prepared.size) for region in visuals.regions]
    if regions and not model.config.region.enabled:
        raise MedPLIBError("this checkpoint has no region adapter; ask it about the whole image")
    asked = place_region(context, len(regions)) if regions else context
    turn = Turn("human", f"{IMAGE_TOKEN}\n{asked}")
    encoded = processor.encode_prompt([turn], [prepared.data.pixels], regions=regions, pixels=False)
    return turn, {
        "image_features": prepared.image_features,
        "region_masks": encoded.region_masks.to(model.device, model.dtype),
        "region_image": encoded.region_image.to(model.device),
    }


def _encode(processor: MedPLIBProcessor, turn: Turn, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of the conversation, and the places of the continuation's tokens in it; its end token is cut off."""
    answer = Turn("gpt", continuation.lstrip())
    ids, labels = tokenize_conversation(processor.tokenizer, [turn, answer], processor.settings.template)
    supervised = [place for place, label in enumerate(labels) if label != IGNORE_INDEX]
    return ids[: supervised[-1]], supervised[:-1]


def _split(encoded: Sequence[tuple[list[int], list[int]]]) -> tuple[list[int], list[_Row]]:
    """The ids that all conversations begin with, up to the first continuation, and what follows them."""
    shared = min(places[0] if places else len(ids) for ids, places in encoded)
    first = encoded[0][0]
    while any(ids[:shared] != first[:shared] for ids, _ in encoded):  # tokens may differ where texts only touch
        shared -= 1
    rows = []
    for ids, places in encoded:
        counted = torch.zeros(len(ids), dtype=torch.bool)
        counted[places] = True
        rows.append(_Row(torch.tensor(ids[shared:], dtype=torch.long), counted[shared:]))
    return first[:shared], rows


def _score(
    model: MedPLIBForCausalLM, cache: DynamicCache, last: Tensor, length: int, rows: Sequence[_Row]
) -> list[Likelihood]:
    """Likelihoods of rows that continue one opening of ``length`` tokens, whose ``cache`` is used up."""
    cache.batch_repeat_interleave(len(rows))
    ids = torch.nn.utils.rnn.pad_sequence([row.ids for row in rows], batch_first=True).to(model.device)  # [n, S]
    if not ids.shape[1]:
        return [Likelihood(0.0, True, 0) for _ in rows]
    lengths = torch.tensor([len(row.ids) for row in rows], device=model.device)
    real = torch.arange(ids.shape[1], device=model.device) < lengths[:, None]  # [n, S]
    states = [last.expand(len(rows), -1, -1)]
    for begin, end in _passes(model, ids.shape[1]):
        seen = torch.cat([real.new_ones(len(rows), length), real[:, :end]], dim=1)
        places = torch.arange(length + begin, length + end, device=model.device).expand(len(rows), -1)
        decoded = model.model.decoder(
            model.get_input_embeddings()(ids[:, begin:end]),
            attention_mask=None if bool(seen.all()) else seen,
            position_ids=places,
            past_key_values=cache,
            use_cache=True,
        )
        states.append(decoded.last_hidden_state)
    hidden = torch.cat(states, dim=1)[:, :-1]  # [n, S, D], each predicts the token of its place
    found = []
    for row, one, asked in zip(rows, hidden, ids, strict=True):
        counted = row.counted.to(model.device)
        logits = model.lm_head(one[: len(row.ids)][counted]).float()  # [continuation, V]
        tokens = asked[: len(row.ids)][counted]
        chosen = logits.log_softmax(dim=-1).gather(-1, tokens[:, None]).double().sum()
        found.append(Likelihood(float(chosen), bool((logits.argmax(dim=-1) == tokens).all()), len(tokens)))
    return found


def _passes(model: MedPLIBForCausalLM, length: int) -> Iterator[tuple[int, int]]:
    """The stretches in which a continuation is read: whole, or token by token as such a model speaks."""
    step = 1 if _drops(model) else length
    return ((begin, min(begin + step, length)) for begin in range(0, length, step))


def _drops(model: MedPLIBForCausalLM) -> bool:
    """Whether experts leave tokens out when a pass holds many, so that what is read together matters."""
    moe = model.config.moe
    return bool(moe.enabled and moe.drop_in_evaluation and moe.drop_tokens)
