"""Records of a suite → documents of the harness, shown as they are to MedPLIB and drawn to any other model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from model.data.image_io import read_image, read_mask
from model.data.records import open_records
from model.errors import MedPLIBError
from model.eval.lmms.answering import PointedRegion
from model.eval.questions import Question, questions_of
from model.eval.suite import DataSet, load_suite
from model.processing.special_tokens import REGION_MARKER

Document = dict[str, Any]

_OUTLINE = (0, 255, 0)
_OUTLINED = "outlined in green"
_ABOUT = ("task", "kind", "modality", "structure", "dataset")


# --- process_docs ---------------------------------------------------------------------------------------------------


def vqa_documents(sources: Any) -> Any:
    """Questions about a whole image; ``process_docs`` of a task.

    Args:
        sources: ``datasets.Dataset`` whose rows name suites: ``{"suite": name or YAML file}``.

    Returns:
        ``datasets.Dataset`` with one row a question: the fields of ``document_of``.

    Raises:
        MedPLIBError: a suite or its files are not there, a record cannot be asked, or there is no such question.
    """
    return _dataset(_documents(sources, "vqa"))


def region_documents(sources: Any) -> Any:
    """Questions that point at a region of the image; see ``vqa_documents``."""
    return _dataset(_documents(sources, "region"))


def grounding_documents(sources: Any) -> Any:
    """Questions for masks, absent targets included; see ``vqa_documents``."""
    return _dataset(_documents(sources, "grounding"))


def choice_documents(sources: Any) -> Any:
    """Closed questions about a whole image with ``choices`` and ``gold``, the place of the right one.

    The choices are the reference answers of all questions of the kind, sorted; a kind with one answer has no choice.
    See ``vqa_documents``.
    """
    closed = [document for document in _documents(sources, "vqa") if document["answer_type"] == "closed"]
    answers: dict[str, set[str]] = defaultdict(set)
    for document in closed:
        answers[document["kind"]].add(document["answer"])
    choices = {kind: sorted(found) for kind, found in answers.items() if len(found) > 1}
    return _dataset(
        {**document, "choices": choices[kind], "gold": choices[kind].index(document["answer"])}
        for document in closed
        if (kind := document["kind"]) in choices
    )


def _dataset(documents: Iterable[Document]) -> Any:
    from datasets import Dataset

    rows = list(documents)
    if not rows:
        raise MedPLIBError("the data has no question of this task; give data that has, or leave the task out")
    return Dataset.from_list(rows)


def _documents(sources: Iterable[Mapping[str, Any]], task: str) -> Iterator[Document]:
    for source in sources:
        for item in load_suite(source["suite"]).sets:
            if item.layout != "medplib":
                raise MedPLIBError(
                    f"{item.title} is in the layout {item.layout}; tasks are made of sets in MedPLIB's own layout"
                )
            yield from _documents_of(item, task)


def _documents_of(item: DataSet, task: str) -> Iterator[Document]:
    for file in item.files():
        for number, record in enumerate(open_records(file)):
            for question in questions_of(record, number, item.images, item.answer_type or None):
                if question.metadata.get("task") == task:
                    yield document_of(question, file)


def document_of(question: Question, file: Path) -> Document:
    """One question as a flat row.

    Args:
        question: of a record.
        file: it stands in, for the error message.

    Raises:
        MedPLIBError: it cannot be asked, or goes on a conversation, which the harness's single question cannot tell.
    """
    reference = question.reference
    error = question.error or ("it is a later turn of a conversation" if question.history else None)
    if error:
        raise MedPLIBError(f"{file}, record {question.number} ({reference.question_id}), cannot be asked: {error}")
    return {
        "question_id": str(reference.question_id),
        "image": str(question.image),
        "image_path": question.image_path,
        "question": reference.prompt,
        "answer": reference.gt,
        "answer_type": question.answer_type,
        **{name: str(question.metadata.get(name, "")) for name in _ABOUT},
        "regions": [str(path) for path in question.regions],
        "masks": [str(path) for path in question.masks or ()],
    }


# --- doc_to_… -------------------------------------------------------------------------------------------------------


def visuals(document: Document, lmms_eval_specific_kwargs: Mapping[str, Any] | None = None) -> list[Any]:
    """What the model sees: file and region masks where ``native`` is set, else a picture with regions outlined.

    Args:
        document: a row.
        lmms_eval_specific_kwargs: the task's settings for the model.

    Raises:
        MedPLIBError: a file cannot be read.
    """
    if (lmms_eval_specific_kwargs or {}).get("native"):
        return [document["image"], *(PointedRegion(path) for path in document["regions"])]
    pixels = read_image(document["image"]).pixels.copy()
    for path in document["regions"]:
        _outline(pixels, read_mask(path))
    return [Image.fromarray(pixels)]


def _outline(pixels: np.ndarray, region: np.ndarray) -> None:
    outlines, _ = cv2.findContours(region.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(pixels, outlines, -1, _OUTLINE, max(1, min(pixels.shape[:2]) // 128))


def asked(document: Document, lmms_eval_specific_kwargs: Mapping[str, Any] | None = None) -> str:
    """The question, between the task's ``pre_prompt`` and ``post_prompt``.

    Where it is not ``native``, a region is what is outlined, and ``{width}`` and ``{height}`` of the post-prompt are
    those of the image in pixels.

    Args:
        document: a row.
        lmms_eval_specific_kwargs: the task's settings for the model.
    """
    chosen = lmms_eval_specific_kwargs or {}
    before, after = chosen.get("pre_prompt", ""), chosen.get("post_prompt", "")
    question = document["question"]
    if not chosen.get("native"):
        question = question.replace(REGION_MARKER, _OUTLINED)
    if "{width}" in after:
        height, width = read_image(document["image"]).size
        after = after.replace("{width}", str(width)).replace("{height}", str(height))
    return f"{before}{question}{after}"
