"""Run folders: run.json, rows of metrics, atomic writes, and ``medplib runs``, which lists and compares them."""

from __future__ import annotations

import argparse
import fcntl
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal

import yaml
from safetensors import SafetensorError

from model.checkpoint.directories import MERGED
from model.errors import MedPLIBError
from model.train.preemption import RunStopped

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
"""One JSON object per optimizer step: ``step``, ``loss``, each loss part, ``lr``, ``samples_per_s`` and more."""
VALIDATION_FILE = "validation.jsonl"
"""One JSON object per validation: ``step`` and its scores."""
ROUTER_FILE = "router.jsonl"
"""One JSON object per ``logging.router_every`` steps of a mixture, see ``Metrics.router_row``."""
RUN_FILE = "run.json"
"""``stage``, ``status``, ``reason``, ``step``, ``total_steps``, ``data`` and a list of ``attempts``."""
LOCK_FILE = ".lock"
"""Held by rank 0 of a running run; the system releases it when the process ends, however it ends."""
SCORES = ("mDice", "false_masks", "seg_said", "closed", "open", "region")
"""Scores of answers generated in validation; ``mDice@T`` of each threshold besides."""
TEACHER_FORCED = "teacher_forced/"
"""Begins the names of scores given the reference answer."""

_RESERVED = 1 << 16  # bytes of the lock, given back to write run.json where the disk became full
_TAIL = 65536  # bytes at the end of metrics.jsonl that surely hold a whole row
_DEPTH = 4  # levels of folders below the given one that are searched
_PACKAGES = ("medplib", "torch", "transformers", "tokenizers", "safetensors", "peft", "deepspeed", "numpy", "pillow")
_ROOT = Path(__file__).resolve().parents[2]
_WRITING_FAILED = re.compile(r"PytorchStreamWriter|file write|inline_container|No space left|Disk quota", re.IGNORECASE)
# How gloo and NCCL word it that another rank is gone.
_LOST_RANK = re.compile(r"Connection (closed|reset)|closed by peer|Broken pipe|remote process exited|ncclRemoteError")

Status = Literal["running", "preempted", "interrupted", "finished", "failed"]


# --- files that outlast a crash ---------------------------------------------------------------------------------------


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn errors of writing ``what``, which libraries word in many ways, into one sentence.

    Raises:
        MedPLIBError: the disk is full or cannot be written.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not _WRITING_FAILED.search(str(error)):
            raise
        reason = "the disk is full or does not take the file"
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
        raise MedPLIBError(f"{what} could not be written: {reason}; mend that and go on with --resume") from None


