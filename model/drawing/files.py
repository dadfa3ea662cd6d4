"""Pages on disk: whole or not at all."""

from __future__ import annotations

from pathlib import Path

from model.errors import MedPLIBError


def check_page_name(out: Path) -> None:
    """Refuse a name that no browser would open as a page.

    Raises:
        MedPLIBError: it does not end with ``.html``.
    """
    if out.suffix not in (".html", ".htm"):
        raise MedPLIBError(f"--out {out} is no page; give a name that ends with .html")


def write_whole(path: Path, text: str) -> None:
    """Write a text file under another name and rename it; folders above it are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
