"""Recipes from YAML, ``key=value`` overrides and the environment; every problem is told at once."""

from __future__ import annotations

import difflib
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from model.errors import MedPLIBError
from model.train.recipe import Recipe
from model.train.stages import PUBLISHED
from model.train.trainable import LORA_TARGETS, PARTS

RECIPE_FILE = "recipe.yaml"
"""Name of the recipe that is saved in every run folder."""

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> Recipe:
    """Read a recipe file, lay overrides over it and check the whole.

    Values not in the file are the published ones of its stage (reference §6). ``${NAME}`` and ``${NAME:-default}``
    in a value come from the environment.

    Args:
        path: YAML file with at least ``stage``.
        overrides: ``section.key=value`` strings; values are YAML, so lists are ``[a,b]``.
        environment: variables to expand; the process's own by default.

    Raises:
        MedPLIBError: listing every unknown key, wrong type, wrong value and unset variable.
    """
    problems: list[str] = []
    values = _read_yaml(Path(path))
    for text in overrides:
        _lay_override(values, text, problems)
    return _finish(values, f"recipe {path}", problems, os.environ if environment is None else environment)


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
    partial.write_text(yaml.safe_dump(_plain(asdict(recipe)), sort_keys=False, allow_unicode=True))
    return partial.replace(folder / RECIPE_FILE)


_MAY_CHANGE = ("output", "logging", "saving", "validation", "data.workers", "engine.device", "engine.attention")


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


def _finish(values: dict[str, Any], where: str, problems: list[str], environment: Mapping[str, str]) -> Recipe:
    stage = values.get("stage")
    if not isinstance(stage, int) or stage not in PUBLISHED:
        problems.append(f"stage is {stage!r}, expected one of {', '.join(map(str, PUBLISHED))}")
        stage = 1
    expanded = _expand(values, "", problems, environment)
    recipe = _build(Recipe, _layered(PUBLISHED[stage], expanded), "", problems)
    if not problems:
        problems.extend(_check_values(recipe))
    problems = list(dict.fromkeys(problems))
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise MedPLIBError(f"{where} has {count}: {'; '.join(problems)}")
    return recipe


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise MedPLIBError(f"there is no recipe at {path}; the project's own are in configs/stages") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise MedPLIBError(f"recipe {path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise MedPLIBError(f"recipe {path} holds {type(content).__name__}, expected keys and values")
    return content


def _lay_override(values: dict[str, Any], text: str, problems: list[str]) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        problems.append(f"{text!r} is not of the form key=value")
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

    def replace(match: re.Match[str]) -> str:
        variable, default = match.groups()
        if environment.get(variable):
            return environment[variable]
        if default is None:
            problems.append(f"{name} needs the environment variable {variable}, which is not set (or give {name}=…)")
        return default or ""

    return _VARIABLE.sub(replace, value)


def _build(kind: type[Any], values: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
    """An object of dataclass ``kind`` from plain values; whatever does not fit goes to ``problems``."""
    hints = typing.get_type_hints(kind)
    known = {item.name for item in fields(kind)}
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in known:
            problems.append(_unknown(name, (f"{prefix}{item}" for item in known)))
        elif is_dataclass(hints[key]):
            if isinstance(value, Mapping):
                arguments[key] = _build(typing.cast("type[Any]", hints[key]), value, f"{name}.", problems)
            else:
                problems.append(f"{name} is a section with keys, got {value!r}")
        else:
            try:
                arguments[key] = _coerce(value, hints[key])
            except (TypeError, ValueError) as error:
                problems.append(f"{name} is {value!r}, expected {error}")
    return kind(**arguments)


def _unknown(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    return f"{name} is not a key (nearest: {nearest[0]})" if nearest else f"{name} is not a key"


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
    return _coerce_scalar(value, hint)


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
    if hint is int:
        if number != int(number):
            raise ValueError(wanted)
        return int(number)
    return number


def _check_values(recipe: Recipe) -> list[str]:
    """Values of the right type that no run can use."""
    problems = []
    if not recipe.output:
        problems.append("output is empty; give the run folder, output=DIR")
    if not recipe.data.train:
        problems.append("data.train is empty; give at least one record file")
    problems += [
        _unknown(f"trainable part {part}", (f"trainable part {known}" for known in PARTS))
        for part in recipe.trainable
        if part not in PARTS and not part.startswith("re:")
    ]
    problems += [
        f"lora target {target} is unknown; known: {', '.join(LORA_TARGETS)}"
        for target in recipe.lora.targets
        if target not in LORA_TARGETS
    ]
    if recipe.lora.rank and not recipe.lora.targets:
        problems.append("lora.rank is set but lora.targets is empty")
    if not recipe.lora.rank and not recipe.trainable:
        problems.append("nothing would be trained; name parts in trainable or set lora.rank")
    return problems + _check_ranges(recipe)


def _check_ranges(recipe: Recipe) -> list[str]:
    lowest: dict[str, tuple[float, float]] = {
        "schedule.epochs": (recipe.schedule.epochs, 1),
        "schedule.batch_size": (recipe.schedule.batch_size, 1),
        "schedule.accumulation": (recipe.schedule.accumulation, 1),
        "schedule.max_steps": (recipe.schedule.max_steps, 0),
        "data.max_length": (recipe.data.max_length, 8),
        "data.workers": (recipe.data.workers, 0),
        "optimiser.lr": (recipe.optimiser.lr, 0),
        "optimiser.clip": (recipe.optimiser.clip, 0),
        "lora.rank": (recipe.lora.rank, 0),
        "validation.batch_size": (recipe.validation.batch_size, 1),
        "saving.keep": (recipe.saving.keep, 1),
    }
    problems = [
        f"{name} is {value:g}, expected at least {low:g}" for name, (value, low) in lowest.items() if value < low
    ]
    if recipe.data.shares and len(recipe.data.shares) != len(recipe.data.train):
        problems.append(f"data.shares has {len(recipe.data.shares)} numbers for {len(recipe.data.train)} train files")
    if len(recipe.optimiser.betas) != 2:
        problems.append(f"optimiser.betas has {len(recipe.optimiser.betas)} numbers, expected 2")
    if not 0 <= recipe.optimiser.warmup <= 1:
        problems.append(f"optimiser.warmup is {recipe.optimiser.warmup:g}, expected a share between 0 and 1")
    if recipe.engine.zero_stage not in (0, 1, 2, 3):
        problems.append(f"engine.zero_stage is {recipe.engine.zero_stage}, expected 0, 1, 2 or 3")
    if recipe.mixture.top_k not in (1, 2):
        problems.append(f"mixture.top_k is {recipe.mixture.top_k}, expected 1 or 2")
    return problems


def _plain(value: Any) -> Any:
    """Tuples as lists, so that the YAML stays plain."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
