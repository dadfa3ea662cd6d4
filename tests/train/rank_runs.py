"""Run by every rank: several training runs, one after another, in processes that are started once.

Arguments: recipe files. One with ``+`` before it was run already; it loses its newest checkpoint (for each further
``+`` the next one) and is resumed, its first result being kept as ``first/`` and ``first.jsonl``. One with ``!`` is
killed while it saves step 2.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

from torch import distributed

from model.train import Recipe, load_recipe
from model.train.checkpoint import list_checkpoints
from model.train.distributed import leave
from model.train.trainer import Trainer


def main() -> None:
    for argument in sys.argv[1:]:
        recipe, resume = load_recipe(argument.lstrip("+!")), argument.startswith("+")
        if resume:
            forget_the_end(recipe, argument.count("+"))
        trainer = Trainer(recipe)
        trainer.set_up(resume=resume)
        if argument.startswith("!"):
            die_in_saving(trainer, step=2)
        trainer.train()
        assert trainer.log is not None
        trainer.log.close()  # the ranks stay together for the next run
        if trainer.record is not None:
            trainer.record.close()
    leave()


def forget_the_end(recipe: Recipe, checkpoints: int) -> None:
    distributed.barrier()
    if distributed.get_rank() == 0:
        recipe.merged.rename(recipe.folder / "first")
        shutil.copy(recipe.folder / "metrics.jsonl", recipe.folder / "first.jsonl")
        for checkpoint in list_checkpoints(recipe.folder)[-checkpoints:]:
            shutil.rmtree(checkpoint)
    distributed.barrier()


def die_in_saving(trainer: Trainer, step: int) -> None:
    """Kill this rank without a word when its engine has written its part of a checkpoint, which lacks the rest."""
    save = trainer.engine.save

    def save_and_die(folder: Path) -> None:
        save(folder)
        if trainer.step_number == step:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.engine.save = save_and_die  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
