"""One row of a public question set, as its source publishes it → one record of the project's layout (reference §8).

For training and evaluation alike; which files a set consists of is in ``vqa.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

MODALITY_NAMES = {
    "ct": "ct",
    "ct_scan": "ct",
    "ct(computed tomography)": "ct",
    "mri": "mr",
    "mr (mag-netic resonance imaging)": "mr",
    "mr (magnetic resonance imaging)": "mr",
    "x-ray": "x_ray",
    "chest_xray": "x_ray",
    "fundus photography": "fundus",
    "dermoscopy": "dermoscopy",
    "endoscopy": "endoscopy",
    "ultrasound": "ultrasound",
}
"""Names that public sets use → those of the project's file names (reference §8)."""

_LETTERS = "ABCD"


def question_record(
    question_id: object, image: object, question: object, answer: object, answer_type: object = "", **known: object
) -> dict[str, Any]:
    """One question about one image. Where the source does not say, yes and no make a question closed. Raises
    ValueError: nothing is asked.

    Args:
        question_id: becomes the record's id.
        image: path as the record is to hold it.
        question: without ``<image>``.
        answer: text or number; spaces, tabs and line ends around it go. None and NaN count as no answer.
        answer_type: ``open`` or ``closed`` in any spelling of case and spaces; anything else counts as not said.
        known: further keys; empty ones are left out, and ``modality`` is given its name in this project.
    """
    asked, answered = _text(question), _text(answer)
    if not asked:
        raise ValueError("it asks nothing")
    answer_type = str(answer_type or "").strip().lower()
    if answer_type not in ("open", "closed"):
        answer_type = "closed" if answered.lower().rstrip(" .,;!") in ("yes", "no") else "open"
    record: dict[str, Any] = {
        "id": str(question_id),
        "image": str(image).strip(),
        "conversations": [{"from": "human", "value": f"<image>\n{asked}"}, {"from": "gpt", "value": answered}],
        "answer_type": answer_type,
        "task": "vqa",
    }
    for key, value in known.items():
        if value:
            text = str(value).strip()
            record[key] = modality_name(text) if key == "modality" else text
    return record


def _text(value: object) -> str:
    """What a cell says; an empty one of a table comes as None, or as NaN from programs that know no other."""
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value).strip()


def modality_name(text: str) -> str:
    """Our name of a modality that a public set names in its own way; one we do not know, in small letters."""
    lower = text.strip().lower()
    return MODALITY_NAMES.get(lower, "_".join(lower.split()))


def with_options(question: object, options: Sequence[str]) -> str:
    """A multiple-choice question: the options stand in it, since the answer is the text of one of them."""
    asked = _text(question)
    return f"{asked} Answer with one of these: {'; '.join(options)}." if options and asked else asked


def slake(row: Row) -> dict[str, Any]:
    """A row of SLAKE's ``train.json``, ``validate.json`` or ``test.json``; its images lie under ``imgs/``."""
    return question_record(
        f"slake-{row['qid']}",
        row["img_name"],
        row["question"],
        row["answer"],
        row["answer_type"],
        kind=row.get("content_type"),
        modality=row.get("modality"),
    )


def vqa_rad(row: Row) -> dict[str, Any]:
    """A row of ``VQA_RAD Dataset Public.json``, where types may have a space at their end and answers be numbers."""
    return question_record(
        f"vqa-rad-{row['qid']}",
        row["image_name"],
        row["question"],
        row["answer"],
        row["answer_type"],
        kind=row.get("question_type"),
    )


def vqa_rad_split(row: Row) -> str:
    """``train`` or ``test``: phrases of the test half are marked so (``test_freeform``, ``test_para``)."""
    return "test" if str(row["phrase_type"]).strip().startswith("test") else "train"


def path_vqa(row: Row) -> dict[str, Any]:
    """A row of PathVQA's ``*_vqa.pkl`` (``sent``, ``label``) or of its ``*_qa.pkl`` (``question``, ``answer``).

    The image is the bare id; of several answers the one with the highest score is taken."""
    if "img_id" not in row:
        return question_record("", row["image"], row["question"], row["answer"])
    label = row["label"]
    answer = max(label, key=lambda text: label[text]) if label else ""
    answer_type = "closed" if row.get("answer_type") == "yes/no" else "open"
    return question_record(
        f"path-vqa-{row['question_id']}", row["img_id"], row["sent"], answer, answer_type, kind=row.get("question_type")
    )


def imageclef(fields: Sequence[str]) -> dict[str, Any]:
    """A line ``image|question|answer`` of VQA-Med, or ``image|category|question|answer`` of its test of 2019.

    Of several answers with ``#`` between them the first is taught; all stay under ``answers``. Raises ValueError:
    another number of fields."""
    if len(fields) not in (3, 4):
        raise ValueError(f"{len(fields)} fields between |, expected image|question|answer")
    kind = fields[1] if len(fields) == 4 else ""
    answers = [answer.strip() for answer in fields[-1].split("#")]
    record = question_record("", fields[0].strip(), " ".join(fields[-2].split()), answers[0], kind=kind)
    return {**record, "answers": answers} if len(answers) > 1 else record


def pmc_vqa(row: Row) -> dict[str, Any]:
    """A row of PMC-VQA, first version (``Answer`` a text, ``Answer_label`` a letter) or second (``Answer`` a letter).
    Raises ValueError: the answer is no choice."""
    choices = {  # `` A:Diffuse uptake `` → ``Diffuse uptake``
        letter: re.sub(rf"^{letter}\s*[:.)]\s*", "", str(row[f"Choice {letter}"] or "").strip()).strip()
        for letter in _LETTERS
    }
    answer = _text(row.get("Answer_label")) or _text(row["Answer"])
    letter = re.match(r"([A-D])\s*(?:[:.)]|$)", answer.upper())
    named = [letter[1]] if letter else [key for key, text in choices.items() if text.casefold() == answer.casefold()]
    if not named or not choices[named[0]]:
        raise ValueError(f"the answer {answer!r:.80} is not one of the choices A to D")
    options = [text for text in choices.values() if text]
    return question_record("", row["Figure_path"], with_options(row["Question"], options), choices[named[0]], "closed")


def omnimedvqa(row: Row) -> dict[str, Any]:
    """A row of a file under OmniMedVQA's ``QA_information``."""
    options = [str(row[key]).strip() for key in (f"option_{letter}" for letter in _LETTERS) if row.get(key)]
    return question_record(
        row["question_id"],
        row["image_path"],
        with_options(row["question"], options),
        row["gt_answer"],
        "closed",
        kind=row.get("question_type"),
        modality=row.get("modality_type") or row.get("modality"),
        dataset=row.get("dataset"),
    )


def image_question_answer(row: Row) -> dict[str, Any]:
    """A row with ``id``, ``image``, ``question`` and ``answer``, as copies on Hugging Face have it."""
    return question_record(row["id"], row["image"], row["question"], row["answer"], row.get("answer_type"))
