"""``medplib serve``: starts controller, workers and page, restarts one that dies, and stops them all.

They are the programs of several terminals, as child processes. Workers listen on loopback alone and show the
controller a secret that is made anew for each run and handed over in the environment, never on a command line.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from logging.handlers import RotatingFileHandler
from pathlib import Path

import httpx

from model.errors import MedPLIBError
from model.serve.checks import check_checkpoint, check_memory
from model.serve.server import check_port

API_PORT, PORT = 64000, 64001
"""Of API and page, where they are free and no others are asked for."""
API_KEY, CLIENT_KEY = "MEDPLIB_API_KEY", "MEDPLIB_CLIENT_KEY"
STEADY_SECONDS = 60.0
"""A program that ran for so long has its earlier crashes forgotten."""
_FIRST_DELAY, _LONGEST_DELAY = 1.0, 60.0  # seconds before a restart: doubled with every crash
_POLL_SECONDS = 0.2
_GRACE = 5.0  # of page and controller; nothing that matters is under way there once the workers have ended
_LINES, _LINE_BYTES, _LOG_BYTES, _LOG_FILES = 100, 4000, 5 * 2**20, 3
_OWN_NAME = re.compile(r"^[a-z_]{1,24}: ")  # a program's sentence begins with what the program is called
_ROOT = Path(__file__).resolve().parents[2]
# Runs a module as `python -m` would, in a process that ends with this one (PR_SET_PDEATHSIG, where there is Linux).
_RUN = """
import ctypes, os, runpy, signal, sys
parent, module, *flags = sys.argv[1:]
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)
if os.getppid() != int(parent):
    sys.exit("the process that started this one is gone")
