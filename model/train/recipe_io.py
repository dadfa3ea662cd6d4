"""Recipes from YAML, ``key=value`` overrides and the environment, and all their problems at once."""

from __future__ import annotations

import json
import math
import os
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from model.data.dataset import CACHE_AND_AUGMENTATION
from model.errors import MedPLIBError
from model.train.balance import check_shares
from model.train.journal import SCORES, TEACHER_FORCED
from model.train.recipe import Mixture, Recipe
from model.train.stages import PUBLISHED
from model.train.trainable import LORA_TARGETS, PARTS
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
        also: finds more problems, such as paths that do not exist, which are reported with the others.

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
    plain = json.loads(json.dumps(asdict(recipe)))  # tuples as lists
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


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
        if value is None or value == "":
            return {}
        if not isinstance(value, Mapping):
            raise ValueError("labels with numbers, as in {first: 1, second: 2}")
        return {str(label): _coerce(item, typing.get_args(hint)[1]) for label, item in value.items()}
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


# --- values that no run can use ---------------------------------------------------------------------------------------

_LOWEST: Mapping[str, int] = {  # of all other numbers 0
    "data.max_length": 8,
    **dict.fromkeys(("data.conversation_turns", "schedule.epochs", "schedule.batch_size", "schedule.accumulation"), 1),
    **dict.fromkeys(("optimiser.max_bad_steps", "engine.expert_parallel", "validation.batch_size"), 1),
    **dict.fromkeys(("validation.max_new_tokens", "saving.keep", "logging.every"), 1),
}
_SHARES = ("optimiser.betas", "optimiser.warmup", "lora.dropout", "validation.thresholds")
"""Keys whose values lie between 0 and 1."""
_CHECKED_APART = ("engine.zero_stage", "mixture.top_k", "mixture.num_experts", "mixture.projector_top_k")
_QUANTISED_PARTS = ("attention", "feed_forward", "decoder")
"""Trainable parts whose weights ``lora.quantise`` turns into integers."""


