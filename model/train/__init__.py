"""Training in four stages: ``python -m model.train RECIPE.yaml [key=value …]``, or ``run(recipe)``."""

from __future__ import annotations

from pathlib import Path

from model.train.recipe import Recipe
from model.train.recipe_io import load_recipe, recipe_from, save_recipe

__all__ = ["Recipe", "load_recipe", "recipe_from", "run", "save_recipe"]


def run(recipe: Recipe, resume: bool = False) -> Path:
    """Train one stage and write its merged checkpoint.

    Args:
        recipe: what to train.
        resume: go on from the newest checkpoint in the run folder, if there is one.

    Returns:
        The merged native directory, which the next stage starts from.

    Raises:
        MedPLIBError: the recipe, its files or its data cannot be used.
    """
    from model.train.loop import Trainer

    trainer = Trainer(recipe)
    try:
        trainer.set_up(resume)
        return trainer.train()
    finally:
        trainer.close()
