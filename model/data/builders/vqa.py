"""Public question sets as their sources publish them → records with open and closed answers, in their own splits."""

from __future__ import annotations

import csv
import hashlib
import io
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Literal, Protocol

from model.data.builders import vqa_rows
from model.data.builders.jobs import Build, BuildReport, Execution, Output, Part, fingerprint, run_build, write_bytes
from model.data.builders.published import Stretch, Vetting, drop, path_from, stretches, write_vetted
from model.data.image_io import is_file
from model.data.records import open_records
from model.errors import MedPLIBError

Language = Literal["en", "zh", "all"]

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
_IMAGE_ENDINGS = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"II*\x00": ".tif", b"MM\x00*": ".tif", b"BM": ".bmp"}
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
_PARQUET_BATCH = 64  # rows in memory, images among them
_PICKLED = {("collections", "OrderedDict"), ("collections", "defaultdict"), ("builtins", "set"), ("builtins", "list")}
_PICKLE_BYTES = 1 << 30


class Rows(Protocol):
    """The rows of one file; picklable."""

    def __len__(self) -> int: ...

    def between(self, start: int, stop: int) -> Iterator[Any]:
        """Rows ``start`` … ``stop`` − 1; a ``MedPLIBError`` in the place of one that cannot be read."""
        ...


class BadRow(ValueError):
    """One row is not of the form of its set; the message says how."""


@dataclass(frozen=True)
class QuestionFile:
    """One file of questions."""

    file: Path  # where it is
    split: str  # of its records; empty where each row says it
    rows: Rows  # its content
    # one row → a record whose image is a path below ``images``, or a bare name that ``found`` knows
    convert: Callable[[Any], dict[str, Any]]
    images: Path | None  # folder of its images; None where they are inside the file
    # bare image name → path, for sets that leave out suffixes or spread images over folders
    found: dict[str, Path] = field(default_factory=dict)

    def record_of(self, row: Any) -> tuple[str, dict[str, Any]]:
        """Split and record of one row. Raises BadRow: it is not of the form of its set."""
        if isinstance(row, MedPLIBError):
            raise BadRow(str(row)) from row
        try:
            return self.split or vqa_rows.vqa_rad_split(row), self.convert(row)
        except KeyError as error:
            raise BadRow(f"it has no {error.args[0]}") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise BadRow(str(error)) from error


@dataclass(frozen=True)
class _Context:
    name: str
    files: tuple[QuestionFile, ...]
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
    """Write one file for each split of a public set. Raises MedPLIBError: the source does not look like the set, or a
    folder cannot be used.

    Args:
        name: of the set, a key of ``EXPECTED``.
        source: its unpacked folder.
        out: folder of the results; images that are inside Parquet files go to its ``images/``.
        execution: processes, whether to start anew.
        images_root: folder that the paths in the records start from; the source when None, or ``out`` where images
            are extracted to it.
        language: of SLAKE's questions.
        check_pixels: decode every image; else only see whether it exists.
    """
    files = question_files(name, source)
    if images_root is not None and not images_root.is_dir():
        raise MedPLIBError(f"--images-root {images_root} is no folder; give one that exists, or leave it out")
    root = images_root or (out if any(one.images is None for one in files) else source)
    splits = sorted({split for one in files for split in ([one.split] if one.split else ("train", "test"))})
    outputs = tuple(Output(f"{split}.json") for split in splits)
    if {(out / output.name).resolve() for output in outputs} & {one.file.resolve() for one in files}:
        raise MedPLIBError(f"--out {out} holds the files to be built from; name another folder, so that they stay")
    settings = {
        "set": name,
        "images_root": str(root.resolve()),
        "language": language if name == "slake" else "",
        "check_pixels": check_pixels,
    }
    build = Build(out, "vqa", settings, outputs, fingerprint([one.file for one in files]), "question")
    context = _Context(name, tuple(files), out / "images", root, check_pixels, language)
    return run_build(build, lambda: (stretches([len(one.rows) for one in files]), context), _convert, execution)


