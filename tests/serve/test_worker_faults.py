"""What a worker does when something goes wrong: nothing hangs, and every request ends in an answer or a sentence."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from model.inference.answer import Answer
from model.inference.requests import EngineFull, OnText, Ticket
from model.serve.controller import ControllerSettings, make_app
from model.serve.heartbeat import Registration
from model.serve.protocol import ErrorCode
from model.serve.worker_app import Worker, WorkerSettings, make_worker_app
from model.serve.worker_loop import EngineLoop
from model.serve.worker_requests import read_request
from tests.serve.asking import (
    ScriptedEngine,
    ask,
    hold_until_cancelled,
    message,
    read_chunks,
    refused,
    talk_until_cancelled,
)

Script = Callable[[Ticket, OnText], Answer]


@contextlib.contextmanager
def worker(serving: Any, engine: ScriptedEngine, **settings: Any) -> Iterator[tuple[str, Worker]]:
    app = make_worker_app(engine, WorkerSettings(("nano",), **settings))
    with serving(app) as url:
        yield url, app.state.worker


@contextlib.contextmanager
def asking(url: str, **fields: Any) -> Iterator[httpx.Response]:
    with httpx.stream("POST", f"{url}/worker_generate_stream", json=message(**fields), timeout=30) as response:
        yield response


def outcomes(url: str) -> dict[str, float]:
    told = httpx.get(f"{url}/metrics").text
    return {name: float(n) for name, n in re.findall(r'medplib_worker_requests_total\{outcome="(\w+)"\} (\S+)', told)}


class Gate:
    """A script that says a word, and waits to be let on."""

    def __init__(self, first: str = "A", whole: str = "A CT.") -> None:
        self.first, self.whole = first, whole
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self, ticket: Ticket, tell: OnText) -> Answer:
        if self.first:
            tell(self.first)
        self.reached.set()
        assert self.open.wait(20)
        return Answer(self.whole)


# --- the queue ends ---------------------------------------------------------------------------------------------------


def test_a_full_worker_says_when_to_come_again(serving: Any, wait_until: Any) -> None:
    gate = Gate()
    with worker(serving, ScriptedEngine(gate), capacity=1) as (url, _), asking(url) as first:
        assert gate.reached.wait(10)
        status, sentence, headers = refused(url, message())
        assert (status, int(headers["retry-after"]) >= 1) == (429, True)
        assert "1 requests are waiting and running" in sentence
        gate.open.set()
        assert list(read_chunks(first))[-1].answer == "A CT."
        wait_until(lambda: httpx.post(f"{url}/worker_get_status").json()["queue_length"] == 0)
        assert ask(url, message())[-1].answer == "A CT."


def test_the_wait_is_the_queue_at_the_pace_of_answers() -> None:
    """Time in the queue is no part of an answer's own time: 30 at 0.02 s each take 0.6 s, not 30 times their mean."""
    one_by_one = threading.Lock()

    def answer(ticket: Ticket, tell: OnText) -> Answer:
        with one_by_one:
            return Answer("A CT.", finish="cancelled" if ticket.cancelled else str(time.sleep(0.02)))

    async def scenario() -> None:
        loop = EngineLoop(ScriptedEngine(answer))  # type: ignore[arg-type]

        async def ask_once() -> None:
            async with contextlib.aclosing(loop.ask(None, 60)) as answers:  # type: ignore[arg-type]
                assert [one.finish async for one in answers] == ["None"]  # type: ignore[union-attr]

        begun = time.monotonic()
        await asyncio.gather(*(ask_once() for _ in range(30)))
        pace = (time.monotonic() - begun) / 30
        waiting = [asyncio.create_task(ask_once()) for _ in range(150)]
        await asyncio.sleep(0)
        assert loop.retry_after(150) == pytest.approx(150 * pace, rel=0.3)
        for task in waiting:
            task.cancel()

    asyncio.run(scenario())


def test_a_full_engine_says_so_too(serving: Any) -> None:
    full = EngineFull("64 requests are waiting already; ask again later")
    with worker(serving, ScriptedEngine(refuse=full)) as (url, _):
        status, sentence, headers = refused(url, message())
        assert (status, sentence) == (429, str(full))
        assert int(headers["retry-after"]) >= 1


def test_pictures_together_are_bounded(serving: Any) -> None:
    gate = Gate()
    with worker(serving, ScriptedEngine(gate), max_held_bytes=300_000) as (url, _), asking(url) as first:
        assert gate.reached.wait(10)
        status, sentence, _ = refused(url, message())
        assert status == 429
        assert "large pictures" in sentence
        gate.open.set()
        list(read_chunks(first))


