"""Build training files from MeCoVQA as published: mend file names, leave out and list what cannot be trained on.

The published files point to images without ``.png``, to merged masks that no download contains, and to masks that do
not exist (reference §8). A cleaned file, cleaned again, stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from model.data.builders.jobs import Build, BuildReport, Execution, Output, Part, Piece, fingerprint, run_build
from model.data.builders.sa_med2d_masks import write_mask
from model.data.builders.vetting import Stretch, Vetting, drop, repeated, stretches, write_vetted
from model.data.image_io import is_file, read_mask
from model.data.records import Records, open_records
from model.errors import MedPLIBError

PUBLISHED = (
    *(f"train/MeCoVQA-{part}.json" for part in ("Complex", "Region", "Grounding")),
    *(f"test/MeCoVQA_{part}_test.json" for part in ("Complex_VQA", "Region_VQA", "Grounding")),
    *(f"zeroshot4grounding/{part}.json" for part in ("endoscopy", "fundus", "mr", "pet", "ultrasound", "xray")),
)
"""Files of the published set, below its folder."""


@dataclass(frozen=True)
class _Context:
    names: tuple[str, ...]
    records: tuple[Records, ...]
    repeated: tuple[Mapping[int, int], ...]
    images: Path
    check_pixels: bool
    merge: bool


def build_mecovqa(
    source: Path,
    images: Path,
    out: Path,
    execution: Execution,
    *,
    check_pixels: bool = True,
    merge: bool = False,
) -> BuildReport:
    """Write a cleaned file for each published one, under the same name.

    Args:
        source: the folder of MeCoVQA, or one of its files.
        images: ``SAMed2D_v1``, which the paths in the records start from.
        out: folder of the results.
        execution: processes, whether to start anew.
        check_pixels: decode every image and mask; else only see whether they exist.
        merge: also write merged masks that do not exist into ``masks_merged/`` below ``images``; without, the reader
            joins their instances whenever it meets one.

    Raises:
        MedPLIBError: a folder or file is not there or not what it should be.
    """
    files = published_files(source)
    if not images.is_dir():
        raise MedPLIBError(f"the image folder {images} does not exist; give SAMed2D_v1, which holds images/ and masks/")
    for name, file in files.items():
        if (out / name).resolve() == file.resolve():
            raise MedPLIBError(f"--out {out} holds the files to be cleaned; name another folder, so that they stay")
    opened = tuple(open_records(file) for file in files.values())

    def prepare() -> tuple[list[Piece], _Context]:
        again = tuple(repeated(records) for records in opened)
        context = _Context(tuple(files), opened, again, images, check_pixels, merge)
        return stretches([len(records) for records in opened]), context

    settings = {"images": str(images.resolve()), "check_pixels": check_pixels, "merge": merge}
    outputs = tuple(Output(name) for name in files)
    return run_build(
        Build(out, "mecovqa", settings, outputs, fingerprint([*files.values()])), prepare, _clean, execution
    )


def published_files(source: Path) -> dict[str, Path]:
    """Name below the result's folder → file of the source.

    Raises:
        MedPLIBError: there is none.
    """
    if source.is_file():
        return {f"{source.stem}.json" if source.suffix == ".parquet" else source.name: source}
    found = {name: source / name for name in PUBLISHED if (source / name).is_file()}
    if not found:  # one of the folders inside, or all files in one
        found = {Path(name).name: source / Path(name).name for name in PUBLISHED}
        found = {name: path for name, path in found.items() if path.is_file()}
    if not found:
        raise MedPLIBError(
            f"{source} holds no file of MeCoVQA; expected train/MeCoVQA-Complex.json, "
            "test/MeCoVQA_Grounding_test.json, zeroshot4grounding/mr.json and the like, or one file by its name"
        )
    return found


def _clean(piece: Stretch, context: _Context, part: Part) -> None:
    """The records of one stretch."""
    name, records = context.names[piece.file], context.records[piece.file]
    again = context.repeated[piece.file]
    vetting = Vetting(context.images, check_pixels=context.check_pixels)
    for number in range(piece.start, piece.stop):
        where = {"file": name, "record": number}
        try:
            record = records[number]
        except MedPLIBError as error:
            drop(part, "invalid_json", str(error), **where)
            continue
        sample = write_vetted(part, name, record, vetting, **where)
        if sample is not None and number in again:
            message = f"{name}, record {number}: says the same as record {again[number]}; both are kept"
            part.find("repeated_record", message, id=sample.id, **where, dropped=False)
        if sample is not None and context.merge:
            part.count("masks", "merged", _merge((*sample.masks, *sample.regions)))


def _merge(masks: Iterable[Path]) -> int:
    """Write those of the merged masks that are only instances so far; how many."""
    missing = {mask for mask in masks if not is_file(mask)}
    for mask in missing:
        write_mask(mask, read_mask(mask))
    return len(missing)
