"""The controller's calls to a worker: to its checked addresses only, with the key, within bounds of time."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import httpx

from model.serve.access import CheckedAddress, bearer
from model.serve.protocol import ErrorCode, WorkerStatus
from model.serve.refusals import Refusal

_MAX_ERROR_BYTES = 64 * 2**10
_KEEP_ALIVE = 4.0  # seconds; published workers close an idle connection after 5
_TCP_OPTIONS = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}


@dataclass(frozen=True)
class CallSettings:
    """Bounds of time and number.

    Attributes:
        connect_timeout: seconds until a worker takes a connection.
        silence_timeout: seconds a worker may say nothing, before its first chunk or between two.
        status_timeout: seconds a worker may take to say how it is.
        max_connections: to all workers together.
    """

    connect_timeout: float = 3.0
    silence_timeout: float = 300.0
    status_timeout: float = 3.0
    max_connections: int = 1000


class WorkerCaller:
    """Posts to workers; one for all of them.

    Args:
        key: secret that workers ask for.
        settings: bounds of time and number.
    """

    def __init__(self, key: str | None = None, settings: CallSettings | None = None) -> None:
        self.settings = settings or CallSettings()
        self._headers = {
            **bearer(key),
            "Accept": "*/*",
            "Accept-Encoding": "identity",
            "Content-Type": "application/json",
        }
        waits = self.settings
        timeout = httpx.Timeout(waits.silence_timeout, connect=waits.connect_timeout, pool=waits.connect_timeout)
        self._timeout = timeout.as_dict()
        self._transport = _make_transport(self.settings)
        self._urls = lru_cache(1024)(httpx.URL)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._transport.aclose()

    async def post(self, address: CheckedAddress, path: str, body: bytes) -> httpx.Response:
        """Post to a worker at the first of its checked addresses that takes a connection; give the open response.

        Raises:
            httpx.TransportError: the worker cannot be reached, or breaks off.
        """
        *others, last = address.endpoints
        for endpoint in others:
            with contextlib.suppress(httpx.ConnectError, httpx.ConnectTimeout):
                return await self._send(address, endpoint + path, body)
        return await self._send(address, last + path, body)

    async def _send(self, address: CheckedAddress, url: str, body: bytes) -> httpx.Response:
        extensions: dict[str, Any] = {"timeout": self._timeout}
        if url.startswith("https"):
            extensions["sni_hostname"] = address.server_name  # the certificate names the host, not its address
        headers = {**self._headers, "Host": address.host}
        request = httpx.Request("POST", self._urls(url), headers=headers, content=body, extensions=extensions)
        return await self._transport.handle_async_request(request)  # no cookies, no redirects, no proxies: no client

    async def status(self, address: CheckedAddress) -> WorkerStatus:
        """What a worker says of itself, within a short time.

        Raises:
            Refusal: it says nothing, or nothing that can be read.
        """
        where = f"the worker at {address.name}"
        try:
            async with asyncio.timeout(self.settings.status_timeout):
                response = await self.post(address, "/worker_get_status", b"{}")
                try:
                    if response.status_code != 200:
                        raise ValueError(f"it answered with status {response.status_code}")
                    return WorkerStatus.model_validate_json(await read_some(response))
                finally:
                    await response.aclose()
        except (TimeoutError, httpx.TimeoutException) as error:
            seconds = f"{self.settings.status_timeout:g} s"
            raise Refusal(ErrorCode.TIMEOUT, f"{where} does not tell its status within {seconds}; try later") from error
        except (httpx.TransportError, ValueError) as error:
            sentence = f"{where} does not tell its status; is it running, and with the same key?"
            raise Refusal(ErrorCode.BAD_INPUT, sentence) from error


async def read_some(response: httpx.Response) -> bytes:
    """The body's beginning, enough for any error or status."""
    found = b""
    async for data in response.aiter_raw():
        found += data
        if len(found) > _MAX_ERROR_BYTES:
            break
    return found[:_MAX_ERROR_BYTES]


def _make_transport(settings: CallSettings) -> httpx.AsyncHTTPTransport:
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]  # a machine that is off says nothing at all
    for name, value in _TCP_OPTIONS.items():
        if hasattr(socket, name):  # not everywhere
            options.append((socket.IPPROTO_TCP, getattr(socket, name), value))
    connections = settings.max_connections
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=64, keepalive_expiry=_KEEP_ALIVE)
    return httpx.AsyncHTTPTransport(limits=limits, socket_options=options)
