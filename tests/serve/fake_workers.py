"""Workers that behave as a test wants: scripted ones over HTTP, and bare sockets for what no program would do."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from model.serve.protocol import Chunk, GenerateRequest
from tests.serve.scripted import Script, say

STREAM_HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def piece(data: bytes) -> bytes:
    """Data as one piece of a chunked body."""
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


class ScriptedWorker:
    """The worker's routes.

    Args:
        script: what it answers.
        models: it names.
        speed: it claims.
        refusal: status, body and headers that it answers instead, where given.

    ``requests`` holds the bodies that came, ``headers`` their headers; ``left`` counts clients that went away early.
    """

    def __init__(
        self,
        script: Script | None = None,
        models: Sequence[str] = ("nano",),
        speed: float = 1.0,
        refusal: tuple[int, dict[str, Any], dict[str, str]] | None = None,
    ) -> None:
        self.script, self.models, self.speed, self.refusal = script or say("A CT image."), list(models), speed, refusal
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.left = self.asked_status = self.sent = 0
        self.app = FastAPI()
        self.app.post("/worker_get_status")(self._status)
        self.app.post("/worker_generate_stream")(self._generate)

    async def _status(self) -> dict[str, Any]:
        self.asked_status += 1
        return {"model_names": self.models, "speed": self.speed, "queue_length": 0}

    async def _generate(self, request: Request) -> Response:
        body = await request.json()
        self.requests.append(body)
        self.headers.append(dict(request.headers))
        if self.refusal is not None:
            status, content, headers = self.refusal
            return JSONResponse(content, status, headers)

        async def stream() -> AsyncIterator[bytes]:
            try:
                async for part in self.script(GenerateRequest.model_validate(body)):
                    data = part.encode() if isinstance(part, Chunk) else part
                    self.sent += len(data)
                    yield data
            except (asyncio.CancelledError, GeneratorExit):
                self.left += 1
                raise

        return StreamingResponse(stream())


Ending = Literal["close", "reset", "hold"]


@contextlib.contextmanager
def raw_worker(data: bytes, ending: Ending) -> Iterator[tuple[str, list[bytes]]]:
    """A socket that reads a request, says ``data`` and then closes, resets or holds its connection.

    Gives its base URL and the requests' first bytes.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    seen: list[bytes] = []
    held: list[socket.socket] = []

    def answer(connection: socket.socket) -> None:
        got = b""
        while b"\r\n\r\n" not in got or len(got.split(b"\r\n\r\n", 1)[1]) < _length(got):
            more = connection.recv(65536)
            if not more:
                return
            got += more
        seen.append(got[:2000])
        connection.sendall(data)
        if ending == "hold":
            held.append(connection)
            return
        if ending == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()

    def accept() -> None:
        with contextlib.suppress(OSError):  # the listener was closed
            while True:
                answer(listener.accept()[0])

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", seen
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for connection in held:
            connection.close()
        thread.join(5)


def _length(request: bytes) -> int:
    for line in request.split(b"\r\n"):
        if line.lower().startswith(b"content-length:"):
            return int(line.split(b":")[1])
    return 0
