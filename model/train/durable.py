"""Files that outlast a crash: written through to the disk, and known again by size and checksum."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from model.errors import MedPLIBError

MANIFEST = "manifest.json"
"""File of a checkpoint that lists its other files with ``bytes`` and ``sha256``."""


_WRITING_FAILED = re.compile(r"PytorchStreamWriter|file write|inline_container|No space left|Disk quota", re.IGNORECASE)


@contextmanager
def disk_faults(what: str) -> Iterator[None]:
    """Errors of writing become one sentence; libraries word theirs in many ways.

    Args:
        what: is being written.

    Raises:
        MedPLIBError: the disk is full, or does not let itself be written.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not _WRITING_FAILED.search(str(error)):
            raise
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
        else:
            reason = "the disk is full or does not take the file"
        raise MedPLIBError(f"{what} could not be written: {reason}; mend that and go on with --resume") from None


def file_names(folder: Path) -> list[str]:
    """Names of all files below a folder, relative to it and sorted; the manifest is left out."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name != MANIFEST)


def facts_of(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and checksum of files, after they were written through to the disk."""
    facts = {}
    for name in names:
        with (folder / name).open("rb") as stream:
            os.fsync(stream.fileno())
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        facts[name] = {"bytes": (folder / name).stat().st_size, "sha256": digest}
    return facts


def write_through(path: Path, content: Any) -> None:
    """Write JSON so that the file is old or new, never half, also after a loss of power."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8", errors="backslashreplace") as stream:  # escapes that JSON has too
            stream.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make a folder with all files and folders below it last."""
    for path in [folder, *folder.rglob("*")]:
        sync_folder(path)


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Files by name; empty for a checkpoint of an older version, which has no manifest.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    path = folder / MANIFEST
    return json.loads(path.read_text(encoding="utf-8"))["files"] if path.is_file() else {}


def damage(folder: Path, facts: dict[str, dict[str, Any]]) -> str:
    """What is wrong with the first of these files that is not as the manifest says; empty where all are."""
    for name, expected in facts.items():
        try:
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            with (folder / name).open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != expected["sha256"]:
                    return f"{name} holds other bytes than were written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"
    return ""
