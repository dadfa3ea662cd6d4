"""How well probabilities of presence are calibrated, and what a threshold on them costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 10
TRADE_OFFS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3)


@dataclass(frozen=True)
class GateReport:
    """Scores of a gate.

    Attributes:
        present, absent: masks of structures that are in their image, and that are not.
        cross_validated: no mask was scored with the help of its own image; False where there was too little data.
        target_false_mask_rate: share of absent structures that may be painted, as asked for.
        false_mask_bound: share that the threshold promises for new absent structures, on average over calibrations.
        false_masks: share of the absent structures here that pass.
        lost_masks: share of the present structures here that are withheld.
        ece: expected calibration error over ten equally wide bins.
        brier: mean squared difference of probability and truth.
        auroc: chance that a present structure scores higher than an absent one; 0.5 is blind.
        bins: per bin that is not empty: masks, mean probability, share present.
        trade_offs: per false-mask rate that can be promised: the rate, its threshold, share of true masks lost.
    """

    present: int
    absent: int
    cross_validated: bool
    target_false_mask_rate: float
    false_mask_bound: float
    false_masks: float
    lost_masks: float
    ece: float
    brier: float
    auroc: float
    bins: list[list[float]]
    trade_offs: list[list[float]]

    def table(self, threshold: float) -> str:
        """The scores as a Markdown table, with what other thresholds would cost and the reliability of the bins."""
        unseen = "images held out" if self.cross_validated else "the same images: too few to hold any out"
        lines = [
            f"| scored on {unseen} | |",
            "|---|---|",
            f"| masks of present structures | {self.present} |",
            f"| masks of absent structures | {self.absent} |",
            f"| threshold on the probability of presence | {threshold:.4f} |",
            f"| false masks without the gate | {1:.1%} |",
            f"| false masks with it (asked for: {self.target_false_mask_rate:.1%}) | {self.false_masks:.1%} |",
            f"| false masks to expect on new images, at most | {self.false_mask_bound:.1%} |",
            f"| true masks lost | {self.lost_masks:.1%} |",
            f"| area under the ROC curve | {self.auroc:.4f} |",
            f"| expected calibration error | {self.ece:.4f} |",
            f"| Brier score | {self.brier:.4f} |",
            "",
            "| false masks at most | threshold | true masks lost |",
            "|---|---|---|",
            *(f"| {rate:.0%} | {limit:.4f} | {lost:.1%} |" for rate, limit, lost in self.trade_offs),
            "",
            "| probability | masks | present |",
            "|---|---|---|",
            *(f"| {mean:.3f} | {int(count)} | {share:.3f} |" for count, mean, share in self.bins),
        ]
        return "\n".join(lines)


def score_gate(
    scores: NDArray[np.float64],
    truth: NDArray[np.bool_],
    threshold: float,
    target: float,
    bound: float,
    *,
    cross_validated: bool,
) -> GateReport:
    """Scores of probabilities [n] against the truth, bool [n], both kinds present."""
    bins = reliability(scores, truth)
    counts, means, shares = np.array(bins).T
    kept = scores >= threshold
    return GateReport(
        present=int(truth.sum()),
        absent=int((~truth).sum()),
        cross_validated=cross_validated,
        target_false_mask_rate=target,
        false_mask_bound=bound,
        false_masks=float(kept[~truth].mean()),
        lost_masks=float((~kept[truth]).mean()),
        ece=float((counts * np.abs(means - shares)).sum() / counts.sum()),
        brier=float(((scores - truth) ** 2).mean()),
        auroc=auroc(scores, truth),
        bins=bins,
        trade_offs=trade_offs(scores, truth),
    )


def choose_threshold(scores: NDArray[np.float64], truth: NDArray[np.bool_], rate: float) -> tuple[float, float]:
    """The lowest threshold that is expected to let a share ``rate`` of absent structures pass, and what it promises.

    Of n absent structures ⌊rate · (n + 1)⌋ − 1 pass, none where that is negative; then the chance that a new one
    passes, averaged over calibrations, is at most (passing + 1) / (n + 1).
    """
    absent = np.sort(scores[~truth])[::-1]
    passing = max(int(np.floor(rate * (len(absent) + 1) + 1e-9)) - 1, 0)
    barrier = float(absent[passing])
    above = scores[scores > barrier]
    threshold = (barrier + float(above.min())) / 2 if len(above) else barrier
    if threshold <= barrier:  # nothing is above, or too close to tell apart
        threshold = float(np.nextafter(barrier, np.inf))
    return threshold, (passing + 1) / (len(absent) + 1)


def trade_offs(scores: NDArray[np.float64], truth: NDArray[np.bool_]) -> list[list[float]]:
    """Per false-mask rate that can be promised: the rate, its threshold, share of true masks lost."""
    rows = []
    for rate in TRADE_OFFS:
        threshold, bound = choose_threshold(scores, truth, rate)
        if bound <= rate:
            rows.append([rate, threshold, float((scores[truth] < threshold).mean())])
    return rows


def reliability(scores: NDArray[np.float64], truth: NDArray[np.bool_]) -> list[list[float]]:
    """Per bin of ten that is not empty: masks, mean probability, share present."""
    places = np.minimum((scores * BINS).astype(int), BINS - 1)
    rows: list[list[float]] = []
    for place in range(BINS):
        inside = places == place
        if inside.any():
            rows.append([float(inside.sum()), float(scores[inside].mean()), float(truth[inside].mean())])
    return rows


def auroc(scores: NDArray[np.float64], truth: NDArray[np.bool_]) -> float:
    """Chance that a present one scores higher than an absent one, ties counting half."""
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[places]  # mean rank of ties, from 1
    present = int(truth.sum())
    wins: Any = ranks[truth].sum() - present * (present + 1) / 2
    return float(wins / (present * (len(truth) - present)))
