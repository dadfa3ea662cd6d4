"""The flags that all long builds share, and what they come to."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from model.data.builders.work import BuildReport, Execution
from model.errors import MedPLIBError


def add_build_options(command: argparse.ArgumentParser) -> None:
    """``--out``, ``--workers``, ``--overwrite`` and ``--same-source``."""
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    command.add_argument("--workers", type=int, metavar="N", help="processes; as many as processors when absent")
    command.add_argument("--overwrite", action="store_true", help="start anew, whatever DIR holds")
    command.add_argument(
        "--same-source",
        action="store_true",
        help="go on although the source lies elsewhere or was copied: its data are what they were",
    )


def execution_of(options: argparse.Namespace) -> Execution:
    """How to do the build that these flags ask for.

    Raises:
        MedPLIBError: a flag's value is impossible.
    """
    workers = len(os.sched_getaffinity(0)) if options.workers is None else options.workers
    if workers < 1:
        raise MedPLIBError(f"--workers is {workers}; give at least 1")
    return Execution(workers, options.overwrite, same_source=options.same_source)


def tell(*reports: BuildReport) -> int:
    """Print what was built; the exit code of a build that ended."""
    sys.stdout.write("\n\n".join(report.format() for report in reports) + "\n")
    return 0
