"""``python -m model.train RECIPE.yaml [key=value …] [--resume]``: one rank of one training stage."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from model.errors import MedPLIBError, escape_unprintable, shown
from model.train.preemption import exit_on_signals

if TYPE_CHECKING:
    from model.data.validate import RecordFacts
    from model.train.recipe import Recipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0 after training, and after SIGTERM or SIGUSR1 when all is saved; 2 after a user's error; 130 after Ctrl-C.
    """
    escape_unprintable()
    parser = argparse.ArgumentParser("python -m model.train", description="Train one stage of MedPLIB.")
    parser.add_argument("recipe", help="YAML file; the project's own are in configs/stages")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe values, e.g. optimizer.lr=1e-4")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the run folder")
    parser.add_argument("--check", action="store_true", help="check recipe, paths and records, print the plan")
    parser.add_argument("--quiet", action="store_true", help="of --check: no plan")
    parser.add_argument(
        "--processes", type=int, default=0, metavar="N", help="of --check: processes of the run; default: this launch's"
    )
    parser.add_argument("--on-bad-record", choices=("refuse", "skip"), help="the same as data.on_bad_record=…")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # launchers add it
    parser.add_argument(
        "--allow-changed-data", action="store_true", help="resume although the data set is not what it was"
    )
    options = parser.parse_intermixed_args(arguments)
    exit_on_signals()
    if options.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    if options.on_bad_record:
        options.overrides.append(f"data.on_bad_record={options.on_bad_record}")
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    first = os.environ.get("RANK", "0") == "0"  # whose messages are shown; others only warn
    logging.getLogger("model").setLevel(logging.INFO if first else logging.WARNING)
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=FutureWarning)  # for the developers of the libraries
    try:
        return _train(options)
    except MedPLIBError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except OSError as error:  # a disk that filled up on the way
        where = f"{shown(error.filename, quoted=False)}: " if error.filename else ""
        sys.stderr.write(f"{where}{error.strerror or error}; mend that and go on with --resume\n")
        return 2
    except RuntimeError as error:
        from model.train.datasets import short_of_shared_memory
        from model.train.runs import lost_ranks

        if short := short_of_shared_memory(error):
            sys.stderr.write(f"{short}\n")
            return 2
        if not (lost := lost_ranks(error)):
            raise
        sys.stderr.write(f"{lost}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("ended without saving; go on from the newest checkpoint with --resume\n")
        return 130


def _train(options: argparse.Namespace) -> int:
    from model.train import load_recipe, run
    from model.train.distributed import launched_processes
    from model.train.plan import network_problems
    from model.train.preemption import RunStopped
    from model.train.preflight import plan_lines, record_problems, start_problems

    processes = options.processes or launched_processes()
    facts: dict[str, list[RecordFacts]] = {}

    def problems(recipe: Recipe) -> list[str]:
        found = start_problems(recipe, resume=options.resume, processes=processes)
        if options.check:
            found += network_problems(recipe, Path(options.recipe)) + record_problems(recipe, facts)
        return found

    recipe = load_recipe(options.recipe, options.overrides, also=problems)
    if options.check:
        if not options.quiet:
            sys.stdout.write("\n".join(plan_lines(recipe, Path(options.recipe), facts, processes)) + "\n")
        return 0
    try:
        run(recipe, options.resume, options.allow_changed_data)
    except RunStopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"{stopped.message}\n")
        return int(str(stopped.code))
    return 0


if __name__ == "__main__":
    sys.exit(main())