def write_atomic(path: Path, content: Any) -> None:
    """Write JSON so that the file is old or new, never half, also after a loss of power."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8", errors="backslashreplace") as stream:  # escapes that JSON has too
            stream.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def sync(*paths: Path) -> None:
    """Flush files, or the names in folders, to the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_rows(path: Path, tail: int = 0) -> list[dict[str, Any]]:
    """Rows with a ``step`` of one of a run's files; none where it is absent. Damaged rows are left out.

    Only ``tail`` bytes at its end are read where that is not 0.
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
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                found.append(row)
    return found


# --- run.json ---------------------------------------------------------------------------------------------------------


class RunRecord:
    """Keeps ``run.json`` of one attempt; rank 0 alone has one.

    Raises:
        MedPLIBError: another process trains in this folder.
    """

    def __init__(self, folder: Path, stage: int) -> None:
        self.folder = folder
        self._lock = _hold_lock(folder)
        self.content = {"stage": stage, **read_record(folder)}
        self.content.setdefault("attempts", [])

    def begin(self, world_size: int, step: int, total_steps: int, data: dict[str, Any]) -> None:
        """Note that an attempt starts after ``step``; a killed one before it ended with its last row of metrics."""
        import torch

        metrics = self.folder / METRICS_FILE  # whose rows of steps to be done again are not cut off yet
        last_step = _time(metrics.stat().st_mtime) if metrics.is_file() else ""
        for former in self.content["attempts"]:
            if isinstance(former, dict) and former.get("ended") is None:
                former |= {"status": "killed", "ended": last_step or former.get("started")}
        versions = {"python": platform.python_version(), "platform": platform.platform()}
        for package in _PACKAGES:
            with suppress(importlib.metadata.PackageNotFoundError):
                versions[package] = importlib.metadata.version(package)
        attempt = {
            "started": _time(),
            "ended": None,
            "status": "running",
            "from_step": step,
            "world_size": world_size,
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "cpus": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
            "cuda": torch.version.cuda,
            "git": _git_state(),
            "versions": versions,
        }
        self.content["attempts"].append(attempt)
        self.content |= {"status": "running", "reason": "", "step": step, "total_steps": total_steps, "data": data}
        write_atomic(self.folder / RUN_FILE, self.content)

    def end(self, failure: BaseException | None, step: int) -> None:
        """Note how the attempt ended; a disk that is full must not hide why."""
        status, reason = status_of(failure)
        if self.content["attempts"]:
            self._lock.truncate(0)
            self.content["attempts"][-1] |= {"ended": _time(), "status": status, "step": step}
            self.content |= {"status": status, "reason": reason, "step": step}
            with suppress(OSError):
                write_atomic(self.folder / RUN_FILE, self.content)
        self.close()

    def close(self) -> None:
        """Release the folder."""
        self._lock.close()


def status_of(failure: BaseException | None) -> tuple[Status, str]:
    """Status and reason in ``run.json`` of what ended a run."""
    if failure is None:
        return "finished", ""
    if isinstance(failure, RunStopped):
        return ("interrupted" if failure.code else "preempted"), failure.message
    if isinstance(failure, KeyboardInterrupt):
        return "interrupted", "a second Ctrl-C ended the run without saving"
    if lost := lost_ranks(failure):
        return "failed", f"{lost} (in the output of the run)"
    return "failed", (str(failure).strip().splitlines() or [type(failure).__name__])[0]


def lost_ranks(failure: BaseException) -> str:
    """The sentence where another process of the run is gone and nothing else went wrong here; empty otherwise."""
    if not (isinstance(failure, RuntimeError) and _LOST_RANK.search(str(failure))):
        return ""
    return f"process {os.environ.get('RANK', '?')} lost the others; what one of them said is why"


def read_record(folder: Path) -> dict[str, Any]:
    """The content of ``run.json``; empty where there is none or it is damaged."""
    try:
        content = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def is_locked(folder: Path) -> bool:
    """Whether a process trains in this folder right now, as far as its file system knows."""
    try:
        with (folder / LOCK_FILE).open("rb") as stream:
            fcntl.lockf(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def locked_error(folder: Path) -> MedPLIBError:
    """The error about a folder that is locked."""
    attempt = (read_record(folder).get("attempts") or [{}])[-1]
    who = f"process {attempt.get('pid', '?')} on {attempt.get('host', '?')}"
    return MedPLIBError(f"{who} is training in {folder}; wait for it, stop it, or name another output")


def _hold_lock(folder: Path) -> IO[bytes]:
    stream = (folder / LOCK_FILE).open("ab")
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        raise locked_error(folder) from None
    except OSError:  # a file system without locks
        logger.debug("%s cannot be locked on %s", folder, socket.gethostname())
    stream.write(bytes(max(0, _RESERVED - os.fstat(stream.fileno()).st_size)))
    stream.flush()
    os.fsync(stream.fileno())
    return stream


def _git_state() -> dict[str, Any] | None:
    """``commit``, ``dirty`` and, where it is, ``changes`` (lines of ``git diff --stat``); None without a repository."""
    if not (_ROOT / ".git").exists():  # a repository further up is another project's
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(_ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()

    try:
        state: dict[str, Any] = {"commit": git("rev-parse", "HEAD")}
        state["dirty"] = bool(git("status", "--porcelain", "--untracked-files=no"))
        return state | ({"changes": git("diff", "HEAD", "--stat").splitlines()[-20:]} if state["dirty"] else {})
    except (OSError, subprocess.SubprocessError):
        return None


def _time(seconds: float | None = None) -> str:
    """A moment of ``time.time()``, now by default, as ISO 8601."""
    moment = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return moment.isoformat(timespec="seconds")


# --- what can be read of a run ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One run folder, as far as it can be read."""

    folder: Path
    status: str  # of run.json; killed where nobody holds the folder of a running one; unknown on another host
    commit: str  # short commit of the newest attempt, with a + where files were changed since
    seconds: float  # all attempts together; one that was killed counts to its last step
    record: Mapping[str, Any]  # content of run.json, empty without one
    attempts: Sequence[Mapping[str, Any]]  # of run.json, oldest first
    recipe: Mapping[str, Any]  # content of recipe.yaml, empty without one
    last: Mapping[str, Any]  # last row of metrics.jsonl
    scored: Mapping[str, Any]  # validation of weights that exist: of merged/, else the best or newest checkpoint
    notes: Sequence[str]  # what could not be read

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

    def folders(below: Path, depth: int) -> Iterator[Path]:
        try:
            entries = sorted(below.iterdir())
        except OSError:  # a folder of somebody else's
            return
        if _is_run(below):
            yield below
        elif depth:
            for path in entries:
                if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
                    yield from folders(path, depth - 1)

    return [read_run(path) for path in folders(folder, _DEPTH)]


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (RUN_FILE, METRICS_FILE))


