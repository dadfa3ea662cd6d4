"""``medplib data``: checking and building data."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from model.data.builders.commands import add_sa_med2d, add_sets
from model.errors import MedPLIBError


def add_data_command(commands: argparse._SubParsersAction) -> None:
    """``medplib data check`` and ``medplib data build …``; each builder adds itself in one line."""
    data = commands.add_parser("data", help="check or build data").add_subparsers(
        dest="verb", required=True, parser_class=_DataParser
    )
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
    build = data.add_parser("build", help="make data: medplib data build SOURCE --out DIR, or a builder's name")
    builders = build.add_subparsers(dest="builder", required=True, metavar="SOURCE")
    _add_source(builders)
    _add_phantom(builders)
    add_sa_med2d(builders)
    add_sets(builders)
    build.builders = frozenset(builders.choices) - {"SOURCE"}


class _DataParser(argparse.ArgumentParser):
    """Takes a first word that is no builder's name as a source of the user's own."""

    builders: frozenset[str] = frozenset()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.builders and args and args[0] not in self.builders and args[0] not in ("-h", "--help"):
            if args[0] == "folder" and {"--images", "--masks"} & set(args):
                self.error(
                    "data build folder is now data build SOURCE --out DIR: give the folder that holds images and masks "
                    "(for a folder of that name, ./folder); --case-pattern is --patient-pattern"
                )
            args = ["SOURCE", *args]
        return super().parse_known_args(args, namespace)


def _add_source(builders: argparse._SubParsersAction) -> None:
    own = builders.add_parser("SOURCE", help="your own data: a folder or file of any usual layout")
    own.add_argument("source", type=Path, metavar="SOURCE", help="folder or file; ./phantom for one named as a builder")
    own.add_argument("--out", type=Path, metavar="DIR", help="folder of the results")
    own.add_argument("--kind", default="", metavar="LAYOUT", help="read it as this layout instead of recognizing it")
    own.add_argument("--dry-run", action="store_true", help="read and list everything, write nothing")
    own.add_argument("--modality", default="", metavar="WORD", help="of all images: ct, mr, x_ray, pet …")
    own.add_argument("--target", default="", metavar="NAME", help="what masks show that bear no name")
    own.add_argument("--names", type=Path, metavar="CSV", help="class,name or file,name or value,name or color,name")
    own.add_argument(
        "--plane", choices=("acquired", "axial", "coronal", "sagittal"), default="acquired", help="of a volume's slices"
    )
    own.add_argument(
        "--window",
        nargs="+",
        metavar="LOW HIGH",
        help="values shown black and white, or soft_tissue, lung, bone or brain",
    )
    own.add_argument("--every", type=int, default=1, metavar="N", help="take each N-th slice of a volume")
    own.add_argument(
        "--patient-pattern", default="", metavar="REGEX", help="its first group in an image's path is the patient"
    )
    own.add_argument(
        "--splits",
        metavar="SHARES",
        help="of the patients, such as train=0.8,validation=0.1,test=0.1 (default); replaces the source's own splits",
    )
    own.add_argument("--ask-modality", action="store_true", help="also where all images have the same")
    own.add_argument("--seed", type=int, default=0, metavar="S", help="of splits, wordings and choices")
    own.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes")
    own.add_argument("--overwrite", action="store_true", help="replace another build in DIR")
    own.set_defaults(run=run_build_source)


def run_build_source(options: argparse.Namespace) -> int:
    """``medplib data build SOURCE``."""
    from tqdm import tqdm

    from model.data.builders.build import BuildSettings, build_dataset
    from model.data.builders.cases import ReadOptions
    from model.data.builders.splits import parse_splits
    from model.data.volumes import parse_window

    if options.out is None and not options.dry_run:
        raise MedPLIBError("--out is missing; give the folder of the results, or --dry-run to only look")
    if options.every < 1 or options.workers < 1:
        raise MedPLIBError(f"--every is {options.every} and --workers {options.workers}; give at least 1")
    settings = BuildSettings(
        ReadOptions(
            modality=options.modality,
            target=options.target.strip(),
            plane=options.plane,
            window=parse_window(options.window) if options.window else None,
            every=options.every,
            names=options.names,
            patient_pattern=options.patient_pattern,
        ),
        kind=options.kind,
        splits=parse_splits(options.splits) if options.splits else None,
        seed=options.seed,
        ask_modality=options.ask_modality,
    )
    with tqdm(unit="image", desc="reading", leave=False, disable=None) as bar:
        build_dataset(
            options.source,
            options.out,
            settings,
            workers=options.workers,
            dry_run=options.dry_run,
            overwrite=options.overwrite,
            report=lambda line: tqdm.write(line, file=sys.stdout),
            progress=bar.update,
        )
    return 0


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
