"""Training runs in a folder: how each stands, and what differs between them."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from model.errors import MedPLIBError
from model.train.checkpoints import list_checkpoints, step_of
from model.train.journal import METRICS_FILE, VALIDATION_FILE, read_rows, score_lines
from model.train.recipe import MERGED, TEACHER_FORCED
from model.train.recipe_io import RECIPE_FILE
from model.train.run_record import RUN_FILE, is_locked, read_record
from model.train.validation import best_of

_TAIL = 65536  # bytes at the end of metrics.jsonl that surely hold a whole row
_DEPTH = 4  # levels of folders below the given one that are looked through

HEADINGS: tuple[str, ...] = (
    *("RUN", "STAGE", "STATUS", "STEP", "LOSS", "STARTED (UTC)", "TIME", "COMMIT", "SCORES OF ITS WEIGHTS"),
)
"""Of what ``cells_of`` gives."""


@dataclass(frozen=True)
class Run:
    """One run folder, as far as it can be read.

    Attributes:
        folder: where it lies.
        record: content of run.json, empty without one.
        recipe: content of recipe.yaml, empty without one.
        last: last row of metrics.jsonl.
        validations: all rows of validation.jsonl.
        notes: what could not be read.
    """

    folder: Path
    record: Mapping[str, Any]
    recipe: Mapping[str, Any]
    last: Mapping[str, Any]
    validations: Sequence[Mapping[str, Any]]
    notes: Sequence[str] = field(default_factory=list)

    @property
    def status(self) -> str:
        """``running``, ``preempted``, ``interrupted``, ``finished``, ``failed``, ``killed``, or ``unknown``.

        A run that says it is running and whose folder nobody holds was killed; on another host that cannot be told.
        """
        said = str(self.record.get("status") or ("finished" if (self.folder / "merged").is_dir() else "unknown"))
        if said == "running" and not is_locked(self.folder) and self.attempt.get("host") == socket.gethostname():
            return "killed"
        return said

    @property
    def attempt(self) -> Mapping[str, Any]:
        """The newest one."""
        attempts = self.record.get("attempts")
        return attempts[-1] if isinstance(attempts, list) and attempts and isinstance(attempts[-1], dict) else {}

    @property
    def commit(self) -> str:
        """Short commit of the newest attempt, with a + where files were changed since."""
        git = self.attempt.get("git") or {}
        return str(git.get("commit", ""))[:10] + ("+" if git.get("dirty") else "")

    @property
    def seconds(self) -> float:
        """All attempts together; one that was killed counts to its last step."""
        attempts = self.record.get("attempts") or []
        return sum(_duration(attempt, self._touched()) for attempt in attempts if isinstance(attempt, dict))

    def _touched(self) -> float:
        path = self.folder / METRICS_FILE
        return path.stat().st_mtime if path.is_file() else time.time()

    @property
    def scored(self) -> Mapping[str, Any]:
        """The validation of weights that exist: of merged/, else the best or newest checkpoint; empty without one."""
        merged = self.record.get("merged")
        step = merged.get("step") if isinstance(merged, Mapping) else self.record.get("step")
        steps: list[Any] = (
            [step] if (self.folder / MERGED).is_dir() else [step_of(path) for path in list_checkpoints(self.folder)]
        )
        rows = [row for row in self.validations if row["step"] in steps]
        saving = self.recipe.get("saving")
        metric = str(saving.get("best") or "") if isinstance(saving, Mapping) else ""
        best = best_of(rows, metric, steps)
        found = [row for row in rows if best is None or row["step"] == best.step]
        return found[-1] if found else {}

    @property
    def best(self) -> dict[str, float]:
        """Scores of ``scored``, those of all records together."""
        numbers = {name: value for name, value in self.scored.items() if isinstance(value, int | float)}
        return {name: value for name, value in numbers.items() if "/" not in name.removeprefix(TEACHER_FORCED)}


def find_runs(folder: Path) -> list[Run]:
    """All runs in or below a folder, by name.

    Raises:
        MedPLIBError: there is no such folder.
    """
    if not folder.is_dir():
        raise MedPLIBError(f"{folder} is no folder; name the one that holds the runs")
    return [read_run(path) for path in _run_folders(folder, _DEPTH)]


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    try:
        entries = sorted(folder.iterdir())
    except OSError:  # a folder of somebody else's
        return
    if any((folder / name).is_file() for name in (RUN_FILE, METRICS_FILE)):
        yield folder
    elif depth:
        for path in entries:
            if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
                yield from _run_folders(path, depth - 1)


def read_run(folder: Path) -> Run:
    """Whatever a run folder still tells; faults become notes."""
    notes: list[str] = []
    record = read_record(folder)
    if (folder / RUN_FILE).is_file() and not record:
        notes.append(f"{RUN_FILE} is damaged")
    recipe: Any = {}
    try:
        recipe = yaml.safe_load((folder / RECIPE_FILE).read_bytes())
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        notes.append(f"{RECIPE_FILE} is damaged")
    last = _rows(folder / METRICS_FILE)[-1:]
    return Run(
        folder,
        record,
        recipe if isinstance(recipe, dict) else {},
        last[0] if last else {},
        _rows(folder / VALIDATION_FILE, whole=True),
        notes,
    )


def _rows(path: Path, *, whole: bool = False) -> list[dict[str, Any]]:
    """Rows of one of a run's files, or those near its end; none of one that cannot be read."""
    try:
        return read_rows(path, 0 if whole else _TAIL)
    except OSError:
        return []


def _duration(attempt: Mapping[str, Any], otherwise: float) -> float:
    try:
        started = datetime.fromisoformat(str(attempt.get("started"))).timestamp()
        ended = attempt.get("ended")
        return max(0.0, (datetime.fromisoformat(str(ended)).timestamp() if ended else otherwise) - started)
    except ValueError:
        return 0.0


def list_text(runs: Sequence[Run]) -> str:
    """One line a run."""
    lines = [HEADINGS, *map(cells_of, runs)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in lines]
    text += [f"{run.folder}: {run.record.get('reason')}" for run in runs if run.status == "failed"]
    return "\n".join(text + [f"{run.folder}: {', '.join(run.notes)}" for run in runs if run.notes])


def cells_of(run: Run) -> tuple[str, ...]:
    """How a run stands, a text for each of ``HEADINGS``."""
    step, total = run.last.get("step", run.record.get("step", 0)), run.record.get("total_steps", "?")
    files = sorted({key.partition("/")[2] for key in run.scored if key.startswith(("seg_said/", "closed/", "open/"))})
    scores = f"step {run.scored['step']}: {'; '.join(score_lines(run.scored, files))}" if run.scored else "-"
    attempts = run.record.get("attempts") or [{}]
    started = str(attempts[0].get("started", "")) if isinstance(attempts[0], dict) else ""
    return (
        str(run.folder),
        str(run.record.get("stage", run.recipe.get("stage", "?"))),
        run.status,
        f"{step}/{total}",
        _number(run.last.get("loss")),
        started[:16].replace("T", " ") or "-",
        _time(run.seconds),
        run.commit or "-",
        scores,
    )


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) and math.isfinite(value) else "-"


def _time(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
