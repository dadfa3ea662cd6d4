"""Records about the cases of one split, in balance, and blind baselines: how well questions are answered unseen."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from model.data.builders.cases import Case, draw
from model.data.image_io import read_mask
from model.data.phantom.questions import SPOKEN_NAMES

Record = Mapping[str, Any]

_PATHS = re.compile(r"<(region|mask)>.*?</\1>", re.DOTALL)
_GRID = 64


def blind_baseline(train_records: Iterable[Record], test_records: Iterable[Record]) -> dict[str, float]:
    """Accuracy 0..1 of the best image-free predictor, for every ``kind`` of the test records.

    Four predictors learn from the training answers: the commonest answer to the same text, to the same kind of question
    about the same thing in the same set of words, to the same kind and thing, and to the kind alone; each falls back to
    the next where it has seen nothing. The best of the four **on the test records** counts, which flatters blindness.
    Multi-turn records are read turn by turn. Grounding records are left out: they are scored by their masks, for which
    ``position_prior_dice`` is the blind baseline."""
    keys: tuple[Callable[[Mapping[str, str]], Any], ...] = (
        lambda turn: (turn["kind"], turn["question"]),
        lambda turn: (turn["kind"], turn["about"], frozenset(re.findall(r"\w+", turn["question"])) & _WORDS),
        lambda turn: (turn["kind"], turn["about"]),
        lambda turn: turn["kind"],
    )
    seen: list[dict[Any, Counter[str]]] = [defaultdict(Counter) for _ in keys]
    for turn in _rounds(train_records):
        for table, key in zip(seen, keys, strict=True):
            table[key(turn)][turn["answer"]] += 1
    right: dict[str, list[int]] = defaultdict(lambda: [0] * len(keys))
    total: Counter[str] = Counter()
    for turn in _rounds(test_records):
        total[turn["kind"]] += 1
        for first in range(len(keys)):
            tables = (table.get(key(turn)) for table, key in zip(seen[first:], keys[first:], strict=True))
            guess = next((table.most_common(1)[0][0] for table in tables if table), "")
            right[turn["kind"]][first] += guess == turn["answer"]
    return {kind: max(right[kind]) / total[kind] for kind in sorted(total)}


def position_prior_dice(train_records: Iterable[Record], test_records: Iterable[Record], root: Path) -> float:
    """Mean Dice 0..1 of masks drawn blind: each structure's average training mask, thresholded at its best.

    Averages are kept for each modality and structure. Looks at grounding records with exactly one mask; ``root`` is the
    folder of the mask paths. Masks are compared on a 64 × 64 grid."""
    shown: dict[tuple[str, str], list[NDArray[np.bool_]]] = defaultdict(list)
    for key, mask in _single_masks(train_records, root):
        shown[key].append(mask)
    priors = {key: _best_prior(np.stack(masks)) for key, masks in shown.items()}
    scores = [_dice(priors[key], mask) if key in priors else 0.0 for key, mask in _single_masks(test_records, root)]
    return float(np.mean(scores)) if scores else 0.0


_WORDS = frozenset(("left", "right", "upper", "lower", "above", "below"))


def _rounds(records: Iterable[Record]) -> Iterable[dict[str, str]]:
    for record in records:
        if record.get("task") == "grounding":
            continue
        conversation = record["conversations"]
        for asked, answered in zip(conversation[::2], conversation[1::2], strict=True):
            question = _PATHS.sub("", str(asked["value"])).strip()
            about = str(record.get("about", ""))
            yield {
                "kind": str(record["kind"]),
                "about": about if about in question else "",  # what only the picture shows stays unknown
                "question": question,
                "answer": str(answered["value"]).strip(),
            }


def _single_masks(records: Iterable[Record], root: Path) -> Iterable[tuple[tuple[str, str], NDArray[np.bool_]]]:
    for record in records:
        paths = re.findall(r"<mask>(.*?)</mask>", str(record["conversations"][1]["value"]))
        if len(paths) == 1:
            mask = read_mask(root / paths[0])
            share = cv2.resize(mask.astype(np.float32), (_GRID, _GRID), interpolation=cv2.INTER_AREA)
            yield (str(record["modality"]), str(record["about"])), share > 0.5


def _best_prior(masks: NDArray[np.bool_]) -> NDArray[np.bool_]:
    average = masks.mean(0)
    candidates = [average >= share * average.max() for share in np.linspace(0.05, 0.95, 10)]
    return max(candidates, key=lambda prior: float(np.mean([_dice(prior, mask) for mask in masks])))


def _dice(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    both = int(first.sum()) + int(second.sum())
    return 2 * int((first & second).sum()) / both if both else 1.0


MAX_SHARE = 0.55
"""Largest share of one answer among the questions of a kind about one thing."""
CLEAR_SIDE = 0.85
"""Share of a structure's area that must lie in one half of the image for a question about its side."""
GENERIC_LABELS = frozenset(("label", "labels", "class", "category", "class_name", "classification"))

