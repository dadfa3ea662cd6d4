"""The questions of a data set as one file of records in the project's own layout, whatever layout they came in.

What a run was asked stands beside its answers, so that an interrupted run goes on with the same questions, and anybody
can ask them again with ``vqa_infer``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from model.data.builders.vqa_rows import (
    image_question_answer,
    omnimedvqa,
    slake,
    vqa_rad,
    vqa_rad_split,
    write_picture,
)
from model.data.records import open_records
from model.errors import MedPLIBError
from model.eval.suite import DataSet, Layout

Record = Mapping[str, Any]


def write_questions(item: DataSet, folder: Path) -> tuple[Path, Path]:
    """Write the records of a data set to ``folder/NAME.jsonl``.

    Args:
        item: the data set.
        folder: where the file goes, and a folder ``NAME`` with the images of files that hold them inside.

    Returns:
        The file, and the folder that the paths in it start from.

    Raises:
        MedPLIBError: a file of the set is missing or is not of its layout, or there is no question in them.
    """
    files = item.files()
    pictures = folder / item.name
    images = pictures if item.layout == "parquet" else item.images
    folder.mkdir(parents=True, exist_ok=True)
    partial, written = folder / f".{item.name}.{os.getpid()}", 0  # processes of one launch write the same
    with partial.open("w", encoding="utf-8") as stream:
        for record in _records(item, files, pictures):
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
            written += 1
    if not written:
        raise MedPLIBError(f"{item.title} has no question in {', '.join(map(str, files))}; check its files and layout")
    return partial.replace(folder / f"{item.name}.jsonl"), images


def _records(item: DataSet, files: list[Path], pictures: Path) -> Iterator[Record]:
    """The questions of all files, each with an id where several files could give the same one."""
    for file in files:
        rows = _parquet(file, pictures) if item.layout == "parquet" else open_records(file)
        for number, row in enumerate(rows):
            try:
                record = _LAYOUTS[item.layout](row)
            except (KeyError, TypeError, ValueError) as error:
                raise MedPLIBError(
                    f"{file}, record {number}, is not of the layout {item.layout} ({type(error).__name__}: {error}); "
                    "give the file that its source publishes, or name another layout"
                ) from error
            if record is None:
                continue
            if item.answer_type and not record.get("answer_type"):
                record = {**record, "answer_type": item.answer_type}
            yield {"id": f"{file.stem}-{number}", **record} if len(files) > 1 and "id" not in record else record


def _medplib(row: Record) -> Record | None:
    return row


def _slake(row: Record) -> Record | None:
    """SLAKE asks in English and Chinese; the English half is what is reported."""
    return slake(row) if row["q_lang"] == "en" else None


def _vqa_rad(row: Record) -> Record | None:
    """The test half is what is reported."""
    return vqa_rad(row) if vqa_rad_split(row) == "test" else None


_LAYOUTS: dict[Layout, Callable[[Record], Record | None]] = {
    "medplib": _medplib,
    "slake": _slake,
    "vqa_rad": _vqa_rad,
    "parquet": image_question_answer,
    "omnimedvqa": omnimedvqa,
}


def _parquet(file: Path, pictures: Path) -> Iterable[Record]:
    """Rows of a file with the columns ``image`` (encoded bytes), ``question`` and ``answer``; images become files."""
    import pyarrow
    import pyarrow.parquet

    pictures.mkdir(parents=True, exist_ok=True)
    try:
        table = pyarrow.parquet.ParquetFile(file)
        batches = table.iter_batches(batch_size=64, columns=["image", "question", "answer"], use_threads=False)
        number = 0
        for batch in batches:
            for row in batch.to_pylist():
                name = write_picture(row["image"]["bytes"], pictures)
                yield {**row, "id": f"{file.stem}-{number}", "image": name}
                number += 1
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        raise MedPLIBError(
            f"{file} has no readable columns image, question and answer ({str(error).splitlines()[0]}); "
            "give the Parquet files that its source publishes"
        ) from error
