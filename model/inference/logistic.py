"""Logistic regression with a quadratic penalty, by Newton's method: few features, exact, no further dependency."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_STEPS = 100
_HALVINGS = 40
_TOLERANCE = 1e-10


@dataclass(frozen=True, eq=False)
class Logistic:
    """A fitted regression.

    Attributes:
        coefficients: [F], of standardised features.
        intercept: log odds at the mean of the features.
        mean, scale: [F], with which features are standardised.
    """

    coefficients: Array
    intercept: float
    mean: Array
    scale: Array

    def probability(self, rows: Array) -> Array:
        """Probabilities [n] of feature rows [n, F]."""
        return sigmoid((rows - self.mean) / self.scale @ self.coefficients + self.intercept)


def fit_logistic(rows: Array, truth: NDArray[np.bool_], penalty: float = 1.0) -> Logistic:
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
    ridge = np.full(design.shape[1], penalty)
    ridge[-1] = 0.0
    weights = np.zeros(design.shape[1])
    weights[-1] = np.log(target.mean() / (1 - target.mean()))
    loss = _loss(design, target, ridge, weights)
    for _ in range(_STEPS):
        predicted = sigmoid(design @ weights)
        gradient = design.T @ (predicted - target) + ridge * weights
        curvature = (design * (predicted * (1 - predicted))[:, None]).T @ design + np.diag(ridge)
        curvature[-1, -1] += 1e-12  # the intercept alone is not penalised
        step = np.linalg.solve(curvature, gradient)
        weights, improved = _descend(design, target, ridge, weights, step, loss)
        if loss - improved <= _TOLERANCE * max(1.0, abs(loss)):
            break
        loss = improved
    return Logistic(weights[:-1], float(weights[-1]), mean, scale)


def sigmoid(values: Array) -> Array:
    """1 / (1 + e^−x) without overflow."""
    small = np.exp(-np.abs(values))
    return np.where(values >= 0, 1.0, small) / (1.0 + small)


def _descend(
    design: Array, target: Array, ridge: Array, weights: Array, step: Array, loss: float
) -> tuple[Array, float]:
    """The weights after the longest of the halved steps that does not raise the loss, and their loss."""
    for _ in range(_HALVINGS):
        moved = weights - step
        found = _loss(design, target, ridge, moved)
        if found <= loss:
            return moved, found
        step = step / 2
    return weights, loss


def _loss(design: Array, target: Array, ridge: Array, weights: Array) -> float:
    logits = design @ weights
    return float((np.logaddexp(0.0, logits) - target * logits).sum() + 0.5 * (ridge * weights**2).sum())
