"""Readers of tables: CSV of paths, labels and splits, question tables, Parquet with image bytes, messages, COCO."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco

from model.data.builders.cases import (
    SPLIT_WORDS,
    Case,
    Problem,
    ReadOptions,
    Source,
    Target,
    file_key,
    image_files,
    patient_of,
    split_in,
    without_suffix,
)
from model.data.builders.image_layouts import LegendReader, modality_stated, sort_files, words
from model.data.image_io import ImageData, is_file, read_image
from model.data.records import open_records
from model.data.schema import CONVERSATION_KEYS, canonical, inspect_record
from model.errors import MedPLIBError
from model.processing.masks import checked_rle

_TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
_ROLES: dict[str, tuple[str, ...]] = {  # in order of preference
    "image": (
        *("image", "image_path", "img", "img_path", "image_file", "filename", "file_name", "image_name", "images"),
        *("file", "path", "image_id", "img_id", "img_name", "name", "id"),
    ),
    "mask": ("mask", "mask_path", "mask_file", "segmentation", "seg", "mask_name", "annotation", "label_path"),
    "target": ("target", "structure", "organ"),
    "absent": ("absent",),
    "foreign": ("foreign",),
    "modality": ("modality", "image_modality"),
    "patient": (
        *("patient", "patient_id", "patientid", "subject", "subject_id", "case", "case_id", "participant"),
        *("participant_id", "video_or_patient", "video", "pid"),
    ),
    "group": ("dup_group", "duplicate_group", "group"),
    "split": ("split", "subset", "set", "partition", "fold"),
    "spacing": ("spacing", "pixel_spacing", "spacing_mm"),
    "question": ("question", "query", "problem", "prompt"),
    "answer": ("answer", "answers", "response", "solution"),
    "terms": ("redistributable", "license", "licence", "terms"),
}
_NO_LABEL = re.compile(
    r"(?:source|cent(?:er|re)|site|hospital|scanner|device|vendor|manufacturer|sex|gender|age|eye|laterality|side|"
    r"orientation|sequence|channels|area|slice|license|licence|url|link|doi|date|year|index|width|height|bbox|notes?|"
    r"comments?|annotator|dataset|plane|path|.*_?group|n_.*|num_.*|.*_?id|.*path|.*file|.*_?name|answer_type|"
    r"question_type|content_type)"
)
_MOST_VALUES = 12
_FEWEST_IMAGES = 3  # that a value of a label needs
_LOOKED_AT = 20
_MOST_TABLES = 100  # a folder of more holds a file for each image

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Picture:
    """An encoded picture in a cell of a Parquet file."""

    file: Path
    row: int
    column: str

    def content(self) -> bytes:
        """The encoded bytes. Raises MedPLIBError: the cell is empty."""
        group, first = self.row, 0
        for number, rows in enumerate(_group_rows(self.file)):
            if self.row < first + rows:
                group = number
                break
            first += rows
        cell = _pictures(self.file, group, self.column)[self.row - first].as_py()
        found = cell.get("bytes") if isinstance(cell, Mapping) else cell
        if not found:
            raise MedPLIBError(f"{self.file}, row {self.row}: {self.column} holds no picture")
        return found

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}"


@lru_cache(maxsize=64)
def _group_rows(file: Path) -> list[int]:
    import pyarrow.parquet as parquet

    metadata = parquet.read_metadata(file)
    return [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]


@lru_cache(maxsize=2)
def _pictures(file: Path, group: int, column: str) -> Any:
    import pyarrow.parquet as parquet

    return parquet.ParquetFile(file).read_row_group(group, columns=[column], use_threads=False)[column]


def _picture_image(picture: Picture) -> ImageData:
    return read_image(picture.content())


def recognize_table(root: Path, options: ReadOptions) -> Source | None:
    """Rows with an image each: masks, classes, questions, patient and split in columns of usual names."""
    for file in _tables(root):
        rows = read_rows(file) if file != options.names else []
        table = _Table(root if root.is_dir() else file.parent, file, rows, options) if rows else None
        if table is not None and table.usable():
            files = [other for other in _tables(root) if other.suffix == file.suffix and other != file]
            for other in files if file.name not in ("meta.csv", "metadata.csv") else []:
                more = read_rows(other)
                if more and set(more[0]) == set(rows[0]):
                    table.add(other, more)
            return table.source()
    return None


class _Table:
    def __init__(self, root: Path, file: Path, rows: list[Row], options: ReadOptions) -> None:
        self.root, self.files, self.options = root, [file], options
        self.rows: list[tuple[Path, Row]] = [(file, row) for row in rows]
        columns = {_plain(name): name for name in rows[0]}
        self.columns = {
            role: found
            for role, words in _ROLES.items()
            if (found := next((columns[word] for word in words if word in columns), None)) is not None
        }
        if "image" in self.columns and self.columns["image"] == self.columns.get("patient"):
            del self.columns["patient"]
        self.problems: list[Problem] = []
        self.folders = list(dict.fromkeys((root, file.parent)))
        self._index: dict[str, list[Path]] | None = None

    def add(self, file: Path, rows: Sequence[Row]) -> None:
        self.files.append(file)
        self.rows += [(file, row) for row in rows]

    def usable(self) -> bool:
        looked = self.rows[:: max(1, len(self.rows) // _LOOKED_AT)]
        if "image" not in self.columns or not (set(self.columns) - {"image"} or len(self.rows[0][1]) > 1):
            return False
        found = sum(self.find(row.get(self.columns["image"])) is not None for _, row in looked)
        return found * 2 > len(looked)

    def find(self, cell: Any) -> Path | Picture | None:
        if isinstance(cell, Picture):
            return cell
        text = str(cell or "").strip().replace("\\", "/")
        if not text:
            return None
        for folder in self.folders:
            if is_file(folder / text):
                return folder / text
        if self._index is None:
            self._index = defaultdict(list)
            for relative in image_files(self.root, []):
                bare = Path(without_suffix(relative)).name
                for name in {Path(relative).name, bare}:
                    self._index[name].append(self.root / relative)
        listed = self._index.get(Path(text).name, [])
        ending = [file for file in listed if file.as_posix().endswith(f"/{text}")]
        found = ending if len(ending) == 1 else listed
        return found[0] if len(found) == 1 else None

    def cell(self, row: Row, role: str) -> str:
        value = row.get(self.columns.get(role, ""))
        text = "" if value is None or value != value else str(value)  # NaN is not itself
        return text if role == "answer" else " ".join(text.split())

    def source(self) -> Source:
        self.labels, unused = self._labels()
        images = len({str(row.get(self.columns["image"])) for _, row in self.rows})
        named = [f"{role} in {name!r}" for role, name in self.columns.items()]
        said = f"a table ({', '.join(file.name for file in self.files[:3])}) of {images} images; {', '.join(named)}"
        if self.labels:
            said += f"; classes in {', '.join(repr(label) for label in self.labels)}"
        if unused:
            said += f"; not used: {', '.join(repr(label) for label in unused)}"
        terms = sorted({self.cell(row, "terms") for _, row in self.rows} - {""}) if "terms" in self.columns else []
        return Source("table", said, self.cases, self.problems, "; ".join(terms))

    def _labels(self) -> tuple[dict[str, set[str]], list[str]]:
        by_image: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        image = self.columns["image"]
        others = [name for name in self.rows[0][1] if name and name not in self.columns.values()]
        for _, row in self.rows:
            for name in others:
                value = row.get(name)
                by_image[name][str(row.get(image))].add("" if value is None else " ".join(str(value).split()))
        labels: dict[str, set[str]] = {}
        for name in others:
            counts = Counter(next(iter(values)) for values in by_image[name].values() if len(values) == 1)
            counts.pop("", None)
            several = any(len(values) > 1 for values in by_image[name].values())
            if several or not 2 <= len(counts) <= _MOST_VALUES or _NO_LABEL.fullmatch(_plain(name)):
                continue
            common = {value for value, count in counts.items() if count >= min(_FEWEST_IMAGES, len(self.rows) // 4)}
            text = all(not _is_number(value) and len(value) <= 60 for value in common)
            if len(common) > 1 and (text or set(counts) <= {"0", "1"}):
                labels[name] = common
        return labels, [name for name in others if name not in labels]

    def cases(self) -> Iterator[Case]:
        self.problems.clear()
        reader = LegendReader(self.options, self.problems)
        grouped: dict[Path | Picture, list[tuple[Path, int, Row]]] = defaultdict(list)
        for number, (file, row) in enumerate(self.rows, start=2):
            image = self.find(row.get(self.columns["image"]))
            if image is None:
                message = f"the image {self.cell(row, 'image')!r:.100} is not found, or several have its name"
                self.problems.append(Problem("missing_image", f"{file}, row {number}", message, "mend the path"))
            else:
                grouped[image].append((file, number, row))
        patients = self._patients(grouped)
        beside = self._masks_beside()
        for image, rows in grouped.items():
            origin = str(image)
            first = rows[0][2]
            if isinstance(image, Picture):
                path = f"{image.file.stem}-{image.row:06d}"
            else:
                path = (image.relative_to(self.root) if image.is_relative_to(self.root) else image).as_posix()
            absent, foreign = (
                {name.strip() for *_, row in rows for name in self.cell(row, column).split(";")} - {""}
                for column in ("absent", "foreign")
            )
            labels = {name: " ".join(str(first.get(name)).split()) for name in self.labels}
            splits = {split for file, _, row in rows if (split := self._split(file, row))}
            if len(splits) > 1:
                message = f"its rows are of {' and '.join(sorted(splits))}; {max(splits)} is not taken"
                self.problems.append(Problem("image_in_two_splits", origin, message, "give all its rows one split"))
            modality = modality_stated(self.options, self.cell(first, "modality"), path)
            yield Case(
                key=file_key(without_suffix(path)),
                image=image if isinstance(image, Path) else partial(_picture_image, image),
                targets=tuple(self._targets(rows, reader, beside.get(image, {}))),
                absent=tuple(sorted(absent)),
                foreign=tuple(sorted(foreign)),
                labels={name: value for name, value in labels.items() if value in self.labels[name]},
                questions=tuple(self._questions(rows)),
                patient=patients.get(image) or (path if isinstance(image, Picture) else None),
                split=min(splits, key=("test", "train", "validation").index) if splits else None,
                modality=modality,
                spacing_mm=_spacing(self.cell(first, "spacing")),
                terms=self.cell(first, "terms"),
                origin=origin,
            )

    def _masks_beside(self) -> dict[Path | Picture, dict[str, list[Any]]]:
        found: dict[Path | Picture, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
        if "mask" not in self.columns and "question" not in self.columns and self.root in self.folders:
            sorted_files = sort_files(self.root, self.options)
            for key, name, file in sorted_files.masks:
                found[self.root / sorted_files.images[key]][name].append(self.root / file)
        return found

    def _targets(
        self, rows: Sequence[tuple[Path, int, Row]], reader: LegendReader, beside: Mapping[str, list[Any]]
    ) -> Iterator[Target]:
        files: dict[str, list[Any]] = defaultdict(list, beside)
        for file, number, row in rows:
            cell = row.get(self.columns.get("mask", ""))
            if cell is None or cell == "":
                continue
            mask = self.find(cell)
            if mask is None:
                message = f"the mask {self.cell(row, 'mask')!r:.100} is not found"
                self.problems.append(Problem("missing_mask", f"{file}, row {number}", message, "mend the path"))
                continue
            files[self.cell(row, "target")].append(mask)
        for name, masks in files.items():
            yield from reader.targets(masks, name)

    def _questions(self, rows: Iterable[tuple[Path, int, Row]]) -> Iterator[tuple[str, str]]:
        for file, number, row in rows if "question" in self.columns and "answer" in self.columns else ():
            question, answer = self.cell(row, "question"), self.cell(row, "answer").strip()
            if question and answer:
                yield question.replace("<image>", "").strip(), answer
            else:
                message = f"the {'answer' if question else 'question'} is empty"
                self.problems.append(
                    Problem("empty_question", f"{file}, row {number}", message, "write it, or drop the row")
                )

    def _split(self, file: Path, row: Row) -> str | None:
        text = self.cell(row, "split").casefold()
        return SPLIT_WORDS.get(text) if text else split_in(file.name)

    def _patients(self, grouped: Mapping[Path | Picture, list[tuple[Path, int, Row]]]) -> dict[Path | Picture, str]:
        """Image → patient; images of one duplicate group, and all of their patients, count as one."""
        if not {"patient", "group"} & set(self.columns):
            return {}
        parent: dict[str, str] = {}

        def top(node: str) -> str:
            while parent.setdefault(node, node) != node:
                node = parent[node]
            return node

        own = {}
        for image, rows in grouped.items():
            nodes = [f"2{image}"]
            for *_, row in rows:
                named = enumerate((self.cell(row, "patient"), self.cell(row, "group")))
                nodes += [f"{rank}{text}" for rank, text in named if text]
            own[image] = nodes[0]
            for node in nodes[1:]:  # the smallest name stands for all: a patient, else a group, else the image
                first, second = sorted((top(nodes[0]), top(node)))
                parent[second] = first
        names = {image: top(node) for image, node in own.items()}
        return {
            image: {"0": name[1:], "1": f"group {name[1:]}", "2": without_suffix(Path(name[1:]).name)}[name[0]]
            for image, name in names.items()
        }


def read_rows(file: Path) -> list[Row]:
    """Rows of a CSV, TSV, JSON, JSON lines or Parquet file; none where it is no table of rows.

    Pictures in a Parquet file are left there: their cells are ``Picture``. Numbers of a Hugging Face ``ClassLabel``
    become its names."""
    if file.suffix in (".csv", ".tsv"):
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            text = file.read_text(encoding="cp1252", errors="replace")
        header = text.partition("\n")[0]
        delimiter = max(",;\t", key=header.count)
        return list(csv.DictReader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True, restkey=""))
    if file.suffix == ".parquet":
        return _parquet_rows(file)
    try:
        records = open_records(file)
        return [records[number] for number in range(len(records))]
    except MedPLIBError:
        return []


def _parquet_rows(file: Path) -> list[Row]:
    import pyarrow.parquet as parquet

    schema = parquet.read_schema(file)
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    names = {column: feature.get("names") for column, feature in features.items() if isinstance(feature, Mapping)}
    pictures = [
        field.name
        for field in schema
        if str(field.type) in ("binary", "large_binary") or str(field.type).startswith("struct<bytes")
    ]
    plain = [field.name for field in schema if field.name not in pictures]
    rows = parquet.read_table(file, columns=plain).to_pylist() if plain else [{} for _ in range(sum(_group_rows(file)))]
    for number, row in enumerate(rows):
        row.update({column: Picture(file, number, column) for column in pictures})
        for column, listed in names.items():
            if listed and isinstance(row.get(column), int) and 0 <= row[column] < len(listed):
                row[column] = listed[row[column]]
    return rows


def _tables(root: Path) -> list[Path]:
    if root.is_file():
        return [root] if root.suffix.lower() in _TABLES else []
    found = [path for depth in ("*", "*/*") for path in sorted(root.glob(depth)) if path.suffix.lower() in _TABLES]
    found.sort(key=lambda path: (not path.stem.casefold().startswith("meta"), len(path.parts), path.name))
    return found[:_MOST_TABLES]


def _plain(name: Any) -> str:
    return re.sub(r"[^\w]+", "_", str(name).strip().casefold())


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _spacing(text: str) -> tuple[float, float] | None:
    """(row, column) distance of ``0.98x0.98`` or ``[0.5, 0.5]``."""
    numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", text)]
    return (numbers[0], numbers[1]) if len(numbers) == 2 and min(numbers) > 0 else None


# ---- conversations -------------------------------------------------------------------------------------------------


def recognize_conversations(root: Path, options: ReadOptions) -> Source | None:
    """Records with ``messages`` (OpenAI) or ``conversations`` (the published format), of one image each."""
    files = []
    for file in _tables(root):
        if file.suffix.lower() in (".json", ".jsonl", ".parquet"):
            try:
                records = open_records(file)
                if len(records) and set(CONVERSATION_KEYS) & set(records[0]):
                    files.append(file)
            except MedPLIBError:
                continue
    if not files:
        return None
    problems: list[Problem] = []
    base = root if root.is_dir() else root.parent
    said = f"conversations in {', '.join(file.relative_to(base).as_posix() for file in files)}"
    return Source("conversations", said, lambda: _conversations(base, files, options, problems), problems)


def _conversations(base: Path, files: list[Path], options: ReadOptions, problems: list[Problem]) -> Iterator[Case]:
    problems.clear()
    for file in files:
        records = open_records(file)
        roots = (file.parent, base)
        for number in range(len(records)):
            where = f"{file}, record {number}"
            try:
                raw = canonical(records[number])
                samples = [inspect_record(raw, root) for root in dict.fromkeys(roots)]
                sample, findings = next((one for one in samples if one[0] is not None), samples[0])
            except MedPLIBError as error:
                problems.append(Problem("invalid_json", where, str(error), "mend the record"))
                continue
            if sample is None or len(sample.images) != 1 or sample.examples:
                fault = next((finding for finding in findings if finding.severity == "error"), None)
                message = fault.message if fault else f"it has {len(sample.images) if sample else 0} images, expected 1"
                problems.append(Problem(fault.kind if fault else "image_count", where, message, "mend the record"))
                continue
            paths = {"region": iter(sample.regions), "mask": iter(sample.masks)}
            texts = [_TAG.sub(partial(_absolute, paths), str(turn["value"])) for turn in raw["conversations"]]
            image = sample.images[0]
            key = image.relative_to(base) if image.is_relative_to(base) else image
            yield Case(
                key=file_key(f"{without_suffix(key.as_posix())}-{file.stem}{number}"),
                image=image,
                questions=tuple(zip(texts[::2], texts[1::2], strict=True)),
                conversation=True,
                patient=_text_of(raw, "patient") or patient_of(without_suffix(key.as_posix())),
                split=SPLIT_WORDS.get(_text_of(raw, "split")) or split_in(file.relative_to(base).as_posix()),
                modality=modality_stated(options, sample.modality or "", image.name),
                origin=str(image),
            )


_TAG = re.compile(r"<(region|mask)>(?:.*?)</\1>", re.DOTALL)


def _absolute(paths: Mapping[str, Iterator[Path]], tag: re.Match[str]) -> str:
    return f"<{tag[1]}>{next(paths[tag[1]])}</{tag[1]}>"


def _text_of(raw: Row, key: str) -> str:
    value = raw.get(key)
    return value if isinstance(value, str) else ""


# ---- COCO ----------------------------------------------------------------------------------------------------------


def recognize_coco(root: Path, options: ReadOptions) -> Source | None:
    """COCO: JSON files with ``images``, ``annotations`` and ``categories``, in the folder or in folders of it."""
    files = [root] if root.is_file() else [path for depth in ("*", "*/*") for path in sorted(root.glob(depth))]
    found: dict[Path, Any] = {}
    for file in files:
        if file.suffix.lower() == ".json" and file.is_file():
            with file.open("rb") as stream:
                if not stream.read(64).lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"{"):
                    continue
            try:
                content = json.loads(file.read_text(encoding="utf-8-sig"))
            except ValueError as error:
                raise MedPLIBError(f"{file} is no valid JSON ({error}); save it anew") from error
            if {"images", "annotations", "categories"} <= set(content):
                found[file] = content
    if not found:
        return None
    names = {str(one.get("name")) for content in found.values() for one in content["categories"]}
    images, marks = (sum(len(one[key]) for one in found.values()) for key in ("images", "annotations"))
    said = f"COCO ({', '.join(file.name for file in found)}): {images} images, {marks} annotations of "
    said += ", ".join(sorted(names))
    problems: list[Problem] = []
    base = root if root.is_dir() else root.parent
    return Source("coco", said, lambda: _coco_cases(base, found, options, problems), problems)


def _coco_cases(base: Path, found: Mapping[Path, Any], options: ReadOptions, problems: list[Problem]) -> Iterator[Case]:
    problems.clear()
    several = len(found) > 1
    for file, content in found.items():
        names = {one["id"]: words(str(one.get("name", one["id"]))) for one in content["categories"]}
        marks: dict[Any, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
        for mark in content["annotations"]:
            name, shape = names.get(mark.get("category_id")), mark.get("segmentation")
            where = f"{file}, annotation {mark.get('id')}"
            if name is None:
                problems.append(Problem("mask_without_name", where, "its category is not listed", "add the category"))
            elif not shape:
                problems.append(
                    Problem("box_without_mask", where, "it has a box and no outline", "outline it, or remove it")
                )
            else:
                marks[mark.get("image_id")][name].append(shape)
        unused = set(names.values()) - {name for group in marks.values() for name in group}
        for name in sorted(unused):
            problems.append(Problem("empty_class", str(file), f"no annotation is of {name}", "remove the category"))
        table = _Table(base, file, [{"image": ""}], options)
        table.folders = list(dict.fromkeys((file.parent, base, file.parent / "images", base / "images")))
        for image in content["images"]:
            path = table.find(image.get("file_name"))
            where = f"{file}, image {image.get('id')}"
            if not isinstance(path, Path):
                message = f"the image {image.get('file_name')!r:.100} is not found, or several have its name"
                problems.append(Problem("missing_image", where, message, "lay the images beside the file"))
                continue
            size = (int(image.get("height") or 0), int(image.get("width") or 0))
            if min(size) < 1:
                problems.append(Problem("size_mismatch", where, "it has no height and width", "add both"))
                continue
            suffix = f"-{file.stem}" if several and split_in(file.name) is None else ""
            listed = path.relative_to(base).as_posix() if path.is_relative_to(base) else path.as_posix()
            absent = {names[number] for number in image.get("neg_category_ids") or () if number in names}
            yield Case(
                key=file_key(without_suffix(listed) + suffix),
                image=path,
                targets=tuple(
                    Target(name, partial(read_outlines, tuple(shapes), size), f"{where}, {name}")
                    for name, shapes in marks[image.get("id")].items()
                ),
                absent=tuple(sorted(absent - set(marks[image.get("id")]))),
                patient=_text_of(image, "patient") or None,
                split=split_in(file.relative_to(base).as_posix()) if file.is_relative_to(base) else None,
                modality=modality_stated(options, _text_of(image, "modality"), listed),
                origin=str(path),
            )


def read_outlines(shapes: Sequence[Any], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Union of COCO outlines, bool [H, W]: polygons, or run lengths, compressed or not. Raises MedPLIBError: one is
    malformed."""
    mask = np.zeros(size, dtype=bool)
    for shape in shapes:
        if isinstance(shape, Mapping):
            codes = [checked_rle(shape)]
            if list(codes[0]["size"]) != list(size):
                raise MedPLIBError(
                    f"a mask encoding is of {codes[0]['size']}, its image of {list(size)}; mend the file"
                )
        else:
            polygons = [np.asarray(polygon, dtype=float).ravel() for polygon in shape]
            if not polygons or any(len(one) < 6 or len(one) % 2 or not np.isfinite(one).all() for one in polygons):
                raise MedPLIBError("a polygon has fewer than three points, or half of one; mend the annotation")
            codes = coco.frPyObjects([one.tolist() for one in polygons], *size)
        mask |= coco.decode(codes).any(axis=2)
    return mask
