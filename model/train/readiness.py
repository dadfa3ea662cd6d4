"""What keeps a well-formed recipe from starting here: paths, the run folder, DeepSpeed's file; all told at once."""

from __future__ import annotations

from model.errors import MedPLIBError
from model.train.engine import deepspeed_config
from model.train.recipe import Recipe
from model.train.recipe_io import told_together
from model.train.run_folder import check_run_folder
from model.train.starting import path_problems


def start_problems(recipe: Recipe, *, resume: bool) -> list[str]:
    """Everything that is found without loading a network or reading records, a sentence each."""
    problems = path_problems(recipe)
    if recipe.engine.deepspeed and not any(problem.startswith("engine.deepspeed ") for problem in problems):
        try:
            deepspeed_config(recipe)
        except MedPLIBError as error:
            problems.append(str(error))
    if recipe.output:
        try:
            check_run_folder(recipe, resume=resume)
        except MedPLIBError as error:
            problems.append(str(error))
    return problems


def check_start(recipe: Recipe, *, resume: bool) -> None:
    """Refuse a recipe that cannot start.

    Raises:
        MedPLIBError: naming everything that is in the way.
    """
    problems = start_problems(recipe, resume=resume)
    if problems:
        raise MedPLIBError(f"stage {recipe.stage} cannot start: it has {told_together(problems)}")
