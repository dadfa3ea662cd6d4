"""Measure checkpoints on held-out phantoms through the real generation path, beside blind baselines.

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

from model.checkpoint import load
from model.data.builders.blind import blind_baseline, position_prior_dice
from model.data.readers import read_image, read_mask
from model.inference.generation import GenerationSettings, generate
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.conversation import Turn
from model.processing.processor import MedPLIBProcessor

THRESHOLDS = (0.1, 0.5)
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
    parser.add_argument("--train", type=Path, required=True, help="phantoms that the blind baselines learn from")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--images", type=int, default=400, help="how many images are asked about")
    options = parser.parse_args()
    test = read_records(options.data)
    images = list(dict.fromkeys(record["image"] for record in test))[: options.images]
    test = [record for record in test if record["image"] in set(images)]
    report: dict[str, Any] = {"images": len(images), "questions": len(test), "columns": {}}
    report["columns"]["blind"] = blind_scores(read_records(options.train), test, options.train, options.data)
    for item in options.models:
        name, _, directory = item.partition("=")
        start = time.monotonic()
        model, processor = load(Path(directory), dtype=torch.float32)
        scores = measure(model.eval(), processor, test, options.data, name)
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
    """What an image-free predictor reaches; masks are average masks, always painted."""
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


@torch.inference_mode()
def measure(
    model: MedPLIBForCausalLM,
    processor: MedPLIBProcessor,
    records: Sequence[Mapping[str, Any]],
    root: Path,
    name: str,
) -> dict[str, float]:
    """Scores of one model: means by kind of question, Dice, false masks, refusals, and the number of each."""
    found: dict[str, list[float]] = defaultdict(list)
    by_image: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        by_image[record["image"]].append(record)
    for image, asked in tqdm(by_image.items(), desc=name, unit="image", mininterval=5):
        pixels = read_image(root / image).pixels
        for key, value in ask_image(model, processor, pixels, asked, root):
            found[key].append(value)
    counts = {f"n_{key}": len(values) for key, values in found.items()}
    return {**{key: float(np.mean(values)) for key, values in found.items()}, **counts}


def ask_image(
    model: MedPLIBForCausalLM,
    processor: MedPLIBProcessor,
    pixels: np.ndarray,
    records: Sequence[Mapping[str, Any]],
    root: Path,
) -> list[tuple[str, float]]:
    """Ask all questions about one image at once; gives (score name, value) pairs."""
    clip, sam, sam_size = processor.image_inputs(pixels)
    features = model.encode_images(clip[None])
    encoded = []
    for record in records:
        question = record["conversations"][0]["value"]
        regions = [read_mask(root / path) for path in _REGION.findall(question)]
        text = _REGION.sub("<region></region>", question)
        encoded.append(processor.encode_prompt([Turn("human", text)], [pixels], regions=regions))
    batch = processor.collate(encoded, padding_side="left")
    names = ("input_ids", "attention_mask", "region_masks", "region_image")
    prompt = {key: batch[key] for key in names if batch.get(key) is not None}
    rows = generate(
        model,
        {**prompt, "image_features": features.expand(len(records), -1, -1)},
        GenerationSettings(max_new_tokens=48),
    )
    embedding = model.encode_segmented_images(sam[None])
    scores: list[tuple[str, float]] = []
    for record, row in zip(records, rows, strict=True):
        wanted = [read_mask(root / path) for path in _MASK.findall(record["conversations"][1]["value"])]
        if record["task"] != "grounding":
            answer = processor.decode_text(row.token_ids)
            scores.append((record["kind"], float(plain(answer) == plain(record["conversations"][1]["value"]))))
        elif not wanted:
            scores.append(("false_masks", float(bool(row.seg_states))))
        else:
            scores.append(("refused", float(not row.seg_states)))
            scores += _dices(model, embedding, row.seg_states, wanted, sam_size, pixels.shape[:2])
    return scores


def _dices(
    model: MedPLIBForCausalLM,
    embedding: torch.Tensor,
    states: Sequence[torch.Tensor],
    wanted: Sequence[np.ndarray],
    sam_size: tuple[int, int],
    size: tuple[int, ...],
) -> list[tuple[str, float]]:
    """Dice of every wanted mask with the painted one of the same number; 0 where none was painted."""
    logits: list[torch.Tensor] = []
    if states:
        index = torch.zeros(len(states), dtype=torch.long)
        sizes = [(int(size[0]), int(size[1]))] * len(states)
        logits = model.decode_masks(
            torch.stack(list(states)), embedding, index, [sam_size] * len(states), sizes
        ).mask_logits
    scores = []
    for threshold in THRESHOLDS:
        for number, target in enumerate(wanted):
            painted = logits[number].sigmoid().numpy() > threshold if number < len(logits) else np.zeros_like(target)
            both = int(painted.sum()) + int(target.sum())
            scores.append((f"dice@{threshold}", 2 * int((painted & target).sum()) / both if both else 1.0))
    return scores


def plain(text: str) -> str:
    """A text without case, punctuation and repeated spaces."""
    return " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())


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
