"""Scores of predictions: the published numbers (``published_*``) and, beside them, the standard ones."""

from model.eval.metrics.comparing import Comparison, Difference, compare
from model.eval.metrics.definitions import CONVENTIONS, Metric
from model.eval.metrics.published import PublishedMasks, PublishedText
from model.eval.metrics.scores import DIMENSIONS, Measure, Scores, score_predictions

__all__ = [
    "CONVENTIONS",
    "DIMENSIONS",
    "Comparison",
    "Difference",
    "Measure",
    "Metric",
    "PublishedMasks",
    "PublishedText",
    "Scores",
    "compare",
    "score_predictions",
]
