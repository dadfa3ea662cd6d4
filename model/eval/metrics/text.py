"""Standard scores of one written answer: token overlap, counts for BLEU, ROUGE-L.

METEOR is left out: its synonyms need WordNet, which no library carries without a download or a Java program.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence

import regex

from model.processing.answers import LETTERS, SPACELESS

BLEU_ORDERS = (1, 2, 3, 4)

_TAG = regex.compile(r"</?(?:SEG|ref|region|sr|mask|image|im_start|im_end|gen_\d+)>")
_WORD = regex.compile(
    rf"\d{{1,3}}(?:,\d{{3}})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|{SPACELESS}\p{{M}}*|{LETTERS}(?:'{LETTERS})*"
)
_ARTICLES = frozenset(("a", "an", "the"))


def words(text: str) -> list[str]:
    """Words and numbers of a text: Unicode NFKC, case folded, without markup and punctuation.

    ``1,000`` is the number 1000, ``3.5cm`` is 3.5 and cm, ``x-ray`` is two words, ``can't`` is one. Chinese, Japanese,
    Korean and Thai give a word for each character.
    """
    plain = unicodedata.normalize("NFKC", _TAG.sub(" ", text)).casefold().replace("’", "'")
    return [word.replace(",", "") for word in _WORD.findall(plain)]


def content_words(text: str) -> list[str]:
    """``words`` without the articles a, an, the; with them where there is nothing else."""
    found = words(text)
    return [word for word in found if word not in _ARTICLES] or found


def token_overlap(answer: str, reference: str) -> tuple[float, float, float]:
    """Precision, recall and F1 of the content words, each counted as often as it occurs.

    Two texts without words score 1 if they are the same characters; a text with words against one without scores 0.
    """
    said, wanted = content_words(answer), content_words(reference)
    if not said or not wanted:
        same = float(not said and not wanted and answer.split() == reference.split())
        return same, same, same
    shared = (Counter(said) & Counter(wanted)).total()
    return shared / len(said), shared / len(wanted), 2 * shared / (len(said) + len(wanted))


def ngram_matches(answer: Sequence[str], reference: Sequence[str]) -> tuple[int, ...]:
    """For the orders 1 to 4, n-grams of the answer that are in the reference, clipped to their number there."""
    found: list[int] = []
    for order in BLEU_ORDERS:
        if found and not found[-1]:  # no longer n-gram can match either
            found.append(0)
            continue
        left = Counter(_ngrams(reference, order))
        matches = 0
        for gram in _ngrams(answer, order):
            if left[gram] > 0:
                left[gram] -= 1
                matches += 1
        found.append(matches)
    return tuple(found)


def _ngrams(tokens: Sequence[str], order: int) -> Iterator[tuple[str, ...]]:
    return zip(*(tokens[start:] for start in range(order)), strict=False)


def rouge_l(answer: Sequence[str], reference: Sequence[str]) -> float:
    """F1 of the longest common subsequence of two lists of words; two empty ones score 1."""
    if not answer or not reference:
        return float(not answer and not reference)
    return 2 * _longest_common(answer, reference) / (len(answer) + len(reference))


def _longest_common(left: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest common subsequence; a row of the usual table is one integer, a bit for each place."""
    places: dict[str, int] = {}
    for index, word in enumerate(left):
        places[word] = places.get(word, 0) | 1 << index
    full = (1 << len(left)) - 1
    row = full
    for word in right:
        hit = row & places.get(word, 0)
        row = (row + hit | row - hit) & full
    return len(left) - row.bit_count()
