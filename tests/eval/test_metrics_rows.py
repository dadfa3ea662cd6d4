"""Scores of one answer: words against values worked out by hand, masks against counted pixels and brute force."""

from __future__ import annotations

from itertools import permutations, product
from typing import Any

import numpy as np
import pytest
from scipy.ndimage import binary_erosion

from model.errors import MedPLIBError
from model.eval.metrics.published import format_table, most_similar
from model.eval.metrics.rows import (
    best_pairs,
    merged,
    ngram_matches,
    overlaps,
    rouge_l,
    surface_scores,
    token_overlap,
    words,
)
from model.processing.masks import checked_rle, decode_rle, encode_rle

# --- text -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The Liver.", ["the", "liver"]),
        ("X-ray, 1,000 ml", ["x", "ray", "1000", "ml"]),
        ("3.5cm", ["3.5", "cm"]),
        ("1,2 and 12,34", ["1", "2", "and", "12", "34"]),
        ("can’t SEE", ["can't", "see"]),
        ("It is <SEG>.", ["it", "is"]),
        ("p < 5 and q > 3", ["p", "5", "and", "q", "3"]),
        ("ﬁbrosis x²", ["fibrosis", "x", "2"]),
        ("snake_case", ["snake", "case"]),
        ("… ?!", []),
        ("左肺 CT 検査", ["左", "肺", "ct", "検", "査"]),  # scripts without blanks go by characters
        ("ม้า", ["ม้", "า"]),
    ],
)
def test_words(text: str, found: list[str]) -> None:
    assert words(text) == found


def test_token_overlap_counts_repetitions() -> None:
    # shared: liver once, lung once; the answer has 4 content words, the reference 3
    assert token_overlap("the liver liver lung seen", "liver, lung, spleen") == pytest.approx((2 / 4, 2 / 3, 4 / 7))
    assert token_overlap("", "liver") == token_overlap("liver", "...") == (0, 0, 0)
    assert token_overlap("...", "...") == (1, 1, 1)
    assert token_overlap("左肺上叶有肿块", "右肺上叶有肿块") == pytest.approx((6 / 7, 6 / 7, 6 / 7))


def test_ngram_matches_are_clipped() -> None:
    assert ngram_matches(list("aaab"), list("aab")) == (3, 2, 1, 0)
    assert ngram_matches(list("abcd"), list("abcd")) == (4, 3, 2, 1)
    assert ngram_matches(list("ab"), list("ba")) == (2, 0, 0, 0)
    assert ngram_matches([], ["a"]) == (0, 0, 0, 0)


def test_rouge_l() -> None:
    # the longest common subsequence of "a c b d" and "a b c d e" has 3 words
    assert rouge_l(list("acbd"), list("abcde")) == pytest.approx(2 * 3 / 9)
    assert rouge_l(["x"] * 300, ["x"] * 200) == pytest.approx(2 * 200 / 500)
    assert (rouge_l([], ["a"]), rouge_l([], [])) == (0, 1)


def test_of_equally_similar_candidates_the_later_wins() -> None:
    assert most_similar("ct ct", ["ct", "mr", "ct", "liver"]) == 2
    assert most_similar("liver", ["liver", "live", "livers"]) == 0
    assert most_similar("", ["liver", "lung"]) == 1


def test_published_table_is_aligned_at_the_point() -> None:
    table = format_table({"a": 66.16541, "open accuracy": 1100.0, "b": 0.0, "c": 1.5e-229})
    assert table.splitlines() == [
        "Metric           Performance",
        "-------------  -------------",
        "a                  66.1654",
        "open accuracy    1100",
        "b                   0",
        "c                   1.5e-229",
    ]


# --- masks ----------------------------------------------------------------------------------------------------------


def random_mask(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    for _ in range(int(rng.integers(1, 4))):
        top, left = (int(rng.integers(0, side)) for side in size)
        mask[top : top + int(rng.integers(1, size[0] + 1)), left : left + int(rng.integers(1, size[1] + 1))] = True
    return mask


def encoded(*masks: np.ndarray) -> list[dict[str, Any]]:
    return [checked_rle(encode_rle(mask)) for mask in masks]


def test_overlaps_are_counted_pixels() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        size = (int(rng.integers(1, 80)), int(rng.integers(1, 80)))
        ours, wanted = ([random_mask(rng, size) for _ in range(int(rng.integers(0, 4)))] for _ in range(2))
        wanted.append(np.zeros(size, dtype=bool))
        found = overlaps(encoded(*ours), encoded(*wanted))
        ours += [np.zeros(size, dtype=bool)] * (len(wanted) - len(ours))  # missing masks are empty
        assert found[0].tolist() == [mask.sum() for mask in ours]
        assert found[1].tolist() == [mask.sum() for mask in wanted]
        assert found[2].tolist() == [[(left & right).sum() for right in wanted] for left in ours]
        (union,) = merged(encoded(*wanted))
        assert np.array_equal(decode_rle(union), np.any(wanted, axis=0))
    assert merged([]) == []


def test_all_forms_of_an_encoding_are_read() -> None:
    mask = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], dtype=bool)
    compressed = encode_rle(mask)
    forms = [compressed, {**compressed, "counts": compressed["counts"].encode()}]
    forms.append({"size": [3, 3], "counts": [1, 1, 1, 3, 1, 1, 1]})  # down the columns
    assert all(np.array_equal(decode_rle(checked_rle(form)), mask) for form in forms)


