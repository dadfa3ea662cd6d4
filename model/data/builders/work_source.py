"""Fingerprint of a build's source and settings, so that a changed build is not resumed.

Record files, tables and lists count by name and content, not by place and time: a copy of them is the same source, and
an edit that keeps the size is noticed. Folders of images are too large to be read for that. They count by their path,
and where a builder says so by times of change; whether a copy of them is the same, only its user knows
(``--same-source``).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model.errors import MedPLIBError


def fingerprint(files: Sequence[Path]) -> dict[str, str]:
    """Sizes and contents of source files by their path below the folder they share; of a folder, its time of change.

    Reading takes about a second a gigabyte where the disk is no slower, a small part of what their build takes.

    Raises:
        MedPLIBError: one of them cannot be read.
    """
    places = [file.absolute() for file in files]
    shared = os.path.commonpath([place.parent for place in places]) if places else ""
    prints = {}
    for file, place in zip(files, places, strict=True):
        try:
            prints[place.relative_to(shared).as_posix()] = _print(file)
        except OSError as error:
            raise MedPLIBError(
                f"cannot read {file}: {error.strerror}; name the file or folder of the download"
            ) from None
    return prints


def _print(file: Path) -> str:
    if file.is_dir():
        return f"folder, changed {file.stat().st_mtime_ns}"
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return f"{os.fstat(stream.fileno()).st_size} bytes, sha256 {digest[:16]}"


def difference(stored: Mapping[str, Any], wanted: Mapping[str, Any], *, same_source: bool = False) -> str:
    """The first thing in which a build begun and one asked for differ, and what to do; nothing where they agree.

    Args:
        stored: ``settings``, ``source`` and ``pieces`` of the one begun.
        wanted: the same of the one asked for.
        same_source: the user says that the source is what it was, so only other settings count.
    """
    settings = _unlike(stored.get("settings", {}), wanted["settings"])
    places = [key for key in settings if _is_path(wanted["settings"].get(key))]
    for key in settings:
        if key not in places:
            told = _told(key, stored["settings"].get(key), wanted["settings"].get(key))
            return f"{told}; repeat its settings, name another --out, or start anew with --overwrite"
    source = _unlike(stored.get("source", {}), wanted["source"])
    if (places or source) and not same_source:
        mend = "start anew with --overwrite, or, if the data only moved or were copied, go on with --same-source"
        group, key = ("settings", places[0]) if places else ("source", source[0])
        told = _told(key, stored.get(group, {}).get(key), wanted[group].get(key))
        return f"the source {told}; {mend}"
    if stored.get("pieces") != wanted["pieces"]:
        told = f"{stored.get('pieces')} pieces where this run has {wanted['pieces']}"
        return f"{told}; name another --out, or start anew with --overwrite"
    return ""


def _unlike(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    return [key for key in sorted({*stored, *wanted}) if stored.get(key) != wanted.get(key)]


def _is_path(value: Any) -> bool:
    """Whether a setting is the place of a folder, as builders give it."""
    return isinstance(value, str) and Path(value).is_absolute()


def _told(key: str, old: Any, new: Any) -> str:
    return f"{key} = {old!r:.80} where this run has {new!r:.80}"
