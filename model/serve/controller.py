"""The controller: ``python -m model.serve.controller --host 0.0.0.0 --port 64000``; see ``--help``.

Workers register with it and send heartbeats; pages and programs ask it for models and answers. It speaks LLaVA's and
FastChat's protocol (``protocol.py``) and OpenAI's under ``/v1``. It keeps nothing: one that is started anew knows its
workers again within a heartbeat. It has the routes of a worker too, so that one controller can stand behind another.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from model.errors import MedPLIBError, escape_unprintable
from model.serve.auth import KeyGuard, WorkerAllowList, WorkerGuard, checked_key, normal_name
from model.serve.commands import REQUEST_LIMITS, add_limit_flags, add_network_flags, seconds, whole
from model.serve.errors import ERROR_ANSWERS, Refusal, answer_errors
from model.serve.forwarding import ControllerMetrics, Forwarder, ForwardSettings, WorkerCaller
from model.serve.limits import BodyLimit, ServeLimits, limits_from
from model.serve.protocol import (
    ErrorCode,
    GenerateRequest,
    HeartBeat,
    Message,
    ModelQuery,
    RegisterWorker,
    WorkerStatus,
    error_chunk,
)
from model.serve.registry import DISPATCH_METHODS, Registry, RegistrySettings
from model.serve.server import (
    GRACE_SECONDS,
    TimedStream,
    check_port,
    is_loopback,
    parse_flags,
    run_app,
    set_up_logging,
)

_log = logging.getLogger("model.serve.controller")  # also where it is run as a program
DEFAULT_PORT = 64000


@dataclass(frozen=True)
class ControllerSettings:
    """How a controller behaves.

    Attributes:
        api_key: secret of workers and administrators; without one only programs of this machine may be either.
        client_key: secret of those who ask; anyone may where there is none.
        allow_workers: hosts, addresses and networks at which workers may be.
        registry: how workers are chosen and given up.
        forwarding: bounds of what is said to workers.
        limits: of one request.
        client_timeout: seconds a client may take to accept the next piece of its answer.
        grace: seconds that answers under way may take once the controller is asked to stop.
    """

    api_key: str | None = None
    client_key: str | None = None
    allow_workers: Sequence[str] = ()
    registry: RegistrySettings = field(default_factory=RegistrySettings)
    forwarding: ForwardSettings = field(default_factory=ForwardSettings)
    limits: ServeLimits = field(default_factory=ServeLimits)
    client_timeout: float = 60.0
    grace: float = GRACE_SECONDS

    def __post_init__(self) -> None:
        object.__setattr__(self, "api_key", checked_key(self.api_key, "--api-key"))
        object.__setattr__(self, "client_key", checked_key(self.client_key, "--client-key"))
        times = (self.client_timeout, self.grace, self.forwarding.silence_timeout, self.forwarding.connect_timeout)
        if min(*times, self.registry.expiry, self.registry.cool_down) <= 0:
            raise MedPLIBError("a time is zero or negative; give seconds above zero")
        if min(self.forwarding.tries, self.registry.max_failures) < 1:
            raise MedPLIBError("--tries and --max-failures are at least 1")


class DrainWorker(Message):
    """``/drain_worker``: the worker of this name gets nothing new, or, where ``drain`` is false, requests again."""

    worker_name: str
    drain: bool = True


class _AskedModel(Message):
    """As much of a request as is needed to choose a worker; the rest is not looked at."""

    model: str = Field("", max_length=1000)


async def _with_error(pieces: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """An answer's chunks; an error as the last of them."""
    async with contextlib.aclosing(pieces):
        try:
            async for piece in pieces:
                yield piece
        except Refusal as refusal:
            yield error_chunk(refusal.code, refusal.sentence).encode()


