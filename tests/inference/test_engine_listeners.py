"""What listeners to an answer may do, and that nobody else notices what they do wrong."""

from __future__ import annotations

import logging
from functools import cache

import pytest

from model.errors import MedPLIBError
from model.inference.answer import Answer
from model.inference.engine import Engine, Request
from model.inference.generation import GenerationSettings
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.processor import MedPLIBProcessor
from tests.inference.mixtures import assert_same, engine_of, pictures, plain_answer, talker

PATIENCE = 60  # seconds after which a test fails rather than waits


@cache
def parts() -> tuple[MedPLIBForCausalLM, MedPLIBProcessor]:
    return talker("two of three experts")


def engine(**options: int) -> Engine:
    return engine_of(*parts(), **options)


def request(image: int = 0) -> Request:
    settings = GenerationSettings(max_new_tokens=12)
    return Request(pictures()[image], "Is there a kidney in the image?", settings=settings)


@cache
def wanted(image: int = 0) -> Answer:
    """What a plain loop answers to ``request(image)``."""
    return plain_answer(*parts(), request(image))


def drive(one: Engine) -> None:
    while one.step():
        pass


@pytest.mark.parametrize("kind", [KeyError, SystemExit])
def test_an_exception_of_the_listener_ends_its_request_alone(kind: type[BaseException]) -> None:
    def listen(text: str) -> None:
        if len(text) > 3:
            raise kind("the client went away")

    several = engine(slots=2)
    tickets = [several.submit(request(image), listen if image == 1 else None) for image in range(3)]
    drive(several)
    with pytest.raises(kind, match="went away"):
        tickets[1].result(0)
    assert_same(tickets[0].result(0), wanted(0))
    assert_same(tickets[2].result(0), wanted(2))


@pytest.mark.parametrize("wait", ["ask", "step", "answer_all"])
def test_a_listener_cannot_wait_for_other_answers(wait: str) -> None:
    """A step within a step would hear the others' tokens in another order."""
    several = engine()
    waiting = {
        "ask": lambda: several.ask(request(3)),
        "step": several.step,
        "answer_all": lambda: list(several.answer_all([request(3)])),
    }
    tickets = [several.submit(request(image), (lambda _: waiting[wait]()) if not image else None) for image in range(3)]
    drive(several)
    with pytest.raises(MedPLIBError, match="not wait"):
        tickets[0].result(0)
    for image in (1, 2):
        assert_same(tickets[image].result(0), wanted(image))


def test_a_listener_may_hand_in_another_request() -> None:
    one, tickets = engine(), []
    first = one.submit(request(), lambda _: tickets or tickets.append(one.submit(request(1))))
    drive(one)
    assert_same(first.result(0), wanted())
    assert_same(tickets[0].result(0), wanted(1))


def test_nobody_hears_more_once_the_engine_is_closed() -> None:
    one, heard = engine(prefill_chunk=1000), []
    tickets = [one.submit(request(image), lambda text: heard.append(text) or one.close()) for image in range(3)]
    drive(one)
    assert len(heard) == 1 and all(ticket.done() for ticket in tickets)


def test_a_listener_may_cancel_its_own_request() -> None:
    one, heard = engine(), []
    ticket = one.submit(request(), lambda text: heard.append(text) or ticket.cancel())
    drive(one)
    assert ticket.result(0).finish == "cancelled"
    assert heard == [ticket.result(0).text]


def test_a_listener_of_a_serving_engine_cannot_wait_for_itself() -> None:
    with engine() as serving:
        ticket = serving.submit(request(), lambda _: serving.ask(request(1)) and None)
        with pytest.raises(MedPLIBError, match="not wait"):
            ticket.result(PATIENCE)
        assert_same(serving.ask(request(1)), wanted(1))


def test_an_answer_stays_what_it_was() -> None:
    one = engine()
    ticket = one.submit(request())
    drive(one)
    ticket.settle(ValueError("too late"))
    assert_same(ticket.result(0), wanted())


def test_listeners_that_fail_leave_nobody_waiting(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise RuntimeError("nobody there")

    resting, told = engine(), []
    tickets = [resting.submit(request(image)) for image in range(3)]
    for ticket in tickets:
        ticket.when_done(fail)
        ticket.when_done(lambda: told.append(None))
    with caplog.at_level(logging.ERROR):
        drive(resting)
    for image, ticket in enumerate(tickets):
        assert_same(ticket.result(0), wanted(image))
    assert len(told) == 3 and "nobody there" in caplog.text


def test_a_listener_may_close_the_engine() -> None:
    serving = engine()
    serving.start()
    thread = serving._thread
    ticket = serving.submit(request(), lambda text: serving.close())
    with pytest.raises(MedPLIBError, match="closed"):
        ticket.result(PATIENCE)
    assert thread is not None
    thread.join(PATIENCE)
    assert not thread.is_alive()
