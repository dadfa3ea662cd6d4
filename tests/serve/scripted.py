"""A controller that says what a test wrote for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from model.serve.protocol import Chunk, GenerateRequest

Script = Callable[[GenerateRequest], AsyncIterator[Chunk | bytes]]


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
