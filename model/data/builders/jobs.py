"""Resumable data builds over processes: the same bytes for any number of workers, written whole or not at all.

A build is a list of pieces, a top-level function that does one of them, and the files that come of all::

    def convert(piece: range, context: Settings, part: Part) -> None:
        for number in piece:
            part.write("train.jsonl", …)  # a record of an output
            part.find("missing_mask", "the mask … does not exist", record=number)  # a line of findings_NAME.jsonl
            part.count("modality", "ct")  # a number of report_NAME.json

    build = Build(out, "vqa", {"seed": 7}, (Output("train.jsonl"),), fingerprint([file]))
    report = run_build(build, lambda: (pieces, settings), convert, Execution(workers=4))

What each piece gives lies in ``OUT/.build/NAME/`` until all are joined in the order of the pieces. The function depends
on piece and context alone; its module leaves torch out, whose import every process would pay for.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import signal
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from io import BytesIO
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from model.errors import MedPLIBError, shown

logger = logging.getLogger(__name__)
_EXAMPLES = 5  # findings of each kind that a report shows
_LABELS = 12  # labels of a group that a report prints
_ROWS = 4096  # of Parquet at a time


class Piece(NamedTuple):
    """What one call of the function does: ``what`` is given to it, ``size`` is how far it moves the bar."""

    what: Any
    size: int = 1


class Output(NamedTuple):
    """A file by its path below the results: ``.jsonl``, ``.json`` (a list), or ``.parquet`` with a schema."""

    name: str
    schema: Any = None
    row_group: int = 65_536


@dataclass(frozen=True)
class Execution:
    """How a build is done; nothing here changes its files."""

    workers: int = 1  # processes; 1 works in this one
    overwrite: bool = False  # start anew, whatever is there
    same_source: bool = False  # the user says that a source that looks changed is what it was


@dataclass(frozen=True)
class Build:
    """What is built."""

    out: Path  # folder of the results; made if absent
    name: str  # of the builder; several may share one folder
    settings: Mapping[str, Any]  # all that changes the files, as JSON; an absolute path is the place of a source
    outputs: tuple[Output, ...]  # the files; the function writes to them by name
    source: Mapping[str, Any] = field(default_factory=dict)  # changes when the source does, say ``fingerprint(files)``
    unit: str = "record"  # of the pieces' sizes

    @property
    def all_outputs(self) -> tuple[Output, ...]:
        """The files and the list of findings."""
        return (*self.outputs, Output(f"findings_{self.name}.jsonl"))

    @property
    def folder(self) -> Path:
        """What is kept until the build ends."""
        return self.out / ".build" / self.name / "parts"

    @property
    def state(self) -> Path:
        """``identity``, and the report when the build has ended."""
        return self.folder.with_name("state.json")

    @property
    def identity(self) -> dict[str, Any]:
        """What a run must have in common with one begun to go on with it."""
        return {"settings": dict(self.settings), "source": dict(self.source)}


@dataclass
class BuildReport:
    """Outcome: counts by group and label, findings by kind, records and bytes of files, seconds of run and of work."""

    name: str
    out: str
    settings: dict[str, Any]
    counts: dict[str, dict[str, int]]
    findings: dict[str, dict[str, Any]]
    unit: str
    files: dict[str, dict[str, int]]
    pieces: int
    seconds: float
    worker_seconds: float
    did_nothing: bool = False

    @property
    def findings_file(self) -> str:
        """The list of all findings."""
        return f"{self.out}/findings_{self.name}.jsonl"

    def format(self) -> str:
        """The report as text."""
        lines = []
        for group, labels in self.counts.items():
            order = sorted(labels.items(), key=lambda pair: (-pair[1], pair[0]))
            text = ", ".join(f"{label} {number:,}" for label, number in order[:_LABELS])
            rest = [number for _, number in order[_LABELS:]]
            lines.append(f"{group}: {text}" + (f" and {len(rest)} more ({sum(rest):,})" if rest else ""))
        if self.findings:
            lines += ["", "found on the way:"]
            for kind, facts in self.findings.items():
                lines.append(f"  {kind} {facts['count']}, such as: {facts['examples'][0]}")
            lines.append(f"  all of them: {self.findings_file}")
        lines += [""] if lines else []
        for name, facts in self.files.items():
            lines.append(f"{self.out}/{name}: {facts['records']:,} records, {facts['bytes'] / 1e6:,.1f} MB")
        end = f"done in {self.seconds:,.1f} s ({self.worker_seconds:,.1f} s of work over all runs and processes)"
        if self.did_nothing:
            end = "all of it was there already; nothing was done (--overwrite makes it anew)"
        return "\n".join([*lines, f"{self.name}: {end}"])


class Part:
    """What one piece gives, in memory until the piece is done."""

    def __init__(self, outputs: Sequence[Output]) -> None:
        self.lines: dict[str, list[bytes]] = {output.name: [] for output in outputs}
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        self.found: dict[str, list[str]] = defaultdict(list)
        self._findings = outputs[-1].name

    def write(self, output: str, record: Mapping[str, Any]) -> None:
        """Append a JSON object, or a row of a Parquet output."""
        try:
            text = json.dumps(record, ensure_ascii=False, allow_nan=False)
        except ValueError:  # NaN of a key that nobody reads, which JSON has no word for
            text = json.dumps(json.loads(json.dumps(record), parse_constant=lambda _: None), ensure_ascii=False)
        self.lines[output].append(text.encode() + b"\n")

    def count(self, group: str, label: str, number: int = 1) -> None:
        """Add to a number of the report."""
        self.counts[group][label] += number

    def find(self, kind: str, message: str, **about: Any) -> None:
        """List something that was wrong, dropped or mended; ``kind`` is a stable word, ``about`` says where."""
        self.write(self._findings, {"kind": kind, "message": message, **about})
        self.found[kind].append(message)


Work = Callable[[Any, Any, Part], None]


def run_build(
    build: Build, prepare: Callable[[], tuple[Sequence[Piece], Any]], work: Work, execution: Execution
) -> BuildReport:
    """Do the pieces that are missing and join all.

    Args:
        build: what is built.
        prepare: gives the pieces in the order of the files' content, the same in every run, and a picklable context;
            called unless all is there. It may keep files of its own in ``build.folder``.
        work: top-level function of a module, called as ``work(piece.what, context, part)``.
        execution: processes, whether to start anew.

    Raises:
        MedPLIBError: the folder holds another build or foreign files, another run is at work there, the disk is full,
            a process died, or ``prepare`` or ``work`` raised one.
    """
    start = time.perf_counter()
    if execution.workers < 1:
        raise MedPLIBError(f"--workers is {execution.workers}; give at least 1")
    try:
        build.folder.parent.mkdir(parents=True, exist_ok=True)
        with build.folder.with_name("lock").open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel drops it when the process dies
            except BlockingIOError:
                raise MedPLIBError(
                    f"another run builds {build.name} in {build.out} at this moment; wait for its end or name another "
                    "--out"
                ) from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                    raise  # else a file system without locks: parts are whole or absent all the same
            finished = None if execution.overwrite else finished_report(build, same_source=execution.same_source)
            if finished is not None:
                return finished
            _claim(build, execution)
            pieces, context = prepare()
            write_json(build.state, build.identity)
            folder = build.folder / f"of_{len(pieces)}"  # so that parts of other pieces are not taken for these
            parts = [folder / f"part_{number:05d}" for number in range(len(pieces))]
            _do_missing(build, parts, pieces, partial(_do, build.all_outputs, work, context), execution)
            report = _join(build, parts, start)
            write_json(build.out / f"report_{build.name}.json", asdict(report))
            write_json(build.state, {**build.identity, "report": asdict(report)})
            shutil.rmtree(build.folder, ignore_errors=True)
            return report
    except KeyboardInterrupt:
        logger.warning("%s: stopped; what is done is kept, and the same command goes on from there", build.name)
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MedPLIBError(
                f"the disk of {build.out} is full; what is done is kept: free some space and run the same command again"
            ) from error
        where = shown(error.filename or build.out, quoted=False)
        raise MedPLIBError(
            f"{where}: {error.strerror or error}; mend that and run the same command again, which goes on"
        ) from error


def finished_report(build: Build, *, same_source: bool = False) -> BuildReport | None:
    """The report of the same build; None where it did not end, or one of its files is gone or changed."""
    state = _read_json(build.state)
    if state is None or "report" not in state or _difference(state, build, same_source):
        return None
    here = {"settings": dict(build.settings), "out": str(build.out), "did_nothing": True}
    report = BuildReport(**{**state["report"], **here})
    for name, facts in report.files.items():
        if not (file := build.out / name).is_file() or file.stat().st_size != facts["bytes"]:
            return None
    if state != (moved := {**state, **build.identity}):  # is said once
        write_json(build.state, moved)
    return report


def _claim(build: Build, execution: Execution) -> None:
    """Refuse to mix a build with another or with foreign files, or clear what is there."""
    state = _read_json(build.state)
    if execution.overwrite:
        for name in (state or {}).get("report", {"files": ()})["files"]:
            (build.out / name).unlink(missing_ok=True)
        build.state.unlink(missing_ok=True)
        shutil.rmtree(build.folder, ignore_errors=True)
    elif state is not None:
        if difference := _difference(state, build, execution.same_source):
            raise MedPLIBError(f"{build.out} holds a {build.name} build with {difference}")
    elif foreign := [output.name for output in build.outputs if (build.out / output.name).exists()]:
        raise MedPLIBError(
            f"{build.out / foreign[0]} exists and no {build.name} build made it; name another --out, or replace it "
            "with --overwrite"
        )


def _difference(begun: Mapping[str, Any], build: Build, same_source: bool) -> str:
    """The first thing in which a build begun and one asked for differ, and what to do; empty where they agree."""
    found = []
    for group, wanted in (("settings", build.settings), ("source", build.source)):
        for key in sorted({*begun[group], *wanted}):
            old, new = begun[group].get(key), wanted.get(key)
            if old != new:
                is_source = group == "source" or (isinstance(new, str) and Path(new).is_absolute())
                found.append((is_source, f"{key} = {old!r:.80} where this run has {new!r:.80}"))
    for is_source, text in sorted(found, key=lambda one: one[0]):
        if not is_source:
            return f"{text}; repeat its settings, name another --out, or start anew with --overwrite"
        if not same_source:
            return (
                f"the source {text}; start anew with --overwrite, or, if the data only moved or were copied, go on "
                "with --same-source"
            )
    return ""


def _do_missing(
    build: Build, parts: Sequence[Path], pieces: Sequence[Piece], do: Callable[[Path, Any], None], execution: Execution
) -> None:
    missing = [(part, piece) for part, piece in zip(parts, pieces, strict=True) if not part.exists()]
    total, left = sum(piece.size for piece in pieces), sum(piece.size for _, piece in missing)
    workers = min(execution.workers, len(missing))
    with tqdm(
        total=total,
        initial=total - left,
        unit=build.unit,
        unit_scale=total > 100_000,
        desc=build.name,
        disable=None if missing else True,  # None: where there is no terminal
    ) as bar:
        if workers <= 1:
            for part, piece in missing:
                do(part, piece.what)
                bar.update(piece.size)
            return
        # Fresh processes: forked from one whose libraries run threads, they can inherit a held lock and hang.
        pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_follow_parent)
        try:
            futures = {pool.submit(do, part, piece.what): piece.size for part, piece in missing}
            for future in as_completed(futures):
                future.result()
                bar.update(futures[future])
        except BrokenProcessPool:
            raise MedPLIBError(
                "a worker process died; what is done is kept: run the same command again, with fewer --workers if "
                "memory is short"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _do(outputs: Sequence[Output], work: Work, context: Any, file: Path, what: Any) -> None:
    """One piece: a line with its counts and how many lines of each output follow, then these lines."""
    start, part = time.perf_counter(), Part(outputs)
    work(what, context, part)
    head = {
        "lines": {output: len(lines) for output, lines in part.lines.items()},
        "counts": part.counts,
        "found": {kind: [len(messages), messages[:_EXAMPLES]] for kind, messages in part.found.items()},
        "seconds": time.perf_counter() - start,
    }
    with whole_file(file, sync=True) as stream:
        stream.write(json.dumps(head).encode() + b"\n")
        for lines in part.lines.values():
            stream.writelines(lines)


def _follow_parent() -> None:
    """In a worker process: leave Ctrl-C to the parent, and end with it however it dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()

    def end_with_it() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=end_with_it, daemon=True).start()