def read_run(folder: Path) -> Run:
    """Whatever can still be read of a run folder; faults become notes."""
    from model.settings import modernized
    from model.train.recipe import OLD_KEYS, RECIPE_FILE

    record, notes = read_record(folder), []
    if (folder / RUN_FILE).is_file() and not record:
        notes.append(f"{RUN_FILE} is damaged")
    recipe: Any = {}
    try:
        recipe = yaml.safe_load((folder / RECIPE_FILE).read_bytes())
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        notes.append(f"{RECIPE_FILE} is damaged")
    recipe = modernized(recipe, OLD_KEYS) if isinstance(recipe, dict) else {}
    metrics, validations = [], []
    with suppress(OSError):
        metrics = read_rows(folder / METRICS_FILE, _TAIL)
        validations = read_rows(folder / VALIDATION_FILE)
    found = record.get("attempts")
    attempts = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
    newest = attempts[-1] if attempts else {}
    git = newest.get("git") or {}
    status = str(record.get("status") or ("finished" if (folder / MERGED).is_dir() else "unknown"))
    if status == "running" and not is_locked(folder) and newest.get("host") == socket.gethostname():
        status = "killed"
    file, seconds = folder / METRICS_FILE, 0.0
    touched = file.stat().st_mtime if file.is_file() else time.time()
    for attempt in attempts:
        with suppress(ValueError):
            started, ended = datetime.fromisoformat(str(attempt.get("started"))).timestamp(), attempt.get("ended")
            seconds += max(0.0, (datetime.fromisoformat(str(ended)).timestamp() if ended else touched) - started)
    return Run(
        folder,
        status,
        str(git.get("commit", ""))[:10] + ("+" if git.get("dirty") else ""),
        seconds,
        record,
        attempts,
        recipe,
        (metrics or [{}])[-1],
        _scored(folder, record, recipe, validations),
        notes,
    )


