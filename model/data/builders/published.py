"""Records of published training sets, vetted: MeCoVQA, mended, and LLaVA-Med's alignment set for stage I.

The vetting is the last step of every builder before it writes a record; what it refuses is what ``medplib data check``
refuses. MeCoVQA's files point to images without ``.png``, to merged masks that no download contains, and to masks that
do not exist (reference §8); a cleaned file, cleaned again, stays as it is. LLaVA-Med's images were never published as
one download, and some are gone; the template of stage I reads image and answer alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.data.builders.jobs import (
    Build,
    BuildReport,
    Execution,
    Output,
    Part,
    Piece,
    fingerprint,
    run_build,
    write_png,
)
from model.data.builders.vqa_rows import modality_name
from model.data.image_io import ReadLimits, is_file, read_mask
from model.data.records import Records, open_records
from model.data.schema import Finding, Sample, canonical, inspect_record, record_id, with_seg_spelled
from model.data.validate import PixelCheck
from model.errors import MedPLIBError, shown
from model.processing.special_tokens import IMAGE_TOKEN

PIECE = 2_000
"""Records of one piece of a build: a second of work or more, and few enough that a killed build loses little."""
PUBLISHED = (
    *(f"train/MeCoVQA-{part}.json" for part in ("Complex", "Region", "Grounding")),
    *(f"test/MeCoVQA_{part}_test.json" for part in ("Complex_VQA", "Region_VQA", "Grounding")),
    *(f"zeroshot4grounding/{part}.json" for part in ("endoscopy", "fundus", "mr", "pet", "ultrasound", "xray")),
)
"""Files of MeCoVQA, below its folder."""
_PATHS = {
    "human": re.compile(r"(<region>)(.*?)(</region>)", re.DOTALL),
    "gpt": re.compile(r"(<mask>)(.*?)(</mask>)", re.DOTALL),
}


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
        return (None if any(finding.severity == "error" for finding in findings) else sample), findings

    def mended(self, record: Mapping[str, Any], sample: Sample) -> dict[str, Any]:
        """The record in the published layout, with paths (below the root) and ``<SEG>`` as ``sample`` has them."""
        whole = dict(canonical(record))
        if not sample.repairs or sample.examples:
            return whole

        def as_found(name: Any, path: Path) -> Any:  # as it was written where that is the file
            if isinstance(name, str) and self.root / name.strip() == path:
                return name
            return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)

        if "image" in whole:
            names = whole["image"] if isinstance(whole["image"], list) else [whole["image"]]
            fixed = [as_found(name, path) for name, path in zip(names, sample.images, strict=True)]
            whole["image"] = fixed if isinstance(whole["image"], list) else fixed[0]
        found = {"human": iter(sample.regions), "gpt": iter(sample.masks)}
        turns = []
        for turn in whole["conversations"]:
            side, text = turn["from"], turn["value"]
            paths = found[side]
            text = _PATHS[side].sub(
                lambda match, paths=paths: f"{match[1]}{as_found(match[2], next(paths))}{match[3]}",  # type: ignore[misc]
                with_seg_spelled(text) if side == "gpt" else text,
            )
            turns.append({**turn, "value": text})
        return {**whole, "conversations": turns}


def write_vetted(
    part: Part, output: str, record: Mapping[str, Any], vetting: Vetting, /, **where: Any
) -> Sample | None:
    """Write a record that trains, mended; list what was found, and every record that is left out.

    Returns:
        What was written, None if nothing was.
    """
    sample, findings = vetting(record)
    name = shown(record_id(record), quoted=False)
    for finding in findings:
        part.find(finding.kind, _described(finding.message, name, where), id=name, **where, dropped=sample is None)
    part.count("records", "dropped" if sample is None else "kept")
    if sample is not None:
        part.write(output, vetting.mended(record, sample))
        part.count(output, f"{sample.modality} {sample.task}" if sample.modality else sample.task)
        part.count("answer type", sample.answer_type or "unknown")
    return sample


def drop(part: Part, kind: str, message: str, /, **where: Any) -> None:
    """List a record that is left out for a reason of the builder's own."""
    part.find(kind, _described(message, "", where), **where, dropped=True)
    part.count("records", "dropped")


