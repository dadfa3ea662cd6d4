"""A worker as an ASGI application: one engine behind HTTP.

It speaks LLaVA's and FastChat's protocol (``protocol.py``). What fails before the answer begins is a status and a
sentence; after that it is a last chunk. Requests wait in a queue with an end, and whoever leaves frees his place.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from model.errors import MedPLIBError
from model.inference.answer import Answer
from model.serve.access import WorkerGuard
from model.serve.heartbeat import Heart, Registration
from model.serve.limits import BodyLimit, ServeLimits
from model.serve.measuring import WorkerMetrics
from model.serve.protocol import ErrorCode, WorkerStatus, error_chunk
from model.serve.refusals import Refusal, answer_errors, client_sentence
from model.serve.worker_loop import EngineLoop
from model.serve.worker_requests import Asked, last_chunk, read_request, text_chunk

if TYPE_CHECKING:
    from model.inference.engine import Engine

Result = TypeVar("Result")
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
        no_mask_below: masks of a lower probability of presence are left empty, where a request does not say.
        max_held_bytes: of decoded pictures and regions of all requests.
        key: secret that the controller shows; without one only programs of this machine are answered.
        registration: with whom it registers; None for nobody.
        grace: seconds that answers under way may take once it is told to stop.
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
    no_mask_below: float | None = None
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


class Worker:
    """What the routes work on.

    Args:
        engine: started, or stepped by somebody else.
        settings: how the worker behaves.
        on_start: called on the event loop before the first request.
    """

    def __init__(
        self, engine: Engine, settings: WorkerSettings, on_start: Callable[[Worker], None] | None = None
    ) -> None:
        self.settings, self._on_start = settings, on_start
        self.loop = EngineLoop(engine, settings.stall_seconds)
        self.metrics = WorkerMetrics()
        self.metrics.watch(lambda: self.loop.count("waiting"), lambda: self.loop.count("running"))
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
        if self._on_start is not None:
            self._on_start(self)
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
                async with asyncio.timeout(5):  # to tell the clients
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

    async def read(self, body: bytes) -> Asked:
        """What a request asks for.

        Raises:
            MedPLIBError: it is malformed.
            Refusal: too many pictures are held already.
        """
        settings = self.settings
        work = partial(read_request, body, settings.model_names, settings.limits, settings.no_mask_below)
        asked = await asyncio.get_running_loop().run_in_executor(self._reading, work)
        if self._held and self._held + asked.num_bytes > settings.max_held_bytes:
            raise Refusal(ErrorCode.BUSY, "too many large pictures are being asked about; ask again later", 5)
        return asked

    @contextlib.contextmanager
    def holding(self, asked: Asked) -> Iterator[None]:
        """Count the picture of a request while it is held."""
        self._held += asked.num_bytes
        try:
            yield
        finally:
            self._held -= asked.num_bytes

    async def aside(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Do what an answer still needs outside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._writing, work, *arguments)


class GenerateRoute:
    """``POST /worker_generate_stream`` as an ASGI application, which hears of a client's leaving at any moment.

    Args:
        worker: who answers.
        guard: who may ask.
    """

    def __init__(self, worker: Worker, guard: WorkerGuard) -> None:
        self.worker, self.guard = worker, guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request.

        Raises:
            Refusal, MedPLIBError: it failed before its answer began.
        """
        await self.guard(Request(scope))
        exchange = _Exchange(self.worker, send)
        try:
            self.worker.check_open()  # before its body is read, which may take long
            body = await Request(scope, receive).body()
            with self.worker.admitted():
                await _until_left(exchange.run(body), receive)
        except ClientDisconnect:
            exchange.outcome = "left"
        except Refusal as refusal:
            exchange.outcome = refusal.code.name.lower()
            raise
        finally:
            exchange.note()


