"""The standard metrics as functions of sums over rows, and the resampling of these sums by image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from model.eval.metrics.rows import BLEU_ORDERS, mark

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
    "(its mask's pixels join the union) and in the false-mask rate, and nowhere else.",
    "surface": "Distances between outline pixels. HD95 is the larger of the two directed 95th percentiles, the surface "
    "Dice (NSD) the share of outline pixels within the tolerance, 2 mm or 2 pixels unless settings say otherwise; "
    "without a predicted mask HD95 is the diagonal of the image and NSD 0. In mm where the spacing is known; all other "
    "masks apart, in pixels.",
    "errors": "A row that could not be answered is wrong, and its masks are empty; for an absent target it scores 0 in "
    "gIoU and is left out of the false-mask rates.",
    "intervals": "95 % percentile intervals of a bootstrap that draws whole images, with all their questions; whole "
    "patients where the records name them.",
}
"""What the numbers take for granted, a sentence or two on each subject."""


@dataclass(frozen=True)
class Metric:
    """One number computed from sums over rows."""

    name: str  # with ``@0.5`` behind it where masks of that threshold are meant
    meaning: str  # a sentence for people
    compute: Callable[[Sums], np.ndarray]  # the value, NaN where there is nothing to compute it from
    count: str  # column whose sum says over how many things the value was taken
    higher_is_better: bool = True  # False for error rates and distances
    unit: str = ""  # ``mm`` or ``px`` for distances, else empty
    headline: bool = False  # whether tables that split by modality and the like show it
    # column of the rows that it could be taken over; where it is taken over none of these, tables show –. As
    # ``count`` where empty.
    among: str = ""


def metrics_for(thresholds: Sequence[float | None] = (None,), surface: bool = False) -> tuple[Metric, ...]:
    """All metrics in the order of the tables."""
    found = [*_ratios(_ANSWERS), *map(_bleu, BLEU_ORDERS), *_ratios(_ROUGE)]
    for at in map(mark, thresholds):
        overlap = _ratios(_OVERLAP, at)
        micro = Metric(f"micro_Dice{at}", "Dice of all pixels together", _micro_dice(at), "mask")
        found += [*overlap[:2], micro, *overlap[2:], *(_ratios(_SURFACE, at) if surface else ())]
    found += _ratios(_PRESENCE)
    found += [metric for at in map(mark, thresholds) for metric in _ratios(_FALSE_MASKS, at)]
    return (*found, *_ratios(_ERRORS))


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


# Sums divided by sums: name and column above the line (@ takes the threshold's mark), column below, the column that
# says over how many things the value is taken, flags (h: headline, l: lower is better), meaning.
_ANSWERS = """
closed_accuracy    | closed_hit | closed | closed | h | closed questions answered right
open_exact_match| exact       | open   | open   | h | open answers with exactly the reference's words, numbers and signs
token_recall       | recall     | open   | open   |   | share of the reference's words that the answer has
token_F1           | f1         | open   | open   | h | F1 of the words of answer and reference
"""
_ROUGE = "ROUGE-L | rouge_l | open | open | | F1 of the longest common subsequence of words"
_OVERLAP = """
mDice@        | dice@         | mask       | mask      | h | mean Dice of the reference masks
mIoU@         | iou@          | mask       | mask      | h | mean IoU of the reference masks (macro)
micro_IoU@    | inter@        | union@     | mask      |   | IoU of all pixels together
mDice_matched@| dice_matched@ | mask       | mask      |   | mean Dice in the best order of the masks
mIoU_matched@ | iou_matched@  | mask       | mask      |   | mean IoU in the best order of the masks
gIoU@         | row_iou@      | grounding  | grounding | h | mean IoU of rows, absent targets included
cIoU@         | row_inter@    | row_union@ | grounding |   | cumulative IoU of rows, absent targets included
"""
_SURFACE = "".join(
    f"""
