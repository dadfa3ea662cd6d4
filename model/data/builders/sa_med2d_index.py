"""The index of SA-Med2D-20M: one row an image, with its masks, in a Parquet file that is never whole in memory."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as arrow

from model.data.builders.sa_med2d_listing import bucket_sizes, names_of
from model.data.builders.sa_med2d_source import (
    CLASS_FILE,
    LIST_FILE,
    ClassNames,
    ImageName,
    MaskName,
    merged_name,
    parse_image_name,
    parse_mask_name,
)
from model.data.builders.splits import SplitPlan
from model.data.builders.work import Output, Part, Piece

INDEX_FILE = "index.parquet"
BYTES_A_PIECE = 4 << 20  # of names: some 50,000
ROW_GROUP = 16_384
_MASK = arrow.struct(
    [
        ("class_id", arrow.int32()),
        ("class_name", arrow.string()),
        ("instance", arrow.int32()),
        ("file", arrow.string()),
    ]
)
_MERGED = arrow.struct([("class_id", arrow.int32()), ("class_name", arrow.string()), ("file", arrow.string())])
SCHEMA = arrow.schema(
    [
        ("path", arrow.string()),
        ("modality", arrow.string()),
        ("tag", arrow.string()),
        ("dataset", arrow.string()),
        ("case", arrow.string()),
        ("slice", arrow.string()),
        ("split", arrow.string()),
        ("masks", arrow.list_(_MASK)),
        ("merged", arrow.list_(_MERGED)),
    ]
)
"""Columns of the index. Paths start from the data set's folder; ``tag`` is the file name's first part (``mr_t1``),
``merged`` has one entry a class, ``class_name`` is null where the class list does not know the class."""
INDEX_OUTPUT = Output(INDEX_FILE, SCHEMA, ROW_GROUP)

_NAMELESS = "(no name)"
CLASS_COUNTS = "masks by class"
"""Group of the report's counts whose labels ``class_label`` makes."""


@dataclass(frozen=True)
class IndexContext:
    """What every piece of the index needs.

    Attributes:
        names: folder of the buckets.
        classes: names of the classes.
        plan: the splits.
        has_folders: files were listed; else the published list is all there is.
        has_list: the published list is there.
    """

    names: Path
    classes: ClassNames
    plan: SplitPlan
    has_folders: bool
    has_list: bool


def index_pieces(names: Path, bytes_a_piece: int = BYTES_A_PIECE) -> list[Piece]:
    """Neighbouring buckets, joined until a piece is worth its files."""
    pieces: list[Piece] = []
    held: list[int] = []
    size = 0
    for bucket, more in enumerate(bucket_sizes(names)):
        if held and size + more > bytes_a_piece:
            pieces.append(Piece(tuple(held), size))
            held, size = [], 0
        held.append(bucket)
        size += more
    return [*pieces, Piece(tuple(held), size)]


def class_label(modality: str, dataset: str, class_id: int, name: str | None) -> str:
    """A class in the report's counts."""
    return f"{modality} / {dataset} / {class_id} / {name or _NAMELESS}"


def read_class_label(label: str) -> tuple[str, str, int, str | None]:
    """What ``class_label`` was made of."""
    modality, dataset, number, name = label.split(" / ", 3)
    return modality, dataset, int(number), None if name == _NAMELESS else name


def index_buckets(buckets: Sequence[int], context: IndexContext, part: Part) -> None:
    """Rows of the images in some buckets; whatever does not fit is reported."""
    for bucket in buckets:
        images, masks = _found(bucket, context, part)
        rows = [_row(name, image, masks.pop(name[:-4], []), context) for name, image in sorted(images.items())]
        for stem, orphans in sorted(masks.items()):
            for mask in sorted(orphans):
                message = f"the mask {mask.file} has no image images/{stem}.png"
                part.find("mask_without_image", message, file=mask.file)
        for row in rows:
            _count(row, part)
        if rows:
            part.write_batch(INDEX_FILE, _batch(rows))


class _Row(NamedTuple):
    """One image; masks sorted by class and instance."""

    path: str
    image: ImageName
    split: str
    masks: list[MaskName]
    labels: dict[int, str | None]


def _found(bucket: int, context: IndexContext, part: Part) -> tuple[dict[str, ImageName], dict[str, list[MaskName]]]:
    """Images by file name and masks by image stem, as the folders (or else the published list) have them."""
    listed = [line.split(b"\t") for line in names_of(context.names, "list", bucket)]
    listed_images, listed_masks = [line[0] for line in listed], [name for line in listed for name in line[1:]]
    if context.has_folders:
        image_names, mask_names = (names_of(context.names, kind, bucket) for kind in ("images", "masks"))
    else:
        image_names, mask_names = listed_images, listed_masks
    images = dict(_parsed(image_names, "images", parse_image_name, part))
    masks: dict[str, list[MaskName]] = defaultdict(list)
    mask_files = set()
    for name, mask in _parsed(mask_names, "masks", parse_mask_name, part):
        masks[mask.image_stem].append(mask)
        mask_files.add(name)
    if context.has_folders and context.has_list:
        _compare("images", set(images), {_text(name) for name in listed_images}, part)
        _compare("masks", mask_files, {_text(name) for name in listed_masks}, part)
    return images, masks


