"""Resampling of whole images: bootstrap replicates and sign-flip permutations of summed columns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_DRAWS_AT_ONCE = 1 << 22


def cluster_sums(data: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Sums of the rows of each cluster.

    Args:
        data: float64 [N, C].
        clusters: int [N], any numbers; rows with the same one belong together.

    Returns:
        float64 [K, C], one row for each cluster that occurs.
    """
    if not len(data):
        return np.zeros((0, data.shape[1]))
    order = np.argsort(clusters, kind="stable")
    sorted_clusters = clusters[order]
    starts = np.flatnonzero(np.concatenate(([True], sorted_clusters[1:] != sorted_clusters[:-1])))
    return np.add.reduceat(data[order], starts, axis=0)


def bootstrap_sums(sums: np.ndarray, samples: int, seed: Sequence[int]) -> np.ndarray:
    """Column sums of ``samples`` resamplings that draw K of the K clusters with replacement.

    Args:
        sums: float64 [K, C], K ≥ 1.
        samples: number of resamplings B.
        seed: makes them repeatable; the same seed draws the same clusters whatever the columns.

    Returns:
        float64 [B, C].
    """
    rng, count = np.random.default_rng(seed), len(sums)
    found = [sums[:0]]
    for size in _blocks(samples, count):
        drawn = rng.integers(0, count, size=(size, count)) + np.arange(size)[:, None] * count
        times = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)
        found.append(times.astype(np.float64) @ sums)
    return np.concatenate(found)


def flipped_sums(
    first: np.ndarray, second: np.ndarray, samples: int, seed: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Column sums of two paired runs after each cluster changed sides or not, by a fair coin.

    Args:
        first: float64 [K, C], sums of one run's clusters.
        second: float64 [K, C], of the other run's, in the same order.
        samples: number of permutations P.
        seed: makes them repeatable.

    Returns:
        float64 [P, C] for each run.
    """
    rng = np.random.default_rng(seed)
    sizes = _blocks(samples, len(first))
    coins = (rng.integers(0, 2, size=(size, len(first)), dtype=np.int8).astype(np.float64) for size in sizes)
    moved = np.concatenate([first[:0], *(drawn @ (second - first) for drawn in coins)])
    return first.sum(axis=0) + moved, second.sum(axis=0) - moved


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of replicates, float [B]; NaNs, where a resampling had nothing to measure, are left out."""
    kept = values[~np.isnan(values)]
    if not kept.size:
        return float("nan"), float("nan")
    low, high = np.percentile(kept, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def _blocks(samples: int, clusters: int) -> list[int]:
    """Sizes of the blocks that are drawn at a time: they bound memory whatever the number of rows."""
    step = max(1, _DRAWS_AT_ONCE // max(1, clusters))
    return [min(step, samples - start) for start in range(0, samples, step)]
