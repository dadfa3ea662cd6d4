"""Standard scores of one written answer: exact match, token overlap, counts for BLEU, ROUGE-L, closed questions.

METEOR is left out: its synonyms need WordNet, which no library carries without a download or a Java program.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence

BLEU_ORDERS = (1, 2, 3, 4)

_TAG = re.compile(r"</?(?:SEG|ref|region|sr|mask|image|im_start|im_end|gen_\d+)>")
_WORD = re.compile(r"\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|[^\W\d_]+(?:'[^\W\d_]+)*")
_OPTION = re.compile(r"\s*\(?([A-Ja-j])(?:[).:]+(?:\s+(.*))?|\s*)$", re.DOTALL)
_ARTICLES = frozenset(("a", "an", "the"))
_POLAR = frozenset(("yes", "no"))


def words(text: str) -> list[str]:
    """Words and numbers of a text: Unicode NFKC, case folded, without markup and punctuation.

    ``1,000`` is the number 1000, ``3.5cm`` is 3.5 and cm, ``x-ray`` is two words, ``can't`` is one.
    """
    plain = unicodedata.normalize("NFKC", _TAG.sub(" ", text)).casefold().replace("’", "'")
    return [word.replace(",", "") for word in _WORD.findall(plain)]


def content_words(text: str) -> list[str]:
    """``words`` without the articles a, an, the; with them where there is nothing else."""
    found = words(text)
    return [word for word in found if word not in _ARTICLES] or found


def same_words(answer: str, reference: str) -> bool:
    """Whether two texts have the same content words in the same order; without any word, the same characters."""
    said, wanted = content_words(answer), content_words(reference)
    return said == wanted if said or wanted else answer.split() == reference.split()


def closed_correct(answer: str, reference: str) -> bool:
    """Whether a closed question is answered right.

    A reference that begins with yes or no is met by any answer that begins with the same word. A reference that is an
    option (``B``, ``B. CT``, ``(B) CT``) is met by its letter, its text, or both if they agree. Any other must have the
    same content words in the same order.
    """
    option = _OPTION.match(reference)
    if option:
        return _names_option(answer, option[1].casefold(), option[2] or "")
    said, wanted = words(answer), words(reference)
    if wanted and wanted[0] in _POLAR:
        return said[:1] == wanted[:1]
    return same_words(answer, reference)


def _names_option(answer: str, letter: str, text: str) -> bool:
    named = _OPTION.match(answer)
    if not named:
        return bool(text) and same_words(answer, text)
    agreeing = not named[2] or not text or same_words(named[2], text)
    return named[1].casefold() == letter and agreeing


def token_overlap(answer: str, reference: str) -> tuple[float, float, float]:
    """Precision, recall and F1 of the content words, each counted as often as it occurs.

    Two texts without words score 1 if they are the same characters; a text with words against one without scores 0.
    """
    said, wanted = content_words(answer), content_words(reference)
    if not said or not wanted:
        same = float(not said and not wanted and same_words(answer, reference))
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
