"""One request to a worker at its checked addresses, and its answer back: the bytes as they are, or as chunks.

Until something of the answer was handed on, a worker that fails is replaced by another one of the same model. An answer
is read from the worker only as fast as it is taken, so a slow client costs no memory; a client that leaves (the
iterator is closed) closes the worker's connection, which is how the worker learns of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import httpx

from model.serve.auth import CheckedAddress, bearer
from model.serve.errors import Refusal, sentence_of
from model.serve.protocol import END_OF_CHUNK, Chunk, ErrorCode, GenerateRequest, Message, WorkerStatus
from model.serve.registry import Registry, Worker
from model.serve.server import Metrics, keep_alive_options

_log = logging.getLogger(__name__)

_RETRIED = (ErrorCode.FAILED, ErrorCode.BUSY, ErrorCode.DRAINING, ErrorCode.NO_WORKER)
_KNOWN_STATUSES = {
    429: (ErrorCode.BUSY, "the worker is busy; ask again"),
    503: (ErrorCode.DRAINING, "the worker takes nothing new; ask again"),
    504: (ErrorCode.TIMEOUT, "the worker took too long; ask for less"),
}
_LOOK_SECONDS = 0.1  # between looks at whether a worker is back
_MAX_ERROR_BYTES = 64 * 2**10
_KEEP_ALIVE = 4.0  # seconds; published workers close an idle connection after 5
_TCP_OPTIONS = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}


@dataclass(frozen=True)
class ForwardSettings:
    """Bounds of what is said to workers.

    Attributes:
        tries: workers that one request is sent to at most.
        restart_wait: seconds that a request waits for a worker that lost its connections, as one that crashed and is
            being started again; for a worker that fails otherwise, or was never there, nobody waits.
        connect_timeout: seconds until a worker takes a connection.
        silence_timeout: seconds a worker may say nothing, before its first chunk or between two.
        status_timeout: seconds a worker may take to say how it is.
        max_connections: to all workers together.
        max_chunk_bytes: of one object of an answer.
    """

    tries: int = 3
    restart_wait: float = 30.0
    connect_timeout: float = 3.0
    silence_timeout: float = 300.0
    status_timeout: float = 3.0
    max_connections: int = 1000
    max_chunk_bytes: int = 64 * 2**20


class ControllerMetrics(Metrics):
    """What a controller counts; an answer ends in ``ok``, the name of an error code in lower case, or ``left``."""

    def __init__(self) -> None:
        super().__init__()
        self.requests = self.counter("controller_requests", "Answers, by how they ended", "outcome")
        self.tries = self.counter("controller_tries", "Requests sent to workers", "retry")
        self.worker_failures = self.counter("controller_worker_failures", "Faults of workers")
        self.first_chunk = self.histogram("controller_first_chunk_seconds", "Time to a worker's first chunk")
        self.duration = self.histogram("controller_answer_seconds", "Time of whole answers")
        self.bytes = self.counter("controller_answer_bytes", "Bytes of answers handed on")
        self.running = self.gauge("controller_running", "Answers under way")


class WorkerCaller:
    """Posts to workers; one for all of them.

    Args:
        key: secret that workers ask for.
        settings: bounds of time and number.
    """

    def __init__(self, key: str | None = None, settings: ForwardSettings | None = None) -> None:
        self.settings = waits = settings or ForwardSettings()
        self._headers = {
            **bearer(key),
            "Accept": "*/*",
            "Accept-Encoding": "identity",
            "Content-Type": "application/json",
        }
        timeout = httpx.Timeout(waits.silence_timeout, connect=waits.connect_timeout, pool=waits.connect_timeout)
        self._timeout = timeout.as_dict()
        connections = waits.max_connections
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=64, keepalive_expiry=_KEEP_ALIVE)
        self._transport = httpx.AsyncHTTPTransport(limits=limits, socket_options=keep_alive_options(_TCP_OPTIONS))
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
            raise Refusal(
                ErrorCode.TIMEOUT, f"{where} does not report its status within {seconds}; try later"
            ) from error
        except (httpx.TransportError, ValueError) as error:
            sentence = f"{where} does not report its status; is it running, and with the same key?"
            raise Refusal(ErrorCode.BAD_INPUT, sentence) from error


async def read_some(response: httpx.Response) -> bytes:
    """The body's beginning, enough for any error or status."""
    found = b""
    async for data in response.aiter_raw():
        found += data
        if len(found) > _MAX_ERROR_BYTES:
            break
    return found[:_MAX_ERROR_BYTES]


class _Fault(Exception):
    """What went wrong with one worker.

    Args:
        error: reply to the client, should no other worker answer.
        counts: whether it speaks against the worker.
    """

    def __init__(self, error: Refusal, counts: bool) -> None:
        super().__init__(error.sentence)
        self.error, self.counts = error, counts


