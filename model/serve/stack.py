"""``medplib serve``: controller, workers and web page as one, until they are told to stop.

The three are the programs of several terminals, as child processes. Workers listen on loopback alone and show the
controller a secret that is made anew for each run and handed over in the environment, never on a command line.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx

from model.errors import MedPLIBError
from model.serve.checks import Stored, check_checkpoint, check_devices, check_memory, check_packages
from model.serve.children import Child, Program
from model.serve.running import check_port, is_loopback

API_PORT, PORT = 64000, 64001
"""Of API and page, where they are free and no others are asked for."""
API_KEY, CLIENT_KEY = "MEDPLIB_API_KEY", "MEDPLIB_CLIENT_KEY"
PACKAGES = ("fastapi", "uvicorn", "httpx", "prometheus_client")
_LOOK_SECONDS, _VISIT_SECONDS = 0.2, 5.0
_WEB_GRACE = 5.0  # nothing that matters is under way in the page and the controller once the workers have ended

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StackSettings:
    """What to start.

    Attributes:
        model: checkpoint directory, or a LoRA trained on the checkpoint ``base``.
        host: of page and API; workers are on loopback always.
        port: of the page; 0 takes the usual one, or any where that is in use. ``api_port`` likewise, of the controller.
        devices: one worker for each.
        web: whether there is a page.
        worker_flags, web_flags, controller_flags: passed on.
        dtype, bits: of the weights, for the check of the memory.
        logs: folder of the programs' log files; None keeps their last lines alone.
        start_seconds: after which a start has failed.
        grace: seconds that requests under way may take once it is told to stop.
    """

    model: Path
    base: Path | None = None
    host: str = "127.0.0.1"
    port: int = 0
    api_port: int = 0
    devices: Sequence[str] = ("auto",)
    web: bool = True
    worker_flags: Sequence[str] = ()
    web_flags: Sequence[str] = ()
    controller_flags: Sequence[str] = ()
    dtype: str | None = None
    bits: int = 16
    logs: Path | None = None
    start_seconds: float = 900.0
    grace: float = 30.0


class Stack:
    """The running programs; as a context manager they are there until its end.

    Args:
        settings: what to start.
        say: takes one line for people.
    """

    def __init__(self, settings: StackSettings, say: Callable[[str], None]) -> None:
        self.settings, self.say = settings, say
        programs = make_programs(settings, check_start(settings).regions)
        self.children = [
            Child(program, settings.logs, partial(_log.info, "%s: %s", program.name)) for program in programs
        ]
        self.stopping, self.hurry = threading.Event(), threading.Event()
        self._unready: set[str] = set()
        self._next_visit = 0.0
        self._client = httpx.Client(trust_env=False, timeout=2.0)

    def run(self) -> None:
        """Start, tell the addresses, keep everything running, and stop everything when asked to.

        Raises:
            MedPLIBError: a program could not be started.
        """
        with self._signals(), self:
            if not self.stopping.is_set():
                self._tell()
            while not self.stopping.wait(_LOOK_SECONDS):
                self.look_after()

    def __enter__(self) -> Stack:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def __getitem__(self, name: str) -> Child:
        """The child of a name: ``controller``, ``worker 1`` …, ``web page``."""
        return next(child for child in self.children if child.program.name == name)

    def _start(self) -> None:
        end = time.monotonic() + self.settings.start_seconds
        for child in self.children:
            child.start()
        waiting = list(self.children)
        while waiting and not self.stopping.wait(_LOOK_SECONDS):
            for child in self.children:
                if not child.running():
                    raise MedPLIBError(child.last_words())
            waiting = [child for child in waiting if not child.ready(self._client)]
            if waiting and time.monotonic() > end:
                raise MedPLIBError(
                    f"{waiting[0].program.name} is not ready after {self.settings.start_seconds:g} s; "
                    "give it longer with --start-timeout, or look into its log with --logs DIR"
                )

    def _tell(self) -> None:
        addresses = {child.program.name: child.program.address for child in self.children}
        self.say("MedPLIB is ready. For research only, not for clinical use.")
        if "web page" in addresses:
            self.say(f"  page  {addresses['web page']}")
        self.say(f"  API   {addresses['controller']}/v1 (described at {addresses['controller']}/openapi.json)")
        self.say("Ctrl-C stops it.")

    def look_after(self) -> None:
        """Start again what crashed, after a while that grows with every crash; what is stuck is ended first."""
        if time.monotonic() >= self._next_visit:
            self._end_stuck()
            self._next_visit = time.monotonic() + _VISIT_SECONDS
        for child in self.children:
            name = child.program.name
            if child.running():
                if name in self._unready and child.ready(self._client):
                    self._unready.discard(name)
                    self.say(f"{name} is ready again")
            elif not child.restart_at:
                words = child.crash()
                self._unready.add(name)
                self.say(f"{words}\n{name} starts again in {max(0.0, child.restart_at - time.monotonic()):.0f} s")
            elif time.monotonic() >= child.restart_at:
                child.restart_at = 0.0
                child.start()

    def _end_stuck(self) -> None:
        for child in self.children:
            if child.running() and child.program.name not in self._unready and (why := child.trouble(self._client)):
                self.say(f"{child.program.name} is stuck: {why}")
                child.kill()  # and with it, it has crashed

    # --- stopping -------------------------------------------------------------------------------------------------

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def stop(*_: object) -> None:
            (self.hurry if self.stopping.is_set() else self.stopping).set()

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self) -> None:
        """The page first, so that no new questions come; then the workers, then who knows them."""
        self.stopping.set()
        for beginning, grace in (("web", _WEB_GRACE), ("worker", self.settings.grace), ("controller", _WEB_GRACE)):
            self._end([child for child in self.children if child.program.name.startswith(beginning)], grace)
        for child in self.children:
            child.close()
        self._client.close()

    def _end(self, children: Sequence[Child], grace: float) -> None:
        for child in children:
            child.terminate()
        end = time.monotonic() + grace
        while any(child.running() for child in children):
            if time.monotonic() > end or self.hurry.wait(0.05):
                for child in children:
                    child.kill()


def check_start(settings: StackSettings) -> Stored:
    """Look at what can be told before anything is started.

    Returns:
        What is known of the checkpoint.

    Raises:
        MedPLIBError: packages, ports, checkpoint or memory are not as they have to be.
    """
    check_packages([*PACKAGES, "gradio"] if settings.web else PACKAGES)
    check_devices(settings.devices)
    check_port(settings.host, settings.api_port, "--api-port")
    if settings.web:
        check_port(settings.host, settings.port)
        if settings.port and settings.port == settings.api_port:
            raise MedPLIBError(f"page and API cannot both have port {settings.port}; give two, or leave one out")
    stored = check_checkpoint(settings.model, settings.base)
    check_memory(stored, settings.devices, dtype=settings.dtype, bits=settings.bits)
    return stored


def make_programs(settings: StackSettings, regions: bool = False) -> list[Program]:
    """Controller, workers and page with their flags and addresses.

    Args:
        settings: what to start.
        regions: whether the checkpoint can look at regions.
    """
    local = "127.0.0.1"
    free = free_ports(settings.host, 2 + len(settings.devices))
    api_port = settings.api_port or (API_PORT if _is_free(settings.host, API_PORT) else free[0])
    port = settings.port or (PORT if _is_free(settings.host, PORT) and api_port != PORT else free[1])
    key = {API_KEY: os.environ.get(API_KEY) or secrets.token_urlsafe(32)}
    controller = f"http://{_reached_at(settings.host)}:{api_port}"
    programs = [
        Program(
            "controller",
            "model.serve.controller",
            ("--host", settings.host, "--port", str(api_port), *settings.controller_flags),
            controller,
            key,
        )
    ]
    for number, (device, worker_port) in enumerate(zip(settings.devices, free[2:], strict=True), start=1):
        address = f"http://{local}:{worker_port}"
        flags = ["--host", local, "--port", str(worker_port), "--worker", address, "--controller", controller]
        flags += ["--model-path", str(settings.model), *(["--model-base", str(settings.base)] if settings.base else [])]
        flags += ["--device", device, *settings.worker_flags]
        threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(_threads(len(settings.devices)))}
        programs.append(
            Program(
                f"worker {number}", "model.serve.model_worker", tuple(flags), address, {**key, **threads}, (CLIENT_KEY,)
            )
        )
    if settings.web:
        flags = ["--host", settings.host, "--port", str(port), "--controller", controller]
        flags += ["--model-list-mode", "reload", *(["--add_region_feature"] if regions else []), *settings.web_flags]
        address = f"http://{_reached_at(settings.host)}:{port}"
        programs.append(Program("web page", "model.serve.gradio_web_server", tuple(flags), address, {}, (API_KEY,)))
    return programs


def _threads(workers: int) -> int:
    return max(1, (os.cpu_count() or 1) // workers)


def _is_free(host: str, port: int) -> bool:
    try:
        check_port(host, port)
    except MedPLIBError:
        return False
    return True


def _reached_at(host: str) -> str:
    """Where this machine reaches a server that listens on ``host``."""
    if host in ("", "0.0.0.0"):
        return "127.0.0.1"
    if host == "::":
        return "[::1]"
    return f"[{host}]" if ":" in host else host


def free_ports(host: str, count: int) -> list[int]:
    """Ports of this machine that nothing listens on now, all different."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    probes = [socket.socket(family, socket.SOCK_STREAM) for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def run_stack(settings: StackSettings) -> int:
    """Serve until Ctrl-C or SIGTERM.

    Returns:
        0.

    Raises:
        MedPLIBError: something is wrong with what is to be served, or a program could not be started.
    """

    def say(line: str) -> None:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

    if not is_loopback(settings.host) and not os.environ.get(CLIENT_KEY):
        sys.stderr.write(
            f"medplib: everyone who reaches {settings.host} may ask, as {CLIENT_KEY} is not set; "
            "set it, or let a proxy with passwords stand before page and API\n"
        )
    Stack(settings, say).run()
    return 0
