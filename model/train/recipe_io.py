"""Recipes from YAML, ``key=value`` overrides and the environment; every problem is told at once."""

from __future__ import annotations

import math
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from model.errors import MedPLIBError
from model.train.recipe import Recipe
from model.train.recipe_checks import check_values
from model.train.stages import PUBLISHED
from model.yaml_files import expand, read_mapping, unknown_key

RECIPE_FILE = "recipe.yaml"
"""Name of the recipe that is saved in every run folder."""


def load_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    also: Callable[[Recipe], list[str]] | None = None,
) -> Recipe:
    """Read a recipe file, lay overrides over it and check the whole.

    Values not in the file are the published ones of its stage (reference §6). ``${NAME}`` and ``${NAME:-default}``
    in a value come from the environment.

    Args:
        path: YAML file with at least ``stage``.
        overrides: ``section.key=value`` strings; values are YAML, so lists are ``[a,b]``.
        environment: variables to expand; the process's own by default.
        also: finds more problems, such as paths that do not exist, which are told with the others.

    Raises:
        MedPLIBError: listing every unknown key, wrong type, wrong value and unset variable.
    """
    problems: list[str] = []
    if not Path(path).exists():
        raise MedPLIBError(f"there is no recipe at {path}; the project's own are in configs/stages")
    values = read_mapping(Path(path), "recipe")
    for text in overrides:
        lay_override(values, text, problems)
    return _finish(values, f"recipe {path}", problems, os.environ if environment is None else environment, also)