def _scored(
    folder: Path, record: Mapping[str, Any], recipe: Mapping[str, Any], validations: Sequence[Mapping[str, Any]]
) -> Mapping[str, Any]:
    from model.train.checkpoint import list_checkpoints, step_of
    from model.train.validation import best_of

    merged, saving = record.get("merged"), recipe.get("saving")
    steps: list[Any] = [step_of(path) for path in list_checkpoints(folder)]
    if (folder / MERGED).is_dir():
        steps = [(merged if isinstance(merged, Mapping) else record).get("step")]
    rows = [row for row in validations if row["step"] in steps]
    best = best_of(rows, str(saving.get("best") or "") if isinstance(saving, Mapping) else "", steps)
    return next((row for row in reversed(rows) if best is None or row["step"] == best.step), {})


def score_lines(row: Mapping[str, Any], files: Sequence[str] = ()) -> list[str]:
    """Scores of a validation: those of generated answers, of each file too, then those given the reference answer."""

    def shown(names: Mapping[str, str]) -> str:
        found = ((name, row.get(key)) for key, name in names.items())
        return ", ".join(f"{name} {value:.3f}" for name, value in found if isinstance(value, int | float))

    forced = {name: name.removeprefix(TEACHER_FORCED) for name in row if name.startswith(TEACHER_FORCED)}
    forced = {key: name for key, name in forced.items() if "/" not in name}
    if not any(name in row for name in SCORES) and not forced:  # written before answers were generated
        forced = {name: name for name in row if name != "step" and "/" not in name}
    lines = [shown({name: name for name in SCORES})]
    for file in files:
        if scores := shown({f"{name}/{file}": name for name in SCORES}):
            lines.append(f"{file}: {scores}")
    lines += [f"teacher-forced, not the model's own answers: {shown(forced)}"] if forced else []
    return [line for line in lines if line]


# --- medplib runs -----------------------------------------------------------------------------------------------------

_HEADINGS = ("RUN", "STAGE", "STATUS", "STEP", "LOSS", "STARTED (UTC)", "TIME", "COMMIT", "SCORES OF ITS WEIGHTS")


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

    def run_router_report(options: argparse.Namespace) -> int:
        from model.train.router_report import run_report

        return run_report(options)

    report.set_defaults(run=run_router_report)


def run_runs(options: argparse.Namespace) -> int:
    """The command ``medplib runs``."""
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
    rows: list[Sequence[str]] = [_HEADINGS]
    for run in runs:
        scored, loss = run.scored, run.last.get("loss")
        files = sorted({key.partition("/")[2] for key in scored if key.startswith(("seg_said/", "closed/", "open/"))})
        minutes, seconds = divmod(int(run.seconds), 60)
        started = str(run.attempts[0].get("started", "")) if run.attempts else ""
        row = [
            str(run.folder),
            str(run.record.get("stage", run.recipe.get("stage", "?"))),
            run.status,
            f"{run.last.get('step', run.record.get('step', 0))}/{run.record.get('total_steps', '?')}",
            f"{loss:.4g}" if isinstance(loss, int | float) and math.isfinite(loss) else "-",
            started[:16].replace("T", " ") or "-",
            f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}",
            run.commit or "-",
            f"step {scored['step']}: {'; '.join(score_lines(scored, files))}" if scored else "-",
        ]
        rows.append(row)
    lines = _aligned(rows)
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

    def cell(value: Any) -> str:
        text = "-" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
        return text if len(text) <= 44 else f"{text[:20]}…{text[-20:]}"

    def flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, Mapping):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    parts = [list_text(runs)]
    for title, values in sections.items():
        by_key = [dict(flat(one)) for one in values]
        keys = dict.fromkeys(key for one in by_key for key in one)
        rows = [[key, *(cell(one.get(key)) for one in by_key)] for key in keys]
        rows = rows if title == "figures" else [row for row in rows if len({*row[1:]}) > 1]
        heading = ["", *(cell(run.folder) for run in runs)]
        parts.append("\n".join([f"{title}:", *_aligned([heading, *rows], "  ")]) if rows else f"{title}: the same")
    return "\n\n".join(parts)


def _aligned(rows: Sequence[Sequence[str]], indent: str = "") -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return [f"{indent}{line}".rstrip() for line in lines]