sys.argv = [module, *flags]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Program:
    """A server as a child process, and what is known of it.

    Attributes:
        name: for people, such as ``worker 1``.
        module: run as ``python -m`` would.
        flags: of its command line; never a secret.
        address: ``http://host:port`` it can be asked at.
        environment: variables it gets beside this process's own.
        without: variables of this process's own that it does not get.
        logs: folder of its log file; None keeps its last lines alone.
        lines: the last that it wrote.
        restart_at: when it is started again after a crash, in monotonic seconds; 0 while it runs.
    """

    name: str
    module: str
    flags: tuple[str, ...]
    address: str
    environment: Mapping[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    logs: Path | None = None
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=_LINES), init=False)
    crashes: int = field(default=0, init=False)
    restart_at: float = field(default=0.0, init=False)
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _started: float = field(default=0.0, init=False)
    _reader: threading.Thread | None = field(default=None, init=False)

    def start(self) -> None:
        """Start it; from the main thread, for it ends with the thread that started it."""
        log: logging.Handler = logging.NullHandler()
        if self.logs is not None:  # before anything is started, as the folder may be one that cannot be written
            self.logs.mkdir(parents=True, exist_ok=True)
            path = self.logs / f"{self.name.replace(' ', '-')}.log"
            log = RotatingFileHandler(path, maxBytes=_LOG_BYTES, backupCount=_LOG_FILES, encoding="utf-8")
        self.lines.clear()
        self._started, self.restart_at = time.monotonic(), 0.0
        inherited = {name: value for name, value in os.environ.items() if name not in self.without}
        places = [str(_ROOT), *filter(None, [inherited.get("PYTHONPATH")])]  # this package before the working directory
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _RUN, str(os.getpid()), self.module, *self.flags],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**inherited, "PYTHONPATH": os.pathsep.join(places), "PYTHONUNBUFFERED": "1", **self.environment},
            start_new_session=True,  # a terminal's Ctrl-C is ours to pass on, in order
        )
        self._reader = threading.Thread(target=self._read, args=(self.process, log), daemon=True)
        self._reader.start()

    def _read(self, process: subprocess.Popen[bytes], log: logging.Handler) -> None:
        assert process.stdout is not None
        while data := process.stdout.readline(_LINE_BYTES):
            if line := data.decode("utf-8", "replace").rstrip():
                self.lines.append(line)
                _log.info("%s: %s", self.name, line)
                log.emit(logging.makeLogRecord({"msg": line}))
        log.close()

    @property
    def pid(self) -> int | None:
        """Of the process that runs or ran last."""
        return self.process.pid if self.process is not None else None

    def running(self) -> bool:
        """Whether its process is there."""
        return self.process is not None and self.process.poll() is None

    def ready(self) -> bool:
        """Whether it says that it serves."""
        with suppress(httpx.HTTPError), httpx.Client(trust_env=False, timeout=2.0) as client:
            return client.get(f"{self.address}/readyz").status_code == 200
        return False

    def crash(self) -> str:
        """Its process ended unasked: plan the next one; what happened, in a sentence and its last lines."""
        self.crashes = 1 if time.monotonic() - self._started > STEADY_SECONDS else self.crashes + 1
        self.restart_at = time.monotonic() + min(_FIRST_DELAY * 2 ** (self.crashes - 1), _LONGEST_DELAY)
        return self.last_words()

    def last_words(self) -> str:
        """How its process ended, and what it wrote last."""
        code = self.wait()
        how = f"{self.name} ended with exit code {code}"
        if code < 0:
            known = -code in set(signal.Signals)
            how = f"{self.name} was ended by {signal.Signals(-code).name if known else f'signal {-code}'}"
        lines = list(self.lines)
        if not lines:
            return f"{how} and said nothing"
        begins = [place for place, line in enumerate(lines) if _OWN_NAME.match(line)]
        if code == 2 and begins:  # what is wrong, in the program's own words
            first, *more = lines[begins[-1] :]
            return "\n  ".join([f"{how}: {_OWN_NAME.sub('', first)}", *more])
        return "\n  ".join([f"{how}; its last lines:", *lines[-12:]])

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to it and to what it may have started itself."""
        if self.running():
            assert self.process is not None
            os.killpg(self.process.pid, number)

    def wait(self) -> int:
        """Its exit code once it has ended and everything that it wrote is read."""
        assert self.process is not None and self._reader is not None
        code = self.process.wait()
        self._reader.join(timeout=2)
        return code


@dataclass(frozen=True)
class LaunchSettings:
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
        grace: seconds that requests under way may take once it is asked to stop.
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


class Launcher:
    """The running programs; as a context manager they are there until its end.

    Args:
        settings: what to start.
        report: takes one line for people.

    Raises:
        MedPLIBError: packages, ports, checkpoint or memory are not as they have to be.
    """

    def __init__(self, settings: LaunchSettings, report: Callable[[str], None]) -> None:
        self.settings, self.report = settings, report
        check_port(settings.host, settings.api_port, "--api-port")
        if settings.web:
            check_port(settings.host, settings.port)
            if settings.port and settings.port == settings.api_port:
                raise MedPLIBError(f"page and API cannot both have port {settings.port}; give two, or leave one out")
        stored = check_checkpoint(settings.model, settings.base)
        check_memory(stored, settings.devices, dtype=settings.dtype, bits=settings.bits)
        self.programs = make_programs(settings, stored.regions)
        self.stopping, self.hurry = threading.Event(), threading.Event()
        self._unready: set[str] = set()

    def run(self) -> None:
        """Start, print the addresses, keep everything running, and stop everything at Ctrl-C or SIGTERM.

        Raises:
            MedPLIBError: a program could not be started.
        """

        def stop(*_: object) -> None:
            (self.hurry if self.stopping.is_set() else self.stopping).set()

        with ExitStack() as stack:
            for number in (signal.SIGINT, signal.SIGTERM):
                stack.callback(signal.signal, number, signal.signal(number, stop))
            stack.enter_context(self)
            if not self.stopping.is_set():
                addresses = {program.name: program.address for program in self.programs}
                api = addresses["controller"]
                self.report("MedPLIB is ready. For research only, not for clinical use.")
                if "web page" in addresses:
                    self.report(f"  page  {addresses['web page']}")
                self.report(f"  API   {api}/v1 (described at {api}/openapi.json)\nCtrl-C stops it.")
            while not self.stopping.wait(_POLL_SECONDS):
                self.restart_dead()

    def __enter__(self) -> Launcher:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the page first, so that no new questions come; then the workers, then who knows them."""
        self.stopping.set()
        for beginning, grace in (("web", _GRACE), ("worker", self.settings.grace), ("controller", _GRACE)):
            group = [one for one in self.programs if one.name.startswith(beginning) and one.process is not None]
            for program in group:
                program.signal(signal.SIGTERM)
            end = time.monotonic() + grace
            while any(program.running() for program in group):
                if time.monotonic() > end or self.hurry.wait(0.05):
                    for program in group:
                        program.signal(signal.SIGKILL)
            for program in group:
                program.wait()

    def __getitem__(self, name: str) -> Program:
        """The program of a name: ``controller``, ``worker 1`` …, ``web page``."""
        return next(program for program in self.programs if program.name == name)

    def _start(self) -> None:
        end = time.monotonic() + self.settings.start_seconds
        for program in self.programs:
            program.start()
        waiting = list(self.programs)
        while waiting and not self.stopping.wait(_POLL_SECONDS):
            for program in self.programs:
                if not program.running():
                    raise MedPLIBError(program.last_words())
            waiting = [program for program in waiting if not program.ready()]
            if waiting and time.monotonic() > end:
                raise MedPLIBError(
                    f"{waiting[0].name} is not ready after {self.settings.start_seconds:g} s; "
                    "give it longer with --start-timeout, or look into its log with --logs DIR"
                )

    def restart_dead(self) -> None:
        """Start again what ended, after a while that grows with every crash."""
        for program in self.programs:
            if program.running():
                if program.name in self._unready and program.ready():
                    self._unready.discard(program.name)
                    self.report(f"{program.name} is ready again")
            elif not program.restart_at:
                words = program.crash()
                self._unready.add(program.name)
                self.report(f"{words}\n{program.name} starts again in {program.restart_at - time.monotonic():.0f} s")
            elif time.monotonic() >= program.restart_at:
                program.start()


