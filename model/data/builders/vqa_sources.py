"""Which files each public question set consists of, and how a row of each becomes a record."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from model.data.builders import vqa_rows
from model.data.builders.vqa_files import (
    CsvRows,
    JsonRows,
    ListedRows,
    ParquetRows,
    Rows,
    barred_rows,
    pickled_rows,
)
from model.data.image_io import is_file
from model.errors import MedPLIBError

SetName = Literal["vqa-rad", "slake", "pathvqa", "imageclef", "pmc-vqa", "omnimedvqa"]
SETS: tuple[str, ...] = get_args(SetName)

EXPECTED = {
    "vqa-rad": '"VQA_RAD Dataset Public.json" and "VQA_RAD Image Folder" of osf.io/89kps, or data/*.parquet of '
    "flaviagiammarino/vqa-rad",
    "slake": "train.json, validate.json or test.json, and imgs/ (unpacked from imgs.zip)",
    "pathvqa": "qas/train_vqa.pkl and images/train/ with the like for val and test, or data/*.parquet of "
    "flaviagiammarino/path-vqa",
    "imageclef": "the text files of VQA-Med 2019 to 2021, such as All_QA_Pairs_train.txt and Train_images/, in any "
    "folders inside",
    "pmc-vqa": "train.csv or test.csv and images/, or train_2.csv or test_2.csv and figures/",
    "omnimedvqa": "QA_information/Open-access/*.json and Images/",
}
"""What a folder of each set holds."""

_SPLITS = {"train": "train", "val": "validation", "validate": "validation", "validation": "validation", "test": "test"}
_TRIED = 5  # rows
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class QuestionFile:
    """One file of questions.

    Attributes:
        file: where it is.
        split: of its records; empty where each row says it.
        rows: its content.
        convert: one row → a record whose image is a path below ``images``, or a bare name that ``found`` knows.
        images: folder of its images; None where they are inside the file.
        found: bare image name → path, for sets that leave out suffixes or spread images over folders.
    """

    file: Path
    split: str
    rows: Rows
    convert: Callable[[Any], dict[str, Any]]
    images: Path | None
    found: dict[str, Path] = field(default_factory=dict)


def question_files(name: str, source: Path) -> list[QuestionFile]:
    """The question files of a set below ``source``, or below the one folder inside that holds them.

    Raises:
        MedPLIBError: there is none; it says which were expected.
    """
    if name not in SETS:
        raise MedPLIBError(f"there is no question set {name!r}; known: {', '.join(SETS)}")
    if not source.is_dir():
        raise MedPLIBError(f"{source} is no folder; give the folder of {name}, with {EXPECTED[name]}")
    for folder in (source, *sorted(path for path in source.iterdir() if path.is_dir())):
        files = [one for one in _FINDERS[name](folder) if len(one.rows)]
        if files:
            _try_first_rows(name, files)
            return [_one_folder_down(one) for one in files]
    raise MedPLIBError(f"{source} does not look like {name}; expected {EXPECTED[name]}")


def _try_first_rows(name: str, files: Sequence[QuestionFile]) -> None:
    """None of a file's first rows can be read where it is of another set; one bad row is only one bad row."""
    for one in files:
        faults = []
        for row in one.rows.between(0, _TRIED):
            try:
                record_of(one, row if one.images else {**row, "id": "", "image": ""})
            except BadRow as error:
                faults.append(str(error))
        if len(faults) == min(_TRIED, len(one.rows)):
            raise MedPLIBError(
                f"{one.file} is not of the form that {name} has ({faults[0]}); expected {EXPECTED[name]}"
            )


def _one_folder_down(one: QuestionFile) -> QuestionFile:
    """An archive unpacked into a folder of its own name leaves ``images/images/``."""
    if one.images is None or one.found:
        return one
    names = []
    for row in one.rows.between(0, _TRIED):
        with suppress(BadRow):
            names.append(record_of(one, row)[1]["image"])
    inside = [path for path in sorted(one.images.iterdir()) if path.is_dir()]
    for folder in (one.images, *inside):
        if any(is_file(folder / name) for name in names):
            return replace(one, images=folder)
    return one


class BadRow(ValueError):
    """One row is not of the form of its set; the message says how."""


