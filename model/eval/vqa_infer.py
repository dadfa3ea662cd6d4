"""``python model/eval/vqa_infer.py …``: answer every question of a data file, on one device or many.

Runs by its path or as ``python -m model.eval.vqa_infer``, alone or under ``torchrun``, ``accelerate launch`` and
``deepspeed``; see ``--help``.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run by its path: the package is not where Python looks, and this folder need not be
    sys.path[:] = [str(Path(__file__).resolve().parents[2]), *(p for p in sys.path if p != str(Path(__file__).parent))]

FAILED_QUESTIONS = 3
"""Exit code where some questions could not be answered."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    from model.errors import MedPLIBError, escape_unprintable, shown

    escape_unprintable()
    try:
        return _run(arguments)
    except MedPLIBError as error:
        sys.stderr.write(f"vqa_infer{_who()}: {error}\n")
        return 2
    except OSError as error:  # a disk that filled up on the way
        where = f"{shown(error.filename, quoted=False)}: " if error.filename else ""
        sys.stderr.write(f"vqa_infer{_who()}: {where}{error.strerror or error}; mend that and go on\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("vqa_infer: stopped; run the same command again to go on\n")
        return 130


def _run(arguments: Sequence[str] | None) -> int:
    from model.eval.flags import parse_flags

    options, local_rank = parse_flags(arguments)  # before anything that takes long to import

    from model.eval.places import Place
    from model.eval.run import run_inference, summary_lines

    place = Place.from_environment(local_rank)
    _set_up_logging(place.is_first)
    outcome = run_inference(options, place)
    if not place.is_first:  # the first one reports; a launcher would end the others at the sight of a failure
        return 0
    for line in summary_lines(outcome, options):
        sys.stdout.write(f"{line}\n")
    return FAILED_QUESTIONS if outcome.errors else 0


def _who() -> str:
    """Which process speaks, where there are several."""
    return f" (process {os.environ.get('RANK')})" if int(os.environ.get("WORLD_SIZE") or 1) > 1 else ""


def _set_up_logging(first: bool) -> None:
    """What the first process does is summary_lines; the others only warn."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logging.getLogger("model.eval").setLevel(logging.INFO if first else logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