class Controller:
    """The routes and what they work on.

    Args:
        settings: how it behaves.
    """

    def __init__(self, settings: ControllerSettings) -> None:
        self.settings = settings
        self.registry = Registry(settings.registry)
        self.metrics = ControllerMetrics()
        self.caller = WorkerCaller(settings.api_key, settings.forwarding)
        self.forwarder = Forwarder(self.registry, self.caller, self.metrics)
        key = settings.client_key  # controllers before this one show the other key
        self.client_guard = Depends(KeyGuard(key, settings.api_key if key else None, name="client key"))
        self.allowed = WorkerAllowList(settings.allow_workers)
        self._refreshing: asyncio.Task[None] | None = None
        self._stopping = False
        self.metrics.gauge("controller_workers", "Workers known", lambda: len(self.registry.workers()))
        self.metrics.gauge("controller_workers_fit", "Workers that are sent requests", self.registry.fit_workers)

    @contextlib.asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Forget silent workers while the application runs."""
        expiring = asyncio.create_task(self._expire())
        try:
            yield
        finally:
            expiring.cancel()
            await self.caller.aclose()

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self.settings.registry.expiry / 5))
            self.registry.expire()

    async def stop(self) -> None:
        """Take nothing new, and end within the grace time what is under way."""
        self._stopping = True
        self.forwarder.stop(max(0.0, self.settings.grace - 1))  # a second to notify the clients

    # --- workers --------------------------------------------------------------------------------------------------

    async def register_worker(self, body: RegisterWorker, request: Request) -> dict[str, Any]:
        """A worker is there; without a status it is asked for it."""
        peer = request.client.host if request.client else None
        address = await self.allowed.check(body.worker_name, peer)
        status = body.worker_status or await self.caller.status(address)
        self.registry.register(address, status, body.check_heart_beat)
        return {"registered": address.name}

    async def receive_heart_beat(self, body: HeartBeat) -> dict[str, bool]:
        """A worker lives; `exist` is false where it has to register."""
        return {"exist": self.registry.heart_beat(normal_name(body.worker_name), body.queue_length)}

    async def drain_worker(self, body: DrainWorker) -> dict[str, Any]:
        """Send a worker nothing new, or requests again; what it has it ends."""
        name = normal_name(body.worker_name)
        if not self.registry.drain(name, body.drain):
            raise Refusal(ErrorCode.BAD_INPUT, f"there is no worker {name}; GET /workers lists them", status=404)
        return {"worker_name": name, "draining": body.drain}

    async def list_workers(self) -> list[dict[str, Any]]:
        """Each worker: its models, how busy it is, whether it is trusted."""
        return self.registry.status()

    # --- clients --------------------------------------------------------------------------------------------------

    async def refresh_all_workers(self) -> dict[str, Any]:
        """Ask every worker anew what it can do; callers at the same time share one round."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._refresh())
        await asyncio.shield(self._refreshing)
        return {"models": self.registry.models()}

    async def _refresh(self) -> None:
        async with asyncio.TaskGroup() as group:
            for worker in self.registry.workers():
                group.create_task(self._refresh_one(worker.address.name))

    async def _refresh_one(self, name: str) -> None:
        worker = self.registry.get(name)
        if worker is None:
            return
        try:
            self.registry.update(name, await self.caller.status(worker.address))
        except (Refusal, MedPLIBError) as error:
            if isinstance(error, Refusal) and error.code == ErrorCode.TIMEOUT:
                return  # busy perhaps; its heartbeats show whether it is alive
            if worker.check_heart_beat:
                self.registry.report_failure(name)
            else:  # nothing else would show that it is gone
                self.registry.remove(name, str(error))

    async def list_models(self) -> dict[str, Any]:
        """Models that can be asked now, and each one's own threshold of masks where its worker says it."""
        own = {
            model: threshold
            for worker in self.registry.workers()
            for model in worker.status.model_names
            if isinstance(threshold := worker.status.details.get("mask_threshold"), float)
        }
        return {"models": self.registry.models(), **({"mask_thresholds": own} if own else {})}

    async def get_worker_address(self, body: ModelQuery) -> dict[str, str]:
        """A worker that has the model, for clients that ask it themselves; empty where there is none."""
        name = self.registry.choose(body.model)
        if name is not None:
            self.registry.release(name, answered=False)
        return {"address": name or ""}

    async def worker_generate_stream(self, request: Request) -> Response:
        """An answer as it comes: JSON objects, each ended by a NUL byte; one with an `error_code` is the last."""
        body = await request.body()
        try:
            model = _AskedModel.model_validate_json(body).model
        except ValueError:
            raise Refusal(ErrorCode.BAD_INPUT, "the request is no JSON object of this route's fields") from None
        return TimedStream(_with_error(self.forwarder.generate_bytes(body, model)), self.settings.client_timeout)

    async def worker_get_status(self) -> WorkerStatus:
        """All workers as if they were one, for a controller before this one."""
        fit = [worker for worker in self.registry.workers() if not worker.draining]
        capacities = [worker.status.capacity for worker in fit]
        return WorkerStatus(
            model_names=self.registry.models(),
            speed=sum(worker.status.speed for worker in fit) or 1.0,
            queue_length=sum(max(worker.status.queue_length, worker.running) for worker in fit),
            capacity=None if None in capacities else sum(filter(None, capacities)),
            draining=self._stopping,
            conversation_turns=min((worker.status.conversation_turns for worker in fit), default=1),
            details={"workers": len(fit)},
        )

    # --- monitors -------------------------------------------------------------------------------------------------

    async def livez(self) -> dict[str, bool]:
        """The process is up."""
        return {"live": True}

    async def readyz(self) -> Response:
        """A request would be answered: at least one worker is fit."""
        fit = self.registry.fit_workers()
        if self._stopping:
            raise Refusal(ErrorCode.DRAINING, "the controller is being stopped")
        if not fit:
            raise Refusal(ErrorCode.NO_WORKER, "no worker is there; start one, or wait until it has loaded")
        return JSONResponse({"ready": True, "workers": fit})

    async def tell_metrics(self) -> Response:
        """What was counted, for Prometheus."""
        return self.metrics.answer()

    # --- routes ---------------------------------------------------------------------------------------------------

    def add_routes(self, app: FastAPI) -> None:
        """Add all routes but OpenAI's, behind the keys they need; answers come first, as they are found soonest."""
        asking, managing = [self.client_guard], [Depends(WorkerGuard(self.settings.api_key, name="key"))]
        schema = GenerateRequest.model_json_schema(ref_template="#/components/schemas/{model}")
        app.add_api_route(
            "/worker_generate_stream",
            self.worker_generate_stream,
            methods=["POST"],
            tags=["clients"],
            dependencies=asking,
            response_class=Response,
            responses={**ERROR_ANSWERS, 200: {"content": {"application/octet-stream": {}}}},
            openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}},
        )
        routes: list[tuple[str, str, list[Any], str, Callable[..., Any]]] = [
            ("workers", "POST", managing, "/register_worker", self.register_worker),
            ("workers", "POST", managing, "/receive_heart_beat", self.receive_heart_beat),
            ("workers", "POST", managing, "/drain_worker", self.drain_worker),
            ("workers", "GET", managing, "/workers", self.list_workers),
            ("clients", "POST", asking, "/refresh_all_workers", self.refresh_all_workers),
            ("clients", "POST", asking, "/list_models", self.list_models),
            ("clients", "POST", asking, "/get_worker_address", self.get_worker_address),
            ("clients", "POST", asking, "/worker_get_status", self.worker_get_status),
            ("monitors", "GET", [], "/livez", self.livez),
            ("monitors", "GET", [], "/readyz", self.readyz),
            ("monitors", "GET", [], "/metrics", self.tell_metrics),
        ]
        for tag, method, guards, path, handler in routes:
            kind = Response if path == "/metrics" else JSONResponse
            options: dict[str, Any] = {"methods": [method], "tags": [tag], "dependencies": guards}
            app.add_api_route(path, handler, responses=ERROR_ANSWERS, response_class=kind, **options)


