"""Questions and answers about phantom scenes, of all three kinds, worded in several ways and balanced.

A closed answer must not be guessable without the picture: yes and no, left and right come equally often *per name*. The
structure of a "no" mostly belongs to the modality of the picture, and now and then to another one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from model.data.phantom.scenes import LESIONS, PLANS, Scene, Structure

AnswerType = Literal["open", "closed"]
PathOf = Callable[[str], str]

SPOKEN_NAMES = {plan.key: plan.spoken for plan in PLANS.values()}


@dataclass(frozen=True)
class Question:
    """One question with its answer.

    Texts hold bare markers: ``<region></region>`` in the question, one for each name in ``regions``, and ``<SEG>`` in
    the answer, one for each name in ``targets``, in order. ``about`` is the structure asked for, if there is one.
    """

    kind: str
    task: Literal["vqa", "region", "grounding"]
    question: str
    answer: str
    answer_type: AnswerType
    about: str = ""
    regions: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()

    def published(self, path_of: PathOf) -> tuple[str, str]:
        """Question and answer in the published markup; ``path_of`` gives a structure's mask path (reference §8)."""
        question = self.question
        for name in self.regions:
            question = question.replace("<region></region>", f"<region>{path_of(name)}</region>", 1)
        masks = "".join(f"<mask>{path_of(name)}</mask>" for name in self.targets)
        return question, self.answer + masks


# ---- wordings ------------------------------------------------------------------------------------------------------

_MODALITY = (
    "What modality is used to take this image?",
    "Which imaging modality was used here?",
    "What kind of medical image is this?",
    "Name the imaging technique of this picture.",
    "How was this image acquired?",
)
_PRESENCE = (
    "Is there {a} {name} in this image?",
    "Does this image show {a} {name}?",
    "Can you see {a} {name} here?",
    "Is {a} {name} visible in this picture?",
    "Is {a} {name} present?",
)
_SIDE = (
    "Is the {name} in the {first} or the {second} half of the image?",
    "On which side of the image is the {name}, {first} or {second}?",
    "Does the {name} lie in the {first} or the {second} half of the picture?",
    "Where is the {name}, {first} or {second}?",
)
_RELATION = (
    "Is the {name} {first} or {second} the {other}?",
    "Does the {name} lie {first} or {second} the {other}?",
    "Relative to the {other}, is the {name} {first} or {second} it?",
    "Tell me whether the {name} is {first} or {second} the {other}.",
)
_LIST = (
    "Which structures are visible in this image?",
    "List the structures that you can see.",
    "What does this image show?",
    "Name everything of interest in this picture.",
)
_PLACE = (
    "What lies in the {place} part of the image?",
    "Which structure is in the {place} part?",
    "Name the structure in the {place} part of the picture.",
    "What can be seen in the {place} part of this image?",
)
_FINDING = (
    "Describe the abnormality in this image.",
    "What abnormality can be seen, and where?",
    "Is anything abnormal here? Describe it.",
    "Report the abnormal finding of this image.",
)
_REGION_NAME = (
    "What is in the region <region></region>?",
    "Which structure is marked by <region></region>?",
    "Name the structure in this region <region></region>.",
    "What does the region <region></region> show?",
    "Can you tell me what <region></region> is?",
)
_REGION_CHECK = (
    "Is the region <region></region> {a} {name}?",
    "Does the region <region></region> show {a} {name}?",
    "Is {a} {name} marked by <region></region>?",
    "Would you call the region <region></region> {a} {name}?",
)
_REGION_PLACE = (
    "Is the region <region></region> in the {first} or the {second} half of the image?",
    "Does <region></region> lie in the {first} or the {second} half?",
    "On which side of the picture is <region></region>, {first} or {second}?",
    "Where is the region <region></region>, {first} or {second}?",
)
_SEGMENT = (
    "Please segment the {name} in this {spoken} image.",
    "Segment the {name}.",
    "Where is the {name}? Give me a mask.",
    "Can you outline the {name} in this image?",
    "Show me the {name} in this picture.",
    "Mark the {name}, please.",
)
_SEGMENTED = (
    "Sure, the {name} is <SEG>.",
    "The {name} is <SEG>.",
    "Here is the {name} <SEG>.",
    "Of course, the {name} is <SEG>.",
)
_SEGMENT_TWO = (
    "Please segment the {name} and the {other} in this {spoken} image.",
    "Segment the {name} and the {other}.",
    "Outline both the {name} and the {other}.",
    "Show me the {name} and also the {other}.",
)
_REFUSALS = (
    "There is no {name} in this image.",
    "No {name} can be seen in this image.",
    "I cannot find a {name} here, so there is no {name} to segment.",
    "This image shows no {name}.",
)
_PLURAL = frozenset({"lungs"})
_BOUND = frozenset({"lungs", "pleural effusion"})
"""Structures whose height the anatomy fixes: asking whether they are above or below would give the answer away."""
_MASS = frozenset({"edema", "bleeding"})
_FOREIGN_SHARE = 0.25
"""How often a "no" is about a structure that only other modalities show."""


