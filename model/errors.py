"""The exception of user errors, and short printable forms of user input."""

import reprlib
import sys
from io import TextIOWrapper
from typing import Any

_LONGEST = 200
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _LONGEST


class MedPLIBError(ValueError):
    """Wrong user input, in one sentence: what was got, what was expected, how to fix it.

    Command-line faces print the sentence without a traceback and exit with 2; servers answer 4xx with it.
    A programmer's error is never a ``MedPLIBError``: it stays a traceback.
    """


def shown(value: Any, *, quoted: bool = True) -> str:
    """A value that came from a user as it stands in a sentence: at most some 200 characters, none a control character.

    ``quoted``: texts in quotation marks, as ``repr`` gives them.
    """
    if not isinstance(value, str | int | float | bytes | list | dict | None):
        value = str(value)
    if not quoted and isinstance(value, str) and value.isprintable() and len(value) <= _LONGEST:
        return value
    text = _SHORT.repr(value)
    text = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
    return text if quoted or not isinstance(value, str) else text[1:-1]


def escape_unprintable() -> None:
    """Write characters that the terminal's encoding lacks as escapes (``\\u56fe``) instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