@pytest.mark.parametrize(
    "rle",
    [
        *(None, {}, {"size": [3, 3]}, {"size": [3], "counts": "9"}, {"size": [0, 3], "counts": "0"}),
        *({"size": [3, 3], "counts": counts} for counts in ("", "é", "\x01", [4, -1, 6], [[9]], 9)),
        {"size": [3, 3], "counts": "8"},  # one pixel short
        {"size": [3, 3], "counts": ":"},  # one too many
        {"size": [3, 3], "counts": "o"},  # ends in the middle of a run
        {"size": [3, 3], "counts": "oooooooo0"},
        {"size": [1 << 20, 1 << 20], "counts": [1 << 40]},
    ],
)
def test_a_damaged_encoding_never_reaches_the_library(rle: object) -> None:
    with pytest.raises(MedPLIBError, match="a mask encoding"):
        checked_rle(rle)  # type: ignore[arg-type]


def test_damaged_encodings_are_refused_or_fill_their_size() -> None:
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
        assert overlaps([checked], [checked])[0][0] == decode_rle(rle).sum()


def test_masks_of_two_sizes_are_refused() -> None:
    masks = encoded(*(np.ones(size, dtype=bool) for size in ((3, 4), (4, 3))))
    with pytest.raises(MedPLIBError, match="3×4 and 4×3"):
        overlaps(masks[:1], masks[1:])


def test_best_matching_beats_every_other() -> None:
    rng = np.random.default_rng(2)
    for rows, columns in product(range(1, 5), repeat=2):
        masks = [[random_mask(rng, (6, 6)) for _ in range(number)] for number in (rows, columns)]
        ours, theirs, inter = overlaps(*(encoded(*part) for part in masks))
        ious = inter / (ours[:, None] + theirs - inter)
        best = max(sum(ious[row, j] for j, row in enumerate(o)) for o in permutations(range(len(ours)), columns))
        assert sum(i / union for i, union in best_pairs(ours, theirs, inter)) == pytest.approx(best)


def test_surface_scores_equal_brute_force_for_uneven_spacing() -> None:
    rng = np.random.default_rng(3)
    for _ in range(60):
        size = (int(rng.integers(1, 25)), int(rng.integers(1, 25)))
        masks = [random_mask(rng, size) for _ in range(2)]
        spacing = (float(rng.uniform(0.3, 3)), float(rng.uniform(0.3, 3)))
        points = [np.argwhere(mask & ~binary_erosion(mask)) * spacing for mask in masks]
        between = np.linalg.norm(points[0][:, None] - points[1][None, :], axis=-1)
        distances = [between.min(axis=1), between.min(axis=0)]
        hd95, nsd = surface_scores(*encoded(*masks), spacing, tolerance=1.7)
        assert hd95 == pytest.approx(max(np.percentile(one, 95) for one in distances))
        assert nsd == pytest.approx(np.mean(np.concatenate(distances) <= 1.7))


def bar(first: int, last: int) -> dict[str, Any]:
    """One row of 100 pixels, set from ``first`` to ``last``."""
    mask = np.zeros((1, 100), dtype=bool)
    mask[0, first : last + 1] = True
    return encoded(mask)[0]


def test_surface_scores_by_hand() -> None:
    # a bar of 20 shifted by 4: each outline pixel of a one-row mask; 4 of 20 lie 1, 2, 3, 4 beyond the other
    hd95, nsd = surface_scores(bar(14, 33), bar(10, 29), tolerance=2)
    assert hd95 == pytest.approx(np.percentile([0] * 16 + [1, 2, 3, 4], 95))
    assert nsd == pytest.approx(18 / 20)
    assert surface_scores(bar(14, 33), bar(10, 29), (7, 0.5), tolerance=2) == pytest.approx((hd95 / 2, 1))
    # the larger direction: every pixel of the short bar is on the long one, of which half are 1 … 10 away
    expected = pytest.approx(np.percentile([0] * 10 + list(range(1, 11)), 95))
    assert surface_scores(bar(0, 9), bar(0, 19))[0] == surface_scores(bar(0, 19), bar(0, 9))[0] == expected


def test_a_missing_mask_costs_the_diagonal() -> None:
    for missing in (None, *encoded(np.zeros((1, 100), dtype=bool))):
        assert surface_scores(missing, bar(3, 8), (3, 0.04)) == (5, 0)
    assert surface_scores(bar(3, 8), bar(3, 8)) == (0, 1)
