"""The standard metrics: what each is computed from, what it means and which way is better.

Every metric is a function of sums over rows, so that one resampled sum gives one resampled value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from model.eval.metrics.text import BLEU_ORDERS

Sums = Callable[[str], np.ndarray]
"""Gives the sum of a column over rows, for one or for many resamplings at once."""

CONVENTIONS = {
    "text": "Rows of every task but grounding. Texts are compared without case, punctuation and markup; exact match, "
    "token recall and token F1 also without the articles a, an, the. Exact match and closed accuracy respect signs, "
    "comparison operators, decimals, units and the plus, minus or star behind a name. Chinese, Japanese, Korean and "
    "Thai are compared by characters. Rows of the answer type closed or yes/no are closed questions, all others open.",
    "closed": "Right if the answer gives the yes or no that the reference begins with, at its start or after “the "
    "answer is”, and not both; if it names the option, its text, or both in agreement; else if it has the same words.",
    "BLEU": "Corpus BLEU: n-gram counts are summed over rows, then combined with the brevity penalty; no smoothing, so "
    "it is 0 where no n-gram of some order matches. BLEU-n is taken over the open rows whose reference has n words or "
    "more; the others have nothing to match and do not count. Where there is none such it is undefined (–).",
    "masks": "Mask k of an answer is compared with reference mask k; a missing one is an empty one. Scores that say "
    "“matched” take the best one-to-one matching instead. Masks beyond the references count in gIoU and cIoU, which "
    "compare the union of all masks of a row.",
    "empty": "A reference mask without pixels scores 1 if its prediction is empty too, else 0; it has no surface. A "
    "row that has no reference pixel at all is an absent target: it counts in gIoU (1 without a mask, else 0), in cIoU "
    "(its painted pixels join the union) and in the false-mask rate, and nowhere else.",
    "surface": "Distances between outline pixels. HD95 is the larger of the two directed 95th percentiles, the surface "
    "Dice (NSD) the share of outline pixels within the tolerance, 2 mm or 2 pixels unless settings say otherwise; "
    "without a predicted mask HD95 is the diagonal of the image and NSD 0. In mm where the spacing is known; all other "
    "masks apart, in pixels.",
    "errors": "A row that could not be answered is wrong, and its masks are empty; for an absent target it scores 0 in "
    "gIoU and is left out of the false-mask rates.",
    "intervals": "95 % percentile intervals of a bootstrap that draws whole images, with all their questions.",
}
"""What the numbers take for granted, a sentence or two on each subject."""


@dataclass(frozen=True)
class Metric:
    """One number computed from sums over rows.

    Attributes:
        name: with ``@0.5`` behind it where masks of that threshold are meant.
        meaning: a sentence for people.
        compute: the value, NaN where there is nothing to compute it from.
        count: column whose sum says over how many things the value was taken.
        higher_is_better: False for error rates and distances.
        unit: ``mm`` or ``px`` for distances, else empty.
        headline: whether tables that split by modality and the like show it.
        among: column of the rows that it could be taken over; where it is taken over none of these, tables show –. As
            ``count`` where empty.
    """

    name: str
    meaning: str
    compute: Callable[[Sums], np.ndarray]
    count: str
    higher_is_better: bool = True
    unit: str = ""
    headline: bool = False
    among: str = ""


def mark(threshold: float | None) -> str:
    """What stands behind the names of a threshold's columns and metrics; nothing for masks as they were written."""
    return "" if threshold is None else f"@{threshold:g}"


def metrics_for(thresholds: Sequence[float | None] = (None,), surface: bool = False) -> tuple[Metric, ...]:
    """All metrics in the order of the tables."""
    found = [*_text_metrics()]
    for threshold in thresholds:
        found += _mask_metrics(mark(threshold))
        found += _surface_metrics(mark(threshold)) if surface else []
    found += _presence_metrics()
    for threshold in thresholds:
        found += _false_mask_metrics(mark(threshold))
    found.append(
        _ratio("error_rate", "rows that could not be answered", "error", "row", higher_is_better=False, headline=True)
    )
    return tuple(found)


def columns_for(thresholds: Sequence[float | None] = (None,), surface: bool = False) -> tuple[str, ...]:
    """Names of all columns that the metrics read."""
    names: dict[str, None] = {}

    def note(name: str) -> np.ndarray:
        names[name] = None
        return np.ones(1)

    for metric in metrics_for(thresholds, surface):
        metric.compute(note)
        note(metric.count)
        if metric.among:
            note(metric.among)
    return (*names, "unscored")


def _ratio(
    name: str,
    meaning: str,
    above: str,
    below: str,
    *,
    count: str = "",
    higher_is_better: bool = True,
    unit: str = "",
    headline: bool = False,
) -> Metric:
    def compute(sums: Sums) -> np.ndarray:
        return _divide(sums(above), sums(below))

    return Metric(name, meaning, compute, count or below, higher_is_better, unit, headline)


