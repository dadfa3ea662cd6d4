"""Shared by all servers: ports, signals, host names, sub-paths, counters, disconnected clients.

A port is looked at before anything heavy is loaded. The first SIGTERM or Ctrl-C lets what is under way end within a
grace time; the second one stops at once. Either way the process ends with 0: stopping a server is no failure.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import logging
import re
import socket
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from types import FrameType, MappingProxyType
from typing import Any, TypeVar

import anyio
import uvicorn
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model.errors import MedPLIBError
from model.serve.auth import ip_address
from model.serve.errors import Refusal
from model.serve.protocol import ErrorCode

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

_log = logging.getLogger(__name__)

GRACE_SECONDS = 30.0
"""How long requests under way may take after the first signal."""
KEEP_ALIVE_SECONDS = 20
"""An idle connection is kept so long: longer than our clients keep theirs, so that none is closed under a request."""
Result = TypeVar("Result")
_HOST = re.compile(r"\[(?P<v6>[^\]]*)\](:\d*)?|(?P<name>[^:]*)(:\d*)?")
_MAX_LOGGED_HOSTS = 32
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
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
            listeners.append(listener := socket.socket(family, socket.SOCK_STREAM))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            for option in keep_alive_options(_TCP_OPTIONS):  # accepted connections inherit them
                listener.setsockopt(*option)
            chosen = port or (listeners[0].getsockname()[1] if len(listeners) > 1 else 0)  # the same one for all
            listener.bind((address[0], chosen, *address[2:]))
            listener.listen(_BACKLOG)
    except OSError as error:
        for listener in listeners:
            listener.close()
        raise MedPLIBError(_why_not(host, port, flag, error)) from error
    return listeners


def keep_alive_options(named: Mapping[str, int]) -> list[tuple[int, int, int]]:
    """Socket options that find out about a peer whose machine is off, which says nothing at all.

    Args:
        named: TCP options by name; those that this system does not know are left out.
    """
    known = [(getattr(socket, name), value) for name, value in named.items() if hasattr(socket, name)]
    return [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), *((socket.IPPROTO_TCP, *option) for option in known)]


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


class _Server(uvicorn.Server):
    """Uvicorn's server: drains first, and does not raise the signal again once it has stopped."""

    def __init__(self, config: uvicorn.Config, drain: Callable[[], Awaitable[None]] | None) -> None:
        super().__init__(config)
        self._drain = drain

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._drain is not None:
            draining = asyncio.ensure_future(self._drain())
            while not draining.done() and not self.force_exit:
                await asyncio.wait({draining}, timeout=0.1)
            draining.cancel()
        await super().shutdown(sockets)


