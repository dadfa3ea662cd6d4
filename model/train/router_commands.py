"""``medplib router-report`` and ``medplib curves``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from model.drawing.files import check_page_name, write_whole
from model.errors import MedPLIBError


def add_router_report_command(commands: argparse._SubParsersAction) -> None:
    """``medplib router-report CHECKPOINT_OR_RUN``."""
    report = commands.add_parser("router-report", help="draw which expert serves which task and position")
    report.add_argument("source", type=Path, metavar="CHECKPOINT_OR_RUN")
    report.add_argument(
        "--data", type=Path, nargs="+", metavar="FILE", help="record files; of a run, its validation files when absent"
    )
    report.add_argument("--images", type=Path, metavar="DIR", help="folder that their paths start from")
    report.add_argument("--out", type=Path, default=Path("router-report.html"), metavar="FILE.html")
    report.add_argument("--samples", type=int, default=64, metavar="N", help="records of each task (default 64)")
    report.add_argument("--batch-size", type=int, default=8, metavar="N")
    report.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1 …")
    report.set_defaults(run=run_router_report)


def add_curves_command(commands: argparse._SubParsersAction) -> None:
    """``medplib curves RUN``."""
    curves = commands.add_parser("curves", help="draw the losses and scores of a run, by task and modality")
    curves.add_argument("run_folder", type=Path, metavar="RUN")
    curves.add_argument("--out", type=Path, metavar="FILE.html", help="RUN/curves.html when absent")
    curves.set_defaults(run=run_curves)


def run_router_report(options: argparse.Namespace) -> int:
    """``medplib router-report``: writes the page, and its numbers beside it."""
    from model.train.journal import ROUTER_FILE, read_rows
    from model.train.router_page import router_page
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
    check_page_name(options.out)
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
    training = read_rows(options.source / ROUTER_FILE)
    numbers = options.out.with_suffix(".json")
    write_whole(options.out, router_page(examined, training))
    write_whole(numbers, json.dumps(as_numbers(examined), indent=1, allow_nan=False) + "\n")
    sys.stdout.writelines(f"{sentence}\n" for sentence in findings(examined))
    sys.stdout.write(f"\nwrote {options.out}\nwrote {numbers}\n")
    return 0


def run_curves(options: argparse.Namespace) -> int:
    """``medplib curves``."""
    from model.train.curves import curves_page

    out = options.out or options.run_folder / "curves.html"
    check_page_name(out)
    write_whole(out, curves_page(options.run_folder))
    sys.stdout.write(f"wrote {out}\n")
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
