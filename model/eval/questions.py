"""Records of a data file → single questions with everything that asking and scoring them needs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.data.image_io import read_mask
from model.data.schema import TASKS, Sample, canonical, inspect_record, modality_of
from model.errors import MedPLIBError
from model.eval.references import Reference, Turns, answer_text, asked_text, references_of
from model.processing.masks import encode_rle
from model.processing.special_tokens import REGION_MARKER, SEG_TOKEN

_SPLITTER = "--"  # between modality, data set and case in names of the SA-Med2D layout


@dataclass(frozen=True)
class Question:
    """One question of one record.

    Attributes:
        number: of the record in its file, from 0.
        reference: what is asked and what is right.
        image_path: as in the data set.
        answer_type: ``open``, ``closed``, ``region`` …
        metadata: what is known of task, kind, modality, structure, dataset and turn.
        image: file of the image.
        history: earlier questions and their reference answers.
        regions: mask files of the region markers, those of the history first.
        masks: mask files of the reference answer; None where the record says nothing about masks.
        error: why it cannot be asked, in one sentence.
    """

    number: int
    reference: Reference
    image_path: str
    answer_type: str
    metadata: Mapping[str, Any]
    image: Path | None = None
    history: tuple[tuple[str, str], ...] = ()
    regions: tuple[Path, ...] = ()
    masks: tuple[Path, ...] | None = None
    error: str | None = None


def questions_of(
    record: Mapping[str, Any],
    number: int,
    images_root: Path,
    answer_type: str | None = None,
    turns: Turns = "all",
) -> list[Question]:
    """The questions of one raw record; as many as ``references_of`` gives, whatever is wrong with it.

    Args:
        record: of the published layout; never changed.
        number: of the record in its file, from 0.
        images_root: folder that its paths start from.
        answer_type: label of its questions; what the record says where None.
        turns: which questions of a conversation are asked.
    """
    references = list(references_of(record, number, turns))
    sample, findings = inspect_record(record, images_root)
    if sample is None:
        faults = [finding.message for finding in findings if finding.severity == "error"]
    else:
        faults = [fault for fault in (_unaskable(sample),) if fault]
    error = "; ".join(faults) or None
    return [_question(record, sample, reference, number, answer_type, error) for reference in references]


def unreadable_question(number: int, error: MedPLIBError) -> Question:
    """The one question that stands for a record which cannot even be parsed."""
    return Question(number, Reference(number, 0, "", ""), "", "", {"turn": 0}, error=str(error))


def _unaskable(sample: Sample) -> str | None:
    if sample.examples:
        return "the record shows solved examples before its question; they are not shown to the model here"
    if len(sample.images) != 1:
        return f"the record has {len(sample.images)} images; questions are asked about one"
    return None


def _question(
    record: Mapping[str, Any],
    sample: Sample | None,
    reference: Reference,
    number: int,
    answer_type: str | None,
    error: str | None,
) -> Question:
    image_path = _image_path(record)
    metadata = _metadata(record, image_path, reference)
    label = answer_type or _own_answer_type(record, metadata)
    if sample is None or error:
        return Question(number, reference, image_path, label, metadata, error=error or "the record cannot be read")
    texts = [turn.text for turn in sample.turns]
    place = 2 * reference.turn
    begin, end = (_count(texts[1:stop:2], SEG_TOKEN) for stop in (place, place + 2))
    says_masks = end > begin or metadata.get("task") == "grounding"
    return Question(
        number,
        reference,
        image_path,
        label,
        metadata,
        image=sample.images[0],
        history=tuple((asked_text(texts[at]), answer_text(texts[at + 1])) for at in range(0, place, 2)),
        regions=sample.regions[: _count(texts[: place + 1 : 2], REGION_MARKER)],
        masks=sample.masks[begin:end] if says_masks else None,
    )


def _count(texts: Sequence[str], marker: str) -> int:
    return sum(text.count(marker) for text in texts)


def _image_path(record: Mapping[str, Any]) -> str:
    """The path as the record writes it; the last of several."""
    name = canonical(record).get("image", "") if isinstance(record, Mapping) else ""
    if isinstance(name, Sequence) and not isinstance(name, str):
        name = name[-1] if name else ""
    return name if isinstance(name, str) else ""


def _metadata(record: Mapping[str, Any], image_path: str, reference: Reference) -> dict[str, Any]:
    stem = Path(image_path).name
    parts = stem.split(_SPLITTER)
    known = {
        "task": _task(record, reference),
        "kind": record.get("kind"),
        "modality": record.get("modality") or (modality_of(stem) if stem else None),
        "structure": record.get("structure") or record.get("about"),
        "dataset": record.get("dataset") or (parts[1] if len(parts) > 2 else None),
    }
    texts = {name: value for name, value in known.items() if isinstance(value, str) and value}
    return {**texts, "turn": reference.turn}


def _task(record: Mapping[str, Any], reference: Reference) -> str:
    """What the record says it is; else what this question and its answer show."""
    if record.get("task") in TASKS:
        return str(record["task"])
    if SEG_TOKEN in reference.gt:
        return "grounding"
    return "region" if REGION_MARKER in reference.prompt else "vqa"


def _own_answer_type(record: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    own = record.get("answer_type")
    if isinstance(own, str) and own:
        return own.lower()
    task = metadata.get("task", "")
    return task if task in ("region", "grounding") else "open"


def reference_masks(question: Question, size: tuple[int, int]) -> list[dict[str, Any]] | None:
    """Run lengths of a question's reference masks; an empty mask file stays an empty mask.

    Args:
        question: whose files are read.
        size: (height, width) of its image.

    Raises:
        MedPLIBError: a file cannot be read or is not of the image's size.
    """
    if question.masks is None:
        return None
    return [encode_rle(_of_size(path, read_mask(path), size)) for path in question.masks]


def _of_size(path: Path, mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if mask.shape != size:
        raise MedPLIBError(
            f"the mask {path} is {mask.shape[0]} × {mask.shape[1]} pixels, its image {size[0]} × {size[1]}; "
            "they must have the same size"
        )
    return mask


def answer_id(model_id: str, reference: Reference) -> str:
    """Names the answer of a model to a question: the same in every run."""
    return hashlib.blake2b(
        "\0".join((model_id, *map(str, reference.key))).encode("utf-8", "surrogatepass"), digest_size=11
    ).hexdigest()
