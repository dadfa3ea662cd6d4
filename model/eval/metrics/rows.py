"""What one prediction adds to the sums of the metrics: overlap of words, overlaps and outline distances of masks.

METEOR is left out: its synonyms need WordNet, which no library carries without a download or a Java program.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import regex
from pycocotools import mask as coco
from scipy.ndimage import binary_erosion, distance_transform_edt
from scipy.optimize import linear_sum_assignment

from model.errors import MedPLIBError
from model.eval.predictions import Prediction
from model.processing.answers import CLOSED_TYPES, LETTERS, SPACELESS, closed_correct, exact_match, options_of
from model.processing.masks import CocoRle, checked_rle
from model.processing.special_tokens import SEG_TOKEN

BLEU_ORDERS = (1, 2, 3, 4)

_TAG = regex.compile(r"</?(?:SEG|ref|region|sr|mask|image|im_start|im_end|gen_\d+)>")
_WORD = regex.compile(
    rf"\d{{1,3}}(?:,\d{{3}})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|{SPACELESS}\p{{M}}*|{LETTERS}(?:'{LETTERS})*"
)
_ARTICLES = frozenset(("a", "an", "the"))

Row = dict[str, float]
"""Column → number; columns that are not named are 0."""
Pair = tuple[int, int]
"""Intersection and union of two masks in pixels."""


@dataclass(frozen=True)
class RowSettings:
    """What is scored."""

    thresholds: tuple[float | None, ...] = (None,)  # of ``masks_at``; None are the masks as they were written
    surface: bool = False  # also compute HD95 and surface Dice, which decodes every mask
    tolerance_mm: float = 2.0  # of the surface Dice where the spacing is known
    tolerance_px: float = 2.0  # of the surface Dice where it is not


def mark(threshold: float | None) -> str:
    """Suffix of a threshold's columns and metrics; empty for masks as they were written."""
    return "" if threshold is None else f"@{threshold:g}"


def is_closed(prediction: Prediction) -> bool:
    """Whether the row's answer type is that of a closed question."""
    return prediction.answer_type.strip().lower() in CLOSED_TYPES


def task_of(prediction: Prediction) -> str:
    """The row's task: what its metadata names, else ``grounding`` where the reference has masks, else ``vqa``."""
    named = prediction.metadata.get("task")
    return str(named) if named else "grounding" if prediction.gt_masks or SEG_TOKEN in prediction.gt else "vqa"


def score_row(prediction: Prediction, settings: RowSettings) -> tuple[Row, dict[float | None, list[Pair]]]:
    """The numbers of one row, and by threshold its pairs of masks in order.

    Raises:
        MedPLIBError: its masks are damaged, of another size than the reference, or lack a threshold that is scored.
    """
    row: Row = {"row": 1, "error": float(prediction.failed)}
    task = task_of(prediction)
    if task != "grounding" and is_closed(prediction):
        right = not prediction.failed and closed_correct(prediction.text, prediction.gt, options_of(prediction.prompt))
        row |= {"closed": 1, "closed_hit": right}
    elif task != "grounding":
        row |= _open_row(prediction)
    try:
        found, pairs = _mask_row(prediction, task, settings)
    except MedPLIBError as error:
        raise MedPLIBError(f"question {prediction.question_id}: {error}") from error
    return row | found, pairs


# --- text -----------------------------------------------------------------------------------------------------------


def _open_row(prediction: Prediction) -> Row:
    wanted = words(prediction.gt)
    given = [] if prediction.failed else words(prediction.text)
    row: Row = {"open": 1}
    if not prediction.failed:
        _, recall, f1 = token_overlap(prediction.text, prediction.gt)
        exact = exact_match(prediction.text, prediction.gt)
        row |= {"exact": exact, "recall": recall, "f1": f1, "rouge_l": rouge_l(given, wanted)}
    matches = ngram_matches(given, wanted)
    for order in BLEU_ORDERS[: len(wanted)]:  # a shorter reference has no such n-gram to match
        row |= {f"bleu_{order}": 1, f"given_{order}": len(given), f"wanted_{order}": len(wanted)}
        for n in BLEU_ORDERS[:order]:
            row |= {f"match_{order}_{n}": matches[n - 1], f"ngram_{order}_{n}": max(0, len(given) - n + 1)}
    return row


def words(text: str) -> list[str]:
    """Words and numbers of a text: Unicode NFKC, case folded, without markup and punctuation.

    ``1,000`` is the number 1000, ``3.5cm`` is 3.5 and cm, ``x-ray`` is two words, ``can't`` is one. Chinese, Japanese,
    Korean and Thai give a word for each character.
    """
    plain = unicodedata.normalize("NFKC", _TAG.sub(" ", text)).casefold().replace("’", "'")
    return [word.replace(",", "") for word in _WORD.findall(plain)]


