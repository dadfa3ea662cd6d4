"""LLaVA-Med's alignment set → the captions of stage I whose images are there.

Its images were never published as one download: they are fetched article by article, and some are gone. The template of
stage I reads image and answer alone; the instruction stays in the record for other templates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.data.builders.jobs import Build, BuildReport, Execution, Output, Part, fingerprint, run_build
from model.data.builders.vetting import Stretch, Vetting, drop, stretches, write_vetted
from model.data.builders.vqa_rows import modality_name
from model.data.records import Records, open_records
from model.errors import MedPLIBError
from model.processing.special_tokens import IMAGE_TOKEN


@dataclass(frozen=True)
class _Context:
    records: Records
    name: str
    images: Path
    check_pixels: bool


def build_llava_med(
    source: Path, images: Path, out: Path, execution: Execution, *, check_pixels: bool = True
) -> BuildReport:
    """Write the captions whose images are there to a file of the same name.

    Args:
        source: ``llava_med_alignment_500k.json``, or another file in its layout.
        images: folder of the downloaded images; the records' paths start from it.
        out: folder of the results.
        execution: processes, whether to start anew.
        check_pixels: decode every image, since downloads break off; else only see whether it exists.

    Raises:
        MedPLIBError: a file or folder is not there or not what it should be.
    """
    if source.is_dir():
        raise MedPLIBError(f"{source} is a folder; give the file llava_med_alignment_500k.json")
    records = open_records(source)
    if not images.is_dir():
        raise MedPLIBError(
            f"the image folder {images} does not exist; give the folder that the images were downloaded to"
        )
    if not _looks_right(records):
        raise MedPLIBError(
            f"{source} does not look like LLaVA-Med's alignment set; expected records with image and conversations "
            "(or conversatons, as it is published)"
        )
    name = f"{source.stem}.json"
    if (out / name).resolve() == source.resolve():
        raise MedPLIBError(f"--out {out} holds the file to be built from; name another folder, so that it stays")
    settings = {"images": str(images.resolve()), "check_pixels": check_pixels}
    build = Build(out, "llava_med", settings, (Output(name),), fingerprint([source]))
    context = _Context(records, name, images, check_pixels)
    return run_build(build, lambda: (stretches([len(records)]), context), _convert, execution)


def _looks_right(records: Records) -> bool:
    for number in range(min(5, len(records))):
        try:
            record = records[number]
        except MedPLIBError:
            continue
        if "image" in record and ("conversations" in record or "conversatons" in record):
            return True
    return False


def _convert(piece: Stretch, context: _Context, part: Part) -> None:
    vetting = Vetting(context.images, check_pixels=context.check_pixels)
    for number in range(piece.start, piece.stop):
        where = {"file": context.name, "record": number}
        try:
            record = caption(context.records[number])
        except MedPLIBError as error:
            drop(part, "invalid_json", str(error), **where)
            continue
        write_vetted(part, context.name, record, vetting, **where)


def caption(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of the published file in the project's layout; its problems are left to the vetting."""
    turns = record.get("conversations", record.get("conversatons"))
    made = {key: value for key, value in record.items() if key not in ("conversatons", "conversations", "domain")}
    made["conversations"] = [_image_first(turn) for turn in turns] if isinstance(turns, list) else turns
    made["task"] = "caption"
    domain = record.get("domain")
    named = [name for name, holds in domain.items() if holds is True] if isinstance(domain, Mapping) else []
    if len(named) == 1:
        made["modality"] = modality_name(named[0])
    return made


def _image_first(turn: Any) -> Any:
    """``…\\n<image>`` → ``<image>\\n…``, as everywhere else."""
    if not isinstance(turn, Mapping) or not isinstance(text := turn.get("value"), str) or text.count(IMAGE_TOKEN) != 1:
        return turn
    return {**turn, "value": f"{IMAGE_TOKEN}\n{text.replace(IMAGE_TOKEN, '').strip()}".strip()}