def record_of(one: QuestionFile, row: Any) -> tuple[str, dict[str, Any]]:
    """Split and record of one row.

    Raises:
        BadRow: it is not of the form of its set.
    """
    if isinstance(row, MedPLIBError):
        raise BadRow(str(row)) from row
    try:
        return one.split or vqa_rows.vqa_rad_split(row), one.convert(row)
    except KeyError as error:
        raise BadRow(f"it has no {error.args[0]}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise BadRow(str(error)) from error


def _vqa_rad(folder: Path) -> Iterator[QuestionFile]:
    images = _child(folder, "vqa_rad_image_folder", "images", "imgs", "image")
    public = _child(folder, "vqa_rad_dataset_public.json")
    halves = [(split, _child(folder, f"{split}set.json", f"{split}.json")) for split in ("train", "test")]
    if images and public:
        yield QuestionFile(public, "", JsonRows(public), vqa_rows.vqa_rad, images)
    elif images:
        for split, file in halves:
            if file:
                yield QuestionFile(file, split, JsonRows(file), vqa_rows.vqa_rad, images)
    else:
        yield from _parquet(folder)


def _slake(folder: Path) -> Iterator[QuestionFile]:
    images = _child(folder, "imgs")
    for split, names in (
        ("train", ["train.json"]),
        ("validation", ["validate.json", "validation.json"]),
        ("test", ["test.json"]),
    ):
        file = _child(folder, *names)
        if images and file:
            yield QuestionFile(file, split, JsonRows(file), vqa_rows.slake, images)


def _path_vqa(folder: Path) -> Iterator[QuestionFile]:
    pickles = 0
    for name in ("train", "val", "test"):
        places = (f"qas/{name}_vqa.pkl", f"{name}_vqa.pkl", f"qas/{name}/{name}_qa.pkl", f"{name}/{name}_qa.pkl")
        file = next((folder / place for place in places if (folder / place).is_file()), None)
        images = folder / "images" / name
        if file and images.is_dir():
            pickles += 1
            yield QuestionFile(file, _SPLITS[name], pickled_rows(file), vqa_rows.path_vqa, images, _by_stem(images))
    if not pickles:
        yield from _parquet(folder)


_TRAIN_OR_VALIDATION = re.compile(
    r"all_qa_pairs_(train|val)\.txt|vqanswering_\d{4}_(train|val)_qa_pairs\.txt|"
    r"vqa-med-\d{4}-vqanswering-task1-.*(val)idationset\.txt"
)
_TEST = re.compile(r"(.*test.*)questions(_w_ref_answers)?\.txt")


def _imageclef(folder: Path) -> Iterator[QuestionFile]:
    texts = sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".txt" and path.name[0] != ".")
    everywhere = _by_stem(folder)
    for file in texts:
        name = file.name.lower()
        match, test = _TRAIN_OR_VALIDATION.fullmatch(name), _TEST.fullmatch(name)
        if match:
            split, rows = _SPLITS[next(group for group in match.groups() if group)], barred_rows(file)
        elif test and test[2]:
            split, rows = "test", barred_rows(file)
        elif test and (answers := _child(file.parent, f"{test[1]}referenceanswers.txt")):
            split, rows = "test", _answered(barred_rows(file), barred_rows(answers))
        else:
            continue
        own = _by_stem(file.parent) if file.parent != folder else {}
        yield QuestionFile(file, split, rows, vqa_rows.imageclef, folder, {**everywhere, **own})


def _answered(questions: ListedRows, answers: ListedRows) -> ListedRows:
    """Questions and answers of two files, joined by their image; a question without an answer is left short."""
    known = {row[0]: row[1:] for row in answers.between(0, len(answers))}
    return ListedRows([[*row, *known.get(row[0], [])] for row in questions.between(0, len(questions))])


def _by_stem(folder: Path) -> dict[str, Path]:
    """Image files below ``folder`` by their name without suffix; the first in alphabetical order of paths."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in _IMAGE_SUFFIXES and path.name[0] != ".":
            found.setdefault(path.stem, path)
    return found


def _pmc_vqa(folder: Path) -> Iterator[QuestionFile]:
    for name in ("train", "test", "test_clean", "train_2", "test_2"):
        file = folder / f"{name}.csv"
        if not file.is_file():
            continue
        rows = CsvRows(file)
        folders = ("figures", "images_2", "images") if name.endswith("_2") else ("images", "figures")
        places = [place for place in (folder / one for one in folders) if place.is_dir()]
        if len(rows) and places:
            row = next(rows.between(0, 1))
            figure = row.get("Figure_path", "") if isinstance(row, dict) else ""
            images = next((place for place in places if (place / figure).is_file()), places[0])
            yield QuestionFile(file, name, rows, vqa_rows.pmc_vqa, images)


def _omnimedvqa(folder: Path) -> Iterator[QuestionFile]:
    for access in ("Open-access", "Restricted-access"):
        for file in sorted((folder / "QA_information" / access).glob("[!.]*.json")):
            split = access.lower().replace("-", "_")
            yield QuestionFile(file, split, JsonRows(file), vqa_rows.omnimedvqa, folder)


def _parquet(folder: Path) -> Iterator[QuestionFile]:
    for place in (folder / "data", folder):
        files = sorted(place.glob("*.parquet"))
        for file in files:
            split = _SPLITS.get(re.split(r"[-_.]", file.name)[0].lower())
            if split:
                yield QuestionFile(file, split, ParquetRows(file), vqa_rows.image_question_answer, None)
        if files:
            return


_FINDERS: dict[str, Callable[[Path], Iterator[QuestionFile]]] = {
    "vqa-rad": _vqa_rad,
    "slake": _slake,
    "pathvqa": _path_vqa,
    "imageclef": _imageclef,
    "pmc-vqa": _pmc_vqa,
    "omnimedvqa": _omnimedvqa,
}


def _child(folder: Path, *names: str) -> Path | None:
    """What lies in ``folder`` under one of ``names``, whatever its capitals; spaces count as underscores."""
    wanted = {name: place for place, name in enumerate(names)}
    found = {path.name.lower().replace(" ", "_"): path for path in sorted(folder.iterdir())}
    best = min((name for name in found if name in wanted), key=wanted.__getitem__, default=None)
    return found[best] if best else None
