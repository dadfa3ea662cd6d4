"""Targets of segmentation requests: names in question and answer, and one answer out of several passes."""

from __future__ import annotations

import re
from dataclasses import replace
from difflib import SequenceMatcher
from itertools import groupby
from typing import NamedTuple

import numpy as np

from model.inference.answer import Answer, Mask
from model.inference.requests import OnText, Request
from model.processing.special_tokens import REGION_MARKER, SEG_TOKEN

_MOST_PASSES = 8
_ONE_PASS = 2  # targets; of longer lists, which no training data have, models mask things that are not there
_SAME_MASK = 0.5  # IoU from which two masks of one name show one thing
_LABEL_WORDS, _LABEL_CHARS = 8, 60

_REQUEST = re.compile(
    r"\b(?:segment(?:ation\s+of)?|outline|delineate|contour|masks?\s+(?:of|for)"
    r"|find|locate|highlight|show|mark|where\s+(?:is|are))\s+(?:me\s+)?(?P<names>[^?.!;:\n]{1,300})",
    re.IGNORECASE,
)
_PLACE = re.compile(
    r"\s+(?:(?:in|on|from|within)\s+(?:the|this|that|my|an?)|of\s+(?:this|that))\b.*"
    r"|\s+of\s+the\s+(?:image|picture|photo|scan|slice)\b.*",
    re.IGNORECASE,
)
_BETWEEN = re.compile(r"\s*,\s*(?:and\s+)?(?:also\s+)?|\s+(?:and|&|plus|as well as)\s+(?:also\s+)?", re.IGNORECASE)
_ARTICLE = re.compile(r"^(?:(?:both|all|any|each|every|the|an?|my|its|their|of)\s+|both$|please$)+", re.IGNORECASE)
_TRAILING = re.compile(r"(?:\s+(?:please|too|also|as well|separately|each))+$", re.IGNORECASE)


