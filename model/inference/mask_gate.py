"""Tells from a decoded mask whether there was anything to paint: a calibrated probability, and a threshold on it.

A mask decoder paints something whatever it is asked for. What it paints for a structure that is not in the image
differs: fainter, vaguer, with a lower predicted IoU. A logistic regression over a few such features, fitted on masks of
structures known to be there and known to be absent, turns them into a probability of presence.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import rankdata
from torch import Tensor

from model.errors import MedPLIBError

GATE_FILE = "mask_gate.json"
"""Name of a gate's file, beside the checkpoint that it was fitted for."""

FEATURES = ("predicted_iou", "peak", "foreground", "area")
"""What a gate looks at, in order; see ``mask_features``."""

_FORMAT = 1
_PEAK = 20.0  # logits beyond this are all the same certainty
_FOLDS = 5
_BINS = 10
_TRADE_OFFS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3)

Features = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Logistic:
    """A fitted regression.

    Attributes:
        coefficients: [F], of standardised features.
        intercept: log odds at the mean of the features.
        mean, scale: [F], with which features are standardised.
    """

    coefficients: Features
    intercept: float
    mean: Features
    scale: Features

    def probability(self, rows: Features) -> Features:
        """Probabilities [n] of feature rows [n, F]."""
        return expit((rows - self.mean) / self.scale @ self.coefficients + self.intercept)


def fit_logistic(rows: Features, truth: NDArray[np.bool_], penalty: float = 1.0) -> Logistic:
    """The regression that minimises log loss (summed over rows) + penalty / 2 · Σ coefficients².

    The penalty makes the objective strictly convex, so separable classes and constant or repeated features have a
    finite, unique solution; the intercept is free.

    Args:
        rows: features [n, F], finite.
        truth: bool [n], both kinds present.
        penalty: > 0.
    """
    mean, scale = rows.mean(axis=0), rows.std(axis=0)
    scale = np.where(scale > 1e-12 * np.maximum(1.0, np.abs(mean)), scale, 1.0)
    design = np.column_stack([(rows - mean) / scale, np.ones(len(rows))])  # [n, F + 1]
    target = truth.astype(np.float64)
    ridge = np.append(np.full(rows.shape[1], penalty), 0.0)  # the intercept is not penalised

    def loss(weights: Features) -> tuple[float, Features]:
        logits = design @ weights
        value = (np.logaddexp(0.0, logits) - target * logits).sum() + 0.5 * (ridge * weights**2).sum()
        return float(value), design.T @ (expit(logits) - target) + ridge * weights

    def curvature(weights: Features) -> Features:
        spread = expit(design @ weights)
        return (design * (spread * (1 - spread))[:, None]).T @ design + np.diag(ridge)

    start = np.append(np.zeros(rows.shape[1]), np.log(target.mean() / (1 - target.mean())))
    found = minimize(
        loss, start, jac=True, hess=curvature, method="trust-exact", options={"gtol": 1e-9, "maxiter": 200}
    )
    return Logistic(found.x[:-1], float(found.x[-1]), mean, scale)


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


def choose_threshold(scores: Features, truth: NDArray[np.bool_], rate: float) -> tuple[float, float]:
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


def score_gate(
    scores: Features, truth: NDArray[np.bool_], threshold: float, target: float, bound: float, *, cross_validated: bool
) -> GateReport:
    """Scores of probabilities [n] against the truth, bool [n], both kinds present."""
    places = np.minimum((scores * _BINS).astype(int), _BINS - 1)
    inside = [places == place for place in np.unique(places)]
    bins = [[float(one.sum()), float(scores[one].mean()), float(truth[one].mean())] for one in inside]
    counts, means, shares = np.array(bins).T
    kept = scores >= threshold
    thresholds = [(rate, *choose_threshold(scores, truth, rate)) for rate in _TRADE_OFFS]
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
        trade_offs=[
            [rate, limit, float((scores[truth] < limit).mean())]
            for rate, limit, promised in thresholds
            if promised <= rate
        ],
    )


def auroc(scores: Features, truth: NDArray[np.bool_]) -> float:
    """Chance that a present one scores higher than an absent one, ties counting half."""
    present = int(truth.sum())
    wins = rankdata(scores)[truth].sum() - present * (present + 1) / 2
    return float(wins / (present * (len(truth) - present)))