async def _until_left(work: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Do the work; who leaves ends it."""
    working, leaving = asyncio.create_task(work), asyncio.create_task(_left(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
    if not working.cancelled():
        working.result()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Exchange:
    """One request and its answer.

    Args:
        worker: who answers.
        send: to the client.
    """

    def __init__(self, worker: Worker, send: Send) -> None:
        self.worker, self.metrics, self._send = worker, worker.metrics, send
        self.name = secrets.token_hex(4)
        self.outcome = "left"  # unless something else is seen to end it
        self._begun = time.perf_counter()
        self._streaming = False

    async def run(self, body: bytes) -> None:
        """Read the request, stream its answer.

        Raises:
            Refusal, MedPLIBError: it failed before its answer began.
        """
        try:
            asked = await self.worker.read(body)
            del body
            with self.worker.holding(asked):
                await self._answer(asked)
        except Refusal as refusal:
            await self._fail(refusal)
        except MedPLIBError as error:
            await self._fail(Refusal(ErrorCode.BAD_INPUT, client_sentence(error)))
        except _TakesNothing:
            self.outcome = "left"
        except Exception as error:  # noqa: BLE001 - whatever it is, the client hears of it
            _log.exception("request %s failed", self.name)
            await self._fail(Refusal(ErrorCode.FAILED, f"the worker failed on this request ({type(error).__name__})"))

    async def _answer(self, asked: Asked) -> None:
        settings = self.worker.settings
        timeout = min(asked.timeout or settings.request_timeout, settings.request_timeout)
        async with contextlib.aclosing(self.worker.loop.ask(asked.request, timeout)) as answers:
            async for answer in answers:
                if not self._streaming:
                    self.metrics.first_token.observe(time.perf_counter() - self._begun)
                if isinstance(answer, str):
                    await self._stream(text_chunk(asked, answer))
                    continue
                self._log_conversation(asked, answer)
                await self._stream(await self.worker.aside(last_chunk, asked, answer))
                self.outcome = answer.finish
                self.worker.answered += 1
                self.metrics.tokens.inc(answer.new_tokens)
                self.metrics.masks.inc(len(answer.masks))
        await self._stream(b"", more=False)

    async def _fail(self, refusal: Refusal) -> None:
        """Tell why there is no answer, or no end of it.

        Raises:
            Refusal: the answer has not begun, so that this can be told by a status.
        """
        self.outcome = refusal.code.name.lower()
        if not self._streaming:
            raise refusal
        with contextlib.suppress(_TakesNothing):
            await self._stream(error_chunk(refusal.code, refusal.sentence).encode())
            await self._stream(b"", more=False)

    async def _stream(self, piece: bytes, more: bool = True) -> None:
        """Send a piece, as soon as the client takes it.

        Raises:
            _TakesNothing: it takes nothing.
        """
        if not self._streaming:
            self._streaming = True
            headers = [(b"content-type", b"application/octet-stream"), (b"cache-control", b"no-store")]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async with asyncio.timeout(self.worker.settings.client_timeout):
                await self._send({"type": "http.response.body", "body": piece, "more_body": more})
        except (TimeoutError, OSError):
            raise _TakesNothing from None

    def _log_conversation(self, asked: Asked, answer: Answer) -> None:
        if self.worker.settings.log_conversations:
            _log.info("request %s asked %r and was answered %r", self.name, asked.prompt, answer.text)

    def note(self) -> None:
        """Count the request."""
        seconds = time.perf_counter() - self._begun
        self.worker.requests += 1
        self.metrics.requests.labels(outcome=self.outcome).inc()
        self.metrics.duration.observe(seconds)
        level = logging.DEBUG if self.outcome in _CROWDED else logging.INFO
        _log.log(level, "request %s: %s after %.2f s", self.name, self.outcome, seconds)


class _TakesNothing(Exception):
    """The client is there no more, or accepts nothing of its answer."""


def make_worker_app(
    engine: Engine, settings: WorkerSettings | None = None, on_start: Callable[[Worker], None] | None = None
) -> FastAPI:
    """The worker as an ASGI application; ``app.state.worker`` is what its routes work on.

    Args:
        engine: shared by all requests; started by the caller, who closes it too.
        settings: how the worker behaves.
        on_start: called on the event loop before the first request.
    """
    settings = settings or WorkerSettings()
    worker = Worker(engine, settings, on_start)
    guard = WorkerGuard(settings.key, name="worker's key")
    app = FastAPI(title="MedPLIB worker", lifespan=worker.lifespan, openapi_url=None)
    app.state.worker = worker
    app.add_middleware(BodyLimit, max_bytes=settings.limits.max_body_bytes)
    answer_errors(app)
    app.router.routes.append(Route("/worker_generate_stream", GenerateRoute(worker, guard), methods=["POST"]))

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
        if trouble := worker.loop.trouble():
            raise Refusal(ErrorCode.FAILED, trouble, status=503)
        return JSONResponse({"ready": True})

    @app.get("/metrics")
    async def metrics() -> Response:
        return worker.metrics.answer()

    return app