class Forwarder:
    """Sends requests to the workers of a registry.

    Args:
        registry: the workers.
        caller: the client that connects to them.
        metrics: what happens is counted there.
    """

    def __init__(self, registry: Registry, caller: WorkerCaller, metrics: ControllerMetrics) -> None:
        self.registry, self.caller, self.metrics = registry, caller, metrics
        self.settings = caller.settings
        self._waits: set[asyncio.Timeout] = set()
        self._stop_at: float | None = None

    def stop(self, grace: float) -> None:
        """End every answer with an error that is not complete within ``grace`` seconds; for the event loop's thread."""
        self._stop_at = asyncio.get_running_loop().time() + grace
        for wait in tuple(self._waits):
            if not wait.expired():
                wait.reschedule(self._stop_at)

    @property
    def _stopped(self) -> bool:
        return self._stop_at is not None and asyncio.get_running_loop().time() >= self._stop_at

    # --- answers --------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk]:
        """The chunks of an answer. A chunk with an error code, which a worker may send late, is the last one.

        Raises:
            Refusal: no worker answers, or the one that did failed on the way.
        """
        body = request.model_dump_json(exclude_unset=True).encode()
        async with contextlib.aclosing(self.generate_bytes(body, request.model)) as pieces:
            async for piece in pieces:
                for part in piece.split(END_OF_CHUNK):
                    if part.strip():
                        try:
                            chunk = Chunk.model_validate_json(part)
                        except ValueError as error:
                            raise _unreadable().error from error
                        yield chunk

    async def generate_bytes(self, body: bytes, model: str) -> AsyncGenerator[bytes]:
        """The bytes of an answer as a worker sends them, cut only between chunks.

        Args:
            body: the request, JSON of a ``GenerateRequest``.
            model: whose answer it wants.

        Raises:
            Refusal: no worker answers, or the one that did failed on the way.
        """
        models = self.registry.models()
        if not model and len(models) == 1:
            (model,) = models
        begun, outcome = time.perf_counter(), "left"
        self.metrics.running.inc()
        try:
            async with contextlib.aclosing(self._attempts(body, model)) as pieces:
                async for piece in pieces:
                    self.metrics.bytes.inc(len(piece))
                    yield piece
            outcome = "ok"
        except Refusal as error:
            outcome = error.code.name.lower()
            raise
        finally:
            self.metrics.running.dec()
            self.metrics.requests.labels(outcome=outcome).inc()
            self.metrics.duration.observe(time.perf_counter() - begun)

    async def _attempts(self, body: bytes, model: str) -> AsyncGenerator[bytes]:
        """An answer from one worker after another, until one has begun to answer.

        One that takes no connection was not sent the request, so the same one may be tried again once it is back.
        """
        tried: list[str] = []
        away: list[str] = []  # took no connection
        last: Refusal | None = None
        waits = False
        end = asyncio.get_running_loop().time() + self.settings.restart_wait
        while len(tried) < self.settings.tries:
            if (name := self.registry.choose(model, [*tried, *away])) is None:
                waits = waits or self.registry.may_come_back(model)  # on, should the worker be forgotten meanwhile
                known = last is not None and last.code != ErrorCode.NO_WORKER
                if not waits or known or self._stopped or asyncio.get_running_loop().time() >= end:
                    break
                away.clear()
                await asyncio.sleep(_LOOK_SECONDS)
                continue
            self.metrics.tries.labels(retry="true" if last else "false").inc()
            begun = False
            try:
                async with contextlib.aclosing(self._from_worker(name, body)) as pieces:
                    async for piece in pieces:
                        begun = True
                        yield piece
                self.registry.report_success(name)
                return
            except _Fault as fault:
                last = self._note(name, fault)
                if begun or last.code not in _RETRIED or self._stopped:
                    break
                (away if last.code == ErrorCode.NO_WORKER else tried).append(name)
            finally:
                self.registry.release(name)
        raise last or self._no_worker(model)

    def _note(self, name: str, fault: _Fault) -> Refusal:
        if fault.counts:
            cause = type(fault.__cause__).__name__ if fault.__cause__ else "no exception"
            code = fault.error.code.name.lower()  # nothing that a worker said, as that may hold what a client asked
            _log.warning("worker %s failed: %s, status %d, %s", name, code, fault.error.status, cause)
            lost = isinstance(fault.__cause__, (httpx.NetworkError, httpx.RemoteProtocolError))  # silence is no restart
            self.registry.report_failure(name, away=lost)
            self.metrics.worker_failures.inc()
        elif fault.error.code == ErrorCode.DRAINING:
            self.registry.rest(name)
        else:
            self.registry.report_success(name)
        return fault.error

    def _no_worker(self, model: str) -> Refusal:
        models = self.registry.models()
        if model in models:
            wait = self.registry.retry_after(model)
            return Refusal(ErrorCode.NO_WORKER, f"{model} is not available at the moment; ask again", wait)
        if not models:
            return Refusal(ErrorCode.NO_WORKER, "no model is available at the moment; ask again later", 5)
        there = ", ".join(models)
        return Refusal(ErrorCode.BAD_INPUT, f"there is no model {model[:100]!r}; there is {there}", status=404)

    async def _from_worker(self, name: str, body: bytes) -> AsyncGenerator[bytes]:
        """Whole chunks of one worker's answer, as they come.

        Raises:
            _Fault: whatever went wrong.
        """
        worker = self.registry.get(name)
        assert worker is not None
        begun = time.perf_counter()
        whole = _WholeChunks(self.settings.max_chunk_bytes)
        async with contextlib.AsyncExitStack() as stack:
            response = await self._guarded(worker, self.caller.post(worker.address, "/worker_generate_stream", body))
            stack.push_async_callback(response.aclose)
            if response.status_code != 200:
                raise await self._guarded(worker, _status_fault(response))
            pieces = response.aiter_raw()
            while (data := await self._guarded(worker, anext(pieces, None))) is not None:
                if not (piece := whole.feed(data)):
                    continue
                if not whole.given:
                    _check_first(piece)
                    self.metrics.first_chunk.observe(time.perf_counter() - begun)
                whole.given = True
                yield piece
        if whole.rest or not whole.given:
            raise _failed("the worker ended its answer before it was complete; ask again")

    async def _guarded(self, worker: Worker, step: Any) -> Any:
        """Wait for one step of a worker's; its failures become faults, and its going, or ours, ends the wait."""
        wait = asyncio.timeout_at(self._stop_at)

        def give_up() -> None:
            if not wait.expired():
                wait.reschedule(asyncio.get_running_loop().time())

        try:
            async with wait:
                self._waits.add(wait)
                worker.gone.add(give_up)
                try:
                    return await step
                finally:
                    self._waits.discard(wait)
                    worker.gone.discard(give_up)
        except TimeoutError as error:
            if wait.when() == self._stop_at:  # a loop may fire some part of a millisecond before that
                stopped = Refusal(ErrorCode.FAILED, "the controller is being stopped; ask again in a while", 5)
                raise _Fault(stopped, counts=False) from error
            raise _failed("the worker went silent and was given up; ask again") from error
        except httpx.PoolTimeout as error:
            busy = Refusal(ErrorCode.BUSY, "too many answers are under way; ask again later", 1)
            raise _Fault(busy, counts=False) from error
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            away = Refusal(ErrorCode.NO_WORKER, "the model's worker cannot be reached; ask again", 5)
            raise _Fault(away, counts=True) from error
        except httpx.TimeoutException as error:
            sentence = f"the worker said nothing for {self.settings.silence_timeout:g} s; ask again, or for less"
            raise _Fault(Refusal(ErrorCode.TIMEOUT, sentence), counts=True) from error
        except httpx.TransportError as error:
            raise _failed("the connection to the worker broke; ask again") from error