def mask_features(logits: Tensor, iou_prediction: float) -> Features:
    """Features of one mask, float64 [4], in the order of ``FEATURES``; they do not depend on the image's size.

    Args:
        logits: mask logits [H, W], −∞ allowed.
        iou_prediction: the mask decoder's own estimate of the mask's IoU.

    Returns:
        Predicted IoU; largest logit, cut to ±20; mean probability of the pixels above 0.5 (of the largest one where
        there is none); square root of the share of pixels above 0.5.
    """
    values = logits.detach().float().flatten()
    inside = values > 0
    count = inside.sum()
    peak = values.max().clamp(-_PEAK, _PEAK)
    mean = (values.sigmoid() * inside).sum() / count.clamp(min=1)
    mean = torch.where(count > 0, mean, peak.sigmoid())
    found = torch.stack([peak, mean, (count / values.numel()).sqrt()]).tolist()  # one transfer from the device
    return np.array([float(iou_prediction), *found])


@dataclass(frozen=True)
class MaskGate:
    """A fitted gate.

    Its probabilities hold where present and absent structures are asked for in the proportion of the masks it was
    fitted on; the order of two masks, and the share of absent ones that pass a threshold, do not depend on that.

    Attributes:
        model: the regression over ``FEATURES``.
        threshold: masks whose probability of presence is lower are withheld.
        report: how it did on the masks it was fitted on, each scored by a regression that had not seen its image.
    """

    model: Logistic
    threshold: float
    report: GateReport

    @classmethod
    def fit(
        cls,
        features: ArrayLike,
        present: ArrayLike,
        false_mask_rate: float = 0.05,
        *,
        groups: Sequence[object] | None = None,
        penalty: float = 1.0,
    ) -> MaskGate:
        """Fit a gate.

        The threshold is the lowest one at which, of new absent structures like these, a share of at most
        ``false_mask_rate`` is expected to be painted, so the fewest true masks are lost. With n absent structures it
        lets ⌊rate · (n + 1)⌋ − 1 of them pass (split conformal prediction; Vovk, Gammerman and Shafer, 2005), and none
        where that is negative: ``report.false_mask_bound`` says what can be promised then.

        Args:
            features: [n, 4] from ``mask_features``.
            present: bool [n], whether the structure is in the image.
            false_mask_rate: share of absent structures that may be painted, in (0, 1).
            groups: per row what it shares with others (its image); such rows are not scored by each other's help.
            penalty: weight of the squared coefficients (of standardised features), > 0; keeps separable data finite.

        Raises:
            MedPLIBError: no rows, rows of one kind alone, or values that are not finite numbers of this shape.
        """
        rows, truth = _check_rows(features, present)
        if not 0 < false_mask_rate < 1:
            raise MedPLIBError(f"false_mask_rate is {false_mask_rate}; give a number between 0 and 1")
        if not penalty > 0:
            raise MedPLIBError(f"the penalty is {penalty}; give a number above 0")
        if groups is not None and len(groups) != len(rows):
            raise MedPLIBError(f"there are {len(rows)} masks and {len(groups)} groups; give one group a mask")
        model = fit_logistic(rows, truth, penalty)
        unseen = _unseen_probabilities(rows, truth, groups, penalty)
        scores = model.probability(rows) if unseen is None else unseen
        threshold, bound = choose_threshold(scores, truth, false_mask_rate)
        report = score_gate(scores, truth, threshold, false_mask_rate, bound, cross_validated=unseen is not None)
        return cls(model, threshold, report)

    def probability(self, features: ArrayLike) -> Features:
        """Probability of presence, float64 [n], of masks with these features [n, 4]."""
        return self.model.probability(_check_features(features))

    def save(self, path: str | Path) -> Path:
        """Write the gate; ``path`` is a checkpoint directory, where it becomes ``mask_gate.json``, or a file to be.

        Returns:
            The file.
        """
        target = Path(path)
        target = target / GATE_FILE if target.is_dir() else target
        content = {
            "format": _FORMAT,
            "features": list(FEATURES),
            "coefficients": self.model.coefficients.tolist(),
            "intercept": self.model.intercept,
            "mean": self.model.mean.tolist(),
            "scale": self.model.scale.tolist(),
            "threshold": self.threshold,
            "report": asdict(self.report),
        }
        partial = target.with_name(f".{target.name}.partial")
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        partial.replace(target)
        return target

    @classmethod
    def load(cls, path: str | Path) -> MaskGate:
        """Read a gate from its file, or from the checkpoint directory it lies in.

        Raises:
            MedPLIBError: there is none, or it is not one this version understands.
        """
        source = Path(path)
        source = source / GATE_FILE if source.is_dir() else source
        try:
            content = json.loads(source.read_bytes())
            if content["format"] != _FORMAT or content["features"] != list(FEATURES):
                raise ValueError("it was made for other features")
            vectors = [np.asarray(content[name], dtype=np.float64) for name in ("coefficients", "mean", "scale")]
            if any(vector.shape != (len(FEATURES),) or not np.isfinite(vector).all() for vector in vectors):
                raise ValueError(f"it needs {len(FEATURES)} finite coefficients, means and scales")
            threshold, intercept = float(content["threshold"]), float(content["intercept"])
            if not (np.isfinite(intercept) and np.isfinite(threshold)):
                raise ValueError("threshold and intercept must be finite")
            model = Logistic(vectors[0], intercept, vectors[1], vectors[2])
            return cls(model, threshold, GateReport(**content["report"]))
        except OSError as error:
            raise MedPLIBError(
                f"cannot read the mask gate {source}: {error.strerror}; make one with "
                "python -m model.inference.calibrate_gate"
            ) from error
        except (KeyError, TypeError, ValueError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            reason = "it is not JSON" if isinstance(error, json.JSONDecodeError | UnicodeDecodeError) else reason
            raise MedPLIBError(
                f"{source} is not a usable mask gate ({reason}); fit it again for this checkpoint"
            ) from error


def _check_features(features: ArrayLike) -> Features:
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2 or rows.shape[1] != len(FEATURES):
        raise MedPLIBError(f"mask features have the shape {rows.shape}; expected [masks, {len(FEATURES)}]")
    if not np.isfinite(rows).all():
        raise MedPLIBError("mask features hold values that are not finite; leave such masks out")
    return rows


def _check_rows(features: ArrayLike, present: ArrayLike) -> tuple[Features, NDArray[np.bool_]]:
    truth = np.asarray(present, dtype=bool)
    if truth.ndim != 1 or not len(truth):
        raise MedPLIBError("there are no masks to fit a gate on; give some of present and some of absent structures")
    rows = _check_features(features)
    if len(rows) != len(truth):
        raise MedPLIBError(f"there are {len(rows)} rows of features for {len(truth)} masks; give one row a mask")
    if truth.all() or not truth.any():
        kind, other = ("present", "absent") if truth.all() else ("absent", "present")
        raise MedPLIBError(f"all {len(truth)} masks are of {kind} structures; a gate needs masks of {other} ones too")
    return rows, truth


def _unseen_probabilities(
    rows: Features, truth: NDArray[np.bool_], groups: Sequence[object] | None, penalty: float
) -> Features | None:
    """Each row's probability by a regression fitted without its fold, [n]; None where there is too little to split."""
    folds = _folds(truth, groups)
    scores = np.empty(len(rows))
    for fold in range(int(folds.max()) + 1):
        out = folds == fold
        if not out.any():
            continue
        if truth[~out].all() or not truth[~out].any():
            return None
        scores[out] = fit_logistic(rows[~out], truth[~out], penalty).probability(rows[out])
    return scores


def _folds(truth: NDArray[np.bool_], groups: Sequence[object] | None) -> NDArray[np.int64]:
    """Fold of each row, [n]: groups stay whole, and both kinds are spread as evenly as that allows."""
    members: dict[object, list[int]] = {}
    for row in range(len(truth)):
        members.setdefault(row if groups is None else groups[row], []).append(row)
    folds = np.zeros(len(truth), dtype=np.int64)
    counts = np.zeros((_FOLDS, 2), dtype=np.int64)  # absent and present rows of each fold
    for rows in sorted(members.values(), key=lambda rows: (-int((~truth[rows]).sum()), -len(rows))):
        absent = int((~truth[rows]).sum())
        kind = 0 if absent else 1
        fold = int(np.lexsort((counts.sum(axis=1), counts[:, kind]))[0])
        folds[rows] = fold
        counts[fold] += (absent, len(rows) - absent)
    return folds
