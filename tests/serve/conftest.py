"""Real servers on free loopback ports."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import httpx
import pytest
import uvicorn

from tests.conftest import free_port

Serving = Callable[..., AbstractContextManager[str]]


def until(condition: Callable[[], Any], seconds: float = 10.0, what: str = "the condition") -> Any:
    """Wait until the condition holds and give its value; it may fail to connect meanwhile."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if value := condition():
                return value
        time.sleep(0.01)
    raise AssertionError(f"{what} did not come within {seconds} s")


@contextlib.contextmanager
def _serving(app: Any, port: int | None = None, grace: float = 2) -> Iterator[str]:
    """Run an ASGI application in a thread with an event loop of its own; gives its base URL."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port or 0))
    config = uvicorn.Config(app, access_log=False, log_config=None, log_level=logging.WARNING)
    config.timeout_graceful_shutdown = grace  # type: ignore[assignment]
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive(), what="the server")
        assert server.started, "the server did not start"
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        sock.close()
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture(scope="session")
def serving() -> Serving:
    """``with serving(app) as url``: the application behind a real socket of this machine."""
    return _serving


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., Any]:
    """``wait_until(condition, seconds=10)``: the condition's value as soon as it is true."""
    return until


@pytest.fixture
def port() -> int:
    """A free port."""
    return free_port()
