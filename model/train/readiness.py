"""What keeps a well-formed recipe from starting here: paths, the run folder, DeepSpeed's file, and the records where
they are asked about; all told at once.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from model.checkpoint.directories import resolve
from model.data.dataset import UnusableRecords, usable_records
from model.data.lengths import LengthCheck
from model.data.progress import record_bar
from model.data.validate import RecordFacts
from model.errors import MedPLIBError
from model.processing.conversation import TEMPLATES
from model.processing.tokens import build_tokenizer
from model.train.balance import labels_by_kind, share_problems
from model.train.datasets import data_files
from model.train.engine import deepspeed_config
from model.train.recipe import Data, Recipe
from model.train.recipe_checks import check_values
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


def record_problems(recipe: Recipe) -> list[str]:
    """Everything that training would refuse about the records themselves, without a network, a sentence each.

    A path that does not exist is left to ``start_problems``. Shares are tried against the records where every training
    file has some that can be used.
    """
    problems: list[str] = []
    lengths = _lengths(recipe)
    found = [_checked(recipe, path, images, lengths, problems) for path, images in data_files(recipe, training=True)]
    for path, images in data_files(recipe, training=False):
        _checked(recipe, path, images, lengths, problems)
    if found and all(found):
        files = [(path, len(facts)) for path, facts in zip(recipe.data.train, found, strict=True)]
        facts = [fact for part in found for fact in part]
        kinds = labels_by_kind(files, [fact.task for fact in facts], [fact.modality for fact in facts])
        problems += share_problems(kinds, _with_sound_shares(recipe))
    return problems


def _lengths(recipe: Recipe) -> LengthCheck | None:
    """Counts tokens as the recipe's run will; what is wrong with its tokenizer or template is told elsewhere."""
    tokenizer = None
    with suppress(MedPLIBError):
        tokenizer = build_tokenizer(resolve(recipe.model.base))
    known = recipe.data.template in TEMPLATES
    return LengthCheck(tokenizer, recipe.data.template, recipe.data.max_length) if known else None


def _checked(
    recipe: Recipe, path: str, images: str, lengths: LengthCheck | None, problems: list[str]
) -> list[RecordFacts]:
    """Facts of a file's usable records; what is wrong with it is added to ``problems``."""
    if not path or not images or not Path(path).exists() or not Path(images).exists():
        return []
    try:
        with record_bar(f"checking {path}", shown=recipe.logging.progress) as progress:
            _, usable, _ = usable_records(path, images, recipe.data.on_bad_record, progress, lengths)
    except UnusableRecords as error:
        problems.append(str(error))
        usable = error.usable
    except MedPLIBError as error:
        problems.append(str(error))
        return []
    return [fact for _, fact in usable]


def _with_sound_shares(recipe: Recipe) -> Data:
    """Without the shares that are wrong whatever the records are, which are told already."""
    told = check_values(recipe)
    empty: dict[str, Any] = {"shares": (), "task_shares": {}, "modality_shares": {}}
    wrong = [name for name in empty if any(problem.startswith(f"data.{name}") for problem in told)]
    return replace(recipe.data, **{name: empty[name] for name in wrong})
