"""The questions of a data set as one file of records in the project's own layout, whatever layout they came in.

What a run was asked stands beside its answers, so that an interrupted run goes on with the same questions, and anybody
can ask them again with ``vqa_infer``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from model.data.records import open_records
from model.errors import MedPLIBError
from model.eval.suite import DataSet, Layout

Record = Mapping[str, Any]

_MODALITIES = {
    "ct": "ct",
    "ct(computed tomography)": "ct",
    "mri": "mr",
    "mr (mag-netic resonance imaging)": "mr",
    "mr (magnetic resonance imaging)": "mr",
    "x-ray": "x_ray",
    "fundus photography": "fundus",
    "dermoscopy": "dermoscopy",
    "endoscopy": "endoscopy",
    "ultrasound": "ultrasound",
}
"""Names that public sets use → those of the project's file names (reference §8)."""
_IMAGE_ENDINGS = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"II*\x00": ".tif", b"MM\x00*": ".tif", b"BM": ".bmp"}


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
    if row["q_lang"] != "en":
        return None
    return _question(
        f"slake-{row['qid']}",
        row["img_name"],
        row["question"],
        row["answer"],
        row["answer_type"],
        kind=row.get("content_type"),
        modality=row.get("modality"),
    )


def _vqa_rad(row: Record) -> Record | None:
    """The test half is the one whose phrases are marked so."""
    if not str(row["phrase_type"]).startswith("test"):
        return None
    return _question(
        f"vqa-rad-{row['qid']}",
        row["image_name"],
        row["question"],
        row["answer"],
        row["answer_type"],
        kind=row.get("question_type"),
    )


def _image_question_answer(row: Record) -> Record | None:
    return _question(row["id"], row["image"], row["question"], row["answer"], "")


def _omnimedvqa(row: Record) -> Record | None:
    """The options stand in the question, since the answer is one of them."""
    options = [str(row[key]) for key in ("option_A", "option_B", "option_C", "option_D") if row.get(key)]
    choice = f"{row['question']} Answer with one of these: {'; '.join(options)}." if options else row["question"]
    return _question(
        row["question_id"],
        row["image_path"],
        choice,
        row["gt_answer"],
        "closed",
        kind=row.get("question_type"),
        modality=row.get("modality_type"),
        dataset=row.get("dataset"),
    )


_LAYOUTS: dict[Layout, Callable[[Record], Record | None]] = {
    "medplib": _medplib,
    "slake": _slake,
    "vqa_rad": _vqa_rad,
    "parquet": _image_question_answer,
    "omnimedvqa": _omnimedvqa,
}


def _question(
    question_id: object, image: object, question: object, answer: object, answer_type: object, **known: object
) -> Record:
    """One question about one image. Where the source does not say, yes and no make a question closed."""
    answered = str(answer).strip()
    told = str(answer_type).strip().lower()
    record: dict[str, Any] = {
        "id": str(question_id),
        "image": str(image),
        "conversations": [
            {"from": "human", "value": f"<image>\n{str(question).strip()}"},
            {"from": "gpt", "value": answered},
        ],
        "answer_type": told or ("closed" if answered.lower() in ("yes", "no") else "open"),
        "task": "vqa",
    }
    for key, value in known.items():
        if value:
            text = str(value).strip()
            lower = text.lower()
            record[key] = _MODALITIES.get(lower, "_".join(lower.split())) if key == "modality" else text
    return record


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
                name = _write_picture(row["image"]["bytes"], pictures)
                yield {**row, "id": f"{file.stem}-{number}", "image": name}
                number += 1
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        raise MedPLIBError(
            f"{file} has no readable columns image, question and answer ({str(error).splitlines()[0]}); "
            "give the Parquet files that its source publishes"
        ) from error


def _write_picture(content: bytes, folder: Path) -> str:
    ending = next((end for start, end in _IMAGE_ENDINGS.items() if content.startswith(start)), ".img")
    name = hashlib.sha256(content).hexdigest()[:24] + ending
    if not (folder / name).is_file():
        partial = folder / f".{name}.{os.getpid()}"
        partial.write_bytes(content)
        partial.replace(folder / name)
    return name
