"""Logistic regression with a quadratic penalty, exact for few features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

Array = NDArray[np.float64]


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
        return expit((rows - self.mean) / self.scale @ self.coefficients + self.intercept)


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
    ridge = np.append(np.full(rows.shape[1], penalty), 0.0)  # the intercept is not penalised

    def loss(weights: Array) -> tuple[float, Array]:
        logits = design @ weights
        value = (np.logaddexp(0.0, logits) - target * logits).sum() + 0.5 * (ridge * weights**2).sum()
        return float(value), design.T @ (expit(logits) - target) + ridge * weights

    def curvature(weights: Array) -> Array:
        spread = expit(design @ weights)
        return (design * (spread * (1 - spread))[:, None]).T @ design + np.diag(ridge)

    start = np.append(np.zeros(rows.shape[1]), np.log(target.mean() / (1 - target.mean())))
    found = minimize(
        loss, start, jac=True, hess=curvature, method="trust-exact", options={"gtol": 1e-9, "maxiter": 200}
    )
    return Logistic(found.x[:-1], float(found.x[-1]), mean, scale)