def make_programs(settings: LaunchSettings, regions: bool = False) -> list[Program]:
    """Controller, workers and page with their flags and addresses.

    Args:
        settings: what to start.
        regions: whether the checkpoint can look at regions.
    """
    host, local, logs = settings.host, "127.0.0.1", settings.logs
    free = free_ports(host, 2 + len(settings.devices))
    usual: list[int] = []
    for number in (API_PORT, PORT):
        with suppress(MedPLIBError):
            check_port(host, number)
            usual.append(number)
    api_port = settings.api_port or (API_PORT if API_PORT in usual else free[0])
    port = settings.port or (PORT if PORT in usual and api_port != PORT else free[1])
    reached = {"": local, "0.0.0.0": local, "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    controller, page = f"http://{reached}:{api_port}", f"http://{reached}:{port}"
    key = {API_KEY: os.environ.get(API_KEY) or secrets.token_urlsafe(32)}
    flags = ["--host", host, "--port", str(api_port), *settings.controller_flags]
    programs = [Program("controller", "model.serve.controller", tuple(flags), controller, key, (), logs)]
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // len(settings.devices)))
    for number, (device, worker_port) in enumerate(zip(settings.devices, free[2:], strict=True), start=1):
        address = f"http://{local}:{worker_port}"
        flags = ["--host", local, "--port", str(worker_port), "--worker", address, "--controller", controller]
        flags += ["--model-path", str(settings.model), *(["--model-base", str(settings.base)] if settings.base else [])]
        flags += ["--device", device, *settings.worker_flags]
        environment = {**key, "OMP_NUM_THREADS": threads}
        name, module = f"worker {number}", "model.serve.model_worker"
        programs.append(Program(name, module, tuple(flags), address, environment, (CLIENT_KEY,), logs))
    if settings.web:
        flags = ["--host", host, "--port", str(port), "--controller", controller, "--model-list-mode", "reload"]
        flags += [*(["--add_region_feature"] if regions else []), *settings.web_flags]
        programs.append(Program("web page", "model.serve.gradio_web_server", tuple(flags), page, {}, (API_KEY,), logs))
    return programs


def free_ports(host: str, count: int) -> list[int]:
    """Ports of this machine that nothing listens on now, all different."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket(family, socket.SOCK_STREAM)) for _ in range(count)]
        for probe in probes:
            probe.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