def _convert(piece: Stretch, context: _Context, part: Part) -> None:
    one = context.files[piece.file]
    vetting = Vetting(context.root, check_pixels=context.check_pixels)
    wanted = context.language if context.name == "slake" else "all"
    for number, row in enumerate(one.rows.between(piece.start, piece.stop), start=piece.start):
        where = {"file": one.file.name, "record": number}
        if wanted != "all" and isinstance(row, dict) and str(row.get("q_lang", wanted)).strip().lower() != wanted:
            part.count("records", "in another language")
            continue
        try:
            if one.images is None and not isinstance(row, MedPLIBError):
                row = {**row, "id": "", "image": written_image(row.get("image"), context.pictures)}
            split, record = one.record_of(row)
        except BadRow as error:
            drop(part, "bad_row", str(error), **where)
            continue
        record["id"] = record["id"] or f"{context.name}-{one.file.stem}-{number}"
        image = one.found.get(record["image"], (one.images or context.pictures) / record["image"])
        record["image"] = path_from(context.root, image)
        write_vetted(part, f"{split}.json", record, vetting, **where)


def written_image(image: Any, folder: Path) -> str:
    """The name of a file, written into ``folder``, for an encoded image that was inside a row. Raises BadRow: there is
    no image."""
    content = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(content, bytes) or not content:
        raise BadRow("it holds no image")
    ending = next((end for start, end in _IMAGE_ENDINGS.items() if content.startswith(start)), ".img")
    name = hashlib.sha256(content).hexdigest()[:24] + ending  # so that the same image is written once
    if not (folder / name).is_file():
        write_bytes(folder / name, content)
    return name


# --- the files of each set ------------------------------------------------------------------------------------------


def question_files(name: str, source: Path) -> list[QuestionFile]:
    """The question files of a set below ``source``, or below the one folder inside that holds them. Raises
    MedPLIBError: there is none, or none of a file's first rows is of the set; it says what was expected."""
    if name not in EXPECTED:
        raise MedPLIBError(f"there is no question set {name!r}; known: {', '.join(EXPECTED)}")
    if not source.is_dir():
        raise MedPLIBError(f"{source} is no folder; give the folder of {name}, with {EXPECTED[name]}")
    for folder in (source, *sorted(path for path in source.iterdir() if path.is_dir())):
        if files := [one for one in _FINDERS[name](folder) if len(one.rows)]:
            return [_tried(name, one) for one in files]
    raise MedPLIBError(f"{source} does not look like {name}; expected {EXPECTED[name]}")


def _tried(name: str, one: QuestionFile) -> QuestionFile:
    """The file, after a look at its first rows: one bad row is only one bad row, but where all are, it is another set.

    An archive unpacked into a folder of its own name leaves ``images/images/``, which is found here."""
    images, faults = [], []
    for row in one.rows.between(0, _TRIED):
        try:
            images.append(one.record_of(row if one.images else {**row, "id": "", "image": ""})[1]["image"])
        except BadRow as error:
            faults.append(str(error))
    if faults and not images:
        raise MedPLIBError(f"{one.file} is not of the form that {name} has ({faults[0]}); expected {EXPECTED[name]}")
    if one.images is not None and not one.found:
        for folder in (one.images, *sorted(path for path in one.images.iterdir() if path.is_dir())):
            if any(is_file(folder / image) for image in images):
                return replace(one, images=folder)
    return one


def _vqa_rad(folder: Path) -> Iterator[QuestionFile]:
    images = _child(folder, "vqa_rad_image_folder", "images", "imgs", "image")
    public = _child(folder, "vqa_rad_dataset_public.json")
    halves = [(split, _child(folder, f"{split}set.json", f"{split}.json")) for split in ("train", "test")]
    if images and public:
        yield QuestionFile(public, "", ListedRows(open_records(public)), vqa_rows.vqa_rad, images)
    elif images:
        for split, file in halves:
            if file:
                yield QuestionFile(file, split, ListedRows(open_records(file)), vqa_rows.vqa_rad, images)
    else:
        yield from _parquet(folder)


def _slake(folder: Path) -> Iterator[QuestionFile]:
    images = _child(folder, "imgs")
    names = {"train": ["train.json"], "validation": ["validate.json", "validation.json"], "test": ["test.json"]}
    for split in names:
        file = _child(folder, *names[split])
        if images and file:
            yield QuestionFile(file, split, ListedRows(open_records(file)), vqa_rows.slake, images)


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
    known = {row[0]: row[1:] for row in answers.between(0, len(answers))}
    return ListedRows([[*row, *known.get(row[0], [])] for row in questions.between(0, len(questions))])


