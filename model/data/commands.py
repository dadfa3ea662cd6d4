"""``medplib data``: checking and building data."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from model.data.builders.sa_med2d_command import add_sa_med2d
from model.data.builders.sets_commands import add_sets
from model.errors import MedPLIBError


def add_data_command(commands: argparse._SubParsersAction) -> None:
    """``medplib data check`` and ``medplib data build …``; each builder adds itself in one line."""
    data = commands.add_parser("data", help="check or build data").add_subparsers(dest="verb", required=True)
    check = data.add_parser("check", help="report all problems of a data file at once")
    check.add_argument("file", type=Path, help="JSON, JSONL or Parquet in the published format")
    check.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder that its paths start from")
    check.add_argument(
        "--model", type=Path, metavar="DIR", help="also count the tokens of each record as this checkpoint's do"
    )
    check.add_argument(
        "--max-length", type=int, metavar="N", help="most tokens of a record; the checkpoint's if absent"
    )
    check.set_defaults(run=run_data_check)
    builders = data.add_parser("build", help="make data").add_subparsers(dest="builder", required=True)
    _add_phantom(builders)
    add_sa_med2d(builders)
    add_sets(builders)


def _add_phantom(builders: argparse._SubParsersAction) -> None:
    phantom = builders.add_parser("phantom", help="synthetic images, masks and questions")
    phantom.add_argument("--out", type=Path, required=True, metavar="DIR")
    phantom.add_argument("--num-images", type=int, required=True, metavar="N")
    phantom.add_argument("--seed", type=int, default=0, metavar="S")
    phantom.add_argument("--workers", type=int, default=1)
    phantom.set_defaults(run=run_build_phantom)


def run_data_check(options: argparse.Namespace) -> int:
    """``medplib data check``: exit 1 when there are problems."""
    from model.data.progress import record_bar
    from model.data.validate import check_file

    lengths = None
    if options.model is not None:
        from model.checkpoint.directories import resolve
        from model.data.lengths import LengthCheck
        from model.processing.processor import MedPLIBProcessor

        changes = {} if options.max_length is None else {"max_length": options.max_length}
        lengths = LengthCheck.of(MedPLIBProcessor.from_pretrained(resolve(options.model), **changes))
    elif options.max_length is not None:
        raise MedPLIBError("--max-length counts tokens; give --model DIR, whose tokenizer makes them")
    with record_bar("checking") as progress:
        report = check_file(options.file, options.images, progress=progress, lengths=lengths)
    sys.stdout.write(report.format() + "\n")
    return 0 if report.ok else 1


def run_build_phantom(options: argparse.Namespace) -> int:
    """``medplib data build phantom``."""
    from tqdm import tqdm

    from model.data.builders.phantom import build_phantoms

    if options.num_images < 1:
        raise MedPLIBError(f"--num-images is {options.num_images}; give at least 1")
    with tqdm(total=options.num_images, unit="image", desc="phantoms") as bar:
        build_phantoms(options.out, options.num_images, options.seed, workers=options.workers, progress=bar.update)
    sys.stdout.write(
        f"wrote {options.num_images} images with vqa.json, region.json and grounding.json to {options.out}\n"
    )
    return 0