_TEXTS: dict[str, tuple[str, ...]] = {
    "grounding": (
        "Please segment {the} in this image.",
        "Segment {the}.",
        "Where {is} {the}? Give me a mask.",
        "Can you outline {the} in this image?",
        "Show me {the} in this picture.",
        "Mark {the}, please.",
    ),
    "region_name": (
        "What is in the region {region}?",
        "Which structure is marked by {region}?",
        "Name the structure in this region {region}.",
        "What does the region {region} show?",
    ),
    "region_check": (
        "Is the region {region} {a}?",
        "Does the region {region} show {a}?",
        "Would you call the region {region} {a}?",
    ),
    "presence": ("Is there any {name} in this image?", "Does this image show {a}?", "Can you see {a} here?"),
    "side": (
        "{Is} {the} in the left or the right half of the image?",
        "Which half of the image holds {the}, left or right?",
        "On which side of the image can {the} be seen, left or right?",
    ),
    "label": ("What is the {name} in this image?", "Which {name} fits this image?", "Name the {name} of this image."),
    "generic": (
        "Which class does this image belong to?",
        "How is this image classified?",
        "What does this image show?",
    ),
    "finding": ("Does this image show {name}?", "Are there signs of {name} in this image?", "Can you see {name} here?"),
    "modality": (
        "What modality is used to take this image?",
        "Which imaging modality was used here?",
        "What kind of medical image is this?",
        "Name the imaging technique of this picture.",
    ),
}
_SEGMENTED = ("Sure, {the} {is} <SEG>.", "{The} {is} <SEG>.", "Here {is} {the} <SEG>.", "Of course, {the} {is} <SEG>.")
_REFUSALS = (
    "There {is} no {name} in this image.",
    "No {name} can be seen in this image.",
    "I cannot find {a} here, so there {is} no {name} to segment.",
    "This image shows no {name}.",
)
_YES = {"1": "Yes", "yes": "Yes", "true": "Yes", "present": "Yes", "positive": "Yes"}
_NO = {"0": "No", "no": "No", "false": "No", "absent": "No", "negative": "No"}
_PLACES = frozenset(
    ("left", "right", "upper", "lower", "middle", "anterior", "posterior", "superior", "inferior", "medial", "lateral")
)
_SINGULAR = re.compile(r"(?:ss|us|is|as|ps|vs)$")


class SeenMask(NamedTuple):
    """What a mask showed: its path in records, pixels set, share of them in the left half, names that it overlaps."""

    path: str
    area: int
    left: float
    overlaps: tuple[str, ...] = ()


class SeenCase(NamedTuple):
    """A case whose pixels were read."""

    image: str  # its path in records
    spacing: tuple[float, float] | None = None  # (row, column) distance of pixels in mm
    masks: Mapping[str, SeenMask] = MappingProxyType({})  # name → mask with foreground
    absent: tuple[str, ...] = ()  # names that are stated to be absent, empty masks among them

    @classmethod
    def of(cls, plain: Sequence[Any]) -> SeenCase:
        """The same from its JSON form."""
        image, spacing, masks, absent = plain
        shown = {name: SeenMask(path, area, left, tuple(names)) for name, (path, area, left, names) in masks.items()}
        return cls(image, tuple(spacing) if spacing else None, shown, tuple(absent))


@dataclass(frozen=True)
class _Ask:
    number: int  # of the case
    kind: str
    about: str  # what the question names
    answer: str
    form: str = ""  # of _TEXTS; the kind when empty
    path: str = ""
    options: str = ""
    absent_kind: str = ""  # picture, target or modality: why an absent target is absent


