"""Presence classifier: the probability that the target of a mask is in the image at all.

A mask decoder predicts a mask for any prompt. For a target that is absent it is fainter, vaguer, with a lower predicted
IoU. A logistic regression over such features gives a calibrated probability, and masks below its threshold stay empty.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit
from torch import Tensor

from model.errors import MedPLIBError

PRESENCE_FILE = "presence.json"
"""Name of a classifier's file, beside the checkpoint that it was fitted for."""

FEATURES = ("predicted_iou", "peak", "foreground", "area")
"""See ``mask_features``."""

_FORMAT = 1
_PEAK = 20.0  # logits beyond this are all the same certainty
_FOLDS = 5
_TRADE_OFFS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3)

Features = NDArray[np.float64]


@dataclass(frozen=True)
class PresenceReport:
    """Scores of a classifier on the masks that it was fitted on.

    Attributes:
        present, absent: masks of each kind.
        cross_validated: no mask was scored with the help of its own image; False where there was too little data.
        false_mask_bound: share that the threshold promises for new absent targets, on average over calibrations.
        false_masks: share of the absent targets here that pass.
        lost_masks: share of the present targets here that are withheld.
        brier: mean squared difference of probability and truth.
        auroc: chance that a present target scores higher than an absent one; 0.5 is blind.
        trade_offs: false-mask rate that can be promised, its threshold, share of true masks lost.
    """

    present: int
    absent: int
    cross_validated: bool
    false_mask_bound: float
    false_masks: float
    lost_masks: float
    brier: float
    auroc: float
    trade_offs: list[list[float]]

    def table(self, threshold: float) -> str:
        """The scores as a Markdown table, with what other thresholds would cost."""
        unseen = "images held out" if self.cross_validated else "the same images: too few to hold any out"
        lines = [
            f"| scored on {unseen} | |",
            "|---|---|",
            f"| masks of present targets | {self.present} |",
            f"| masks of absent targets | {self.absent} |",
            f"| threshold on the probability of presence | {threshold:.4f} |",
            f"| false masks | {self.false_masks:.1%} |",
            f"| false masks to expect on new images, at most | {self.false_mask_bound:.1%} |",
            f"| true masks lost | {self.lost_masks:.1%} |",
            f"| area under the ROC curve | {self.auroc:.4f} |",
            f"| Brier score | {self.brier:.4f} |",
            "",
            "| false masks at most | threshold | true masks lost |",
            "|---|---|---|",
            *(f"| {rate:.0%} | {limit:.4f} | {lost:.1%} |" for rate, limit, lost in self.trade_offs),
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class PresenceClassifier:
    """A fitted logistic regression and its threshold.

    Its probabilities hold where present and absent targets are requested in the proportion of the masks it was fitted
    on; the order of two masks, and the share of absent ones that pass a threshold, do not depend on that.

    Attributes:
        coefficients: one for each of ``FEATURES``.
        intercept: log odds where all features are 0.
        threshold: masks of a lower probability are left empty.
        report: scores, each mask's by a regression that had not seen its image.
    """

    coefficients: tuple[float, ...]
    intercept: float
    threshold: float
    report: PresenceReport

    @classmethod
    def fit(
        cls,
        features: ArrayLike,
        present: ArrayLike,
        false_mask_rate: float = 0.05,
        *,
        lost_mask_rate: float | None = None,
        groups: Sequence[object] | None = None,
        penalty: float = 1.0,
    ) -> PresenceClassifier:
        """Fit the regression and choose the threshold by ``false_mask_rate`` or ``lost_mask_rate``.

        Args:
            features: [n, 4] from ``mask_features``.
            present: bool [n], whether the target is in the image.
            false_mask_rate: share of absent targets that may pass, in (0, 1).
            lost_mask_rate: share of present targets that may be withheld, in (0, 1); decides alone where it is given.
            groups: per row what it shares with others (its image); such rows are not scored by each other's help.
            penalty: weight of the squared coefficients (of standardized features), > 0; keeps separable data finite.

        Raises:
            MedPLIBError: no rows, rows of one kind alone, or values that are not finite numbers of this shape.
        """
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import brier_score_loss, roc_auc_score
        from sklearn.model_selection import StratifiedGroupKFold
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        rows, truth = _check_rows(features, present)
        for name, rate in (("false_mask_rate", false_mask_rate), ("lost_mask_rate", lost_mask_rate)):
            if rate is not None and not 0 < rate < 1:
                raise MedPLIBError(f"{name} is {rate}; give a number between 0 and 1")
        if not penalty > 0:
            raise MedPLIBError(f"the penalty is {penalty}; give a number above 0")
        if groups is not None and len(groups) != len(rows):
            raise MedPLIBError(f"there are {len(rows)} masks and {len(groups)} groups; give one group a mask")
        numbers = np.unique(range(len(rows)) if groups is None else [str(one) for one in groups], return_inverse=True)[
            1
        ]
        regression = make_pipeline(StandardScaler(), LogisticRegression(C=1 / penalty, tol=1e-8, max_iter=1000))
        scores = np.full(len(rows), np.nan)
        folds = min(_FOLDS, len(set(numbers)), int(truth.sum()), int((~truth).sum()))
        splits = list(StratifiedGroupKFold(folds).split(rows, truth, numbers)) if folds > 1 else []
        unseen = bool(splits) and all(truth[seen].any() and not truth[seen].all() for seen, _ in splits)
        for seen, left_out in splits if unseen else []:
            scores[left_out] = regression.fit(rows[seen], truth[seen]).predict_proba(rows[left_out])[:, 1]
        regression.fit(rows, truth)
        if not unseen:
            scores = regression.predict_proba(rows)[:, 1]
        scaler, linear = regression
        coefficients = linear.coef_[0] / scaler.scale_
        intercept = float(linear.intercept_[0] - coefficients @ scaler.mean_)
        threshold, bound = choose_threshold(scores, truth, false_mask_rate)
        if lost_mask_rate is not None:
            threshold = float(np.quantile(scores[truth], lost_mask_rate))
            bound = float((scores[~truth] >= threshold).sum() + 1) / float((~truth).sum() + 1)
        kept, chosen = scores >= threshold, [(rate, *choose_threshold(scores, truth, rate)) for rate in _TRADE_OFFS]
        report = PresenceReport(
            present=int(truth.sum()),
            absent=int((~truth).sum()),
            cross_validated=unseen,
            false_mask_bound=bound,
            false_masks=float(kept[~truth].mean()),
            lost_masks=float((~kept[truth]).mean()),
            brier=float(brier_score_loss(truth, scores)),
            auroc=float(roc_auc_score(truth, scores)),
            trade_offs=[
                [rate, limit, float((scores[truth] < limit).mean())]
                for rate, limit, promised in chosen
                if promised <= rate
            ],
        )
        return cls(tuple(coefficients.tolist()), intercept, threshold, report)

    def probability(self, features: ArrayLike) -> Features:
        """Probability of presence, float64 [n], of masks with these features [n, 4]."""
        return expit(_check_features(features) @ np.array(self.coefficients) + self.intercept)

    def save(self, path: str | Path) -> Path:
        """Write ``presence.json`` into a checkpoint directory, or the file ``path``; returns the file."""
        target = Path(path)
        target = target / PRESENCE_FILE if target.is_dir() else target
        partial = target.with_name(f".{target.name}.partial")
        content = {"format": _FORMAT, "features": FEATURES, **asdict(self)}
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        partial.replace(target)
        return target

    @classmethod
    def load(cls, path: str | Path) -> PresenceClassifier:
        """Read a classifier from its file, or from the checkpoint directory it lies in.

        Raises:
            MedPLIBError: there is none, or it is not one this version understands.
        """
        source = Path(path)
        source = source / PRESENCE_FILE if source.is_dir() else source
        try:
            content = json.loads(source.read_bytes())
            if content["format"] != _FORMAT or tuple(content["features"]) != FEATURES:
                raise ValueError("it was made for other features")
            numbers = [float(one) for one in content["coefficients"]]
            intercept, threshold = float(content["intercept"]), float(content["threshold"])
            if len(numbers) != len(FEATURES) or not np.isfinite([*numbers, intercept, threshold]).all():
                raise ValueError(f"it needs {len(FEATURES)} finite coefficients, an intercept and a threshold")
            return cls(tuple(numbers), intercept, threshold, PresenceReport(**content["report"]))
        except OSError as error:
            raise MedPLIBError(
                f"cannot read the presence classifier {source}: {error.strerror}; make one with "
                "python -m model.inference.calibrate_presence"
            ) from error
        except (KeyError, TypeError, ValueError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            reason = "it is not JSON" if isinstance(error, json.JSONDecodeError | UnicodeDecodeError) else reason
            raise MedPLIBError(
                f"{source} is not a usable presence classifier ({reason}); fit it again for this checkpoint"
            ) from error


def choose_threshold(scores: Features, truth: NDArray[np.bool_], rate: float) -> tuple[float, float]:
    """The lowest threshold that is expected to let a share ``rate`` of absent targets pass, and what it promises.

    Of n absent targets ⌊rate · (n + 1)⌋ − 1 pass, none where that is negative; then the chance that a new one passes,
    averaged over calibrations, is at most (passing + 1) / (n + 1) (split conformal prediction; Vovk, Gammerman and
    Shafer, 2005).
    """
    absent = np.sort(scores[~truth])[::-1]
    passing = max(int(np.floor(rate * (len(absent) + 1) + 1e-9)) - 1, 0)
    barrier = float(absent[passing])
    above = scores[scores > barrier]
    threshold = (barrier + float(above.min())) / 2 if len(above) else barrier
    if threshold <= barrier:  # nothing is above, or too close to separate
        threshold = float(np.nextafter(barrier, np.inf))
    return threshold, (passing + 1) / (len(absent) + 1)


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
        raise MedPLIBError("there are no masks to fit on; give some of present and some of absent targets")
    rows = _check_features(features)
    if len(rows) != len(truth):
        raise MedPLIBError(f"there are {len(rows)} rows of features for {len(truth)} masks; give one row a mask")
    if truth.all() or not truth.any():
        kind, other = ("present", "absent") if truth.all() else ("absent", "present")
        raise MedPLIBError(f"all {len(truth)} masks are of {kind} targets; give masks of {other} ones too")
    return rows, truth
