"""run.json: identity, attempts and status of a run; its lock; atomic writes."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal

from safetensors import SafetensorError

from model.errors import MedPLIBError
from model.train.journal import METRICS_FILE
from model.train.signals import RunStopped

logger = logging.getLogger(__name__)

_WRITING_FAILED = re.compile(r"PytorchStreamWriter|file write|inline_container|No space left|Disk quota", re.IGNORECASE)
# How gloo and NCCL word it that another rank is gone.
_LOST_RANK = re.compile(r"Connection (closed|reset)|closed by peer|Broken pipe|remote process exited|ncclRemoteError")

RUN_FILE = "run.json"
"""``stage``, ``status``, ``reason``, ``step``, ``total_steps``, ``data`` and a list of ``attempts``."""
LOCK_FILE = ".lock"
"""Held by rank 0 of a run that is going on; the system lets go of it when the process ends, however it ends."""
_RESERVED = 1 << 16  # bytes of the lock, given back to write run.json where the disk became full

_PACKAGES = ("medplib", "torch", "transformers", "tokenizers", "safetensors", "peft", "deepspeed", "numpy", "pillow")
_ROOT = Path(__file__).resolve().parents[2]


def git_state(root: Path = _ROOT) -> dict[str, Any] | None:
    """``commit``, ``dirty`` and, where it is, ``changes`` (lines of ``git diff --stat``); None without a repository."""
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    state: dict[str, Any] = {"commit": commit, "dirty": bool(changed)}
    if changed:
        state["changes"] = (_git(root, "diff", "HEAD", "--stat") or "").splitlines()[-20:]
    return state


def _git(root: Path, *arguments: str) -> str | None:
    if not (root / ".git").exists():  # a repository further up is another project's
        return None
    with suppress(OSError, subprocess.SubprocessError):
        ended = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20, check=True
        )
        return ended.stdout.strip()
    return None


def versions() -> dict[str, str]:
    """Of Python, the platform and the packages that training uses; what is not installed is left out."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def machine() -> dict[str, Any]:
    """``host``, and what computes there: ``cpus`` and the names of all GPUs that this process sees."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"host": socket.gethostname(), "cpus": torch.get_num_threads(), "gpus": gpus, "cuda": torch.version.cuda}


Status = Literal["running", "preempted", "interrupted", "finished", "failed"]


class RunRecord:
    """Keeps ``run.json`` of one attempt; rank 0 alone has one.

    Args:
        folder: the run folder, which exists.
        stage: of the recipe.

    Raises:
        MedPLIBError: another process trains in this folder.
    """

    def __init__(self, folder: Path, stage: int) -> None:
        self.folder = folder
        self._lock = _hold(folder)
        self.content = {"stage": stage, **read_record(folder)}
        self.content.setdefault("attempts", [])

    def begin(self, world_size: int, step: int, total_steps: int, data: dict[str, Any]) -> None:
        """Note that an attempt starts after ``step``, and of a killed one before it when its last step was."""
        metrics = self.folder / METRICS_FILE  # whose rows of steps to be done again are not cut off yet
        last_step = _time(metrics.stat().st_mtime) if metrics.is_file() else ""
        for former in self.content["attempts"]:
            if isinstance(former, dict) and former.get("ended") is None:
                former |= {"status": "killed", "ended": last_step or former.get("started")}
        attempt = {
            "started": _time(),
            "ended": None,
            "status": "running",
            "from_step": step,
            "world_size": world_size,
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "pid": os.getpid(),
            **machine(),
            "git": git_state(),
            "versions": versions(),
        }
        self.content["attempts"].append(attempt)
        self.content |= {"status": "running", "reason": "", "step": step, "total_steps": total_steps, "data": data}
        write_through(self.folder / RUN_FILE, self.content)

    def end(self, status: Status, reason: str, step: int) -> None:
        """Note how the attempt ended; a disk that is full must not hide why."""
        if self.content["attempts"]:
            self._lock.truncate(0)
            self.content["attempts"][-1] |= {"ended": _time(), "status": status, "step": step}
            self.content |= {"status": status, "reason": reason, "step": step}
            with suppress(OSError):
                write_through(self.folder / RUN_FILE, self.content)

    def close(self) -> None:
        """Let go of the folder."""
        self._lock.close()


def status_of(failure: BaseException | None) -> tuple[Status, str]:
    """What ended a run, as ``run.json`` says it: the status and the reason."""
    if failure is None:
        return "finished", ""
    if isinstance(failure, RunStopped):
        return ("interrupted" if failure.code else "preempted"), failure.message
    if isinstance(failure, KeyboardInterrupt):
        return "interrupted", "a second Ctrl-C ended the run without saving"
    if has_lost_ranks(failure):
        return "failed", f"{told_as_lost()} (in the output of the run)"
    return "failed", (str(failure).strip().splitlines() or [type(failure).__name__])[0]


def has_lost_ranks(failure: BaseException) -> bool:
    """Whether nothing went wrong here but that another process of the run is gone."""
    return isinstance(failure, RuntimeError) and _LOST_RANK.search(str(failure)) is not None


def told_as_lost() -> str:
    """What a process says that has lost the others."""
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


def told_as_taken(folder: Path) -> str:
    """The sentence about a folder that is locked."""
    attempt = (read_record(folder).get("attempts") or [{}])[-1]
    who = f"process {attempt.get('pid', '?')} on {attempt.get('host', '?')}"
    return f"{who} is training in {folder}; wait for it, stop it, or name another output"


def _hold(folder: Path) -> IO[bytes]:
    stream = (folder / LOCK_FILE).open("ab")
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        raise MedPLIBError(told_as_taken(folder)) from None
    except OSError:  # a file system without locks
        logger.debug("%s cannot be locked on %s", folder, socket.gethostname())
    stream.write(bytes(max(0, _RESERVED - os.fstat(stream.fileno()).st_size)))
    stream.flush()
    os.fsync(stream.fileno())
    return stream


def _time(seconds: float | None = None) -> str:
    """A moment of ``time.time()``, now by default, as ISO 8601."""
    moment = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return moment.isoformat(timespec="seconds")


# --- files that outlast a crash ---------------------------------------------------------------------------------------


@contextmanager
def disk_faults(what: str) -> Iterator[None]:
    """Errors of writing become one sentence; libraries word theirs in many ways.

    Args:
        what: is being written.

    Raises:
        MedPLIBError: the disk is full, or does not let itself be written.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not _WRITING_FAILED.search(str(error)):
            raise
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
        else:
            reason = "the disk is full or does not take the file"
        raise MedPLIBError(f"{what} could not be written: {reason}; mend that and go on with --resume") from None


def write_through(path: Path, content: Any) -> None:
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
    """Make files, or the names in folders, last."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
