"""Whether held-out questions late in a conversation are answered as well as alone, as a table.

    python scripts/bench/conversation.py --model DIR --records data/sample/held_out.json
    python scripts/bench/conversation.py --model DIR --records own/test.json --root own --turns 4 --images 50

Records of one image make a conversation, in all rotations, so that every turn has the same questions. Answers are
freely generated; remembered are the model's own. The last line compares the last turn with the questions asked alone.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from common import SAMPLE, positive, table

from model import Predictor
from model.checkpoint.directories import default_model
from model.data.dataset import LoadedSample, load_sample, usable_records
from model.data.schema import Sample, parse_record
from model.errors import MedPLIBError
from model.inference.answer import Answer
from model.processing.answers import CLOSED_TYPES, closed_correct, exact_match, options_of
from model.processing.special_tokens import IMAGE_TOKEN


def judge(answer: Answer, asked: LoadedSample) -> tuple[bool, float | None]:
    """Whether an answer is right, and the mean Dice of its masks where there is something to segment."""
    sample = asked.sample
    if asked.masks:
        if len(answer.masks) != len(asked.masks):
            return False, 0.0
        found = [mask.to_array() for mask in answer.masks]
        dice = [
            2 * float((mask & truth).sum()) / max(1, int(mask.sum() + truth.sum()))
            for mask, truth in zip(found, asked.masks, strict=True)
        ]
        return min(dice) >= 0.5, float(np.mean(dice))
    if sample.task == "grounding":
        return not answer.masks, None
    question, reference = (turn.text for turn in sample.turns)
    if sample.answer_type in CLOSED_TYPES:
        return closed_correct(answer.text, reference, options_of(question)), None
    return exact_match(answer.text, reference), None


def conversations(path: Path, root: Path, turns: int, count: int, seed: int) -> list[list[Sample]]:
    """Up to ``count`` images, each with as many different questions as there are turns.

    Raises:
        MedPLIBError: the file cannot be used, or no image has enough questions.
    """
    records, facts, _ = usable_records(path, root, "skip")
    by_image: dict[int, list[int]] = defaultdict(list)
    for number, fact in facts:
        if fact.images == 1:
            by_image[fact.picture].append(number)
    rng, found = np.random.default_rng(seed), []
    for numbers in by_image.values():
        samples = [parse_record(records[number], root) for number in rng.permutation(numbers).tolist()]
        single = {(one.turns[0].text, one.regions): one for one in samples if len(one.turns) == 2}
        if len(single) >= turns:
            found.append(list(single.values())[:turns])
    if not found:
        raise MedPLIBError(f"no image of {path} has {turns} different questions; give another file or fewer --turns")
    return [found[place] for place in rng.permutation(len(found))[:count].tolist()]


def measure(predictor: Predictor, talks: Sequence[list[Sample]]) -> dict[tuple[bool, int], list]:
    """Judgements by (remembered, turn)."""
    results = defaultdict(list)
    for talk in talks:
        loaded = [load_sample(sample) for sample in talk]
        image = predictor.set_image(talk[0].images[0])
        alone = [predictor.ask(image, _question(one), list(one.regions)) for one in loaded]
        for first in range(len(talk)):
            history: list[tuple[str, str]] = []
            marks: list[np.ndarray] = []
            for turn in range(1, len(talk) + 1):
                place = (first + turn - 1) % len(talk)
                asked = loaded[place]
                marks += asked.regions
                answer = predictor.ask(image, _question(asked), marks, history=history) if history else alone[place]
                history.append((_question(asked), answer.text))
                for remembered, given in ((True, answer), (False, alone[place])):
                    results[remembered, turn].append(judge(given, asked))
    return results


def _question(asked: LoadedSample) -> str:
    return asked.turns[0].text.replace(IMAGE_TOKEN, "").strip()


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="checkpoint; the default model when absent")
    parser.add_argument(
        "--records", type=Path, default=SAMPLE / "held_out.json", help="held-out records; the sample's when absent"
    )
    parser.add_argument("--root", type=Path, help="folder of their images; the records' own when absent")
    parser.add_argument("--turns", type=positive, default=4)
    parser.add_argument("--images", type=positive, default=30, help="conversations, each in all rotations")
    parser.add_argument("--seed", type=int, default=4242)
    options = parser.parse_args()
    try:
        root = options.root or options.records.parent
        talks = conversations(options.records, root, options.turns, options.images, options.seed)
        results = measure(Predictor.from_pretrained(options.model or default_model()), talks)
    except MedPLIBError as error:
        parser.error(str(error))
    rows, right = [], {}
    for turn in range(1, options.turns + 1):
        cells = []
        for remembered in (True, False):
            right[remembered, turn] = float(np.mean([one for one, _ in results[remembered, turn]]))
            dice = [one for _, one in results[remembered, turn] if one is not None]
            cells.append((f"{right[remembered, turn]:.3f}", f"{np.mean(dice):.3f}" if dice else "–"))
        rows.append([str(turn), str(len(results[True, turn])), *(cell[n] for n in (0, 1) for cell in cells)])
    head = ["turn", "questions", "accuracy, remembered", "accuracy, alone", "Dice, remembered", "Dice, alone"]
    late, alone = (right[remembered, options.turns] for remembered in (True, False))
    last = f"Accuracy as turn {options.turns}: {late:.3f}, alone: {alone:.3f}; difference {late - alone:+.3f}."
    sys.stdout.write("\n".join([*table(head, rows), "", last]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
