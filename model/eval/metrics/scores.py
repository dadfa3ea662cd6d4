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
from model.eval.metrics.definitions import (
    CONVENTIONS,
    Metric,
    Sums,
    bootstrap_sums,
    cluster_sums,
    columns_for,
    interval,
    metrics_for,
)
from model.eval.metrics.published import PublishedMasks
from model.eval.metrics.rows import RowSettings, score_row, task_of
from model.eval.predictions import Prediction, named

DIMENSIONS = ("task", "kind", "modality", "structure", "dataset", "absent_kind", "patient")
"""What tables can be split by."""
UNNAMED = "(unnamed)"
"""The group of rows that do not say."""
MEAN_ROW = "mean of these"

RowKey = tuple[str, int, int]
"""Question id as text, turn, and how many rows with both came before: published files may number from 0 twice."""


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
        return {name: None if math.isnan(value) else value for name, value in vars(self).items()}


Measures = dict[str, Measure]


@dataclass(frozen=True, eq=False)
class Scores:
    """Per-row numbers of one run and the metrics computed from them; see ``score_predictions``."""

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
    samples: int  # bootstrap resamplings
    seed: int  # of the resampling
    # for each threshold the published grounding numbers, over every reference mask and the predicted one of the same
    # number.
    published_masks: Mapping[float | None, PublishedMasks] = field(repr=False)
    _found: dict[str, tuple[dict[str, Measures], Measures]] = field(default_factory=dict, repr=False)

    @cached_property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics that these rows have anything to say about, in the order of the tables."""
        sums = self.sums_of(self.data.sum(axis=0))
        defined = metrics_for(self.settings.thresholds, self.settings.surface)
        return tuple(metric for metric in defined if sums(metric.among or metric.count) > 0)

    @cached_property
    def dimensions(self) -> tuple[str, ...]:
        """The dimensions that any row names a group of."""
        return tuple(name for name in DIMENSIONS if self.groups[name][1] not in ([], [UNNAMED]))

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

    def rows_by(self, dimension: str) -> dict[str, np.ndarray]:
        """Row numbers of each group, in the order of the groups' names.

        Raises:
            MedPLIBError: there is no such dimension.
        """
        if dimension not in self.groups:
            raise MedPLIBError(f"there is no dimension {dimension!r:.80}; choose of {', '.join(self.groups)}")
        codes, names = self.groups[dimension]
        members = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes, minlength=len(names)))[:-1])
        return dict(sorted(zip(names, members, strict=True))) if names else {}

    def total(self, column: str) -> float:
        """Sum of one column over all rows."""
        return float(self.data[:, self.columns.index(column)].sum())

    def sums_of(self, values: np.ndarray) -> Sums:
        """Reader of columns by name, as the metrics take it, from an array whose last axis is the columns."""
        places = {name: index for index, name in enumerate(self.columns)}
        return lambda name: values[..., places[name]]

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

        def plain(measures: Measures) -> dict[str, Any]:
            return {name: measure.to_dict() for name, measure in measures.items()}

        return {
            "rows": len(self.keys),
            "images": int(np.unique(self.images).size),
            "patients": sum(name != UNNAMED for name in self.groups["patient"][1]),
            "errors": int(self.total("error")),
            "grounding_rows_without_reference_masks": int(self.total("unscored")),
            "settings": {
                **vars(self.settings),
                "thresholds": [threshold for threshold in self.settings.thresholds if threshold is not None],
                "bootstrap_samples": self.samples,
                "seed": self.seed,
            },
            "conventions": dict(CONVENTIONS),
            "metrics": {
                m.name: {"meaning": m.meaning, "higher_is_better": m.higher_is_better, "unit": m.unit}
                for m in self.metrics
            },
            "overall": plain(self.overall),
            "by": {name: {group: plain(m) for group, m in self.by(name).items()} for name in self.dimensions},
            "mean_over": {name: plain(self.mean_over(name)) for name in self.dimensions},
            "published_grounding": {
                "as written" if threshold is None else f"{threshold:g}": masks.to_dict()
                for threshold, masks in self.published_masks.items()
                if masks.count
            },
        }

    def _measure(self, rows: np.ndarray, stream: int = 0) -> tuple[Measures, np.ndarray]:
        """Measures of some rows, and the value of each metric before its replicates [M, 1 + B]."""
        data = self.data[rows]
        sums = self.sums_of(data.sum(axis=0))
        clusters = cluster_sums(data, self.clusters[rows])
        values = np.full((len(self.metrics), 1 + self.samples), np.nan)
        values[:, 0] = [float(metric.compute(sums)) for metric in self.metrics]
        if self.samples and len(clusters) > 1:
            resampled = self.sums_of(bootstrap_sums(clusters, self.samples, (self.seed, stream)))
            values[:, 1:] = [metric.compute(resampled) for metric in self.metrics]
            values[~spread(self.metrics, self.sums_of(clusters)), 1:] = np.nan
        measures = {}
        for metric, found in zip(self.metrics, values, strict=True):
            count = int(sums(metric.count))
            if count and not math.isnan(found[0]):
                measures[metric.name] = Measure(float(found[0]), *interval(found[1:]), count)
            elif metric.among and sums(metric.among) > 0:
                measures[metric.name] = Measure(math.nan, math.nan, math.nan, 0)
        return measures, values

    def _split(self, dimension: str) -> tuple[dict[str, Measures], Measures]:
        """Measures by group of a dimension, and their unweighted means."""
        if dimension not in self._found:
            found: dict[str, Measures] = {}
            total = np.zeros((len(self.metrics), 1 + self.samples))
            known = np.zeros(total.shape, dtype=int)
            for name, rows in self.rows_by(dimension).items():
                stream = zlib.crc32(name.encode("utf-8", "surrogatepass"))  # groups are drawn independently
                found[name], values = self._measure(rows, stream)
                total += np.nan_to_num(values)
                known += ~np.isnan(values)
            counts, drawn = known[:, 0], known[:, 1:]
            means = total / np.maximum(known, 1)  # a resampling in which some group had nothing to measure is left out
            replicates = np.where((drawn == counts[:, None]) & (drawn > 0), means[:, 1:], np.nan)
            self._found[dimension] = found, self._means(means[:, 0], replicates, counts)
        return self._found[dimension]

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

    def _means(self, values: np.ndarray, replicates: np.ndarray, counts: np.ndarray) -> Measures:
        return {
            metric.name: Measure(float(values[i]), *interval(replicates[i]), int(counts[i]))
            for i, metric in enumerate(self.metrics)
            if counts[i]
        }


def spread(metrics: Sequence[Metric], clusters: Sums) -> np.ndarray:
    """Which metrics are taken over two images or more, bool [M]: one alone says nothing about others."""
    return np.array([np.count_nonzero(clusters(metric.count)) > 1 for metric in metrics], dtype=bool)


# --- from predictions -----------------------------------------------------------------------------------------------


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
    columns = columns_for(settings.thresholds, surface)
    places = {name: index for index, name in enumerate(columns)}
    published = {threshold: PublishedMasks() for threshold in settings.thresholds}
    data: list[np.ndarray] = []
    keys: list[RowKey] = []
    references: list[int] = []
    repeated: list[str] = []
    asked: dict[tuple[str, int], set[int]] = {}
    codes: dict[str, list[int]] = {name: [] for name in ("image", "cluster", *DIMENSIONS)}
    names: dict[str, dict[str, int]] = {name: {} for name in codes}
    for place, row in enumerate(rows):
        numbers, pairs = score_row(row, settings)
        data.append(np.zeros(len(columns)))
        data[-1][[places[name] for name in numbers]] = list(numbers.values())
        seen, content = asked.setdefault(row.key, set()), hash((row.image_path, row.prompt, row.gt))
        if content in seen:
            repeated.append(f"{row.question_id} (row {place + 1})")
        seen.add(content)
        keys.append((*row.key, len(seen) - 1))
        references.append(_checksum(row))
        by_name = modality_of(PurePath(row.image_path).name)
        known = {**row.metadata, "task": task_of(row), "modality": row.metadata.get("modality") or by_name}
        group = {name: _group_name(known.get(name)) for name in DIMENSIONS}
        group["image"] = row.image_path or f"\0{place}"  # rows without an image stand alone
        group["cluster"] = group["image"] if group["patient"] == UNNAMED else f"\0{group['patient']}"
        for name, code in codes.items():
            code.append(names[name].setdefault(group[name], len(names[name])))
        # the modality that the record itself names; empty where that is no more than its file name says
        own = "" if known["modality"] == by_name else group["modality"]
        for threshold, found in pairs.items():
            for intersection, union in found:
                published[threshold].add(row.image_path, intersection, union, own)
    if repeated:
        raise MedPLIBError(
            f"{len(repeated)} predictions are of a question that stands above them already: {named(repeated)}; "
            "give each question once, of one run"
        )
    coded = {name: np.array(found, dtype=np.int32) for name, found in codes.items()}
    return Scores(
        settings=settings,
        keys=keys,
        columns=columns,
        data=np.stack(data) if data else np.zeros((0, len(columns))),
        images=coded["image"],
        clusters=coded["cluster"],
        references=np.array(references, dtype=np.uint32),
        groups={name: (coded[name], list(names[name])) for name in DIMENSIONS},
        samples=samples,
        seed=seed,
        published_masks=published,
    )


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
