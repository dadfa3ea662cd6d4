"""``medplib runs``: list training runs, or compare some."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from model.drawing.files import check_page_name, write_whole
from model.errors import MedPLIBError


def add_runs_command(commands: argparse._SubParsersAction) -> None:
    """``medplib runs [FOLDER …]`` and ``medplib runs compare RUN RUN … [--out FILE.html]``."""
    runs = commands.add_parser("runs", help="list training runs, or compare some: runs compare A B")
    runs.add_argument("words", nargs="*", metavar="FOLDER", help="folder of runs (default runs); or: compare RUN RUN …")
    runs.add_argument("--json", action="store_true", help="print one JSON object a run")
    runs.add_argument("--out", type=Path, metavar="FILE.html", help="of compare: draw the curves over one another, too")
    runs.set_defaults(run=run_runs)


def run_runs(options: argparse.Namespace) -> int:
    """The command."""
    from model.train.runs import find_runs, list_text

    if options.words[:1] == ["compare"] and not Path("compare").is_dir():
        return _compare([Path(word) for word in options.words[1:]], options.out)
    if options.out:
        raise MedPLIBError("--out draws runs that are compared: medplib runs compare RUN RUN --out FILE.html")
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


def _compare(folders: list[Path], out: Path | None) -> int:
    from model.train.runs import loss_curve, read_run
    from model.train.runs_compare import compare_text

    if len(folders) < 2:
        raise MedPLIBError(
            "compare wants two or more run folders: medplib runs compare RUN RUN; `medplib curves RUN` draws one"
        )
    strangers = [str(folder) for folder in folders if not _is_run(folder)]
    if strangers:
        raise MedPLIBError(
            f"{', '.join(strangers)}: no run lies there; `medplib runs FOLDER` lists those below a folder"
        )
    if out:
        check_page_name(out)
    runs = [read_run(folder) for folder in folders]
    sys.stdout.write(compare_text(runs, [loss_curve(run.folder) for run in runs]) + "\n")
    if out:
        from model.train.runs_page import comparison_page

        write_whole(out, comparison_page(runs))
        sys.stdout.write(f"\nwrote {out}\n")
    return 0


def _is_run(folder: Path) -> bool:
    from model.train.journal import METRICS_FILE
    from model.train.run_record import RUN_FILE

    return any((folder / name).is_file() for name in (RUN_FILE, METRICS_FILE))


def _plain(run: Any) -> dict[str, Any]:
    kept = {"folder": str(run.folder), "status": run.status, "commit": run.commit, "seconds": run.seconds}
    return {**run.record, **kept, "last": dict(run.last), "best": run.best}