def records_of(
    pairs: Sequence[tuple[Case, SeenCase]],
    names: Mapping[str | None, Sequence[str]],
    labels: Mapping[str, Sequence[str]],
    dataset: str,
    *,
    seed: int = 0,
    ask_modality: bool = False,
) -> list[dict[str, Any]]:
    """The records of one split, the same for the same cases and seed.

    Questions with one of few answers are thinned until no answer has more than ``MAX_SHARE`` of those of a kind about
    one thing, and each wording is given to as balanced a stretch of them; a question with one possible answer is not
    asked.

    Args:
        pairs: cases with what was seen in them.
        names: modality → names of structures that its images may show, for what a region is not.
        labels: label → its values in the whole set.
        dataset: name of the set, in each record.
        seed: of wordings and choices.
        ask_modality: ask for the modality even where all images have the same.
    """
    asks: list[_Ask] = []
    for number, (case, seen) in enumerate(pairs):
        asks += _asks_of(number, case, seen, labels, names.get(case.modality, ()))
    for group in _checks(pairs, names, seed):
        asks += group
    groups: dict[tuple[str, str], list[_Ask]] = defaultdict(list)
    for ask in asks:
        groups[ask.kind, "" if ask.kind in ("region_name", "modality") else ask.about].append(ask)
    made: list[tuple[int, str, dict[str, Any]]] = []
    for (kind, _), group in groups.items():
        keys = {ask: draw(seed, pairs[ask.number][0].key, kind, ask.about, ask.answer) for ask in group}
        if kind in ("grounding", "grounding_absent"):
            worded = [(ask, keys[ask] % len(_TEXTS["grounding"])) for ask in group]
        elif kind == "modality" and ask_modality:
            worded = [(ask, keys[ask] % len(_TEXTS["modality"])) for ask in group]
        else:
            worded = _balanced(sorted(group, key=lambda ask: keys[ask]), len(_TEXTS[group[0].form or kind]))
        for ask, wording in worded:
            made.append((ask.number, kind, _record(ask, wording, keys[ask])))
    for number, (case, _) in enumerate(pairs):
        made += [(number, "question", record) for record in _own(case)]
    made.sort(key=lambda one: one[0])
    counted: Counter[int] = Counter()
    records = []
    for number, _, record in made:
        case, seen = pairs[number]
        known = {
            "modality": case.modality,
            "dataset": dataset,
            "patient": case.patient,
            "spacing": list(seen.spacing) if seen.spacing else None,
            "volume": case.volume,
            "plane": case.plane,
            "slice": case.slice_index,
            "terms": case.terms or None,
        }
        head = {"id": f"{case.key}-{counted[number]}", "image": seen.image}
        records.append({**head, **record, **{key: value for key, value in known.items() if value is not None}})
        counted[number] += 1
    return records


def unrelated(names: Sequence[str], present: Sequence[str]) -> list[str]:
    """Those of ``names`` that mean something else than each of ``present``.

    Beside a "liver" the absence of a "liver tumour" is clear. Beside a "liver tumour" that of a "liver" is not, nor
    that of a "left lung" beside a "lung", for a place is no other thing."""
    kept = []
    for name in names:
        own = _words(name)
        theirs = [_words(other) for other in present]
        if not any(own <= other or (other < own and own - other <= _PLACES) for other in theirs):
            kept.append(name)
    return kept


def label_name(label: str) -> str:
    """A column's name in words."""
    return " ".join(label.replace("_", " ").split())


def _words(name: str) -> frozenset[str]:
    """Words of a name, in the singular."""
    return frozenset(word.removesuffix("s") for word in re.findall(r"[^\W_]+", name.casefold()))


def _asks_of(
    number: int, case: Case, seen: SeenCase, labels: Mapping[str, Sequence[str]], names: Sequence[str]
) -> Iterator[_Ask]:
    for name, mask in seen.masks.items():
        yield _Ask(number, "grounding", name, "", path=mask.path)
        yield _Ask(number, "region_name", name, name[:1].upper() + name[1:], path=mask.path)
        yield _Ask(number, "presence", name, "Yes")
        if max(mask.left, 1 - mask.left) >= CLEAR_SIDE and not _words(name) & {"left", "right"}:
            yield _Ask(number, "side", name, "Left" if mask.left > 0.5 else "Right")
    absent = unrelated(sorted(seen.absent), list(seen.masks))
    for name in absent:
        yield _Ask(number, "presence", name, "No")
    foreign = unrelated(sorted({*case.foreign} - {*seen.absent}), list(seen.masks))
    near, far = ([name for name in foreign if (name in names) is wanted] for wanted in (True, False))
    nearer = bool(near) and (not far or draw(0, case.key, "near") % 2 == 0)
    # One refusal each an image: a label map may lack dozens of structures.
    for kind, found in (("picture", absent), ("target", near if nearer else ()), ("modality", () if nearer else far)):
        if found:
            name = found[draw(0, case.key, "absent", kind) % len(found)]
            yield _Ask(number, "grounding_absent", name, "", absent_kind=kind)
            if kind != "picture":
                yield _Ask(number, "presence", name, "No")
    if case.modality in SPOKEN_NAMES:
        modality = SPOKEN_NAMES[case.modality]
        yield _Ask(number, "modality", "", modality[:1].upper() + modality[1:])
    for label, value in case.labels.items():
        values = labels.get(label, ())
        if value not in values or len(values) < 2:
            continue
        lower = {one.casefold() for one in values}
        if lower <= {*_YES, *_NO}:
            answer = {**_YES, **_NO}[value.casefold()]
            yield _Ask(number, "label", label_name(label), answer, "finding")
        else:
            form = "generic" if label.casefold() in GENERIC_LABELS else "label"
            yield _Ask(number, "label", label_name(label), value, form, options="; ".join(values))


