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
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from model.errors import MedPLIBError
from model.inference.gate_scores import GateReport, choose_threshold, score_gate
from model.inference.logistic import Logistic, fit_logistic

GATE_FILE = "mask_gate.json"
"""Name of a gate's file, beside the checkpoint that it was fitted for."""

FEATURES = ("predicted_iou", "peak", "foreground", "area")
"""What a gate looks at, in order; see ``mask_features``."""

_FORMAT = 1
_PEAK = 20.0  # logits beyond this are all the same certainty
_FOLDS = 5

Features = NDArray[np.float64]


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

    def keeps(self, features: ArrayLike) -> NDArray[np.bool_]:
        """Whether masks with these features [n, 4] are shown, bool [n]."""
        return self.probability(features) >= self.threshold

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
        except OSError as error:
            raise MedPLIBError(
                f"cannot read the mask gate {source}: {error.strerror}; make one with "
                "python -m model.inference.calibrate_gate"
            ) from error
        except ValueError as error:
            raise _unusable(source, "it is not JSON") from error
        try:
            return cls._from_content(content)
        except KeyError as error:
            raise _unusable(source, f"it has no {error}") from error
        except (TypeError, ValueError) as error:
            raise _unusable(source, str(error)) from error

    @classmethod
    def _from_content(cls, content: Any) -> MaskGate:
        if content["format"] != _FORMAT or content["features"] != list(FEATURES):
            raise ValueError("it was made for other features")
        vectors = [np.asarray(content[name], dtype=np.float64) for name in ("coefficients", "mean", "scale")]
        if any(vector.shape != (len(FEATURES),) or not np.isfinite(vector).all() for vector in vectors):
            raise ValueError(f"it needs {len(FEATURES)} finite coefficients, means and scales")
        threshold, intercept = float(content["threshold"]), float(content["intercept"])
        if not (np.isfinite(intercept) and np.isfinite(threshold)):
            raise ValueError("threshold and intercept must be finite")
        return cls(Logistic(vectors[0], intercept, vectors[1], vectors[2]), threshold, GateReport(**content["report"]))


def _unusable(source: Path, reason: str) -> MedPLIBError:
    return MedPLIBError(f"{source} is not a usable mask gate ({reason}); fit it again for this checkpoint")


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
