"""Questions about the named structures of a user's own pictures; the wording of each is drawn by picture and name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from model.data.builders.phantom_questions import refusal
from model.data.builders.splits import draw

_SEGMENT = (
    "Please segment the {name} in this image.",
    "Segment the {name}.",
    "Can you outline the {name} in this image?",
    "Where is the {name}? Give me a mask.",
    "Show me the {name} in this picture.",
)
_SEGMENTED = ("Sure, the {name} is <SEG>.", "The {name} is <SEG>.", "Here it is: the {name} <SEG>.")
_WHAT = (
    "What is in the region <region>{path}</region>?",
    "Which structure is marked by <region>{path}</region>?",
    "Name the structure in the region <region>{path}</region>.",
)
_CHECK = (
    "Is the region <region>{path}</region> the {name}?",
    "Does the region <region>{path}</region> show the {name}?",
)


def grounding(seed: int, key: str, name: str, path: str) -> dict[str, Any]:
    """A request for the mask ``path`` of a structure."""
    asked = _one_of(_SEGMENT, seed, key, name, "asked").format(name=name)
    answer = _one_of(_SEGMENTED, seed, key, name, "answered").format(name=name) + f"<mask>{path}</mask>"
    return _record("grounding", "grounding", asked, answer, "open", name)


def absent(seed: int, key: str, names: Sequence[str]) -> dict[str, Any]:
    """A request for the mask of one of ``names``, none of which the picture shows."""
    name = sorted(names)[draw(seed, key, "absent") % len(names)]
    asked = _one_of(_SEGMENT, seed, key, name, "asked").format(name=name)
    answer = refusal(name, np.random.default_rng(draw(seed, key, name, "answered")))
    return _record("grounding", "grounding_absent", asked, answer, "open", name)


def region_name(seed: int, key: str, name: str, path: str) -> dict[str, Any]:
    """What is in the region ``path``?"""
    asked = _one_of(_WHAT, seed, key, name, "what").format(path=path)
    return _record("region", "region_name", asked, name[:1].upper() + name[1:], "open", name)


def region_check(seed: int, key: str, name: str, path: str, others: Sequence[str]) -> dict[str, Any]:
    """Is it this? Yes as often as no; a "no" asks for one of ``others``."""
    right = draw(seed, key, name, "right") % 2 == 0
    shown = name if right else sorted(others)[draw(seed, key, name, "other") % len(others)]
    asked = _one_of(_CHECK, seed, key, name, "check").format(path=path, name=shown)
    return _record("region", "region_check", asked, "Yes" if right else "No", "closed", shown)


_PLACES = frozenset(
    ("left", "right", "upper", "lower", "middle", "anterior", "posterior", "superior", "inferior", "medial", "lateral")
)


def unrelated(names: Sequence[str], present: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Those of ``names`` that mean something else than each of ``present``; the others, each with what it may mean.

    Beside a "liver" the absence of a "liver tumour" is clear. Beside a "liver tumour" that of a "liver" is not, nor
    that of a "left lung" beside a "lung", for a place is no other thing.
    """
    kept, clashing = [], []
    for name in names:
        own = _words(name)
        others = [
            other for other in present if own <= (theirs := _words(other)) or (theirs < own and own - theirs <= _PLACES)
        ]
        if others:
            clashing.append((name, others[0]))
        else:
            kept.append(name)
    return kept, clashing


def _words(name: str) -> frozenset[str]:
    """Words of a name, in the singular."""
    return frozenset(word.removesuffix("s") for word in re.findall(r"[^\W_]+", name.casefold()))


def _one_of(wordings: Sequence[str], seed: int, *words: str) -> str:
    return wordings[draw(seed, *words) % len(wordings)]


def _record(task: str, kind: str, asked: str, answer: str, answer_type: str, about: str) -> dict[str, Any]:
    return {
        "conversations": [{"from": "human", "value": f"<image>\n{asked}"}, {"from": "gpt", "value": answer}],
        "answer_type": answer_type,
        "task": task,
        "kind": kind,
        "about": about,
    }
