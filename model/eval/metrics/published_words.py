"""The published system's normalisation of answers, oddities kept; ``text.words`` is the one to use elsewhere.

It is the normalisation of the VQA challenge. What is odd about it: a punctuation mark becomes a blank, but vanishes
where a blank stands beside any mark of its kind, and all marks vanish where the text has a comma between digits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS_REMOVED = 32  # the challenge's code passes a flag of the regular expression where this number belongs
_ARTICLES = frozenset(("a", "an", "the"))
_COUNTING = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(_COUNTING)}}

_ENDINGS = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'ll": "how it somebody someone something they what who why you y'all",
    "'s": "he how somebody someone that there what when where who why",
    "'re": "there they what why you",
    "'d've": "he it she somebody someone something there they we who you y'all",
    "n't've": "could had might should would",
}
"""Contracted ending → what it is found behind. Left out where the bare spelling is another word (“well”, “were”)."""

_SINGLE = {"maam": "ma'am", "oclock": "o'clock", "twas": "'twas", "yall": "y'all", "somebody'd": "somebodyd"}


def _misspelt(whole: str) -> Iterator[str]:
    """The contraction without each one of its apostrophes in turn."""
    return (whole[:place] + whole[place + 1 :] for place, letter in enumerate(whole) if letter == "'")


_CONTRACTIONS = {
    wrong: stem + ending
    for ending, stems in _ENDINGS.items()
    for stem in stems.split()
    for wrong in _misspelt(stem + ending)
} | _SINGLE


def published_words(text: str) -> list[str]:
    """Words of an answer as the published scores compare them (reference §9): lower case, numbers up to ten as digits,
    without articles and most punctuation, contractions with their apostrophe."""
    tight = _DIGIT_COMMA.search(text) is not None
    cleaned = text
    for mark in _MARKS:
        if mark in text:
            vanishes = tight or f"{mark} " in text or f" {mark}" in text
            cleaned = cleaned.replace(mark, "" if vanishes else " ")
    cleaned = _PERIOD.sub("", cleaned, count=_PERIODS_REMOVED)
    numbered = (_NUMBERS.get(word, word) for word in cleaned.lower().split())
    return [_CONTRACTIONS.get(word, word) for word in numbered if word not in _ARTICLES]
