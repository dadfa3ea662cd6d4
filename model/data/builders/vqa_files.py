"""Question files of public sets, read a stretch of rows at a time: JSON, CSV, text with ``|``, Parquet and pickle.

Each form is a picklable object with a length; ``between`` gives the rows of a stretch, and a ``MedPLIBError`` in the
place of a row that cannot be read.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from model.data.builders.vqa_pickle import read_plain_pickle
from model.data.records import open_records
from model.errors import MedPLIBError

_CSV_STRIDE = 1_000  # rows between two places that are remembered
_PARQUET_BATCH = 64  # rows in memory, images among them


class Rows(Protocol):
    """The rows of one file."""

    def __len__(self) -> int: ...

    def between(self, start: int, stop: int) -> Iterator[Any]:
        """Rows ``start`` … ``stop`` − 1."""
        ...


class JsonRows:
    """A JSON list, JSON lines or Parquet file of the project's own reader."""

    def __init__(self, file: Path) -> None:
        self._records = open_records(file)

    def __len__(self) -> int:
        return len(self._records)

    def between(self, start: int, stop: int) -> Iterator[Any]:
        for number in range(start, min(stop, len(self))):
            try:
                yield self._records[number]
            except MedPLIBError as error:
                yield error


class ListedRows:
    """Rows in memory, for small files."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self._rows = list(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def between(self, start: int, stop: int) -> Iterator[Any]:
        yield from self._rows[start:stop]


def pickled_rows(file: Path) -> ListedRows:
    """A pickled list of mappings.

    Raises:
        MedPLIBError: it is anything else.
    """
    rows = read_plain_pickle(file)
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise MedPLIBError(f"{file} holds {type(rows).__name__}, expected a list of questions")
    return ListedRows(rows)


def barred_rows(file: Path) -> ListedRows:
    """Lines with ``|`` between their fields; blank ones are left out."""
    lines = (line for line in text_of(file).splitlines() if line.strip())
    return ListedRows([[field.strip() for field in line.split("|")] for line in lines])


def text_of(file: Path) -> str:
    """The text of a small file in UTF-8 or, as some of the sets were written, in Windows' western code page."""
    content = file.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="replace")


class CsvRows:
    """CSV with a line of names first; one pass finds where rows begin, quoted line ends among them."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._places: list[int] = []
        self._length = 0
        with file.open("rb") as stream:
            header, at = _csv_row(stream)
            self._names = [name.strip() for name in next(csv.reader([header.decode("utf-8-sig")]), [])]
            while True:
                start = at
                row, at = _csv_row(stream)
                if not row:
                    return
                if not row.strip():
                    continue
                if self._length % _CSV_STRIDE == 0:
                    self._places.append(start)
                self._length += 1

    def __len__(self) -> int:
        return self._length

    def between(self, start: int, stop: int) -> Iterator[Any]:
        if start >= stop:
            return
        number = start - start % _CSV_STRIDE
        with self._file.open("rb") as stream:
            stream.seek(self._places[start // _CSV_STRIDE])
            while number < stop:
                row, _ = _csv_row(stream)
                if not row:
                    return
                if row.strip():
                    if number >= start:
                        yield self._named(row)
                    number += 1

    def _named(self, row: bytes) -> Any:
        try:
            fields = next(csv.reader(io.StringIO(row.decode("utf-8"), newline="")))
        except (UnicodeDecodeError, csv.Error) as error:
            return MedPLIBError(f"cannot be read as UTF-8 CSV ({error})")
        if len(fields) != len(self._names):
            return MedPLIBError(f"has {len(fields)} fields where the first line names {len(self._names)}")
        return dict(zip(self._names, fields, strict=True))


def _csv_row(stream: io.BufferedReader) -> tuple[bytes, int]:
    """The next row with its line end, empty at the end of the file; and where the one after it begins."""
    lines, quoted = [], False
    while line := stream.readline():
        lines.append(line)
        quoted ^= line.count(b'"') % 2 == 1
        if not quoted:
            break
    return b"".join(lines), stream.tell()


class ParquetRows:
    """A Parquet file with the columns ``image`` (encoded bytes), ``question`` and ``answer``."""

    columns = ("image", "question", "answer")

    def __init__(self, file: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        self._file = file
        try:
            with pyarrow.parquet.ParquetFile(file) as table:
                missing = [name for name in self.columns if name not in table.schema_arrow.names]
                metadata = table.metadata
                self._groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        except (OSError, pyarrow.ArrowException) as error:
            raise MedPLIBError(
                f"{file} is no readable Parquet file ({str(error).splitlines()[0]}); get it anew"
            ) from error
        if missing:
            raise MedPLIBError(f"{file} lacks the column {missing[0]}; expected {', '.join(self.columns)}")

    def __len__(self) -> int:
        return sum(self._groups)

    def between(self, start: int, stop: int) -> Iterator[Any]:
        import pyarrow.parquet

        first = 0
        with pyarrow.parquet.ParquetFile(self._file) as table:
            for group, length in enumerate(self._groups):
                if first < stop and first + length > start:
                    number = first
                    batches = table.iter_batches(
                        batch_size=_PARQUET_BATCH, row_groups=[group], columns=list(self.columns), use_threads=False
                    )
                    for batch in batches:
                        if number < stop and number + batch.num_rows > start:
                            yield from batch.slice(max(0, start - number), stop - max(start, number)).to_pylist()
                        number += batch.num_rows
                first += length
