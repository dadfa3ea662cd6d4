"""The same answer alone, in any batch, in any order, under any settings: that of a plain loop over the network."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from model.inference.answer import Answer
from model.inference.engine import Engine, EngineSettings, Request
from model.inference.generation import GenerationSettings, choose_tokens
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.processor import MedPLIBProcessor
from tests.inference.mixtures import (
    KINDS,
    QUESTIONS,
    assert_same,
    engine_of,
    pictures,
    plain_answer,
    prompt_inputs,
    random_requests,
    talker,
)

Mixture = tuple[MedPLIBForCausalLM, MedPLIBProcessor, list[Request], list[Answer]]


@cache
def mixture(kind: str = "one of two experts", count: int = 12) -> Mixture:
    """A network, requests, and what a plain loop answers to each."""
    model, processor = talker(kind)
    requests = random_requests(1, count)
    return model, processor, requests, [plain_answer(model, processor, request) for request in requests]


def check(engine: Engine, requests: list[Request], wanted: list[Answer], order: Any = None) -> None:
    """The engine answers the requests, in the given order of arrival, as wanted."""
    order = list(range(len(requests)) if order is None else order)
    found = {order[place]: answer for place, answer in engine.answer_all(requests[index] for index in order)}
    assert sorted(found) == list(range(len(requests)))
    for index, answer in found.items():
        assert isinstance(answer, Answer), answer
        assert_same(answer, wanted[index])


@pytest.mark.parametrize("kind", KINDS)
def test_a_mix_is_answered_as_by_a_plain_loop(kind: str) -> None:
    model, processor, requests, wanted = mixture(kind)
    check(engine_of(model, processor), requests, wanted)


def test_the_mixes_are_mixed() -> None:
    """What is compared holds all that could differ."""
    answers = [answer for kind in KINDS for answer in mixture(kind)[3]]
    assert {answer.finish for answer in answers} == {"end", "length"}
    assert {0, 1, 2, 3} <= {len(answer.masks) for answer in answers}
    assert sum(0 < mask.area_px < np.prod(mask.rle["size"]) for answer in answers for mask in answer.masks) > 10
    assert any(answer.masks_at and answer.masks for answer in answers)
    assert any(answer.router_stats for answer in answers)
    requests = mixture()[2]
    assert any(request.regions for request in requests) and any(request.history for request in requests)
    assert {request.settings.temperature > 0 for request in requests} == {False, True}
    assert any(answer.text != other.text for answer, other in zip(mixture()[3], mixture("dense")[3], strict=True))


def test_experts_do_drop_tokens_where_they_have_a_capacity() -> None:
    model, processor, requests, wanted = mixture("a capacity in evaluation")
    for layer in model.model.decoder.layers:
        layer.mlp.drop_in_evaluation = False
    try:
        others = [plain_answer(model, processor, request) for request in requests[:4]]
    finally:
        for layer in model.model.decoder.layers:
            layer.mlp.drop_in_evaluation = True
    assert any(one.text != other.text for one, other in zip(others, wanted, strict=False))


SETTINGS: dict[str, dict[str, Any]] = {
    "one slot": {"slots": 1},
    "more slots than requests": {"slots": 20},
    "tiny chunks": {"prefill_chunk": 3},
    "one chunk": {"prefill_chunk": 10_000},
    "no kept openings": {"prefix_cache_mb": 0},
    "no kept images": {"image_cache_mb": 0},
    "lookahead": {"lookahead": True},
    "lookahead, tiny chunks, two slots": {"lookahead": True, "prefill_chunk": 5, "slots": 2},
    "lookahead, one slot": {"lookahead": True, "slots": 1},
    "batch-invariant": {"batch_invariant": True, "slots": 4},
    "batch-invariant lookahead": {"batch_invariant": True, "lookahead": True},
    "short slots": {"max_length": 300},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_no_setting_changes_an_answer(name: str) -> None:
    model, processor, requests, wanted = mixture()
    order = np.random.default_rng(len(name)).permutation(len(requests))
    check(engine_of(model, processor, **SETTINGS[name]), requests, wanted, order)


@pytest.mark.parametrize("options", [{"prefill_chunk": 4}, {"lookahead": True, "slots": 2}])
def test_no_setting_cuts_or_shares_a_prompt_that_experts_have_a_capacity_for(options: dict[str, Any]) -> None:
    model, processor, requests, wanted = mixture("a capacity in evaluation")
    check(engine_of(model, processor, **options), requests[::-1], wanted[::-1])


def test_an_answer_is_the_same_alone() -> None:
    model, processor, requests, wanted = mixture()
    engine = engine_of(model, processor)
    for request, answer in zip(requests, wanted, strict=True):
        assert_same(engine.ask(request), answer)


@pytest.mark.parametrize("seed", range(5))
def test_an_answer_is_the_same_whenever_it_arrives(seed: int) -> None:
    """Requests are handed in between steps, a few at a time, under settings drawn at random."""
    model, processor, requests, wanted = mixture()
    rng = np.random.default_rng(seed)
    settings = EngineSettings(
        slots=int(rng.integers(1, 6)),
        prefill_chunk=int(rng.integers(1, 80)),
        image_cache_mb=int(rng.integers(0, 2)),
        prefix_cache_mb=int(rng.integers(0, 2)),
        lookahead=bool(rng.integers(2)),
        batch_invariant=bool(rng.integers(2)),
    )
    engine = Engine(model, processor, settings)
    order = rng.permutation(len(requests)).tolist()
    tickets = {}
    while order or engine.busy:
        for _ in range(min(len(order), int(rng.integers(0, 3)))):
            index = order.pop()
            tickets[index] = engine.submit(requests[index])
        engine.step()
    for index, ticket in tickets.items():
        assert_same(ticket.result(0), wanted[index])


def test_many_random_mixes() -> None:
    """Other images, other requests, asked twice in one engine whose caches are warm the second time."""
    model, processor = talker("two of three experts", seed=3)
    engine = engine_of(model, processor, slots=4, prefill_chunk=40)
    for seed in (11, 12):
        requests = random_requests(seed, 8)
        wanted = [plain_answer(model, processor, request) for request in requests]
        check(engine, requests, wanted)
        check(engine, requests[::-1], wanted[::-1])


@pytest.mark.parametrize("kind", ["two of three experts", "shared heads"])
def test_half_precision_is_independent_of_its_company_where_that_is_asked_for(kind: str) -> None:
    model, processor = talker(kind)
    model.to(torch.bfloat16)
    requests = random_requests(1, 10)
    alone = engine_of(model, processor, batch_invariant=True)
    wanted = [alone.ask(request) for request in requests]
    check(engine_of(model, processor, batch_invariant=True), requests[::-1], wanted[::-1])


@pytest.mark.parametrize("kind", ["two of three experts", "shared heads"])
def test_where_it_is_asked_for_no_bit_depends_on_company(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither on who is decoded beside it, nor on who is read, nor on an opening that was kept."""
    model, processor = talker(kind)
    model.to(torch.bfloat16)
    seen: dict[tuple[int, int], set[bytes]] = {}

    def choose(logits: torch.Tensor, draws: Any) -> torch.Tensor:
        for row, draw in zip(logits, draws, strict=True):
            seen.setdefault((draw.seed, draw.step), set()).add(row.float().numpy().tobytes())
        return choose_tokens(logits, draws)

    monkeypatch.setattr("model.inference.schedule.choose_tokens", choose)
    requests = [
        replace(request, settings=replace(request.settings, seed=number))
        for number, request in enumerate(random_requests(1, 8))
    ]
    options = {"batch_invariant": True, "prefill_chunk": 20}
    for request in requests:
        engine_of(model, processor, **options).ask(request)
    crowded = engine_of(model, processor, **options)
    for order in (1, -1):
        for _ in crowded.answer_all(requests[::order]):
            pass
    assert crowded.prefixes.hits > 4 and len(seen) > 30
    assert {len(states) for states in seen.values()} == {1}