def _described(message: str, name: str, where: Mapping[str, Any]) -> str:
    """``FILE, record N (ID): message``."""
    places = str(where.get("file", "")), f"record {where['record']}" if "record" in where else ""
    place = ", ".join(text for text in places if text)
    named = f"{place} ({name})" if place and name else place or name
    return f"{named}: {message}" if named else message


def path_from(root: Path, path: Path) -> str:
    """``path`` as a record holds it: below ``root`` where it lies there, else with ``..`` in front.

    A ``..`` leads out of where a link points to, not out of where the link is: links are followed before one is made.
    """
    if path.is_relative_to(root):
        return path.relative_to(root).as_posix()
    return Path(os.path.relpath(path.parent.resolve() / path.name, root.resolve())).as_posix()


# ---- MeCoVQA and LLaVA-Med -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Context:
    names: tuple[str, ...]
    records: tuple[Records, ...]
    images: Path
    check_pixels: bool
    repeated: tuple[Mapping[int, int], ...] = ()
    merge: bool = False
    convert: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict


def build_mecovqa(
    source: Path, images: Path, out: Path, execution: Execution, *, check_pixels: bool = True, merge: bool = False
) -> BuildReport:
    """Write a cleaned file for each published one, under the same name. Raises MedPLIBError: a folder or file is not
    there or not what it should be.

    Args:
        source: the folder of MeCoVQA, or one of its files.
        images: ``SAMed2D_v1``, which the paths in the records start from.
        out: folder of the results.
        execution: processes, whether to start anew.
        check_pixels: decode every image and mask; else only see whether they exist.
        merge: also write merged masks that do not exist into ``masks_merged/`` below ``images``; without, the reader
            joins their instances whenever it meets one.
    """
    if source.is_file():
        files = {f"{source.stem}.json" if source.suffix == ".parquet" else source.name: source}
    else:  # the folder, one of the folders inside, or all files in one
        whole = {name: source / name for name in PUBLISHED}
        flat = {Path(name).name: source / Path(name).name for name in PUBLISHED}
        listed = ({name: file for name, file in form.items() if file.is_file()} for form in (whole, flat))
        files = next((found for found in listed if found), {})
    if not files:
        raise MedPLIBError(
            f"{source} holds no file of MeCoVQA; expected train/MeCoVQA-Complex.json, "
            "test/MeCoVQA_Grounding_test.json, zeroshot4grounding/mr.json and the like, or one file by its name"
        )
    if not images.is_dir():
        raise MedPLIBError(f"the image folder {images} does not exist; give SAMed2D_v1, which holds images/ and masks/")
    for name, file in files.items():
        if (out / name).resolve() == file.resolve():
            raise MedPLIBError(f"--out {out} holds the files to be cleaned; name another folder, so that they stay")
    records = tuple(open_records(file) for file in files.values())

    def prepare() -> tuple[list[Piece], _Context]:
        again = tuple(_repeated(one) for one in records)
        context = _Context(tuple(files), records, images, check_pixels, again, merge)
        return stretches([len(one) for one in records]), context

    settings = {"images": str(images.resolve()), "check_pixels": check_pixels, "merge": merge}
    outputs = tuple(Output(name) for name in files)
    build = Build(out, "mecovqa", settings, outputs, fingerprint([*files.values()]))
    return run_build(build, prepare, _convert, execution)


def _repeated(records: Records) -> dict[int, int]:
    """Records that say the same of the same image as an earlier one: number → number of the first such record."""
    first: dict[bytes, int] = {}  # of each record a hash is kept in memory
    again: dict[int, int] = {}
    for number in range(len(records)):
        try:
            whole = canonical(records[number])
        except MedPLIBError:
            continue
        content = json.dumps([whole.get("image"), whole.get("conversations")], sort_keys=True, default=str)
        key = hashlib.blake2b(content.encode(), digest_size=16).digest()
        if (earlier := first.setdefault(key, number)) != number:
            again[number] = earlier
    return again


