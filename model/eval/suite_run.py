"""Run a suite: predict every set, score it, write the report; a stopped run is resumed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from model.checkpoint.directories import checkpoint_name
from model.checkpoint.pretrained import open_checkpoint
from model.eval.inference import open_engine
from model.eval.metrics.scores import Measure, aligned, number, span
from model.eval.options import InferenceOptions
from model.eval.pages import count
from model.eval.report import ROWS_FILE, version, write_csv, write_report
from model.eval.results import ROW_COLUMNS, Cell, SuiteResult, detail_tables, measure, metric_title
from model.eval.run import Opener, Outcome, run_inference
from model.eval.shards import Rank, read_journal
from model.eval.suite import CURVE, DataSet, Suite, write_questions
from model.inference.engine import Engine

PREDICTIONS, QUESTIONS = "predictions", "questions"
"""Folders of a suite's run: answers and what was asked, a file for each set."""


@dataclass(frozen=True)
class SuiteOptions:
    """One run of a suite."""

    model: Path  # checkpoint directory
    suite: Suite  # what is asked
    named: str  # how the user named the suite
    out: Path  # folder of the run
    device: str = "auto"  # ``auto``, ``cpu``, ``cuda`` or ``cuda:1``
    precision: str | None = None  # ``fp32`` or ``bf16``; as stored where None, but fp32 on a CPU
    # CLIP directory, for published checkpoints whose configuration lacks CLIP's sizes.
    vision_tower: Path | None = None
    sam: Path | None = None  # SAM-Med2D file, for published checkpoints that hold no SAM weights
    batch_size: int = 8  # questions decoded together
    limit: int | None = None  # ask only so many records of each set, from the first on
    overwrite: bool = False  # start anew where there are answers already
    command: str = ""  # that repeats the run, for the report; empty: not known


@dataclass(frozen=True)
class SuiteOutcome:
    """What a suite's run came to."""

    files: tuple[Path, ...] = ()  # report and tables; empty for a process that is not the first
    result: SuiteResult | None = None  # what the report shows; None likewise
    errors: int = 0  # questions that could not be asked
    first_error: str | None = None  # the sentence of the first one; None where there is none


def run_suite(options: SuiteOptions, rank: Rank | None = None, opener: Opener = open_engine) -> SuiteOutcome:
    """Ask, score and report; under a launcher every process asks its share and the first one reports.

    Args:
        options: what is asked of which model.
        rank: of this process; what the environment says where None.
        opener: loads an engine; sets with the same prompt share one.

    Raises:
        MedPLIBError: data is missing (found before anything is loaded), or the options do not fit the checkpoint or
            the answers that are there.
    """
    rank = rank or Rank.from_environment()
    for item in options.suite.sets:
        item.files()
    opened = open_checkpoint(options.model, vision_tower=options.vision_tower, sam=options.sam)
    kept: dict[str | None, Engine] = {}

    def shared(inference: InferenceOptions, device: torch.device) -> Engine:
        if inference.template not in kept:
            kept.clear()  # its memory is given back before the next one is loaded
            kept[inference.template] = opener(inference, device)
        return kept[inference.template]

    asked = []
    for item in options.suite.sets:
        questions, images = write_questions(item, options.out / QUESTIONS)
        inference = InferenceOptions(
            model=options.model,
            data=questions,
            images=images,
            answers=options.out / PREDICTIONS / f"{item.name}.jsonl",
            vision_tower=options.vision_tower,
            sam=options.sam,
            template="v1" if item.prompt == "published" else None,
            max_new_tokens=item.max_new_tokens,
            thresholds=tuple(dict.fromkeys((*item.thresholds, *(CURVE if item.detailed else ())))),
            always_mask=item.always_mask,
            router=opened.config.moe.enabled,
            precision=options.precision,
            device=options.device,
            batch_size=options.batch_size,
            limit=options.limit,
            overwrite=options.overwrite,
        )
        asked.append((item, inference, run_inference(inference, rank, shared)))
    if rank.rank:
        return SuiteOutcome()
    results, lines = [], []
    for item, inference, outcome in asked:
        part, rows = measure(item, outcome.answers, inference.data, inference.images, limit=options.limit)
        results.append(replace(part, seconds=outcome.seconds))
        lines.append(rows)
    suite, facts = options.suite, _facts(options, asked)
    result = SuiteResult(suite.title, suite.about, checkpoint_name(options.model), facts, results, options.command)
    files = write_report(result, options.out)
    files.append(write_csv(options.out / ROWS_FILE, list(ROW_COLUMNS), (line for rows in lines for line in rows)))
    failed = [outcome for _, _, outcome in asked if outcome.errors]
    errors = sum(outcome.errors for outcome in failed)
    return SuiteOutcome(tuple(files), result, errors, failed[0].first_error if failed else None)


