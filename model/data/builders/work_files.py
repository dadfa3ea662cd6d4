"""Files of a build: the part that one piece leaves, its tally, and the joining of all parts."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

EXAMPLES = 5
"""Findings of each kind that a report shows; all are in the list of findings."""
_ROWS_AT_ONCE = 4096
_COPY = 1 << 20


@dataclass(frozen=True)
class Output:
    """One file of a build; its suffix is its form: ``.jsonl``, ``.json`` (a list) or ``.parquet``.

    Attributes:
        name: path inside the build's folder.
        schema: ``pyarrow.Schema``, for Parquet alone.
        row_group: rows that a reader of the Parquet file has in memory at least.
    """

    name: str
    schema: Any = None
    row_group: int = 65_536

    @property
    def form(self) -> str:
        return Path(self.name).suffix[1:]


@dataclass
class Tally:
    """What was counted and found.

    Attributes:
        counts: group → label → number.
        found: kind of finding → number.
        examples: kind → the first ``EXAMPLES`` messages.
        seconds: of work.
        files: name of each file of the part → bytes.
    """

    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    found: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    seconds: float = 0.0
    files: dict[str, int] = field(default_factory=dict)

    def count(self, group: str, label: str, number: int = 1) -> None:
        labels = self.counts.setdefault(group, {})
        labels[label] = labels.get(label, 0) + number

    def find(self, kind: str, message: str) -> None:
        self.found[kind] = self.found.get(kind, 0) + 1
        shown = self.examples.setdefault(kind, [])
        if len(shown) < EXAMPLES:
            shown.append(message)

    @classmethod
    def read(cls, folder: Path, number: int) -> Tally:
        """Of a piece that is done."""
        return cls(**(read_json(Part.tally_file(folder, number)) or {}))

    @classmethod
    def sum(cls, tallies: Iterable[Tally]) -> Tally:
        """All of them, labels sorted."""
        total = cls()
        for tally in tallies:
            for group, labels in tally.counts.items():
                for label, number in labels.items():
                    total.count(group, label, number)
            for kind, number in tally.found.items():
                total.found[kind] = total.found.get(kind, 0) + number
                shown = total.examples.setdefault(kind, [])
                shown += tally.examples[kind][: EXAMPLES - len(shown)]
            total.seconds += tally.seconds
        total.counts = {group: dict(sorted(labels.items())) for group, labels in sorted(total.counts.items())}
        total.found = dict(sorted(total.found.items()))
        return total


class Part:
    """What one piece writes: rows for the outputs, counts, findings. Nothing of it is there until all of it is.

    Records are JSON objects for ``.jsonl`` and ``.json``; for ``.parquet`` they are rows of the output's schema.
    """

    def __init__(self, folder: Path, number: int, outputs: tuple[Output, ...]) -> None:
        self.folder, self.number = folder, number
        self.tally = Tally()
        self._outputs = {output.name: output for output in outputs}
        self._findings = outputs[-1].name
        self._writers: dict[str, _Lines | _Rows] = {}
        self._start = 0.0

    @staticmethod
    def home(folder: Path) -> Path:
        """Where the parts of a build are."""
        return folder / "parts"

    @staticmethod
    def tally_file(folder: Path, number: int) -> Path:
        return Part.home(folder) / f"part_{number:05d}.json"

    @staticmethod
    def file(folder: Path, number: int, output: Output) -> Path:
        suffix = "parquet" if output.form == "parquet" else "jsonl"
        return Part.home(folder) / f"part_{number:05d}.{output.name.replace('/', '+')}.{suffix}"

    @staticmethod
    def is_done(folder: Path, number: int) -> bool:
        """Whether all files of the part are there in their full size; a crash of the machine can cut them short."""
        tally = read_json(Part.tally_file(folder, number))
        try:
            return tally is not None and all(
                (Part.home(folder) / name).stat().st_size == size for name, size in tally["files"].items()
            )
        except OSError:
            return False

    def write(self, output: str, record: Mapping[str, Any]) -> None:
        """Append one record."""
        self._writer(output).write(record)

    def write_batch(self, output: str, batch: Any) -> None:
        """Append a ``pyarrow.RecordBatch`` to a Parquet output: many rows at the price of few."""
        writer = self._writer(output)
        if not isinstance(writer, _Rows):
            raise TypeError(f"{output} is not Parquet")
        writer.write_batch(batch)

    def count(self, group: str, label: str, number: int = 1) -> None:
        """Add to a number of the report."""
        self.tally.count(group, label, number)

    def find(self, kind: str, message: str, **about: Any) -> None:
        """List something that was wrong, dropped or mended; ``kind`` is a stable word, ``about`` says where."""
        self.tally.find(kind, message)
        self.write(self._findings, {"kind": kind, "message": message, **about})

    def _writer(self, output: str) -> _Lines | _Rows:
        if output not in self._writers:
            target = self.file(self.folder, self.number, self._outputs[output])
            schema = self._outputs[output].schema
            self._writers[output] = _Rows(target, schema) if schema is not None else _Lines(target)
        return self._writers[output]

    def __enter__(self) -> Part:
        self.home(self.folder).mkdir(parents=True, exist_ok=True)
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is not None:
                return
            for writer in self._writers.values():
                writer.finish()
                self.tally.files[writer.target.name] = writer.target.stat().st_size
        finally:
            for writer in self._writers.values():
                writer.abandon()  # what is finished stays
        self.tally.seconds = time.perf_counter() - self._start
        write_json(self.tally_file(self.folder, self.number), vars(self.tally))


class _Lines:
    """JSON lines under a temporary name."""

    def __init__(self, target: Path) -> None:
        self.target, self.temporary = target, temporary_of(target)
        self._stream: IO[bytes] = self.temporary.open("wb")

    def write(self, record: Mapping[str, Any]) -> None:
        try:
            line = json.dumps(record, ensure_ascii=False, allow_nan=False)
        except ValueError:  # NaN of a key that nobody reads, which JSON has no word for
            plain = json.loads(json.dumps(record), parse_constant=lambda _: None)
            line = json.dumps(plain, ensure_ascii=False)
        self._stream.write(line.encode() + b"\n")

    def finish(self) -> None:
        self._stream.close()
        self.temporary.replace(self.target)

    def abandon(self) -> None:
        _close_quietly(self._stream)
        self.temporary.unlink(missing_ok=True)


class _Rows:
    """Parquet rows under a temporary name."""

    def __init__(self, target: Path, schema: Any) -> None:
        import pyarrow.parquet as parquet

        self.target, self.temporary, self._schema = target, temporary_of(target), schema
        self._sink = self.temporary.open("wb")
        self._file = parquet.ParquetWriter(self._sink, schema, compression="zstd")
        self._rows: list[Mapping[str, Any]] = []

    def write(self, record: Mapping[str, Any]) -> None:
        self._rows.append(record)
        if len(self._rows) >= _ROWS_AT_ONCE:
            self._flush()

    def write_batch(self, batch: Any) -> None:
        self._flush()
        self._file.write_batch(batch)

    def _flush(self) -> None:
        import pyarrow as arrow

        if self._rows:
            self._file.write_batch(arrow.RecordBatch.from_pylist(self._rows, self._schema))
            self._rows = []

    def finish(self) -> None:
        self._flush()
        self._file.close()
        self._sink.close()
        self.temporary.replace(self.target)

    def abandon(self) -> None:
        _close_quietly(self._file)
        _close_quietly(self._sink)
        self.temporary.unlink(missing_ok=True)


def join_parts(outputs: Iterable[Output], folder: Path, out: Path, pieces: int) -> dict[str, dict[str, int]]:
    """Make the final files of all parts, in the order of the pieces, a megabyte or a row group in memory at a time.

    A JSON file without any record is left out: nothing could be read from it. A file that was there is replaced.

    Returns:
        Records and bytes of each file.
    """
    made = {}
    for output in outputs:
        parts = [path for number in range(pieces) if (path := Part.file(folder, number, output)).is_file()]
        target = out / output.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not parts and output.form != "parquet":
            target.unlink(missing_ok=True)
            continue
        for left in target.parent.glob(f".{target.name}.*.tmp"):  # of a run that was killed while it joined
            left.unlink(missing_ok=True)
        temporary = temporary_of(target)
        try:
            join = {"parquet": _join_rows, "json": _join_list}.get(output.form, _join_lines)
            records = join(parts, temporary, output)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        made[output.name] = {"records": records, "bytes": target.stat().st_size}
    return made


def _join_lines(parts: Iterable[Path], target: Path, output: Output) -> int:
    records = 0
    with target.open("wb") as sink:
        for part in parts:
            with part.open("rb") as stream:
                while block := stream.read(_COPY):
                    records += block.count(b"\n")
                    sink.write(block)
        _to_disk(sink)
    return records


def _join_list(parts: Iterable[Path], target: Path, output: Output) -> int:
    records = 0
    with target.open("wb") as sink:
        for line in _lines(parts):
            sink.write(b",\n" if records else b"[\n")
            sink.write(line.rstrip(b"\n"))
            records += 1
        sink.write(b"\n]\n")
        _to_disk(sink)
    return records


def _lines(parts: Iterable[Path]) -> Iterator[bytes]:
    for part in parts:
        with part.open("rb") as stream:
            yield from stream


def _join_rows(parts: Iterable[Path], target: Path, output: Output) -> int:
    """Row groups of one size, whatever the sizes of the parts."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    records = 0
    with target.open("wb") as sink, parquet.ParquetWriter(sink, output.schema, compression="zstd") as writer:
        waiting: list[Any] = []
        for part in parts:
            with parquet.ParquetFile(part) as file:
                for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, use_threads=False):
                    waiting.append(batch)
                    records += batch.num_rows
                    if sum(one.num_rows for one in waiting) >= output.row_group:
                        table = arrow.Table.from_batches(waiting)
                        writer.write_table(table[: output.row_group], row_group_size=output.row_group)
                        waiting = table[output.row_group :].to_batches()
        if waiting:
            writer.write_table(arrow.Table.from_batches(waiting), row_group_size=output.row_group)
        writer.close()
        _to_disk(sink)
    return records


def _to_disk(stream: IO[bytes]) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _close_quietly(stream: Any) -> None:
    """Closing flushes, and fails once more where writing failed."""
    with suppress(OSError, ValueError):
        stream.close()


def temporary_of(path: Path) -> Path:
    """A name beside ``path`` that no other process, here or on another machine, uses."""
    return path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")


def write_json(path: Path, content: Any) -> None:
    """Write indented UTF-8 JSON, whole or not at all."""
    temporary = temporary_of(path)
    try:
        with temporary.open("wb") as stream:
            stream.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Content of a file that ``write_json`` wrote, None where there is none.

    What a crash of the machine damaged counts as absent: it is made again.
    """
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
