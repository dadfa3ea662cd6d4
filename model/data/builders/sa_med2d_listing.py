"""Twenty million file names, gone through once and sorted into buckets on disk, so that nothing holds them all.

A folder can only be read from its beginning to its end, by one reader; names are therefore read by one process
(a minute or two for the real set) and everything after works on buckets, many at once. A bucket holds all images
of its cases with all their masks.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from zlib import crc32

from model.data.builders.sa_med2d_source import LIST_FILE, Source
from model.errors import MedPLIBError

BUCKETS = 512  # open files: below the usual limit of 1024; 40,000 names each of the real set
KINDS = ("images", "masks", "list")
_BUFFER = 16 * 1024
_TOLD_EVERY = 5000
_RELEASE = 64 << 20  # bytes of the list that stay in memory
_RAW_STRING = rb'"((?:[^"\\]++|\\.)*+)"'
_STRING = re.compile(_RAW_STRING)
_ENTRY = re.compile(rb"\s*" + _RAW_STRING + rb"\s*:\s*\[((?:[^\]\"]++|\"(?:[^\"\\]++|\\.)*+\")*+)\]\s*(,|\})")


def list_names(source: Source, folder: Path, progress: Callable[[int], object]) -> None:
    """Fill the buckets below ``folder``; kinds of names that are there already are not read again.

    Args:
        source: the data set.
        folder: made if absent.
        progress: called with the number of names read since the last call.

    Raises:
        MedPLIBError: ``SAMed2D_v1.json`` is damaged.
    """
    kinds = [*(("images", "masks") if source.has_folders else ()), *(("list",) if source.has_list else ())]
    for kind in kinds:
        target = folder / kind
        if target.is_dir():
            continue
        temporary = folder / f".{kind}.{os.getpid()}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)  # left by a process of this number that was killed
        temporary.mkdir(parents=True)
        try:
            lines = _listed(source.root / LIST_FILE) if kind == "list" else _entries(source.root / kind)
            _fill(temporary, lines, progress)
            temporary.rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def bucket_sizes(folder: Path) -> list[int]:
    """Bytes of names in each bucket."""
    return [
        sum(path.stat().st_size for kind in KINDS if (path := _file(folder / kind, number)).is_file())
        for number in range(BUCKETS)
    ]


def names_of(folder: Path, kind: str, bucket: int) -> list[bytes]:
    """Lines of one bucket; none where that kind of name was not listed.

    For ``list`` a line is an image and its masks, tabs between them.
    """
    path = _file(folder / kind, bucket)
    return path.read_bytes().splitlines() if path.is_file() else []


def _file(folder: Path, bucket: int) -> Path:
    return folder / f"{bucket:03d}.txt"


def _fill(folder: Path, lines: Iterator[bytes], progress: Callable[[int], object]) -> None:
    with ExitStack() as stack:
        files = [stack.enter_context(_file(folder, number).open("wb", _BUFFER)) for number in range(BUCKETS)]
        told = count = 0
        for count, line in enumerate(lines, start=1):
            parts = line.split(b"--", 3)
            # Data set and case, the same for an image and its masks; a name without them goes anywhere.
            key = b"--".join(parts[1:3]) if len(parts) == 4 else line
            files[crc32(key) % BUCKETS].write(line + b"\n")
            if count - told >= _TOLD_EVERY:
                progress(count - told)
                told = count
        progress(count - told)


def _entries(folder: Path) -> Iterator[bytes]:
    """File names of a folder as they come, without asking the file system about each."""
    with os.scandir(os.fsencode(folder)) as entries:
        for entry in entries:
            yield entry.name if b"\n" not in entry.name else entry.name.replace(b"\n", b"\\n")


def _listed(path: Path) -> Iterator[bytes]:
    """Entries of ``SAMed2D_v1.json``, an object of 1.6 GB, one after the other; folder names are left out."""
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        opening = re.compile(rb"(?:\xef\xbb\xbf)?\s*\{\s*(\})?").match(content)
        if opening is None:
            raise MedPLIBError(f"{path} begins with {content[:12]!r}; expected an object of images and their masks")
        position, ended, released = opening.end(), opening[1] is not None, 0
        while not ended:
            entry = _ENTRY.match(content, position)
            if entry is None:
                raise MedPLIBError(
                    f"{path} is damaged or cut short at byte {position:,}, where {content[position : position + 40]!r} "
                    "stands; expected an image and the list of its masks"
                )
            names = [entry[1], *_STRING.findall(entry[2])]
            yield b"\t".join(_base_name(name) for name in names)
            position, ended = entry.end(), entry[3] == b"}"
            if position - released > _RELEASE:
                released = position // mmap.PAGESIZE * mmap.PAGESIZE
                content.madvise(mmap.MADV_DONTNEED, 0, released)


def _base_name(text: bytes) -> bytes:
    plain = text if b"\\" not in text else json.loads(b'"' + text + b'"').encode()
    return plain.rpartition(b"/")[2]
