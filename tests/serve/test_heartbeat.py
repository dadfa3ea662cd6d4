"""A worker's heart finds its controller again, whatever becomes of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from model.serve.heartbeat import Heart, Registration
from model.serve.protocol import WorkerStatus

NAME = "http://127.0.0.1:5000"


class Controller:
    """Keeps what it is told; ``known`` are the workers it remembers.

    Args:
        key: it asks for.
        refusal: status and body of its answer to registrations, where it refuses them.
    """

    def __init__(self, key: str = "", refusal: tuple[int, Any] | None = None) -> None:
        self.key, self.refusal = key, refusal
        self.known: set[str] = set()
        self.registrations: list[dict[str, Any]] = []
        self.beats: list[dict[str, Any]] = []
        self.app = FastAPI()
        self.app.post("/register_worker")(self._register)
        self.app.post("/receive_heart_beat")(self._beat)

    async def _register(self, request: Request) -> Response:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": "the key is wrong"}, 401)
        if self.refusal is not None:
            status, body = self.refusal
            return Response(body, status) if isinstance(body, str) else JSONResponse(body, status)
        body = await request.json()
        self.registrations.append(body)
        self.known.add(body["worker_name"])
        return Response()

    async def _beat(self, request: Request) -> dict[str, bool]:
        body = await request.json()
        self.beats.append(body)
        return {"exist": body["worker_name"] in self.known}


def status() -> WorkerStatus:
    return WorkerStatus(model_names=["nano"], queue_length=3)


@contextlib.asynccontextmanager
async def beating(url: str, status: Callable[[], WorkerStatus] = status, **options: Any) -> AsyncIterator[Heart]:
    settings = {"interval": 0.02, "retry": 0.02, "timeout": 5.0, **options}
    heart = Heart(Registration(url, NAME, **settings), status)
    task = asyncio.create_task(heart.run())
    try:
        yield heart
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        await asyncio.sleep(0.005)


def test_it_registers_and_then_beats(serving: Any) -> None:
    controller = Controller(key="secret")
    waiting = [0]

    async def live(url: str) -> None:
        async with beating(
            url, lambda: WorkerStatus(model_names=["a", "b"], queue_length=waiting[0], capacity=9), key="secret"
        ):
            await until(lambda: controller.beats)
            waiting[0] = 5
            await until(lambda: controller.beats[-1]["queue_length"] == 5)

    with serving(controller.app) as url:
        asyncio.run(live(url))
    (registration,) = controller.registrations
    assert (registration["worker_name"], registration["check_heart_beat"]) == (NAME, True)
    assert registration["worker_status"]["model_names"] == ["a", "b"]
    assert registration["worker_status"]["capacity"] == 9
    assert {beat["worker_name"] for beat in controller.beats} == {NAME}


def test_a_controller_that_forgot_is_told_anew(serving: Any) -> None:
    controller = Controller()

    async def live(url: str) -> None:
        async with beating(url) as heart:
            await until(lambda: controller.beats)
            controller.known.clear()
            await until(lambda: len(controller.registrations) == 2)
            beats = len(controller.beats)
            await until(lambda: len(controller.beats) > beats)
            assert heart.registered

    with serving(controller.app) as url:
        asyncio.run(live(url))


def test_a_controller_may_come_later_and_go_and_come_back(serving: Any, port: int, caplog: Any) -> None:
    first, second = Controller(), Controller()

    async def live() -> None:
        async with beating(f"http://127.0.0.1:{port}") as heart:
            await until(lambda: "cannot be reached" in caplog.text)
            assert not heart.registered
            for controller in (first, second):
                with serving(controller.app, port=port):  # its loop is in a thread of its own
                    await until(lambda controller=controller: controller.beats)
                    assert heart.registered
                await until(lambda: not heart.registered)

    with caplog.at_level(logging.INFO, "model.serve.heartbeat"):
        asyncio.run(live())
    assert len(first.registrations) == len(second.registrations) == 1
    told = [record for record in caplog.records if "cannot be reached" in record.getMessage()]
    assert len(told) <= 6  # once for each kind of being away, not for each attempt


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        ((403, {"error": "workers at 127.0.0.1 are not allowed here"}), "not allowed here"),
        ((500, "<html>oops</html>"), "status 500"),
        ((307, ""), "status 307"),
        ((400, {"error": ["x"]}), "status 400"),
    ],
)
def test_a_controller_that_refuses_is_asked_again_and_quoted_once(
    serving: Any, caplog: Any, refusal: tuple[int, Any], said: str
) -> None:
    controller = Controller(refusal=refusal)

    async def live(url: str) -> None:
        async with beating(url) as heart:
            await until(lambda: said in caplog.text)
            controller.refusal = None
            await until(lambda: heart.registered)

    with serving(controller.app) as url, caplog.at_level(logging.INFO, "model.serve.heartbeat"):
        asyncio.run(live(url))
    assert caplog.text.count(said) == 1
    assert "there again" in caplog.text


def test_a_wrong_key_is_told_and_not_shown(serving: Any, caplog: Any) -> None:
    async def live(url: str) -> None:
        async with beating(url, key="guess"):
            await until(lambda: "the key is wrong" in caplog.text)

    with serving(Controller(key="secret").app) as url:
        asyncio.run(live(url))
    assert "guess" not in caplog.text


def test_what_is_no_controller_is_tried_on(serving: Any) -> None:
    """Answers that are no JSON, or of another shape, do not end it."""
    bodies = [b"", b"{", b"[]", b'"x"', b"null", b'{"exist": null}']
    served: list[bytes] = []
    app = FastAPI()

    @app.post("/{path}")
    async def answer(path: str) -> Response:
        served.append(bodies[len(served) % len(bodies)])
        return Response(served[-1])

    async def live(url: str) -> None:
        async with beating(url):
            await until(lambda: len(served) > 3 * len(bodies))

    with serving(app) as url:
        asyncio.run(live(url))


def test_it_announces_its_state_at_once(serving: Any) -> None:
    controller, state = Controller(), WorkerStatus(model_names=["nano"])

    async def live(url: str) -> None:
        async with beating(url, lambda: state, interval=60.0) as heart:
            await until(lambda: controller.registrations)
            state.draining = True
            assert await heart.announce()

    with serving(controller.app) as url:
        asyncio.run(live(url))
    assert [one["worker_status"]["draining"] for one in controller.registrations] == [False, True]


def test_a_silent_controller_is_given_up_in_time() -> None:
    class Silent(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            raise httpx.ReadTimeout("nothing", request=request)

    async def live() -> bool:
        return await Heart(Registration("http://127.0.0.1:1", NAME), status, Silent()).announce()

    assert asyncio.run(live()) is False
