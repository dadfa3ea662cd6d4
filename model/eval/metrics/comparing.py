"""Whether two runs over the same questions differ: paired intervals and permutation tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from model.errors import MedPLIBError
from model.eval.metrics.definitions import Metric, bootstrap_sums, cluster_sums, flipped_sums, interval
from model.eval.metrics.scores import RowKey, Scores, aligned, number, span, spread
from model.eval.predictions import named

_SLACK = 1e-12  # differences of this size are rounding


@dataclass(frozen=True)
class Difference:
    """One metric of two runs."""

    first: float  # its value in the first run
    second: float  # its value in the second
    difference: float  # second − first
    # lower end of the difference's 95 % interval (paired bootstrap over images); NaN with fewer than two images.
    low: float
    high: float  # its upper end
    # two-sided, of a permutation test that exchanges the two runs' answers image by image; NaN likewise.
    p_value: float
    count: int  # things the first run's value was taken over

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready mapping; null for NaN."""
        return {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in vars(self).items()
        }


Differences = dict[str, Difference]


class Comparison:
    """Differences of two runs; ``compare`` makes it. P-values are of single tests, not corrected for their number.

    Attributes:
        metrics: those that both runs have.
        overall: differences over all rows.
    """

    def __init__(self, first: Scores, second: Scores, order: np.ndarray, permutations: int) -> None:
        self.first, self.second, self.permutations = first, second, permutations
        self._order = order
        shared = {metric.name for metric in second.metrics}
        self.metrics: tuple[Metric, ...] = tuple(m for m in first.metrics if m.name in shared)
        self._found: dict[str, dict[str, Differences]] = {}
        self.overall = self._compare(np.arange(len(first.keys)))

    def by(self, dimension: str) -> dict[str, Differences]:
        """Differences for each group of a dimension, as the first run names the groups.

        Raises:
            MedPLIBError: there is no such dimension.
        """
        if dimension not in self._found:
            groups = self.first.rows_by(dimension)
            self._found[dimension] = {name: self._compare(rows) for name, rows in groups.items()}
        return self._found[dimension]

    def table(self, by: str | None = None, only: Sequence[str] = ()) -> str:
        """The differences as text, overall or for each group; ``only`` names the metrics that are shown."""
        lines = [[by or "", "metric", "first", "second", "difference", "95 % interval", "p", "n"]]
        for group, found in self.by(by).items() if by else (("", self.overall),):
            for metric in self.metrics:
                if metric.name in found and (metric.name in only if only else by is None or metric.headline):
                    d = found[metric.name]
                    p_value = "" if math.isnan(d.p_value) else f"{d.p_value:.4f}"
                    values = [number(d.first), number(d.second), f"{d.difference:+.4f}", span(d.low, d.high), p_value]
                    lines.append([group, metric.name, *values, str(d.count)])
        return aligned(lines if by else [line[1:] for line in lines], left=(0, 1, 5) if by else (0, 4))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready mapping of all differences."""

        def plain(found: Differences) -> dict[str, Any]:
            return {name: difference.to_dict() for name, difference in found.items()}

        return {
            "rows": len(self.first.keys),
            "bootstrap_samples": self.first.samples,
            "permutations": self.permutations,
            "seed": self.first.seed,
            "overall": plain(self.overall),
            "by": {
                name: {group: plain(found) for group, found in self.by(name).items()} for name in self.first.dimensions
            },
        }

    def _compare(self, rows: np.ndarray) -> Differences:
        runs = (self.first, self.second)
        data = (self.first.data[rows], self.second.data[self._order[rows]])
        values = [self._values(run, part.sum(axis=0)) for run, part in zip(runs, data, strict=True)]
        clusters = [cluster_sums(part, self.first.clusters[rows]) for part in data]
        drawn = flipped = np.full((len(self.metrics), 1), np.nan)
        if len(clusters[0]) > 1:
            width = clusters[0].shape[1]
            both = bootstrap_sums(np.concatenate(clusters, axis=1), self.first.samples, (self.first.seed,))
            drawn = self._values(self.second, both[:, width:]) - self._values(self.first, both[:, :width])
            exchanged = self._exchanged(clusters)
            flipped = self._values(self.second, exchanged[1]) - self._values(self.first, exchanged[0])
            alone = ~spread(self.metrics, self.first.sums_of(clusters[0]))
            drawn[alone] = flipped[alone] = np.nan
        counts = self.first.sums_of(data[0].sum(axis=0))
        found = {}
        for index, metric in enumerate(self.metrics):
            first, second = float(values[0][index]), float(values[1][index])
            if math.isnan(first) or math.isnan(second):
                continue
            kept = np.abs(flipped[index][~np.isnan(flipped[index])])
            further = np.count_nonzero(kept >= abs(second - first) - _SLACK)
            p_value = (1 + further) / (1 + kept.size) if kept.size else math.nan
            ends = interval(drawn[index])
            found[metric.name] = Difference(first, second, second - first, *ends, p_value, int(counts(metric.count)))
        return found

    def _exchanged(self, clusters: list[np.ndarray]) -> list[np.ndarray]:
        """Permuted sums of both runs, each in its own columns; a column of one run alone stays where it is."""
        shared = [name for name in self.first.columns if name in self.second.columns]
        places = [[run.columns.index(name) for name in shared] for run in (self.first, self.second)]
        parts = [part[:, place] for part, place in zip(clusters, places, strict=True)]
        moved = flipped_sums(parts[0], parts[1], self.permutations, (self.first.seed, 1))
        whole = [np.repeat(part.sum(axis=0)[None], self.permutations, axis=0) for part in clusters]
        for sums, place, exchanged in zip(whole, places, moved, strict=True):
            sums[:, place] = exchanged
        return whole

    def _values(self, run: Scores, sums: np.ndarray) -> np.ndarray:
        """Values [M, …] of the shared metrics from sums [..., C] in the run's own columns."""
        read = run.sums_of(sums)
        return np.stack([np.asarray(metric.compute(read), dtype=np.float64) for metric in self.metrics])


