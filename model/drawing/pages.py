"""HTML elements with automatic escaping: only ``Markup`` is taken as it is."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable
from functools import cache
from importlib import resources

from markupsafe import Markup, escape

LONGEST_TEXT = 600
"""Characters of a question or an answer that a page shows; the files beside it hold all of it."""

_VOID = frozenset(("br", "hr", "img", "meta", "link", "input", "col"))
_UNSEEN = frozenset(("Cc", "Cf", "Cs", "Co", "Cn"))
_MANY_BLANKS = re.compile(r"[^\S\n]{3,}|\n{3,}")


def element(name: str, /, *children: object, **attributes: object) -> Markup:
    """One element.

    Args:
        name: of the tag.
        children: ``Markup``, or values that are escaped; None and empty text are left out.
        attributes: a trailing underscore is dropped and others become hyphens; None and False leave the attribute out.
    """
    named = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(value)}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _VOID:
        return Markup(f"<{name}{named}>")
    return Markup(f"<{name}{named}>{joined(children)}</{name}>")


def joined(parts: Iterable[object], separator: str = "") -> Markup:
    """Parts one after the other, escaped where they are not ``Markup``."""
    return Markup(separator.join(escape(part) for part in parts if part is not None and part != ""))


def quoted(value: str, longest: int = LONGEST_TEXT) -> Markup:
    """Text that a model or a data file wrote, made visible and harmless: cut to ``longest`` characters, unseen
    characters (control, direction, lone halves of pairs) replaced by their numbers, runs of blanks shortened."""
    cut = value[: longest + 1]
    shown = _MANY_BLANKS.sub(lambda match: match[0][:2], cut)
    shown = "".join(c if c == "\n" or unicodedata.category(c) not in _UNSEEN else f"⟨U+{ord(c):04X}⟩" for c in shown)
    rest = len(value) - longest
    more = element("span", f" … {rest} more characters", class_="more") if rest > 0 else ""
    if rest > 0:
        shown = shown[:longest]
    if not shown.strip():
        return element("span", "nothing", class_="nothing")
    return element("bdi", shown, more, class_="said")


def number(value: float | None, digits: int = 3, *, signed: bool = False) -> str:
    """A number with a fixed count of decimals and a true minus sign; a dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    shown = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    if not shown.strip("+-0."):  # no sign at a zero
        shown = shown.lstrip("+-")
    return shown.replace("-", "−")


def percent(share: float, digits: int = 0) -> str:
    """A share of 1 in hundredths, with the sign set off as everywhere on the pages."""
    return f"{100 * share:.{digits}f} %"


def interval(low: float, high: float, digits: int = 3, *, signed: bool = False) -> str:
    """A confidence interval; a dash where there is none."""
    if math.isnan(low) or math.isnan(high):
        return "–"
    return f"{number(low, digits, signed=signed)} to {number(high, digits, signed=signed)}"


def breakable(value: object) -> Markup:
    """Text, such as a path, that may break after its slashes."""
    return value if isinstance(value, Markup) else Markup(str(escape(value)).replace("/", "/<wbr>"))


def count(value: int) -> str:
    """A whole number with thin spaces between thousands."""
    return f"{value:,}".replace(",", "\u202f")


def page(title: str, body: object) -> str:
    """A whole page that needs nothing from anywhere else: the style is inside, scripts there are none."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("title", title),
        element("style", Markup(_style())),
    )
    return f"<!doctype html>\n{element('html', head, element('body', element('main', body)), lang='en')}\n"


_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Even a slip in this file could not make a page run or fetch anything."""


@cache
def _style() -> str:
    return resources.files("model.drawing").joinpath("assets", "report.css").read_text(encoding="utf-8")
