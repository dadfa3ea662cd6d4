"""Engine thread and event loop of a worker; answers stream from one to the other without blocking either.

The engine leaves its newest text behind and goes on; the event loop takes that. A slow client therefore gets fewer,
longer pieces, and costs the engine and the memory nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from model.errors import MedPLIBError
from model.inference.answer import Answer
from model.inference.requests import EngineFull, NotFinite, Request, Ticket
from model.serve.errors import Refusal
from model.serve.protocol import ErrorCode

_BROKEN_AFTER = 3  # failures in a row
if TYPE_CHECKING:
    from model.inference.engine import Engine

_PAUSES = 64  # between answers' ends, whose mean is the pace of a queue
_FIRST_SECONDS = 1.0  # of an answer, before one was measured

_log = logging.getLogger(__name__)


class EngineLoop:
    """An engine that steps in a thread of its own, as seen from the event loop.

    Args:
        engine: started.
        stall_seconds: within which it takes notice of a request that was given up; one that does not is stuck.
    """

    def __init__(self, engine: Engine, stall_seconds: float = 120.0) -> None:
        self.engine, self.stall_seconds = engine, stall_seconds
        self._pauses: deque[float] = deque(maxlen=_PAUSES)  # seconds between answers' ends while there is work
        self._last_end = 0.0
        self._submitting = ThreadPoolExecutor(1, thread_name_prefix="medplib-submit")
        self._given_up: dict[Ticket, float] = {}
        self._failures = 0
        self._last_failure: Exception | None = None
        self._closed = False

    def trouble(self) -> str:
        """Why nobody should rely on the engine; empty while it is well.

        One that fails is tried on, for what it was asked may be the reason, and is well again once it answers.
        """
        if stuck := self.stuck():
            return stuck
        if self._failures >= _BROKEN_AFTER:
            return f"the engine failed {self._failures} times in a row; start the worker again, its log has the reason"
        return ""

    def stuck(self) -> str:
        """Why a request would wait in vain; empty where it would not."""
        if self._closed:
            return "the engine is closed"
        oldest = min(tuple(self._given_up.values()), default=None)
        if oldest is not None and time.monotonic() - oldest > self.stall_seconds:
            return f"the engine has been stuck for more than {self.stall_seconds:g} s; start the worker anew"
        return ""

    async def close(self) -> None:
        """Close the engine: what it still has ends with an error."""
        self._closed = True
        await asyncio.to_thread(self.engine.close)
        self._submitting.shutdown(wait=False, cancel_futures=True)

    async def ask(self, request: Request, timeout: float) -> AsyncGenerator[str | Answer]:
        """The answer so far each time that it has grown, and the whole answer at the end.

        Whoever closes the iterator gives the request up, and the engine's slot is free before its next step.

        Args:
            request: what to ask.
            timeout: seconds until the whole answer.

        Raises:
            MedPLIBError: image, question or region are malformed.
            Refusal: the engine is full, failed, or took too long.
        """
        loop = asyncio.get_running_loop()
        begun = loop.time()
        if not self.count("waiting", "running"):
            self._last_end = begun  # no work until now
        stream = _Stream(loop)
        handing_in = self._submitting.submit(self._submit, request, stream)
        try:
            async with asyncio.timeout_at(begun + timeout):
                ticket = await asyncio.wrap_future(handing_in)
        except TimeoutError:
            self._give_up(handing_in)
            raise _too_late(timeout) from None
        except asyncio.CancelledError:
            self._give_up(handing_in)
            raise
        try:
            sent = ""
            while not ticket.done():
                try:
                    async with asyncio.timeout_at(begun + timeout):
                        text = await stream.news()
                except TimeoutError:
                    raise _too_late(timeout) from None
                if text != sent:
                    sent = text
                    yield text
            answer = self._outcome(ticket)
            self._pauses.append(loop.time() - self._last_end)
            self._last_end = loop.time()
            yield answer
        finally:
            self._cancel(ticket)

    def retry_after(self, count: int) -> float:
        """Seconds until so many requests are answered, at the pace of the last answers."""
        pace = sum(self._pauses) / len(self._pauses) if self._pauses else _FIRST_SECONDS / max(1, self.count("slots"))
        return max(1.0, pace * count)

    def count(self, *names: str) -> int:
        """Sum of these counts of the engine's status."""
        status = self.engine.status()
        return sum(status.get(name, 0) for name in names)

    def _submit(self, request: Request, stream: _Stream) -> Ticket:
        try:
            ticket = self.engine.submit(request, stream.update)
        except EngineFull as error:
            raise Refusal(ErrorCode.BUSY, str(error), self.retry_after(self.count("waiting", "running"))) from error
        except MedPLIBError:
            raise
        except Exception as error:
            raise self._failed(error) from error
        ticket.when_done(stream.wake)
        return ticket

    def _give_up(self, handing_in: Future[Ticket]) -> None:
        """Cancel a request whose ticket is not there yet, once it is."""

        def cancel(handed_in: Future[Ticket]) -> None:
            if not handed_in.cancelled() and handed_in.exception() is None:
                self._cancel(handed_in.result())

        handing_in.cancel()
        handing_in.add_done_callback(cancel)

    def _cancel(self, ticket: Ticket) -> None:
        def forget() -> None:
            self._given_up.pop(ticket, None)

        if not ticket.done():
            ticket.cancel()
            self._given_up[ticket] = time.monotonic()
            ticket.when_done(forget)

    def _outcome(self, ticket: Ticket) -> Answer:
        try:
            answer = ticket.result()
        except NotFinite as error:
            _log.error("%s", error)
            raise Refusal(ErrorCode.FAILED, str(error).partition(";")[0]) from error  # the rest is the operator's
        except MedPLIBError as error:
            if self._closed:
                raise Refusal(ErrorCode.DRAINING, "the worker was stopped before the answer was there") from error
            raise
        except Exception as error:
            raise self._failed(error) from error
        self._failures, self._last_failure = 0, None
        return answer

    def _failed(self, error: Exception) -> Refusal:
        """Error for the clients after a failure of the machine, which may be that of many requests."""
        if error is not self._last_failure:
            self._failures += 1
            _log.error("the engine failed (%s)", type(error).__name__, exc_info=error)
        self._last_failure = error
        sentence = f"the worker failed on this request ({type(error).__name__}); ask again, or for less"
        return Refusal(ErrorCode.FAILED, sentence)


class _Stream:
    """The newest text of one request; the engine's thread leaves it here, the event loop takes it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._changed = loop, asyncio.Event()
        self._text = ""
        self._called = False

    def update(self, text: str) -> None:
        """Leave a text; for the engine's thread."""
        self._text = text
        if not self._called:  # the call that is under way will find this text
            self.wake()

    def wake(self) -> None:
        """Say that there is news; for any thread."""
        self._called = True
        with contextlib.suppress(RuntimeError):  # the event loop is gone, and with it who would listen
            self._loop.call_soon_threadsafe(self._notice)

    def _notice(self) -> None:
        self._called = False
        self._changed.set()

    async def news(self) -> str:
        """The newest text, once something has changed."""
        await self._changed.wait()
        self._changed.clear()
        return self._text


def _too_late(timeout: float) -> Refusal:
    return Refusal(ErrorCode.TIMEOUT, f"the answer took longer than {timeout:g} s and was given up; ask for less")
