"""Training commands in processes of their own: begun, watched, killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def command(arguments: Sequence[str], processes: int = 1) -> tuple[list[str], dict[str, str]]:
    """What starts Python with these arguments in so many ranks, and its environment."""
    environment = {name: value for name, value in os.environ.items() if name not in _OF_LAUNCHERS}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return [sys.executable, *launcher, *arguments], environment


def launch(arguments: Sequence[str], processes: int = 1) -> subprocess.CompletedProcess[str]:
    """Run to the end."""
    line, environment = command(arguments, processes)
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def begin(arguments: Sequence[str], processes: int = 1, **options: Any) -> subprocess.Popen[str]:
    """Start in a process group of its own, so that all ranks can be killed at once."""
    line, environment = command(arguments, processes)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(line, cwd=ROOT, env=environment, start_new_session=True, **pipes, **options)


def wait_until(happened: Callable[[], bool], running: subprocess.Popen[str], seconds: float = 120.0) -> None:
    """Look again and again until something is so or the process has ended."""
    deadline = time.monotonic() + seconds
    while not happened():
        if running.poll() is not None:
            assert happened(), f"ended with {running.returncode}: {running.communicate()[0]}"
            return
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.0005)  # short moments are looked for, but the process needs the processor more