def check_values(recipe: Recipe) -> list[str]:
    """Everything about a recipe of the right types that no run can use, a sentence each."""
    problems = []
    if not recipe.output:
        problems.append("output is empty; give the run folder, output=DIR")
    if not recipe.data.train:
        problems.append("data.train is empty; give at least one record file")
    problems += [
        unknown_key(f"trainable part {part}", (f"trainable part {known}" for known in PARTS))
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
    if recipe.data.feature_cache and "vision_tower" in recipe.trainable:
        problems.append("data.feature_cache is set, but trainable names vision_tower, whose features change; drop one")
    if recipe.data.conversation_turns > 1 and recipe.data.template == "plain":
        problems.append("data.conversation_turns is above 1, but the template plain writes no questions; use llava_v1")
    problems += recipe.augmentation.problems()
    if recipe.data.feature_cache and not recipe.augmentation.problems() and recipe.augmentation.active:
        problems.append(CACHE_AND_AUGMENTATION)
    for part in recipe.trainable:
        try:
            re.compile(part.removeprefix("re:"))
        except re.error:
            problems.append(f"trainable pattern {part} is no regular expression")
    return problems + _check_best(recipe) + _check_ranges(recipe) + _check_mixture(recipe) + _check_scale(recipe)


def _check_best(recipe: Recipe) -> list[str]:
    """A best checkpoint, or an end without one, that no validation could find."""
    best, problems = recipe.saving.best, []
    if recipe.validation.patience and not best:
        problems.append("validation.patience is set, but saving.best names no score; give saving.best=mDice, say")
    if best and not (recipe.data.validation and recipe.validation.samples):
        problems.append(f"saving.best is {best}, which needs data.validation and validation.samples")
    known = [*SCORES, f"{TEACHER_FORCED}ce"]
    known += [f"{name}@{t:g}" for name in ("mDice", f"{TEACHER_FORCED}dice") for t in recipe.validation.thresholds]
    if best and best not in known and not any(best.startswith(f"{name}/") for name in known):
        problems.append(f"saving.best is {best:.80}, expected {', '.join(known)}, or mDice/ct, mDice/FILE …")
    return problems


def _check_ranges(recipe: Recipe) -> list[str]:
    problems = []
    for name, value in _numbers(recipe):
        if value < (low := _LOWEST.get(name, 0)):
            problems.append(f"{name} is {value:g}, expected at least {low}")
        if value > 1 and name in _SHARES:
            problems.append(f"{name} is {value:g}, expected at most 1")
    data = recipe.data
    for name, roots, files in (
        ("images", data.images, len(data.train)),
        ("validation_images", data.validation_images, len(data.validation)),
    ):
        if len(roots) not in (0, 1, files):
            problems.append(f"data.{name} has {len(roots)} folders for {files} files; give one, or one each")
    if len(data.images) > 1 and data.validation and not data.validation_images:
        problems.append("data.images has a folder for each train file, so data.validation_images must be given, too")
    shares = recipe.data.shares
    if shares and len(shares) != len(recipe.data.train):
        problems.append(f"data.shares has {len(shares)} numbers for {len(recipe.data.train)} train files")
    if shares and not sum(shares):
        problems.append("data.shares are all 0; leave them empty to draw in proportion to the files' sizes")
    problems += check_shares(recipe.data)
    if any(beta == 1 for beta in recipe.optimiser.betas):
        problems.append("optimiser.betas holds 1, expected less")
    if len(recipe.optimiser.betas) != 2:
        problems.append(f"optimiser.betas has {len(recipe.optimiser.betas)} numbers, expected 2")
    if recipe.engine.zero_stage not in (0, 1, 2, 3):
        problems.append(f"engine.zero_stage is {recipe.engine.zero_stage}, expected 0, 1, 2 or 3")
    return problems


def _numbers(recipe: Recipe) -> Iterator[tuple[str, float]]:
    """Numbers by their key, those of a list or mapping by the key of the whole; not those that are checked apart."""
    for section, values in asdict(recipe).items():
        for key, value in values.items() if isinstance(values, dict) else [("", values)]:
            name = f"{section}.{key}".rstrip(".")
            if section != "augmentation" and name not in _CHECKED_APART:
                items = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else [value]
                yield from ((name, item) for item in items if isinstance(item, int | float))


def _check_mixture(recipe: Recipe) -> list[str]:
    """Settings of stage IV that contradict one another, or that stand where nobody reads them."""
    mixture, problems = recipe.mixture, []
    if recipe.stage != 4:
        problems += ["mixture is set, but only stage 4 reads it"] if mixture != Mixture() else []
        return problems + (["model.grounding is set, but only stage 4 reads it"] if recipe.model.grounding else [])
    if recipe.model.grounding:
        unread = [name for name in ("projector", "sizes") if getattr(recipe.model, name)]
        problems += [f"model.{name} is set, but stage 4 takes it from model.base" for name in unread]
    if mixture.top_k not in (1, 2):
        problems.append(f"mixture.top_k is {mixture.top_k}, expected 1 or 2")
    if any(count < mixture.top_k for count in mixture.num_experts) or not mixture.num_experts:
        problems.append(
            f"mixture.num_experts is {list(mixture.num_experts)}, expected at least top_k ({mixture.top_k})"
        )
    if mixture.projector_experts and not 1 <= mixture.projector_top_k <= min(2, mixture.projector_experts):
        problems.append(
            f"mixture.projector_top_k is {mixture.projector_top_k}, expected 1 or 2 and no more than experts"
        )
    if mixture.projector_experts and not any(
        part == "projector" or part.startswith("re:") for part in recipe.trainable
    ):
        problems.append("mixture.projector_experts is set, but trainable lacks projector, so they would never differ")
    return problems


def _check_scale(recipe: Recipe) -> list[str]:
    """Ways of saving memory that contradict one another."""
    engine, lora, problems = recipe.engine, recipe.lora, []
    if engine.kind == "torch":
        set_ones = [name for name, off in (("offload", "none"), ("expert_parallel", 1)) if getattr(engine, name) != off]
        problems += [f"engine.{name} is set, but engine.kind is torch; use deepspeed" for name in set_ones]
    if engine.offload == "all" and engine.zero_stage != 3:
        problems.append(f"engine.offload is all, which needs engine.zero_stage=3, got {engine.zero_stage}")
    if engine.offload == "optimiser" and engine.zero_stage == 0:
        problems.append("engine.offload is optimiser, which needs engine.zero_stage 1, 2 or 3, got 0")
    if engine.expert_parallel > 1 and engine.zero_stage not in (1, 2):
        problems.append(
            f"engine.expert_parallel is {engine.expert_parallel}, which needs engine.zero_stage 1 or 2, got "
            f"{engine.zero_stage}: DeepSpeed keeps experts apart in these two alone"
        )
    if recipe.stage == 4 and any(count % max(engine.expert_parallel, 1) for count in recipe.mixture.num_experts):
        problems.append(
            f"engine.expert_parallel is {engine.expert_parallel}, expected a divisor of mixture.num_experts "
            f"{list(recipe.mixture.num_experts)}"
        )
    if lora.quantise != "none":
        problems += [] if lora.rank else [f"lora.quantise is {lora.quantise}, but lora.rank is 0; give it a rank"]
        problems += [
            f"trainable names {part}, whose weights lora.quantise={lora.quantise} freezes; leave one of them out"
            for part in recipe.trainable
            if part in _QUANTISED_PARTS
        ]
        if engine.zero_stage == 3 and engine.kind != "torch":
            problems.append(f"lora.quantise is {lora.quantise}, which ZeRO-3 cannot share out; use engine.zero_stage=2")
        if engine.expert_parallel > 1:
            problems.append("lora.quantise and engine.expert_parallel do not go together; use one of them")
    return problems
