"""Records of a data file, found once and parsed on access: JSON list, JSON lines and Parquet.

The file stays on disk: JSON forms are memory-mapped and only the byte range of each record is kept (16 bytes a record);
Parquet is read by row groups. All forms are sequences, safe for threads, forked and spawned loader workers.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import threading
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from model.errors import MedPLIBError, shown

Record = Mapping[str, Any]

_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(rb"[ \t\r\n]*+")
_STRING = rb'"(?:[^"\\\r\n]++|\\.)*+"'
_DANGLING_COMMA = re.compile(r"\s*(?P<comma>,)\s*[}\]]")
_MAX_CACHED_ROW_GROUPS = 4


def _object_pattern(depth: int) -> bytes:
    inner = rb"|" + _object_pattern(depth - 1) if depth else b""
    return rb'\{(?:[^{}"]++|' + _STRING + inner + rb")*+\}"


_LONGEST_OTHER = 1 << 24  # bytes of a value in a list of records that is no object
# One match takes a whole record; objects nested deeper than this are not records of any layout known.
_OBJECT = re.compile(_object_pattern(8))


class Records(Sequence[Record]):
    """A data file as a sequence of raw records; indexing parses one and raises ``MedPLIBError`` if it is broken."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._record(i) for i in range(*index.indices(len(self)))]
        length = len(self)
        if not -length <= index < length:
            raise IndexError(f"record {index} of {length}")
        return self._record(index % length)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _record(self, index: int) -> Record: ...


def open_records(path: str | Path) -> Records:
    """Open a data file; its form is read from its first bytes, not from its name. Raises MedPLIBError: the file is
    absent, empty, of another form, or its records cannot be separated.

    Args:
        path: a JSON list of records, JSON lines (one record a line) or Parquet; UTF-8, byte-order mark allowed.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            head = stream.read(4096)
    except OSError as error:
        reason = error.strerror or "cannot be read"
        raise MedPLIBError(f"cannot open the data file {path}: {reason}; give a JSON, JSONL or Parquet file") from error
    if head.startswith(b"PAR1"):
        return _ParquetRecords(path)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise MedPLIBError(f"{path} is written in UTF-16; save it as UTF-8")
    if head.removeprefix(_BOM).lstrip()[:1] == b"[":
        return _JsonListRecords(path)
    if head.removeprefix(_BOM).lstrip()[:1] == b"{":
        return _JsonLinesRecords(path)
    if not head.removeprefix(_BOM).strip():
        raise MedPLIBError(f"{path} holds no record; expected a JSON list, JSON lines or Parquet")
    raise MedPLIBError(
        f"{path} starts with {head[:12]!r}, which is neither a JSON list '[', JSON lines '{{' nor Parquet; "
        "give a file in one of these forms"
    )


class _JsonRecords(Records):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._open()
        self._ranges = self._find_ranges()  # int64 [N, 2]: first byte, one past the last

    def _open(self) -> None:
        with self.path.open("rb") as stream:
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self._size = len(self._map)

    @abstractmethod
    def _find_ranges(self) -> np.ndarray: ...

    def __len__(self) -> int:
        return len(self._ranges)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_map"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()
        if self._size != state["_size"]:
            raise MedPLIBError(f"{self.path} changed while it was in use; start again")

    def _record(self, index: int) -> Record:
        start, end = (int(position) for position in self._ranges[index])
        try:
            text = self._map[start:end].decode("utf-8")
        except UnicodeDecodeError as error:
            place = self._place(start + error.start)
            raise MedPLIBError(
                f"{self.path}, record {index}, {place}: not UTF-8 text; save the file as UTF-8"
            ) from error
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            where, reason = _json_fault(error, text)
            position = start + len(text[:where].encode("utf-8"))
            raise MedPLIBError(f"{self.path}, record {index}, {self._place(position)}: {reason}") from error
        if not isinstance(record, dict):
            found = type(record).__name__
            raise MedPLIBError(
                f"{self.path}, record {index}, {self._place(start)}: got {found}, expected an object {{…}}"
            )
        return record

    def _place(self, position: int) -> str:
        """Line and column (both from 1) of a byte position; an editor's coordinates."""
        before = self._map[:position]
        line_start = before.rfind(b"\n") + 1
        column = len(before[line_start:].decode("utf-8", "replace").removeprefix("\ufeff")) + 1
        return f"line {before.count(10) + 1}, column {column}"

    def _start(self) -> int:
        return len(_BOM) if self._map[: len(_BOM)] == _BOM else 0


