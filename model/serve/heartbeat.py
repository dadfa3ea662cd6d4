"""Registration of a worker at its controller, and its heartbeat every few seconds.

The controller may come later, go away and come back without its memory: the worker keeps trying and registers anew. It
is a task of the event loop, and nothing that the worker computes delays it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httpx

from model.errors import MedPLIBError
from model.serve.auth import bearer
from model.serve.errors import sentence_of
from model.serve.protocol import HEARTBEAT_SECONDS, HeartBeat, RegisterWorker, WorkerStatus

_MAX_SENTENCE = 300

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Registration:
    """The controllers that a worker registers with.

    Attributes:
        controller: address of the controller, ``http(s)://host:port``.
        worker: address under which the controller reaches the worker.
        key: secret that the controller asks for.
        interval: seconds between two heartbeats.
        retry: seconds until a controller that is away is tried again.
        timeout: seconds that it may take to answer.
    """

    controller: str
    worker: str
    key: str | None = None
    interval: float = HEARTBEAT_SECONDS
    retry: float = 2.0
    timeout: float = 5.0


class Heart:
    """Registers a worker and beats.

    Args:
        registration: with whom, as whom, how often.
        status: the worker's state now.
        transport: how the controller is reached, for tests; the network when absent.
    """

    def __init__(
        self,
        registration: Registration,
        status: Callable[[], WorkerStatus],
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.registration, self._status = registration, status
        self.registered = False
        self._trouble = ""
        self._client = httpx.AsyncClient(
            base_url=registration.controller,
            headers=bearer(registration.key),
            timeout=registration.timeout,
            transport=transport,
            trust_env=False,
            follow_redirects=False,
        )

    async def run(self) -> None:
        """Beat until cancelled."""
        settings = self.registration
        try:
            while True:
                well = await self._reach(self._beat)
                await asyncio.sleep(settings.interval if well else min(settings.retry, settings.interval))
        finally:
            await self._client.aclose()

    async def announce(self) -> bool:
        """Send the worker's state at once, as when it begins to drain; whether the controller has received it."""
        return await self._reach(self._register)

    async def _reach(self, step: Callable[[], Awaitable[None]]) -> bool:
        """Take one step; what goes wrong is logged once, not each time."""
        where, trouble = f"the controller at {self.registration.controller}", ""
        try:
            await step()
        except MedPLIBError as error:
            trouble = f"{where} does not take this worker: {error}"
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            trouble = f"{where} cannot be reached ({type(error).__name__})"
        self.registered = self.registered and not trouble
        if trouble != self._trouble:
            _log.warning("%s", f"{trouble}; trying on" if trouble else f"{where} is there again")
        self._trouble = trouble
        return not trouble

    async def _beat(self) -> None:
        if self.registered:
            beat = HeartBeat(worker_name=self.registration.worker, queue_length=self._status().queue_length)
            answer = await self._post("/receive_heart_beat", beat.model_dump())
            self.registered = bool(answer.get("exist")) if isinstance(answer, dict) else False
        if not self.registered:
            await self._register()

    async def _register(self) -> None:
        message = RegisterWorker(
            worker_name=self.registration.worker, check_heart_beat=True, worker_status=self._status()
        )
        await self._post("/register_worker", message.model_dump())
        if not self.registered:
            _log.info("registered with the controller at %s", self.registration.controller)
        self.registered = True

    async def _post(self, path: str, message: dict[str, Any]) -> Any:
        """The controller's answer.

        Raises:
            MedPLIBError: it says no.
        """
        response = await self._client.post(path, json=message)
        if response.status_code != 200:
            sentence = sentence_of(response.content)[:_MAX_SENTENCE]
            raise MedPLIBError(sentence or f"it answered with status {response.status_code}")
        return response.json() if response.content.strip() else None
