"""The table of ``reproduce_nano.py``: scores of every arm over the seeds, and what they say about the paper's claim."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

from nano_report import blind_scores, read_records

START: Mapping[str, str] = {"align": "start: stage I, no further step"}
ARMS: Mapping[str, str] = {
    "vqa_expert": "a: stage II expert",
    "grounding_expert": "b: stage III expert",
    "dense": "c: dense, mixed data",
    "mixture": "d: two experts (top-1, capacity 1.5, aux 0.01)",
    "mixture_projector": "e: d with a mixture projector",
}
ABLATIONS: Mapping[str, str] = {
    "top2": "d, top-2",
    "capacity_1.0": "d, capacity 1.0",
    "capacity_2.0": "d, capacity 2.0",
    "no_aux": "d, aux loss 0",
}
ROWS: Mapping[str, str] = {**START, **ARMS, **ABLATIONS}
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "VQA": ("modality", "presence", "side", "relation", "list", "place", "finding"),
    "region": ("region_name", "region_check", "region_side"),
    "closed": ("presence", "side", "relation", "region_check", "region_side"),
    "mDice": ("dice@0.5",),
    "false masks": ("false_masks",),
}
"""Each column is the mean of these scores of ``nano_report``."""
KEEPS = 0.02
"""A skill is called kept where the mixture is at most so much worse than the expert of that skill, on average."""

Scores = Mapping[str, float]


def write_table(claim: Path, seeds: Sequence[int], steps: int, phantoms: Path) -> str:
    """Read every arm's report, write table.md and table.json into ``claim`` and return the Markdown."""
    found = {name: [read_scores(claim / f"seed{seed}" / name / "report.json") for seed in seeds] for name in ROWS}
    test, train = phantoms / "test", phantoms / "train"
    images = json.loads((claim / f"seed{seeds[0]}" / "mixture" / "report.json").read_text())["images"]
    records = read_records(test)
    first = {*list(dict.fromkeys(record["image"] for record in records))[:images]}
    asked = [record for record in records if record["image"] in first]
    blind = columns_of(blind_scores(read_records(train), asked, train, test))
    text = markdown(found, blind, steps) + "\n" + "\n".join(f"- {line}" for line in verdict(found)) + "\n"
    (claim / "table.md").write_text(text, encoding="utf-8")
    plain = {"steps": steps, "seeds": list(seeds), "images": images, "blind": blind, "arms": found}
    (claim / "table.json").write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    return text


def read_scores(path: Path) -> dict[str, float]:
    """The columns of one checkpoint's report."""
    (scores,) = [column for name, column in json.loads(path.read_text("utf-8"))["columns"].items() if name != "blind"]
    return columns_of(scores)


def columns_of(scores: Scores) -> dict[str, float]:
    """Scores of ``nano_report`` as this table's columns."""
    return {column: fmean(scores[kind] for kind in kinds) for column, kinds in COLUMNS.items()}


def markdown(found: Mapping[str, Sequence[Scores]], blind: Scores, steps: int) -> str:
    """Means over seeds with their standard deviations, one arm a row."""
    lines = [f"| arm ({3 * steps} steps each) | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines.append(f"| blind | {' | '.join(f'{blind[column]:.3f}' for column in COLUMNS)} |")
    for name, title in ROWS.items():
        cells = [spread([scores[column] for scores in found[name]]) for column in COLUMNS]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float]) -> str:
    """Mean and, of several values, their standard deviation."""
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def verdict(found: Mapping[str, Sequence[Scores]]) -> list[str]:
    """What the seeds say, paired by seed: does the mixture keep both skills, and does it beat one dense network?"""
    kept = {
        column: _difference(found["mixture"], found[expert], column)
        for expert, columns in (("vqa_expert", ("VQA", "region", "closed")), ("grounding_expert", ("mDice",)))
        for column in columns
    }
    lost = [column for column, values in kept.items() if fmean(values) < -KEEPS]
    told = ", ".join(f"{column} {_signed(values)}" for column, values in kept.items())
    answer = f"no: it loses more than {KEEPS:.2f} in {', '.join(lost)}" if lost else "yes"
    lines = [f"Does the mixture keep both skills? {answer} (d minus the expert of each skill: {told})."]
    for other, name in (("dense", "one dense network on mixed data"), ("mixture_projector", "a mixture projector too")):
        columns = ("VQA", "region", "mDice", "false masks")
        told = ", ".join(
            f"{column} {_signed(_difference(found['mixture'], found[other], column))}" for column in columns
        )
        lines.append(f"d minus {ARMS[other][0]} ({name}): {told}.")
    return lines


def _difference(one: Sequence[Scores], other: Sequence[Scores], column: str) -> list[float]:
    return [a[column] - b[column] for a, b in zip(one, other, strict=True)]


def _signed(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{fmean(values):+.3f}" + (f" ({low:+.3f} to {high:+.3f})" if len(values) > 1 else "")
