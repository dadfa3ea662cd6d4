"""A worker as an ASGI application: one engine behind HTTP.

It speaks LLaVA's and FastChat's protocol (``protocol.py``). What fails before the answer begins is a status and a
sentence; after that it is a last chunk. The queue is bounded, and a client that leaves frees its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from model.errors import MedPLIBError
from model.serve.auth import WorkerGuard
from model.serve.errors import Refusal, answer_errors, client_sentence
from model.serve.heartbeat import Heart, Registration
from model.serve.limits import BodyLimit, ServeLimits
from model.serve.protocol import Chunk, ErrorCode, WorkerStatus, error_chunk
from model.serve.server import Metrics, TimedStream, until_left
from model.serve.worker_loop import EngineLoop
from model.serve.worker_requests import Asked, last_chunk, read_request

if TYPE_CHECKING:
    from model.inference.engine import Engine

_CROWDED = ("busy", "draining")  # a crowd must not fill the log

_log = logging.getLogger("model.serve.model_worker")  # also where it is run as a program


@dataclass(frozen=True)
class WorkerSettings:
    """How a worker behaves.

    Attributes:
        model_names: what it answers for; the first is its own.
        capacity: requests it takes at once, waiting and running.
        limits: of one request.
        request_timeout: seconds an answer may take.
        client_timeout: seconds a client may take to accept the next piece of its answer.
        max_held_bytes: of decoded pictures and regions of all requests.
        key: secret that the controller shows; without one only programs of this machine are answered.
        registration: with whom it registers; None for nobody.
        grace: seconds that answers under way may take after a request to stop.
        stall_seconds: without a step of the engine, after which it is taken to be stuck.
        log_conversations: whether questions and answers are logged.
        conversation_turns: questions of a conversation that the model was trained on.
        details: about the model, for people.
    """

    model_names: tuple[str, ...] = ("medplib-nano",)
    capacity: int = 72
    limits: ServeLimits = field(default_factory=ServeLimits)
    request_timeout: float = 240.0
    client_timeout: float = 60.0
    max_held_bytes: int = 1 << 30
    key: str | None = None
    registration: Registration | None = None
    grace: float = 30.0
    stall_seconds: float = 120.0
    log_conversations: bool = False
    conversation_turns: int = 1
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = ("capacity", "request_timeout", "client_timeout", "grace", "stall_seconds")
        for name in names:
            if not getattr(self, name) > 0:
                raise MedPLIBError(f"{name} is {getattr(self, name)}; give a number above 0")


class WorkerMetrics(Metrics):
    """What a worker counts, times from taking a request on; a request ends in its answer's ``finish``, or the name of
    an error code in lower case.
    """

    def __init__(self) -> None:
        super().__init__()
        self.requests = self.counter("worker_requests", "Requests, by how they ended", "outcome")
        self.first_token = self.histogram("worker_first_token_seconds", "Time to the first token")
        self.duration = self.histogram("worker_answer_seconds", "Time of whole answers")
        self.tokens = self.counter("worker_tokens", "Tokens generated")
        self.masks = self.counter("worker_masks", "Masks decoded")


class Worker:
    """What the routes work on.

    Args:
        engine: started, or stepped by somebody else.
        settings: how the worker behaves.
    """

    def __init__(self, engine: Engine, settings: WorkerSettings) -> None:
        self.settings = settings
        self.loop = EngineLoop(engine, settings.stall_seconds)
        self.metrics = WorkerMetrics()
        self.metrics.gauge("worker_waiting", "Requests waiting", lambda: self.loop.count("waiting"))
        self.metrics.gauge("worker_running", "Requests being answered", lambda: self.loop.count("running"))
        self.draining = False
        self.active = self.requests = self.answered = 0
        self._held = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._reading = ThreadPoolExecutor(2, thread_name_prefix="medplib-read")
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="medplib-write")  # waits for no picture to be read
        self.heart = Heart(settings.registration, self.status) if settings.registration else None
        self._beating: asyncio.Task[None] | None = None

    # --- its life -------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Beat while the application runs."""
        if self.heart is not None:
            self._beating = asyncio.create_task(self.heart.run())
        try:
            yield
        finally:
            if self._beating is not None:
                self._beating.cancel()
                await asyncio.gather(self._beating, return_exceptions=True)
            for pool in (self._reading, self._writing):
                pool.shutdown(wait=False, cancel_futures=True)

    async def drain(self) -> None:
        """Take nothing new, and let the controller know; what there is goes on."""
        if not self.draining:
            self.draining = True
            _log.info("draining: %d requests are under way", self.active)
        if self.heart is not None:
            await self.heart.announce()

    async def finish(self) -> None:
        """Drain, and end what does not end by itself within the grace time."""
        draining = asyncio.create_task(self.drain())
        try:
            async with asyncio.timeout(self.settings.grace):
                await self._idle.wait()
        except TimeoutError:
            _log.warning("%d requests did not end within %g s and are given up", self.active, self.settings.grace)
            await self.loop.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5):  # to notify the clients
                    await self._idle.wait()
        await draining

    def status(self) -> WorkerStatus:
        """How it is now."""
        details = {
            **self.settings.details,
            **self.loop.engine.status(),
            "requests": self.requests,
            "answered": self.answered,
            "trouble": self.loop.trouble(),
        }
        return WorkerStatus(
            model_names=list(self.settings.model_names),
            speed=1.0,
            queue_length=self.active,
            capacity=self.settings.capacity,
            draining=self.draining,
            conversation_turns=self.settings.conversation_turns,
            details=details,
        )

    # --- answers --------------------------------------------------------------------------------------------------

    def check_open(self) -> None:
        """Whether a request would be taken now.

        Raises:
            Refusal: the worker is draining, stuck or full.
        """
        if self.draining:
            raise Refusal(ErrorCode.DRAINING, "this worker takes nothing new; ask again", retry_after=1)
        if stuck := self.loop.stuck():
            _log.error("%s", stuck)
            raise Refusal(ErrorCode.FAILED, "this worker cannot answer at the moment; ask again")
        if self.active >= self.settings.capacity:
            sentence = f"{self.active} requests are waiting and running already; ask again later"
            raise Refusal(ErrorCode.BUSY, sentence, self.retry_after())

    def retry_after(self) -> float:
        """Seconds until what waits and runs now is answered, about; by then all of it has had its time."""
        return min(self.settings.request_timeout, self.loop.retry_after(self.active))

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """A place for a request.

        Raises:
            Refusal: the worker is draining, stuck or full.
        """
        self.check_open()
        self.active += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.active -= 1
            if not self.active:
                self._idle.set()

    @contextlib.asynccontextmanager
    async def reading(self, body: bytes) -> AsyncIterator[Asked]:
        """What a request asks for; its picture is counted while it is held.

        Raises:
            MedPLIBError: it is malformed.
            Refusal: too many pictures are held already.
        """
        settings = self.settings
        work = partial(read_request, body, settings.model_names, settings.limits)
        asked = await asyncio.get_running_loop().run_in_executor(self._reading, work)
        if self._held and self._held + asked.num_bytes > settings.max_held_bytes:
            raise Refusal(ErrorCode.BUSY, "too many large pictures are being asked about; ask again later", 5)
        self._held += asked.num_bytes
        try:
            yield asked
        finally:
            self._held -= asked.num_bytes

    async def answer(self, body: bytes) -> AsyncGenerator[bytes]:
        """The chunks of an answer as they go over the wire; an error after the first one is the last.

        Raises:
            Refusal: there is no answer.
        """
        name, begun, outcome = secrets.token_hex(4), time.perf_counter(), "left"  # unless something else ends it
        streaming, metrics, settings = False, self.metrics, self.settings
        try:
            with self.admitted():
                async with self.reading(body) as asked:
                    prompt = asked.message.prompt
                    timeout = min(asked.message.timeout or settings.request_timeout, settings.request_timeout)
                    async with contextlib.aclosing(self.loop.ask(asked.request, timeout)) as answers:
                        async for answer in answers:
                            if not streaming:
                                metrics.first_token.observe(time.perf_counter() - begun)
                            if isinstance(answer, str):
                                streaming = True
                                yield Chunk(text=prompt + answer, answer=answer).encode()
                                continue
                            if settings.log_conversations:
                                _log.info("request %s asked %r and was answered %r", name, prompt, answer.text)
                            loop = asyncio.get_running_loop()
                            chunk = await loop.run_in_executor(self._writing, last_chunk, asked, answer)
                            streaming = True
                            yield chunk
                            outcome = answer.finish
                            self.answered += 1
                            metrics.tokens.inc(answer.new_tokens)
                            metrics.masks.inc(len(answer.masks))
        except Exception as error:  # noqa: BLE001 - the client gets any failure
            match error:
                case Refusal():
                    refusal = error
                case MedPLIBError():
                    refusal = Refusal(ErrorCode.BAD_INPUT, client_sentence(error))
                case _:
                    _log.exception("request %s failed", name)
                    sentence = f"the worker failed on this request ({type(error).__name__})"
                    refusal = Refusal(ErrorCode.FAILED, sentence)
            outcome = refusal.code.name.lower()
            if not streaming:
                raise refusal from None
            yield error_chunk(refusal.code, refusal.sentence).encode()
        finally:
            self.note(name, outcome, begun)

    def note(self, name: str, outcome: str, begun: float) -> None:
        """Count a request that is over."""
        seconds = time.perf_counter() - begun
        self.requests += 1
        self.metrics.requests.labels(outcome=outcome).inc()
        self.metrics.duration.observe(seconds)
        level = logging.DEBUG if outcome in _CROWDED else logging.INFO
        _log.log(level, "request %s: %s after %.2f s", name, outcome, seconds)


