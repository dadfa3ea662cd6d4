"""``medplib runs``: list the training runs of a folder and compare two of them."""

from __future__ import annotations

import argparse
import json
import math
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from model.checkpoint.directories import MERGED
from model.errors import MedPLIBError
from model.train.journal import METRICS_FILE, TEACHER_FORCED, VALIDATION_FILE, read_rows, score_lines
from model.train.run_record import RUN_FILE, is_locked, read_record

_TAIL = 65536  # bytes at the end of metrics.jsonl that surely hold a whole row
_DEPTH = 4  # levels of folders below the given one that are looked through
_HEADINGS = ("RUN", "STAGE", "STATUS", "STEP", "LOSS", "STARTED (UTC)", "TIME", "COMMIT", "SCORES OF ITS WEIGHTS")


@dataclass(frozen=True)
class Run:
    """One run folder, as far as it can be read.

    Attributes:
        folder: where it lies.
        status: ``running``, ``preempted``, ``interrupted``, ``finished``, ``failed``, ``killed``, or ``unknown``. A run
            that says it is running and whose folder nobody holds was killed; on another host that is unknown.
        commit: short commit of the newest attempt, with a + where files were changed since.
        seconds: all attempts together; one that was killed counts to its last step.
        record: content of run.json, empty without one; ``attempts``: its list of them, oldest first.
        recipe: content of recipe.yaml, empty without one.
        last: last row of metrics.jsonl.
        scored: the validation of weights that exist: of merged/, else the best or newest checkpoint; empty without one.
        notes: what could not be read.
    """

    folder: Path
    status: str
    commit: str
    seconds: float
    record: Mapping[str, Any]
    attempts: Sequence[Mapping[str, Any]]
    recipe: Mapping[str, Any]
    last: Mapping[str, Any]
    scored: Mapping[str, Any]
    notes: Sequence[str]

    @property
    def best(self) -> dict[str, float]:
        """Scores of ``scored``, those of all records together."""
        numbers = {name: value for name, value in self.scored.items() if isinstance(value, int | float)}
        return {name: value for name, value in numbers.items() if "/" not in name.removeprefix(TEACHER_FORCED)}

    @property
    def cells(self) -> tuple[str, ...]:
        """How it stands, a text for each heading of the list."""
        scored, loss = self.scored, self.last.get("loss")
        files = sorted({key.partition("/")[2] for key in scored if key.startswith(("seg_said/", "closed/", "open/"))})
        minutes, seconds = divmod(int(self.seconds), 60)
        started = str(self.attempts[0].get("started", "")) if self.attempts else ""
        return (
            str(self.folder),
            str(self.record.get("stage", self.recipe.get("stage", "?"))),
            self.status,
            f"{self.last.get('step', self.record.get('step', 0))}/{self.record.get('total_steps', '?')}",
            f"{loss:.4g}" if isinstance(loss, int | float) and math.isfinite(loss) else "-",
            started[:16].replace("T", " ") or "-",
            f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}",
            self.commit or "-",
            f"step {scored['step']}: {'; '.join(score_lines(scored, files))}" if scored else "-",
        )


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
    if _is_run(folder):
        yield folder
    elif depth:
        for path in entries:
            if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
                yield from _run_folders(path, depth - 1)


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (RUN_FILE, METRICS_FILE))


def read_run(folder: Path) -> Run:
    """Whatever can still be read of a run folder; faults become notes."""
    import yaml

    from model.train.recipe_io import RECIPE_FILE

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
    recipe = recipe if isinstance(recipe, dict) else {}
    rows: dict[str, list[dict[str, Any]]] = {METRICS_FILE: [], VALIDATION_FILE: []}
    for name, tail in ((METRICS_FILE, _TAIL), (VALIDATION_FILE, 0)):
        with suppress(OSError):
            rows[name] = read_rows(folder / name, tail)
    found = record.get("attempts")
    attempts = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
    newest = attempts[-1] if attempts else {}
    git = newest.get("git") or {}
    status = str(record.get("status") or ("finished" if (folder / MERGED).is_dir() else "unknown"))
    if status == "running" and not is_locked(folder) and newest.get("host") == socket.gethostname():
        status = "killed"
    return Run(
        folder,
        status,
        str(git.get("commit", ""))[:10] + ("+" if git.get("dirty") else ""),
        _seconds(attempts, folder / METRICS_FILE),
        record,
        attempts,
        recipe,
        (rows[METRICS_FILE] or [{}])[-1],
        _scored(folder, record, recipe, rows[VALIDATION_FILE]),
        notes,
    )


def _seconds(attempts: Sequence[Mapping[str, Any]], metrics: Path) -> float:
    total, touched = 0.0, metrics.stat().st_mtime if metrics.is_file() else time.time()
    for attempt in attempts:
        with suppress(ValueError):
            started = datetime.fromisoformat(str(attempt.get("started"))).timestamp()
            ended = attempt.get("ended")
            total += max(0.0, (datetime.fromisoformat(str(ended)).timestamp() if ended else touched) - started)
    return total


