"""``medplib data build mecovqa|vqa|llava-med|folder``: flags and what is told at the end."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from model.data.builders.work import BuildReport
from model.data.builders.work_options import add_build_options, execution_of, tell

_VQA_SETS = ("vqa-rad", "slake", "pathvqa", "imageclef", "pmc-vqa", "omnimedvqa")


def add_sets(builders: argparse._SubParsersAction) -> None:
    """The builders of record files."""
    _add_mecovqa(builders)
    _add_vqa(builders)
    _add_llava_med(builders)
    _add_folder(builders)


def _add_mecovqa(builders: argparse._SubParsersAction) -> None:
    command = builders.add_parser("mecovqa", help="MeCoVQA's files, mended, without what cannot be trained on")
    command.add_argument(
        "--source", type=Path, required=True, metavar="DIR", help="folder of MeCoVQA, or one of its files"
    )
    command.add_argument(
        "--images", type=Path, required=True, metavar="DIR", help="SAMed2D_v1, with images/ and masks/"
    )
    command.add_argument(
        "--merge", action="store_true", help="also write the merged masks that are missing into DIR/masks_merged"
    )
    _add_pixels(command)
    add_build_options(command)
    command.set_defaults(run=run_mecovqa)


def _add_vqa(builders: argparse._SubParsersAction) -> None:
    command = builders.add_parser("vqa", help="public question sets in the form their sources publish them in")
    command.add_argument("--set", required=True, choices=_VQA_SETS, dest="name", help="which one")
    command.add_argument("--source", type=Path, required=True, metavar="DIR", help="its unpacked folder")
    command.add_argument(
        "--images-root",
        type=Path,
        metavar="DIR",
        help="folder that the paths in the records are to start from: --source when absent, --out where images are "
        "inside the question files; give that of your other sets to train on all together",
    )
    command.add_argument("--language", choices=("en", "zh", "all"), default="en", help="of SLAKE's questions")
    _add_pixels(command)
    add_build_options(command)
    command.set_defaults(run=run_vqa)


def _add_llava_med(builders: argparse._SubParsersAction) -> None:
    command = builders.add_parser("llava-med", help="LLaVA-Med's alignment set, for stage I")
    command.add_argument("--source", type=Path, required=True, metavar="FILE", help="llava_med_alignment_500k.json")
    command.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the downloaded images")
    _add_pixels(command)
    add_build_options(command)
    command.set_defaults(run=run_llava_med)


def _add_folder(builders: argparse._SubParsersAction) -> None:
    command = builders.add_parser("folder", help="your own folder of images and masks, with a CSV of names")
    command.add_argument("--images", type=Path, required=True, metavar="DIR", help="images, in any folders inside")
    command.add_argument(
        "--masks",
        type=Path,
        required=True,
        metavar="DIR",
        help="a.png, a_liver.png or liver/a.png for a.png, or label maps",
    )
    command.add_argument(
        "--names",
        type=Path,
        required=True,
        metavar="CSV",
        help="what masks show; its first line is file,name or value,name (label maps) or class,name",
    )
    command.add_argument("--modality", default="", metavar="WORD", help="of all images: ct, mr, x_ray, pet …")
    command.add_argument(
        "--case-pattern",
        default="",
        metavar="REGEX",
        help="its first group is the case in an image's path, so that no case is in two splits; docs/data.md "
        "says what is taken when absent",
    )
    command.add_argument(
        "--splits", metavar="SHARES", help="shares of the cases, such as train=0.8,validation=0.1,test=0.1"
    )
    command.add_argument("--seed", type=int, default=0, metavar="S", help="of splits and wordings")
    command.add_argument(
        "--absent", action="store_true", help="also ask for what a label map or an empty mask says is not there"
    )
    add_build_options(command)
    command.set_defaults(run=run_folder)


def _add_pixels(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--no-pixels",
        action="store_true",
        help="only see whether files exist, instead of decoding each: faster, and broken files stay in",
    )


def run_mecovqa(options: argparse.Namespace) -> int:
    """``medplib data build mecovqa``."""
    from model.data.builders.mecovqa import build_mecovqa

    report = build_mecovqa(
        options.source,
        options.images,
        options.out,
        execution_of(options),
        check_pixels=not options.no_pixels,
        merge=options.merge,
    )
    return _told(report, options.images)


def run_vqa(options: argparse.Namespace) -> int:
    """``medplib data build vqa``."""
    from model.data.builders.vqa_build import build_vqa

    report = build_vqa(
        options.name,
        options.source,
        options.out,
        execution_of(options),
        images_root=options.images_root,
        language=options.language,
        check_pixels=not options.no_pixels,
    )
    return _told(report, report.settings["images_root"])


def run_llava_med(options: argparse.Namespace) -> int:
    """``medplib data build llava-med``."""
    from model.data.builders.llava_med import build_llava_med

    report = build_llava_med(
        options.source, options.images, options.out, execution_of(options), check_pixels=not options.no_pixels
    )
    return _told(report, options.images)


def run_folder(options: argparse.Namespace) -> int:
    """``medplib data build folder``."""
    from model.data.builders.folder import DEFAULT_SPLITS, FolderSettings, build_folder
    from model.data.builders.splits import parse_splits
    from model.data.builders.vqa_rows import modality_name

    settings = FolderSettings(
        modality=modality_name(options.modality),
        case_pattern=options.case_pattern,
        splits=parse_splits(options.splits) if options.splits else DEFAULT_SPLITS,
        seed=options.seed,
        absent=options.absent,
    )
    report = build_folder(options.images, options.masks, options.names, options.out, execution_of(options), settings)
    return _told(report, options.out)


def _told(report: BuildReport, images_root: Path | str) -> int:
    """Print what was built and what to do with it; the exit code is 1 if there is nothing to train on."""
    tell(report)
    made = [name for name in report.files if not name.startswith("findings_")]
    lost = sorted(set(report.counts.get("cases", {})) - set(report.counts.get("images", {})))
    if made and lost:
        sys.stderr.write(
            f"medplib: {', '.join(lost)} has no record, as no image of its cases has a usable mask; "
            f"{report.findings_file} says why\n"
        )
    if made:
        sys.stdout.write(
            f"paths in the records start from {images_root}: give that as --images, or as a recipe's data.images\n"
        )
    elif report.findings:
        sys.stderr.write(
            f"medplib: no record is left to train on; {report.findings_file} says why; mend that and give the same "
            "command with --overwrite\n"
        )
    else:
        sys.stderr.write("medplib: the source holds no record\n")
    return 0 if made else 1
