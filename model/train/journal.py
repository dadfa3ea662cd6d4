"""Log of a run: metrics.jsonl, validation.jsonl, TensorBoard, and a progress bar or lines; rank 0 alone writes."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    from model.train.recipe import Logging

SCORES = ("mDice", "false_masks", "seg_said", "closed", "open", "region")
"""Scores of answers generated in validation; ``mDice@T`` of each threshold besides."""
TEACHER_FORCED = "teacher_forced/"
"""Begins the names of scores given the reference answer."""

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
"""One JSON object per optimiser step: ``step``, ``loss``, each loss part, ``lr``, ``samples_per_s`` and more."""
VALIDATION_FILE = "validation.jsonl"
"""One JSON object per validation: ``step`` and its scores."""
ROUTER_FILE = "router.jsonl"
"""One JSON object per ``logging.router_every`` steps of a mixture: what its routers did, see ``Meters.router_row``."""


class Journal:
    """Progress of one run.

    Args:
        folder: the run folder.
        settings: what is shown.
        total_steps: of the whole run, for the time left.
        first_step: steps already done; later rows of an earlier attempt are cut off.
        writes: False on ranks that stay silent.
    """

    def __init__(self, folder: Path, settings: Logging, total_steps: int, first_step: int, writes: bool) -> None:
        self.folder, self.writes = folder, writes
        self.last_validation = 0  # step of the newest row
        shown, terminal = writes and settings.progress, sys.stderr.isatty()
        self.bar = tqdm(
            total=total_steps, initial=first_step, unit="step", disable=not (shown and terminal), smoothing=0.1
        )
        self._lines_every = settings.every if shown and not terminal else 0
        self._first_step, self._total_steps, self._begun = first_step, total_steps, time.monotonic()
        self.board = _tensorboard(folder, first_step) if writes and settings.tensorboard else None
        if writes:
            kept = [_cut_after(folder / name, first_step) for name in (METRICS_FILE, ROUTER_FILE, VALIDATION_FILE)]
            self.last_validation = kept[-1]

    def step(self, row: Mapping[str, Any]) -> None:
        """Note one optimiser step."""
        self._write(METRICS_FILE, row, "train")
        self.bar.set_postfix(loss=f"{row['loss']:.3f}", lr=f"{row['lr']:.1e}", refresh=False)
        self.bar.update()
        step, last = row["step"], self._total_steps
        if self._lines_every and (step % self._lines_every == 0 or step == last):
            pace = (time.monotonic() - self._begun) / (step - self._first_step)
            left = timedelta(seconds=round(pace * (last - step)))
            rate = f"lr {row['lr']:.1e}, {pace:.2f} s a step, {left} left"
            self.say(f"step {step}/{last} ({step / last:.0%}): loss {row['loss']:.4f}, {rate}")

    def validation(self, row: Mapping[str, Any], files: Sequence[str], note: str) -> None:
        """Note the scores of one validation.

        Args:
            row: its step and scores.
            files: names of several validation files, each of which gets a line.
            note: said behind the scores.
        """
        self._write(VALIDATION_FILE, row, "validation")
        if self.writes:
            for line in score_lines(row, files):
                self.say(f"step {row['step']}: {line}")
            self.say(f"step {row['step']}: {note}")

    def router(self, row: Mapping[str, Any] | None) -> None:
        """Note what routers did, if there is anything to note."""
        if row is None:
            return
        self._write(ROUTER_FILE, row, "router")
        if self.board is None:
            return
        for group, found in {**row["kinds"], **row["tasks"], "projector": row.get("projector")}.items():
            for measure in ("load", "probability", "entropy", "dropped") if found else ():
                values = [found[measure]] if group == "projector" else found[measure]
                layers = [f"{group}/layer {layer}" for layer in row["layers"]]
                for place, value in zip(["projector"] if group == "projector" else layers, values, strict=True):
                    for expert, one in enumerate(value if isinstance(value, list) else [value]):
                        tag = f"router_{measure}/{place}" + f"/expert {expert}" * isinstance(value, list)
                        if one is not None:
                            self.board.add_scalar(tag, one, row["step"])

    def say(self, text: str) -> None:
        """Log a line without tearing the progress bar."""
        if self.writes:
            with tqdm.external_write_mode():
                logger.info("%s", text)

    def write_through(self) -> None:
        """Make what was noted last, before a checkpoint says that it was done."""
        for name in (METRICS_FILE, ROUTER_FILE, VALIDATION_FILE):
            if self.writes and (self.folder / name).is_file():
                with (self.folder / name).open("rb") as stream:
                    os.fsync(stream.fileno())

    def close(self) -> None:
        """Finish the bar and the board."""
        self.bar.close()
        if self.board is not None:
            self.board.close()

    def _write(self, name: str, row: Mapping[str, Any], group: str) -> None:
        if not self.writes:
            return
        row = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
        }
        with (self.folder / name).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, allow_nan=False) + "\n")
        if self.board is not None:
            for key, value in row.items():
                if isinstance(value, float):
                    self.board.add_scalar(f"{group}/{key}", value, row["step"])


def score_lines(row: Mapping[str, Any], files: Sequence[str] = ()) -> list[str]:
    """Scores of a validation: those of generated answers, of each file too, then those given the reference answer."""

    def shown(names: Mapping[str, str]) -> str:
        found = ((name, row.get(key)) for key, name in names.items())
        return ", ".join(f"{name} {value:.3f}" for name, value in found if isinstance(value, int | float))

    by_file = [shown({f"{name}/{file}": name for name in SCORES}) for file in files]
    forced = {name: name.removeprefix(TEACHER_FORCED) for name in row if name.startswith(TEACHER_FORCED)}
    forced = {key: name for key, name in forced.items() if "/" not in name}
    if not any(name in row for name in SCORES) and not forced:  # written before answers were generated
        forced = {name: name for name in row if name != "step" and "/" not in name}
    lines = [shown({name: name for name in SCORES})]
    lines += [f"{file}: {scores}" for file, scores in zip(files, by_file, strict=True) if scores]
    lines += [f"teacher-forced, not the model's own answers: {shown(forced)}"] if forced else []
    return [line for line in lines if line]


def read_rows(path: Path, tail: int = 0) -> list[dict[str, Any]]:
    """Rows of one of a run's files that say their ``step``; none where it is not there.

    What a killed run left half written, or a crash of the machine damaged, is left out.

    Args:
        path: of the file.
        tail: so many bytes at its end are looked at; all of it if 0.

    Raises:
        OSError: the file is there and cannot be read.
    """
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - tail) if tail else 0)
            lines = stream.read().splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            found.append(row)
    return found


def _cut_after(path: Path, step: int) -> int:
    """Drop rows of steps that will be done again, and damaged ones; the last step that stays."""
    if not path.is_file():
        return 0
    kept = [row for row in read_rows(path) if row["step"] <= step]
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text("".join(f"{json.dumps(row)}\n" for row in kept))
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    return kept[-1]["step"] if kept else 0


def _tensorboard(folder: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.warning("TensorBoard is not installed, so no event files are written; install the train extra")
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)  # hides what will be done again
