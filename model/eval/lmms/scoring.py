"""Answers of any model in the harness → the project's own metrics, the same numbers as ``medplib eval`` gives.

What a document adds to the sums of a metric goes through the harness row by row; the metric is computed from the sums
of all rows at the end, on however many processes they were answered.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from model.data.image_io import read_image, read_mask
from model.eval.metrics.definitions import metrics_for
from model.eval.metrics.scores import score_predictions
from model.eval.predictions import Prediction
from model.inference.answer import Mask
from model.processing.masks import bounding_box, decode_rle, encode_rle

TEXT_METRICS = (
    "closed_accuracy",
    "open_exact_match",
    "token_recall",
    "token_F1",
    "BLEU-1",
    "BLEU-4",
    "ROUGE-L",
)
MASK_METRICS = (
    "mDice",
    "mIoU",
    "micro_Dice",
    "mDice_matched",
    "gIoU",
    "cIoU",
    "SEG_emission_rate",
    "extra_mask_rate",
    "false_mask_rate",
)
BOX_METRIC = "box_mIoU"
"""mIoU of the masks' bounding boxes: what a model that can only name boxes is fairly compared by."""

Item = dict[str, Any]

_METRICS = {metric.name: metric for metric in metrics_for()}
_MASK = re.compile(r"<mask>(.*?)</mask>", re.DOTALL)
_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_BOX = re.compile(rf"[\[(]{','.join([_NUMBER] * 4)}[\])]")


# --- process_results ------------------------------------------------------------------------------------------------


def score_text(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, Item]:
    """What an answer in words adds to each metric; ``process_results`` of a task.

    Args:
        document: a row of ``documents``.
        results: the answer.
    """
    return _items(prediction_of(document, results[0]), TEXT_METRICS)


def score_masks(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, Item]:
    """What an answer with masks or boxes adds to each metric; see ``score_text``."""
    prediction = prediction_of(document, results[0])
    items = _items(prediction, MASK_METRICS)
    boxed = _items(_as_boxes(prediction), ("mIoU",))
    return {**items, BOX_METRIC: boxed["mIoU"]} if boxed else items


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


# --- answers --------------------------------------------------------------------------------------------------------


def prediction_of(document: Mapping[str, Any], answer: str) -> Prediction:
    """The row that ``vqa_infer`` would have written of this answer.

    Masks stand in the text as ``answering.text_with_masks`` writes them; what stands there and is no mask of the image
    is none. In an answer without any, ``[x1, y1, x2, y2]`` in pixels is a box, whose filled rectangle is taken for the
    mask.

    Args:
        document: a row of ``documents``.
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
    about = {name: document[name] for name in ("task", "kind", "modality", "structure", "dataset") if document[name]}
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


def _as_boxes(prediction: Prediction) -> Prediction:
    """The same with every mask replaced by its bounding box."""
    masks = [{**mask, "rle": _boxed(mask["rle"])} for mask in prediction.masks]
    return replace(prediction, masks=masks, gt_masks=[_boxed(rle) for rle in prediction.gt_masks or ()])


def _boxed(rle: dict[str, Any]) -> dict[str, Any]:
    mask = decode_rle(rle)
    x1, y1, x2, y2 = (int(side) for side in bounding_box(mask))
    filled = np.zeros_like(mask)
    filled[y1:y2, x1:x2] = True
    return encode_rle(filled)
