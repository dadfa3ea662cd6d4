"""Training in four stages: ``python -m model.train RECIPE.yaml [key=value …]``, or ``run(recipe)``."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.train.recipe import Recipe, load_recipe, recipe_from, save_recipe

__all__ = ["Recipe", "load_recipe", "recipe_from", "run", "save_recipe"]


def __getattr__(name: str) -> Any:
    """Imported when first used, so that no other command, nor any process of a data build, pays for torch."""
    if name not in __all__:
        raise AttributeError(f"module 'model.train' has no attribute {name!r}")
    return getattr(import_module("model.train.recipe"), name)


def run(recipe: Recipe, resume: bool = False, allow_changed_data: bool = False) -> Path:
    """Train one stage and return the merged native directory, which the next stage starts from.

    Args:
        recipe: what to train.
        resume: go on from the newest whole checkpoint in the run folder, if there is one.
        allow_changed_data: go on although the data set is not what the checkpoint was trained on.

    Raises:
        MedPLIBError: recipe, files or data cannot be used, too many steps were not finite, or a disk is full.
        RunStopped: a ``SystemExit`` after SIGTERM, SIGUSR1 or Ctrl-C; what was done is saved.
    """
    from model.train.trainer import Trainer

    trainer = Trainer(recipe)
    failure: BaseException | None = None
    try:
        trainer.set_up(resume, allow_changed_data)
        return trainer.train()
    except BaseException as error:
        failure = error
        raise
    finally:
        trainer.close(failure)