HD95_{unit}@ | hd95_{unit}@ | surface_{unit} | surface_{unit} | hl{unit} | 95th percentile of outline distances {what}
NSD_{unit}@  | nsd_{unit}@  | surface_{unit} | surface_{unit} |          | outline within the tolerance {what}
"""
    for unit, what in (("mm", "in mm"), ("px", "in pixels, of masks without a known spacing"))
)
_PRESENCE = """
SEG_emission_rate | seg       | target | target | h | rows with a target whose answer says <SEG>
refused_rate      | refused   | target | target | l | rows with a target whose answer has no mask
extra_mask_rate   | extra     | target | target | l | rows with a target whose answer has more masks than the reference
false_SEG_rate    | false_seg | absent | absent | l | rows with an absent target whose answer says <SEG>
"""
_FALSE_MASKS = """
false_mask_rate@   | false_mask@   | absent     | absent     | hl | rows with an absent target where a mask is decoded
unasked_mask_rate@ | unasked_mask@ | words_only | words_only | l  | questions of words alone where a mask is decoded
"""
_ERRORS = "error_rate | error | row | row | hl | rows that could not be answered"


def _ratios(table: str, at: str = "") -> list[Metric]:
    found = []
    for line in filter(str.strip, table.splitlines()):
        *columns, flags, meaning = (cell.strip() for cell in line.split("|"))
        name, above, below, count = (column.replace("@", at) for column in columns)
        unit = next((unit for unit in ("mm", "px") if unit in flags), "")

        def compute(sums: Sums, above: str = above, below: str = below) -> np.ndarray:
            return _divide(sums(above), sums(below))

        found.append(Metric(name, meaning, compute, count, "l" not in flags, unit, "h" in flags))
    return found


def _divide(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(below > 0, above / below, np.nan)


def _bleu(order: int) -> Metric:
    def compute(sums: Sums) -> np.ndarray:
        given, wanted = sums(f"given_{order}"), sums(f"wanted_{order}")
        with np.errstate(divide="ignore", invalid="ignore"):
            precisions = [_divide(sums(f"match_{order}_{n}"), sums(f"ngram_{order}_{n}")) for n in BLEU_ORDERS[:order]]
            value = np.exp(np.mean(np.log(precisions), axis=0) + np.minimum(0.0, 1 - wanted / given))
        return np.where(sums(f"bleu_{order}") > 0, np.nan_to_num(value), np.nan)

    orders = "order 1" if order == 1 else f"orders 1 to {order}, of references with {order} words or more"
    meaning = f"corpus BLEU of the n-gram {orders}, without smoothing"
    return Metric(f"BLEU-{order}", meaning, compute, f"bleu_{order}", among="open")


def _micro_dice(at: str) -> Callable[[Sums], np.ndarray]:
    return lambda sums: _divide(2 * sums(f"inter{at}"), sums(f"union{at}") + sums(f"inter{at}"))


# --- resampling -----------------------------------------------------------------------------------------------------

_DRAWS_AT_ONCE = 1 << 22  # bounds memory whatever the number of rows


def cluster_sums(data: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Sums [K, C] of the rows [N, C] of each cluster, one row for each number in ``clusters`` [N], ascending."""
    found, codes = np.unique(clusters, return_inverse=True)
    sums = np.zeros((len(found), data.shape[1]))
    np.add.at(sums, codes, data)
    return sums


def bootstrap_sums(sums: np.ndarray, samples: int, seed: Sequence[int]) -> np.ndarray:
    """Column sums [samples, C] of resamplings that draw K of the K ≥ 1 clusters ``sums`` [K, C] with replacement.

    The same seed draws the same clusters whatever the columns.
    """
    rng, count = np.random.default_rng(seed), len(sums)
    found = [sums[:0]]
    for size in _blocks(samples, count):
        drawn = rng.integers(0, count, size=(size, count)) + np.arange(size)[:, None] * count
        times = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)
        found.append(times.astype(np.float64) @ sums)
    return np.concatenate(found)


def flipped_sums(first: np.ndarray, second: np.ndarray, samples: int, seed: Sequence[int]) -> list[np.ndarray]:
    """Column sums [samples, C] of two paired runs [K, C] after a fair coin exchanged each cluster or not."""
    rng = np.random.default_rng(seed)
    sizes = _blocks(samples, len(first))
    coins = (rng.integers(0, 2, size=(size, len(first)), dtype=np.int8).astype(np.float64) for size in sizes)
    moved = np.concatenate([first[:0], *(drawn @ (second - first) for drawn in coins)])
    return [first.sum(axis=0) + moved, second.sum(axis=0) - moved]


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of replicates [B]; NaNs, where a resampling had nothing to measure, are left out."""
    kept = values[~np.isnan(values)]
    if not kept.size:
        return float("nan"), float("nan")
    low, high = np.percentile(kept, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def _blocks(samples: int, clusters: int) -> list[int]:
    step = max(1, _DRAWS_AT_ONCE // max(1, clusters))
    return [min(step, samples - start) for start in range(0, samples, step)]