def _facts(options: SuiteOptions, asked: list[tuple[DataSet, InferenceOptions, Outcome]]) -> dict[str, str]:
    """Facts for the header of the report."""
    journal = read_journal(asked[0][2].answers)
    settings, about = (dict(journal.settings), dict(journal.about)) if journal else ({}, {})
    longest = sorted({item.max_new_tokens for item, _, _ in asked})
    facts = {
        "Model": str(options.model),
        "Digest of the model": str(dict(settings.get("model", {})).get("digest", ""))[:12],
        "Suite": options.named,
        "Date": f"{datetime.now(UTC):%d %B %Y, %H:%M} UTC".lstrip("0"),
        "Version": version(),
        "Device": f"{about.get('device', '')}, {settings.get('precision', '')}".strip(", "),
        "Libraries": f"torch {about.get('torch', '?')}, transformers {about.get('transformers', '?')}",
        "Answers": f"greedy, at most {' or '.join(map(str, longest))} tokens",
    }
    if options.limit is not None:
        facts["Limit"] = f"only the first {count(options.limit)} records of each set"
    return facts


def summary_text(result: SuiteResult) -> str:
    """The headline scores as text for a terminal, and all tables of a detailed set."""
    lines = [["set", "metric", "value", "95 % interval", "blind", "n"]]
    for part in result.sets:
        for index, metric in enumerate(part.headlines()):
            found, blind = part.scores.overall[metric.name], part.blind.get(("", "", metric.name))
            value = f"{number(found.value)} {metric.unit}".strip()
            line = ["" if index else part.item.title, metric_title(metric), value, span(found.low, found.high)]
            lines.append([*line, "" if blind is None else number(blind), str(found.count)])
    has_blind = any(part.blind for part in result.sets)
    shown = lines if has_blind else [[*line[:4], line[5]] for line in lines]
    parts = [aligned(shown, left=(0, 1, 3))]
    for table in (table for part in result.sets if part.item.detailed for table in detail_tables(part)):
        lines = [table.columns, *([_cell(cell) for cell in row] for row in table.rows)]
        parts.append(f"{table.title}\n{aligned(lines)}")
    for part in result.sets:
        if curve := part.curve.get(""):
            lines = [
                ["threshold", *(f"{at:g}" for at in CURVE[1::2])],
                ["mDice", *(f"{dice:.3f}" for dice in curve[1::2])],
            ]
            parts.append(f"Mask threshold\n{aligned(lines)}")
    return "\n\n".join(parts)


def _cell(cell: Cell) -> str:
    if isinstance(cell, str | int):
        return str(cell)
    found = cell if isinstance(cell, Measure) else Measure(cell, math.nan, math.nan, 0)
    value, low, high = (f"{x:.1f}" if abs(x) >= 10 else f"{x:.3f}" for x in (found.value, found.low, found.high))
    return "–" if math.isnan(found.value) else value if math.isnan(found.low) else f"{value} [{low}, {high}]"