def _parsed(names: Iterable[bytes], folder: str, parse: Any, part: Part) -> Iterator[tuple[str, Any]]:
    """Names with what they say; the ones that say nothing are reported."""
    for raw in names:
        name = _text(raw)
        parsed = parse(name)
        if parsed is None:
            wanted = "<modality>_<nn>--<data set>--<case>--<slice>"
            wanted += ".png" if folder == "images" else "--<class id>_<instance>.png"
            part.find("odd_name", f"{folder}/{name} is not named {wanted}; it is left out", file=f"{folder}/{name}")
            continue
        yield name, parsed


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def _compare(folder: str, here: set[str], listed: set[str], part: Part) -> None:
    """Tell what only the published list or only the folder has, one line a case: parts of the set may be missing."""
    for names, kind, told in (
        (listed - here, "not_in_folder", f"{LIST_FILE} names but {folder}/ lacks"),
        (here - listed, "not_in_list", f"{folder}/ holds but {LIST_FILE} does not name"),
    ):
        if names:
            part.count(kind.replace("_", " "), folder, len(names))
        for case, of_case in groupby(sorted(names), key=lambda name: name.split("--")[:3]):
            first, *more = of_case
            message = f"{told} {1 + len(more)} of {'--'.join(case)}, such as {first}"
            part.find(f"{folder}_{kind}", message, case="--".join(case), number=1 + len(more))


def _row(name: str, image: ImageName, masks: list[MaskName], context: IndexContext) -> _Row:
    masks.sort(key=lambda mask: (mask.class_id, mask.instance))
    known = context.classes.get(image.dataset, {})
    labels = {mask.class_id: known.get(mask.class_id) for mask in masks}
    return _Row(f"images/{name}", image, context.plan.of(image.dataset, image.case), masks, labels)


def _count(row: _Row, part: Part) -> None:
    image = row.image
    part.count("images", "all")
    part.count("masks", "all", len(row.masks))
    part.count("images by modality", image.modality)
    part.count("images by data set", image.dataset)
    part.count("images by split", row.split)
    numbers = Counter(mask.class_id for mask in row.masks)
    for class_id, number in numbers.items():
        part.count(CLASS_COUNTS, class_label(image.modality, image.dataset, class_id, row.labels[class_id]), number)
        if row.labels[class_id] is None:
            part.count(f"masks of classes that {CLASS_FILE} does not name", f"{image.dataset} {class_id}", number)
    if not row.masks:
        part.find("image_without_mask", f"{row.path} has no mask", file=row.path)


def _batch(rows: list[_Row]) -> arrow.RecordBatch:
    """The rows as columns: building them of Python objects row by row would take three times as long."""
    offsets, merged_offsets = [0], [0]
    mask_columns: tuple[list[Any], ...] = ([], [], [], [])
    merged_columns: tuple[list[Any], ...] = ([], [], [])
    for row in rows:
        for mask in row.masks:
            _append(mask_columns, mask.class_id, row.labels[mask.class_id], mask.instance, mask.file)
        for class_id, group in groupby(row.masks, key=lambda mask: mask.class_id):
            first = next(group)
            _append(merged_columns, class_id, row.labels[class_id], merged_name(first.image_stem, first.class_text))
        offsets.append(len(mask_columns[0]))
        merged_offsets.append(len(merged_columns[0]))
    columns = [
        [row.path for row in rows],
        *([getattr(row.image, field) for row in rows] for field in ("modality", "tag", "dataset", "case", "slice")),
        [row.split for row in rows],
        _lists(_MASK, offsets, mask_columns),
        _lists(_MERGED, merged_offsets, merged_columns),
    ]
    arrays = [
        column if isinstance(column, arrow.Array) else arrow.array(column, field.type)
        for column, field in zip(columns, SCHEMA, strict=True)
    ]
    return arrow.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def _append(columns: tuple[list[Any], ...], *values: Any) -> None:
    for column, value in zip(columns, values, strict=True):
        column.append(value)


def _lists(struct: Any, offsets: list[int], columns: tuple[list[Any], ...]) -> arrow.Array:
    arrays = [arrow.array(values, field.type) for values, field in zip(columns, struct, strict=True)]
    inner = arrow.StructArray.from_arrays(arrays, fields=list(struct))
    return arrow.ListArray.from_arrays(arrow.array(offsets, arrow.int32()), inner, type=arrow.list_(struct))
