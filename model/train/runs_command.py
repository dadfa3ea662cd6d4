"""``medplib runs``: list training runs, or compare some."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.errors import MedPLIBError

if TYPE_CHECKING:
    from model.train.runs import Run


def add_runs_command(commands: argparse._SubParsersAction) -> None:
    """``medplib runs [FOLDER …]`` and ``medplib runs compare RUN RUN …``."""
    runs = commands.add_parser("runs", help="list training runs, or compare some: runs compare A B")
    runs.add_argument("words", nargs="*", metavar="FOLDER", help="folder of runs (default runs); or: compare RUN RUN …")
    runs.add_argument("--json", action="store_true", help="print one JSON object a run")
    runs.set_defaults(run=run_runs)


def run_runs(options: argparse.Namespace) -> int:
    """The command."""
    from model.train.runs import find_runs, list_text

    if options.words[:1] == ["compare"] and not Path("compare").is_dir():
        return _compare([Path(word) for word in options.words[1:]])
    folders = [Path(word) for word in options.words or ["runs"]]
    runs = [run for folder in folders for run in find_runs(folder)]
    if not runs:
        sys.stdout.write(f"no runs in {', '.join(map(str, folders))}\n")
    elif options.json:
        for run in runs:
            sys.stdout.write(json.dumps(_plain(run)) + "\n")
    else:
        sys.stdout.write(list_text(runs) + "\n")
    return 0


def _plain(run: Run) -> dict[str, Any]:
    kept = {"folder": str(run.folder), "status": run.status, "commit": run.commit, "seconds": run.seconds}
    return {**run.record, **kept, "last": dict(run.last), "best": run.best}


def _compare(folders: Sequence[Path]) -> int:
    """Status lines, settings that differ, and last and best figures of two or more runs."""
    from model.train.journal import METRICS_FILE
    from model.train.run_record import RUN_FILE
    from model.train.runs import list_text, read_run

    if len(folders) < 2:
        raise MedPLIBError("compare wants two or more run folders: medplib runs compare RUN RUN")
    strangers = [str(run) for run in folders if not any((run / name).is_file() for name in (RUN_FILE, METRICS_FILE))]
    if strangers:
        raise MedPLIBError(
            f"{', '.join(strangers)}: no run lies there; `medplib runs FOLDER` lists those below a folder"
        )
    runs = [read_run(folder) for folder in folders]
    sections: dict[str, list[Mapping[str, Any]]] = {
        "recipe": [run.recipe for run in runs],
        "code and machine": [
            {n: run.attempt.get(n) for n in ("git", "versions", "host", "gpus", "world_size")} for run in runs
        ],
        "data": [run.record.get("data") or {} for run in runs],
    }
    heading = ["", *(_shown(run.folder) for run in runs)]
    parts = [list_text(runs)]
    for title, nested in sections.items():
        rows = [
            row for row in _rows([dict(_flat(one)) for one in nested]) if len({*row[1:]}) > 1 and row[0] != "output"
        ]
        parts.append(f"{title}:\n{_table([heading, *rows])}" if rows else f"{title}: the same")
    figures = [{**run.last, **{f"best {name}": value for name, value in run.best.items()}} for run in runs]
    parts.append(f"figures:\n{_table([heading, *_rows(figures)])}")
    sys.stdout.write("\n\n".join(parts) + "\n")
    return 0


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Nested values by dotted key."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _rows(values: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Each key with its value in every mapping."""
    keys = dict.fromkeys(key for mapping in values for key in mapping)
    return [[key, *(_shown(mapping.get(key)) for mapping in values)] for key in keys]


def _shown(value: Any) -> str:
    text = "-" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 44 else f"{text[:20]}…{text[-20:]}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"  {line}".rstrip() for line in lines)
