"""One engine, many threads: nobody waits in vain, gets another's answer, or passes the queue's bound."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
import torch

from model.errors import MedPLIBError
from model.inference.answer import Answer
from model.inference.engine import Engine, EngineFull, Request
from model.inference.generation import GenerationSettings
from model.inference.images import PreparedImage, prepare_image
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.processor import MedPLIBProcessor
from tests.inference.mixtures import assert_same, engine_of, pictures, plain_answer, random_requests, talker

PATIENCE = 60  # seconds after which a test fails rather than waits


@cache
def parts() -> tuple[MedPLIBForCausalLM, MedPLIBProcessor]:
    return talker("two of three experts")


@cache
def mixture() -> tuple[list[Request], list[Answer]]:
    requests = random_requests(6, 12)
    return requests, [plain_answer(*parts(), request) for request in requests]


def engine(**options: Any) -> Engine:
    return engine_of(*parts(), **options)


def request(max_new_tokens: int = 100, image: int = 0) -> Request:
    return Request(pictures()[image], "What is it?", settings=GenerationSettings(max_new_tokens=max_new_tokens))


def in_threads(count: int, work: Callable[[int], Any]) -> list[Any]:
    """Results of ``work(0)``, ``work(1)`` …, all at once."""
    with ThreadPoolExecutor(count) as pool:
        return [future.result(PATIENCE) for future in [pool.submit(work, number) for number in range(count)]]


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns so often that whatever can be torn apart will be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_many_clients_of_one_engine_get_their_own_answers() -> None:
    requests, wanted = mixture()
    with engine(slots=3, prefill_chunk=30) as serving:

        def client(number: int) -> list[Answer]:
            heard: list[str] = []
            own = [serving.submit(request, heard.append) for request in requests[number::4]]
            return [ticket.result(PATIENCE) for ticket in own]

        found = in_threads(4, client)
    for number, answers in enumerate(found):
        for answer, reference in zip(answers, wanted[number::4], strict=True):
            assert_same(answer, reference)


def test_clients_may_step_a_resting_engine_themselves() -> None:
    requests, wanted = mixture()
    resting = engine(slots=2)
    for answer, reference in zip(in_threads(6, lambda number: resting.ask(requests[number])), wanted, strict=False):
        assert_same(answer, reference)


def test_a_stream_and_clients_share_a_serving_engine() -> None:
    requests, wanted = mixture()
    with engine() as serving, ThreadPoolExecutor(1) as pool:
        streamed = pool.submit(lambda: dict(serving.answer_all(requests[:8])))
        asked = [serving.ask(request) for request in requests[8:]]
        found = [*(answer for _, answer in sorted(streamed.result(PATIENCE).items())), *asked]
    for answer, reference in zip(found, wanted, strict=True):
        assert isinstance(answer, Answer)
        assert_same(answer, reference)


def test_a_stream_is_not_kept_out_by_a_queue_that_never_empties() -> None:
    busy, renewed = engine(slots=1), []

    def hand_in() -> None:
        renewed.append(None)
        if len(renewed) < 40:
            busy.submit(request(max_new_tokens=1)).when_done(hand_in)

    for _ in range(3):
        hand_in()
    _, answer = next(busy.answer_all(mixture()[0][:1]))
    assert isinstance(answer, Answer)
    assert_same(answer, mixture()[1][0])
    assert len(renewed) < 20


@pytest.mark.usefixtures("hasty")
def test_the_queue_keeps_its_bound_however_many_hand_in_at_once() -> None:
    small, longest = engine(waiting=3), []

    def client(_: int) -> int:
        accepted = 0
        for _ in range(3):
            try:
                small.submit(request(max_new_tokens=1))
                accepted += 1
            except EngineFull:
                pass
            longest.append(small.status()["waiting"])
        return accepted

    assert sum(in_threads(8, client)) == 3
    assert max(longest) == 3


@pytest.mark.usefixtures("hasty")
def test_handing_in_and_giving_up_while_it_steps() -> None:
    """The queue is long and grows while the engine goes through it, time and again."""
    crowded = engine(slots=1, prefill_chunk=1, waiting=1000)
    asked = Request(crowded.prepare(pictures()[0]), "What is it?", settings=GenerationSettings(max_new_tokens=1))
    tickets = [crowded.submit(asked) for _ in range(150)]
    with ThreadPoolExecutor(1) as pool:
        handing_in = pool.submit(lambda: [crowded.submit(asked) for _ in range(100)])
        while not handing_in.done():
            crowded.step()
        tickets += handing_in.result()
    for ticket in tickets[5:]:
        ticket.cancel()
    while crowded.step():
        pass
    assert {ticket.result(0).finish for ticket in tickets[5:]} <= {"cancelled", "length", "end"}
    assert all(ticket.result(0).finish != "cancelled" for ticket in tickets[:5])


def test_an_image_that_several_prepare_at_once_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    one, together = engine(), threading.Barrier(3)

    def prepare(*arguments: Any) -> PreparedImage:
        together.wait(PATIENCE)  # everyone has found that it is not there yet
        return prepare_image(*arguments)

    monkeypatch.setattr("model.inference.engine.prepare_image", prepare)
    images = in_threads(3, lambda _: one.prepare(pictures()[0]))
    assert images[0] is images[1] is images[2]


def test_closing_settles_every_ticket() -> None:
    serving = engine(slots=1, prefill_chunk=10, waiting=10)
    serving.start()
    started = threading.Event()
    tickets = [serving.submit(request(), lambda text: started.set())]
    tickets += [serving.submit(request(image=image)) for image in (1, 2)]
    assert started.wait(PATIENCE)
    serving.close()
    for ticket in tickets:
        assert ticket.done()
    with pytest.raises(MedPLIBError, match="closed"):
        tickets[-1].result(0)
    for ask in (serving.submit, serving.ask, lambda asked: next(serving.answer_all([asked]))):
        with pytest.raises(MedPLIBError, match="closed"):
            ask(request())
    with pytest.raises(MedPLIBError, match="closed"):
        serving.start()
    serving.close()  # once more does no harm


def test_closing_an_engine_without_a_thread_settles_too() -> None:
    resting = engine()
    ticket = resting.submit(request())
    resting.step()
    resting.close()
    with pytest.raises(MedPLIBError, match="closed"):
        ticket.result(0)
    assert not resting.busy


def test_starting_twice_is_starting_once() -> None:
    with engine() as serving:
        thread = serving._thread
        serving.start()
        assert serving._thread is thread
    assert thread is not None and not thread.is_alive()


def test_a_waiting_client_may_give_up_by_time_or_from_elsewhere() -> None:
    resting = engine()
    ticket = resting.submit(request())
    with pytest.raises(TimeoutError):
        ticket.result(0.01)
    with engine(slots=1) as serving:
        spoken = threading.Event()
        ticket = serving.submit(request(max_new_tokens=300), lambda text: spoken.set() or time.sleep(0.002))
        assert spoken.wait(PATIENCE)
        in_threads(1, lambda _: ticket.cancel())
        assert ticket.result(PATIENCE).finish == "cancelled"
        assert serving.ask(request(max_new_tokens=2)).finish in ("end", "length")


def test_an_error_of_the_machine_does_not_end_the_service(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    requests, wanted = mixture()
    with engine() as serving:
        with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
            patch.setattr(parts()[0], "encode_images", fail)
            with pytest.raises(torch.OutOfMemoryError):
                serving.submit(request()).result(PATIENCE)
        assert_same(serving.submit(requests[0]).result(PATIENCE), wanted[0])
    assert "out of memory" in caplog.text
