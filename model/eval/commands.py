"""``medplib eval`` and ``medplib compare``."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from pathlib import Path

from model.errors import MedPLIBError

BATCH_SIZE = 8


def add_eval_command(commands: argparse._SubParsersAction) -> None:
    """``medplib eval MODEL DATA``."""
    evaluate = commands.add_parser("eval", help="evaluate a model on a suite or on data of one's own; write a report")
    evaluate.add_argument("model", type=Path, metavar="MODEL", help="checkpoint, native or published")
    evaluate.add_argument(
        "suite",
        metavar="DATA",
        help="a record file, a folder of medplib data build, a source that it can build, a suite of the project "
        "(phantoms …; ./phantoms is the folder) or a suite's YAML file",
    )
    evaluate.add_argument("--split", default="test", help="of a built folder: test (default), validation or train")
    evaluate.add_argument("--out", type=Path, metavar="DIR", help="runs/eval/MODEL/DATA-DATE or …/SUITE when absent")
    evaluate.add_argument(
        "--data", type=Path, metavar="DIR", help="a suite's data (MEDPLIB_DATA), or the images of a record file"
    )
    evaluate.add_argument("--only", nargs="+", default=(), metavar="SET", help="only these sets of the suite")
    evaluate.add_argument("--limit", type=int, metavar="N", help="only the first N records of each set")
    evaluate.add_argument("--overwrite", action="store_true", help="start anew; a stopped run goes on otherwise")
    evaluate.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1 …")
    evaluate.add_argument("--precision", choices=("fp32", "bf16"), help="as stored when absent, fp32 on a CPU")
    evaluate.add_argument("--batch-size", type=int, default=BATCH_SIZE, metavar="N", help="questions decoded together")
    evaluate.add_argument("--vision-tower", type=Path, metavar="DIR", help="CLIP, for published checkpoints")
    evaluate.add_argument("--sam", type=Path, metavar="FILE", help="SAM-Med2D, for published checkpoints without it")
    evaluate.set_defaults(run=run_eval)


def run_eval(options: argparse.Namespace) -> int:
    """``medplib eval``: exit 3 when questions could not be asked."""
    from model.checkpoint.directories import resolve
    from model.eval.options import FAILED_QUESTIONS
    from model.eval.shards import Rank, run_folder
    from model.eval.suite import data_name, is_suite, load_suite, own_run_folder, own_suite
    from model.eval.suite_run import SuiteOptions, run_suite, summary_text

    environment = dict(os.environ)
    if options.data is not None:
        if not options.data.is_dir():
            raise MedPLIBError(f"--data {options.data} is not a directory here; give the folder of the data")
        environment["MEDPLIB_DATA"] = str(options.data)
    rank, own = Rank.from_environment(), Path(options.suite)
    if not rank.rank:  # progress lines go where a log is kept
        logging.getLogger("model.eval").setLevel(logging.INFO)
    model = resolve(options.model)
    if is_suite(options.suite):
        suite = load_suite(options.suite, environment=environment).only(options.only)
        out = options.out or run_folder("eval", model) / suite.name
    else:
        out = options.out or own_run_folder(model, data_name(own), overwrite=options.overwrite)
        cache = out.parent / f"{data_name(own)}-built"
        alone = rank.world_size == 1
        suite = own_suite(own, split=options.split, images=options.data, cache=cache, may_build=alone)
    chosen = SuiteOptions(
        model=model,
        suite=suite,
        named=options.suite,
        out=out,
        command=_command(options, out),
        device=options.device,
        precision=options.precision,
        vision_tower=options.vision_tower and resolve(options.vision_tower),
        sam=options.sam,
        batch_size=options.batch_size,
        limit=options.limit,
        overwrite=options.overwrite,
    )
    outcome = run_suite(chosen, rank)
    if outcome.result is None:
        return 0
    sys.stdout.write(f"{summary_text(outcome.result)}\n\n")
    sys.stdout.writelines(f"wrote {path}\n" for path in outcome.files)
    if outcome.errors:
        several = f"{outcome.errors} questions could not be asked, the first because"
        sys.stdout.write(
            f"{several if outcome.errors > 1 else '1 question could not be asked:'} {outcome.first_error}\n"
        )
        return FAILED_QUESTIONS
    return 0


def _command(options: argparse.Namespace, out: Path) -> str:
    """The command line that repeats a run into the same folder."""
    defaults = {"split": "test", "device": "auto", "batch_size": BATCH_SIZE}
    given = {"out": out, "data": options.data or os.environ.get("MEDPLIB_DATA")}
    names = ("split", "precision", "limit", "sam", "device", "vision_tower", "batch_size")
    given |= {name: getattr(options, name) for name in names if getattr(options, name) != defaults.get(name)}
    words = ["medplib", "eval", str(options.model), options.suite]
    for name, value in given.items():
        words += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join([*words, *(("--only", *options.only) if options.only else ())])


def add_compare_command(commands: argparse._SubParsersAction) -> None:
    """``medplib compare A B``."""
    comparing = commands.add_parser("compare", help="show whether two runs over the same questions differ")
    comparing.add_argument("first", type=Path, metavar="A", help="prediction file, or a folder of medplib eval")
    comparing.add_argument("second", type=Path, metavar="B", help="the same of the run whose gain is asked for")
    comparing.add_argument("--out", type=Path, metavar="DIR", help="for the page; runs/compare/A-and-B when absent")
    comparing.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    comparing.set_defaults(run=run_compare)


def run_compare(options: argparse.Namespace) -> int:
    """``medplib compare``."""
    from model.eval.compare import as_json_text, compare_runs, open_run, verdict_text, write_comparison

    first, second = open_run(options.first), open_run(options.second)
    found = compare_runs(first, second)
    files = write_comparison(first, second, found, options.out or _default_out(options.first, options.second))
    if options.json:
        sys.stdout.write(as_json_text(first, second, found))
        return 0
    sys.stdout.write(f"{verdict_text(found)}\n\n")
    sys.stdout.writelines(f"wrote {path}\n" for path in files)
    return 0


def _default_out(first: Path, second: Path) -> Path:
    """``runs/compare/A-and-B``; with the names of the folders above, as far as A and B are the same without."""
    parts = [path.resolve().with_suffix("" if path.is_file() else path.suffix).parts[1:] for path in (first, second)]
    longest = min(map(len, parts))
    least = next((count for count in range(1, longest) if parts[0][-count:] != parts[1][-count:]), longest)
    return Path("runs") / "compare" / "-and-".join("-".join(part[-least:]) for part in parts)