def run_app(
    app: Any,
    host: str,
    port: int,
    *,
    grace: float = GRACE_SECONDS,
    allow_hosts: Sequence[str] = (),
    root_path: str = "",
    drain: Callable[[], Awaitable[None]] | None = None,
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
        drain: awaited after the first signal, while requests are still taken; the second one gives it up.

    Raises:
        MedPLIBError: the port cannot be listened on.
    """
    anywhere = not is_loopback(host)
    names = None if anywhere and not allow_hosts else [*allow_hosts, host]
    listeners = listen(host, port)
    if resource is not None:  # each connection is an open file; the usual 1024 are few
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = _MAX_FILES if most == resource.RLIM_INFINITY else min(most, _MAX_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
    config = uvicorn.Config(
        Entrance(app, names, anywhere, root_path),
        access_log=False,
        log_config=None,
        log_level=logging.WARNING,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=max(1, round(grace)),
    )
    _log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, listeners[0].getsockname()[1])
    _Server(config, drain).run(sockets=listeners)


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


# --- requests ---------------------------------------------------------------------------------------------------------


class Entrance:
    """ASGI middleware in front of a whole server: the ``Host`` allow-list, and the sub-path of a proxy.

    A name of somebody else that is made to point here (DNS rebinding) would let any web page use this server through
    its reader's browser, which sends that name. Loopback's names are served always. A request without the header is
    served too: no browser sends one.

    Args:
        app: the server.
        names: further host names that are served; None serves any.
        addresses: serve every IP address too; an address, unlike a name, cannot be made to point elsewhere.
        root_path: ``/sub/path`` under which a proxy shows the server, taken off where the proxy leaves it; or empty.
    """

    def __init__(self, app: ASGIApp, names: Sequence[str] | None, addresses: bool = False, root_path: str = "") -> None:
        self.app, self.addresses, self.root_path = app, addresses, root_path
        self.names = None if names is None else {"localhost", *(name.lower().rstrip(".") for name in names)}
        self._logged: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 403."""
        if scope["type"] == "http":
            if self.root_path and scope["path"].startswith(f"{self.root_path}/"):
                scope = {**scope, "path": scope["path"].removeprefix(self.root_path)}
            header = next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1")
            if header and not self._serves(header):
                if header not in self._logged and len(self._logged) < _MAX_LOGGED_HOSTS:
                    self._logged.add(header)
                    _log.warning("refused a request for the host %.100r; --allow-host NAME serves a name", header)
                sentence = f"this server is not reached under the name {header[:100]!r}"
                answer = Refusal(ErrorCode.BAD_INPUT, sentence, status=403).response(scope["path"])
                await answer(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _serves(self, header: str) -> bool:
        match = _HOST.fullmatch(header.strip().lower())
        host = (match["v6"] or match["name"] or "").rstrip(".") if match else ""
        address = ip_address(host)
        return (
            self.names is None
            or host in self.names
            or (address is not None and (self.addresses or address.is_loopback))
        )


async def until_left(work: Awaitable[Result], receive: Receive) -> Result:
    """The result of some work; a client that leaves ends it.

    Args:
        work: what to do.
        receive: of the client, whose request was read.

    Raises:
        ClientDisconnect: it left before.
    """

    async def leave() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(leave())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


class TimedStream(StreamingResponse):
    """An answer in pieces; a client that leaves, or takes nothing for too long, ends it.

    Args:
        pieces: closed at the end.
        client_timeout: seconds the client may take to accept a piece.
        first: comes before the pieces.
        media_type, headers: of the answer.
    """

    def __init__(
        self,
        pieces: AsyncGenerator[bytes],
        client_timeout: float,
        first: bytes = b"",
        media_type: str = "application/octet-stream",
        headers: Mapping[str, str] = MappingProxyType({"Cache-Control": "no-store"}),
    ) -> None:
        super().__init__(self._all(first), media_type=media_type, headers=headers)
        self._pieces, self._client_timeout = pieces, client_timeout

    async def _all(self, first: bytes) -> AsyncIterator[bytes]:
        if first:
            yield first
        async for piece in self._pieces:
            yield piece

    async def stream_response(self, send: Send) -> None:
        """Send all of it."""

        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(self._client_timeout):
                await send(message)

        try:
            with contextlib.suppress(TimeoutError):  # the server then closes the connection
                await super().stream_response(send_in_time)
        finally:
            with anyio.CancelScope(shield=True):
                await self._pieces.aclose()


# --- counters ---------------------------------------------------------------------------------------------------------


class Metrics:
    """What a server counts, for Prometheus; in a registry of its own, so that several servers live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

    def counter(self, name: str, what: str, *labels: str) -> Counter:
        """A number that only grows."""
        return Counter(f"medplib_{name}", what, labels, registry=self.registry)

    def histogram(self, name: str, what: str) -> Histogram:
        """Seconds, by how many took at most so long."""
        return Histogram(f"medplib_{name}", what, registry=self.registry, buckets=_SECONDS)

    def gauge(self, name: str, what: str, value: Callable[[], float] | None = None) -> Gauge:
        """A number as it is now; ``value`` is asked each time that the metrics are."""
        gauge = Gauge(f"medplib_{name}", what, registry=self.registry)
        if value is not None:
            gauge.set_function(value)
        return gauge

    def answer(self) -> Response:
        """The metrics as ``GET /metrics`` answers them."""
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)