class _JsonListRecords(_JsonRecords):
    """One JSON list; record boundaries come from one pass of a scanner that builds no Python objects."""

    def _find_ranges(self) -> np.ndarray:
        position = self._skip_space(self._skip_space(self._start()) + 1)  # behind the opening bracket
        ranges: list[int] = []
        closed = self._map[position : position + 1] == b"]"
        while not closed:
            end = self._end_of_record(position, len(ranges) // 2)
            ranges += (position, end)
            position = self._skip_space(end)
            closed = self._map[position : position + 1] == b"]"
            if not closed:
                position = self._next_record(position, len(ranges) // 2)
        rest = self._skip_space(position + 1)
        if rest < self._size:
            raise MedPLIBError(f"{self.path}, {self._place(rest)}: text after the end of the list; remove it")
        return np.asarray(ranges, dtype=np.int64).reshape(-1, 2)

    def _skip_space(self, position: int) -> int:
        match = _SPACE.match(self._map, position)
        return match.end() if match else position

    def _end_of_record(self, position: int, index: int) -> int:
        match = _OBJECT.match(self._map, position)
        if match:
            return match.end()
        if self._map[position : position + 1] == b"{":
            raise MedPLIBError(
                f"{self.path}, {self._place(position)}: record {index} is not closed; a quotation mark or brace "
                "is missing in it, or the file is cut short"
            )
        found = self._map[position : position + 12]
        if not found:
            raise MedPLIBError(f"{self.path} ends in the middle of its list, where record {index} was expected")
        size = 1 << 12  # another JSON value, mostly a short one: it is refused where it is read, and the others count
        while True:
            text = self._map[position : position + size].decode("utf-8", "ignore")  # a character may be cut at the end
            with suppress(ValueError, RecursionError):
                end = json.JSONDecoder().raw_decode(text)[1]
                if end < len(text):  # else a number may go on
                    return position + len(text[:end].encode("utf-8"))
            if position + size >= self._size or size > _LONGEST_OTHER:
                raise MedPLIBError(
                    f"{self.path}, {self._place(position)}: record {index} is no JSON value; expected an object {{…}}"
                )
            size *= 16

    def _next_record(self, position: int, index: int) -> int:
        if self._map[position : position + 1] != b",":
            if position >= self._size:
                raise MedPLIBError(f"{self.path} ends after {index} records without ']'; the file is cut short")
            raise MedPLIBError(
                f"{self.path}, {self._place(position)}: expected a comma or ']' after record {index - 1}"
            )
        following = self._skip_space(position + 1)
        if self._map[following : following + 1] == b"]":
            raise MedPLIBError(
                f"{self.path}, {self._place(position)}: a comma follows the last record ({index - 1}); remove it"
            )
        return following


class _JsonLinesRecords(_JsonRecords):
    def _find_ranges(self) -> np.ndarray:
        start, ranges = self._start(), []
        while start < self._size:
            newline = self._map.find(b"\n", start)
            end = self._size if newline < 0 else newline
            if self._map[start:end].strip():
                ranges += [start, end]
            start = end + 1
        space = _SPACE.match(self._map, ranges[0])
        whole = _OBJECT.match(self._map, space.end() if space else ranges[0])
        if whole and whole.end() > ranges[1]:  # a pretty-printed one would be read as hundreds of broken lines
            raise MedPLIBError(
                f"{self.path} holds one object over several lines; expected a JSON list or one record a line"
            )
        return np.asarray(ranges, dtype=np.int64).reshape(-1, 2)


class _ParquetRecords(Records):
    """Rows of a Parquet file; the row groups used last are kept as Arrow tables."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._connect()
        metadata = self._file.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._ends = np.cumsum(np.asarray(sizes, dtype=np.int64))
        names = self._file.schema_arrow.names
        if not {"conversations", "messages", "icl_examples"} & set(names):
            message = f"{path} has no column 'conversations' or 'messages'"
            raise MedPLIBError(f"{message} (columns: {shown(', '.join(names))}); expected MedPLIB records")

    def _connect(self) -> None:
        import pyarrow.parquet as parquet

        self._process = os.getpid()
        self._lock = threading.Lock()
        self._tables: OrderedDict[int, Any] = OrderedDict()
        try:
            self._file = parquet.ParquetFile(self.path, memory_map=True)
        except (OSError, ValueError) as error:
            raise MedPLIBError(f"{self.path} is not a readable Parquet file: {_first_line(error)}") from error

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_ends": self._ends}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._connect()

    def _record(self, index: int) -> Record:
        if self._process != os.getpid():  # Arrow's threads do not survive a fork
            self._connect()
        group = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[group - 1]) if group else 0
        (row,) = self._table(group, index).slice(index - first, 1).to_pylist()
        record = {key: value for key, value in row.items() if value is not None}
        return {key: self._unpack(value, index) for key, value in record.items()}

    def _table(self, group: int, index: int) -> Any:
        with self._lock:
            if group not in self._tables:
                try:
                    self._tables[group] = self._file.read_row_group(group, use_threads=False)
                except (OSError, ValueError) as error:
                    raise MedPLIBError(f"{self.path}, record {index}: {_first_line(error)}") from error
                if len(self._tables) > _MAX_CACHED_ROW_GROUPS:
                    self._tables.popitem(last=False)
            self._tables.move_to_end(group)
            return self._tables[group]

    def _unpack(self, value: Any, index: int) -> Any:
        """Nested columns that a writer flattened into JSON text become objects again."""
        if isinstance(value, str) and value[:2] in ("[{", "[]"):
            try:
                return json.loads(value)
            except ValueError as error:
                raise MedPLIBError(f"{self.path}, record {index}: {_json_fault(error, value)[1]}") from error
        return value


def _json_fault(error: Exception, text: str) -> tuple[int, str]:
    """Where JSON ``text`` is wrong, and one clause that says how and what to do."""
    if not isinstance(error, json.JSONDecodeError):
        return 0, f"not valid JSON ({_first_line(error)})"
    comma = _DANGLING_COMMA.match(text, len(text[: error.pos].rstrip(", \t\r\n")))
    if comma:  # Python versions differ in whether they point at the comma or behind it
        return comma.start("comma"), "a comma stands before a closing bracket; remove it"
    return error.pos, f"not valid JSON ({error.msg}); mend the record"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
