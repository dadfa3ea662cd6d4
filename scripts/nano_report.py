"""Measure checkpoints on held-out phantoms through the engine, beside blind baselines.

    python scripts/nano_report.py --data DIR --train DIR --out report.json stage2=DIR stage3=DIR stage4=DIR

``--data`` is a folder of ``medplib data build phantom`` that nothing was trained on, ``--train`` one for the blind
baselines to learn from. Prints a Markdown table and writes the numbers as JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from model.data.builders.questions import blind_baseline, position_prior_dice
from model.data.image_io import read_mask
from model.errors import MedPLIBError
from model.inference.answer import Answer
from model.inference.engine import Engine, EngineSettings, Request
from model.inference.generation import GenerationSettings
from model.processing.answers import exact_match
from model.processing.masks import decode_rle

THRESHOLDS = (0.1, 0.5)
SLOTS = 16
TASKS = ("vqa", "region", "grounding")
_REGION = re.compile(r"<region>(.*?)</region>")
_MASK = re.compile(r"<mask>(.*?)</mask>")

ROWS = (
    ("mDice, threshold 0.1", "dice@0.1"),
    ("mDice, threshold 0.5", "dice@0.5"),
    ("false masks on absent targets (lower is better)", "false_masks"),
    ("present targets refused (lower is better)", "refused"),
    ("modality", "modality"),
    ("presence, yes/no", "presence"),
    ("side of a structure", "side"),
    ("relation of two structures", "relation"),
    ("region: what is it (region accuracy)", "region_name"),
    ("region: is it a …, yes/no", "region_check"),
    ("region: side", "region_side"),
    ("open: list of structures, exact match", "list"),
    ("open: what lies there, exact match", "place"),
    ("open: finding, exact match", "finding"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=DIR", help="checkpoints, one column each")
    parser.add_argument("--data", type=Path, required=True, help="held-out phantoms")
    parser.add_argument("--train", type=Path, help="phantoms that the blind baselines learn from; none without")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--images", type=int, default=400, help="how many images are asked about")
    options = parser.parse_args()
    test = read_records(options.data)
    images = list(dict.fromkeys(record["image"] for record in test))[: options.images]
    test = [record for record in test if record["image"] in set(images)]
    report: dict[str, Any] = {"images": len(images), "questions": len(test), "columns": {}}
    if options.train:
        report["columns"]["blind"] = blind_scores(read_records(options.train), test, options.train, options.data)
    for item in options.models:
        name, _, directory = item.partition("=")
        start = time.monotonic()
        engine = Engine.from_pretrained(directory, settings=EngineSettings(slots=SLOTS), dtype=torch.float32)
        scores = measure(engine, test, options.data, name)
        report["columns"][name] = {**scores, "seconds": round(time.monotonic() - start, 1)}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report))
    return 0


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All records of a phantom folder."""
    return [record for task in TASKS for record in json.loads((folder / f"{task}.json").read_text(encoding="utf-8"))]


def blind_scores(
    train: Sequence[Mapping[str, Any]], test: Sequence[Mapping[str, Any]], train_root: Path, root: Path
) -> dict[str, float]:
    """What an image-free predictor reaches; masks are average masks, always drawn."""
    scores = blind_baseline(train, test)
    few = [record for record in train if record["task"] == "grounding"][:4000]
    linked = [
        {**record, "conversations": _absolute(record["conversations"], base)}
        for base, records in ((train_root, few), (root, [r for r in test if r["task"] == "grounding"]))
        for record in records
    ]
    dice = position_prior_dice(linked[: len(few)], linked[len(few) :], Path("/"))
    return {**scores, "dice@0.1": dice, "dice@0.5": dice, "false_masks": 1.0, "refused": 0.0}


def _absolute(conversations: Sequence[Mapping[str, str]], base: Path) -> list[dict[str, str]]:
    return [{**turn, "value": turn["value"].replace("<mask>", f"<mask>{base.resolve()}/")} for turn in conversations]


def measure(engine: Engine, records: Sequence[Mapping[str, Any]], root: Path, name: str) -> dict[str, float]:
    """Scores of one model: means by kind of question, Dice, false masks, refusals, and the number of each."""
    found: dict[str, list[float]] = defaultdict(list)
    requests = (as_request(record, root) for record in records)
    answers = tqdm(engine.answer_all(requests), desc=name, total=len(records), unit="question", mininterval=5)
    for number, answer in answers:
        if isinstance(answer, MedPLIBError):
            raise answer
        for key, value in score(records[number], answer, root):
            found[key].append(value)
    counts = {f"n_{key}": len(values) for key, values in found.items()}
    return {**{key: float(np.mean(values)) for key, values in found.items()}, **counts}


def as_request(record: Mapping[str, Any], root: Path) -> Request:
    """What a record asks, with its masks at all thresholds."""
    question = record["conversations"][0]["value"].removeprefix("<image>\n")
    return Request(
        root / record["image"],
        _REGION.sub("<region></region>", question),
        regions=[root / path for path in _REGION.findall(question)],
        settings=GenerationSettings(max_new_tokens=48),
        thresholds=THRESHOLDS,
    )


def score(record: Mapping[str, Any], answer: Answer, root: Path) -> list[tuple[str, float]]:
    """(Score name, value) pairs of one answer."""
    reference = record["conversations"][1]["value"]
    if record["task"] != "grounding":
        return [(record["kind"], float(exact_match(answer.text, reference)))]
    wanted = [read_mask(root / path) for path in _MASK.findall(reference)]
    if not wanted:
        return [("false_masks", float(bool(answer.masks)))]
    scores = [("refused", float(not answer.masks))]
    for threshold in THRESHOLDS:
        predicted = [decode_rle(mask) for mask in answer.masks_at[f"{threshold:g}"]]
        for number, target in enumerate(wanted):
            found = predicted[number] if number < len(predicted) else np.zeros_like(target)
            scores.append((f"dice@{threshold:g}", dice(found, target)))
    return scores


def dice(predicted: np.ndarray, target: np.ndarray) -> float:
    """Dice of two masks, bool [H, W]; 1 where both are empty."""
    both = int(predicted.sum()) + int(target.sum())
    return 2 * int((predicted & target).sum()) / both if both else 1.0


def table(report: Mapping[str, Any]) -> str:
    """The report as a Markdown table."""
    columns = list(report["columns"])
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for title, key in ROWS:
        cells = [report["columns"][column].get(key) for column in columns]
        lines.append(f"| {title} | " + " | ".join("–" if cell is None else f"{cell:.3f}" for cell in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
