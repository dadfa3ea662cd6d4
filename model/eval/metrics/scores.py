"""Scores of one run: compact per-row numbers, and every metric with its interval, overall and by group."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePath
from typing import Any

import numpy as np

from model.data.schema import modality_of
from model.errors import MedPLIBError
from model.eval.metrics.bootstrap import bootstrap_sums, cluster_sums, interval
from model.eval.metrics.definitions import CONVENTIONS, Metric, Sums, columns_for, metrics_for
from model.eval.metrics.published import PublishedMasks
from model.eval.metrics.rows import RowSettings, score_row, task_of
from model.eval.predictions import Prediction, named

DIMENSIONS = ("task", "kind", "modality", "structure", "dataset", "absent_kind", "patient")
"""What tables can be split by."""

UNNAMED = "(unnamed)"
"""The group of rows that do not say."""

RowKey = tuple[str, int, int]
"""Question id as text, turn, and how many rows with both came before: published files may number from 0 twice."""

MEAN_ROW = "mean of these"
_BLOCK = 4096  # rows of an array that grows by blocks


@dataclass(frozen=True)
class Measure:
    """One metric's value: over ``count`` things, with a 95 % interval (NaN where it is unknown).

    One that is taken over nothing, though there are rows that it could be taken over, is NaN itself.
    """

    value: float
    low: float
    high: float
    count: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready mapping; null where there is no value or no interval."""
        named = {"value": self.value, "low": self.low, "high": self.high}
        return {**{name: None if math.isnan(x) else x for name, x in named.items()}, "count": self.count}


Measures = dict[str, Measure]


def score_predictions(
    rows: Iterable[Prediction],
    *,
    thresholds: Sequence[float] | None = None,
    surface: bool = False,
    tolerance_mm: float = 2.0,
    tolerance_px: float = 2.0,
    samples: int = 1000,
    seed: int = 0,
) -> Scores:
    """Score a stream of predictions; of each row only its numbers are kept.

    Args:
        rows: predictions, such as ``read_predictions`` gives.
        thresholds: score the masks of ``masks_at`` at each, as columns of their own (``mDice@0.1``); None scores the
            masks as they were written (``mDice``).
        surface: also HD95 and NSD, which decode every mask.
        tolerance_mm: of the NSD where the spacing is known.
        tolerance_px: of the NSD in pixels where it is not.
        samples: bootstrap resamplings behind each interval; 0 gives none.
        seed: of the resampling.

    Raises:
        MedPLIBError: the same question is there twice, or a row's masks cannot be scored; with its id.
    """
    settings = RowSettings(tuple(thresholds) if thresholds else (None,), surface, tolerance_mm, tolerance_px)
    builder = _Builder(settings)
    for row in rows:
        builder.add(row)
    return builder.finish(samples, seed)


