"""Servers as child processes: started, heard, restarted after a crash, stopped."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from logging.handlers import RotatingFileHandler
from pathlib import Path

import httpx

from model.serve.refusals import sentence_of

FIRST_DELAY, LONGEST_DELAY = 1.0, 60.0
"""Seconds before a crashed child is started again: doubled each time, up to the longest."""
UNWELL_SECONDS, SILENT_SECONDS = 10.0, 180.0
"""A child that says so long that it cannot go on, or says nothing, is stuck."""
STEADY_SECONDS = 60.0
"""A child that ran for so long has its earlier crashes forgotten."""
_OWN_NAME = re.compile(r"^[a-z_]{1,24}: ")  # a program's sentence begins with what the program is called
_ROOT = Path(__file__).resolve().parents[2]
_LINES, _LINE_BYTES = 100, 4000
_LOG_BYTES, _LOG_FILES = 5 * 2**20, 3


@dataclass(frozen=True)
class Program:
    """What is to be run.

    Attributes:
        name: for people, such as ``worker 1``.
        module: run as ``python -m`` would.
        flags: of its command line; never a secret.
        address: ``http://host:port`` it can be asked at.
        environment: variables it gets beside this process's own.
        without: variables of this process's own that it does not get.
        ready_path: answers 200 once it serves.
    """

    name: str
    module: str
    flags: tuple[str, ...]
    address: str
    environment: Mapping[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    ready_path: str = "/readyz"


class Child:
    """One program's process, and the one after that.

    Args:
        program: what to run.
        logs: folder of its log file; None keeps its last lines alone.
        hear: called with each of its lines, from another thread.
    """

    def __init__(self, program: Program, logs: Path | None = None, hear: Callable[[str], None] | None = None) -> None:
        self.program = program
        self.lines: deque[str] = deque(maxlen=_LINES)
        self.crashes = 0
        self.restart_at = 0.0
        self.silence_seconds = SILENT_SECONDS
        self._unwell_since = 0.0
        self._hear = hear
        self._log = _log_file(logs, program.name) if logs is not None else None
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._started = 0.0

    @property
    def pid(self) -> int | None:
        """Of the process that runs or ran last."""
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Start the program; from the main thread, for it ends with the thread that started it."""
        self.lines.clear()
        self._unwell_since = 0.0
        environment = {name: value for name, value in os.environ.items() if name not in self.program.without}
        places = [str(_ROOT), *filter(None, [environment.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-P", "-m", "model.serve.launch", str(os.getpid())),
                *(self.program.module, *self.program.flags),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={
                **environment,
                "PYTHONPATH": os.pathsep.join(places),  # this package, not one that lies in the working directory
                "PYTHONUNBUFFERED": "1",
                **self.program.environment,
            },
            start_new_session=True,  # a terminal's Ctrl-C is ours to pass on, in order
        )
        self._started = time.monotonic()
        self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
        self._reader.start()

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        while data := process.stdout.readline(_LINE_BYTES):
            line = data.decode("utf-8", "replace").rstrip()
            if not line:
                continue
            self.lines.append(line)
            if self._log is not None:
                self._log.emit(logging.makeLogRecord({"msg": line}))
            if self._hear is not None:
                self._hear(line)

    def running(self) -> bool:
        """Whether its process is there."""
        return self._process is not None and self._process.poll() is None

    def ready(self, client: httpx.Client) -> bool:
        """Whether it says that it serves."""
        try:
            return client.get(self.program.address + self.program.ready_path).status_code == 200
        except httpx.HTTPError:
            return False

    def trouble(self, client: httpx.Client) -> str:
        """Why it should be started anew; empty while it lives, and until it has been unwell for a while."""
        try:
            answer = client.get(self.program.address + "/livez")
            said = sentence_of(answer.content)[:500] or "it answers with status 503"
            unwell, patience = (said, UNWELL_SECONDS) if answer.status_code == 503 else ("", 0.0)
        except httpx.HTTPError:
            unwell, patience = "it does not answer", self.silence_seconds
        now = time.monotonic()
        self._unwell_since = (self._unwell_since or now) if unwell else 0.0
        return unwell if unwell and now - self._unwell_since >= patience else ""

    def crash(self) -> str:
        """Its process ended unasked: plans the next one, and tells what happened in a sentence and its last lines."""
        self.crashes = 1 if time.monotonic() - self._started > STEADY_SECONDS else self.crashes + 1
        delay = min(FIRST_DELAY * 2 ** (self.crashes - 1), LONGEST_DELAY)
        self.restart_at = time.monotonic() + delay
        return self.last_words()

    def last_words(self) -> str:
        """How its process ended, and what it said last."""
        assert self._process is not None and self._reader is not None
        code = self._process.wait()
        self._reader.join(timeout=2)  # what it wrote just before its end is still being read
        how = f"was ended by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        lines = list(self.lines)
        if not lines:
            return f"{self.program.name} {how} and said nothing"
        begins = [place for place, line in enumerate(lines) if _OWN_NAME.match(line)]
        if code == 2 and begins:  # what is wrong, in the program's own words
            first, *more = lines[begins[-1] :]
            return "\n  ".join([f"{self.program.name} {how}: {_OWN_NAME.sub('', first)}", *more])
        return "\n  ".join([f"{self.program.name} {how}; its last lines:", *lines[-12:]])

    def terminate(self) -> None:
        """Ask it to end."""
        if self._process is not None:
            self._process.terminate()

    def kill(self) -> None:
        """End it, and what it may have started itself."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Reap the ended process and close its log."""
        if self._process is not None:
            self._process.wait()
        if self._reader is not None:
            self._reader.join(timeout=2)
        if self._log is not None:
            self._log.close()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _log_file(folder: Path, name: str) -> RotatingFileHandler:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name.replace(' ', '-')}.log"
    return RotatingFileHandler(path, maxBytes=_LOG_BYTES, backupCount=_LOG_FILES, encoding="utf-8")
