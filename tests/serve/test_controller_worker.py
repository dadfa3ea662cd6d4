"""The controller before real workers: what they say reaches the client, and what the client does reaches them."""

from __future__ import annotations

import contextlib
import threading

import httpx
import pytest

from model.inference.answer import Answer
from model.serve.auth import bearer
from model.serve.client import ControllerClient
from model.serve.controller import ControllerSettings, make_app
from model.serve.protocol import ErrorCode
from model.serve.worker_app import WorkerSettings, make_worker_app
from tests.serve.asking import ScriptedEngine, ask, hold_until_cancelled, message, read_chunks, talk_until_cancelled


@contextlib.contextmanager
def stack(serving, *engines, controller_key=None, client_key=None, **settings):
    """A controller before a worker for each engine; gives its URL, the application and the workers' URLs."""
    app = make_app(ControllerSettings(api_key=controller_key, client_key=client_key))
    with contextlib.ExitStack() as running:
        workers = [make_worker_app(engine, WorkerSettings(("nano",), **settings)) for engine in engines]
        urls = [running.enter_context(serving(worker)) for worker in workers]
        address = running.enter_context(serving(app))
        for url in urls:
            body = {"worker_name": url, "worker_status": {"model_names": ["nano"]}}
            answer = httpx.post(f"{address}/register_worker", json=body, headers=bearer(controller_key))
            assert answer.status_code == 200, answer.text
        yield address, app, urls


@contextlib.contextmanager
def asking(address):
    """An answer that is under way."""
    with httpx.stream("POST", f"{address}/worker_generate_stream", json=message(), timeout=30) as response:
        yield response


def test_clients_learn_how_many_questions_a_model_was_trained_on(serving):
    with stack(serving, ScriptedEngine(), conversation_turns=4) as (address, _, _):
        client = ControllerClient(address)
        assert client.conversation_turns("nano") == 1  # as far as the worker said when it registered
        client.refresh()
        assert client.conversation_turns("nano") == 4
        listed = httpx.get(f"{address}/v1/models").json()["data"]
    assert [model["medplib"] for model in listed] == [{"conversation_turns": 4}]


def test_chunks_are_the_workers_own_byte_by_byte(serving):
    masks = ScriptedEngine(lambda ticket, tell: Answer("The disc."))
    with stack(serving, masks) as (address, _, (url,)):
        direct = httpx.post(f"{url}/worker_generate_stream", json=message()).content
        through = httpx.post(f"{address}/worker_generate_stream", json=message()).content
    assert direct == through and direct.endswith(b"\0")


@pytest.mark.parametrize("script", [talk_until_cancelled, hold_until_cancelled])
def test_leaving_the_controller_frees_the_workers_slot(serving, wait_until, script):
    engine = ScriptedEngine(script)
    with stack(serving, engine) as (address, app, (url,)):
        leaving = threading.Event()

        def leave():
            with (
                contextlib.suppress(httpx.ReadTimeout),
                httpx.stream("POST", f"{address}/worker_generate_stream", json=message(), timeout=0.5) as response,
            ):
                next(read_chunks(response))
            leaving.set()

        threading.Thread(target=leave, daemon=True).start()
        assert leaving.wait(20)
        wait_until(lambda: engine.tickets and engine.tickets[0].cancelled, what="the cancelling")
        wait_until(lambda: app.state.controller.registry.get(url).running == 0, what="the release")


def test_a_full_worker_is_passed_by_until_all_are_full(serving, wait_until):
    engines = [ScriptedEngine(hold_until_cancelled), ScriptedEngine(talk_until_cancelled)]
    with stack(serving, *engines, capacity=1) as (address, _, _), contextlib.ExitStack() as held:

        def hold():
            with contextlib.suppress(httpx.HTTPError), asking(address) as response:
                list(read_chunks(response))

        for _ in engines:
            threading.Thread(target=hold, daemon=True).start()
        held.callback(lambda: [ticket.cancel() for engine in engines for ticket in engine.tickets])
        wait_until(lambda: sum(len(engine.tickets) for engine in engines) == 2, what="two requests")
        (chunk,) = ask(address, message())
        assert chunk.error_code == ErrorCode.BUSY and "waiting and running" in chunk.text
        picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{message()['images'][0]}"}}
        question = {"role": "user", "content": [picture, {"type": "text", "text": "What is it?"}]}
        answer = httpx.post(f"{address}/v1/chat/completions", json={"model": "nano", "messages": [question]})
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1


def test_a_late_answer_is_told_by_the_worker(serving):
    with stack(serving, ScriptedEngine(hold_until_cancelled), request_timeout=0.3) as (address, app, (url,)):
        (chunk,) = ask(address, message())
        assert chunk.error_code == ErrorCode.TIMEOUT
        assert app.state.controller.registry.get(url).failures == 0


@pytest.mark.parametrize("images", [[], ["bm90IGFuIGltYWdl"], ["/etc/passwd"], ["http://example.org/x.png"]])
def test_what_is_wrong_with_an_image_is_told_by_the_worker(serving, images):
    engine = ScriptedEngine()
    with stack(serving, engine) as (address, _, _):
        (chunk,) = ask(address, message(images=images))
    assert chunk.error_code == ErrorCode.BAD_INPUT and "image" in chunk.text and not engine.tickets


def test_worker_and_controller_need_one_key(serving, caplog):
    with stack(serving, ScriptedEngine(), controller_key="one", key="one") as (address, _, _):
        assert ask(address, message())[-1].answer == "A CT."
    with stack(serving, ScriptedEngine(), controller_key="one", key="other") as (address, _, _):
        (chunk,) = ask(address, message())
        assert chunk.error_code == ErrorCode.FAILED and "takes no requests" in chunk.text
        assert "--api-key" in caplog.text and "--api-key" not in chunk.text  # for operators alone
        refreshed = httpx.post(f"{address}/refresh_all_workers")
        assert refreshed.status_code == 200


def test_a_worker_that_drains_by_itself_leaves_no_request_unanswered(serving):
    with stack(serving, ScriptedEngine(), ScriptedEngine()) as (address, _, (first, second)):
        for _ in range(4):
            assert ask(address, message())[-1].answer == "A CT."
        assert httpx.post(f"{first}/drain").status_code == 200
        for _ in range(8):
            assert ask(address, message())[-1].answer == "A CT."
        httpx.post(f"{second}/drain")
        assert ask(address, message())[-1].error_code in (ErrorCode.DRAINING, ErrorCode.NO_WORKER)
