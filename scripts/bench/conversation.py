"""Four-turn conversations on fresh phantoms, with earlier turns remembered and each question alone, as a table.

Each picture has four questions (image, structures, region, segmentation) in all four rotations, so that every turn has
the same ones. Answers are freely generated; remembered are the model's own.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from tables import positive, table

from model import Predictor
from model.cli import default_model
from model.data.builders.phantom import PhantomStream
from model.data.builders.phantom_questions import Question
from model.data.builders.phantom_scenes import Scene
from model.inference.answer import Answer
from model.processing.answers import closed_match, exact_match

KINDS = (
    ("modality", "presence"),
    ("side", "relation", "list"),
    ("region_name", "region_check", "region_side"),
    ("grounding", "grounding_absent"),
)


def judge(answer: Answer, question: Question, scene: Scene) -> tuple[bool, float | None]:
    """Whether an answer is right, and the Dice of its mask where there is something to segment."""
    if question.task != "grounding":
        match = closed_match if question.answer_type == "closed" else exact_match
        return match(answer.text, question.answer), None
    if not question.targets:
        return not answer.masks, None
    if len(answer.masks) != 1:
        return False, 0.0
    mask, truth = answer.masks[0].to_array(), scene.structure(question.targets[0]).mask
    dice = 2 * float((mask & truth).sum()) / max(1, int(mask.sum() + truth.sum()))
    return dice >= 0.5, dice


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="checkpoint; the nano when absent")
    parser.add_argument("--images", type=positive, default=30)
    parser.add_argument("--seed", type=int, default=4242)
    options = parser.parse_args()
    predictor = Predictor.from_pretrained(options.model or default_model())
    stream, rng = PhantomStream(options.seed), np.random.default_rng(options.seed)
    results = defaultdict(list)  # by (remembered, turn)
    index = asked = 0
    while asked < options.images:
        scene, questions = stream.item(index)
        index += 1
        groups = [[one for one in questions if one.kind in kinds] for kinds in KINDS]
        if not all(groups):
            continue
        asked += 1
        chosen = [group[int(rng.integers(len(group)))] for group in groups]
        image = predictor.set_image(scene.image)
        for first in range(len(chosen)):
            history: list[tuple[str, str]] = []
            marks: list[np.ndarray] = []
            for turn, question in enumerate(chosen[first:] + chosen[:first], start=1):
                marked = [scene.structure(name).mask for name in question.regions]
                alone = predictor.ask(image, question.question, marked)
                marks += marked
                answer = predictor.ask(image, question.question, marks, history=history) if history else alone
                history.append((question.question, answer.text))
                for remembered, given in ((True, answer), (False, alone)):
                    results[remembered, turn].append(judge(given, question, scene))
    rows = []
    for turn in range(1, len(KINDS) + 1):
        right = [np.mean([one for one, _ in results[kind, turn]]) for kind in (True, False)]
        dice = [np.mean([one for _, one in results[kind, turn] if one is not None]) for kind in (True, False)]
        rows.append([str(turn), str(len(results[True, turn])), *(f"{value:.3f}" for value in (*right, *dice))])
    head = ["turn", "questions", "accuracy, remembered", "accuracy, alone", "Dice, remembered", "Dice, alone"]
    sys.stdout.write("\n".join(table(head, rows)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
