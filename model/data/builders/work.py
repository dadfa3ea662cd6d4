"""Resumable, deterministic, multi-process data builds.

A build is a list of small ``Piece``s (ranges of records, folders …), a top-level function that does one of them, and
the files that come of all of them. The function is given the piece, a context that is the same for all, and a ``Part``
to write to::

    def convert(piece: range, context: Settings, part: Part) -> None:
        for number in piece:
            record = …
            if record is bad:
                part.find("missing_mask", "the mask … does not exist", record=number)  # listed, counted, not fatal
                continue
            part.write("train.jsonl", record)
            part.count("modality", "ct")

    build = Build(out, "vqa", settings={"seed": 7}, source=fingerprint([file]), outputs=(Output("train.jsonl"),))
    report = run_build(build, pieces, convert, context, Execution(workers=4), unit="record")
    sys.stdout.write(report.format() + "\\n")

What that gives:

- Each piece ends as files under ``OUT/.build/NAME/``, renamed into place when whole, and a small JSON with its tally,
  written last. The same command goes on where it was killed. Other settings or a changed source are refused.
- Parts are joined in the order of their pieces, streaming. The files are the same bytes for any number of processes,
  as long as the function depends on piece and context alone and the list of pieces does not depend on workers.
- A finished build is done again only with ``--overwrite``, or if one of its files is gone.
- Every finding is a line of ``findings_NAME.jsonl``; counts and the first findings of each kind are in
  ``report_NAME.json``.

Give a build some hundreds of pieces of a second or more each. Imports of the function's module are paid by every
process: keep torch out of it. ``work_options`` has the flags that all builders share; ``execution_of(options)`` makes
an ``Execution`` of them and ``tell(report)`` prints what ``medplib data build NAME`` ends with.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from tqdm import tqdm

from model.data.builders.work_files import Output, Part, Tally, join_parts, read_json, write_json
from model.data.builders.work_report import BuildReport
from model.data.builders.work_source import difference, fingerprint
from model.errors import MedPLIBError, shown

__all__ = [
    "Build",
    "BuildReport",
    "Execution",
    "Output",
    "Part",
    "Piece",
    "fingerprint",
    "finished_report",
    "run_build",
    "sole_use",
]

logger = logging.getLogger(__name__)

Work = Callable[[Any, Any, Part], None]


@dataclass(frozen=True)
class Piece:
    """What one call of the function does.

    Attributes:
        what: given to the function; picklable.
        size: how far it moves the bar, in the build's unit.
    """

    what: Any
    size: int = 1


@dataclass(frozen=True)
class Execution:
    """How a build is done; nothing here changes its files.

    Attributes:
        workers: processes; 1 works in this one.
        overwrite: start anew, whatever is there.
        same_source: the user says that a source that looks changed is what it was.
        bar: show a bar where there is a terminal.
    """

    workers: int = 1
    overwrite: bool = False
    bar: bool = True
    same_source: bool = False


@dataclass(frozen=True)
class Build:
    """What is built.

    Attributes:
        out: folder of the results; made if absent.
        name: of the builder; several may share one folder.
        settings: everything that changes the files, as plain JSON values; another run must have the same. An absolute
            path is the place of a source.
        source: what tells that the source changed, say ``fingerprint(files)``.
        outputs: the files; the function writes to them by name.
    """

    out: Path
    name: str
    settings: Mapping[str, Any]
    outputs: tuple[Output, ...]
    source: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where parts and state are."""
        return self.out / ".build" / self.name

    @property
    def all_outputs(self) -> tuple[Output, ...]:
        """The files and the list of findings."""
        return (*self.outputs, Output(f"findings_{self.name}.jsonl"))

    @property
    def report_file(self) -> Path:
        return self.out / f"report_{self.name}.json"


def run_build(
    build: Build, pieces: Sequence[Piece], work: Work, context: Any, execution: Execution, *, unit: str = "piece"
) -> BuildReport:
    """Do the pieces that are missing and join all.

    Args:
        build: what is built.
        pieces: all of them, in the order of the files' content; the same in every run.
        work: top-level function of a module, called as ``work(piece.what, context, part)``.
        context: picklable, the same for all pieces.
        execution: processes, whether to start anew.
        unit: of the bar.

    Returns:
        What was built.

    Raises:
        MedPLIBError: the folder holds another build or foreign files, another run is at work there, the disk is full,
            a process died, or ``work`` raised one.
    """
    start = time.perf_counter()
    if execution.workers < 1:
        raise MedPLIBError(f"--workers is {execution.workers}; give at least 1")
    try:
        with sole_use(build):
            finished = None if execution.overwrite else finished_report(build, same_source=execution.same_source)
            if finished and finished.pieces == len(pieces):
                return finished
            _claim(build, len(pieces), execution)
            _do_missing(build, pieces, work, context, execution, unit)
            tally = Tally.sum(Tally.read(build.folder, number) for number in range(len(pieces)))
            report = BuildReport.of(build.name, dict(build.settings), tally, str(build.out), unit)
            report.pieces = len(pieces)
            report.files = join_parts(build.all_outputs, build.folder, build.out, len(pieces))
            report.seconds = time.perf_counter() - start
            write_json(build.report_file, report.to_json())
            write_json(build.folder / "done.json", report.to_json())
            _forget_parts(build)
            return report
    except KeyboardInterrupt:
        logger.warning("%s: stopped; what is done is kept, and the same command goes on from there", build.name)
        raise