def _join(build: Build, parts: Sequence[Path], start: float) -> BuildReport:
    """Make the files of all parts in the order of the pieces, streaming; a file without any record is not made."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    found: dict[str, dict[str, Any]] = defaultdict(lambda: {"count": 0, "examples": []})
    records: Counter[str] = Counter()
    seconds = 0.0
    with ExitStack() as stack:
        joined = {output.name: stack.enter_context(_joined(build.out, output)) for output in build.all_outputs}
        for part in parts:
            with part.open("rb") as stream:
                head = json.loads(stream.readline())
                for name, number in head["lines"].items():
                    joined[name](islice(stream, number))
            records.update(head["lines"])
            seconds += head["seconds"]
            for group, labels in head["counts"].items():
                counts[group].update(labels)
            for kind, (number, examples) in head["found"].items():
                facts = found[kind]
                facts["count"] += number
                facts["examples"] = [*facts["examples"], *examples][:_EXAMPLES]
    files = {
        name: {"records": records[name], "bytes": (build.out / name).stat().st_size}
        for name in joined
        if (build.out / name).exists()
    }
    return BuildReport(
        build.name,
        str(build.out),
        dict(build.settings),
        {group: dict(sorted(labels.items())) for group, labels in sorted(counts.items())},
        dict(sorted(found.items())),
        build.unit,
        files,
        len(parts),
        time.perf_counter() - start,
        seconds,
    )


@contextmanager
def _joined(out: Path, output: Output) -> Iterator[Callable[[Iterator[bytes]], None]]:
    """Give a function that appends lines to an output.

    An empty JSON file could not be read, so none is left there; an empty Parquet file has its columns."""
    target = out / output.name
    for left in target.parent.glob(f".{target.name}.*.tmp"):  # of a run that was killed while it joined
        left.unlink(missing_ok=True)
    with whole_file(target, sync=True) as stream:
        if output.schema is not None:
            import pyarrow.json
            import pyarrow.parquet

            parsing = pyarrow.json.ParseOptions(explicit_schema=output.schema, unexpected_field_behavior="error")
            waiting = output.schema.empty_table()
            with pyarrow.parquet.ParquetWriter(stream, output.schema, compression="zstd") as writer:

                def add_rows(lines: Iterator[bytes]) -> None:
                    nonlocal waiting
                    while text := b"".join(islice(lines, _ROWS)):
                        reading = pyarrow.json.ReadOptions(use_threads=False, block_size=len(text))
                        more = pyarrow.json.read_json(BytesIO(text), reading, parsing)
                        waiting = pyarrow.concat_tables([waiting, more])
                        while waiting.num_rows >= output.row_group:
                            writer.write_table(waiting[: output.row_group], row_group_size=output.row_group)
                            waiting = waiting[output.row_group :]

                yield add_rows
                if waiting.num_rows:
                    writer.write_table(waiting, row_group_size=output.row_group)
        elif output.name.endswith(".json"):

            def add_entries(lines: Iterator[bytes]) -> None:
                for line in lines:
                    stream.write((b",\n" if stream.tell() else b"[\n") + line[:-1])

            yield add_entries
            stream.write(b"\n]\n" if stream.tell() else b"")
        else:
            yield stream.writelines


def fingerprint(files: Sequence[Path]) -> dict[str, str]:
    """Sizes and contents of source files by their path below the folder they share; of a folder, its time of change.

    A copy of files is the same source, and an edit that keeps the size is noticed. Folders of images are too large to
    be read for that; whether a copy of one is the same only its user knows (``--same-source``)."""
    shared = os.path.commonpath([file.absolute().parent for file in files]) if files else ""
    prints = {}
    for file in files:
        try:
            if file.is_dir():
                text = f"folder, changed {file.stat().st_mtime_ns}"
            else:
                with file.open("rb") as stream:
                    digest = hashlib.file_digest(stream, "sha256").hexdigest()
                    text = f"{os.fstat(stream.fileno()).st_size} bytes, sha256 {digest[:16]}"
        except OSError as error:
            raise MedPLIBError(
                f"cannot read {file}: {error.strerror}; name the file or folder of the download"
            ) from None
        prints[file.absolute().relative_to(shared).as_posix()] = text
    return prints


@contextmanager
def whole_file(path: Path, *, sync: bool = False, empty: bool = False) -> Iterator[IO[bytes]]:
    """Write a file that has its name when all of it is there; none is left if that fails or, unless ``empty``, nothing
    is written. ``sync``: wait until it is on the disk, so that a crash of the machine cannot cut it short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            if sync and stream.tell():
                os.fsync(stream.fileno())
        if empty or temporary.stat().st_size:
            temporary.replace(path)
        else:
            path.unlink(missing_ok=True)
    finally:
        temporary.unlink(missing_ok=True)


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write uint8 pixels [H, W] or [H, W, 3] in the order blue, green, red as PNG, whole or not at all."""
    import cv2

    done, buffer = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 4])
    if not done:
        raise OSError(f"cannot encode {path}")
    write_bytes(path, buffer.tobytes())


def write_bytes(path: Path, content: bytes, *, sync: bool = False) -> None:
    """Write a file whole or not at all; see ``whole_file``."""
    with whole_file(path, sync=sync) as stream:
        stream.write(content)


def write_json(path: Path, content: Any) -> None:
    """Write indented UTF-8 JSON, whole or not at all."""
    write_bytes(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode(), sync=True)


def _read_json(path: Path) -> Any:
    """What was written there; None without a file, or where a crash of the machine damaged it: it is made again."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