@dataclass(frozen=True, eq=False)
class Scores:
    """Per-row numbers of one run and the metrics computed from them."""

    settings: RowSettings  # what was scored
    keys: list[RowKey] = field(repr=False)  # of the rows, in the order they came
    columns: tuple[str, ...] = field(repr=False)  # names of the data's columns
    data: np.ndarray = field(repr=False)  # float64 [N, C]: what each row adds to each column
    images: np.ndarray = field(repr=False)  # int32 [N]: number of the row's image
    # int32 [N]: number of the row's patient, of its image where that is not known; rows with the same one are
    # resampled together.
    clusters: np.ndarray = field(repr=False)
    references: np.ndarray = field(repr=False)  # uint32 [N]: checksum of the row's reference answer and masks
    # for each dimension the group number of each row, int32 [N], and the groups' names.
    groups: Mapping[str, tuple[np.ndarray, list[str]]] = field(repr=False)
    samples: int = 1000  # bootstrap resamplings
    seed: int = 0  # of the resampling
    # for each threshold the published grounding numbers, over every reference mask and the predicted one of the same
    # number.
    published_masks: Mapping[float | None, PublishedMasks] = field(default_factory=dict, repr=False)
    _found: dict[str, tuple[dict[str, Measures], Measures]] = field(default_factory=dict, repr=False)

    @cached_property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics that these rows have anything to say about, in the order of the tables."""
        sums = self.sums_of(self.data.sum(axis=0))
        defined = metrics_for(self.settings.thresholds, self.settings.surface)
        return tuple(metric for metric in defined if sums(metric.among or metric.count) > 0)

    @cached_property
    def overall(self) -> Measures:
        """Every metric over all rows."""
        return self._measure(np.arange(len(self.keys)))[0]

    def by(self, dimension: str) -> dict[str, Measures]:
        """Every metric for each group of a dimension, groups in the order of their names.

        Raises:
            MedPLIBError: there is no such dimension.
        """
        return self._split(dimension)[0]

    def mean_over(self, dimension: str) -> Measures:
        """Unweighted mean of each metric over the groups that have it (the paper's “overall” over modalities).

        ``count`` is the number of groups. Intervals of the mean over patients draw whole patients.
        """
        return self._over_patients if dimension == "patient" else self._split(dimension)[1]

    @cached_property
    def _over_patients(self) -> Measures:
        codes, names = self.groups["patient"]
        rows = np.isin(codes, [index for index, name in enumerate(names) if name != UNNAMED])
        sums = cluster_sums(self.data[rows], codes[rows])
        if not len(sums):
            return {}
        read = self.sums_of(sums)
        values = np.stack([np.asarray(metric.compute(read), dtype=np.float64) for metric in self.metrics], axis=1)
        known = ~np.isnan(values)  # patients that the metric says anything about, bool [P, M]
        counts, totals = known.sum(axis=0), np.nansum(values, axis=0)
        drawn = bootstrap_sums(np.concatenate([np.nan_to_num(values), known], axis=1), self.samples, (self.seed, 1))
        with np.errstate(divide="ignore", invalid="ignore"):
            means = np.where(counts > 1, drawn[:, : len(counts)] / drawn[:, len(counts) :], np.nan)
            return self._means(totals / counts, means.T, counts)

    def table(self, by: str | None = None) -> str:
        """The metrics as text: all of them overall, or the main ones for each group of a dimension."""
        if by is None:
            lines = [["metric", "value", "95 % interval", "n", "meaning"]]
            for m in self.metrics:
                if (found := self.overall.get(m.name)) is not None:
                    value = f"{number(found.value)} {m.unit}".strip()
                    lines.append([m.name, value, span(found.low, found.high), str(found.count), m.meaning])
            return aligned(lines, left=(0, 2, 4))
        groups = self.by(by)
        shown = [m.name for m in self.metrics if m.headline and any(m.name in measures for measures in groups.values())]
        rows = [*groups.items(), *([(MEAN_ROW, means)] if len(groups) > 1 and (means := self.mean_over(by)) else [])]
        return aligned([[by, *shown], *([name, *(_cell(found.get(key)) for key in shown)] for name, found in rows)])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready mapping: rows, settings, conventions, metrics and all tables."""
        return {
            "rows": len(self.keys),
            "images": int(np.unique(self.images).size),
            "patients": sum(name != UNNAMED for name in self.groups["patient"][1]),
            "errors": int(self.total("error")),
            "grounding_rows_without_reference_masks": int(self.total("unscored")),
            "settings": {
                "thresholds": [threshold for threshold in self.settings.thresholds if threshold is not None],
                "surface": self.settings.surface,
                "tolerance_mm": self.settings.tolerance_mm,
                "tolerance_px": self.settings.tolerance_px,
                "bootstrap_samples": self.samples,
                "seed": self.seed,
            },
            "conventions": dict(CONVENTIONS),
            "metrics": {
                m.name: {"meaning": m.meaning, "higher_is_better": m.higher_is_better, "unit": m.unit}
                for m in self.metrics
            },
            "overall": _plain(self.overall),
            "by": {name: {group: _plain(m) for group, m in self.by(name).items()} for name in self.dimensions},
            "mean_over": {name: _plain(self.mean_over(name)) for name in self.dimensions},
            "published_grounding": {
                "as written" if threshold is None else f"{threshold:g}": masks.to_dict()
                for threshold, masks in self.published_masks.items()
                if masks.count
            },
        }

    @cached_property
    def dimensions(self) -> tuple[str, ...]:
        """The dimensions that any row names a group of."""
        return tuple(name for name in DIMENSIONS if self.groups[name][1] not in ([], [UNNAMED]))

    def total(self, column: str) -> float:
        """Sum of one column over all rows."""
        return float(self.data[:, self.columns.index(column)].sum())

    def sums_of(self, values: np.ndarray) -> Sums:
        """Reader of columns by name, as the metrics take it, from an array whose last axis is the columns."""
        places = {name: index for index, name in enumerate(self.columns)}
        return lambda name: values[..., places[name]]

    def _split(self, dimension: str) -> tuple[dict[str, Measures], Measures]:
        if dimension not in self.groups:
            raise MedPLIBError(f"there is no dimension {dimension!r:.80}; choose of {', '.join(DIMENSIONS)}")
        if dimension not in self._found:
            self._found[dimension] = self._measure_groups(dimension)
        return self._found[dimension]

    def _measure_groups(self, dimension: str) -> tuple[dict[str, Measures], Measures]:
        codes, names = self.groups[dimension]
        order = np.argsort(codes, kind="stable")
        ends = np.searchsorted(codes[order], np.arange(1, len(names) + 1))
        members = np.split(order, ends[:-1]) if names else []
        found: dict[str, Measures] = {}
        total = np.zeros((len(self.metrics), 1 + self.samples))  # the values, then the replicates
        known = np.zeros(total.shape, dtype=int)
        for index in sorted(range(len(names)), key=lambda index: names[index]):
            stream = zlib.crc32(names[index].encode("utf-8", "surrogatepass"))  # groups are drawn independently
            found[names[index]], values, replicates = self._measure(members[index], stream)
            both = np.concatenate([values[:, None], replicates], axis=1)
            total += np.nan_to_num(both)
            known += ~np.isnan(both)
        counts, drawn = known[:, 0], known[:, 1:]
        means = total / np.maximum(known, 1)  # a resampling in which some group had nothing to measure is left out
        replicates = np.where((drawn == counts[:, None]) & (drawn > 0), means[:, 1:], np.nan)
        return found, self._means(means[:, 0], replicates, counts)

    def _means(self, values: np.ndarray, replicates: np.ndarray, counts: np.ndarray) -> Measures:
        return {
            metric.name: Measure(float(values[i]), *interval(replicates[i]), int(counts[i]))
            for i, metric in enumerate(self.metrics)
            if counts[i]
        }

    def _measure(self, rows: np.ndarray, stream: int = 0) -> tuple[Measures, np.ndarray, np.ndarray]:
        """Measures of some rows; with them the value of each metric [M], and its replicates [M, B]."""
        data = self.data[rows]
        sums = self.sums_of(data.sum(axis=0))
        clusters = cluster_sums(data, self.clusters[rows])
        values = np.array([float(metric.compute(sums)) for metric in self.metrics])
        replicates = np.full((len(self.metrics), self.samples), np.nan)
        if self.samples and len(clusters) > 1:
            resampled = self.sums_of(bootstrap_sums(clusters, self.samples, (self.seed, stream)))
            replicates = np.stack([metric.compute(resampled) for metric in self.metrics])
            replicates[~spread(self.metrics, self.sums_of(clusters))] = np.nan
        measures = {}
        for metric, value, drawn in zip(self.metrics, values, replicates, strict=True):
            count = int(sums(metric.count))
            if count and not math.isnan(value):
                measures[metric.name] = Measure(float(value), *interval(drawn), count)
            elif metric.among and sums(metric.among) > 0:
                measures[metric.name] = Measure(math.nan, math.nan, math.nan, 0)
        return measures, values, replicates


def spread(metrics: Sequence[Metric], clusters: Sums) -> np.ndarray:
    """Which metrics are taken over two images or more, bool [M]: one alone says nothing about others."""
    return np.array([np.count_nonzero(clusters(metric.count)) > 1 for metric in metrics], dtype=bool)


def _plain(measures: Measures) -> dict[str, Any]:
    return {name: measure.to_dict() for name, measure in measures.items()}


class _Builder:
    """Gathers the numbers of a stream of rows."""

    def __init__(self, settings: RowSettings) -> None:
        self.settings = settings
        self.columns = columns_for(settings.thresholds, settings.surface)
        self.places = {name: index for index, name in enumerate(self.columns)}
        self.blocks: list[np.ndarray] = []
        self.keys: list[RowKey] = []
        self.asked: dict[tuple[str, int], set[int]] = {}
        self.images: dict[str, int] = {}
        self.image_codes: list[int] = []
        self.clusters: dict[str, int] = {}
        self.cluster_codes: list[int] = []
        self.references: list[int] = []
        self.repeated: list[str] = []
        self.names: dict[str, dict[str, int]] = {name: {} for name in DIMENSIONS}
        self.group_codes: dict[str, list[int]] = {name: [] for name in DIMENSIONS}
        self.published = {threshold: PublishedMasks() for threshold in settings.thresholds}

    def add(self, prediction: Prediction) -> None:
        found = score_row(prediction, self.settings)
        place = len(self.keys)
        if place % _BLOCK == 0:
            self.blocks.append(np.zeros((_BLOCK, len(self.columns))))
        target = self.blocks[-1][place % _BLOCK]
        for name, value in found.numbers.items():
            target[self.places[name]] = value
        # the modality that the record itself names; empty where that is no more than its file name says
        known = prediction.metadata.get("modality")
        own = "" if not known or known == modality_of(PurePath(prediction.image_path).name) else _group_name(known)
        for threshold, pairs in found.pairs.items():
            for intersection, union in pairs:
                self.published[threshold].add(prediction.image_path, intersection, union, own)
        self.keys.append(self._key(prediction))
        image = prediction.image_path or f"\0{place}"  # rows without an image stand alone
        self.image_codes.append(self.images.setdefault(image, len(self.images)))
        self.references.append(_checksum(prediction))
        groups = _groups_of(prediction)
        cluster = image if groups["patient"] == UNNAMED else f"\0{groups['patient']}"
        self.cluster_codes.append(self.clusters.setdefault(cluster, len(self.clusters)))
        for name, group in groups.items():
            self.group_codes[name].append(self.names[name].setdefault(group, len(self.names[name])))

    def _key(self, prediction: Prediction) -> RowKey:
        seen = self.asked.setdefault(prediction.key, set())
        asked = hash((prediction.image_path, prediction.prompt, prediction.gt))
        if asked in seen:
            self.repeated.append(f"{prediction.question_id} (row {len(self.keys) + 1})")
        seen.add(asked)
        return (*prediction.key, len(seen) - 1)

    def finish(self, samples: int, seed: int) -> Scores:
        if self.repeated:
            raise MedPLIBError(
                f"{len(self.repeated)} predictions are of a question that stands above them already: "
                f"{named(self.repeated)}; "
                "give each question once, of one run"
            )
        count = len(self.keys)
        empty = np.zeros((0, len(self.columns)))
        return Scores(
            settings=self.settings,
            keys=self.keys,
            columns=self.columns,
            data=np.concatenate(self.blocks)[:count] if self.blocks else empty,
            images=np.array(self.image_codes, dtype=np.int32),
            clusters=np.array(self.cluster_codes, dtype=np.int32),
            references=np.array(self.references, dtype=np.uint32),
            groups={
                name: (np.array(self.group_codes[name], dtype=np.int32), list(self.names[name])) for name in DIMENSIONS
            },
            samples=samples,
            seed=seed,
            published_masks=self.published,
        )


def _groups_of(prediction: Prediction) -> dict[str, str]:
    known = prediction.metadata
    modality = known.get("modality") or modality_of(PurePath(prediction.image_path).name)
    named = {**{name: known.get(name) for name in DIMENSIONS}, "task": task_of(prediction), "modality": modality}
    return {name: _group_name(value) for name, value in named.items()}


def _group_name(value: Any) -> str:
    text = ", ".join(str(part) for part in value) if isinstance(value, list | tuple) else str(value or "")
    return text.strip() or UNNAMED


def _checksum(prediction: Prediction) -> int:
    found = zlib.crc32(prediction.gt.encode("utf-8", "surrogatepass"))
    for mask in prediction.gt_masks or ():
        found = zlib.crc32(str(mask.get("counts")).encode("utf-8", "surrogatepass"), found)
    return found


# --- text -------------------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """A value with four decimals, large ones with fewer; – for NaN."""
    if math.isnan(value):
        return "–"
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.1f}"


def span(low: float, high: float) -> str:
    """An interval in brackets; nothing where there is none."""
    return "" if math.isnan(low) else f"[{number(low)}, {number(high)}]"


def aligned(lines: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Cells in columns, a rule under the first line; columns are flush right but those in ``left``."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (lines[0], rule, *lines[1:])
    )


def _cell(measure: Measure | None) -> str:
    return "–" if measure is None else f"{number(measure.value)} {span(measure.low, measure.high)}".rstrip()
