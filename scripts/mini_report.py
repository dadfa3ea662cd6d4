"""MedPLIB-mini's table: every real set and modality beside a U-Net and a centre blob, false masks, questions.

    medplib eval MODEL runs/mini/mix --split test --out runs/mini/eval/seed0
    python scripts/mini_report.py --mini runs/mini --out report.json runs/mini/eval/seed0 runs/mini/eval/seed1 …

The first run is the shipped model's; further ones are other seeds of its last stage and give the spread. ``unet.json``
of scripts/bench/unet.py is read from ``--mini`` where it is there. Prints Markdown and writes the numbers as JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from model.eval.baselines import mask_baselines
from model.eval.metrics.scores import Scores, score_predictions
from model.eval.predictions import Prediction, encode_row, json_text, read_predictions
from model.processing.masks import decode_rle

THRESHOLD = 0.5
_SET = re.compile(r"sources/([^/]+)/")
_ABSENT = {
    "picture": "(a) absent from this picture",
    "target": "(b) another of the modality",
    "modality": "(c) foreign",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of medplib eval, the shipped model's first")
    parser.add_argument("--mini", type=Path, required=True, help="folder of scripts/train_mini.sh")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the numbers")
    options = parser.parse_args()
    found = {run: sorted(run.glob("predictions/*.jsonl")) for run in options.runs}
    if wrong := [str(run) for run, files in found.items() if len(files) != 1]:
        parser.error(f"{', '.join(wrong)}: expected a folder of medplib eval with one data set's predictions")
    answers = [file for files in found.values() for file in files]
    unet = options.mini / "unet" / "unet.json"
    report = {
        "runs": [str(run) for run in options.runs],
        "groups": groups_table(answers, options.mini, json.loads(unet.read_text()) if unet.exists() else {}),
        "targets": {name: spread([_dice(rows) for rows in runs]) for name, runs in _aligned(answers, _target).items()},
        "questions": questions_table(answers),
    }
    options.out.write_text(json_text(report), encoding="utf-8")
    sys.stdout.write(markdown(report))
    return 0


def groups_table(answers: Sequence[Path], mini: Path, unet: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """mDice of every set and modality: of each run, of the U-Net trained on the set alone, of a blob in the middle."""
    found = {}
    for group, runs in _aligned(answers, _group).items():
        first = runs[0].overall[f"mDice@{THRESHOLD:g}"]
        masks = _targets_of(answers[0], group)
        entry = {
            **spread([_dice(scores) for scores in runs]),
            "interval": [first.low, first.high],
            "masks": first.count,
        }
        entry["blob"] = centre_blob(answers[0], group, mini)
        if group in unet:  # a target that the training split lacks counts 0
            means = unet[group]["test"]
            entry["unet"] = sum(means.get(name, 0) * count for name, count in masks.items()) / masks.total()
        found[group] = entry
    return found


def centre_blob(answers: Path, group: str, mini: Path) -> float:
    """Mean Dice of an ellipse in the middle with the target's mean area in the set's training split."""
    folder = mini / "data" / group.split("/")[0]
    with tempfile.TemporaryDirectory() as scratch:
        part = Path(scratch) / "answers.jsonl"
        part.write_bytes(
            b"".join(encode_row(row.to_row()) for row in read_predictions(answers) if _group(row) == group)
        )
        blob = mask_baselines(part, [folder / "train" / "grounding.json"], folder)[0]
    return blob.dice["", ""]


def questions_table(answers: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """False masks by why the target is absent, refusals of present targets, accuracy by kind of question."""
    scores = [score_predictions(read_predictions(path), thresholds=(THRESHOLD,), samples=0) for path in answers]
    found = {"present targets refused": spread([run.overall["refused_rate"].value for run in scores])}
    found["present targets without a mask, or with an empty one"] = spread([_unmasked(path) for path in answers])
    for kind, title in _ABSENT.items():
        rates = [run.by("absent_kind")[kind][f"false_mask_rate@{THRESHOLD:g}"].value for run in scores]
        found[f"false masks {title}"] = spread(rates)
    for kind in scores[0].by("kind"):
        measures = [run.by("kind")[kind] for run in scores]
        for metric in ("closed_accuracy", "open_exact_match"):
            if metric in measures[0]:
                found[f"{kind}, {metric}"] = spread([run[metric].value for run in measures])
    return found


def _unmasked(answers: Path) -> float:
    present = [row for row in read_predictions(answers) if row.gt_masks]
    return float(np.mean([not any(mask["area_px"] for mask in row.masks) for row in present]))


def spread(values: Sequence[float]) -> dict[str, Any]:
    """The shipped model's value, the mean over all runs, and every run's."""
    return {"shipped": values[0], "mean": float(np.mean(values)), "all": list(values)}


def markdown(report: dict[str, Any]) -> str:
    """The tables for a model card."""
    lines = [
        "| set / modality | masks | mDice | 95 % interval | mean of the seeds | U-Net | centre blob |",
        "|---|" + "--:|" * 6,
    ]
    groups = report["groups"]
    for name, entry in [*sorted(groups.items()), ("**mean over groups**", _mean_entry(groups.values()))]:
        low, high = entry["interval"]
        unet = f"{entry['unet']:.3f}" if "unet" in entry else "–"
        cells = f"{entry['masks']} | {entry['shipped']:.3f} | {low:.3f}–{high:.3f} | {entry['mean']:.3f}"
        lines.append(f"| {name} | {cells} | {unet} | {entry['blob']:.3f} |")
    for title, part in (("target", report["targets"]), ("question", report["questions"])):
        lines += ["", f"| {title} | shipped | mean of the seeds |", "|---|--:|--:|"]
        lines += [f"| {name} | {entry['shipped']:.3f} | {entry['mean']:.3f} |" for name, entry in sorted(part.items())]
    return "\n".join(lines) + "\n"


def _mean_entry(groups: Iterable[dict[str, Any]]) -> dict[str, Any]:
    entries = list(groups)
    means = {key: float(np.mean([entry[key] for entry in entries])) for key in ("shipped", "mean", "blob")}
    if all("unet" in entry for entry in entries):
        means["unet"] = float(np.mean([entry["unet"] for entry in entries]))
    return {**means, "interval": [float("nan")] * 2, "masks": sum(entry["masks"] for entry in entries)}


def _aligned(answers: Sequence[Path], key: Any) -> dict[str, list[Scores]]:
    """Scores of every run's requests for present targets, by what ``key`` says of a row."""
    found: dict[str, list[Scores]] = defaultdict(list)
    for path in answers:
        rows: dict[str, list[Prediction]] = defaultdict(list)
        for row in read_predictions(path):
            if row.gt_masks:
                rows[key(row)].append(row)
        for name, part in sorted(rows.items()):
            found[name].append(score_predictions(part, thresholds=(THRESHOLD,)))
    return dict(found)


def _group(row: Prediction) -> str:
    found = _SET.search(row.image_path)
    return f"{found[1] if found else row.metadata.get('dataset')}/{row.metadata.get('modality')}"


def _target(row: Prediction) -> str:
    return f"{row.metadata.get('structure')}, {row.metadata.get('modality')}"


def _dice(scores: Scores) -> float:
    return float(scores.overall[f"mDice@{THRESHOLD:g}"].value)


def _targets_of(answers: Path, group: str) -> Counter[str]:
    """Number of reference masks of each target."""
    found: Counter[str] = Counter()
    for row in read_predictions(answers):
        if _group(row) == group:
            found[str(row.metadata.get("structure"))] += sum(bool(decode_rle(rle).any()) for rle in row.gt_masks or ())
    return found


if __name__ == "__main__":
    sys.exit(main())
