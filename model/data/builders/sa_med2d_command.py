"""``medplib data build sa-med2d``: its flags, and what they come to."""

from __future__ import annotations

import argparse
from pathlib import Path

from model.data.builders.work_options import add_build_options, execution_of, tell


def add_sa_med2d(builders: argparse._SubParsersAction) -> None:
    """``medplib data build sa-med2d``."""
    command = builders.add_parser(
        "sa-med2d", help="SA-Med2D-20M: index, splits, merged masks and grounding records", allow_abbrev=False
    )
    command.add_argument(
        "--source", type=Path, required=True, metavar="DIR", help="where images/ and masks/ of SA-Med2D-20M are"
    )
    add_build_options(command)
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
    command.set_defaults(run=run_build_sa_med2d)


def run_build_sa_med2d(options: argparse.Namespace) -> int:
    """``medplib data build sa-med2d``."""
    from model.data.builders.sa_med2d import SaMed2dSettings, build_sa_med2d
    from model.data.builders.sa_med2d_sampling import Quota
    from model.data.builders.splits import SplitPlan, parse_splits

    plan = SplitPlan(parse_splits(options.splits), options.split_seed, frozenset(options.hold_out))
    settings = SaMed2dSettings(
        source=options.source,
        out=options.out,
        plan=plan,
        quota=Quota.parse(options.per_modality) if options.per_modality else None,
        absent_share=options.absent_share,
        seed=options.seed,
        merge=options.merge or "",
        check=not options.no_pixels,
        form=options.format,
    )
    return tell(*build_sa_med2d(settings, execution_of(options)))