def _by_stem(folder: Path) -> dict[str, Path]:
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
            yield QuestionFile(file, split, ListedRows(open_records(file)), vqa_rows.omnimedvqa, folder)


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
    wanted = {name: place for place, name in enumerate(names)}
    found = {path.name.lower().replace(" ", "_"): path for path in sorted(folder.iterdir())}
    best = min((name for name in found if name in wanted), key=wanted.__getitem__, default=None)
    return found[best] if best else None


# --- the forms of files ---------------------------------------------------------------------------------------------


class ListedRows:
    """Rows that can be taken by their number: records of a file, or a list in memory."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def between(self, start: int, stop: int) -> Iterator[Any]:
        for number in range(start, min(stop, len(self))):
            try:
                yield self._rows[number]
            except MedPLIBError as error:
                yield error


class _PlainUnpickler(pickle.Unpickler):
    """Builds lists, mappings, texts and numbers; a name of anything else is an error before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.replace("__builtin__", "builtins"), name) in _PICKLED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def pickled_rows(file: Path) -> ListedRows:
    """A pickled list of mappings, read without running anything that is in it. Raises MedPLIBError: it is anything
    else, or larger than 1 GiB."""
    if file.stat().st_size > _PICKLE_BYTES:
        raise MedPLIBError(f"{file} is larger than 1 GiB; the question files of a set are far smaller")
    try:
        rows = _PlainUnpickler(io.BytesIO(file.read_bytes()), encoding="utf-8").load()
    except Exception as error:  # a damaged pickle makes the reader raise nearly anything
        raise MedPLIBError(
            f"{file} is no pickle of plain lists and mappings ({str(error) or type(error).__name__}); "
            "get the file anew from its source"
        ) from error
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise MedPLIBError(f"{file} holds {type(rows).__name__}, expected a list of questions")
    return ListedRows(rows)


def barred_rows(file: Path) -> ListedRows:
    """Lines with ``|`` between their fields, in UTF-8 or in Windows' western code page; blank ones are left out."""
    content = file.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp1252", errors="replace")
    return ListedRows([[field.strip() for field in line.split("|")] for line in text.splitlines() if line.strip()])


class CsvRows:
    """CSV with a line of names first."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._length = sum(1 for _ in self._rows())

    def __len__(self) -> int:
        return self._length

    def between(self, start: int, stop: int) -> Iterator[Any]:
        yield from islice(self._rows(), start, stop)

    def _rows(self) -> Iterator[Any]:
        with self._file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
            reader = csv.reader(stream)
            names = [name.strip() for name in next(reader, [])]
            while True:
                try:
                    fields = next(reader)
                    "".join(fields).encode()
                except StopIteration:
                    return
                except (UnicodeEncodeError, csv.Error) as error:
                    yield MedPLIBError(f"cannot be read as UTF-8 CSV ({error})")
                    continue
                if len(fields) == len(names):
                    yield dict(zip(names, fields, strict=True))
                elif len(fields) > 1 or "".join(fields).strip():
                    yield MedPLIBError(f"has {len(fields)} fields where the first line names {len(names)}")


class ParquetRows:
    """A Parquet file with the columns ``image`` (encoded bytes), ``question`` and ``answer``."""

    columns = ("image", "question", "answer")

    def __init__(self, file: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        self._file = file
        try:
            with pyarrow.parquet.ParquetFile(file) as table:
                missing = [name for name in self.columns if name not in table.schema_arrow.names]
                metadata = table.metadata
                self._groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        except (OSError, pyarrow.ArrowException) as error:
            raise MedPLIBError(
                f"{file} is no readable Parquet file ({str(error).splitlines()[0]}); get it anew"
            ) from error
        if missing:
            raise MedPLIBError(f"{file} lacks the column {missing[0]}; expected {', '.join(self.columns)}")

    def __len__(self) -> int:
        return sum(self._groups)

    def between(self, start: int, stop: int) -> Iterator[Any]:
        import pyarrow.parquet

        reading = {"batch_size": _PARQUET_BATCH, "columns": list(self.columns), "use_threads": False}
        ends = [*accumulate(self._groups)]
        groups = [group for group, end in enumerate(ends) if end > start and end - self._groups[group] < stop]
        number = ends[groups[0]] - self._groups[groups[0]] if groups else 0
        with pyarrow.parquet.ParquetFile(self._file) as table:
            for batch in table.iter_batches(row_groups=groups, **reading):
                low, high = (min(max(place - number, 0), batch.num_rows) for place in (start, stop))
                yield from batch.slice(low, high - low).to_pylist()
                number += batch.num_rows
