"""What a report shows: the scores of each data set and what was kept of its answers while they streamed past."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from model.eval.metrics.definitions import Metric
from model.eval.metrics.scores import Scores
from model.eval.predictions import Key, Prediction
from model.eval.report_failures import Failures, RowScore
from model.eval.suite import DataSet

Shown = tuple[int, Prediction, RowScore]
"""An answer that is shown: its place in the file, itself and what it scored."""

BlindScores = Mapping[tuple[str, str, str], float]
"""What image-free answers reach, by (dimension, group, metric); dimension and group are empty for the whole set."""


@dataclass
class SetResult:
    """What was measured on one data set.

    Attributes:
        item: the data set.
        scores: every metric, overall and by group.
        images: folder that image paths start from.
        dice: of every question with a present target, at the first threshold.
        predicted_iou: mean scores that the model gave its masks, one for each of ``real_iou``.
        real_iou: what the masks of these answers reached.
        failures: by kind.
        pictured: best, middle and worst answers with masks.
        router: shares [layers, experts] of the tokens, by task; empty where it was not recorded.
        blind: image-free baselines; empty where none were asked for.
        regions: mask files of the regions that shown questions point at.
        seconds: that answering took; 0 where it is not known.
    """

    item: DataSet
    scores: Scores
    images: Path
    dice: np.ndarray = field(default_factory=lambda: np.zeros(0))
    predicted_iou: np.ndarray = field(default_factory=lambda: np.zeros(0))
    real_iou: np.ndarray = field(default_factory=lambda: np.zeros(0))
    failures: Sequence[Failures] = ()
    pictured: Mapping[str, Sequence[Shown]] = field(default_factory=dict)
    router: Mapping[str, np.ndarray] = field(default_factory=dict)
    blind: BlindScores = field(default_factory=dict)
    regions: Mapping[Key, Sequence[Path]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def questions(self) -> int:
        """How many were asked."""
        return len(self.scores.keys)

    @property
    def errors(self) -> int:
        """How many of them could not be."""
        return int(self.scores.total("error"))

    def headlines(self) -> list[Metric]:
        """The metrics that stand for the set, those that it has anything to say about."""
        known = {metric.name: metric for metric in self.scores.metrics}
        return [known[name] for name in self.item.headlines if name in known]


@dataclass
class SuiteResult:
    """What was measured with one model on one suite.

    Attributes:
        title: of the suite.
        about: what the suite is for.
        model: name of the checkpoint.
        facts: what else the header tells, in order.
        sets: results of the data sets.
        command: that does it again.
    """

    title: str
    about: str
    model: str
    facts: Mapping[str, str]
    sets: Sequence[SetResult]
    command: str = ""


_UNIT = re.compile(r"_(mm|px)(?=@|$)")


def metric_title(metric: Metric) -> str:
    """A metric's name for people: ``false_mask_rate@0.5`` is “False mask rate at 0.5”."""
    name, at, threshold = _UNIT.sub("", metric.name).partition("@")
    words = name.replace("_", " ")
    if words.split()[0].islower():
        words = words[0].upper() + words[1:]
    unit = f" in {metric.unit}" if metric.unit else ""
    return f"{words}{unit}{f' at {threshold}' if at else ''}"