def build_llava_med(
    source: Path, images: Path, out: Path, execution: Execution, *, check_pixels: bool = True
) -> BuildReport:
    """Write the captions whose images are there to a file of the same name. Raises MedPLIBError: a file or folder is
    not there or not what it should be.

    Args:
        source: ``llava_med_alignment_500k.json``, or another file in its layout.
        images: folder of the downloaded images; the records' paths start from it.
        out: folder of the results.
        execution: processes, whether to start anew.
        check_pixels: decode every image, since downloads break off; else only see whether it exists.
    """
    if source.is_dir():
        raise MedPLIBError(f"{source} is a folder; give the file llava_med_alignment_500k.json")
    records = open_records(source)
    if not images.is_dir():
        raise MedPLIBError(
            f"the image folder {images} does not exist; give the folder that the images were downloaded to"
        )
    first: list[Mapping[str, Any]] = []
    for number in range(min(5, len(records))):
        try:
            first.append(records[number])
        except MedPLIBError:
            continue
    if not any("image" in record and ("conversations" in record or "conversatons" in record) for record in first):
        raise MedPLIBError(
            f"{source} does not look like LLaVA-Med's alignment set; expected records with image and conversations "
            "(or conversatons, as it is published)"
        )
    name = f"{source.stem}.json"
    if (out / name).resolve() == source.resolve():
        raise MedPLIBError(f"--out {out} holds the file to be built from; name another folder, so that it stays")
    settings = {"images": str(images.resolve()), "check_pixels": check_pixels}
    build = Build(out, "llava_med", settings, (Output(name),), fingerprint([source]))
    context = _Context((name,), (records,), images, check_pixels, convert=caption)
    return run_build(build, lambda: (stretches([len(records)]), context), _convert, execution)


def caption(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of LLaVA-Med in the project's layout, ``<image>`` first; its problems are left to the vetting."""
    turns = record.get("conversations", record.get("conversatons"))
    made = {key: value for key, value in record.items() if key not in ("conversatons", "conversations", "domain")}
    made["conversations"] = turns
    if isinstance(turns, list):
        made["conversations"] = []
        for turn in turns:
            text = turn.get("value") if isinstance(turn, Mapping) else None
            if isinstance(text, str) and text.count(IMAGE_TOKEN) == 1:
                turn = {**turn, "value": f"{IMAGE_TOKEN}\n{text.replace(IMAGE_TOKEN, '').strip()}".strip()}
            made["conversations"].append(turn)
    made["task"] = "caption"
    domain = record.get("domain")
    named = [name for name, holds in domain.items() if holds is True] if isinstance(domain, Mapping) else []
    if len(named) == 1:
        made["modality"] = modality_name(named[0])
    return made


def _convert(piece: Stretch, context: _Context, part: Part) -> None:
    name, records = context.names[piece.file], context.records[piece.file]
    again = context.repeated[piece.file] if context.repeated else {}
    vetting = Vetting(context.images, check_pixels=context.check_pixels)
    for number in range(piece.start, piece.stop):
        where = {"file": name, "record": number}
        try:
            record = context.convert(records[number])
        except MedPLIBError as error:
            drop(part, "invalid_json", str(error), **where)
            continue
        sample = write_vetted(part, name, record, vetting, **where)
        if sample is not None and number in again:
            message = f"{name}, record {number}: says the same as record {again[number]}; both are kept"
            part.find("repeated_record", message, id=sample.id, **where, dropped=False)
        if sample is not None and context.merge:
            missing = {mask for mask in (*sample.masks, *sample.regions) if not is_file(mask)}
            for mask in missing:
                write_png(mask, read_mask(mask).astype(np.uint8) * 255)
            part.count("masks", "merged", len(missing))
