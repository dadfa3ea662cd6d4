"""Run by every rank: several training runs, one after another, in processes that are started once.

Arguments: recipe files. One with ``+`` before it was run already; it loses its newest checkpoint and is resumed, its
first result being kept as ``first/`` and ``first.jsonl``.
"""

from __future__ import annotations

import shutil
import sys

from torch import distributed

from model.train import Recipe, load_recipe
from model.train.checkpoints import list_checkpoints
from model.train.loop import Trainer
from model.train.process import leave


def main() -> None:
    for argument in sys.argv[1:]:
        recipe, resume = load_recipe(argument.removeprefix("+")), argument.startswith("+")
        if resume:
            forget_the_end(recipe)
        trainer = Trainer(recipe)
        trainer.set_up(resume=resume)
        trainer.train()
        assert trainer.journal is not None
        trainer.journal.close()  # the ranks stay together for the next run
    leave()


def forget_the_end(recipe: Recipe) -> None:
    distributed.barrier()
    if distributed.get_rank() == 0:
        recipe.merged.rename(recipe.folder / "first")
        shutil.copy(recipe.folder / "metrics.jsonl", recipe.folder / "first.jsonl")
        shutil.rmtree(list_checkpoints(recipe.folder)[-1])
    distributed.barrier()


if __name__ == "__main__":
    main()
