"""Blind baselines: how well questions are answered without seeing the picture.

A question that a blind predictor answers measures nothing; every score of a model stands beside its blind baseline.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from model.data.image_io import read_mask

Record = Mapping[str, Any]

_PATHS = re.compile(r"<(region|mask)>.*?</\1>", re.DOTALL)
_GRID = 64


def blind_baseline(train_records: Iterable[Record], test_records: Iterable[Record]) -> dict[str, float]:
    """Accuracy 0..1 of the best image-free predictor, for every ``kind`` of the test records.

    Four predictors learn from the training answers: the commonest answer to the same text, to the same kind of question
    about the same thing in the same set of words, to the same kind and thing, and to the kind alone; each falls back to
    the next where it has seen nothing. The best of the four **on the test records** counts, which flatters blindness.
    Multi-turn records are read turn by turn. Grounding records are left out: they are scored by their masks, for which
    ``position_prior_dice`` is the blind baseline.
    """
    keys: tuple[Callable[[Mapping[str, str]], Any], ...] = (
        lambda turn: (turn["kind"], turn["question"]),
        lambda turn: (turn["kind"], turn["about"], frozenset(re.findall(r"\w+", turn["question"])) & _WORDS),
        lambda turn: (turn["kind"], turn["about"]),
        lambda turn: turn["kind"],
    )
    seen: list[dict[Any, Counter[str]]] = [defaultdict(Counter) for _ in keys]
    for turn in _turns(train_records):
        for table, key in zip(seen, keys, strict=True):
            table[key(turn)][turn["answer"]] += 1
    right: dict[str, list[int]] = defaultdict(lambda: [0] * len(keys))
    total: Counter[str] = Counter()
    for turn in _turns(test_records):
        total[turn["kind"]] += 1
        for first in range(len(keys)):
            tables = (table.get(key(turn)) for table, key in zip(seen[first:], keys[first:], strict=True))
            guess = next((table.most_common(1)[0][0] for table in tables if table), "")
            right[turn["kind"]][first] += guess == turn["answer"]
    return {kind: max(right[kind]) / total[kind] for kind in sorted(total)}


def position_prior_dice(train_records: Iterable[Record], test_records: Iterable[Record], root: Path) -> float:
    """Mean Dice 0..1 of masks drawn blind: each structure's average training mask, thresholded at its best.

    Averages are kept for each modality and structure. Looks at grounding records with exactly one mask; ``root`` is the
    folder of the mask paths. Masks are compared on a 64 × 64 grid.
    """
    shown: dict[tuple[str, str], list[NDArray[np.bool_]]] = defaultdict(list)
    for key, mask in _single_masks(train_records, root):
        shown[key].append(mask)
    priors = {key: _best_prior(np.stack(masks)) for key, masks in shown.items()}
    scores = [_dice(priors[key], mask) if key in priors else 0.0 for key, mask in _single_masks(test_records, root)]
    return float(np.mean(scores)) if scores else 0.0


_WORDS = frozenset(("left", "right", "upper", "lower", "above", "below"))


def _turns(records: Iterable[Record]) -> Iterable[dict[str, str]]:
    """Questions without paths and answers, with ``kind`` and ``about`` as text."""
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
