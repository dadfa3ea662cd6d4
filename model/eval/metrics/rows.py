"""One prediction → the numbers that it adds to the sums of the metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from model.errors import MedPLIBError
from model.eval.metrics.definitions import mark
from model.eval.metrics.masks import Overlaps, best_matching, merged, overlaps, surface_scores
from model.eval.metrics.text import BLEU_ORDERS, ngram_matches, rouge_l, token_overlap, words
from model.eval.predictions import Prediction
from model.processing.answers import CLOSED_TYPES, closed_match, exact_match, options_of
from model.processing.masks import CocoRle, checked_rle
from model.processing.special_tokens import SEG_TOKEN

Row = dict[str, float]
Pair = tuple[int, int]
"""Intersection and union of two masks in pixels."""


@dataclass(frozen=True)
class RowSettings:
    """What is scored."""

    thresholds: tuple[float | None, ...] = (None,)  # of ``masks_at``; None are the masks as they were written
    surface: bool = False  # also compute HD95 and surface Dice, which decodes every mask
    tolerance_mm: float = 2.0  # of the surface Dice where the spacing is known
    tolerance_px: float = 2.0  # of the surface Dice where it is not


def is_closed(prediction: Prediction) -> bool:
    """Whether the row's answer type is that of a closed question."""
    return prediction.answer_type.strip().lower() in CLOSED_TYPES


def task_of(prediction: Prediction) -> str:
    """The row's task: what its metadata names, else ``grounding`` where the reference has masks, else ``vqa``."""
    named = prediction.metadata.get("task")
    if named:
        return str(named)
    return "grounding" if prediction.gt_masks or SEG_TOKEN in prediction.gt else "vqa"


@dataclass(frozen=True)
class RowScore:
    """What one row adds to each column (columns it does not name are 0), and its pairs of masks in order."""

    numbers: Row
    pairs: dict[float | None, list[Pair]]


def score_row(prediction: Prediction, settings: RowSettings) -> RowScore:
    """The numbers of one row.

    Raises:
        MedPLIBError: its masks are damaged, of another size than the reference, or lack a threshold that is scored.
    """
    row: Row = {"row": 1, "error": float(prediction.failed)}
    task = task_of(prediction)
    if task != "grounding":
        row |= _open_row(prediction) if not is_closed(prediction) else {"closed": 1, "closed_hit": _right(prediction)}
    try:
        masks = _mask_row(prediction, task, settings)
    except MedPLIBError as error:
        raise MedPLIBError(f"question {prediction.question_id}: {error}") from error
    return RowScore(row | masks.numbers, masks.pairs)


# --- text -----------------------------------------------------------------------------------------------------------


def _right(prediction: Prediction) -> bool:
    return not prediction.failed and closed_match(prediction.text, prediction.gt, options_of(prediction.prompt))


def _open_row(prediction: Prediction) -> Row:
    wanted = words(prediction.gt)
    if prediction.failed:
        return {"open": 1, **_bleu_row([], wanted)}
    said = words(prediction.text)
    _, recall, f1 = token_overlap(prediction.text, prediction.gt)
    return {
        "open": 1,
        "exact": exact_match(prediction.text, prediction.gt),
        "recall": recall,
        "f1": f1,
        "rouge_l": rouge_l(said, wanted),
        **_bleu_row(said, wanted),
    }


def _bleu_row(said: list[str], wanted: list[str]) -> Row:
    """Counts for BLEU of each order that the reference is long enough for: a shorter one has no such n-gram to meet."""
    row: Row = {}
    matches = ngram_matches(said, wanted)
    for order in BLEU_ORDERS[: len(wanted)]:
        row |= {f"bleu_{order}": 1, f"said_{order}": len(said), f"wanted_{order}": len(wanted)}
        for n in BLEU_ORDERS[:order]:
            row |= {f"match_{order}_{n}": matches[n - 1], f"ngram_{order}_{n}": max(0, len(said) - n + 1)}
    return row


# --- masks ----------------------------------------------------------------------------------------------------------


def _mask_row(prediction: Prediction, task: str, settings: RowSettings) -> RowScore:
    wanted = [checked_rle(mask) for mask in prediction.gt_masks or ()]
    decoded = {threshold: _decoded(prediction, threshold) for threshold in settings.thresholds}
    if task == "grounding" and prediction.gt_masks is None:
        return RowScore({"unscored": 1}, {})
    if not wanted and task != "grounding":
        any_decoded = {f"unasked_mask{mark(at)}": any(overlaps(masks, ()).predicted) for at, masks in decoded.items()}
        return RowScore({} if prediction.failed else {"words_only": 1, **any_decoded}, {})
    found = {threshold: overlaps(masks, wanted) for threshold, masks in decoded.items()}
    in_order = {
        threshold: [(index if index < len(decoded[threshold]) else None, index) for index in range(len(wanted))]
        for threshold in decoded
    }
    pairs = {threshold: [found[threshold].pair(*places) for places in in_order[threshold]] for threshold in decoded}
    if not any(any(areas.wanted) for areas in found.values()):
        return RowScore(_absent_row(prediction, found), pairs)
    row: Row = {
        "target": 1,
        "grounding": 1,
        "mask": len(wanted),
        "seg": _speaks_of_masks(prediction),
        "extra": len(prediction.masks) > len(wanted),
        "refused": not prediction.masks,
    }
    for threshold, masks in decoded.items():
        row |= _overlap_row(masks, wanted, found[threshold], pairs[threshold], prediction.failed, mark(threshold))
        if settings.surface:
            row |= _surface_row(prediction, masks, wanted, found[threshold], settings, mark(threshold))
    return RowScore(row, pairs)


