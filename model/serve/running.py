"""Running a server: its port is looked at before anything heavy is loaded, and it stops as it is asked to.

The first SIGTERM or Ctrl-C stops taking connections and lets what is under way end within a grace time; the second
one stops at once. Either way the process ends with 0: stopping a server is no failure.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import logging
import socket
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from model.errors import MedPLIBError
from model.serve.access import Entrance

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

_log = logging.getLogger(__name__)

GRACE_SECONDS = 30.0
"""How long requests under way may take after the first signal."""
KEEP_ALIVE_SECONDS = 20
"""An idle connection is kept so long: longer than our clients keep theirs, so that none is closed under a request."""
HEAD_SECONDS = 20.0
_MAX_HEAD_BYTES = 64 * 2**10
_BACKLOG = 512
_MAX_FILES = 65_536
_TCP_OPTIONS = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 60_000}
"""A peer whose machine is off, or that takes nothing of an answer, is dropped after about a minute."""


def check_port(host: str, port: int, flag: str = "--port") -> None:
    """Whether a server can listen there; nothing is left bound.

    Args:
        host: name or address of this machine.
        port: 0..65535; 0 stands for any free one.
        flag: that another port is given with.

    Raises:
        MedPLIBError: the port is in use or not allowed, or the host is not this machine.
    """
    for listener in listen(host, port, flag):
        listener.close()


def listen(host: str, port: int, flag: str = "--port") -> list[socket.socket]:
    """Sockets that listen at every address the host stands for; they drop peers that are gone or take nothing.

    Raises:
        MedPLIBError: the port is in use or not allowed, or the host is not this machine.
    """
    if not 0 <= port <= 65535:
        raise MedPLIBError(f"the port is {port}; give a number from 1 to 65535 with {flag}")
    listeners: list[socket.socket] = []
    try:
        for family, address in _addresses(host, port):
            listeners.append(socket.socket(family, socket.SOCK_STREAM))
            _set_options(listeners[-1], family)
            chosen = port or (listeners[0].getsockname()[1] if len(listeners) > 1 else 0)  # the same one for all
            listeners[-1].bind((address[0], chosen, *address[2:]))
            listeners[-1].listen(_BACKLOG)
    except OSError as error:
        for listener in listeners:
            listener.close()
        raise MedPLIBError(_why_not(host, port, flag, error)) from error
    return listeners


def _set_options(listener: socket.socket, family: socket.AddressFamily) -> None:
    """Options that accepted connections inherit."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _TCP_OPTIONS.items():
        if hasattr(socket, name):  # not everywhere
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, Any]]:
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise MedPLIBError(f"the host {host!r:.80} has no address; give one of this machine's with --host") from error
    return list({(entry[0], entry[4]): None for entry in found})


def _why_not(host: str, port: int, flag: str, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host or 'this machine'} is in use; stop what listens there or give another with {flag}"
    if error.errno == errno.EACCES:
        return f"port {port} needs more rights than this user has; give one above 1023 with {flag}"
    if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
        return f"{host} is no address of this machine; give one that is with --host"
    return f"cannot listen on {host}:{port}: {error.strerror or error}; give another place with --host and {flag}"


def is_loopback(host: str) -> bool:
    """Whether everything that the host name stands for is this machine alone."""
    return all(address[0].startswith("127.") or address[0] == "::1" for _, address in _addresses(host, 0))


def _protocol(head_timeout: float) -> type[asyncio.Protocol]:
    """Uvicorn's protocol, which closes a connection whose next request's head is late or long."""

    class Protocol(AutoHTTPProtocol):  # type: ignore[valid-type, misc]
        _deadline: asyncio.TimerHandle | None = None
        _head_bytes = 0

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self._wait_for_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:  # the head is here
                self._stop_waiting()
                return
            self._head_bytes += len(data)
            if self._deadline is None:
                self._wait_for_head()
            if self._head_bytes > _MAX_HEAD_BYTES:
                self.transport.abort()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def _wait_for_head(self) -> None:
            self._deadline = asyncio.get_running_loop().call_later(head_timeout, self._give_up)

        def _stop_waiting(self) -> None:
            self._head_bytes = 0
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _give_up(self) -> None:
            if self.transport.get_protocol() is self:  # not a socket that became something else
                self.transport.close()

    return Protocol


class _Server(uvicorn.Server):
    """Uvicorn's server, which does not raise the signal again once it has stopped."""

    def __init__(self, config: uvicorn.Config, on_stop: Callable[[], None] | None) -> None:
        super().__init__(config)
        self._on_stop = on_stop

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._on_stop is not None:
            self._on_stop()
        await super().shutdown(sockets)


def run_app(
    app: Any,
    host: str,
    port: int,
    *,
    grace: float = GRACE_SECONDS,
    allow_hosts: Sequence[str] = (),
    root_path: str = "",
    on_stop: Callable[[], None] | None = None,
    head_timeout: float = HEAD_SECONDS,
    log_level: int = logging.WARNING,
) -> None:
    """Serve an ASGI application until SIGTERM or Ctrl-C.

    Args:
        app: what to serve.
        host: name or address to listen on.
        port: port to listen on; 0 takes any free one.
        grace: seconds that requests under way may take after the first signal, > 0; then they are cancelled.
        allow_hosts: names that requests may be for besides loopback's; where there are none and the host is not
            loopback, any.
        root_path: sub-path under which a proxy shows the application; ``/sub/path`` or empty.
        on_stop: called on the event loop after the first signal, before requests under way are waited for.
        head_timeout: seconds that the head of a request may take, so that silent connections do not pile up.
        log_level: of uvicorn's own messages; requests are not logged one by one.

    Raises:
        MedPLIBError: the port cannot be listened on.
    """
    anywhere = not is_loopback(host)
    names = None if anywhere and not allow_hosts else [*allow_hosts, host]
    listeners = listen(host, port)
    _allow_many_connections()
    config = uvicorn.Config(
        Entrance(app, names, anywhere, root_path),
        http=_protocol(head_timeout),
        access_log=False,
        log_config=None,
        log_level=log_level,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=max(1, round(grace)),
    )
    _log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, listeners[0].getsockname()[1])
    _Server(config, on_stop).run(sockets=listeners)


def _allow_many_connections() -> None:
    """Take as many open files as this user may have, as each connection is one; the usual 1024 are few."""
    if resource is not None:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = _MAX_FILES if most == resource.RLIM_INFINITY else min(most, _MAX_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def set_up_logging() -> None:
    """One log format for all servers, on standard error; libraries log warnings alone."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.captureWarnings(True)
    logging.getLogger("model.serve").setLevel(logging.INFO)


def parse_flags(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse flags whose names may be spelled with underscores or hyphens; the parser names them with hyphens."""
    given = sys.argv[1:] if arguments is None else arguments
    named = (argument.partition("=") for argument in given)
    return parser.parse_args(
        [(name.replace("_", "-") if name.startswith("--") else name) + equals + value for name, equals, value in named]
    )
