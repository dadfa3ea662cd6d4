"""``medplib data build mecovqa|vqa|llava-med|sa-med2d``: flags, and what is printed at the end."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from model.errors import MedPLIBError

if TYPE_CHECKING:
    from model.data.builders.jobs import BuildReport, Execution

_VQA_SETS = ("vqa-rad", "slake", "pathvqa", "imageclef", "pmc-vqa", "omnimedvqa")


def add_sets(builders: argparse._SubParsersAction) -> None:
    """The builders of record files from downloads."""
    command = builders.add_parser("mecovqa", help="MeCoVQA's files, mended, without what cannot be trained on")
    _add_path(command, "--source", "folder of MeCoVQA, or one of its files")
    _add_path(command, "--images", "SAMed2D_v1, with images/ and masks/")
    command.add_argument(
        "--merge", action="store_true", help="also write the merged masks that are missing into DIR/masks_merged"
    )
    _add_options(command, run_mecovqa)

    command = builders.add_parser("vqa", help="public question sets in the form their sources publish them in")
    command.add_argument("--set", required=True, choices=_VQA_SETS, dest="name", help="which one")
    _add_path(command, "--source", "its unpacked folder")
    command.add_argument(
        "--images-root",
        type=Path,
        metavar="DIR",
        help="folder that the paths in the records are to start from: --source when absent, --out where images are "
        "inside the question files; give that of your other sets to train on all together",
    )
    command.add_argument("--language", choices=("en", "zh", "all"), default="en", help="of SLAKE's questions")
    _add_options(command, run_vqa)

    command = builders.add_parser("llava-med", help="LLaVA-Med's alignment set, for stage I")
    _add_path(command, "--source", "llava_med_alignment_500k.json", metavar="FILE")
    _add_path(command, "--images", "folder of the downloaded images")
    _add_options(command, run_llava_med)


def add_sa_med2d(builders: argparse._SubParsersAction) -> None:
    """``medplib data build sa-med2d``."""
    command = builders.add_parser(
        "sa-med2d", help="SA-Med2D-20M: index, splits, merged masks and grounding records", allow_abbrev=False
    )
    _add_path(command, "--source", "where images/ and masks/ of SA-Med2D-20M are")
    _add_build_options(command)
    command.add_argument(
        "--splits",
        default="train=0.9,validation=0.05,test=0.05",
        metavar="NAME=SHARE,…",
        help="shares of the cases of every data set (default %(default)s)",
    )
    command.add_argument(
        "--hold-out", action="append", default=[], metavar="DATASET", help="keep it whole for zero_shot; repeatable"
    )
    command.add_argument(
        "--per-modality",
        metavar="N",
        help="ask for so many targets of each modality, or ct=5000,mr=2000; for all of them when absent",
    )
    command.add_argument(
        "--absent-share", type=float, default=0.1, metavar="P", help="of questions for what is not there (default 0.1)"
    )
    command.add_argument("--seed", type=int, default=0, metavar="S", help="of sampling, absent targets and wordings")
    command.add_argument("--split-seed", type=int, default=0, metavar="S", help="of the splits")
    command.add_argument(
        "--merge", choices=("asked", "all"), help="write masks_merged/ into the source, for what is asked or for all"
    )
    command.add_argument("--no-pixels", action="store_true", help="do not look into images and masks")
    command.add_argument("--format", choices=("jsonl", "parquet"), default="jsonl", help="of the records")
    command.set_defaults(run=run_sa_med2d)


def _add_path(command: argparse.ArgumentParser, flag: str, text: str, metavar: str = "DIR") -> None:
    command.add_argument(flag, type=Path, required=True, metavar=metavar, help=text)


def _add_options(command: argparse.ArgumentParser, run: object) -> None:
    command.add_argument(
        "--no-pixels",
        action="store_true",
        help="only see whether files exist, instead of decoding each: faster, and broken files stay in",
    )
    _add_build_options(command)
    command.set_defaults(run=run)


def _add_build_options(command: argparse.ArgumentParser) -> None:
    _add_path(command, "--out", "where the results go")
    command.add_argument("--workers", type=int, metavar="N", help="processes; as many as processors when absent")
    command.add_argument("--overwrite", action="store_true", help="start anew, whatever DIR holds")
    command.add_argument(
        "--same-source",
        action="store_true",
        help="go on although the source lies elsewhere or was copied: its data are what they were",
    )


def run_mecovqa(options: argparse.Namespace) -> int:
    """``medplib data build mecovqa``."""
    from model.data.builders.mecovqa import build_mecovqa

    report = build_mecovqa(
        options.source,
        options.images,
        options.out,
        _execution(options),
        check_pixels=not options.no_pixels,
        merge=options.merge,
    )
    return _end(report, options.images)


def run_vqa(options: argparse.Namespace) -> int:
    """``medplib data build vqa``."""
    from model.data.builders.vqa import build_vqa

    report = build_vqa(
        options.name,
        options.source,
        options.out,
        _execution(options),
        images_root=options.images_root,
        language=options.language,
        check_pixels=not options.no_pixels,
    )
    return _end(report, report.settings["images_root"])


def run_llava_med(options: argparse.Namespace) -> int:
    """``medplib data build llava-med``."""
    from model.data.builders.llava_med import build_llava_med

    report = build_llava_med(
        options.source, options.images, options.out, _execution(options), check_pixels=not options.no_pixels
    )
    return _end(report, options.images)


def run_sa_med2d(options: argparse.Namespace) -> int:
    """``medplib data build sa-med2d``."""
    from model.data.builders.sa_med2d import Quota, SaMed2dSettings, build_sa_med2d
    from model.data.builders.splits import SplitPlan, parse_splits

    settings = SaMed2dSettings(
        source=options.source,
        out=options.out,
        plan=SplitPlan(parse_splits(options.splits), options.split_seed, frozenset(options.hold_out)),
        quota=Quota.parse(options.per_modality) if options.per_modality else None,
        absent_share=options.absent_share,
        seed=options.seed,
        merge=options.merge or "",
        check=not options.no_pixels,
        form=options.format,
    )
    reports = build_sa_med2d(settings, _execution(options))
    sys.stdout.write("\n\n".join(report.format() for report in reports) + "\n")
    return 0


def _execution(options: argparse.Namespace) -> Execution:
    from model.data.builders.jobs import Execution

    workers = len(os.sched_getaffinity(0)) if options.workers is None else options.workers
    if workers < 1:
        raise MedPLIBError(f"--workers is {workers}; give at least 1")
    return Execution(workers, options.overwrite, same_source=options.same_source)


def _end(report: BuildReport, images_root: Path | str) -> int:
    """Print what was built and what to do with it; the exit code is 1 if there is nothing to train on."""
    sys.stdout.write(report.format() + "\n")
    if any(not name.startswith("findings_") for name in report.files):
        sys.stdout.write(
            f"paths in the records start from {images_root}: give that as --images, or as a recipe's data.images\n"
        )
        return 0
    if report.findings:
        sys.stderr.write(
            f"medplib: no record is left to train on; {report.findings_file} says why; mend that and give the same "
            "command with --overwrite\n"
        )
    else:
        sys.stderr.write("medplib: the source holds no record\n")
    return 1