def recipe_from(values: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Recipe:
    """A checked recipe from nested plain values, over the published settings of its ``stage``.

    Raises:
        MedPLIBError: as ``load_recipe``.
    """
    return _finish(dict(values), "the recipe", [], os.environ if environment is None else environment)


def save_recipe(recipe: Recipe, folder: Path) -> Path:
    """Write ``recipe`` into ``folder`` as ``recipe.yaml``, complete, and return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{RECIPE_FILE}.partial"
    partial.write_text(recipe_text(recipe), encoding="utf-8")
    return partial.replace(folder / RECIPE_FILE)


def recipe_text(recipe: Recipe) -> str:
    """The complete recipe as YAML, which ``load_recipe`` reads back as the same."""
    return yaml.safe_dump(_plain(asdict(recipe)), sort_keys=False, allow_unicode=True)


_MAY_CHANGE = (
    *("output", "logging", "saving", "validation"),
    *("data.workers", "data.feature_cache", "optimiser.max_bad_steps", "schedule.epochs", "schedule.max_steps"),
    *("engine.device", "engine.attention"),
)


def differences(old: Recipe, new: Recipe) -> list[str]:
    """Keys whose values differ, but for those that a resumed run may change."""
    changed = []
    before, after = asdict(old), asdict(new)
    for section, value in before.items():
        if not isinstance(value, dict):
            changed += [section] if value != after[section] else []
        else:
            changed += [f"{section}.{key}" for key in value if value[key] != after[section][key]]
    return [key for key in changed if key not in _MAY_CHANGE and key.split(".")[0] not in _MAY_CHANGE]


def _finish(
    values: dict[str, Any],
    where: str,
    problems: list[str],
    environment: Mapping[str, str],
    also: Callable[[Recipe], list[str]] | None = None,
) -> Recipe:
    stage = values.get("stage")
    if not isinstance(stage, int) or stage not in PUBLISHED:
        problems.append(f"stage is {stage!r:.80}, expected one of {', '.join(map(str, PUBLISHED))}")
        stage = 1
    expanded = _expand(values, "", problems, environment)
    recipe = _build(Recipe, _layered(PUBLISHED[stage], expanded), "", problems, PUBLISHED[stage])
    known = {_subject(problem) for problem in problems}  # what stands in for a faulty value is not blamed too
    found = check_values(recipe) + (also(recipe) if also else [])
    problems = list(dict.fromkeys([*problems, *(problem for problem in found if _subject(problem) not in known)]))
    if problems:
        raise MedPLIBError(f"{where} has {told_together(problems)}")
    return recipe


def told_together(problems: Sequence[str]) -> str:
    """Problems counted and listed, in one sentence."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return f"{count}: {'; '.join(problems)}"


def _subject(problem: str) -> str:
    """The key that a problem is about, without the number of a list's item."""
    return problem.split(maxsplit=1)[0].split("[")[0]


def lay_override(values: dict[str, Any], text: str, problems: list[str]) -> None:
    """Set one ``section.key=value`` in nested values; what is wrong with it goes to ``problems``."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        problems.append(f"{text!r:.80} is not of the form key=value")
        return
    try:
        parsed = yaml.safe_load(value) if value else ""
    except yaml.YAMLError:
        parsed = value
    *sections, last = key.split(".")
    place = values
    for section in sections:
        below = place.setdefault(section, {})
        if not isinstance(below, dict):
            problems.append(f"{key} goes below {section}, which is a single value")
            return
        place = below
    place[last] = parsed


def _layered(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        known = result.get(key)
        both = isinstance(known, Mapping) and isinstance(value, Mapping)
        result[key] = _layered(known, value) if both else value  # type: ignore[arg-type]
    return result


def _expand(value: Any, name: str, problems: list[str], environment: Mapping[str, str]) -> Any:
    """Replace ``${NAME}`` in every string below ``value``."""
    if isinstance(value, dict):
        return {k: _expand(v, f"{name}.{k}".lstrip("."), problems, environment) for k, v in value.items()}
    if isinstance(value, list):
        return [_expand(item, name, problems, environment) for item in value]
    if not isinstance(value, str):
        return value

    def missing(variable: str) -> None:
        problems.append(f"{name} needs the environment variable {variable}, which is not set (or give {name}=…)")

    return expand(value, environment, missing)


def _build(
    kind: type[Any], values: Mapping[str, Any], prefix: str, problems: list[str], published: Mapping[str, Any]
) -> Any:
    """An object of dataclass ``kind`` from plain values; what does not fit goes to ``problems``, published values stand
    in for it.
    """
    hints = typing.get_type_hints(kind)
    known = {item.name for item in fields(kind)}
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in known:
            problems.append(unknown_key(name, (f"{prefix}{item}" for item in known)))
        elif is_dataclass(hints[key]):
            if isinstance(value, Mapping):
                section = typing.cast("type[Any]", hints[key])
                arguments[key] = _build(section, value, f"{name}.", problems, published.get(key, {}))
            else:
                problems.append(f"{name} is a section with keys, got {value!r:.80}")
        else:
            try:
                arguments[key] = _coerce(value, hints[key])
            except (TypeError, ValueError) as error:
                problems.append(f"{name} is {value!r:.80}, expected {error}")
                if key in published:
                    arguments[key] = _coerce(published[key], hints[key])
    return kind(**arguments)


def _coerce(value: Any, hint: Any) -> Any:
    """``value`` as ``hint``; raises with what was expected. YAML reads ``1e-4`` as text, so numbers are parsed."""
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise ValueError(f"one of {', '.join(map(str, typing.get_args(hint)))}")
        return value
    if typing.get_origin(hint) is tuple:
        if value is None:
            return ()
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_coerce(item, typing.get_args(hint)[0]) for item in items if item != "")
    if typing.get_origin(hint) is dict:
        return _coerce_mapping(value, typing.get_args(hint)[1])
    return _coerce_scalar(value, hint)


def _coerce_mapping(value: Any, hint: Any) -> dict[str, Any]:
    """Labels and values; nothing at all is an empty mapping."""
    if value is None or value == "":
        return {}
    if not isinstance(value, Mapping):
        raise ValueError("labels with numbers, as in {first: 1, second: 2}")
    return {str(label): _coerce_scalar(item, hint) for label, item in value.items()}


def _coerce_scalar(value: Any, hint: Any) -> Any:
    if isinstance(hint, types.UnionType):
        raise TypeError("a plain type")
    if hint is bool:
        if not isinstance(value, bool):
            raise ValueError("true or false")
        return value
    if hint is str:
        if value is None:
            return ""
        if not isinstance(value, (str, int, float)):
            raise ValueError("text")
        return str(value)
    wanted = "a whole number" if hint is int else "a number"
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(wanted)
    try:
        number = float(value)
    except ValueError:
        raise ValueError(wanted) from None
    if not math.isfinite(number):
        raise ValueError(f"{wanted} that is finite")
    if hint is int:
        if number != int(number):
            raise ValueError(wanted)
        return int(number)
    return number


def _plain(value: Any) -> Any:
    """Tuples as lists, so that the YAML stays plain."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