def compare(first: Scores, second: Scores, *, permutations: int = 2000) -> Comparison:
    """Pair two runs question by question; the rows may be in different orders.

    Args:
        first: scores of one run; its groups, images, seed and number of resamplings are used.
        second: scores of another run over the same questions.
        permutations: of the sign-flip test; the smallest p-value is 1 / (permutations + 1).

    Raises:
        MedPLIBError: the runs answer different questions, have different references, or were scored differently.
    """
    if not first.keys or not second.keys:
        raise MedPLIBError("a run without predictions cannot be compared; give two runs over the same questions")
    for name in ("tolerance_mm", "tolerance_px") if first.settings.surface and second.settings.surface else ():
        values = [getattr(run.settings, name) for run in (first, second)]
        if values[0] != values[1]:
            raise MedPLIBError(f"the runs were scored with a {name} of {values[0]} and {values[1]}; use the same")
    if not {*first.settings.thresholds} & {*second.settings.thresholds}:
        raise MedPLIBError("the runs were scored at different thresholds; score both at the same")
    places = {key: index for index, key in enumerate(second.keys)}
    known = set(first.keys)
    kinds = {
        "only in the first": [_key_text(key) for key in first.keys if key not in places],
        "only in the second": [_key_text(key) for key in second.keys if key not in known],
    }
    if gaps := [f"{len(keys)} {kind} ({named(keys)})" for kind, keys in kinds.items() if keys]:
        raise MedPLIBError(
            f"the runs do not answer the same questions: {'; '.join(gaps)}; finish or repeat one of them"
        )
    order = np.array([places[key] for key in first.keys])
    differing = np.flatnonzero(first.references != second.references[order])
    if differing.size:
        some = named([_key_text(first.keys[index]) for index in differing])
        raise MedPLIBError(
            f"the runs have different reference answers for {differing.size} questions ({some}); compare runs over the "
            "same data file"
        )
    return Comparison(first, second, order, permutations)


def _key_text(key: RowKey) -> str:
    return " ".join([key[0], *([f"turn {key[1]}"] if key[1] else []), *([f"(number {key[2] + 1})"] if key[2] else [])])