def _set(words: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", words))


_NO_TARGET = _set(
    "it them me you he she we they this that these those then tell describe explain give say report measure count name "
    "return answer compute estimate compare list what which who how why when where whether if is are was were does do "
    "can could would or out up segment outline delineate find locate highlight show mark not no but"
)
_SIDES = _set("left right upper lower superior inferior anterior posterior medial lateral proximal distal")
_GENERIC = _set(
    "abnormality anomaly anything area everything finding lesion object organ part pathology region something "
    "structure target thing tissue"
)
_LESIONS = _set("tumor mass lesion nodule neoplasm cancer carcinoma malignancy polyp growth metastasis")
_SYNONYMS = dict.fromkeys(_LESIONS, "lesion") | {
    **dict.fromkeys(("bleeding", "bleed"), "hemorrhage"),
    **{"disk": "disc", "renal": "kidney", "hepatic": "liver", "cardiac": "heart", "pulmonary": "lung"},
}
_PLAIN = re.compile(r"\b(?:segment|outline|delineate|contour|masks?)\b", re.IGNORECASE)
_NEGATION = re.compile(r"\b(?:no|not|cannot|can't|without|absent|none|neither|nor|unable)\b", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?;\n]\s")
_LEAD_IN = re.compile(r"^(sure|yes|certainly|of course|okay|ok|and|here (is|are)|here)\b[,:]?\s*", re.IGNORECASE)
_COPULA = re.compile(r"\s*(is|are|here|at|in|:|,|\(|shown|segmented|highlighted|located|as)*\s*$", re.IGNORECASE)
_NO_NAME = re.compile(r"(segmentation|result|mask|it|this|that)\b", re.IGNORECASE)


class Target(NamedTuple):
    """Something that a question wants segmented: its name in lower case, and the question for it alone."""

    name: str
    question: str


def requested_targets(question: str) -> list[Target]:
    """What a question wants segmented, in its order.

    Names stand behind a verb ("segment", "where is"), separated by commas and "and"; "left and right lung" are two
    lungs. A list ends at words that begin another request ("and describe it"). A choice ("or") is no request.
    """
    found = _REQUEST.search(" ".join(question.split()))
    names = found["names"] if found else ""
    place = _PLACE.search(names)
    where = re.split(r"\s*(?:,|\band\b)", place[0])[0] if place else ""
    targets: list[Target] = []
    sides: list[str] = []
    for part in _BETWEEN.split(names[: place.start()] if place else names):
        phrase = _TRAILING.sub("", part.strip(" ,'\""))
        name = _ARTICLE.sub("", phrase).strip().lower()
        words = set(re.findall(r"[\w']+", name))
        if words & _NO_TARGET or len(name) > 80:
            return [] if "or" in words else targets
        if words and words <= _SIDES:
            sides.append(name)
        elif words:
            noun = " ".join(word for word in name.split() if word not in _SIDES)
            alone = phrase if phrase.lower() != name else f"the {phrase}"
            wanted = [*((f"{side} {noun}", f"the {side} {noun}") for side in sides), (name, alone)]
            targets += [Target(one, f"Please segment {asked}{where}.") for one, asked in wanted]
            sides = []
    return targets


def clean_label(label: str) -> str:
    """A label without repetitions ("optic disc, the optic disc", "the the the"), of at most eight words."""
    words = [word for word, _ in groupby(label.split())]
    parts = [_ARTICLE.sub("", part).strip() for part in re.split(r"\s*,\s*|\s+and\s+", " ".join(words))]
    known = list(dict.fromkeys(filter(None, parts)))
    whole = " ".join(words) if len(known) == len(parts) else ", ".join(known)
    kept = " ".join(whole.split()[:_LABEL_WORDS])[:_LABEL_CHARS].rstrip(" ,")
    return kept if len(kept) == len(whole) else f"{kept}…"


def mask_labels(text: str, question: str, count: int) -> list[str]:
    """Names of the ``count`` masks of an answer.

    The name stands before its ``<SEG>`` (“the liver is <SEG>”); where the answer gives none (“the segmentation
    result is <SEG>”), what the question asks for at that place of its list is taken.
    """
    asked = [target.name for target in requested_targets(question)] or [""]
    labels = []
    for place, piece in enumerate(text.split(SEG_TOKEN)[:count]):
        clause = " ".join(_SENTENCE_END.split(piece)[-1].split()).strip(" ,.;:")
        clause = _LEAD_IN.sub("", _LEAD_IN.sub("", clause))
        clause = clean_label(_ARTICLE.sub("", _COPULA.sub("", clause)).strip().lower())
        named = clause and not _NO_NAME.match(clause) and "segmentation" not in clause
        labels.append(clause if named else asked[min(place, len(asked) - 1)])
    return labels


def same_target(asked: str, named: str, in_doubt: bool = True) -> bool:
    """Whether a name of an answer can mean what was asked for.

    Articles, plurals and spelling do not count, and a longer name holds what was asked for ("lung", "left lung"); but
    sides must not contradict each other. ``in_doubt`` is said of a shorter or general name ("lesion", "structure").
    """
    one, other = _words(asked), _words(named)
    if one & _SIDES and other & _SIDES and not one & other & _SIDES:
        return False
    if one <= other or (in_doubt and (other <= one or one <= _GENERIC or other <= _GENERIC - {"lesion"})):
        return True
    return SequenceMatcher(None, " ".join(sorted(one)), " ".join(sorted(other))).ratio() >= 0.85


def _words(name: str) -> set[str]:
    """The words of a name, of one spelling and in the singular."""
    text = name.lower().replace("nerve head", "disc").replace("ae", "e").replace("oe", "e").replace("our", "or")
    text = re.sub(r"(?<=\w\w)(?:(?<=[sx])es|(?<![sui])s)\b", "", re.sub(r"(?<=\w\w)ies\b", "y", text))
    return {_SYNONYMS.get(word, word) for word in re.findall(r"\w+", text)} - {"the", "a", "an", "of"}


class JoinedAnswer:
    """One answer to a request, out of as many passes as it takes to answer every target that the question names.

    A mask whose name was given before is left out with its words, unless both show different things. A mask that bears
    the name of nothing that was asked for has a ``warning``. Two targets are asked for at once and, where that leaves
    one out or masks none, alone; more of them alone from the start.

    Args:
        request: with ``every_target``.
        on_text: called with the answer so far; not with words that may yet be left out.
    """

    def __init__(self, request: Request, on_text: OnText | None = None) -> None:
        self.request, self._on_text = request, on_text
        self.targets = self._asked = requested_targets(request.question)  # ``_asked`` in the present pass
        self._question = request.question
        marked = sum(asked.count(REGION_MARKER) for asked, _ in request.history)
        self._several = len(self.targets) > 1 and len(request.regions) <= marked
        self._alone: set[str] = set()  # asked for alone
        self._passes: list[Answer] = []
        self._text = self._emitted = ""
        self._masks: list[Mask] = []

    def first(self) -> Request:
        """The request of the first pass."""
        alone = self._several and len(self.targets) > _ONE_PASS and _PLAIN.search(self._question)
        return self._alone_request(self.targets[0]) if alone else self.request

    def update(self, text: str) -> None:
        """Take the text of the present pass as it grows."""
        pieces = text.split(SEG_TOKEN)
        labels = mask_labels(text, self._question, len(pieces) - 1)
        known = [mask.label for mask in self._masks]
        kept = next((place for place, one in enumerate(labels) if one in known + labels[:place]), len(labels))
        if labels or len(self.targets) > 1:
            text = "".join(piece + SEG_TOKEN for piece in pieces[:kept])
        self._emit(text)

    def _emit(self, text: str) -> str:
        text = " ".join(filter(None, (self._text, text)))
        if self._on_text is not None and len(text) > len(self._emitted):
            self._emitted = text
            self._on_text(text)
        return text

    def add(self, answer: Answer) -> None:
        """Take the whole answer of the present pass."""
        pieces = answer.text.split(SEG_TOKEN)
        text, earlier = "", len(self._masks)
        asked = " and ".join(target.name for target in self._asked)
        for piece, mask in zip(pieces, answer.masks, strict=False):
            same = [place for place, other in enumerate(self._masks) if other.label == mask.label]
            if mask.label and any(place < earlier or _iou(self._masks[place], mask) >= _SAME_MASK for place in same):
                continue
            wrong = mask.label and not any(same_target(target.name, mask.label) for target in self._asked)
            warning = f"asked for {asked}, the answer names {mask.label}" if wrong else ""
            self._masks.append(replace(mask, warning=warning))
            text += piece + SEG_TOKEN
        text += SEG_TOKEN.join(pieces[len(answer.masks) :])
        if self._several and len(self._asked) > 1 and not self._masks and _NEGATION.search(text):
            text = ""
        self._passes.append(answer)
        self._text = self._emit(re.sub(r"^[\s,;]+(?:and\s+)?", "", text) if text.strip(" .,;!") else "")

    def following(self) -> Request | None:
        """The request for the next target that no pass has masked or refused; None where the answer is complete."""
        in_words = len(self._asked) > 1 and not self._masks and self._text  # "Where are …?" may be answered so
        missing = [one for one in self._missing(in_doubt=False) if one.name not in self._alone]
        ended = self._passes[-1].finish != "end" or self._budget() < 1 or len(self._passes) == _MOST_PASSES
        return None if ended or in_words or not missing or not self._several else self._alone_request(missing[0])

    def _budget(self) -> int:
        return self.request.settings.max_new_tokens - sum(answer.new_tokens for answer in self._passes)

    def _alone_request(self, target: Target) -> Request:
        self._asked, self._question = [target], target.question
        self._alone.add(target.name)
        settings = replace(self.request.settings, max_new_tokens=self._budget())
        return replace(self.request, question=target.question, settings=settings)

    def _missing(self, in_doubt: bool) -> list[Target]:
        """Targets that no mask bears the name of, and no sentence without a mask denies."""
        masked = [mask.label for mask in self._masks if not mask.warning]
        parts = (part for sentence in _SENTENCE_END.split(self._text) for part in sentence.split(SEG_TOKEN))
        denied = [_words(part) for part in parts if _NEGATION.search(part)]
        return [
            target
            for target in self.targets
            if not any(self._belongs(label, target, in_doubt) for label in masked)
            and not any(_words(target.name) <= words for words in denied)
        ]

    def _belongs(self, label: str, target: Target, in_doubt: bool) -> bool:
        """Whether a mask of this label is the target's: "lung nodule" not that of "lungs" where both were asked for."""
        exact = [other for other in self.targets if _words(other.name) == _words(label)]
        return target in exact if exact else same_target(target.name, label, in_doubt)

    def answer(self) -> Answer:
        """The joined answer: counts and times are sums, and ``finish`` is the last pass's."""
        passes, first = self._passes, self._passes[0]
        warned = " ".join(mask.warning for mask in self._masks)
        missing = [target.name for target in self._missing(in_doubt=True) if target.name not in warned]
        several = len(self.targets) > 1 and (self._masks or len(passes) > 1)
        return replace(
            first,
            text=self._text,
            masks=self._masks,
            timing={part: sum(one.timing.get(part, 0.0) for one in passes) for part in first.timing},
            finish=passes[-1].finish,
            new_tokens=sum(one.new_tokens for one in passes),
            prompt_tokens=sum(one.prompt_tokens for one in passes),
            notes=(
                *first.notes,
                *([f"no mask and no refusal for {' and '.join(missing)}"] if missing and several else []),
            ),
        )


def _iou(one: Mask, other: Mask) -> float:
    first, second = one.to_array(), other.to_array()
    return float(np.logical_and(first, second).sum() / max(1, np.logical_or(first, second).sum()))
