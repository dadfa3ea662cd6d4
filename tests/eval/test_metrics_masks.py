"""Mask overlaps and outline distances, against counted pixels and brute force."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest

from model.errors import MedPLIBError
from model.eval.metrics.masks import best_matching, merged, outline, outline_distances, overlaps, surface_scores
from model.processing.masks import checked_rle, decode_rle, encode_rle


def drawn(text: str) -> np.ndarray:
    """Rows of a mask, ``#`` inside, parted by blanks."""
    return np.array([[letter == "#" for letter in row] for row in text.split()])


def random_mask(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    for _ in range(int(rng.integers(1, 4))):
        top, left = (int(rng.integers(0, side)) for side in size)
        mask[top : top + int(rng.integers(1, size[0] + 1)), left : left + int(rng.integers(1, size[1] + 1))] = True
    return mask


def test_overlaps_are_counted_pixels() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        size = (int(rng.integers(1, 80)), int(rng.integers(1, 80)))
        painted, wanted = ([random_mask(rng, size) for _ in range(int(rng.integers(0, 4)))] for _ in range(2))
        wanted.append(np.zeros(size, dtype=bool))
        found = overlaps(*([checked_rle(encode_rle(mask)) for mask in masks] for masks in (painted, wanted)))
        assert found.predicted == [mask.sum() for mask in painted]
        assert found.wanted == [mask.sum() for mask in wanted]
        assert found.intersections == [[(left & right).sum() for right in wanted] for left in painted]


def test_all_forms_of_an_encoding_are_read() -> None:
    mask = drawn(".#. ### .#.")
    compressed = encode_rle(mask)
    forms = [compressed, {**compressed, "counts": compressed["counts"].encode()}]
    forms.append({"size": [3, 3], "counts": [1, 1, 1, 3, 1, 1, 1]})  # down the columns
    assert all(np.array_equal(decode_rle(checked_rle(form)), mask) for form in forms)


@pytest.mark.parametrize(
    "rle",
    [
        None,
        {},
        {"size": [3, 3]},
        {"size": [3], "counts": "9"},
        {"size": [3, 3], "counts": ""},
        {"size": [3, 3], "counts": "é"},
        {"size": [3, 3], "counts": "\x01"},
        {"size": [3, 3], "counts": "8"},  # one pixel short
        {"size": [3, 3], "counts": ":"},  # one too many
        {"size": [0, 3], "counts": "0"},
        {"size": [3, 3], "counts": "o"},  # ends in the middle of a run
        {"size": [3, 3], "counts": "oooooooo0"},
        {"size": [3, 3], "counts": [4, -1, 6]},
        {"size": [3, 3], "counts": [[9]]},
        {"size": [3, 3], "counts": 9},
        {"size": [1 << 20, 1 << 20], "counts": [1 << 40]},
    ],
)
def test_a_damaged_encoding_never_reaches_the_library(rle: object) -> None:
    with pytest.raises(MedPLIBError, match="a mask encoding"):
        checked_rle(rle)  # type: ignore[arg-type]


def test_cut_and_changed_encodings_are_refused_or_fill_their_size() -> None:
    rng = np.random.default_rng(1)
    counts = encode_rle(random_mask(rng, (40, 50)))["counts"].encode()
    for _ in range(300):
        damaged = bytearray(counts[: int(rng.integers(1, len(counts) + 1))])
        damaged[int(rng.integers(len(damaged)))] = int(rng.integers(40, 120))
        rle = {"size": [40, 50], "counts": bytes(damaged)}
        try:
            checked = checked_rle(rle)
        except MedPLIBError:
            continue
        assert overlaps([checked], [checked]).predicted[0] == decode_rle(rle).sum()


def test_masks_of_two_sizes_are_refused() -> None:
    masks = [checked_rle(encode_rle(np.ones(size, dtype=bool))) for size in ((3, 4), (4, 3))]
    with pytest.raises(MedPLIBError, match="3×4 and 4×3"):
        overlaps(masks[:1], masks[1:])


def test_merged_masks_are_their_union() -> None:
    masks = [drawn("#.. ... ..."), drawn("#.. .#. ..."), drawn("... ... ..#")]
    union = merged([checked_rle(encode_rle(mask)) for mask in masks])
    assert np.array_equal(decode_rle(union[0]), drawn("#.. .#. ..#"))
    assert merged([]) == []


def test_the_best_matching_beats_every_other() -> None:
    rng = np.random.default_rng(2)
    for rows, columns in product(range(1, 5), repeat=2):
        gains = np.round(rng.random((rows, columns)) * 4) / 4  # ties too
        pairs = best_matching(gains)
        small, large = sorted((rows, columns))
        assert len({row for row, _ in pairs}) == len({column for _, column in pairs}) == len(pairs) == small
        wide = gains if rows <= columns else gains.T
        best = max(sum(wide[i, j] for i, j in enumerate(order)) for order in permutations(range(large), small))
        assert sum(gains[pair] for pair in pairs) == pytest.approx(best)


def test_an_outline_has_a_neighbour_outside() -> None:
    assert np.array_equal(outline(drawn("##### ##### ##### ##### ....#")), drawn("##### #...# #...# ##### ....#"))


def test_outline_distances_equal_brute_force_for_uneven_spacing() -> None:
    rng = np.random.default_rng(3)
    for _ in range(60):
        size = (int(rng.integers(1, 25)), int(rng.integers(1, 25)))
        left, right = random_mask(rng, size), random_mask(rng, size)
        spacing = (float(rng.uniform(0.3, 3)), float(rng.uniform(0.3, 3)))
        points = [np.argwhere(outline(mask)) * spacing for mask in (left, right)]
        between = np.linalg.norm(points[0][:, None] - points[1][None, :], axis=-1)
        to_right, to_left = outline_distances(left, right, spacing)
        assert np.allclose(to_right, between.min(axis=1))
        assert np.allclose(to_left, between.min(axis=0))


def bar(first: int, last: int) -> dict[str, object]:
    """One row of 100 pixels, set from ``first`` to ``last``."""
    mask = np.zeros((1, 100), dtype=bool)
    mask[0, first : last + 1] = True
    return checked_rle(encode_rle(mask))


def test_surface_scores_of_shifted_bars() -> None:
    # a bar of 20 shifted by 4: each outline pixel of a one-row mask; 4 of 20 lie 1, 2, 3, 4 beyond the other
    hd95, nsd = surface_scores(bar(14, 33), bar(10, 29), tolerance=2)
    assert hd95 == pytest.approx(np.percentile([0] * 16 + [1, 2, 3, 4], 95))
    assert nsd == pytest.approx(18 / 20)
    assert surface_scores(bar(14, 33), bar(10, 29), (7, 0.5), tolerance=2) == pytest.approx((hd95 / 2, 1))


def test_hd95_is_the_larger_direction() -> None:
    # every pixel of the short bar is on the long one; of the long one half are 1 … 10 away
    hd95, _ = surface_scores(bar(0, 9), bar(0, 19))
    assert hd95 == pytest.approx(np.percentile([0] * 10 + list(range(1, 11)), 95))
    assert surface_scores(bar(0, 19), bar(0, 9))[0] == hd95


def test_a_missing_mask_costs_the_diagonal() -> None:
    empty = checked_rle(encode_rle(np.zeros((1, 100), dtype=bool)))
    for missing in (None, empty):
        assert surface_scores(missing, bar(3, 8), (3, 0.04)) == (5, 0)
    assert surface_scores(bar(3, 8), bar(3, 8)) == (0, 1)
