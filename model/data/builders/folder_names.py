"""The CSV that a user gives with a folder of masks: what a file, a pixel value or a class is called."""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from model.errors import MedPLIBError

Kind = Literal["file", "value", "class"]

_COLUMNS: dict[str, Kind] = {
    **dict.fromkeys(("file", "filename", "file_name", "mask"), "file"),
    **dict.fromkeys(("value", "pixel", "pixel_value", "label_value", "intensity", "index"), "value"),
    **dict.fromkeys(("class", "class_id", "folder", "key"), "class"),
}
_NAME_COLUMNS = ("name", "class_name", "structure", "organ", "label")
_DELIMITERS = ",;\t"
_EXPECTED = "a first line file,name or value,name or class,name and a row for each"


@dataclass(frozen=True)
class Names:
    """What masks show.

    Attributes:
        kind: what the keys are.
        names: key → name; keys are in small letters, composed (NFC), and pixel values decimal numbers.
    """

    kind: Kind
    names: dict[str, str]

    def of_class(self, token: str) -> str | None:
        """The key that ``token`` of a file or folder name means: itself, as a number, or without an instance number."""
        token = token.casefold()
        for text in (token, re.sub(r"[-_.]\d+$", "", token)):
            if text in self.names:
                return text
            if text.isdecimal() and str(int(text)) in self.names:
                return str(int(text))
        return None

    def of_file(self, folder: Path, relative: str) -> str | None:
        """The key that names a mask: its path below the folder of masks, its bare name, or a longer end of its path."""
        path, whole = Path(relative.casefold()), Path(composed(str(folder.absolute() / relative)).casefold()).parts
        listed = [path.as_posix(), path.with_suffix("").as_posix(), path.name, path.stem]
        listed += [Path(*whole[start:]).as_posix() for start in range(len(whole))]
        return next((text for text in listed if text in self.names), None)


def read_names(file: Path) -> Names:
    """The table of a CSV with commas, semicolons or tabs.

    Raises:
        MedPLIBError: it is unreadable or not of the form expected; the line is named.
    """
    text = _text(file)
    lines = text.splitlines()
    header = next((line for line in lines if line.strip()), "")
    delimiter = max(_DELIMITERS, key=lambda sign: header.count(sign))
    try:
        rows = list(csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True))
    except csv.Error as error:
        raise MedPLIBError(f"{file} cannot be read as CSV ({error}); expected {_EXPECTED}") from error
    numbered = [(number, row) for number, row in enumerate(rows, start=1) if any(cell.strip() for cell in row)]
    if not numbered:
        raise MedPLIBError(f"{file} is empty; expected {_EXPECTED}")
    columns = [cell.strip().casefold() for cell in numbered[0][1]]
    kind_at = next((place for place, name in enumerate(columns) if name in _COLUMNS), None)
    name_at = next((columns.index(name) for name in _NAME_COLUMNS if name in columns), None)
    if kind_at is None or name_at is None:
        raise MedPLIBError(f"{file} begins with {header.strip()[:60]!r:.80}; expected {_EXPECTED}")
    kind = _COLUMNS[columns[kind_at]]
    names: dict[str, str] = {}
    for number, row in numbered[1:]:
        if name_at == len(columns) - 1 and len(row) > len(columns):  # a name with the delimiter in it, unquoted
            row = [*row[:name_at], f"{delimiter} ".join(cell.strip() for cell in row[name_at:])]
        if len(row) <= max(kind_at, name_at):
            raise MedPLIBError(f"{file}, line {number}: {len(row)} fields, expected {len(columns)}")
        key, name = _key(row[kind_at], kind, file, number), _name(row[name_at], file, number)
        if names.setdefault(key, name) != name:
            raise MedPLIBError(
                f"{file}, line {number}: {key:.80} is {name!r:.80} here, {names[key]!r:.80} above; keep one"
            )
    if kind == "value":
        names.pop("0", None)  # the background
    if not names:
        raise MedPLIBError(f"{file} names nothing; expected {_EXPECTED}")
    return Names(kind, names)


def _text(file: Path) -> str:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise MedPLIBError(f"cannot read {file}: {error.strerror}; give the CSV of names") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise MedPLIBError(f"{file} is not UTF-8 text; save it as CSV in UTF-8") from None
    return composed(text).replace("\r\n", "\n").replace("\r", "\n")


def composed(text: str) -> str:
    """Letters and their accents as one sign each: Macs write file names with the two apart, tables have them as one."""
    return unicodedata.normalize("NFC", text)


def _key(cell: str, kind: Kind, file: Path, number: int) -> str:
    text = cell.strip().casefold().replace("\\", "/")
    if kind == "value":
        try:
            return str(int(text))
        except ValueError:
            raise MedPLIBError(f"{file}, line {number}: the value {cell!r:.80} is not a whole number") from None
    if not text:
        raise MedPLIBError(f"{file}, line {number}: there is no {kind}")
    return str(int(text)) if kind == "class" and text.isdecimal() else text


def _name(cell: str, file: Path, number: int) -> str:
    name = " ".join(cell.split())
    if not name or "<" in name or ">" in name:
        raise MedPLIBError(f"{file}, line {number}: the name {cell!r:.80} is empty or holds < or >; write it in words")
    return name
