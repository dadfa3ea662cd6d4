"""The published scores of text and masks, as they were, also where they are odd (reference §9)."""

from __future__ import annotations

import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import PurePath
from typing import Any

import numpy as np
from tqdm import tqdm

from model.eval.metrics.rows import is_closed, ngram_matches
from model.eval.predictions import Prediction

BLEU_WEIGHTS = ((0.25, 0.25, 0.25, 0.25), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
"""Of “bleu_score”, “bleu_score_1”, “_2” and “_3”: the last three are single orders, not cumulative."""

WITHOUT_CANDIDATES = 11.0
"""“Open accuracy” of a run without candidates; times 100 in the table."""

_TITLES = {"exact": "exact match acc score", "f1": "f1 score", "precision": "precision", "recall": "recall"}
_TITLES |= {f"bleu{order}": f"bleu_score{order}" for order in ("", "_1", "_2", "_3")}

# Normalisation of the VQA challenge, oddities kept: a mark becomes a blank, but vanishes where a blank stands
# beside any mark of its kind, and all marks vanish where the text has a comma between digits.
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

_CONTRACTIONS = {
    whole[:place] + whole[place + 1 :]: whole  # without each one of its apostrophes in turn
    for ending, stems in _ENDINGS.items()
    for whole in (stem + ending for stem in stems.split())
    for place, letter in enumerate(whole)
    if letter == "'"
} | {"maam": "ma'am", "oclock": "o'clock", "twas": "'twas", "yall": "y'all", "somebody'd": "somebodyd"}


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


def overlap_f1(answer: Sequence[str], reference: Sequence[str]) -> tuple[float, float, float]:
    """The published F1, precision and recall: a shared word counts as often as the *answer* has it."""
    given, wanted = Counter(answer), Counter(reference)
    right = sum(count for word, count in given.items() if word in wanted)
    if not right:
        return 0.0, 0.0, 0.0
    precision = right / len(answer)
    recall = right / (right + sum(count for word, count in wanted.items() if word not in given))
    return 2 * precision * recall / (precision + recall), precision, recall


def sentence_bleus(answer: Sequence[str], reference: Sequence[str]) -> list[float]:
    """BLEU of one sentence for each of ``BLEU_WEIGHTS``, as nltk computes it without smoothing.

    An order without a match counts as the smallest positive float, not as 0; a sentence without any shared word is 0.
    """
    matches = ngram_matches(answer, reference)
    if not matches[0]:
        return [0.0] * len(BLEU_WEIGHTS)
    penalty = 1.0 if len(answer) > len(reference) else math.exp(1 - len(reference) / len(answer))
    logs = [
        math.log(count / max(1, len(answer) - index)) if count else math.log(sys.float_info.min)
        for index, count in enumerate(matches)
    ]
    return [
        penalty * math.exp(math.fsum(weight * log for weight, log in zip(weights, logs, strict=False)))
        for weights in BLEU_WEIGHTS
    ]


def published_row(answer: str, reference: str) -> dict[str, float]:
    """All published scores of one answer, in 0..1."""
    given, wanted = published_words(answer), published_words(reference)
    # “exact match”: distinct words of the reference found in the answer, over the answer's words
    exact = len(set(wanted) & set(given)) / len(given) if given else 0.0
    values = (exact, *overlap_f1(given, wanted), *sentence_bleus(given, wanted))
    return dict(zip(_TITLES, values, strict=True))


@dataclass
class PublishedText:
    """Gathers a stream of predictions into the published numbers."""

    choose_candidates: bool = False  # keep the answers too, for “open accuracy” among all references of the run
    open: int = 0  # open questions so far
    closed: int = 0  # closed questions so far
    closed_hits: int = 0  # closed answers with exactly the reference's words
    empty: int = 0  # open answers without a word
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_TITLES, 0.0))
    references: dict[str, None] = field(default_factory=dict)
    answers: Counter[tuple[str, str]] = field(default_factory=Counter)

    def watch(self, rows: Iterable[Prediction]) -> Iterator[Prediction]:
        """Hand the rows on, taking each in."""
        for row in rows:
            self.add(row)
            yield row

    def add(self, prediction: Prediction) -> None:
        """Take one row in; a row that could not be answered has no text and scores 0."""
        if self.choose_candidates:
            self.references[prediction.gt] = None
        if is_closed(prediction):
            self.closed += 1
            self.closed_hits += published_words(prediction.text) == published_words(prediction.gt)
            return
        self.open += 1
        given = " ".join(published_words(prediction.text))
        self.empty += not given
        for name, value in published_row(prediction.text, prediction.gt).items():
            self.sums[name] += value
        if self.choose_candidates:
            self.answers[given, prediction.gt] += 1

    def table(self, *, bar: bool = False) -> dict[str, float]:
        """The published table, in percent; with a progress bar where candidates are compared."""
        values = {title: 100 * self.sums[name] / self.open if self.open else 0.0 for name, title in _TITLES.items()}
        values["open accuracy"] = 100 * self.open_accuracy(bar=bar)
        values["yes/no accuracy"] = 100 * self.closed_hits / self.closed if self.closed else 0.0
        return values

    def open_accuracy(self, *, bar: bool = False) -> float:
        """Share of open answers that are most like their own reference among all references of the run."""
        if not self.open:
            return 0.0
        if not self.choose_candidates:
            return WITHOUT_CANDIDATES
        candidates = list(self.references)
        normalised = [" ".join(published_words(text)) for text in candidates]
        texts = dict.fromkeys(given for given, _ in self.answers)
        shown = tqdm(texts, unit="answer", desc="open accuracy", leave=False, disable=None if bar else True)
        chosen = {given: candidates[most_similar(given, normalised)] for given in shown}
        return (
            sum(count for (given, reference), count in self.answers.items() if chosen[given] == reference) / self.open
        )