class _WholeChunks:
    """Bytes as they arrive → bytes up to the last end of a chunk."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.rest = bytearray()
        self.given = False

    def feed(self, data: bytes) -> bytes:
        """What is complete with these bytes; empty while nothing is.

        Raises:
            _Fault: a chunk is too long, or no JSON object.
        """
        self.rest += data
        end = len(self.rest) - len(data) + data.rfind(END_OF_CHUNK) + 1 if END_OF_CHUNK in data else 0
        whole = bytes(self.rest[:end])
        del self.rest[:end]
        for chunk in whole[:-1].split(END_OF_CHUNK):
            chunk = chunk.strip()
            if chunk and not (chunk.startswith(b"{") and chunk.endswith(b"}")):
                raise _unreadable()
        if len(self.rest) > self.max_bytes:
            raise _unreadable()
        return whole


class _Head(Message):
    """The part of a chunk that shows whether it is one; its masks are not read."""

    text: str
    error_code: int = 0


def _check_first(piece: bytes) -> None:
    """Look at an answer's first chunk.

    Raises:
        _Fault: it is an error, or nothing that can be read.
    """
    try:
        chunk = _Head.model_validate_json(piece.split(END_OF_CHUNK, 1)[0])
    except ValueError as error:
        raise _unreadable() from error
    if chunk.error_code:
        code = ErrorCode(chunk.error_code)
        raise _Fault(Refusal(code, chunk.text), counts=code == ErrorCode.FAILED)


def _failed(sentence: str) -> _Fault:
    return _Fault(Refusal(ErrorCode.FAILED, sentence, status=502), counts=True)


def _unreadable() -> _Fault:
    return _failed("the worker sent something that is no answer; ask again")


async def _status_fault(response: httpx.Response) -> _Fault:
    """What a status other than 200 means."""
    status = response.status_code
    said = sentence_of(await read_some(response))
    wait = response.headers.get("Retry-After", "")
    retry_after = float(wait) if wait.isdigit() and len(wait) < 6 else None
    if status in _KNOWN_STATUSES:
        code, otherwise = _KNOWN_STATUSES[status]
        return _Fault(Refusal(code, said or otherwise, None if status == 504 else retry_after or 1), counts=False)
    if status in (401, 403):
        _log.error("a worker does not accept the controller's key; start both with the same --api-key")
        return _failed("the model's worker takes no requests at the moment; ask again later")
    if status in (400, 413, 422):
        unread = Refusal(ErrorCode.BAD_INPUT, said or "the worker cannot read the request", status=status)
        return _Fault(unread, counts=False)
    return _failed(said if said and status >= 500 else f"the worker answered with status {status}; ask again")
