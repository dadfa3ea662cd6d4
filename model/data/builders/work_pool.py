"""Processes for a build: started fresh, one job at a time each, their deaths noticed, gone when the build is."""

from __future__ import annotations

import pickle
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from model.errors import MedPLIBError

Call = Callable[[Any], Any]


def in_processes(call: Call, jobs: Iterable[Any], workers: int) -> Iterator[Any]:
    """Results of ``call(job)`` as they come, in any order.

    Processes are started fresh: forked from one whose libraries run threads, they can inherit a held lock and hang.
    They end when this process does, however it dies, at the latest after the job at hand.

    Args:
        call: picklable; sent to each process once.
        jobs: picklable; drawn as processes become free.
        workers: number of processes.

    Raises:
        MedPLIBError: ``call`` raised one, or a process died.
        OSError: ``call`` raised one.
        RuntimeError: ``call`` raised anything else; holds its traceback.
    """
    context, waiting = get_context("spawn"), iter(jobs)
    members: dict[Any, BaseProcess] = {}
    try:
        for job in _first(waiting, workers):
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(target=_serve, args=(theirs, call), daemon=True)
            members[ours] = process
            process.start()
            theirs.close()
            _hand(ours, process, job)
        while members:
            for ready in _ready(members):
                yield _answer(ready, members[ready])
                following = next(waiting, _NONE)
                if following is _NONE:
                    _dismiss(members, ready)
                else:
                    _hand(ready, members[ready], following)
    finally:
        for connection, process in members.items():
            connection.close()
            if process.pid is not None:
                process.kill()
                process.join()


_NONE = object()


def _first(jobs: Iterator[Any], number: int) -> Iterator[Any]:
    for _ in range(number):
        job = next(jobs, _NONE)
        if job is _NONE:
            return
        yield job


def _ready(members: dict[Any, BaseProcess]) -> list[Any]:
    """Connections that have an answer, or whose process died."""
    return wait(list(members))


def _dismiss(members: dict[Any, BaseProcess], connection: Any) -> None:
    process = members.pop(connection)
    connection.close()
    process.join()


def _hand(connection: Any, process: BaseProcess, job: Any) -> None:
    try:
        connection.send(job)
    except (BrokenPipeError, ConnectionResetError):
        raise _death(process) from None


def _answer(connection: Any, process: BaseProcess) -> Any:
    """What a process sent, or the reason why nothing came."""
    try:
        kind, content = connection.recv()
    except (EOFError, ConnectionResetError):
        raise _death(process) from None
    if kind == "done":
        return content
    if kind == "told":
        raise content
    raise RuntimeError(f"a worker process failed\n{content}")


def _death(process: BaseProcess) -> MedPLIBError:
    process.join()
    code = process.exitcode or 0
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    return MedPLIBError(
        f"a worker process {how}; what is done is kept: run the same command again, with fewer --workers if memory is "
        "short"
    )


def _serve(connection: Connection, call: Call) -> None:
    """A process's life; Ctrl-C is the parent's affair."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            job = connection.recv()
        except (EOFError, OSError):
            return
        answer: tuple[str, Any]
        try:
            answer = ("done", call(job))
        except (MedPLIBError, OSError) as error:
            answer = ("told", error)
        except Exception:  # noqa: BLE001 – told to the parent with its traceback, whatever it is
            answer = ("failed", traceback.format_exc())
        try:
            connection.send_bytes(pickle.dumps(answer))
        except OSError:
            return