def test_a_crowd_ends_in_answers_and_refusals(serving: Any, wait_until: Any) -> None:
    def slowly(ticket: Ticket, tell: OnText) -> Answer:
        threading.Event().wait(0.02)
        return Answer("A CT.")

    def one(client: httpx.Client) -> str:
        with client.stream("POST", "/worker_generate_stream", json=message()) as response:
            if response.status_code == 200:
                return list(read_chunks(response))[-1].answer
            return str(response.status_code)

    with worker(serving, ScriptedEngine(slowly), capacity=8) as (url, working):
        with ThreadPoolExecutor(60) as pool, httpx.Client(base_url=url, timeout=30) as client:
            ends = list(pool.map(lambda _: one(client), range(200)))
        assert set(ends) <= {"A CT.", "429"}
        assert ends.count("A CT.") >= 8
        wait_until(lambda: working.active == 0)
        wait_until(lambda: sum(outcomes(url).values()) == 200)


# --- clients ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [talk_until_cancelled, hold_until_cancelled])
def test_who_leaves_frees_his_place(serving: Any, wait_until: Any, script: Script) -> None:
    engine = ScriptedEngine(script)
    with worker(serving, engine) as (url, working):
        connection = socket.create_connection(url.removeprefix("http://").split(":"))  # type: ignore[arg-type]
        body = httpx.Request("POST", url, json=message()).content
        head = f"POST /worker_generate_stream HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        wait_until(lambda: engine.tickets)
        connection.close()
        wait_until(lambda: engine.tickets[0].cancelled, what="the cancellation")
        wait_until(lambda: working.active == 0)
        wait_until(lambda: outcomes(url) == {"left": 1})


def test_who_leaves_before_his_request_is_handed_in_is_cancelled_then(serving: Any, wait_until: Any) -> None:
    reached, go_on = threading.Event(), threading.Event()

    class Slow(ScriptedEngine):
        def submit(self, *arguments: Any) -> Ticket:
            reached.set()
            assert go_on.wait(20)
            return super().submit(*arguments)

    engine = Slow(hold_until_cancelled)
    with worker(serving, engine) as (url, working):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/worker_generate_stream", json=message(), timeout=httpx.Timeout(20, read=0.2))
        assert reached.wait(10)
        wait_until(lambda: working.active == 0)
        go_on.set()
        wait_until(lambda: engine.tickets and engine.tickets[0].cancelled)
        assert httpx.get(f"{url}/livez").status_code == 200


def test_a_slow_client_gets_fewer_pieces_and_delays_nobody(serving: Any, wait_until: Any) -> None:
    """4000 texts of 40 kB do not fit any buffer; the engine says them all before the client reads the first."""
    count, unit = 4000, "word " * 8000

    def talk(ticket: Ticket, tell: OnText) -> Answer:
        for number in range(count):
            tell(f"{unit}{number}")
        return Answer(f"{unit}{count}")

    engine = ScriptedEngine(talk)
    with worker(serving, engine) as (url, _), asking(url) as response:
        wait_until(lambda: engine.tickets[0].done(), what="the engine")
        chunks = list(read_chunks(response))
    assert chunks[-1].answer.endswith(f" {count}")
    assert chunks[-1].finish == "end"
    assert len(chunks) < count / 4
    numbers = [int(chunk.answer.rpartition(" ")[2]) for chunk in chunks]
    assert numbers == sorted(numbers)


def test_a_client_that_takes_nothing_is_given_up(serving: Any, wait_until: Any) -> None:
    text = "word " * 400_000

    def talk(ticket: Ticket, tell: OnText) -> Answer:
        pause, number = threading.Event(), 0
        while not ticket.cancelled:
            number += 1
            tell(f"{text}{number}")
            pause.wait(0.01)
        return Answer("", finish="cancelled")

    engine = ScriptedEngine(talk)
    with worker(serving, engine, client_timeout=0.2) as (url, working), asking(url):
        wait_until(lambda: engine.tickets[0].cancelled, what="the cancellation")
        wait_until(lambda: working.active == 0)
        wait_until(lambda: outcomes(url) == {"left": 1})


