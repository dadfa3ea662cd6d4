"""Run by every rank: several training runs, one after another, in processes that are started once.

Arguments: recipe files; one with ``+`` before it resumes.
"""

from __future__ import annotations

import sys

from model.train import load_recipe
from model.train.loop import Trainer
from model.train.process import leave


def main() -> None:
    for argument in sys.argv[1:]:
        trainer = Trainer(load_recipe(argument.removeprefix("+")))
        trainer.set_up(resume=argument.startswith("+"))
        trainer.train()
        trainer.journal.close()  # the ranks stay together for the next run
    leave()


if __name__ == "__main__":
    main()