def masks_by_threshold(prediction: Prediction) -> dict[float, list[Any]]:
    """The row's ``masks_at`` with numbers for keys; empty where it has none.

    Raises:
        MedPLIBError: a key is no number, or a value no list.
    """
    found: dict[float, list[Any]] = {}
    for name, masks in (prediction.masks_at or {}).items():
        try:
            threshold = float(name)
        except ValueError:
            threshold = 0.0
        if not 0 < threshold < 1 or not isinstance(masks, list):
            raise MedPLIBError(
                f'masks_at holds {name!r:.20}: {masks!r:.40}; expected lists by threshold, as "0.1": […]'
            )
        found[threshold] = masks
    return found


def _decoded(prediction: Prediction, threshold: float | None) -> list[CocoRle]:
    """Checked masks of one threshold; none for a row without an answer."""
    if prediction.failed:
        return []
    masks: Sequence[Any]
    if threshold is None:
        masks = [mask.get("rle") for mask in prediction.masks]
    else:
        by_threshold = masks_by_threshold(prediction)
        if threshold not in by_threshold and prediction.masks:
            has = ", ".join(f"{key:g}" for key in by_threshold) or "no others"
            raise MedPLIBError(
                f"its masks are not given at threshold {threshold:g} (given: {has}); "
                "ask vqa_infer for this threshold or score the masks as written"
            )
        masks = by_threshold.get(threshold, [])
    return [checked_rle(mask) for mask in masks]


def _speaks_of_masks(prediction: Prediction) -> bool:
    """Whether the answer says ``<SEG>`` or, of a model without it, has masks; forced ones do not count."""
    return SEG_TOKEN in prediction.text or any(mask.get("spoken", True) for mask in prediction.masks)


def _absent_row(prediction: Prediction, found: dict[float | None, Overlaps]) -> Row:
    if prediction.failed:
        return {"grounding": 1}
    row: Row = {"grounding": 1, "absent": 1, "false_seg": _speaks_of_masks(prediction)}
    for threshold, areas in found.items():
        at, any_decoded = mark(threshold), any(areas.predicted)
        row |= {f"false_mask{at}": any_decoded, f"row_iou{at}": not any_decoded}
        row[f"row_union{at}"] = sum(areas.predicted)
    return row


def _overlap_row(
    decoded: Sequence[CocoRle], wanted: Sequence[CocoRle], found: Overlaps, pairs: Sequence[Pair], failed: bool, at: str
) -> Row:
    row = _pair_sums(pairs, failed, at)
    if len(decoded) <= 1 and len(wanted) == 1:
        (inter, union), best = pairs[0], row
    else:
        inter, union = overlaps(merged(decoded), merged(wanted)).pair(0 if decoded else None, 0)
        best = _pair_sums(_matched_pairs(found), failed, at)
    row |= {f"dice_matched{at}": best[f"dice{at}"], f"iou_matched{at}": best[f"iou{at}"]}
    return row | {f"row_iou{at}": inter / union, f"row_inter{at}": inter, f"row_union{at}": union}


def _pair_sums(pairs: Sequence[Pair], failed: bool, at: str) -> Row:
    """Sums over reference masks; two empty masks agree, unless there was no answer to agree with."""
    agreeing = float(not failed)
    return {
        f"dice{at}": sum(2 * inter / (union + inter) if union else agreeing for inter, union in pairs),
        f"iou{at}": sum(inter / union if union else agreeing for inter, union in pairs),
        f"inter{at}": sum(inter for inter, _ in pairs),
        f"union{at}": sum(union for _, union in pairs),
    }


def _matched_pairs(found: Overlaps) -> list[Pair]:
    """The best one-to-one pairs by IoU, where missing predictions are empty masks."""
    present = len(found.predicted)
    empty = np.array(found.wanted) == 0
    gains = np.concatenate([found.ious(), np.tile(empty, (max(0, len(found.wanted) - present), 1))])
    return [found.pair(row if row < present else None, reference) for row, reference in best_matching(gains)]


def _surface_row(
    prediction: Prediction,
    decoded: Sequence[CocoRle],
    wanted: Sequence[CocoRle],
    found: Overlaps,
    settings: RowSettings,
    at: str,
) -> Row:
    known = prediction.spacing_mm is not None
    unit, tolerance = ("mm", settings.tolerance_mm) if known else ("px", settings.tolerance_px)
    row: Row = {f"surface_{unit}": 0, f"hd95_{unit}{at}": 0, f"nsd_{unit}{at}": 0}
    for index, reference in enumerate(wanted):
        if not found.wanted[index]:
            continue
        mask = decoded[index] if index < len(decoded) else None
        hd95, nsd = surface_scores(mask, reference, prediction.spacing_mm or (1.0, 1.0), tolerance)
        row[f"surface_{unit}"] += 1
        row[f"hd95_{unit}{at}"] += hd95
        row[f"nsd_{unit}{at}"] += nsd
    return row