def test_questions_that_arrive_together_read_their_opening_once() -> None:
    model, processor, *_ = mixture()
    engine = engine_of(model, processor, prefill_chunk=10_000)
    settings = GenerationSettings(max_new_tokens=1)
    for question in QUESTIONS[:3]:
        engine.submit(Request(pictures()[0], question, settings=settings))
    engine.step()
    assert engine.status()["waiting"] == 2
    while engine.step():
        pass
    assert engine.prefixes.hits == 2


@pytest.mark.parametrize("kind", ["one of two experts", "shared heads", "dense"])
def test_transformers_own_loop_says_the_same_tokens(kind: str) -> None:
    model, processor, requests, _ = mixture(kind)
    requests = requests[:6]
    heard: list[list[int]] = []

    class Listening(MedPLIBProcessor):
        def decode_text(self, ids: Any) -> str:
            heard.append(list(ids))
            return super().decode_text(ids)

    engine = engine_of(model, Listening(processor.tokenizer, processor.settings), slots=4)
    greedy = GenerationSettings(max_new_tokens=12)
    asked = [Request(request.image, request.question, request.regions, request.history, greedy) for request in requests]
    for place, answer in engine.answer_all(asked):
        assert isinstance(answer, Answer)
        inputs = prompt_inputs(processor, engine.prepare(asked[place].image), asked[place])
        theirs = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=2)[0].tolist()
        assert theirs[: answer.new_tokens] in heard
        assert theirs[answer.new_tokens :] == ([2] if answer.finish == "end" else [])