def _divide(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(below > 0, above / below, np.nan)


def _text_metrics() -> list[Metric]:
    return [
        _ratio("closed_accuracy", "closed questions answered right", "closed_hit", "closed", headline=True),
        _ratio(
            "open_exact_match",
            "open answers with exactly the reference's words, numbers and signs",
            "exact",
            "open",
            headline=True,
        ),
        _ratio("token_recall", "share of the reference's words that the answer has", "recall", "open"),
        _ratio("token_F1", "F1 of the words of answer and reference", "f1", "open", headline=True),
        *(_bleu(order) for order in BLEU_ORDERS),
        _ratio("ROUGE-L", "F1 of the longest common subsequence of words", "rouge_l", "open"),
    ]


def _bleu(order: int) -> Metric:
    def compute(sums: Sums) -> np.ndarray:
        said, wanted = sums(f"said_{order}"), sums(f"wanted_{order}")
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = [
                np.log(_divide(sums(f"match_{order}_{n}"), sums(f"ngram_{order}_{n}"))) for n in BLEU_ORDERS[:order]
            ]
            penalty = np.minimum(0.0, 1 - wanted / said)
            value = np.exp(np.mean(logs, axis=0) + penalty)
        return np.where(sums(f"bleu_{order}") > 0, np.nan_to_num(value), np.nan)

    orders = "order 1" if order == 1 else f"orders 1 to {order}, of references with {order} words or more"
    meaning = f"corpus BLEU of the n-gram {orders}, without smoothing"
    return Metric(f"BLEU-{order}", meaning, compute, f"bleu_{order}", among="open")


def _mask_metrics(at: str) -> list[Metric]:
    return [
        _ratio(f"mDice{at}", "mean Dice of the reference masks", f"dice{at}", "mask", headline=True),
        _ratio(f"mIoU{at}", "mean IoU of the reference masks (macro)", f"iou{at}", "mask", headline=True),
        Metric(f"micro_Dice{at}", "Dice of all pixels together", _micro_dice(at), "mask"),
        _ratio(f"micro_IoU{at}", "IoU of all pixels together", f"inter{at}", f"union{at}", count="mask"),
        _ratio(f"mDice_matched{at}", "mean Dice in the best order of the masks", f"dice_matched{at}", "mask"),
        _ratio(f"mIoU_matched{at}", "mean IoU in the best order of the masks", f"iou_matched{at}", "mask"),
        _ratio(f"gIoU{at}", "mean IoU of rows, absent targets included", f"row_iou{at}", "grounding", headline=True),
        _ratio(
            f"cIoU{at}",
            "cumulative IoU of rows, absent targets included",
            f"row_inter{at}",
            f"row_union{at}",
            count="grounding",
        ),
    ]


def _micro_dice(at: str) -> Callable[[Sums], np.ndarray]:
    def compute(sums: Sums) -> np.ndarray:
        return _divide(2 * sums(f"inter{at}"), sums(f"union{at}") + sums(f"inter{at}"))

    return compute


def _surface_metrics(at: str) -> list[Metric]:
    found = []
    for unit, told in (("mm", "in mm"), ("px", "in pixels, of masks without a known spacing")):
        found += [
            _ratio(
                f"HD95_{unit}{at}",
                f"95th percentile of outline distances {told}",
                f"hd95_{unit}{at}",
                f"surface_{unit}",
                higher_is_better=False,
                unit=unit,
                headline=True,
            ),
            _ratio(f"NSD_{unit}{at}", f"outline within the tolerance {told}", f"nsd_{unit}{at}", f"surface_{unit}"),
        ]
    return found


def _presence_metrics() -> list[Metric]:
    return [
        _ratio("SEG_emission_rate", "rows with a target whose answer says <SEG>", "seg", "target", headline=True),
        _ratio(
            "extra_mask_rate",
            "rows with a target whose answer has more masks than the reference",
            "extra",
            "target",
            higher_is_better=False,
        ),
        _ratio(
            "false_SEG_rate",
            "rows with an absent target whose answer says <SEG>",
            "false_seg",
            "absent",
            higher_is_better=False,
        ),
    ]


def _false_mask_metrics(at: str) -> list[Metric]:
    return [
        _ratio(
            f"false_mask_rate{at}",
            "rows with an absent target where a mask is painted",
            f"false_mask{at}",
            "absent",
            higher_is_better=False,
            headline=True,
        ),
        _ratio(
            f"unasked_mask_rate{at}",
            "questions of words alone where a mask is painted",
            f"unasked_mask{at}",
            "words_only",
            higher_is_better=False,
        ),
    ]
