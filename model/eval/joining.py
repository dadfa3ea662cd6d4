"""Parts of an answers file become one, in the order of the data file; nothing is parsed or held on the way."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from model.data.records import Records
from model.errors import MedPLIBError
from model.eval.predictions import Key
from model.eval.references import Turns, references_of


def rows_of(records: Records, number: int, turns: Turns) -> list[Key]:
    """Keys of the rows of one record, in their order; one row stands for a record that cannot be parsed."""
    try:
        return [reference.key for reference in references_of(records[number], number, turns)]
    except MedPLIBError:
        return [(str(number), 0)]


def join_parts(answers: Path, parts: Sequence[Path], records: Records, numbers: range, turns: Turns) -> None:
    """Join the parts of processes that took every ``len(parts)``-th record each.

    Args:
        answers: written whole or not at all.
        parts: by rank.
        records: the data file.
        numbers: records that were asked.
        turns: which of their questions.

    Raises:
        MedPLIBError: a part holds more or fewer rows than its questions.
    """

    def lines() -> Iterator[bytes]:
        with ExitStack() as stack:
            streams = [stack.enter_context(part.open("rb")) for part in parts]
            for at, number in enumerate(numbers):
                stream = streams[at % len(parts)]
                for _ in rows_of(records, number, turns):
                    line = stream.readline()
                    if not line.endswith(b"\n"):
                        raise MedPLIBError(f"{stream.name} ends before its questions do; run the same command again")
                    yield line
            for stream in streams:
                if stream.read(1):
                    raise MedPLIBError(f"{stream.name} holds more answers than questions; start anew with --overwrite")

    write_lines(answers, lines())


def write_lines(target: Path, lines: Iterable[bytes]) -> int:
    """Write a file that is there whole or not at all; returns the number of lines."""
    written = 0
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as stream:
            for line in lines:
                stream.write(line)
                written += 1
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
    return written
