"""Typed settings from YAML, ``a.b=c`` overrides and the environment, with all problems reported at once."""

from __future__ import annotations

import difflib
import logging
import os
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from model.errors import MedPLIBError, shown

logger = logging.getLogger(__name__)
T = TypeVar("T")

Aliases = Mapping[str, str | Mapping[str, str]]
"""Old key → new key, such as ``lora.quantise: lora.quantize``; or new key → {old value: new value}."""

Defaults = Mapping[str, Any] | Callable[[Mapping[str, Any], list[str]], Mapping[str, Any]]
_NOTHING: Mapping[str, Any] = {}
_OPENING = re.compile(r"\$\{(?:oc\.env:(?P<name>[A-Za-z_]\w*)(?P<end>,|\})|(?P<old>[A-Za-z_]\w*)(?P<old_end>:-|\}))")
_BRACE = re.compile(r"\$\{|\}")
_EXPECTED = {  # by the beginning of pydantic's type of error
    "int": "a whole number",
    "finite": "a number that is finite",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "dict": "labels with numbers, as in {{first: 1, second: 2}}",
    "greater": "at least {ge:g}",
    "less": "at most {le:g}",
}


def read_settings(
    kind: type[T],
    path: Path,
    overrides: Sequence[str] = (),
    *,
    what: str = "settings",
    environment: Mapping[str, str] | None = None,
    defaults: Defaults = _NOTHING,
    aliases: Aliases = _NOTHING,
    check: Callable[[T], list[str]] = lambda _: [],
) -> T:
    """Read a YAML file into a dataclass whose fields may be dataclasses.

    Args:
        kind: the dataclass; ranges are pydantic's, such as ``Annotated[int, Ge(1)]``.
        path: YAML file.
        overrides: ``section.key=value`` strings; values are YAML, so lists are ``[a,b]``.
        what: what to call the file in an error.
        environment: variables of ``${oc.env:NAME}``, ``${oc.env:NAME,default}`` and of the older ``${NAME}`` and
            ``${NAME:-default}``; the process's own by default.
        defaults: nested values of what the file leaves out, above the dataclass's own; or a function that finds them
            from the file's values and adds its problems to a list.
        aliases: old spellings, which are read with a warning.
        check: finds problems of settings whose types are right.

    Raises:
        MedPLIBError: listing every unknown key, wrong type, wrong value and unset variable.
    """
    problems: list[str] = []
    values = modernized(read_mapping(path, what), aliases, f"{what} {path}")
    for text in overrides:
        apply_override(values, text, problems, aliases)
    return build_settings(kind, values, f"{what} {path}", problems, environment, defaults, check)


def build_settings(
    kind: type[T],
    values: Mapping[str, Any],
    where: str,
    problems: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    defaults: Defaults = _NOTHING,
    check: Callable[[T], list[str]] = lambda _: [],
) -> T:
    """As ``read_settings``, from nested plain values; ``problems`` are those found before."""
    found = list(problems)
    below = defaults(values, found) if callable(defaults) else defaults
    expanded = _expand_all(values, "", found, os.environ if environment is None else environment)
    settings = _build(kind, _layered(below, expanded), "", found, below)
    blamed = {_subject(problem) for problem in found}  # the default of a faulty value is not blamed too
    found += [problem for problem in check(settings) if _subject(problem) not in blamed]
    if found := list(dict.fromkeys(found)):
        raise MedPLIBError(f"{where} has {count_problems(found)}")
    return settings


def count_problems(problems: Sequence[str]) -> str:
    """Problems counted and listed, in one sentence."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return f"{count}: {'; '.join(problems)}"


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """The keys and values of a YAML file, called ``what`` in an error.

    Raises:
        MedPLIBError: it cannot be read, is no YAML, or holds anything but keys and values.
    """
    try:
        content = yaml.safe_load(path.read_bytes())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise MedPLIBError(f"{what} {path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise MedPLIBError(f"{what} {path} holds {type(content).__name__}, expected keys and values")
    return content


def apply_override(values: dict[str, Any], text: str, problems: list[str], aliases: Aliases = _NOTHING) -> None:
    """Set one ``section.key=value`` in nested values; what is wrong with it goes to ``problems``."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        problems.append(f"{text!r:.80} is not of the form key=value")
        return
    try:
        parsed = yaml.safe_load(value) if value else ""
    except yaml.YAMLError:
        parsed = value
    nested: Any = parsed
    keys = key.split(".")
    for part in reversed(keys):
        nested = {part: nested}
    nested = modernized(nested, aliases, text)
    place = values
    for depth in range(len(keys)):
        ((part, nested),) = nested.items()
        if depth == len(keys) - 1:
            place[part] = nested
        elif isinstance(below := place.setdefault(part, {}), dict):
            place = below
        else:
            problems.append(f"{key} goes below {part}, which is a single value")
            return