def _scored(
    folder: Path, record: Mapping[str, Any], recipe: Mapping[str, Any], validations: Sequence[Mapping[str, Any]]
) -> Mapping[str, Any]:
    from model.train.checkpoints import list_checkpoints, step_of
    from model.train.validation import best_of

    merged, saving = record.get("merged"), recipe.get("saving")
    steps: list[Any] = [step_of(path) for path in list_checkpoints(folder)]
    if (folder / MERGED).is_dir():
        steps = [(merged if isinstance(merged, Mapping) else record).get("step")]
    rows = [row for row in validations if row["step"] in steps]
    best = best_of(rows, str(saving.get("best") or "") if isinstance(saving, Mapping) else "", steps)
    return next((row for row in reversed(rows) if best is None or row["step"] == best.step), {})


# --- the command ------------------------------------------------------------------------------------------------------


def add_run_commands(commands: argparse._SubParsersAction) -> None:
    """``medplib runs [FOLDER …]``, ``medplib runs compare RUN RUN …`` and ``medplib router-report``."""
    runs = commands.add_parser("runs", help="list training runs, or compare some: runs compare A B")
    runs.add_argument("words", nargs="*", metavar="FOLDER", help="folder of runs (default runs); or: compare RUN RUN …")
    runs.add_argument("--json", action="store_true", help="print one JSON object a run")
    runs.set_defaults(run=run_runs)
    report = commands.add_parser("router-report", help="count which expert serves which task and position")
    report.add_argument("source", type=Path, metavar="CHECKPOINT_OR_RUN")
    files = "record files; of a run, its validation files when absent"
    report.add_argument("--data", type=Path, nargs="+", metavar="FILE", help=files)
    report.add_argument("--images", type=Path, metavar="DIR", help="folder that their paths start from")
    report.add_argument("--out", type=Path, default=Path("router-report.json"), metavar="FILE.json")
    report.add_argument("--samples", type=int, default=64, metavar="N", help="records of each task (default 64)")
    report.add_argument("--batch-size", type=int, default=8, metavar="N")
    report.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1 …")
    report.set_defaults(run=_run_router_report)


def _run_router_report(options: argparse.Namespace) -> int:
    from model.train.router_report import report

    return report(options)


def run_runs(options: argparse.Namespace) -> int:
    """The command."""
    if options.words[:1] == ["compare"] and not Path("compare").is_dir():
        sys.stdout.write(compare_text([Path(word) for word in options.words[1:]]) + "\n")
        return 0
    folders = [Path(word) for word in options.words or ["runs"]]
    runs = [run for folder in folders for run in find_runs(folder)]
    if not runs:
        sys.stdout.write(f"no runs in {', '.join(map(str, folders))}\n")
    elif options.json:
        for run in runs:
            kept = {"folder": str(run.folder), "status": run.status, "commit": run.commit, "seconds": run.seconds}
            sys.stdout.write(json.dumps({**run.record, **kept, "last": dict(run.last), "best": run.best}) + "\n")
    else:
        sys.stdout.write(list_text(runs) + "\n")
    return 0


def list_text(runs: Sequence[Run]) -> str:
    """One line a run, then why some failed and what of some could not be read."""
    lines = _aligned([_HEADINGS, *(run.cells for run in runs)])
    lines += [f"{run.folder}: {run.record.get('reason')}" for run in runs if run.status == "failed"]
    return "\n".join(lines + [f"{run.folder}: {', '.join(run.notes)}" for run in runs if run.notes])


def compare_text(folders: Sequence[Path]) -> str:
    """Status lines, settings that differ, and last and best figures of two or more runs.

    Raises:
        MedPLIBError: there are fewer than two, or one is no run.
    """
    if len(folders) < 2:
        raise MedPLIBError("compare wants two or more run folders: medplib runs compare RUN RUN")
    strangers = [str(folder) for folder in folders if not _is_run(folder)]
    if strangers:
        raise MedPLIBError(
            f"{', '.join(strangers)}: no run lies there; `medplib runs FOLDER` lists those below a folder"
        )
    runs = [read_run(folder) for folder in folders]
    newest: list[Mapping[str, Any]] = [run.attempts[-1] if run.attempts else {} for run in runs]
    machine = ("git", "versions", "host", "gpus", "world_size")
    sections: dict[str, list[Mapping[str, Any]]] = {
        "recipe": [{**run.recipe, "output": None} for run in runs],  # which is another for each
        "code and machine": [{name: one.get(name) for name in machine} for one in newest],
        "data": [run.record.get("data") or {} for run in runs],
        "figures": [{**run.last, **{f"best {name}": value for name, value in run.best.items()}} for run in runs],
    }
    parts = [list_text(runs)]
    for title, values in sections.items():
        flat = [dict(_flat(one)) for one in values]
        keys = dict.fromkeys(key for one in flat for key in one)
        rows = [[key, *(_shown(one.get(key)) for one in flat)] for key in keys]
        rows = rows if title == "figures" else [row for row in rows if len({*row[1:]}) > 1]
        heading = ["", *(_shown(run.folder) for run in runs)]
        parts.append("\n".join([f"{title}:", *_aligned([heading, *rows], "  ")]) if rows else f"{title}: the same")
    return "\n\n".join(parts)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Nested values by dotted key."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(value: Any) -> str:
    text = "-" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 44 else f"{text[:20]}…{text[-20:]}"


def _aligned(rows: Sequence[Sequence[str]], indent: str = "") -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return [f"{indent}{line}".rstrip() for line in lines]