def token_overlap(answer: str, reference: str) -> tuple[float, float, float]:
    """Precision, recall and F1 of the words without articles, each counted as often as it occurs.

    Two texts without words score 1 if they are the same characters; a text with words against one without scores 0.
    """
    given, wanted = ([w for w in found if w not in _ARTICLES] or found for found in (words(answer), words(reference)))
    if not given or not wanted:
        same = float(not given and not wanted and answer.split() == reference.split())
        return same, same, same
    shared = (Counter(given) & Counter(wanted)).total()
    return shared / len(given), shared / len(wanted), 2 * shared / (len(given) + len(wanted))


def ngram_matches(answer: Sequence[str], reference: Sequence[str]) -> tuple[int, ...]:
    """For the orders 1 to 4, n-grams of the answer that are in the reference, clipped to their number there."""

    def ngrams(tokens: Sequence[str], order: int) -> Iterator[tuple[str, ...]]:
        return zip(*(tokens[start:] for start in range(order)), strict=False)

    return tuple((Counter(ngrams(answer, n)) & Counter(ngrams(reference, n))).total() for n in BLEU_ORDERS)


def rouge_l(answer: Sequence[str], reference: Sequence[str]) -> float:
    """F1 of the longest common subsequence of two lists of words; two empty ones score 1."""
    if not answer or not reference:
        return float(not answer and not reference)
    places: dict[str, int] = {}  # a row of the usual table is one integer, a bit for each place
    for index, word in enumerate(answer):
        places[word] = places.get(word, 0) | 1 << index
    row = full = (1 << len(answer)) - 1
    for word in reference:
        hit = row & places.get(word, 0)
        row = (row + hit | row - hit) & full
    return 2 * (len(answer) - row.bit_count()) / (len(answer) + len(reference))


# --- masks ----------------------------------------------------------------------------------------------------------


def _mask_row(prediction: Prediction, task: str, settings: RowSettings) -> tuple[Row, dict[float | None, list[Pair]]]:
    wanted = [checked_rle(mask) for mask in prediction.gt_masks or ()]
    decoded = {threshold: _decoded(prediction, threshold) for threshold in settings.thresholds}
    if task == "grounding" and prediction.gt_masks is None:
        return {"unscored": 1}, {}
    found = {threshold: overlaps(masks, wanted) for threshold, masks in decoded.items()}
    some = {threshold: bool(areas[0].any()) for threshold, areas in found.items()}  # a mask with pixels
    if not wanted and task != "grounding":
        unasked = {f"unasked_mask{mark(at)}": some[at] for at in decoded}
        return {} if prediction.failed else {"words_only": 1, **unasked}, {}
    row: Row = {"grounding": 1}
    # of a model without <SEG> a mask counts as the word; masks decoded without being asked for do not
    says_seg = SEG_TOKEN in prediction.text or any(mask.get("spoken", True) for mask in prediction.masks)
    pairs: dict[float | None, list[Pair]] = {}
    for at, (ours, theirs, inter) in found.items():
        ordered = range(len(wanted))
        pairs[at] = [(int(inter[k, k]), int(ours[k] + theirs[k] - inter[k, k])) for k in ordered]
        if theirs.any():
            row |= _overlap_row(decoded[at], wanted, found[at], pairs[at], prediction.failed, mark(at))
            if settings.surface:
                row |= _surface_row(prediction, decoded[at], wanted, theirs, settings, mark(at))
        elif not prediction.failed:
            row |= {f"false_mask{mark(at)}": some[at], f"row_iou{mark(at)}": not some[at]}
            row[f"row_union{mark(at)}"] = int(ours.sum())
    if any(theirs.any() for _, theirs, _ in found.values()):
        row |= {"target": 1, "mask": len(wanted), "seg": says_seg, "refused": not prediction.masks}
        row["extra"] = len(prediction.masks) > len(wanted)
    elif not prediction.failed:
        row |= {"absent": 1, "false_seg": says_seg}
    return row, pairs


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
    if threshold is None:
        return [checked_rle(mask.get("rle")) for mask in prediction.masks]  # type: ignore[arg-type]
    by_threshold = masks_by_threshold(prediction)
    if threshold not in by_threshold and prediction.masks:
        has = ", ".join(f"{key:g}" for key in by_threshold) or "no others"
        raise MedPLIBError(
            f"its masks are not given at threshold {threshold:g} (given: {has}); "
            "ask vqa_infer for this threshold or score the masks as written"
        )
    return [checked_rle(mask) for mask in by_threshold.get(threshold, [])]