def make_app(settings: ControllerSettings | None = None) -> FastAPI:
    """The controller as an ASGI application; ``app.state.controller`` is what its routes work on.

    Raises:
        MedPLIBError: the settings do not fit.
    """
    from model.serve.openai_api import openai_router  # takes a while

    settings = settings or ControllerSettings()
    controller = Controller(settings)
    app = FastAPI(
        title="MedPLIB controller",
        description="Questions about medical images, answered by the workers behind. Research use only.",
        lifespan=controller.lifespan,
        docs_url=None,  # their pages are fetched from elsewhere
        redoc_url=None,
    )
    app.state.controller = controller
    app.add_middleware(BodyLimit, max_bytes=settings.limits.max_body_bytes)
    answer_errors(app)
    controller.add_routes(app)
    v1 = openai_router(controller.forwarder, controller.registry, settings)
    app.include_router(v1, dependencies=[controller.client_guard])
    return app


def make_parser() -> argparse.ArgumentParser:
    """The flags of ``python -m model.serve.controller``."""
    parser = argparse.ArgumentParser(
        prog="python -m model.serve.controller",
        description="Takes questions from pages and programs and gives them to the workers that register with it.",
        epilog="Flags may be spelled with underscores too. Keys are better kept in the environment, where other users "
        "of the machine do not see them.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="port to listen on (default: %(default)s)")
    parser.add_argument(
        "--dispatch-method",
        choices=DISPATCH_METHODS,
        default="shortest_queue",
        help="how a worker is chosen: by lot, fast ones more often, or the shortest queue (default: %(default)s)",
    )
    parser.add_argument(
        "--api-key",
        default=os.environ.get("MEDPLIB_API_KEY"),
        metavar="KEY",
        help="secret that workers show and are shown (default: $MEDPLIB_API_KEY); without one only workers of this "
        "machine are taken",
    )
    parser.add_argument(
        "--client-key",
        default=os.environ.get("MEDPLIB_CLIENT_KEY"),
        metavar="KEY",
        help="secret that pages and programs show (default: $MEDPLIB_CLIENT_KEY); without one everyone may ask",
    )
    parser.add_argument(
        "--allow-worker",
        action="append",
        default=[],
        metavar="HOST",
        help="host, address or network (10.0.0.0/8) at which workers may be; may be given again (default: where their "
        "registration comes from)",
    )
    registry, forwarding = RegistrySettings(), ForwardSettings()
    times = parser.add_argument_group("faults and times, in seconds")
    for name, default, what in (
        ("expiry", registry.expiry, "silence after which a worker is forgotten"),
        ("cool-down", registry.cool_down, "how long a worker is left alone that failed"),
        ("connect-timeout", forwarding.connect_timeout, "until a worker takes a connection"),
        ("silence-timeout", forwarding.silence_timeout, "how long a worker may say nothing"),
        ("restart-wait", forwarding.restart_wait, "how long a request waits for a worker that is being restarted"),
        ("client-timeout", 60.0, "until a client takes the next piece of its answer"),
        ("grace", GRACE_SECONDS, "how long answers may go on once the controller is stopped"),
    ):
        times.add_argument(
            f"--{name}", type=seconds, default=default, metavar="S", help=f"{what} (default: {default:g})"
        )
    for name, number, what in (
        ("max-failures", registry.max_failures, "failures in a row after which a worker is left alone"),
        ("tries", forwarding.tries, "workers that a request is sent to, one after another"),
        ("max-running", forwarding.max_connections, "answers under way at once"),
    ):
        times.add_argument(f"--{name}", type=whole, default=number, metavar="N", help=f"{what} (default: {number})")
    add_network_flags(parser)
    add_limit_flags(parser, *REQUEST_LIMITS)
    return parser


def settings_from(options: argparse.Namespace) -> ControllerSettings:
    """The settings that parsed flags mean.

    Raises:
        MedPLIBError: they do not fit.
    """
    return ControllerSettings(
        api_key=options.api_key,
        client_key=options.client_key,
        allow_workers=tuple(options.allow_worker),
        registry=RegistrySettings(
            options.dispatch_method, options.expiry, options.max_failures, cool_down=options.cool_down
        ),
        forwarding=ForwardSettings(
            tries=options.tries,
            restart_wait=options.restart_wait,
            connect_timeout=options.connect_timeout,
            silence_timeout=options.silence_timeout,
            max_connections=options.max_running,
        ),
        limits=limits_from(options),
        client_timeout=options.client_timeout,
        grace=options.grace,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    escape_unprintable()
    options = parse_flags(make_parser(), arguments)
    try:
        check_port(options.host, options.port)  # before what takes long to import
        settings = settings_from(options)
        set_up_logging()
        if not settings.api_key and not is_loopback(options.host):
            _log.warning(
                "reachable from other machines without --api-key: only workers of this machine are taken, and %s",
                "clients need the client key" if settings.client_key else "everyone who reaches it may ask",
            )
        app = make_app(settings)
        app.root_path = options.root_path  # its schema names it
        run_app(
            app,
            options.host,
            options.port,
            grace=settings.grace,
            allow_hosts=options.allow_host,
            root_path=options.root_path,
            drain=app.state.controller.stop,
        )
    except MedPLIBError as error:
        sys.stderr.write(f"controller: {error}\n")
        return 2
    except KeyboardInterrupt:  # before the server was up
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
