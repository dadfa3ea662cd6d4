"""A user's own images, masks and names → questions for masks and about regions, split by case."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from model.data.builders import folder_questions as questions
from model.data.builders.folder_names import read_names
from model.data.builders.folder_pairs import Entry, Pairing, pair
from model.data.builders.sa_med2d_masks import write_mask
from model.data.builders.splits import SplitPlan, draw
from model.data.builders.vetting import path_from
from model.data.builders.work import Build, BuildReport, Execution, Output, Part, Piece, fingerprint, run_build
from model.data.image_io import read_image, read_labels, read_mask_data
from model.errors import MedPLIBError

DEFAULT_SPLITS = {"train": 0.8, "validation": 0.1, "test": 0.1}
MASKS = "masks"
"""Folder of the results where masks go."""
_IMAGES_OF_A_PIECE = 50
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class FolderSettings:
    """What questions are made, and for whom.

    Attributes:
        modality: of all images, in the records; empty to leave it to file names.
        case_pattern: regular expression found in an image's path below its folder, without suffix; what it matches, or
            its first group, is the case. Empty: the path up to the last of several numbers in a name
            (``patient12_slice003``), else the nearest folder with a number (``patient12/axial_3``), else each image is
            a case of its own.
        splits: split → share of the cases.
        seed: of splits and wordings.
        absent: also ask for structures that a label map or an empty mask says are not there.
    """

    modality: str = ""
    case_pattern: str = ""
    splits: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_SPLITS))
    seed: int = 0
    absent: bool = False


@dataclass(frozen=True)
class _Context:
    entries: tuple[Entry, ...]
    left: tuple[tuple[str, str, str], ...]
    names: tuple[str, ...]
    values: Mapping[int, str]
    split_of: Mapping[str, str]
    out: Path
    settings: FolderSettings


def build_folder(
    images: Path, masks: Path, names: Path, out: Path, execution: Execution, settings: FolderSettings
) -> BuildReport:
    """Write ``SPLIT/grounding.json`` and ``SPLIT/region.json`` for each split, and the masks as PNG to ``masks/``.

    Paths in the records start from ``out``. Images stay where they are.

    Args:
        images: folder of images, and folders in it.
        masks: folder of masks; see ``folder_pairs`` for their names.
        names: CSV; see ``folder_names``.
        out: folder of the results.
        execution: processes, whether to start anew.
        settings: the rest.

    Raises:
        MedPLIBError: a folder, the CSV or the pattern cannot be used, or no mask belongs to any image.
    """
    table = read_names(names)
    pairing = pair(images, masks, table, out)
    split_of = splits_of_cases(pairing, settings)
    build = Build(
        out,
        "folder",
        {
            "images": str(images.resolve()),
            "masks": str(masks.resolve()),
            "modality": settings.modality,
            "case_pattern": settings.case_pattern,
            "splits": dict(settings.splits),
            "seed": settings.seed,
            "absent": settings.absent,
        },
        tuple(Output(f"{split}/{task}.json") for split in settings.splits for task in ("grounding", "region")),
        {**fingerprint([names]), **pairing.source},
    )
    context = _Context(
        tuple(pairing.entries),
        tuple(pairing.left),
        tuple(sorted(set(table.names.values()))),
        {int(key): name for key, name in table.names.items()} if table.kind == "value" else {},
        split_of,
        out,
        settings,
    )
    count = len(pairing.entries)
    pieces = [
        Piece(range(start, min(start + _IMAGES_OF_A_PIECE, count)), min(_IMAGES_OF_A_PIECE, count - start))
        for start in range(0, count, _IMAGES_OF_A_PIECE)
    ]
    return run_build(build, [*pieces, Piece(None, 0)], _convert, context, execution, unit="image")


def splits_of_cases(pairing: Pairing, settings: FolderSettings) -> dict[str, str]:
    """Key of each image → split. A case is drawn by its own name; a split that stays empty takes from the largest.

    Raises:
        MedPLIBError: the pattern is no regular expression, or is not found in an image's path.
    """
    try:
        pattern = re.compile(settings.case_pattern) if settings.case_pattern else None
    except re.error as error:
        raise MedPLIBError(f"--case-pattern {settings.case_pattern!r} is no regular expression ({error})") from error
    case_of = {entry.key: case_of_key(entry.key, pattern) for entry in pairing.entries}
    plan = SplitPlan(settings.splits, settings.seed)
    of_case = {case: plan.of("", case) for case in sorted(set(case_of.values()))}
    for split in settings.splits:
        members = {name: [case for case, own in of_case.items() if own == name] for name in settings.splits}
        largest = max(members, key=lambda name: len(members[name]))
        if not members[split] and len(members[largest]) > 1:
            of_case[min(members[largest], key=lambda case: draw(settings.seed, "moved", case))] = split
    return {key: of_case[case] for key, case in case_of.items()}


def case_of_key(key: str, pattern: re.Pattern[str] | None) -> str:
    """The case that an image belongs to, from its path below the folder of images.

    Raises:
        MedPLIBError: the pattern is not found in it.
    """
    if pattern is not None:
        match = pattern.search(key)
        if match is None:
            raise MedPLIBError(
                f"--case-pattern {pattern.pattern!r} is not found in {key!r}; it must say the case of each"
            )
        return (match[1] if pattern.groups else match[0]) or key
    folder, _, name = key.rpartition("/")
    *before, last = [match.start() for match in _NUMBER.finditer(name)] or [0]
    if before:
        return key[: len(key) - len(name) + last]
    while folder and not _NUMBER.search(folder.rpartition("/")[2]):
        folder = folder.rpartition("/")[0]
    return folder or key


def _convert(piece: range | None, context: _Context, part: Part) -> None:
    """The images of one stretch; or, last of all, what was left over when pairing."""
    if piece is None:
        for kind, message, file in context.left:
            part.find(kind, f"{file}: {message}" if file else message, file=file, dropped=True)
        return
    for number in piece:
        _convert_image(context.entries[number], context, part)


def _convert_image(entry: Entry, context: _Context, part: Part) -> None:
    settings, split = context.settings, context.split_of[entry.key]
    try:
        size = read_image(entry.image).size
    except MedPLIBError as error:
        part.find("unreadable_image", str(error), file=str(entry.image), dropped=True)
        return
    shown, missing = _masks_of(entry, size, context.values, part)
    common: dict[str, Any] = {"image": path_from(context.out, entry.image)}
    if settings.modality:
        common["modality"] = settings.modality
    made: list[dict[str, Any]] = []
    (context.out / MASKS).mkdir(parents=True, exist_ok=True)
    for name, mask in sorted(shown.items()):
        path = f"{MASKS}/{_slug(entry.key)}--{context.names.index(name) + 1:04d}-{_slug(name)}.png"
        write_mask(context.out / path, mask)
        apart = [other for other in context.names if other not in shown or not (shown[other] & mask).any()]
        made += _asked(entry.key, name, path, questions.unrelated(apart, [name]), settings)
        part.count("structure", name)
    if settings.absent and (names := questions.unrelated(sorted(missing), list(shown))):
        made.append(questions.absent(settings.seed, entry.key, names))
    for number, question in enumerate(made):
        record = {"id": f"{entry.key}-{number}", **common, **question}
        part.write(f"{split}/{question['task']}.json", record)
        part.count("question", question["kind"])
    part.count("images", split if made else "without a usable mask")


def _asked(key: str, name: str, path: str, others: list[str], settings: FolderSettings) -> list[dict[str, Any]]:
    seed = settings.seed
    made = [questions.grounding(seed, key, name, path), questions.region_name(seed, key, name, path)]
    return [*made, questions.region_check(seed, key, name, path, others)] if others else made


def _masks_of(
    entry: Entry, size: tuple[int, int], values: Mapping[int, str], part: Part
) -> tuple[dict[str, np.ndarray], set[str]]:
    """Masks by name, and the names of what is said not to be there; whatever cannot be used is listed."""
    shown: dict[str, np.ndarray] = {}
    missing: set[str] = set()
    for name, files in entry.targets:
        usable = [
            mask for file in files if (mask := _read(file, lambda file: _mask(file, part), size, part)) is not None
        ]
        joined = np.logical_or.reduce(usable) if usable else None
        if joined is None:
            continue
        if joined.any():
            shown[name] = joined
        else:
            missing.add(name)
            part.find("empty_mask", f"{files[0]}: no foreground pixel", file=str(files[0]), dropped=True)
    for file in entry.maps:
        labels = _read(file, lambda file: _labels(file, values, part), size, part)
        if labels is None:
            continue
        missing.update(values.values())
        nameless = []
        for value in sorted({int(value) for value in np.unique(labels)} - {0}):
            if value in values:
                shown[values[value]] = (labels == value) | shown.get(values[value], False)
            else:
                nameless.append(str(value))
        if nameless:
            listed = ", ".join(nameless[:8]) + (f" and {len(nameless) - 8} more" if len(nameless) > 8 else "")
            message = f"{file}: nothing in the table of names is {listed}"
            part.find("value_without_name", message, file=str(file), dropped=True)
    return shown, missing - set(shown)


def _mask(file: Path, part: Part) -> np.ndarray:
    """A mask, and a word on it where it was thresholded."""
    data = read_mask_data(file)
    if data.note:
        part.find("soft_mask", f"{file} {data.note}", file=str(file), dropped=False)
    return data.pixels


def _labels(file: Path, values: Mapping[int, str], part: Part) -> np.ndarray:
    """A label map; where white has the only name, a white mask with soft edges is no label map and read as a mask."""
    if set(values) - {0} == {255} and read_mask_data(file).note:
        return _mask(file, part).astype(np.int64) * 255
    return read_labels(file)


def _read(file: Path, read: Callable[[Path], np.ndarray], size: tuple[int, int], part: Part) -> np.ndarray | None:
    """A mask or label map of the image's size, None where it cannot be used."""
    try:
        values = read(file)
    except MedPLIBError as error:
        part.find("unreadable_mask", str(error), file=str(file), dropped=True)
        return None
    if values.shape != size:
        ours, theirs = (f"{height} × {width}" for height, width in (values.shape, size))
        part.find("size_mismatch", f"{file} is {ours} (h × w), its image {theirs}", file=str(file), dropped=True)
        return None
    return values


def _slug(text: str) -> str:
    """A file name of any text; another for another text."""
    plain = re.sub(r"[^\w.-]+", "-", text.replace("/", "__")).strip("-")
    return plain if plain == text else f"{plain or 'x'}-{draw(0, text) % 16**6:06x}"
