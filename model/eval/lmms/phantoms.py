"""Our phantoms as tasks of lmms-eval: records of a suite as its documents, answers of any model as our metrics.

What a document adds to the sums of a metric goes through the harness row by row; the metric is computed from the sums
of all rows at the end, on however many processes they were answered: the same numbers as ``medplib eval`` gives.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from model.data.image_io import read_image, read_mask
from model.data.records import open_records
from model.errors import MedPLIBError
from model.eval.metrics.definitions import metrics_for
from model.eval.metrics.scores import score_predictions
from model.eval.predictions import Prediction
from model.eval.questions import Question, questions_of
from model.eval.suite import load_suite
from model.inference.answer import Answer, Mask
from model.inference.regions import Region
from model.processing.masks import bounding_box, decode_rle, encode_rle
from model.processing.special_tokens import REGION_MARKER

Document = dict[str, Any]
Item = dict[str, Any]

TEXT_METRICS = ("closed_accuracy", "open_exact_match", "token_recall", "token_F1", "BLEU-1", "BLEU-4", "ROUGE-L")
MASK_METRICS = (
    *("mDice", "mIoU", "micro_Dice", "mDice_matched", "gIoU", "cIoU"),
    *("SEG_emission_rate", "extra_mask_rate", "false_mask_rate"),
)
BOX_METRIC = "box_mIoU"
"""mIoU of the masks' bounding boxes: what a model that can only name boxes is fairly compared by."""
_ABOUT = ("task", "kind", "modality", "structure", "dataset")


# --- process_docs -----------------------------------------------------------------------------------------------------


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
    for item in (item for source in sources for item in load_suite(source["suite"]).sets):
        if item.layout != "medplib":
            raise MedPLIBError(
                f"{item.title} is in the layout {item.layout}; tasks are made of sets in MedPLIB's own layout"
            )
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
        MedPLIBError: it cannot be asked, or continues a conversation, which the harness's single question cannot hold.
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


# --- doc_to_visual, doc_to_text: as they are to MedPLIB (``native``), drawn to any other model ------------------------


