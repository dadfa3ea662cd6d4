"""Records of a data file as single questions with all that inference and scoring need."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from model.data.image_io import read_mask
from model.data.schema import TASKS, canonical, inspect_record, is_number, modality_of, with_seg_spelled
from model.errors import MedPLIBError
from model.processing.masks import encode_rle
from model.processing.special_tokens import IMAGE_TOKEN, REGION_MARKER, SEG_TOKEN

_SPLITTER = "--"  # between modality, data set and case in names of the SA-Med2D layout


@dataclass(frozen=True)
class Question:
    """One question of one record."""

    number: int  # of the record in its file, from 0
    reference: Reference  # what is asked and what is right
    image_path: str  # as in the data set
    answer_type: str  # ``open``, ``closed``, ``region`` …
    metadata: Mapping[str, Any]  # what is known of task, kind, modality, structure, dataset and turn
    image: Path | None = None  # file of the image
    history: tuple[tuple[str, str], ...] = ()  # earlier questions and their reference answers
    regions: tuple[Path, ...] = ()  # mask files of the region markers, those of the history first
    # mask files of the reference answer; None where the record says nothing about masks.
    masks: tuple[Path, ...] | None = None
    spacing_mm: tuple[float, float] | None = None  # (row, column) distance of pixels, where the record says it
    error: str | None = None  # why it cannot be asked, in one sentence


def questions_of(
    record: Mapping[str, Any], number: int, images_root: Path, answer_type: str | None = None, turns: Turns = "all"
) -> list[Question]:
    """The questions of one raw record; as many as ``references_of`` gives, whatever is wrong with it.

    Args:
        record: of the published layout; never changed.
        number: of the record in its file, from 0.
        images_root: folder that its paths start from.
        answer_type: label of its questions; what the record says where None.
        turns: which questions of a conversation are asked.
    """
    sample, findings = inspect_record(record, images_root)
    error = "; ".join(finding.message for finding in findings if finding.severity == "error") or None
    if sample is not None and sample.examples:
        error = "the record shows solved examples before its question; they are not shown to the model here"
    elif sample is not None:
        images = len(sample.images)
        error = None if images == 1 else f"the record has {images} images; questions are asked about one"
    image_path = canonical(record).get("image", "") if isinstance(record, Mapping) else ""
    if isinstance(image_path, Sequence) and not isinstance(image_path, str):
        image_path = image_path[-1] if image_path else ""
    image_path = image_path if isinstance(image_path, str) else ""
    questions = []
    for reference in references_of(record, number, turns):
        metadata = _metadata(record, image_path, reference)
        own, task = record.get("answer_type"), metadata.get("task")
        label = answer_type or (own.lower() if isinstance(own, str) and own else "")
        label = label or (task if task in ("region", "grounding") else "open")
        if sample is None or error:
            reason = error or "the record cannot be read"
            questions.append(Question(number, reference, image_path, label, metadata, error=reason))
            continue
        texts = [turn.text for turn in sample.turns]
        place = 2 * reference.turn
        begin, end = (_count(texts[1:stop:2], SEG_TOKEN) for stop in (place, place + 2))
        question = Question(
            number,
            reference,
            image_path,
            label,
            metadata,
            image=sample.images[0],
            history=tuple((asked_text(texts[at]), answer_text(texts[at + 1])) for at in range(0, place, 2)),
            regions=sample.regions[: _count(texts[: place + 1 : 2], REGION_MARKER)],
            masks=sample.masks[begin:end] if end > begin or task == "grounding" else None,
            spacing_mm=_spacing(record),
        )
        questions.append(question)
    return questions


def _count(texts: Sequence[str], marker: str) -> int:
    return sum(text.count(marker) for text in texts)


def _metadata(record: Mapping[str, Any], image_path: str, reference: Reference) -> dict[str, Any]:
    stem = Path(image_path).name
    parts = stem.split(_SPLITTER)
    task = "grounding" if SEG_TOKEN in reference.gt else "region" if REGION_MARKER in reference.prompt else "vqa"
    known = {
        "task": record["task"] if record.get("task") in TASKS else task,
        "kind": record.get("kind"),
        "modality": record.get("modality") or (modality_of(stem) if stem else None),
        "structure": record.get("structure") or record.get("about"),
        "dataset": record.get("dataset") or (parts[1] if len(parts) > 2 else None),
        "absent_kind": record.get("absent_kind"),
        "patient": str(record.get("patient") or ""),
    }
    texts = {name: value for name, value in known.items() if isinstance(value, str) and value}
    return {**texts, "turn": reference.turn}


def _spacing(record: Mapping[str, Any]) -> tuple[float, float] | None:
    """(row, column) distance of pixels in mm as the record's ``spacing`` says it; None where it does not."""
    found = record.get("spacing")
    if not isinstance(found, list | tuple) or len(found) != 2:
        return None
    return (float(found[0]), float(found[1])) if all(is_number(side) and side > 0 for side in found) else None


