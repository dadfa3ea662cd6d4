"""Public question sets in their native forms → records with open and closed answers, in their own splits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from model.data.builders.vetting import Stretch, Vetting, drop, path_from, stretches, write_vetted
from model.data.builders.vqa_rows import write_picture
from model.data.builders.vqa_sources import BadRow, QuestionFile, question_files, record_of
from model.data.builders.work import Build, BuildReport, Execution, Output, Part, fingerprint, run_build
from model.errors import MedPLIBError

Language = Literal["en", "zh", "all"]

PICTURES = "images"
"""Folder of the results where images that were inside Parquet files go."""


@dataclass(frozen=True)
class _Context:
    name: str
    files: tuple[QuestionFile, ...]
    source: Path
    pictures: Path
    root: Path
    check_pixels: bool
    language: Language


def build_vqa(
    name: str,
    source: Path,
    out: Path,
    execution: Execution,
    *,
    images_root: Path | None = None,
    language: Language = "en",
    check_pixels: bool = True,
) -> BuildReport:
    """Write one file for each split of a public set.

    Args:
        name: of the set, one of ``SETS``.
        source: its unpacked folder.
        out: folder of the results.
        execution: processes, whether to start anew.
        images_root: folder that the paths in the records start from; see ``root_of``.
        language: of SLAKE's questions.
        check_pixels: decode every image; else only see whether it exists.

    Raises:
        MedPLIBError: the source does not look like the set, or a folder cannot be used.
    """
    files = question_files(name, source)
    if images_root is not None and not images_root.is_dir():
        raise MedPLIBError(f"--images-root {images_root} is no folder; give one that exists, or leave it out")
    root = images_root or root_of(files, source, out)
    splits = sorted(
        {one.split for one in files if one.split} | ({"train", "test"} if any(not f.split for f in files) else set())
    )
    settings = {
        "set": name,
        "images_root": str(root.resolve()),
        "language": language if name == "slake" else "",
        "check_pixels": check_pixels,
    }
    for split in splits:
        if any((out / f"{split}.json").resolve() == one.file.resolve() for one in files):
            raise MedPLIBError(f"--out {out} holds the files to be built from; name another folder, so that they stay")
    build = Build(
        out,
        "vqa",
        settings,
        tuple(Output(f"{split}.json") for split in splits),
        fingerprint([one.file for one in files]),
    )
    context = _Context(name, tuple(files), source, out / PICTURES, root, check_pixels, language)
    return run_build(build, stretches([len(one.rows) for one in files]), _convert, context, execution, unit="question")


def root_of(files: list[QuestionFile], source: Path, out: Path) -> Path:
    """Where paths start from when nobody says it: the source, or the results where images are extracted to."""
    return out if any(one.images is None for one in files) else source


def _convert(piece: Stretch, context: _Context, part: Part) -> None:
    """The rows of one stretch."""
    one = context.files[piece.file]
    vetting = Vetting(context.root, check_pixels=context.check_pixels)
    for number, row in enumerate(one.rows.between(piece.start, piece.stop), start=piece.start):
        where = {"file": one.file.name, "record": number}
        if context.name == "slake" and context.language != "all" and _other_language(row, context.language):
            part.count("records", "in another language")
            continue
        try:
            split, record = record_of(one, _with_image_file(one, row, context))
        except BadRow as error:
            drop(part, "bad_row", str(error), **where)
            continue
        record["id"] = record["id"] or f"{context.name}-{one.file.stem}-{number}"
        image = one.found.get(record["image"], (one.images or context.pictures) / record["image"])
        record["image"] = path_from(context.root, image)
        write_vetted(part, f"{split}.json", record, vetting, **where)


def _other_language(row: Any, language: Language) -> bool:
    return isinstance(row, dict) and str(row.get("q_lang", language)).strip().lower() != language


def _with_image_file(one: QuestionFile, row: Any, context: _Context) -> Any:
    """The row; with the name of a file where it held the image itself."""
    if one.images is not None or isinstance(row, MedPLIBError):
        return row
    image = row.get("image")
    content = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(content, bytes) or not content:
        raise BadRow("it holds no image")
    context.pictures.mkdir(parents=True, exist_ok=True)
    return {**row, "id": "", "image": write_picture(content, context.pictures)}