@dataclass(frozen=True)
class PointedRegion:
    """A visual that stands for a ``<region></region>`` of the question: a mask file, array, box or point."""

    region: Region


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
        region = read_mask(path).astype(np.uint8)
        outlines, _ = cv2.findContours(region, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(pixels, outlines, -1, (0, 255, 0), max(1, min(pixels.shape[:2]) // 128))
    return [Image.fromarray(pixels)]


def asked(document: Document, lmms_eval_specific_kwargs: Mapping[str, Any] | None = None) -> str:
    """The question, between the task's ``pre_prompt`` and ``post_prompt``.

    Where it is not ``native``, a region is what is outlined, and ``{width}`` and ``{height}`` of the post-prompt are
    those of the image in pixels.
    """
    chosen = lmms_eval_specific_kwargs or {}
    before, after = chosen.get("pre_prompt", ""), chosen.get("post_prompt", "")
    question = document["question"]
    if not chosen.get("native"):
        question = question.replace(REGION_MARKER, "outlined in green")
    if "{width}" in after:
        height, width = read_image(document["image"]).size
        after = after.replace("{width}", str(width)).replace("{height}", str(height))
    return f"{before}{question}{after}"


# --- process_results, aggregation -------------------------------------------------------------------------------------

_METRICS = {metric.name: metric for metric in metrics_for()}


def score_text(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, Item]:
    """What an answer in words adds to each metric; ``process_results`` of a task.

    Args:
        document: a row.
        results: the answer.
    """
    return _items(prediction_of(document, results[0]), TEXT_METRICS)


def score_masks(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, Item]:
    """What an answer with masks or boxes adds to each metric; see ``score_text``."""
    prediction = prediction_of(document, results[0])
    masks = [{**mask, "rle": _boxed(mask["rle"])} for mask in prediction.masks]
    in_boxes = replace(prediction, masks=masks, gt_masks=[_boxed(rle) for rle in prediction.gt_masks or ()])
    boxed = _items(in_boxes, ("mIoU",))
    return _items(prediction, MASK_METRICS) | ({BOX_METRIC: boxed["mIoU"]} if boxed else {})


def total(items: Sequence[Item]) -> float:
    """A metric over all rows; ``aggregation`` of every metric of the tasks."""
    metric = _METRICS[items[0]["metric"]]
    return float(metric.compute(lambda column: np.asarray(sum(item["sums"].get(column, 0.0) for item in items))))


def _items(prediction: Prediction, names: Sequence[str]) -> dict[str, Item]:
    """Per metric the columns it reads and, for the harness's standard errors, its value for this row alone."""
    scores = score_predictions([prediction], samples=0)
    items: dict[str, Item] = {}
    for metric in scores.metrics:
        if metric.name in names and scores.total(metric.count):
            columns: dict[str, float] = {}

            def read(name: str, columns: dict[str, float] = columns) -> np.ndarray:
                columns[name] = scores.total(name)
                return np.asarray(columns[name])

            value = float(metric.compute(read))
            items[metric.name] = {"metric": metric.name, "sums": columns}
            if not math.isnan(value):
                items[metric.name]["score"] = value
    return items


# --- answers ----------------------------------------------------------------------------------------------------------

_MASK = re.compile(r"<mask>(.*?)</mask>", re.DOTALL)
_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_BOX = re.compile(rf"[\[(]{','.join([_NUMBER] * 4)}[\])]")


def text_with_masks(answer: Answer) -> str:
    """The text, and behind it its masks as ``<mask>{…}</mask>`` in the order of their ``<SEG>``.

    The harness hands text to the scoring of a task and nothing else. Data files write the paths of masks in the same
    place (reference §8); here stands what ``Mask.to_dict`` gives, as JSON.
    """
    masks = (json.dumps(mask.to_dict(), ensure_ascii=False).replace("</", "<\\/") for mask in answer.masks)
    return answer.text + "".join(f"<mask>{mask}</mask>" for mask in masks)


def prediction_of(document: Mapping[str, Any], answer: str) -> Prediction:
    """The row that ``vqa_infer`` would have written of this answer.

    Masks stand in the text as ``text_with_masks`` writes them; what stands there and is no mask of the image is none.
    In an answer without any, ``[x1, y1, x2, y2]`` in pixels is a box, whose filled rectangle is taken for the mask.

    Args:
        document: a row.
        answer: of any model.

    Raises:
        MedPLIBError: a reference mask cannot be read.
    """
    grounding = document["task"] == "grounding"
    text = _MASK.sub("", answer).strip()
    written, boxes = _MASK.findall(answer), _BOX.findall(text) if grounding else []
    masks: list[dict[str, Any]] = []
    if written or boxes:
        size = read_image(document["image"]).size
        masks = [mask for one in written if (mask := _mask(one, size))]
        masks = masks or [_box_mask(numbers, size).to_dict() for numbers in boxes]
    about = {name: document[name] for name in _ABOUT if document[name]}
    return Prediction(
        question_id=document["question_id"],
        image_path=document["image_path"],
        prompt=document["question"],
        gt=document["answer"],
        text=text,
        answer_type=document["answer_type"],
        metadata={**about, "turn": 0},
        masks=masks,
        gt_masks=[encode_rle(read_mask(path)) for path in document["masks"]] if grounding else None,
    )


def _mask(text: str, size: tuple[int, int]) -> dict[str, Any] | None:
    """A mask as ``Mask.to_dict`` writes it; None for anything else that a model put between the tags."""
    try:
        mask = json.loads(text)
        pixels = decode_rle(mask["rle"])
    except (ValueError, TypeError, KeyError):  # MedPLIBError is a ValueError
        return None
    return {**mask, "rle": encode_rle(pixels)} if pixels.shape == size else None


def _box_mask(numbers: Sequence[str], size: tuple[int, int]) -> Mask:
    x1, y1, x2, y2 = (float(number) for number in numbers)
    mask = np.zeros(size, dtype=bool)
    mask[max(0, math.floor(y1)) : max(0, math.ceil(y2)), max(0, math.floor(x1)) : max(0, math.ceil(x2))] = True
    return Mask.from_array(mask, "", 1.0)


def _boxed(rle: dict[str, Any]) -> dict[str, Any]:
    """A mask's bounding box, filled."""
    mask = decode_rle(rle)
    x1, y1, x2, y2 = (int(side) for side in bounding_box(mask))
    filled = np.zeros_like(mask)
    filled[y1:y2, x1:x2] = True
    return encode_rle(filled)
