"""Middleware of the page: the allowed routes, and the folder of uploads.

Gradio has routes that take, copy, fetch and serve files. The page uses none of them: an upload is bytes in a request,
a download is data in an answer. So they are closed, and no request can name a file or an address.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

TRAY_SECONDS = 60.0
_GET = (
    *("/", "/livez", "/readyz", "/config", "/theme.css", "/favicon.ico", "/robots.txt", "/manifest.json"),
    *("/gradio_api/info", "/gradio_api/startup-events", "/gradio_api/queue/data", "/gradio_api/app_id"),
)
_GET_UNDER = ("/assets/", "/static/", "/svelte/", "/gradio_api/heartbeat/")
_POST = ("/open", "/gradio_api/queue/join", "/gradio_api/cancel", "/gradio_api/reset")
_JSON_BYTES = 2**20  # what the page sends beside uploads is small
_HEADERS = {
    b"content-security-policy": (
        b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
        b"img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
        b"object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
    ),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
}


class Tray:
    """Uploads between their arrival and the visitor's next word, in memory, for a minute at most.

    Args:
        max_bytes: of one upload.
        max_held: bytes of all that wait; three of the largest when 0.
        clock: seconds that only grow.
    """

    def __init__(
        self, max_bytes: int = 64 * 2**20, max_held: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.max_bytes, self.max_held = max_bytes, max_held or 3 * max_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._waiting: OrderedDict[str, tuple[bytes, float]] = OrderedDict()

    def put(self, content: bytes) -> str:
        """Keep an upload; the token it is taken by can be guessed by nobody."""
        token = secrets.token_urlsafe(24)
        with self._lock:
            self._waiting[token] = (content, self._clock())
        self.sweep()
        return token

    def sweep(self) -> None:
        """Drop uploads that nobody took in time, and the oldest where too many wait."""
        with self._lock:
            while self._waiting:
                _, arrived = next(iter(self._waiting.values()))
                held = sum(len(content) for content, _ in self._waiting.values())
                if self._clock() - arrived <= TRAY_SECONDS and held <= self.max_held:
                    break
                self._waiting.popitem(last=False)

    def take(self, token: Any) -> bytes | None:
        """The upload, once; None where there is none."""
        with self._lock:
            content, arrived = self._waiting.pop(token, (None, 0.0)) if isinstance(token, str) else (None, 0.0)
        return None if content is None or self._clock() - arrived > TRAY_SECONDS else content

    async def receive(self, request: Request) -> JSONResponse:
        """``POST /open``: a file's bytes, answered by ``{"token": str}``; no other site can send the header."""
        if request.headers.get("x-medplib") != "open":
            return JSONResponse({"error": "open images on the page itself"}, 403)
        content = await request.body()
        if len(content) > self.max_bytes:
            return JSONResponse({"error": "the file is too large"}, 413)
        return JSONResponse({"token": self.put(content)})


class Gate:
    """ASGI middleware: other routes are not there, no word to gradio names a file, and browsers stay on this host."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what the page needs."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        method, path = scope["method"], scope["path"]
        reading = method in ("GET", "HEAD") and (path in _GET or path.startswith(_GET_UNDER))
        if not reading and (method != "POST" or path not in _POST):
            await JSONResponse({"error": "there is nothing here"}, 404)(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *_HEADERS.items()]}
            await send(message)

        if method == "POST" and path != "/open":
            await self._pass_words(scope, receive, send_with_headers)
        else:
            await self.app(scope, receive, send_with_headers)

    async def _pass_words(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the JSON that gradio would, and pass it on if it names no file."""
        body = bytearray()
        more = True
        while more and len(body) <= _JSON_BYTES:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        refused = "the request is too long" if len(body) > _JSON_BYTES else _fault(bytes(body))
        if refused:
            await JSONResponse({"error": refused}, 400)(scope, receive, send)
            return
        replied = False

        async def replay() -> Message:
            nonlocal replied
            if replied:
                return await receive()
            replied = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        await self.app(scope, replay, send)


def _fault(body: bytes) -> str:
    """What is wrong with a word to gradio; empty where nothing is."""
    if not body:
        return ""
    try:
        return "the page takes no files this way" if _names_file(json.loads(body)) else ""
    except (ValueError, RecursionError):
        return "the request is no JSON"


def _names_file(value: Any) -> bool:
    """Whether a value holds what gradio takes for a file."""
    if isinstance(value, dict):
        return "path" in value or "meta" in value or any(_names_file(inner) for inner in value.values())
    return isinstance(value, list) and any(_names_file(inner) for inner in value)
