"""Preemption: signals that stop a run, which saves; the exit code shows it."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Signals that end a run in good order."""

_LOADER_SECONDS = 60  # that a loader process stays after a termination signal, unless it is ended before
_ECHO_SECONDS = 3.0  # a launcher passes on the Ctrl-C that its processes got from the terminal already
_BEFORE = "stopped before the first step; nothing was lost"


class RunStopped(SystemExit):
    """The run got a signal and stopped in good order: code 0 after SIGTERM or SIGUSR1, 130 after Ctrl-C."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(128 + signal.SIGINT if number == signal.SIGINT else 0)
        self.number, self.message = number, message


def exit_on_signals() -> None:
    """Until ``StopRequest.listen``, while libraries are imported, let a signal end the process as if it had come later.

    It ends without unwinding: an exception raised inside an import may be swallowed by what imports.
    """

    def end(number: int, frame: FrameType | None) -> None:
        os.write(2, f"{_BEFORE}\n".encode())
        os._exit(int(str(RunStopped(number, _BEFORE).code)))

    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):  # nobody else's
                signal.signal(number, end)


class StopRequest:
    """Whether this process got a signal to stop: ``number`` of the signal, None before one came.

    While a run is loading there is nothing to save, and a signal ends it at once; from ``defer`` on it is only noted.
    Outside the main thread no signal can be caught, and nothing happens.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._since = 0.0
        self._deferred = False
        self._previous: dict[int, Any] = {}

    def listen(self) -> None:
        """Take over SIGTERM, SIGUSR1 and Ctrl-C."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def defer(self) -> None:
        """From now on a signal waits for the step to end."""
        self._deferred = True

    def release(self) -> None:
        """Restore the handlers that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """Note the first signal; a second Ctrl-C, some time later, ends at once."""
        now = time.monotonic()
        if self.number is None:
            self.number, self._since = number, now
            if not self._deferred:
                raise RunStopped(number, _BEFORE)
        elif number == signal.SIGINT and now - self._since > _ECHO_SECONDS:
            raise KeyboardInterrupt


def leave_signals_to_the_parent(worker: int) -> None:
    """For loader processes: a scheduler signals all processes of a job, and these outlive the step that goes on."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))  # any other end would be taken for a crash
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_LOADER_SECONDS))