def test_masks_come_in_the_order_of_the_text() -> None:
    """Several in one answer, each from its own state."""
    model, processor, requests, wanted = mixture("two of three experts")
    several = [index for index, answer in enumerate(wanted) if len({mask.rle["counts"] for mask in answer.masks}) > 1]
    assert several
    engine = engine_of(model, processor)
    for index in several:
        answer = engine.ask(requests[index])
        assert answer.text.count("<SEG>") == len(answer.masks) >= 2
        assert_same(answer, wanted[index])


def test_masks_of_answers_that_end_together_are_decoded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = talker()
    seg = model.config.seg_token_id
    monkeypatch.setattr("model.inference.schedule.choose_tokens", lambda logits, _: torch.full((len(logits),), seg))
    decode, sizes = model.decode_masks, []
    monkeypatch.setattr(model, "decode_masks", lambda states, *rest: sizes.append(len(states)) or decode(states, *rest))
    settings = GenerationSettings(max_new_tokens=15)
    requests = [Request(image, "Segment it.", settings=settings) for image in pictures()[:3]]
    engine = engine_of(model, processor, prefill_chunk=1000)
    tickets = [engine.submit(request) for request in requests]
    while engine.step():
        pass
    assert sizes == [32, 13]  # no more than 32 at once, whatever ends together
    for ticket, request in zip(tickets, requests, strict=True):
        masks = ticket.result(0).masks
        assert [mask.rle["size"] for mask in masks] == [list(request.image.shape[:2])] * 15


def test_who_cannot_use_a_kept_opening_neither_waits_for_it_nor_keeps_others_waiting() -> None:
    model, processor = talker()
    engine = engine_of(model, processor, slots=6, prefill_chunk=10_000)
    asked = Request(pictures()[0], "Is it?", settings=GenerationSettings(max_new_tokens=9), router_stats=True)
    for _ in range(2):  # the second time the opening is kept
        tickets = [engine.submit(asked) for _ in range(3)]
        engine.step()
        assert engine.status()["waiting"] == 0
        tickets.append(engine.submit(replace(asked, router_stats=False)))
        while engine.step():
            pass
        assert len({ticket.result(0).text for ticket in tickets}) == 1
    engine.submit(asked)
    engine.submit(replace(asked, router_stats=False))
    engine.step()
    assert engine.status()["waiting"] == 0 and engine.status()["prefix_hits"] > 0


def test_router_shares_are_those_of_a_plain_pass() -> None:
    model, processor = talker("two of three experts")
    engine = engine_of(model, processor)
    settings = GenerationSettings(max_new_tokens=6)
    asked = Request(pictures()[0], "Is there a kidney in the image?", settings=settings, router_stats=True)
    for _ in range(2):  # the second time its opening is known, and must be counted all the same
        answer = engine.ask(asked)
        assert answer.router_stats is not None
        assert np.allclose(np.sum(answer.router_stats, axis=1), 1)
    inputs = prompt_inputs(processor, engine.prepare(asked.image), asked)
    said = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=2)
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], said[:, :-1]], dim=1)}  # nothing reads the last
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    with torch.inference_mode():
        stats = model(**whole).router_stats
    wanted = [(layer.kept.float().sum(0) / layer.kept.sum()).tolist() for layer in stats]
    assert np.allclose(answer.router_stats, wanted, atol=1e-6)
    assert engine.ask(Request(asked.image, asked.question, settings=settings)).router_stats is None