def _checks(
    pairs: Sequence[tuple[Case, SeenCase]], names: Mapping[str | None, Sequence[str]], seed: int
) -> Iterator[list[_Ask]]:
    """Whether a region is a structure: for each name as often that it is as that it is another's, chosen by lot."""
    right: dict[str, list[_Ask]] = defaultdict(list)
    wrong: dict[str, list[_Ask]] = defaultdict(list)
    for number, (case, seen) in enumerate(pairs):
        for name, mask in seen.masks.items():
            right[name].append(_Ask(number, "region_check", name, "Yes", path=mask.path))
            apart = [other for other in names.get(case.modality, ()) if other not in (name, *mask.overlaps)]
            for other in unrelated(apart, [name]):
                wrong[other].append(_Ask(number, "region_check", other, "No", path=mask.path))
    for name in sorted(right):
        yes, no = (
            sorted(asks, key=lambda ask: draw(seed, pairs[ask.number][0].key, ask.path, ask.about))
            for asks in (right[name], wrong[name])
        )
        count = min((len(yes) + 1) // 2, len(no))
        yield yes[:count] + no[:count]


def _balanced(asks: Sequence[_Ask], wordings: int) -> list[tuple[_Ask, int]]:
    """Asks that are left when the commonest answer is thinned to ``MAX_SHARE``, each with the number of its wording."""
    by_answer: dict[str, list[_Ask]] = defaultdict(list)
    for ask in asks:
        by_answer[ask.answer].append(ask)
    counts = Counter({answer: len(group) for answer, group in by_answer.items()})
    top, most = counts.most_common(1)[0]
    others = sum(counts.values()) - most
    limit = max(others * MAX_SHARE / (1 - MAX_SHARE), min(others, 1))
    by_answer[top] = by_answer[top][: int(limit)]
    if not others:
        return []
    # each stretch of this order holds the answers in the shares of the whole
    mixed = sorted(
        ((place + 0.5) / len(group), answer, place)
        for answer, group in by_answer.items()
        for place in range(len(group))
    )
    stretches = min(wordings, max(1, len(mixed) // (4 * len(by_answer))))
    size = -(-len(mixed) // stretches)
    size += -size % len(by_answer)
    return [(by_answer[answer][place], index // size) for index, (_, answer, place) in enumerate(mixed)]


def _record(ask: _Ask, wording: int, chance: int) -> dict[str, Any]:
    grounding = ask.kind.startswith("grounding")
    texts = _TEXTS["grounding" if grounding else ask.form or ask.kind]
    question = _said(texts[wording], ask.about, ask.path)
    if ask.options:
        question += f" Answer with one of these: {ask.options}."
    answer = ask.answer
    if grounding:
        forms = _SEGMENTED if ask.kind == "grounding" else _REFUSALS
        answer = _said(forms[chance // 64 % len(forms)], ask.about)
        answer += f"<mask>{ask.path}</mask>" if ask.path else ""
    closed = ask.kind in ("region_check", "presence", "side", "label", "modality")
    task = "grounding" if grounding else "region" if ask.kind.startswith("region") else "vqa"
    record = _turns([(question, answer)], "closed" if closed else "open", task, ask.kind, ask.about)
    return {**record, "absent_kind": ask.absent_kind} if ask.absent_kind else record


def _own(case: Case) -> Iterator[dict[str, Any]]:
    for pairs in [case.questions] if case.conversation and case.questions else [[pair] for pair in case.questions]:
        text = " ".join(part for pair in pairs for part in pair)
        task = "grounding" if "<SEG>" in text or "<mask>" in text else "region" if "<region>" in text else "vqa"
        closed = all(answer.lower().rstrip(" .,;!") in ("yes", "no") for _, answer in pairs)
        yield _turns(pairs, "closed" if closed else "open", task, "question", "")


def _turns(pairs: Sequence[tuple[str, str]], answer_type: str, task: str, kind: str, about: str) -> dict[str, Any]:
    turns = []
    for number, (question, answer) in enumerate(pairs):
        shown = question if number or "<image>" in question else f"<image>\n{question}"
        turns += [{"from": "human", "value": shown}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, "answer_type": answer_type, "task": task, "kind": kind, "about": about}


def _said(text: str, name: str, path: str = "") -> str:
    last = name.casefold().rpartition(" ")[2]
    plural = last.endswith("s") and not _SINGULAR.search(last)
    verb = "are" if plural else "is"
    article = "" if plural else "an " if name[:1].casefold() in "aeiou" else "a "
    words = {"name": name, "the": f"the {name}", "The": f"The {name}", "a": f"{article}{name}", "is": verb}
    return text.format(**words, Is=verb.capitalize(), region=f"<region>{path}</region>")