# ---- asking --------------------------------------------------------------------------------------------------------


def ask_vqa(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Closed and open questions about the whole picture: modality, presence, side, relation, list, place, finding."""
    asked = [_modality(scene, rng), *_presence(scene, rng), _list(scene, rng)]
    asked += [question for question in (_side(scene, rng), _relation(scene, rng)) if question]
    asked += [question for question in (_place(scene, rng), _finding(scene, rng)) if question]
    return asked


def ask_region(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Questions about marked structures: one naming question for each, identity checks, and sides."""
    asked = []
    for structure in scene.structures:
        asked.append(_region_name(structure.name, rng))
    asked += _region_checks(scene, rng)
    side = _region_side(scene, rng)
    return asked + ([side] if side else [])


def ask_grounding(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Segmentation requests: each structure once, some pairs, and about a quarter for absent structures.

    An absent target belongs to the same modality, or in about a third of the cases to another, and is answered without
    ``<SEG>``.
    """
    asked = [_grounded(scene, name, rng) for name in scene.present]
    if len(scene.present) > 1 and rng.random() < 0.5:
        asked.append(_grounded_pair(scene, rng))
    absent = [name for name in scene.absent if rng.random() < 0.35]
    if rng.random() < 0.35:
        absent.append(_foreign(scene, rng))
    return asked + [_refused(scene, name, rng) for name in absent]


def ask_all(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Questions of all three kinds about one scene."""
    return ask_vqa(scene, rng) + ask_region(scene, rng) + ask_grounding(scene, rng)


# ---- whole picture -------------------------------------------------------------------------------------------------


def _modality(scene: Scene, rng: np.random.Generator) -> Question:
    return Question("modality", "vqa", _pick(_MODALITY, rng), _sentence(scene.plan.spoken), "closed")


def _presence(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """As many about present as about absent structures; each optional structure is present in half of the scenes.

    Some of the absent ones are of another modality; a name stays as often present as absent.
    """
    optional = scene.plan.optional
    present = [name for name in optional if name in scene.present]
    absent = [name for name in optional if name not in scene.present]
    rng.shuffle(present)
    rng.shuffle(absent)
    count = min(len(present), len(absent), 2)
    asked = []
    missing = [_foreign(scene, rng) if rng.random() < _FOREIGN_SHARE else name for name in absent[:count]]
    for name in present[:count] + missing:
        answer = "Yes" if name in scene.present else "No"
        text = _pick(_PRESENCE, rng).format(a=_article(name), name=name).replace("  ", " ")
        asked.append(Question("presence", "vqa", text, answer, "closed", name))
    return asked


def _side(scene: Scene, rng: np.random.Generator) -> Question | None:
    found = _one_sided(scene, rng)
    if found is None:
        return None
    name, words, answer = found
    text = _pick(_SIDE, rng).format(name=name, first=words[0], second=words[1])
    return Question("side", "vqa", text, _sentence(answer), "closed", name)


def _one_sided(scene: Scene, rng: np.random.Generator) -> tuple[str, Sequence[str], str] | None:
    """A structure that is clearly in one half: its name, the two words in random order and the right one."""
    choices = [
        (structure.name, words, answer)
        for structure in scene.structures
        for words in (("left", "right"), ("upper", "lower"))[: 1 if structure.name in _BOUND else 2]
        for answer in words
        if structure.share(answer) > 0.85
    ]
    if not choices:
        return None
    name, words, answer = choices[int(rng.integers(len(choices)))]
    return name, _shuffled(words, rng), answer


def _relation(scene: Scene, rng: np.random.Generator) -> Question | None:
    structures = [structure for structure in scene.structures if structure.compact]
    if len(structures) < 2:
        return None
    structure, beside = (structures[int(index)] for index in rng.permutation(len(structures))[:2])
    (x, y), (other_x, other_y) = structure.centre, beside.centre
    beside_only = bool({structure.name, beside.name} & _BOUND)
    if max(abs(x - other_x), 0 if beside_only else abs(y - other_y)) < 0.12:
        return None
    if beside_only or abs(x - other_x) > abs(y - other_y):
        words, answer = ("left of", "right of"), "left of" if x < other_x else "right of"
    else:
        words, answer = ("above", "below"), "above" if y < other_y else "below"
    first, second = _shuffled(words, rng)
    text = _pick(_RELATION, rng).format(name=structure.name, other=beside.name, first=first, second=second)
    return Question("relation", "vqa", text, _sentence(answer.replace(" of", "")), "closed", structure.name)


def _list(scene: Scene, rng: np.random.Generator) -> Question:
    return Question("list", "vqa", _pick(_LIST, rng), _sentence(_joined(scene.present)) + ".", "open")


def _place(scene: Scene, rng: np.random.Generator) -> Question | None:
    """What is in a quarter of the picture; only asked where exactly one structure lies."""
    places: dict[str, list[str]] = {}
    for structure in scene.structures:
        places.setdefault(_quarter(structure), []).append(structure.name)
    if "several" in places:
        return None
    clear = [(place, names[0]) for place, names in places.items() if len(names) == 1]
    if not clear:
        return None
    place, name = clear[int(rng.integers(len(clear)))]
    return Question("place", "vqa", _pick(_PLACE, rng).format(place=place), f"The {name}.", "open", name)


def _finding(scene: Scene, rng: np.random.Generator) -> Question | None:
    lesions = [structure for structure in scene.structures if structure.name in LESIONS]
    if len(lesions) != 1 or _quarter(lesions[0]) == "several":
        return None
    lesion = lesions[0]
    size = "large" if lesion.area > 0.04 * lesion.mask.size else "small"
    article = "" if lesion.name in _MASS else "A "
    answer = _sentence(f"{article}{size} {lesion.name} in the {_quarter(lesion)} part of the image.")
    return Question("finding", "vqa", _pick(_FINDING, rng), answer, "open", lesion.name)


# ---- regions -------------------------------------------------------------------------------------------------------


def _region_name(name: str, rng: np.random.Generator) -> Question:
    return Question("region_name", "region", _pick(_REGION_NAME, rng), _sentence(name), "open", name, (name,))


def _region_checks(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """One true and one false claim about marked structures; a name is claimed truly and falsely equally often."""
    present = [name for name in scene.plan.optional if name in scene.present]
    if not present:
        return []
    truth = bool(rng.random() < 0.5)
    marked = present[int(rng.integers(len(present)))]
    others = [name for name in scene.plan.optional if name != marked]
    other = _foreign(scene, rng) if rng.random() < _FOREIGN_SHARE else _pick(others, rng)
    claimed = marked if truth else other
    text = _pick(_REGION_CHECK, rng).format(a=_article(claimed), name=claimed).replace("  ", " ")
    return [Question("region_check", "region", text, "Yes" if truth else "No", "closed", claimed, (marked,))]


def _region_side(scene: Scene, rng: np.random.Generator) -> Question | None:
    found = _one_sided(scene, rng)
    if found is None:
        return None
    name, words, answer = found
    text = _pick(_REGION_PLACE, rng).format(first=words[0], second=words[1])
    return Question("region_side", "region", text, _sentence(answer), "closed", name, (name,))


# ---- grounding -----------------------------------------------------------------------------------------------------


def _grounded(scene: Scene, name: str, rng: np.random.Generator) -> Question:
    question = _pick(_SEGMENT, rng).format(name=name, spoken=scene.plan.spoken)
    answer = _agreed(_pick(_SEGMENTED, rng), name).format(name=name)
    return Question("grounding", "grounding", _agreed(question, name), answer, "open", name, (), (name,))


def _grounded_pair(scene: Scene, rng: np.random.Generator) -> Question:
    name, other = (scene.present[int(index)] for index in rng.permutation(len(scene.present))[:2])
    question = _pick(_SEGMENT_TWO, rng).format(name=name, other=other, spoken=scene.plan.spoken)
    verbs = ["are" if one in _PLURAL else "is" for one in (name, other)]
    answer = f"Sure, the {name} {verbs[0]} <SEG> and the {other} {verbs[1]} <SEG>."
    return Question("grounding_pair", "grounding", question, answer, "open", name, (), (name, other))


def _refused(scene: Scene, name: str, rng: np.random.Generator) -> Question:
    question = _pick(_SEGMENT, rng).format(name=name, spoken=scene.plan.spoken)
    return Question("grounding_absent", "grounding", question, refusal(name, rng), "open", name)


def refusal(name: str, rng: np.random.Generator) -> str:
    """An answer without ``<SEG>`` to a request for something that the image does not show."""
    article = _article(name)
    return _pick(_REFUSALS, rng).replace("find a", f"find {article}".rstrip()).format(name=name)


# ---- words ---------------------------------------------------------------------------------------------------------


def _foreign(scene: Scene, rng: np.random.Generator) -> str:
    """A structure that this modality never shows, of those that are present in half of the scenes of another one."""
    plans = [plan for plan in PLANS.values() if plan.key != scene.modality]
    plan = plans[int(rng.integers(len(plans)))]
    return _pick([name for name in plan.optional if name not in scene.plan.structures], rng)


def _pick(wordings: Sequence[str], rng: np.random.Generator) -> str:
    return wordings[int(rng.integers(len(wordings)))]


def _shuffled(words: tuple[str, str], rng: np.random.Generator) -> tuple[str, str]:
    return words if rng.random() < 0.5 else (words[1], words[0])


def _article(name: str) -> str:
    if name in _PLURAL or name in _MASS:
        return ""
    return "an" if name[0] in "aeiou" else "a"


def _agreed(text: str, name: str) -> str:
    """Plural verbs for plural names."""
    if name not in _PLURAL:
        return text
    return text.replace("{name} is", "{name} are").replace("Here is", "Here are").replace("Where is", "Where are")


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _joined(names: Sequence[str]) -> str:
    """a, b and c."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _quarter(structure: Structure) -> str:
    """The quarter that holds nearly all of a structure, ``central``, or ``several`` if it is spread out."""
    for vertical in ("upper", "lower"):
        for horizontal in ("left", "right"):
            if structure.share(vertical) > 0.8 and structure.share(horizontal) > 0.8:
                return f"{vertical} {horizontal}"
    x, y = structure.centre
    central = structure.compact and max(abs(x - 0.5), abs(y - 0.5)) < 0.1
    return "central" if central else "several"
