"""Shared by all YAML settings: read a file, expand ``${…}`` from the environment, suggest misspelled names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from model.errors import MedPLIBError, shown

_OPENING = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(:-|\})")
_BRACE = re.compile(r"\$\{|\}")


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Args:
        path: the file.
        what: what to call it in a refusal, such as ``recipe``.

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


def expand(text: str, environment: Mapping[str, str], missing: Callable[[str], None], *, is_path: bool = False) -> str:
    """Fill in ``${NAME}`` and ``${NAME:-default}``; a default may hold others, and is looked at only where it is taken.

    What a variable holds is taken as it is. One that is set to nothing counts as not set.

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
        end = found.end() if found[2] == "}" else _closing(text, found.end())
        if end is None:  # what nothing closes is no variable
            parts.append(found[0])
        else:
            begins = is_path and not any(parts)
            default = None if found[2] == "}" else text[found.end() : end - 1]
            parts.append(_value(found[1], default, environment, missing, begins))
        at = found.end() if end is None else end
    return "".join(parts) + text[at:]


def _value(
    name: str, default: str | None, environment: Mapping[str, str], missing: Callable[[str], None], begins: bool
) -> str:
    """What stands for one variable; ``begins``: it begins a path."""
    if value := environment.get(name):
        return str(Path.cwd() / Path(value).expanduser()) if begins else value
    if default is None:
        missing(name)
        return ""
    return expand(default, environment, missing, is_path=begins)


def _closing(text: str, start: int) -> int | None:
    """Where the default that begins at ``start`` ends, its brace included; None where nothing closes it."""
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += 1 if brace[0] == "${" else -1
        if not depth:
            return brace.end()
    return None


def nearest(name: str, known: Iterable[str]) -> str:
    """Which of the ``known`` names was probably meant; empty where there are none."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)), "")


def unknown_key(name: str, known: Iterable[str]) -> str:
    """A sentence about a key that does not exist, with the nearest one that does."""
    meant = nearest(name, known)
    name = shown(name, quoted=False)
    return f"{name} is not a key (nearest: {meant})" if meant else f"{name} is not a key"
