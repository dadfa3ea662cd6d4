"""Which code made a result."""

from __future__ import annotations

import importlib.metadata
import subprocess
from contextlib import suppress
from pathlib import Path


def version() -> str:
    """Of this code: the package's, and the commit where it is run from a checkout."""
    parts = []
    with suppress(importlib.metadata.PackageNotFoundError):
        parts.append(f"medplib {importlib.metadata.version('medplib')}")
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists():
        with suppress(OSError, subprocess.SubprocessError):
            command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
            found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
            parts.append(f"commit {found.stdout.strip()}")
    return ", ".join(parts)