def modernized(values: Mapping[str, Any], aliases: Aliases, where: str = "", prefix: str = "") -> dict[str, Any]:
    """Nested values with old spellings of keys and values replaced, which a warning about ``where`` names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name, new = f"{prefix}{key}", aliases.get(f"{prefix}{key}")
        if isinstance(new, str) and new.rpartition(".")[2] not in values:
            if where:
                logger.warning("%s: %s is the old spelling of %s", where, name, new)
            name, key = new, new.rpartition(".")[2]
        renamed = aliases.get(name)
        if isinstance(renamed, Mapping) and isinstance(value, str) and value in renamed:
            if where:
                logger.warning("%s: %s=%s is the old spelling of %s", where, name, value, renamed[value])
            value = renamed[value]
        found[key] = modernized(value, aliases, where, f"{name}.") if isinstance(value, dict) else value
    return found


def expand(text: str, environment: Mapping[str, str], missing: Callable[[str], None], *, is_path: bool = False) -> str:
    """Fill in ``${oc.env:NAME}`` and ``${NAME}``, with defaults ``${oc.env:NAME,default}`` and ``${NAME:-default}``.

    A default may hold variables, and is looked at only where it is taken. What a variable holds is taken as it is. One
    that is set to nothing counts as not set.

    Args:
        text: any text; what is no whole ``${…}`` stays.
        environment: values by name.
        missing: called with the name of a variable that is neither set nor has a default.
        is_path: a variable that begins the text starts from the current folder.
    """
    parts: list[str] = []
    at = 0
    while (found := _OPENING.search(text, at)) is not None:
        parts.append(text[at : found.start()])
        name, at = found["name"] or found["old"], found.end()
        has_default = (found["end"] or found["old_end"]) != "}"
        end = _closing(text, at) if has_default else at
        begins = is_path and not any(parts)
        if end is None:  # what nothing closes is no variable
            parts.append(found[0])
        elif value := environment.get(name):
            parts.append(str(Path.cwd() / Path(value).expanduser()) if begins else value)
        elif has_default:
            parts.append(expand(text[at : end - 1], environment, missing, is_path=begins))
        else:
            missing(name)
        at = at if end is None else end
    return "".join(parts) + text[at:]


def nearest(name: str, known: Iterable[str]) -> str:
    """Which of the ``known`` names was probably meant; empty where there are none."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)), "")


def unknown_key(name: str, known: Iterable[str]) -> str:
    """A sentence about a key that does not exist, with the nearest one that does."""
    meant = nearest(name, known)
    name = shown(name, quoted=False)
    return f"{name} is not a key (nearest: {meant})" if meant else f"{name} is not a key"


def _closing(text: str, start: int) -> int | None:
    """Where the default that begins at ``start`` ends, its brace included; None where nothing closes it."""
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += 1 if brace[0] == "${" else -1
        if not depth:
            return brace.end()
    return None


def _subject(problem: str) -> str:
    """The key that a problem is about, without the number of a list's item."""
    return problem.split(maxsplit=1)[0].split("[")[0]


def _layered(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        known = result.get(key)
        both = isinstance(known, Mapping) and isinstance(value, Mapping)
        result[key] = _layered(known, value) if both else value  # type: ignore[arg-type]
    return result


def _expand_all(value: Any, name: str, problems: list[str], environment: Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {k: _expand_all(v, f"{name}.{k}".lstrip("."), problems, environment) for k, v in value.items()}
    if isinstance(value, list):
        return [_expand_all(item, name, problems, environment) for item in value]
    if not isinstance(value, str):
        return value

    def missing(variable: str) -> None:
        problems.append(f"{name} needs the environment variable {variable}, which is not set (or give {name}=…)")

    return expand(value, environment, missing)


def _build(
    kind: type[Any], values: Mapping[str, Any], prefix: str, problems: list[str], defaults: Mapping[str, Any]
) -> Any:
    """A dataclass from plain values; the default stands in for what does not fit."""
    hints = _hints(kind)
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        name, hint = f"{prefix}{key}", hints.get(key)
        if hint is None:
            problems.append(unknown_key(name, (f"{prefix}{item}" for item in hints)))
        elif is_dataclass(hint):
            if isinstance(value, Mapping):
                section = typing.cast("type[Any]", hint)
                arguments[key] = _build(section, value, f"{name}.", problems, defaults.get(key, {}))
            else:
                problems.append(f"{name} is a section with keys, got {value!r:.80}")
        else:
            try:
                arguments[key] = _adapter(hint).validate_python(_plain(value, hint), strict=hint is bool or None)
            except ValidationError as found:
                error = found.errors(include_url=False)[0]
                wanted = _EXPECTED.get(error["type"].split("_")[0], "{msg}").format(**error | error.get("ctx", {}))
                if error["type"] == "literal_error":
                    wanted = f"one of {', '.join(map(str, typing.get_args(hint)))}"
                problems.append(f"{name} is {error['input']!r:.80}, expected {wanted}")
                if key in defaults:
                    arguments[key] = _adapter(hint).validate_python(defaults[key])
    return kind(**arguments)


def _hints(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {item.name: hints[item.name] for item in fields(kind)}


@lru_cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False, coerce_numbers_to_str=True))


def _plain(value: Any, hint: Any) -> Any:
    """What a YAML value means for a type: nothing is an empty text or list, one item is a list, ``1e3`` a number."""
    bare = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
    origin = typing.get_origin(bare)
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [] if value is None else [value]
        return [_plain(item, typing.get_args(bare)[0]) for item in items if item != ""]
    if origin is dict:
        value = {} if value is None or value == "" else value
        item_hint = typing.get_args(bare)[1]
        return {str(k): _plain(v, item_hint) for k, v in value.items()} if isinstance(value, Mapping) else value
    if bare is str and value is None:
        return ""
    if bare in (int, float):
        if isinstance(value, bool):
            return str(value)  # pydantic would take it for 0 or 1
        if bare is int and isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                return value
    return value