def make_worker_app(engine: Engine, settings: WorkerSettings | None = None) -> FastAPI:
    """The worker as an ASGI application; ``app.state.worker`` is what its routes work on.

    Args:
        engine: shared by all requests; started by the caller, who closes it too.
        settings: how the worker behaves.
    """
    settings = settings or WorkerSettings()
    worker = Worker(engine, settings)
    guard = WorkerGuard(settings.key, name="worker's key")
    app = FastAPI(title="MedPLIB worker", lifespan=worker.lifespan, openapi_url=None)
    app.state.worker = worker
    app.add_middleware(BodyLimit, max_bytes=settings.limits.max_body_bytes)
    answer_errors(app)

    @app.post("/worker_generate_stream", dependencies=[Depends(guard)])
    async def worker_generate_stream(request: Request) -> Response:
        begun = time.perf_counter()
        try:
            worker.check_open()  # before its body is read, which may take long
            body = await request.body()
        except (Refusal, ClientDisconnect) as error:
            worker.note("unread", error.code.name.lower() if isinstance(error, Refusal) else "left", begun)
            raise
        pieces = worker.answer(body)
        first = await until_left(anext(pieces), request.receive)
        return TimedStream(pieces, settings.client_timeout, first)

    @app.post("/worker_get_status", dependencies=[Depends(guard)])
    async def worker_get_status() -> WorkerStatus:
        return worker.status()

    @app.post("/drain", dependencies=[Depends(guard)])
    async def drain() -> WorkerStatus:
        await worker.drain()
        return worker.status()

    @app.get("/livez")
    async def livez() -> JSONResponse:
        if trouble := worker.loop.trouble():
            raise Refusal(ErrorCode.FAILED, trouble, status=503)
        return JSONResponse({"live": True})

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        if worker.draining:
            raise Refusal(ErrorCode.DRAINING, "this worker takes nothing new", retry_after=1)
        await livez()
        return JSONResponse({"ready": True})

    @app.get("/metrics")
    async def metrics() -> Response:
        return worker.metrics.answer()

    return app
