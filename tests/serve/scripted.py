"""A controller that says what a test wrote for it, and any ASGI application served on a free port."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from model.serve.protocol import Chunk, GenerateRequest

PATIENCE = 30.0  # seconds after which a test fails rather than waits
Script = Callable[[GenerateRequest], AsyncIterator[Chunk | bytes]]


def wait_for(condition: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    """The condition's value as soon as it is true; a test that waits for longer fails."""
    end = time.monotonic() + patience
    while not (value := condition()):
        assert time.monotonic() < end, f"waited for {what} for {patience} s"
        time.sleep(0.01)
    return value


@contextlib.contextmanager
def served(app: Any) -> Iterator[str]:
    """The application's address for as long as it is served, in a thread, on a free port of the loopback."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started, "the server")
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        listener.close()


class ScriptedController:
    """The controller's routes. What came is kept in ``requests``; ``left`` counts clients that went away early."""

    def __init__(self, script: Script | None = None, models: tuple[str, ...] = ("nano",), key: str = "") -> None:
        self.script = script or say("The image is a CT.")
        self.models = list(models)
        self.requests: list[GenerateRequest] = []
        self.refreshed = self.left = 0
        self.app = FastAPI()
        self.app.post("/list_models")(self._list)
        self.app.post("/refresh_all_workers")(self._refresh)
        self.app.post("/worker_generate_stream")(self._generate)
        self.key = key

    async def _list(self, request: Request) -> Any:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": "no"}, 401)
        return {"models": self.models}

    async def _refresh(self) -> None:
        self.refreshed += 1

    async def _generate(self, request: GenerateRequest) -> StreamingResponse:
        self.requests.append(request)

        async def stream() -> AsyncIterator[bytes]:
            try:
                async for part in self.script(request):
                    yield part if isinstance(part, bytes) else part.encode()
            except asyncio.CancelledError:
                self.left += 1
                raise

        return StreamingResponse(stream(), media_type="application/octet-stream")


def say(text: str, masks: tuple[dict[str, Any], ...] = (), pause: float = 0.0) -> Script:
    """A script that gives ``text`` word by word, and ``masks`` at its end."""

    async def script(request: GenerateRequest) -> AsyncIterator[Chunk]:
        words = text.split(" ")
        for count in range(1, len(words) + 1):
            so_far = " ".join(words[:count])
            await asyncio.sleep(pause)
            yield Chunk(text=request.prompt + so_far, answer=so_far)
        yield Chunk(text=request.prompt + text, answer=text, masks=list(masks), finish="end")

    return script


def fail(*parts: Chunk | bytes) -> Script:
    """A script that sends just these."""

    async def script(_: GenerateRequest) -> AsyncIterator[Chunk | bytes]:
        for part in parts:
            yield part

    return script


def say_for_ever(_: GenerateRequest) -> AsyncIterator[Chunk]:
    """A script that never ends."""

    async def script() -> AsyncIterator[Chunk]:
        count = 0
        while True:
            count += 1
            yield Chunk(text="", answer="on and " * count)
            await asyncio.sleep(0.02)

    return script()


def say_nothing(_: GenerateRequest) -> AsyncIterator[Chunk]:
    """A script that never begins."""

    async def script() -> AsyncIterator[Chunk]:
        await asyncio.sleep(3600)
        yield Chunk(text="")

    return script()