def most_similar(text: str, candidates: Sequence[str]) -> int:
    """Place of the candidate with the highest ``difflib`` ratio to a text, the last of equal ones.

    The recorded runs do not depend on the hash seed although a tie is among them, so ties are settled by order of
    first appearance, the later one winning.
    """
    matcher = SequenceMatcher(None, "", text)  # it prepares its second text once
    best, place = 0.0, 0
    for index, candidate in enumerate(candidates):
        matcher.set_seq1(candidate)
        if matcher.real_quick_ratio() < best or matcher.quick_ratio() < best:  # upper bounds of the ratio
            continue
        ratio = matcher.ratio()
        if ratio >= best:
            best, place = ratio, index
    return place


def format_table(values: dict[str, float]) -> str:
    """The table as published: six digits, aligned at the decimal point."""
    cells = [f"{value:g}" for value in values.values()]
    points = [cell.find("." if "." in cell else "e") for cell in cells]
    behind = [len(cell) - point - 1 if point >= 0 else -1 for cell, point in zip(cells, points, strict=True)]
    cells = [cell + " " * (max(behind) - places) for cell, places in zip(cells, behind, strict=True)]
    left, right = max(len("Metric") + 2, *map(len, values)), max(len("Performance") + 2, *map(len, cells))
    lines = [f"{'Metric':<{left}}  {'Performance':>{right}}", f"{'-' * left}  {'-' * right}"]
    lines += [f"{title:<{left}}  {cell:>{right}}".rstrip() for title, cell in zip(values, cells, strict=True)]
    return "\n".join(lines)


@dataclass
class PublishedMasks:
    """Gathers pairs of masks into the published mIoU and mDice, overall and by modality."""

    # IoU of each pair, by modality. As published, that is the image's file name up to the first ``_`` (an X-ray's is
    # ``x``), unless the record itself names another.
    ious: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    _all: list[float] = field(default_factory=list)

    def add(self, image_path: str, intersection: int, union: int, modality: str = "") -> None:
        """Take in one pair of masks, its IoU in float32; 0 where the union is empty, as the published code fails there
        and the reference says 0."""
        iou = float(np.float32(intersection) / np.float32(union)) if union else 0.0
        self.ious[modality or PurePath(image_path).name.split("_")[0]].append(iou)
        self._all.append(iou)

    @property
    def count(self) -> int:
        """Pairs taken in."""
        return len(self._all)

    @property
    def miou(self) -> float:
        """Mean IoU of all pairs; NaN without any."""
        return _mean(self._all)

    @property
    def mdice(self) -> float:
        """Mean Dice of all pairs; NaN without any."""
        return _mean_dice(self._all)

    def by_modality(self) -> dict[str, dict[str, float]]:
        """Mean IoU and Dice of each modality, rounded to six places, in order of appearance."""
        return {
            name: {"iou": round(_mean(values), 6), "dice": round(_mean_dice(values), 6)}
            for name, values in self.ious.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready mapping."""
        return {"masks": self.count, "mIoU": self.miou, "mDice": self.mdice, "modality": self.by_modality()}

    def format(self) -> str:
        """The two lines as published."""
        return f"miou: {self.miou:f}, mDice: {self.mdice:f}\n{self.by_modality()}"


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def _mean_dice(ious: list[float]) -> float:
    return _mean([2 * iou / (1 + iou) for iou in ious])