def test_pictures_that_are_long_to_read_hold_up_no_answer(
    serving: Any, wait_until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, read_on, held = Gate(), threading.Event(), threading.Semaphore(0)

    def slowly(body: bytes, *rest: Any) -> Any:
        if b"slow" in body:
            held.release()
            assert read_on.wait(20)
        return read_request(body, *rest)

    monkeypatch.setattr("model.serve.worker_app.read_request", slowly)
    with worker(serving, ScriptedEngine(gate)) as (url, _), ThreadPoolExecutor(4) as pool:
        with asking(url) as first:
            assert gate.reached.wait(10)
            waiting = [pool.submit(ask, url, message("slow")) for _ in range(4)]
            assert all(held.acquire(timeout=10) for _ in range(2))  # as many as are read at once
            gate.open.set()
            assert list(read_chunks(first))[-1].answer == "A CT."
        read_on.set()
        assert {one.result(20)[-1].answer for one in waiting} == {"A CT."}


# --- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [True, False])
def test_an_answer_that_does_not_begin_in_time_is_a_504(serving: Any, wait_until: Any, own: bool) -> None:
    engine = ScriptedEngine(hold_until_cancelled)
    with worker(serving, engine, request_timeout=20 if own else 0.1) as (url, working):
        status, sentence, _ = refused(url, message(timeout=0.1 if own else 50))
        assert status == 504
        assert "0.1 s" in sentence
        wait_until(lambda: engine.tickets[0].cancelled)
        wait_until(lambda: working.active == 0)


def test_an_answer_that_does_not_end_in_time_ends_with_an_error(serving: Any, wait_until: Any) -> None:
    engine = ScriptedEngine(talk_until_cancelled)
    with worker(serving, engine) as (url, _):
        *parts, last = ask(url, message(timeout=0.5))
        assert parts
        assert all(part.error_code == 0 for part in parts)
        assert (last.error_code, last.answer) == (ErrorCode.TIMEOUT, "")
        wait_until(lambda: engine.tickets[0].cancelled)
        wait_until(lambda: outcomes(url) == {"timeout": 1})


# --- the engine -------------------------------------------------------------------------------------------------------


def crash(ticket: Ticket, tell: OnText) -> Answer:
    raise RuntimeError("CUDA error: device-side assert, patient Roe")


def crash_midway(ticket: Ticket, tell: OnText) -> Answer:
    tell("The image")
    threading.Event().wait(0.05)  # else the error may be all there is to tell
    raise MemoryError("out of memory")


def test_a_crash_is_told_and_the_worker_goes_on(serving: Any) -> None:
    engine = ScriptedEngine(crash)
    with worker(serving, engine) as (url, _):
        status, sentence, _ = refused(url, message())
        assert status == 500
        assert "RuntimeError" in sentence
        assert "Roe" not in sentence
        engine.script = lambda ticket, tell: Answer("A CT.")
        assert ask(url, message())[-1].answer == "A CT."
        engine.script = crash_midway
        with asking(url) as response:
            chunks = list(read_chunks(response)) if response.status_code == 200 else []
        assert not chunks or (chunks[-1].error_code, chunks[0].answer) == (ErrorCode.FAILED, "The image")
        assert httpx.get(f"{url}/livez").status_code == 200


def test_an_engine_that_only_fails_is_not_alive(serving: Any) -> None:
    engine = ScriptedEngine(crash)
    with worker(serving, engine) as (url, _):
        for _ in range(3):
            assert httpx.get(f"{url}/livez").status_code == 200
            refused(url, message())
        health = httpx.get(f"{url}/livez")
        assert health.status_code == 503
        assert "failed 3 times in a row" in health.json()["error"]
        assert httpx.get(f"{url}/readyz").status_code == 503
        assert "failed 3 times" in httpx.post(f"{url}/worker_get_status").json()["details"]["trouble"]
        engine.script = lambda ticket, tell: Answer("A CT.")
        assert ask(url, message())[-1].answer == "A CT."  # a few malicious requests must not be the end of it
        assert httpx.get(f"{url}/livez").status_code == 200


def test_one_failure_of_many_requests_is_one(serving: Any, wait_until: Any) -> None:
    together, failure = threading.Barrier(5), RuntimeError("a step failed")

    def fail(ticket: Ticket, tell: OnText) -> Answer:
        together.wait(20)
        raise failure

    with worker(serving, ScriptedEngine(fail)) as (url, _):
        with ThreadPoolExecutor(5) as pool:
            assert {end[0] for end in pool.map(lambda _: refused(url, message()), range(5))} == {500}
        assert httpx.get(f"{url}/livez").status_code == 200


def test_an_engine_that_does_not_even_hand_in_is_told(serving: Any) -> None:
    with worker(serving, ScriptedEngine(refuse=RuntimeError("no"))) as (url, _):
        status, sentence, _ = refused(url, message())
        assert status == 500
        assert "RuntimeError" in sentence


def test_a_stuck_engine_is_not_alive_until_it_moves(serving: Any, wait_until: Any) -> None:
    gate = Gate(first="")
    with worker(serving, ScriptedEngine(gate), request_timeout=0.1, stall_seconds=0.1) as (url, _):
        assert refused(url, message())[0] == 504
        wait_until(lambda: httpx.get(f"{url}/livez").status_code == 503)
        assert "stuck" in httpx.get(f"{url}/livez").json()["error"]
        assert "cannot answer at the moment" in refused(url, message())[1]  # its log says why
        gate.open.set()
        wait_until(lambda: httpx.get(f"{url}/livez").status_code == 200)


# --- going away -------------------------------------------------------------------------------------------------------


def test_draining_ends_what_there_is_and_takes_nothing_new(serving: Any) -> None:
    gate = Gate()
    with worker(serving, ScriptedEngine(gate)) as (url, _), asking(url) as first:
        assert gate.reached.wait(10)
        assert httpx.get(f"{url}/readyz").status_code == 200
        drained = httpx.post(f"{url}/drain").json()
        assert (drained["draining"], drained["queue_length"]) == (True, 1)
        assert httpx.get(f"{url}/readyz").status_code == 503
        assert httpx.get(f"{url}/livez").status_code == 200
        response = httpx.post(f"{url}/worker_generate_stream", json=message())
        assert (response.status_code, response.json()["error_code"]) == (503, ErrorCode.DRAINING)
        gate.open.set()
        assert list(read_chunks(first))[-1].answer == "A CT."


def test_what_does_not_end_within_the_grace_is_told_so(serving: Any) -> None:
    class Closing(ScriptedEngine):
        def close(self) -> None:
            for ticket in self.tickets:
                ticket.cancel()

    app = make_worker_app(Closing(talk_until_cancelled), WorkerSettings(("nano",), grace=0.2))
    loops: list[asyncio.AbstractEventLoop] = []

    @app.get("/loop")
    async def loop() -> None:
        loops.append(asyncio.get_running_loop())

    with serving(app) as url, asking(url) as response:
        chunks = read_chunks(response)
        assert next(chunks).error_code == 0
        httpx.get(f"{url}/loop")
        asyncio.run_coroutine_threadsafe(app.state.worker.finish(), loops[0]).result(10)
        assert list(chunks)[-1].error_code in (ErrorCode.NONE, ErrorCode.DRAINING)
        assert app.state.worker.active == 0


# --- who may ask --------------------------------------------------------------------------------------------------


def test_a_key_guards_everything_but_health(serving: Any) -> None:
    right, wrong = {"Authorization": "Bearer secret"}, {"Authorization": "Bearer guess"}
    with worker(serving, ScriptedEngine(), key="secret") as (url, _):
        for headers in ({}, wrong):
            assert refused(url, message(), headers=headers)[0] == 401
            for route in ("worker_get_status", "drain"):
                assert httpx.post(f"{url}/{route}", headers=headers).status_code == 401
        for route in ("livez", "readyz", "metrics"):
            assert httpx.get(f"{url}/{route}").status_code == 200
        assert ask(url, message(), headers=right)[-1].answer == "A CT."
        assert httpx.post(f"{url}/worker_get_status", headers=right).json()["draining"] is False
        assert httpx.post(f"{url}/drain", headers=right).json()["draining"] is True


def test_without_a_key_a_page_of_a_browser_may_not_ask(serving: Any) -> None:
    with worker(serving, ScriptedEngine()) as (url, _):
        origin = {"Origin": "http://evil.example"}
        assert refused(url, message(), headers=origin)[0] == 403
        assert httpx.post(f"{url}/drain", headers=origin).status_code == 403


@pytest.mark.parametrize("log", [False, True])
def test_logs_hold_no_text_unless_asked_for(serving: Any, caplog: Any, log: bool) -> None:
    engine = ScriptedEngine(lambda ticket, tell: Answer("a secret tumour"))
    with caplog.at_level(logging.DEBUG), worker(serving, engine, log_conversations=log) as (url, _):
        ask(url, message("Has Jane Roe a tumour?"))
    assert ("Jane Roe" in caplog.text) is log
    assert ("a secret tumour" in caplog.text) is log
    assert "iVBOR" not in caplog.text  # how a PNG begins in base64


# --- with a controller ------------------------------------------------------------------------------------------------


def models(url: str) -> list[str]:
    return httpx.post(f"{url}/list_models").json()["models"]


def test_a_worker_finds_its_controller_drains_and_finds_the_next(serving: Any, port: int, wait_until: Any) -> None:
    controller = f"http://127.0.0.1:{port}"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        own = probe.getsockname()[1]
    registration = Registration(controller, f"http://127.0.0.1:{own}", interval=0.05, retry=0.05)
    app = make_worker_app(ScriptedEngine(), WorkerSettings(("nano",), registration=registration))
    with serving(app, port=own) as url:
        for _ in range(2):  # the second one knows nothing
            with serving(make_app(ControllerSettings()), port=port):
                wait_until(lambda: models(controller) == ["nano"])
                assert ask(controller, message()) == ask(url, message())
        with serving(make_app(ControllerSettings()), port=port):
            wait_until(lambda: models(controller) == ["nano"])
            httpx.post(f"{url}/drain")
            assert models(controller) == []
