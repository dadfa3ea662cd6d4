"""Which code, which libraries and which machine a run used."""

from __future__ import annotations

import importlib.metadata
import platform
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

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


def command_line() -> list[str]:
    """How this process was started."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
