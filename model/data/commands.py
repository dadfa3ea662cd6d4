"""``medplib data``: checking and building data."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.errors import MedPLIBError

if TYPE_CHECKING:
    from model.data.builders.jobs import Execution

_VQA_SETS = ("vqa-rad", "slake", "pathvqa", "imageclef", "pmc-vqa", "omnimedvqa")


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
    _add_sa_med2d(builders)
    _add_sets(builders)
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
    from model.data.builders.cases import ReadOptions, parse_splits
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


def _add_sets(builders: argparse._SubParsersAction) -> None:
    command = builders.add_parser("mecovqa", help="MeCoVQA's files, mended, without what cannot be trained on")
    _add_path(command, "--source", "folder of MeCoVQA, or one of its files")
    _add_path(command, "--images", "SAMed2D_v1, with images/ and masks/")
    command.add_argument(
        "--merge", action="store_true", help="also write the merged masks that are missing into DIR/masks_merged"
    )
    _add_build_options(command, run_published)

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
    _add_build_options(command, run_published)

    command = builders.add_parser("llava-med", help="LLaVA-Med's alignment set, for stage I")
    _add_path(command, "--source", "llava_med_alignment_500k.json", metavar="FILE")
    _add_path(command, "--images", "folder of the downloaded images")
    _add_build_options(command, run_published)


def _add_sa_med2d(builders: argparse._SubParsersAction) -> None:
    command = builders.add_parser(
        "sa-med2d", help="SA-Med2D-20M: index, splits, merged masks and grounding records", allow_abbrev=False
    )
    _add_path(command, "--source", "where images/ and masks/ of SA-Med2D-20M are")
    _add_build_options(command, run_sa_med2d, "do not look into images and masks")
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
    command.add_argument("--format", choices=("jsonl", "parquet"), default="jsonl", help="of the records")


def _add_path(command: argparse.ArgumentParser, flag: str, text: str, metavar: str = "DIR") -> None:
    command.add_argument(flag, type=Path, required=True, metavar=metavar, help=text)


def _add_build_options(command: argparse.ArgumentParser, run: object, pixels: str = "") -> None:
    command.add_argument(
        "--no-pixels",
        action="store_true",
        help=pixels or "only see whether files exist, instead of decoding each: faster, and broken files stay in",
    )
    _add_path(command, "--out", "where the results go")
    command.add_argument("--workers", type=int, metavar="N", help="processes; as many as processors when absent")
    command.add_argument("--overwrite", action="store_true", help="start anew, whatever DIR holds")
    command.add_argument(
        "--same-source",
        action="store_true",
        help="go on although the source lies elsewhere or was copied: its data are what they were",
    )
    command.set_defaults(run=run)


def run_data_check(options: argparse.Namespace) -> int:
    """``medplib data check``: exit 1 when there are problems."""
    from model.data.validate import check_file, record_bar

    lengths = None
    if options.model is not None:
        from model.checkpoint.directories import resolve
        from model.data.packing import LengthCheck
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

    from model.data.phantom import build_phantoms

    if options.num_images < 1:
        raise MedPLIBError(f"--num-images is {options.num_images}; give at least 1")
    with tqdm(total=options.num_images, unit="image", desc="phantoms") as bar:
        build_phantoms(options.out, options.num_images, options.seed, workers=options.workers, progress=bar.update)
    sys.stdout.write(
        f"wrote {options.num_images} images with vqa.json, region.json and grounding.json to {options.out}\n"
    )
    return 0


def run_published(options: argparse.Namespace) -> int:
    """``medplib data build`` of ``mecovqa``, ``vqa`` and ``llava-med``: exit 1 if there is nothing to train on."""
    from model.data.builders.published import build_llava_med, build_mecovqa
    from model.data.builders.vqa import build_vqa

    execution, check = _execution(options), not options.no_pixels
    if options.builder == "vqa":
        more = {"images_root": options.images_root, "language": options.language, "check_pixels": check}
        report = build_vqa(options.name, options.source, options.out, execution, **more)
        root = report.settings["images_root"]
    else:
        root, sources = options.images, (options.source, options.images, options.out, execution)
        if options.builder == "mecovqa":
            report = build_mecovqa(*sources, check_pixels=check, merge=options.merge)
        else:
            report = build_llava_med(*sources, check_pixels=check)
    sys.stdout.write(report.format() + "\n")
    if any(not name.startswith("findings_") for name in report.files):
        start = f"paths in the records start from {root}"
        sys.stdout.write(f"{start}: give that as --images, or as a recipe's data.images\n")
        return 0
    why = "the source holds no record"
    if report.findings:
        why = f"no record is left to train on; {report.findings_file} says why; mend that and give the same command "
        why += "with --overwrite"
    sys.stderr.write(f"medplib: {why}\n")
    return 1


def run_sa_med2d(options: argparse.Namespace) -> int:
    """``medplib data build sa-med2d``."""
    from model.data.builders.cases import SplitPlan, parse_splits
    from model.data.builders.sa_med2d import Quota, SaMed2dSettings, build_sa_med2d

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
