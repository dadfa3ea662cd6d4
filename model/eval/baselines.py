"""Baselines without the image: commonest answers, a centre blob, the mean position of a target."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from model.data.builders.questions import blind_baseline, position_prior_dice
from model.data.image_io import read_mask
from model.data.records import open_records
from model.data.schema import canonical
from model.errors import MedPLIBError
from model.eval.metrics.rows import mark
from model.eval.metrics.scores import Scores
from model.eval.predictions import Prediction, read_predictions
from model.eval.questions import questions_of
from model.eval.suite import DataSet
from model.processing.masks import decode_rle

BlindScores = Mapping[tuple[str, str, str], float]
"""What image-free answers reach, by (dimension, group, metric); dimension and group are empty for the whole set."""

logger = logging.getLogger(__name__)

MOST_MASKS = 400
"""Training masks of one target that baselines learn from, evenly drawn."""
_GRID = 96
_MASK = re.compile(r"<mask>(.*?)</mask>")

Target = tuple[str, str]
"""Modality and structure."""
Found = dict[tuple[str, str], list[float]]
"""Dice of masks by dimension and group."""


@dataclass
class MaskBaseline:
    """Masks that are drawn without looking."""

    name: str  # what it is called
    how: str  # how it was computed, in a sentence
    # mean Dice over the reference masks, by (dimension, group); both empty over all of them.
    dice: Mapping[tuple[str, str], float] = field(default_factory=dict)


def blind_scores(item: DataSet, records: Iterable[Mapping[str, Any]], images: Path, scores: Scores) -> BlindScores:
    """What answers reach that are learned from ``item.blind`` and never see an image; empty where it names no file.

    Accuracies by kind of question (``blind_baseline``) are averaged over the closed questions; masks drawn from each
    structure's average place (``position_prior_dice``) stand beside the mean Dice. A detailed set without training
    records takes the commonest answer of each kind among its own.
    """
    if not item.blind and not item.detailed:
        return {}
    try:
        asked = [_with_kind(record) for record in records]
        if item.blind:
            root = item.images if item.detailed else None
            train = [_placed(_with_kind(r), root or path.parent) for path in item.blind for r in open_records(path)]
            guessed = blind_baseline(train, asked)
        else:
            train, guessed = [], _commonest(asked)
        answered = [record for record in asked if record.get("task") != "grounding" and record["kind"] in guessed]
        values: dict[tuple[str, str, str], list[float]] = defaultdict(list)
        for record in answered:
            metric = "closed_accuracy" if record.get("answer_type") == "closed" else "open_exact_match"
            for by, group in (("kind", record["kind"]), ("", ""), ("task", str(record.get("task", "vqa")))):
                values[by, group, metric].append(guessed[record["kind"]])
        blind = {key: float(np.mean(found)) for key, found in values.items()}
        if not item.detailed and any(record.get("task") == "grounding" for record in asked):
            prior = position_prior_dice(train, [r for r in asked if r.get("task") == "grounding"], images)
            blind |= {("", "", f"mDice{mark(t)}"): prior for t in scores.settings.thresholds}
    except (KeyError, TypeError, ValueError, OSError) as error:
        if item.detailed:  # a user's own data: scores without a floor are better than none
            logger.warning("%s: there is no blind floor, a record cannot be read: %s", item.title, error)
            return {}
        raise MedPLIBError(
            f"the blind baselines of {item.title} cannot be computed from {item.blind[0]} ({error}); leave blind out"
        ) from error
    return blind


def _with_kind(record: Mapping[str, Any]) -> Mapping[str, Any]:
    record = canonical(record)
    return record if record.get("kind") else {**record, "kind": str(record.get("answer_type") or "open")}


def _placed(record: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """A record whose mask paths start from nowhere: those of the questions start from another folder."""
    turns = [
        {**turn, "value": _MASK.sub(lambda found: f"<mask>{folder / found[1]}</mask>", str(turn["value"]))}
        for turn in record["conversations"]
    ]
    return {**record, "conversations": turns}


def _commonest(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Share of the commonest answer among those to each kind of question."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        if record.get("task") != "grounding":
            seen[record["kind"]].update(str(turn["value"]).strip() for turn in record["conversations"][1::2])
    return {kind: max(answers.values()) / answers.total() for kind, answers in seen.items() if answers}


# --- masks ----------------------------------------------------------------------------------------------------------


def mask_baselines(answers: Path, train: Sequence[Path], images: Path) -> list[MaskBaseline]:
    """Centre blob and, where there are training records, position prior, both for each modality and structure.

    Args:
        answers: predictions whose reference masks are compared.
        train: record files with the masks that are learned from, their paths starting from ``images``; empty: areas
            are those of the other patients.
    """
    learned = _train_masks(train, images)
    shown: dict[Target, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))  # areas by patient
    for row, target, mask in _references(answers) if not train else ():
        shown[target][_patient(row)].append(float(mask.mean()))
    priors = {target: _best_prior(masks) for target, masks in learned.items()}
    blobs: Found = defaultdict(list)
    placed: Found = defaultdict(list)
    for row, target, mask in _references(answers):
        areas = [area for patient, own in shown[target].items() if patient != _patient(row) for area in own]
        area = float(learned[target].mean()) if target in learned else float(np.mean(areas)) if areas else math.nan
        by = (("", ""), ("modality", target[0]), ("structure", target[1]))
        for group in by if not math.isnan(area) else ():
            blobs[group].append(_dice(_ellipse(mask.shape, area), mask))
        mean, least = priors.get(target, (np.zeros((1, 1), np.float32), 1.0))
        for group in by if train else ():
            placed[group].append(_dice(cv2.resize(mean, mask.shape[::-1]) >= least, mask))
    of = "of the training masks" if train else "of the other patients' masks in these data"
    blob = f"an ellipse of the mean area {of}, in the middle of the image"
    most = f"at most {MOST_MASKS} a target; a target without any counts 0"
    prior = f"the mean training mask of the target on {_GRID} × {_GRID} points, cut where its Dice is best ({most})"
    return [
        MaskBaseline(name, how, {group: float(np.mean(dice)) for group, dice in found.items()})
        for name, how, found in (("Centre blob", blob, blobs), ("Position prior", prior, placed))
        if found
    ]


def _references(answers: Path) -> Iterator[tuple[Prediction, Target, NDArray[np.bool_]]]:
    """Every reference mask with pixels."""
    for row in read_predictions(answers):
        for rle in row.gt_masks or ():
            if (mask := decode_rle(rle)).any():
                yield row, _target(row.metadata), mask


def _target(metadata: Mapping[str, Any]) -> Target:
    return str(metadata.get("modality", "")), str(metadata.get("structure", ""))


def _patient(row: Prediction) -> str:
    return str(row.metadata.get("patient") or row.image_path)


def _train_masks(files: Sequence[Path], images: Path) -> dict[Target, NDArray[np.float32]]:
    """Training masks [N, GRID, GRID] of each target, values in [0, 1]; files that cannot be read are passed over."""
    listed: dict[Target, list[Path]] = defaultdict(list)
    for file in files:
        for number, record in enumerate(open_records(file)):
            for question in questions_of(record, number, images):
                listed[_target(question.metadata)].extend(question.masks or ())
    found: dict[Target, NDArray[np.float32]] = {}
    for target, paths in listed.items():
        masks = []
        for path in paths[:: math.ceil(len(paths) / MOST_MASKS)] if paths else ():
            with suppress(MedPLIBError):
                share = read_mask(path).astype(np.float32)
                masks.append(cv2.resize(share, (_GRID, _GRID), interpolation=cv2.INTER_AREA))
        if masks:
            found[target] = np.stack(masks).astype(np.float32)
    return found


def _best_prior(masks: NDArray[np.float32]) -> tuple[NDArray[np.float32], float]:
    """Mean mask [GRID, GRID], and the value that it is best cut at."""
    mean, shown = masks.mean(axis=0), masks.reshape(len(masks), -1) > 0.5
    sizes = shown.sum(axis=1)

    def quality(least: float) -> float:
        prior = mean.ravel() >= least
        return float(np.mean(2 * (shown & prior).sum(axis=1) / np.maximum(1, sizes + prior.sum())))

    return mean, max((share * float(mean.max()) for share in np.linspace(0.05, 0.95, 19)), key=quality)


def _ellipse(shape: tuple[int, ...], share: float) -> NDArray[np.bool_]:
    """An ellipse in the middle of an image, with its proportions and this share of its area."""
    height, width = shape
    rows, columns = np.ogrid[:height, :width]
    radius = math.sqrt(share / math.pi)
    down, across = (rows + 0.5) / height - 0.5, (columns + 0.5) / width - 0.5
    return np.asarray(down**2 + across**2 <= radius**2)


def _dice(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    return 2 * int((first & second).sum()) / max(1, int(first.sum()) + int(second.sum()))