def reference_masks(question: Question, size: tuple[int, int]) -> list[dict[str, Any]] | None:
    """Run lengths of a question's reference masks on an image of this (height, width); an empty file stays empty.

    Raises:
        MedPLIBError: a file cannot be read or is not of the image's size.
    """
    if question.masks is None:
        return None
    found = []
    for path in question.masks:
        mask = read_mask(path)
        if mask.shape != size:
            raise MedPLIBError(
                f"the mask {path} is {mask.shape[0]} × {mask.shape[1]} pixels, its image {size[0]} × {size[1]}; "
                "they must have the same size"
            )
        found.append(encode_rle(mask))
    return found


def answer_id(model_id: str, reference: Reference) -> str:
    """Names the answer of a model to a question: the same in every run."""
    return hashlib.blake2b(
        "\0".join((model_id, *map(str, reference.key))).encode("utf-8", "surrogatepass"), digest_size=11
    ).hexdigest()


Turns = Literal["all", "first"]

_REGION_PATH = re.compile(r"<region>.*?</region>", re.DOTALL)
_MASK_PATH = re.compile(r"<mask>.*?</mask>", re.DOTALL)


@dataclass(frozen=True)
class Reference:
    """One question of a record and its reference answer."""

    # the record's own id, as it stands there; its number in the file, from 0, where it has none.
    question_id: str | int
    turn: int  # which question of the conversation, from 0
    prompt: str  # the question, ``<region></region>`` where it points, without paths and ``<image>``
    gt: str  # the answer, ``<SEG>`` where it segments, without paths

    @property
    def key(self) -> tuple[str, int]:
        """See ``Prediction.key``."""
        return str(self.question_id), self.turn


def references_of(record: Mapping[str, Any], number: int, turns: Turns = "all") -> Iterator[Reference]:
    """The questions of one raw record in their order; one with empty texts where it holds none or is malformed."""
    question_id = question_id_of(record, number)
    found = canonical(record).get("conversations") if isinstance(record, Mapping) else None
    conversation: list[str] = []
    if isinstance(found, list | tuple) and all(isinstance(entry, Mapping) for entry in found):
        texts = [entry.get("value") if isinstance(entry.get("value"), str) else "" for entry in found]
        conversation = [with_seg_spelled(text) if place % 2 else text for place, text in enumerate(texts)]
    count = max(1, (len(conversation) + 1) // 2) if turns == "all" else 1
    for turn in range(count):
        question, answer = ([*conversation[2 * turn : 2 * turn + 2], "", ""])[:2]
        yield Reference(question_id, turn, asked_text(question), answer_text(answer))


def question_id_of(record: Mapping[str, Any], number: int) -> str | int:
    """The record's own id, text or whole number; its number in the file where it has none."""
    for name in ("id", "question_id"):
        value = record.get(name) if isinstance(record, Mapping) else None
        if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
            return value
    return number


def asked_text(question: str) -> str:
    """A question of a record as it is asked: region paths and ``<image>`` markers are gone."""
    return _REGION_PATH.sub(REGION_MARKER, question).replace(IMAGE_TOKEN, "").strip()


def answer_text(answer: str) -> str:
    """An answer of a record without mask paths."""
    return _MASK_PATH.sub("", answer)


def regions_of(
    records: Sequence[Mapping[str, Any]], images: Path, keys: set[tuple[str, int]]
) -> dict[tuple[str, int], tuple[Path, ...]]:
    """Mask files of the regions that the questions of ``keys`` point at; records are gone through once."""
    wanted = {question for question, _ in keys}
    found: dict[tuple[str, int], tuple[Path, ...]] = {}
    for number, record in enumerate(records):
        name = str(question_id_of(record, number))
        if name not in wanted:
            continue
        sample, _ = inspect_record(record, images)
        if sample is None or not sample.regions:
            continue
        regions = iter(sample.regions)
        for turn, asked in enumerate(sample.turns[::2]):
            here = tuple(path for _, path in zip(range(asked.text.count("<region>")), regions, strict=False))
            if (name, turn) in keys and here:
                found[(name, turn)] = here
    return found
