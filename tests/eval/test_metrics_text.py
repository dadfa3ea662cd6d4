"""Standard scores of written answers, against values worked out by hand."""

from __future__ import annotations

import pytest

from model.eval.metrics.published import format_table, most_similar
from model.eval.metrics.text import ngram_matches, rouge_l, token_overlap, words


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
    ],
)
def test_words(text: str, found: list[str]) -> None:
    assert words(text) == found


def test_scripts_without_blanks_are_scored_by_characters() -> None:
    assert words("左肺 CT 検査") == ["左", "肺", "ct", "検", "査"]
    assert words("ม้า") == ["ม้", "า"]
    assert token_overlap("左肺上叶有肿块", "右肺上叶有肿块") == pytest.approx((6 / 7, 6 / 7, 6 / 7))
    assert rouge_l(words("左肺有肿块"), words("右肺有肿块")) == pytest.approx(4 / 5)
    assert ngram_matches(words("左肺有肿块"), words("右肺有肿块")) == (4, 3, 2, 1)


def test_token_overlap_counts_repetitions() -> None:
    # shared: liver once, lung once; the answer has 4 content words, the reference 3
    assert token_overlap("the liver liver lung seen", "liver, lung, spleen") == pytest.approx((2 / 4, 2 / 3, 4 / 7))
    assert token_overlap("", "liver") == (0, 0, 0)
    assert token_overlap("liver", "...") == (0, 0, 0)
    assert token_overlap("...", "...") == (1, 1, 1)


def test_ngram_matches_are_clipped() -> None:
    assert ngram_matches(list("aaab"), list("aab")) == (3, 2, 1, 0)
    assert ngram_matches(list("abcd"), list("abcd")) == (4, 3, 2, 1)
    assert ngram_matches(list("ab"), list("ba")) == (2, 0, 0, 0)
    assert ngram_matches([], ["a"]) == (0, 0, 0, 0)


def test_rouge_l() -> None:
    # the longest common subsequence of "a c b d" and "a b c d e" has 3 words
    assert rouge_l(list("acbd"), list("abcde")) == pytest.approx(2 * 3 / 9)
    assert rouge_l(["x"] * 300, ["x"] * 200) == pytest.approx(2 * 200 / 500)
    assert rouge_l([], ["a"]) == 0
    assert rouge_l([], []) == 1


def test_of_equally_similar_candidates_the_later_wins() -> None:
    assert most_similar("ct ct", ["ct", "mr", "ct", "liver"]) == 2
    assert most_similar("liver", ["liver", "live", "livers"]) == 0
    assert most_similar("", ["liver", "lung"]) == 1


def test_the_published_table_is_aligned_at_the_point() -> None:
    table = format_table({"a": 66.16541, "open accuracy": 1100.0, "b": 0.0, "c": 1.5e-229})
    assert table.splitlines() == [
        "Metric           Performance",
        "-------------  -------------",
        "a                  66.1654",
        "open accuracy    1100",
        "b                   0",
        "c                   1.5e-229",
    ]
