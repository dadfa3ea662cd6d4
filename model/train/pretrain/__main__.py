"""``python -m model.train.pretrain STEP …``: make the starting points of a small model from phantoms alone."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from model.errors import MedPLIBError, escape_unprintable
from model.train.pretrain.workshop import STEPS, Workshop


def main(arguments: list[str] | None = None) -> int:
    """Run pre-training steps in the order given; returns the exit code."""
    escape_unprintable()
    parser = argparse.ArgumentParser(prog="python -m model.train.pretrain", description=__doc__)
    parser.add_argument("steps", nargs="+", choices=[*STEPS, "all"], help="what to make, in this order")
    parser.add_argument("--config", type=Path, default=Path("configs/nano/pretrain.yaml"), help="sizes and lengths")
    parser.add_argument("--out", type=Path, required=True, help="folder of everything that is made")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that render scenes")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        workshop = Workshop(options.config, options.out, options.workers)
        for step in STEPS if "all" in options.steps else options.steps:
            workshop.make(step)
    except MedPLIBError as error:
        logging.getLogger(__name__).error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
