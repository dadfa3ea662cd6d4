"""Time and memory of the metric code on many synthetic predictions.

    python scripts/bench/metrics.py [--rows 100000] [--surface-rows 2000]

Writes a predictions file with as many rows, half of them questions of words and half grounding with 256×256 masks,
reads it back as a stream through the published and the standard scores with all their tables and intervals, and prints
wall-clock and processor seconds and the peak memory so far. Making the file is not counted. A second, smaller run adds
HD95 and NSD.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from model.eval.metrics import PublishedText, compare, score_predictions
from model.eval.predictions import read_predictions
from model.processing.masks import bounding_box, encode_rle

MODALITIES = ("ct", "mr", "x_ray", "pet", "fundus", "dermoscopy", "endoscopy", "ultrasound")
STRUCTURES = tuple(f"structure {number}" for number in range(31))
WORDS = ("the", "left", "right", "lung", "liver", "kidney", "shows", "a", "small", "large", "lesion", "effusion", "no")
SIZE = 256
SHAPES = 400  # different masks that rows are made of


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--surface-rows", type=int, default=2_000, help="rows of the run with HD95 and NSD")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    shapes = [random_mask(rng) for _ in range(SHAPES)]
    print(f"{'part':<44} {'seconds':>8} {'CPU s':>8} {'rows/s':>8} {'peak GB':>8}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "predictions.jsonl"
        with timed("making the file (not part of the claim)", options.rows), path.open("w", encoding="utf-8") as stream:
            for number in range(options.rows):
                stream.write(json.dumps(random_row(number, shapes, rng)) + "\n")
        with timed(f"reading it alone ({path.stat().st_size / 1e6:.0f} MB)", options.rows):
            for _ in read_predictions(path):
                pass
        with timed("all of the next two", options.rows):
            with timed("reading, published and standard scores", options.rows):
                published = PublishedText()
                scores = score_predictions(published.watch(read_predictions(path)))
                published.table()
            with timed("all tables, 1000 resamplings each", options.rows):
                scores.to_dict()
        with timed("paired comparison of two such runs", options.rows):
            compare(scores, scores).to_dict()
        with timed("standard scores with HD95 and NSD", options.surface_rows):
            score_predictions(islice(read_predictions(path), options.surface_rows), surface=True)
    return 0


@contextmanager
def timed(what: str, rows: int) -> Iterator[None]:
    """Print one line of the table about what is done inside."""
    wall, processor = time.perf_counter(), time.process_time()
    yield
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"{what:<44} {wall:>8.1f} {processor:>8.1f} {rows / wall:>8.0f} {peak:>8.2f}", flush=True)


def random_mask(rng: np.random.Generator) -> dict[str, Any]:
    """A wavy blob as ``Mask.to_dict`` writes it."""
    rows, columns = np.mgrid[:SIZE, :SIZE]
    y, x = rng.uniform(60, SIZE - 60, 2)
    angle = np.arctan2(rows - y, columns - x)
    radius = rng.uniform(10, 60) * (1 + 0.2 * np.sin(rng.integers(2, 9) * angle + rng.uniform(0, 6)))
    mask = np.hypot(rows - y, columns - x) < radius
    return {
        "label": "",
        "rle": encode_rle(mask),
        "score": float(rng.uniform()),
        "bbox": bounding_box(mask),
        "area_px": int(mask.sum()),
    }


def random_row(number: int, shapes: list[dict[str, Any]], rng: np.random.Generator) -> dict[str, Any]:
    """A row of words (half of them), or one of grounding: one or two targets, or none in a quarter of these."""
    image = number // 6
    modality = MODALITIES[image % len(MODALITIES)]
    metadata = {"modality": modality, "structure": str(rng.choice(STRUCTURES)), "dataset": "synthetic"}
    row = {"question_id": number, "image_path": f"images/{modality}_00--S--{image}--0000.png", "prompt": "What is it?"}
    if number % 2 == 0:
        closed = number % 4 == 0
        answers = [str(rng.choice(("Yes", "No"))) if closed else _sentence(rng) for _ in range(2)]
        metadata |= {"task": "vqa", "kind": "presence" if closed else "list"}
        return {
            **row,
            "gt": answers[0],
            "text": answers[1],
            "answer_type": ("open", "closed")[closed],
            "metadata": metadata,
        }
    wanted = int(rng.choice((0, 1, 1, 2)))
    painted = wanted if rng.uniform() < 0.95 else 1
    chosen = rng.integers(0, len(shapes), wanted + painted)
    masks = [shapes[index] for index in chosen]
    return {
        **row,
        "gt": "It is <SEG>." if wanted else "It is not there.",
        "text": "It is " + " and ".join(["<SEG>"] * painted),
        "answer_type": "open",
        "metadata": {**metadata, "task": "grounding", "kind": "grounding" if wanted else "absent"},
        "masks": masks[wanted:],
        "gt_masks": [mask["rle"] for mask in masks[:wanted]],
        "spacing_mm": [0.7, 0.5] if number % 3 else None,
    }


def _sentence(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS, int(rng.integers(1, 20))))


if __name__ == "__main__":
    sys.exit(main())