def overlaps(predicted: Sequence[CocoRle], wanted: Sequence[CocoRle]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Areas of P predicted and G reference masks [max(P, G)], [G], and intersections [max(P, G), G], in pixels.

    The masks are checked and compared as run lengths; missing predictions are empty masks.

    Raises:
        MedPLIBError: the masks differ in size.
    """
    sizes = {(mask["size"][0], mask["size"][1]) for mask in (*predicted, *wanted)}
    if len(sizes) > 1:
        found = " and ".join(f"{height}×{width}" for height, width in sorted(sizes))
        swapped = len({tuple(sorted(size)) for size in sizes}) == 1
        hint = "is size given as [width, height]? COCO's is [height, width]" if swapped else "resize the predictions"
        raise MedPLIBError(f"masks of one question are {found}, but must have the size of the reference; {hint}")
    rows = max(len(predicted), len(wanted))
    ours, theirs = np.zeros(rows, dtype=np.int64), np.zeros(len(wanted), dtype=np.int64)
    ours[: len(predicted)] = [coco.area(mask) for mask in predicted]
    theirs[:] = [coco.area(mask) for mask in wanted]
    inter = np.zeros((rows, len(wanted)), dtype=np.int64)
    for p, g in np.argwhere((ours[:, None] > 0) & (theirs > 0)):
        inter[p, g] = coco.area(coco.merge([predicted[p], wanted[g]], True))
    return ours, theirs, inter


def _overlap_row(
    decoded: Sequence[CocoRle],
    wanted: Sequence[CocoRle],
    found: tuple[np.ndarray, np.ndarray, np.ndarray],
    pairs: Sequence[Pair],
    failed: bool,
    at: str,
) -> Row:
    row = _pair_sums(pairs, failed, at)
    if len(decoded) <= 1 and len(wanted) == 1:
        (inter, union), best = pairs[0], row
    else:
        ours, theirs, both = (array.tolist() for array in overlaps(merged(decoded), merged(wanted)))
        inter, union = both[0][0], ours[0] + theirs[0] - both[0][0]
        best = _pair_sums(best_pairs(*found), failed, at)
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


def merged(masks: Sequence[CocoRle]) -> list[CocoRle]:
    """The masks' union as a list of one mask; an empty list stays empty."""
    return list(masks) if len(masks) < 2 else [coco.merge(list(masks))]


def best_pairs(ours: np.ndarray, theirs: np.ndarray, inter: np.ndarray) -> list[Pair]:
    """Intersection and union for each reference mask under the one-to-one matching with the largest sum of IoUs."""
    unions = ours[:, None] + theirs - inter
    gains = np.where(unions == 0, 1.0, inter / np.maximum(unions, 1))  # two empty masks agree
    rows, columns = linear_sum_assignment(gains, maximize=True)
    places = sorted(zip(columns.tolist(), rows.tolist(), strict=True))
    return [(int(inter[row, column]), int(unions[row, column])) for column, row in places]


def _surface_row(
    prediction: Prediction,
    decoded: Sequence[CocoRle],
    wanted: Sequence[CocoRle],
    areas: np.ndarray,
    settings: RowSettings,
    at: str,
) -> Row:
    known = prediction.spacing_mm is not None
    unit, tolerance = ("mm", settings.tolerance_mm) if known else ("px", settings.tolerance_px)
    scores = [
        surface_scores(decoded[k] if k < len(decoded) else None, one, prediction.spacing_mm or (1.0, 1.0), tolerance)
        for k, one in enumerate(wanted)
        if areas[k]
    ]
    sums = [sum(values) for values in zip(*scores, strict=True)]
    return {f"surface_{unit}": len(scores), f"hd95_{unit}{at}": sums[0], f"nsd_{unit}{at}": sums[1]}


def surface_scores(
    predicted: CocoRle | None, wanted: CocoRle, spacing: tuple[float, float] = (1.0, 1.0), tolerance: float = 2.0
) -> tuple[float, float]:
    """HD95 (in the unit of the spacing) and surface Dice in [0, 1] of a predicted and a non-empty reference mask.

    HD95 is the larger of the two directed 95th percentiles of outline distances. The surface Dice is the share of
    outline pixels of both masks that lie within the tolerance of the other outline. Where nothing is predicted, HD95
    is the diagonal of the image and the surface Dice 0, so that a missing mask is never better than a poor one.

    Args:
        predicted: checked run lengths of the reference's size; None or an empty mask where nothing is predicted.
        wanted: checked run lengths with at least one pixel.
        spacing: row and column distance of pixels, (1, 1) for distances in pixels.
        tolerance: in the unit of the spacing.
    """
    if predicted is None or not int(coco.area(predicted)):
        height, width = wanted["size"]
        return math.hypot(height * spacing[0], width * spacing[1]), 0.0
    boxes = np.asarray(coco.toBbox([predicted, wanted]))
    x1, y1 = boxes[:, :2].min(axis=0).astype(int)
    x2, y2 = (boxes[:, :2] + boxes[:, 2:]).max(axis=0).astype(int)
    left, right = (coco.decode(mask)[y1:y2, x1:x2].astype(bool) for mask in (predicted, wanted))
    # outline: pixels with one of the four neighbours outside the mask; beyond the array is outside
    first, second = (mask & ~binary_erosion(mask) for mask in (left, right))
    to_second, to_first = (distance_transform_edt(~outline, sampling=spacing) for outline in (second, first))
    distances = to_second[first], to_first[second]
    hd95 = max(float(np.percentile(one, 95)) for one in distances)
    return hd95, sum(np.count_nonzero(one <= tolerance) for one in distances) / sum(one.size for one in distances)
