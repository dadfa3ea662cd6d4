"""Whether a record trains, and what mends it: the last thing every builder asks before it writes one.

What is refused here is what ``medplib data check`` refuses, so that a built file passes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.data.builders.jobs import Part, Piece
from model.data.image_io import ReadLimits
from model.data.records import Records
from model.data.schema import Finding, Sample, canonical, inspect_record, record_id, with_seg_spelled
from model.data.validate import PixelCheck
from model.errors import MedPLIBError, shown

PIECE = 2_000
"""Records of one piece of a build: a second of work or more, and few enough that a killed build loses little."""

_PATHS = {
    "human": re.compile(r"(<region>)(.*?)(</region>)", re.DOTALL),
    "gpt": re.compile(r"(<mask>)(.*?)(</mask>)", re.DOTALL),
}
"""What holds paths in the texts of each side."""


class Vetting:
    """Looks at records one after another; files that several of them share are decoded once.

    Args:
        images_root: folder that the records' paths start from.
        check_pixels: decode every image and mask, as ``medplib data check`` does; else only see whether they exist.
    """

    def __init__(self, images_root: Path, *, check_pixels: bool = True) -> None:
        self.root = images_root
        self._pixels = PixelCheck(ReadLimits()) if check_pixels else None

    def __call__(self, record: Mapping[str, Any]) -> tuple[Sample | None, list[Finding]]:
        """What the record comes to, None if it cannot be trained on; and all that was found."""
        sample, findings = inspect_record(record, self.root)
        if sample is not None and self._pixels is not None:
            findings = findings + self._pixels(sample)
        bad = any(finding.severity == "error" for finding in findings)
        return (None if bad else sample), findings


def mended(record: Mapping[str, Any], sample: Sample, root: Path) -> dict[str, Any]:
    """The record in the published layout, with paths (below ``root``) and ``<SEG>`` as ``sample`` has them."""
    whole = dict(canonical(record))
    if not sample.repairs or sample.examples:
        return whole
    if "image" in whole:
        names = whole["image"] if isinstance(whole["image"], list) else [whole["image"]]
        fixed = [_as_found(name, path, root) for name, path in zip(names, sample.images, strict=True)]
        whole["image"] = fixed if isinstance(whole["image"], list) else fixed[0]
    found = {"human": iter(sample.regions), "gpt": iter(sample.masks)}

    def put_back(match: re.Match[str]) -> str:
        return f"{match[1]}{_as_found(match[2], next(found[side]), root)}{match[3]}"

    turns = []
    for turn in whole["conversations"]:
        side = turn["from"]
        text = with_seg_spelled(turn["value"]) if side == "gpt" else turn["value"]
        turns.append({**turn, "value": _PATHS[side].sub(put_back, text)})
    whole["conversations"] = turns
    return whole


def _as_found(name: Any, path: Path, root: Path) -> Any:
    """A path as it was written where that is the file; else that of the file below ``root``."""
    if isinstance(name, str) and root / name.strip() == path:
        return name
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def write_vetted(
    part: Part, output: str, record: Mapping[str, Any], vetting: Vetting, /, **where: Any
) -> Sample | None:
    """Write a record that trains, mended; list what was found, and every record that is left out.

    Args:
        part: of the build.
        output: file that the record goes to.
        record: in the project's layout.
        vetting: of this piece.
        where: ``record``, its number in the source, and the like, for the list of findings.

    Returns:
        What was written, None if nothing was.
    """
    sample, findings = vetting(record)
    name = shown(record_id(record), quoted=False)
    for finding in findings:
        part.find(finding.kind, described(finding.message, name, where), id=name, **where, dropped=sample is None)
    part.count("records", "dropped" if sample is None else "kept")
    if sample is not None:
        part.write(output, mended(record, sample, vetting.root))
        part.count(output, f"{sample.modality} {sample.task}" if sample.modality else sample.task)
        part.count("answer type", sample.answer_type or "unknown")
    return sample


def drop(part: Part, kind: str, message: str, /, **where: Any) -> None:
    """List a record that is left out for a reason of the builder's own."""
    part.find(kind, described(message, "", where), **where, dropped=True)
    part.count("records", "dropped")


def described(message: str, name: str, where: Mapping[str, Any]) -> str:
    """``FILE, record N (ID): message``."""
    place = ", ".join(
        text for text in (str(where.get("file", "")), f"record {where['record']}" if "record" in where else "") if text
    )
    named = f"{place} ({name})" if place and name else place or name
    return f"{named}: {message}" if named else message


def path_from(root: Path, path: Path) -> str:
    """``path`` as a record holds it: below ``root`` where it lies there, else with ``..`` in front.

    A ``..`` leads out of where a link points to, not out of where the link is: links are followed before one is made.
    """
    if path.is_relative_to(root):
        return path.relative_to(root).as_posix()
    return Path(os.path.relpath(path.parent.resolve() / path.name, root.resolve())).as_posix()


@dataclass(frozen=True)
class Stretch:
    """Records ``start`` … ``stop`` − 1 of source file number ``file``."""

    file: int
    start: int
    stop: int


def stretches(lengths: Sequence[int], size: int = PIECE) -> list[Piece]:
    """The pieces of a build over files of so many records."""
    return [
        Piece(Stretch(file, start, min(start + size, length)), min(size, length - start))
        for file, length in enumerate(lengths)
        for start in range(0, length, size)
    ]


def repeated(records: Records) -> dict[int, int]:
    """Records that say the same of the same image as an earlier one: number → number of the first such record.

    Records that cannot be parsed are no such records. Of each record a hash is kept in memory.
    """
    first: dict[bytes, int] = {}
    again: dict[int, int] = {}
    for number in range(len(records)):
        try:
            whole = canonical(records[number])
        except MedPLIBError:
            continue
        said = [whole.get("image"), whole.get("conversations")]
        key = hashlib.blake2b(json.dumps(said, sort_keys=True, default=str).encode(), digest_size=16).digest()
        if (earlier := first.setdefault(key, number)) != number:
            again[number] = earlier
    return again
