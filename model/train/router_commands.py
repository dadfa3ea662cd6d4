"""``medplib router-report``: which expert serves which task and position, as sentences and JSON."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from model.errors import MedPLIBError


def add_router_report_command(commands: argparse._SubParsersAction) -> None:
    """``medplib router-report CHECKPOINT_OR_RUN``."""
    report = commands.add_parser("router-report", help="count which expert serves which task and position")
    report.add_argument("source", type=Path, metavar="CHECKPOINT_OR_RUN")
    report.add_argument(
        "--data", type=Path, nargs="+", metavar="FILE", help="record files; of a run, its validation files when absent"
    )
    report.add_argument("--images", type=Path, metavar="DIR", help="folder that their paths start from")
    report.add_argument("--out", type=Path, default=Path("router-report.json"), metavar="FILE.json")
    report.add_argument("--samples", type=int, default=64, metavar="N", help="records of each task (default 64)")
    report.add_argument("--batch-size", type=int, default=8, metavar="N")
    report.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1 …")
    report.set_defaults(run=run_router_report)


def run_router_report(options: argparse.Namespace) -> int:
    """The command."""
    from model.train.durable import write_through
    from model.train.router_report import (
        as_numbers,
        chosen_records,
        examine,
        findings,
        open_examined,
        open_records,
    )

    if options.samples < 1 or options.batch_size < 1:
        raise MedPLIBError("--samples and --batch-size must be at least 1")
    files, images = _data_of(options)
    network, processor, source = open_examined(options.source)
    dataset = open_records(files, images, processor)
    indices = chosen_records(dataset, options.samples)
    examined = examine(
        network,
        processor,
        source,
        dataset,
        indices,
        device=options.device,
        batch_size=options.batch_size,
        shown=sys.stderr.isatty(),
    )
    out = options.out.with_suffix(".json")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_through(out, as_numbers(examined))
    sys.stdout.writelines(f"{sentence}\n" for sentence in findings(examined))
    sys.stdout.write(f"\nwrote {out}\n")
    return 0


def _data_of(options: argparse.Namespace) -> tuple[list[Path], Path]:
    """Record files and the folder of their images: those given, else those that a run was validated on."""
    recipe: Any = None
    if (options.source / "recipe.yaml").is_file():
        from model.train.recipe_io import load_recipe

        recipe = load_recipe(options.source / "recipe.yaml").data
    files = options.data or [Path(path) for path in (recipe.validation or recipe.train if recipe else ())]
    if not files:
        raise MedPLIBError(f"{options.source} is no run that names records; give --data FILE… and --images DIR")
    if not options.data and not files[0].exists():
        raise MedPLIBError(
            f"{options.source} names {files[0]}, which is not here; call this from the folder that it was trained in, "
            "or give --data FILE… and --images DIR"
        )
    images = options.images
    if images is None and recipe is not None and not options.data:
        roots = set(recipe.validation_images or recipe.images if recipe.validation else recipe.images)
        images = Path(roots.pop()) if len(roots) == 1 else None
    if images is None:
        raise MedPLIBError("--images is missing; give the folder that the records' paths start from")
    return files, images