@contextmanager
def sole_use(build: Build) -> Iterator[None]:
    """Lock the build's folder; the kernel drops the lock of a process that dies.

    Raises:
        MedPLIBError: another run is at work there, or what is done inside met a full disk or the like.
    """
    try:
        build.folder.mkdir(parents=True, exist_ok=True)
        with _lock(build):
            yield
    except OSError as error:
        raise _told(error, build.out) from error


@contextmanager
def _lock(build: Build) -> Iterator[None]:
    with (build.folder / "lock").open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MedPLIBError(
                f"another run builds {build.name} in {build.out} at this moment; wait for its end or name another --out"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                raise  # else a file system without locks: parts are whole or absent all the same
        yield


def finished_report(build: Build, *, same_source: bool = False) -> BuildReport | None:
    """What the same build told at its end; None where it did not end, or one of its files is gone or changed."""
    stored = read_json(build.folder / "done.json")
    if stored is None:
        return None
    report = BuildReport.from_json(stored)
    begun, identity = read_json(build.folder / "settings.json"), _identity(build, report.pieces)
    if begun is None or difference(begun, identity, same_source=same_source):
        return None
    for name, facts in report.files.items():
        try:
            if (build.out / name).stat().st_size != facts["bytes"]:
                return None
        except OSError:
            return None
    if begun != identity:
        write_json(build.folder / "settings.json", identity)
    report.did_nothing, report.settings, report.out = True, dict(build.settings), str(build.out)
    return report


def _identity(build: Build, pieces: int) -> dict[str, Any]:
    return {"settings": dict(build.settings), "source": dict(build.source), "pieces": pieces}


def _claim(build: Build, pieces: int, execution: Execution) -> None:
    """Note whose parts these are; refuse to mix them with others."""
    identity, place = _identity(build, pieces), build.folder / "settings.json"
    stored = read_json(place)
    if execution.overwrite:
        _forget_parts(build)
        for name in (read_json(build.folder / "done.json") or {"files": {}})["files"]:
            (build.out / name).unlink(missing_ok=True)
        (build.folder / "done.json").unlink(missing_ok=True)
    elif stored is not None:
        told = difference(stored, identity, same_source=execution.same_source)
        if told:
            raise MedPLIBError(f"{build.out} holds a {build.name} build with {told}")
    else:
        foreign = [output.name for output in build.outputs if (build.out / output.name).exists()]
        if foreign:
            raise MedPLIBError(
                f"{build.out / foreign[0]} exists and no {build.name} build made it; name another --out, or replace it "
                "with --overwrite"
            )
    if stored != identity:
        write_json(place, identity)


def _do_missing(
    build: Build, pieces: Sequence[Piece], work: Work, context: Any, execution: Execution, unit: str
) -> None:
    """Do the pieces whose parts are not there yet."""
    missing = [number for number in range(len(pieces)) if not Part.is_done(build.folder, number)]
    if not missing:
        return
    total = sum(piece.size for piece in pieces)
    done = total - sum(pieces[number].size for number in missing)
    calls = _Calls(work, context, build.folder, build.all_outputs)
    jobs = ((number, pieces[number].what) for number in missing)
    workers = min(execution.workers, len(missing))
    with tqdm(
        total=total,
        initial=done,
        unit=unit,
        unit_scale=total > 100_000,
        desc=build.name,
        disable=None if execution.bar else True,
        smoothing=0.05,
    ) as bar:
        for number in map(calls, jobs) if workers == 1 else _in_processes(calls, jobs, workers):
            bar.update(pieces[number].size)


@dataclass(frozen=True)
class _Calls:
    """The function with all that is the same for every piece, as a process receives it."""

    work: Work
    context: Any
    folder: Path
    outputs: tuple[Output, ...]

    def __call__(self, job: tuple[int, Any]) -> int:
        number, what = job
        with Part(self.folder, number, self.outputs) as part:
            self.work(what, self.context, part)
        return number


def _in_processes(call: _Calls, jobs: Iterator[tuple[int, Any]], workers: int) -> Iterator[int]:
    """Numbers of the pieces as they are done, in any order; errors of the function are raised here.

    Processes are started fresh: forked from one whose libraries run threads, they can inherit a held lock and hang.
    """
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_follow_parent)
    waiting: set[Future[int]] = set()
    try:
        while True:
            waiting |= {pool.submit(call, job) for job in islice(jobs, 2 * workers - len(waiting))}
            if not waiting:
                return
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BrokenProcessPool:
        raise MedPLIBError(
            "a worker process died; what is done is kept: run the same command again, with fewer --workers if memory "
            "is short"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """In a worker process: leave Ctrl-C to the parent, and end with it however it dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()

    def end_with_it() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=end_with_it, daemon=True).start()


def _forget_parts(build: Build) -> None:
    """The parts are in the files now: the disk need not hold them twice."""
    shutil.rmtree(Part.home(build.folder), ignore_errors=True)


def _told(error: OSError, out: Path) -> MedPLIBError:
    where = shown(error.filename or out, quoted=False)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MedPLIBError(
            f"the disk of {out} is full; what is done is kept: free some space and run the same command again"
        )
    return MedPLIBError(f"{where}: {error.strerror or error}; mend that and run the same command again, which goes on")
