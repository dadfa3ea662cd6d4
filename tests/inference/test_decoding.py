"""Other ways to run a decoding pass: graphs (recorded by a stand-in for CUDA's), the compiler, and their refusal."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.errors import MedPLIBError
from model.inference import decoding
from model.inference.decoding import Decoding
from model.inference.engine import Engine, EngineSettings
from model.inference.runner import DecoderRunner, Rows
from model.modeling.moe import MoEFeedForward
from tests.inference.mixtures import assert_same, plain_answer, random_requests, talker

Run = Callable[[], tuple[Tensor, Tensor]]


def record(_decoding: Decoding, run: Run) -> Any:
    """What a CUDA graph is to its user: the same buffers filled anew at every replay."""
    hidden, logits = (part.clone() for part in run())

    def replay() -> None:
        for buffer, new in zip((hidden, logits), run(), strict=True):
            buffer.copy_(new)

    return decoding._Recorded(replay, hidden, logits)


def engine_with_graphs(monkeypatch: pytest.MonkeyPatch, capture: Any = record, **options: Any) -> Engine:
    monkeypatch.setattr(Decoding, "_capture", capture)
    model, processor = talker()
    engine = Engine(model, processor, EngineSettings(**{"slots": 5, "prefill_chunk": 30, "max_length": 300, **options}))
    engine._schedule.decoding.captures = True  # what a CUDA device does
    return engine


class Kernels:
    """A pass that is the plain one, but for the states of the rows that a fault picks."""

    def __init__(self, runner: DecoderRunner, fault: Callable[[Any, int, int], slice] = lambda *_: slice(0)) -> None:
        self.runner, self.fault, self.layers, self.calls = runner, fault, runner.layers, [0]

    def __call__(self, tokens: Tensor, lengths: Tensor, bucket: int) -> Tensor:
        runner = copy.copy(self.runner)
        runner.layers, self.calls[0] = self.layers, self.calls[0] + 1
        hidden = runner.decode(tokens, lengths, bucket).hidden
        rows = self.fault(self.layers[0].mlp, len(tokens), self.calls[0])
        hidden[rows] *= 1.5
        return hidden


def in_mixtures(mlp: Any, rows: int, call: int) -> slice:
    return slice(None) if isinstance(mlp, MoEFeedForward) else slice(0)


@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        (lambda *_: slice(0), False),
        (lambda mlp, rows, call: slice(1) if call % 4 == 0 else slice(0), False),  # another expert, by rounding
        (in_mixtures, True),
        (lambda mlp, rows, call: slice(None) if 2 <= rows <= 4 else slice(0), True),
        (lambda mlp, rows, call: slice(None) if rows == 1 else slice(0), True),
    ],
)
def test_kernels_are_compared_in_every_kind_of_layer_and_at_few_rows(
    monkeypatch: pytest.MonkeyPatch, fault: Any, seen: bool
) -> None:
    runner = engine_with_graphs(monkeypatch, slots=6)._schedule.decoding.runner
    with torch.inference_mode():
        runner.layers[0].mlp, mixture = runner.layers[0].mlp.experts[0], runner.layers[0].mlp
        found = decoding._difference(runner, Kernels(runner, fault))
        runner.layers[0].mlp = mixture
    assert (found > decoding._AGREEMENT) == seen
    assert not runner.cache.keys.any()


@pytest.mark.parametrize("lookahead", [False, True])
def test_graphs_change_no_answer(monkeypatch: pytest.MonkeyPatch, lookahead: bool) -> None:
    """Batches are filled up with slots that are free or being read: neither may notice."""
    engine = engine_with_graphs(monkeypatch, lookahead=lookahead)
    requests = random_requests(4, 24)
    rng = np.random.default_rng(0)
    waiting, tickets = list(requests), []
    while waiting or engine.busy:
        for _ in range(min(len(waiting), int(rng.integers(0, 3)))):
            tickets.append(engine.submit(waiting.pop(0)))
        engine.step()
    for request, ticket in zip(requests, tickets, strict=True):
        assert_same(ticket.result(0), plain_answer(engine.model, engine.processor, request))
    recorded = engine._schedule.decoding._recorded
    assert {batch for batch, _ in recorded} == {1, 2, 4, 5} and {length for _, length in recorded} <= {256, 300}


def test_whoever_is_observed_is_answered_by_the_same_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain pass rounds otherwise, and must not be what the company of an observed request gets."""

    def record_with_other_rounding(decoding: Decoding, run: Run) -> Any:
        recorded = record(decoding, run)

        def replay() -> None:
            recorded.replay()
            recorded.hidden.mul_(1.01)

        return replace(recorded, replay=replay)

    passes = engine_with_graphs(monkeypatch, record_with_other_rounding)._schedule.decoding
    tokens, lengths = torch.tensor([300, 301]), torch.tensor([4, 7])
    with torch.inference_mode():
        found, observed = (passes([], Rows(tokens, lengths, 64), observe) for observe in (False, True))
        plain = passes.runner.run([], Rows(tokens, lengths, 64), True)
    assert (observed.hidden == found.hidden).all() and not torch.allclose(plain.hidden, found.hidden, rtol=1e-3)
    assert found.choices is None and (observed.choices == plain.choices).all()


def out_of_memory(_decoding: Decoding, run: Run) -> Any:
    raise RuntimeError("out of memory")


def wrong(_decoding: Decoding, run: Run) -> Any:
    hidden, logits = run()
    return decoding._Recorded(lambda: None, hidden * -1, logits)


@pytest.mark.parametrize(("capture", "reason"), [(out_of_memory, "out of memory"), (wrong, "differ from the pass")])
def test_without_a_graph_that_can_be_trusted_decoding_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capture: Any, reason: str
) -> None:
    engine = engine_with_graphs(monkeypatch, capture)
    request = random_requests(4, 1)[0]
    with caplog.at_level(logging.WARNING):
        assert_same(engine.ask(request), plain_answer(engine.model, engine.processor, request))
    assert reason in caplog.text and not engine._schedule.decoding.captures


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's compiler needs g++")
def test_the_compiled_pass_says_the_same() -> None:
    model, processor = talker()
    engine = Engine(model, processor, EngineSettings(slots=1, max_length=250, compiled=True))
    for request in random_requests(4, 3):
        assert_same(engine.ask(request), plain_answer(model, processor, request))
    assert engine._schedule.decoding.replays


@pytest.mark.parametrize("option", ["graphs", "kernels"])
def test_what_needs_cuda_is_refused_on_a_cpu(option: str) -> None:
    model, processor = talker()
    with pytest.raises(MedPLIBError, match=f"{option} need a CUDA device"):
        Engine(model, processor, EngineSettings(**{option: True}))
