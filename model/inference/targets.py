"""Targets of segmentation requests: names in question and answer, and one answer out of several passes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from itertools import groupby

import numpy as np

from model.inference.answer import Answer, Mask
from model.inference.requests import OnText, Request
from model.processing.special_tokens import REGION_MARKER, SEG_TOKEN

MOST_PASSES = 8
_SAME_MASK = 0.5  # IoU from which two masks of one name show one thing
_LABEL_WORDS, _LABEL_CHARS = 8, 60

_REQUEST = re.compile(
    r"\b(?:(?P<plain>segment(?:ation\s+of)?|outline|delineate|contour|masks?\s+(?:of|for))"
    r"|find|locate|highlight|show|mark|where\s+(?:is|are))\s+(?:me\s+)?(?P<names>[^?.!;:\n]{1,300})",
    re.IGNORECASE,
)
_PLACE = re.compile(
    r"\s+(?:(?:in|on|from|within)\s+(?:the|this|that|my|an?)|of\s+(?:this|that))\b.*"
    r"|\s+of\s+the\s+(?:image|picture|photo|scan|slice)\b.*",
    re.IGNORECASE,
)
_BETWEEN = re.compile(r"(\s*,\s*(?:and\s+)?(?:also\s+)?|\s+(?:and|&|plus|as well as)\s+(?:also\s+)?)", re.IGNORECASE)
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
_NEGATION = re.compile(r"\b(?:no|not|cannot|can't|without|absent|none|neither|nor|unable)\b", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?;\n]\s")
_LEAD_IN = re.compile(r"^(sure|yes|certainly|of course|okay|ok|and|here (is|are)|here)\b[,:]?\s*", re.IGNORECASE)
_COPULA = re.compile(r"\s*(is|are|here|at|in|:|,|\(|shown|segmented|highlighted|located|as)*\s*$", re.IGNORECASE)
_NO_NAME = re.compile(r"(segmentation|result|mask|it|this|that)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Target:
    """Something that a question wants segmented: its name in lower case, and the phrase that asks for it alone."""

    name: str
    phrase: str


def requested_targets(question: str) -> tuple[list[Target], bool]:
    """What a question wants segmented, in its order; and whether its verb can mean nothing else ("segment").

    Names stand behind such a verb, separated by commas and "and"; "left and right lung" are two lungs. A list ends at
    words that begin another request ("and describe it"). Nothing is found where the question offers a choice ("or").
    """
    found = _REQUEST.search(" ".join(question.split()))
    if not found:
        return [], False
    names = found["names"]
    place = _PLACE.search(names)
    listed, where = (names[: place.start()], place[0]) if place else (names, "")
    targets: list[Target] = []
    sides: list[str] = []
    for part in _BETWEEN.split(listed)[::2]:
        phrase = _TRAILING.sub("", part.strip(" ,'\""))
        name = _ARTICLE.sub("", phrase).strip().lower()
        words = set(re.findall(r"[\w']+", name))
        if words & _NO_TARGET or len(name) > 80:
            if "or" in words:
                return [], False
            break
        if words and words <= _SIDES:
            sides.append(name)
        elif words:
            noun = " ".join(word for word in name.split() if word not in _SIDES)
            targets += [Target(f"{side} {noun}", f"the {side} {noun}") for side in sides]
            sides = []
            targets.append(Target(name, phrase))
    request = "Please segment {}" + re.split(r"\s*(?:,|\band\b)", where)[0] + "."
    return [replace(target, phrase=request.format(target.phrase)) for target in targets], bool(found["plain"])


def clean_label(label: str) -> str:
    """A label without repetitions ("optic disc, the optic disc", "the the the"), of at most eight words."""
    words = [word for word, _ in groupby(label.split())]
    parts = [_ARTICLE.sub("", part).strip() for part in re.split(r"\s*,\s*|\s+and\s+", " ".join(words))]
    known = list(dict.fromkeys(part for part in parts if part))
    if len(known) < len(parts):
        words = ", ".join(known).split()
    kept = " ".join(words[:_LABEL_WORDS])[:_LABEL_CHARS].rstrip(" ,")
    return f"{kept}…" if len(kept) < len(" ".join(words).rstrip(" ,")) else kept


def mask_labels(text: str, question: str, count: int) -> list[str]:
    """Names of the ``count`` masks of an answer.

    The name stands before its ``<SEG>`` (“the liver is <SEG>”); where the answer gives none (“the segmentation
    result is <SEG>”), what the question asks for at that place of its list is taken.
    """
    asked = [target.name for target in requested_targets(question)[0]] or [""]
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
    sides = one & _SIDES, other & _SIDES
    if all(sides) and not sides[0] & sides[1]:
        return False
    if one <= other or (in_doubt and (other <= one or one <= _GENERIC or other <= _GENERIC - {"lesion"})):
        return True
    return SequenceMatcher(None, " ".join(sorted(one)), " ".join(sorted(other))).ratio() >= 0.85


def _words(name: str) -> set[str]:
    words = set()
    for word in re.findall(r"\w+", name.lower().replace("nerve head", "disc")):
        word = word.replace("ae", "e").replace("oe", "e").replace("tumour", "tumor")
        for ending, singular in (("ies", "y"), ("sses", "ss"), ("xes", "x"), ("us", "us"), ("is", "is"), ("ss", "ss")):
            if word.endswith(ending) and len(word) > 4:
                word = word.removesuffix(ending) + singular
                break
        else:
            word = word.removesuffix("s") if len(word) > 3 else word
        words.add(_SYNONYMS.get(word, word))
    return words - {"the", "a", "an", "of"}


def _refused(target: str, text: str) -> bool:
    """Whether a sentence without a mask says that the target is not there."""
    sentences = (part for sentence in _SENTENCE_END.split(text) for part in sentence.split(SEG_TOKEN))
    return any(_NEGATION.search(one) and _words(target) <= _words(one) for one in sentences)


class JoinedAnswer:
    """One answer to a request, out of as many passes as it takes to answer every target that the question names.

    A mask whose name was given before is left out with its words, unless both show different things. A mask that bears
    the name of nothing that was asked for has a ``warning``.

    Args:
        request: with ``every_target``.
        on_text: called with the answer so far; not with words that may yet be left out.
    """

    def __init__(self, request: Request, on_text: OnText | None = None) -> None:
        self.request, self._on_text = request, on_text
        self.targets, self._plain = requested_targets(request.question)
        self._asked, self._question = self.targets, request.question  # of the present pass
        self._left = list(self.targets)  # not asked alone yet
        self._passes: list[Answer] = []
        self._text = self._told = ""
        self._masks: list[Mask] = []

    def hear(self, text: str) -> None:
        """Take the text of the present pass as it grows."""
        known = {mask.label for mask in self._masks}
        pieces, shown = text.split(SEG_TOKEN), 0
        for place, label in enumerate(mask_labels(text, self._question, len(pieces) - 1)):
            if label in known:
                break
            known.add(label)
            shown = place + 1
        whole = len(pieces) == 1 and not self._passes
        self._tell(text if whole else "".join(piece + SEG_TOKEN for piece in pieces[:shown]))

    def _tell(self, text: str) -> None:
        text = " ".join(filter(None, (self._text, text)))
        if self._on_text is not None and len(text) > len(self._told):
            self._told = text
            self._on_text(text)

    def add(self, answer: Answer) -> None:
        """Take the whole answer of the present pass."""
        pieces = answer.text.split(SEG_TOKEN)
        text, earlier = "", len(self._masks)
        for piece, mask in zip(pieces, answer.masks, strict=False):
            same = [place for place, other in enumerate(self._masks) if other.label == mask.label]
            if mask.label and any(place < earlier or _iou(self._masks[place], mask) >= _SAME_MASK for place in same):
                continue
            wrong = not any(same_target(target.name, mask.label) for target in self._asked)
            asked = " and ".join(target.name for target in self._asked)
            warning = f"asked for {asked}, the answer names {mask.label}" if wrong and mask.label else ""
            self._masks.append(replace(mask, warning=warning))
            text += piece + SEG_TOKEN
        text += SEG_TOKEN.join(pieces[len(answer.masks) :])
        text = re.sub(r"^[\s,;]+(?:and\s+)?", "", text) if text.strip(" .,;!") else ""
        self._passes.append(answer)
        self._tell(text)
        self._text = " ".join(filter(None, (self._text, text)))

    def following(self) -> Request | None:
        """The request for the next target that no pass has masked or refused; None where the answer is complete."""
        used = sum(answer.new_tokens for answer in self._passes)
        budget = self.request.settings.max_new_tokens - used
        marked = sum(asked.count(REGION_MARKER) for asked, _ in self.request.history)
        open_ended = self._passes[-1].finish != "end" or budget < 1 or len(self._passes) == MOST_PASSES
        missing = self._missing(self._left, in_doubt=False)
        if len(self.targets) < 2 or open_ended or not missing or len(self.request.regions) > marked:
            return None
        if not self._plain and len(missing) == len(self.targets):  # an answer in words ("Where are …?")
            return None
        self._left = missing[1:]
        self._asked, self._question = missing[:1], missing[0].phrase
        settings = replace(self.request.settings, max_new_tokens=budget)
        return replace(self.request, question=self._question, settings=settings)

    def _missing(self, targets: Iterable[Target], in_doubt: bool) -> list[Target]:
        masked = [mask.label for mask in self._masks if not mask.warning]
        return [
            target
            for target in targets
            if not any(same_target(target.name, label, in_doubt) for label in masked)
            and not _refused(target.name, self._text)
        ]

    def answer(self) -> Answer:
        """The joined answer: counts and times are sums, and ``finish`` is the last pass's."""
        first, last = self._passes[0], self._passes[-1]
        notes = first.notes
        warned = " ".join(mask.warning for mask in self._masks)
        missing = [one.name for one in self._missing(self.targets, in_doubt=True) if one.name not in warned]
        if missing and len(self.targets) > 1 and (self._masks or len(self._passes) > 1):
            notes += (f"no mask and no refusal for {' and '.join(missing)}",)
        timing = {part: sum(one.timing.get(part, 0.0) for one in self._passes) for part in first.timing}
        return replace(
            first,
            text=self._text,
            masks=self._masks,
            timing=timing,
            finish=last.finish,
            new_tokens=sum(one.new_tokens for one in self._passes),
            prompt_tokens=sum(one.prompt_tokens for one in self._passes),
            notes=notes,
        )


def _iou(one: Mask, other: Mask) -> float:
    first, second = one.to_array(), other.to_array()
    return float(np.logical_and(first, second).sum() / max(1, np.logical_or(first, second).sum()))
