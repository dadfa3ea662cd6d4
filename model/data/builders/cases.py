"""What every layout of own data becomes: cases with targets, labels and splits; names in paths and tables of names."""

from __future__ import annotations

import csv
import io
import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from model.data.image_io import ImageData, MaskData
from model.errors import MedPLIBError, shown


@dataclass(frozen=True)
class Target:
    """One named structure of a case."""

    name: str  # what it is called in questions ("optic disc")
    # gives its mask, bool [H, W] of the image's size; picklable. An empty mask says that it is absent. A ``MaskData``
    # instead brings a note on how it was read
    read: Callable[[], NDArray[np.bool_] | MaskData]
    origin: str  # the file (and value, color or annotation) that it comes from, for messages


@dataclass(frozen=True)
class Case:
    """One image, or one slice of a volume."""

    key: str  # unique in the source and good as a file name without suffix
    # a readable picture that records may point to as it lies, or a picklable function that gives its pixels, which are
    # then written to ``OUT/images/KEY.png``
    image: Path | Callable[[], ImageData]
    targets: tuple[Target, ...] = ()  # the structures with masks
    absent: tuple[str, ...] = ()  # names that the source states are not in this image
    foreign: tuple[str, ...] = ()  # targets of other kinds of images, which such an image cannot show
    # classes of the whole image, name → value ("diagnosis" → "melanoma")
    labels: Mapping[str, str] = field(default_factory=dict)
    # (question, answer) pairs that the source brings; ``<mask>`` and ``<region>`` tags name files by absolute paths
    questions: tuple[tuple[str, str], ...] = ()
    conversation: bool = False  # whether ``questions`` are the turns of one conversation, instead of a record each
    patient: str | None = None  # what no two splits may share; None where the source does not say
    split: str | None = None  # ``train``, ``validation`` or ``test`` where the source says; None leaves it to the build
    modality: str | None = None  # one of ``schema.MODALITIES``; None where unknown
    spacing_mm: tuple[float, float] | None = None  # (row, column) distance of pixels
    volume: str | None = None  # name of the volume that the slice is of; None for a picture
    plane: str | None = None  # ``axial``, ``coronal`` or ``sagittal`` of a slice
    slice_index: int | None = None  # which slice of the volume, from 0
    terms: str = ""  # what the source says on the use of this image
    origin: str = ""  # the file that the image comes from, for messages


@dataclass(frozen=True)
class Problem:
    """Something of the source that is left out or in doubt: ``kind`` is a stable word, ``fix`` says what would help."""

    kind: str
    file: str
    message: str
    fix: str


@dataclass
class Source:
    """A recognised source."""

    kind: str  # the layout's name, as ``--kind`` takes it
    summary: str  # one sentence on what was recognised ("nnU-Net: 20 CT volumes, labels liver and tumor")
    # gives the cases in a fixed order without decoding pixels; each call starts anew
    cases: Callable[[], Iterator[Case]]
    problems: list[Problem] = field(default_factory=list)  # filled while the cases are listed
    terms: str = ""  # what the source says on the use of the whole set


@dataclass(frozen=True)
class ReadOptions:
    """What a user may state about a source, from the command line."""

    modality: str = ""  # of all images; empty leaves it to the source
    target: str = ""  # name of the structure where masks bear none; empty leaves it to the source
    plane: str = "acquired"  # of slices; ``acquired`` is the plane of the thickest spacing
    window: tuple[float, float] | None = None  # (lower, upper) value of slices, or None for the modality's own
    every: int = 1  # take each N-th slice of a volume
    names: Path | None = None  # CSV of class values or mask names and what they are called; None without one
    # regular expression whose first group (or match) in a path is the patient; empty without one
    patient_pattern: str = ""


Recognize = Callable[[Path, ReadOptions], Source | None]
"""Gives the source at a folder or one file, or None if it has another layout; cheap, no pixels."""

DEFAULT_SHARES = {"train": 0.9, "validation": 0.05, "test": 0.05}
ZERO_SHOT = "zero_shot"
"""The split of data sets that are held out whole."""


@dataclass(frozen=True)
class SplitPlan:
    """Which split a case belongs to; it depends on data set, case and seed alone, whatever else is in the set."""

    shares: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_SHARES))  # split → share, summing to 1
    seed: int = 0  # another one draws other cases
    hold_out: frozenset[str] = frozenset()  # data sets that go to ``ZERO_SHOT`` as a whole

    @property
    def names(self) -> tuple[str, ...]:
        """All splits, in the order given."""
        return (*self.shares, ZERO_SHOT) if self.hold_out else tuple(self.shares)

    def of(self, dataset: str, case: str) -> str:
        """The split of one case."""
        if dataset in self.hold_out:
            return ZERO_SHOT
        place = fraction(self.seed, dataset, case)
        end = 0.0
        for name, share in self.shares.items():
            end += share
            if place < end:
                return name
        return list(self.shares)[-1]  # sums of floats may end just below 1

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the settings of a build."""
        return {"splits": dict(self.shares), "split_seed": self.seed, "hold_out": sorted(self.hold_out)}


def parse_splits(text: str) -> dict[str, float]:
    """Shares from ``train=0.9,validation=0.05,test=0.05``. Raises MedPLIBError: it is not of that form, or the shares
    do not sum to 1."""
    shares: dict[str, float] = {}
    for entry in text.split(","):
        name, _, number = (word.strip() for word in entry.partition("="))
        try:
            share = float(number)
        except ValueError:
            share = math.nan
        if not name.isidentifier() or name in shares or not 0 < share <= 1 or name == ZERO_SHOT:
            raise MedPLIBError(f"--splits holds {entry!r:.80}; give shares such as train=0.9,validation=0.05,test=0.05")
        shares[name] = share
    if not math.isclose(sum(shares.values()), 1.0, abs_tol=1e-6):
        raise MedPLIBError(f"--splits sums to {sum(shares.values()):g}; give shares that sum to 1")
    return shares


def fraction(seed: int, *words: str) -> float:
    """A number in [0, 1) that is drawn by seed and words, the same on every machine."""
    return draw(seed, *words) / 2.0**64


def draw(seed: int, *words: str) -> int:
    """The same as an integer of 64 bits."""
    return int.from_bytes(blake2b("\0".join((str(seed), *words)).encode(), digest_size=8).digest(), "big")


def exact_sizes(shares: Mapping[str, float], count: int) -> dict[str, int]:
    """How many of ``count`` things each split gets: its share rounded; one each first, to the largest shares first."""
    if count < len(shares):
        return {name: int(name in sorted(shares, key=lambda one: -shares[one])[:count]) for name in shares}
    sizes = {name: max(int(share * count + 1e-9), 1) for name, share in shares.items()}
    while (missing := count - sum(sizes.values())) != 0:  # to whom most is owed, from who has most too much
        change = 1 if missing > 0 else -1
        able = [name for name in shares if change > 0 or sizes[name] > 1]
        sizes[max(able, key=lambda name: change * (shares[name] * count - sizes[name]))] += change
    return sizes


def spread(wanted: int, available: Iterable[int]) -> list[int]:
    """Take ``wanted`` things out of boxes as evenly as their contents allow; the first boxes give what is left over."""
    boxes = list(available)
    taken = [0] * len(boxes)
    left = min(wanted, sum(boxes))
    open_boxes = [number for number, size in enumerate(boxes) if size]
    while left:
        each, extra = divmod(left, len(open_boxes))
        for place, number in enumerate(open_boxes):
            more = min(each + (place < extra), boxes[number] - taken[number])
            taken[number] += more
            left -= more
        open_boxes = [number for number in open_boxes if boxes[number] > taken[number]]
    return taken


IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".dcm", ".dicom"}  # what the readers decode
)
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "tr", "trainset"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "ts", "testset"), "test"),
}
Kind = Literal["file", "value", "class", "color"]

_COLUMNS: dict[str, Kind] = {
    **dict.fromkeys(("file", "filename", "file_name", "mask"), "file"),
    **dict.fromkeys(("value", "pixel", "pixel_value", "label_value", "intensity", "index"), "value"),
    **dict.fromkeys(("class", "class_id", "folder", "key"), "class"),
    **dict.fromkeys(("color", "colour", "rgb", "hex", "r", "red"), "color"),
}
_NAME_COLUMNS = ("name", "class_name", "structure", "organ", "label")
_DELIMITERS = ",;\t"
_EXPECTED = "a first line file,name or value,name or class,name or color,name and a row for each"
_NUMBER = re.compile(r"\d+")
_HEX = re.compile(r"#?[0-9a-f]{6}")
_NAMED_CASES = tuple(
    re.compile(rf"(?<![^\W_])({words})[-_. ]?(\d++)", re.IGNORECASE)
    for words in ("patient|pat|pt|subject|subj|sub|case|person|participant|p", "study|exam|volume|vol|scan")
)
_DATE = re.compile(
    r"(?<!\d)(?:(?:19|20)\d\d([-_.]?)(?:0[1-9]|1[0-2])\1(?:0[1-9]|[12]\d|3[01])"
    r"|(?:0[1-9]|[12]\d|3[01])([-_.])(?:0[1-9]|1[0-2])\2(?:19|20)\d\d)(?!\d)"
)
# A folder of a split is no patient, as ISIC2018_Task1-2_Training_Input.
_SPLIT_NAME = re.compile(r"(?<![^\W_\d])(?:train(?:ing)?|val(?:id(?:ation)?)?|test(?:ing)?)(?![^\W_\d])", re.IGNORECASE)
_NO_PERSON = re.compile(r"[-_. ]*(?:image|img|dscn?|pic|photo|scan|ct|mr|us|xr)?[-_. ]*", re.I)  # before a date
_VIEWS = re.compile(
    r"(?:[-_. ]+(?:l|r|lt|rt|left|right|od|os|cc|mlo|ml|lm|ap|pa|ll|lat|lateral|frontal|oblique|ax|axial|cor|coronal|"
    r"sag|sagittal|t1|t1c|t1ce|t1w|t2|t2w|flair|pd|dwi|adc|dce|pre|post))+$",
    re.IGNORECASE,
)


def named_patient(key: str) -> str | None:
    """The patient that a path names by a word and a number (``patient02``, ``case_7``); None where it does not."""
    match = next((match for rule in _NAMED_CASES if (match := rule.search(key))), None)
    return None if match is None else f"{match[1]}{match[2]}".casefold()


def patient_of(key: str, pattern: re.Pattern[str] | None = None) -> str:
    """The patient of an image, from its path in the source without suffix; docs/data.md has the rules as a table.
    Raises MedPLIBError: the pattern is not found in it."""
    if pattern is not None:
        match = pattern.search(key)
        if match is None:
            raise MedPLIBError(
                f"--patient-pattern {shown(pattern.pattern)} is not found in {shown(key)}; it must fit every image"
            )
        return (match[1] if pattern.groups else match[0]) or key
    named = named_patient(key)
    if named is not None:
        return named
    folder, _, name = key.rpartition("/")
    date = _DATE.search(name)
    if date is not None and not _NO_PERSON.fullmatch(name[: date.start()]):
        return key[: len(key) - len(name) + date.start()].rstrip("-_. ")
    bare = _VIEWS.sub("", name)
    *before, last = [match.start() for match in _NUMBER.finditer(bare)] or [0]
    if before:
        return key[: len(key) - len(name) + last]
    own = key[: len(key) - len(name)] + bare
    while folder and (not _NUMBER.search(name := folder.rpartition("/")[2]) or _SPLIT_NAME.search(name)):
        folder = folder.rpartition("/")[0]
    return folder or (own if _NUMBER.search(bare) else key)


def split_in(path: str) -> str | None:
    """The split that a folder or a file name begins or ends with (``train/a.png``, ``instances_val2017``)."""
    for part in reversed(Path(re.sub(r"\.[a-z]+$", "", path)).parts):
        words = re.split(r"[-_. ]+", re.sub(r"\d+", "", part.casefold()))
        found = next(
            (SPLIT_WORDS[word] for word in (words[0], words[-1]) if len(word) > 2 and word in SPLIT_WORDS), None
        )
        if found:
            return found
    return None


def file_key(text: str) -> str:
    """A file name of any text, not longer than file systems allow for two of them; another for another text."""
    plain = re.sub(r"[^\w.-]+", "-", text.replace("/", "__")).strip("-")
    short = plain.encode()[:100].decode(errors="ignore")
    return plain if short == text.replace("/", "__") else f"{short or 'x'}-{draw(0, text) % 16**6:06x}"


def without_suffix(relative: str) -> str:
    """A path without an image's suffix; an identifier's dots in the name of a bare DICOM file are no suffix."""
    path = Path(relative)
    return (path.with_suffix("") if path.suffix.lower() in IMAGE_SUFFIXES else path).as_posix()


def image_files(root: Path, problems: list[Problem]) -> Iterator[str]:
    """Paths of images below ``root`` in a fixed order, without hidden ones; links lead to nothing twice."""
    seen = {os.path.realpath(root)}

    def unlisted(error: OSError) -> None:
        file = os.fsencode(error.filename).decode("utf-8", "backslashreplace")
        problems.append(Problem("unreadable_folder", file, f"{error.strerror}", "give yourself the right to read it"))

    for place, folders, files in os.walk(root, onerror=unlisted, followlinks=True):
        inside = sorted(
            (name for name in folders if name[0] != "."), key=lambda name: (Path(place, name).is_symlink(), name)
        )
        folders.clear()
        for name in inside:
            real = os.path.realpath(Path(place, name))
            if real not in seen:
                seen.add(real)
                folders.append(name)
        for name in sorted(files):
            file = Path(place, name)
            if name.startswith("."):
                continue
            try:
                name.encode()
                if file.suffix.lower() in IMAGE_SUFFIXES or _is_bare_dicom(file):
                    yield file.relative_to(root).as_posix()
            except UnicodeEncodeError:
                listed = os.fsencode(file).decode("utf-8", "backslashreplace")
                problems.append(Problem("odd_name", listed, "its name is not in UTF-8", "give it another name"))
            except OSError as error:
                problems.append(Problem("unreadable_image", str(file), f"{error.strerror}", "mend or remove it"))


def terms_of(root: Path) -> str:
    """First line of a source's licence file; empty without one."""
    for file in sorted(root.glob("[Ll][Ii][Cc][Ee][Nn][CcSs][Ee]*")):
        if file.is_file():
            lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
            return next((line.strip()[:200] for line in lines if line.strip()), "")
    return ""


def _is_bare_dicom(file: Path) -> bool:
    """DICOM files often have no suffix, or the end of an identifier for one."""
    if file.suffix and not file.suffix[1:].isdecimal():
        return False
    with file.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


@dataclass(frozen=True)
class Names:
    """What masks show."""

    kind: Kind  # what the keys are
    # key → name; keys are in small letters, composed (NFC), pixel values decimal numbers, colors "r g b"
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
    """The table of a CSV with commas, semicolons or tabs. Raises MedPLIBError: it is unreadable or not of the form
    expected; the line is named."""
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
        cell = " ".join(row[kind_at : kind_at + 3]) if columns[kind_at] in ("r", "red") else row[kind_at]
        key, name = _key(cell, kind, file, number), _name(row[name_at], file, number)
        if names.setdefault(key, name) != name:
            raise MedPLIBError(
                f"{file}, line {number}: {key:.80} is {name!r:.80} here, {names[key]!r:.80} above; keep one"
            )
    names.pop({"value": "0", "color": "0 0 0"}.get(kind, ""), None)  # the background
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
    if kind == "color":
        parts = [int(text.lstrip("#")[at : at + 2], 16) for at in (0, 2, 4)] if _HEX.fullmatch(text) else None
        parts = parts or [int(part) for part in _NUMBER.findall(text)]
        if len(parts) != 3 or max(parts) > 255:
            raise MedPLIBError(f"{file}, line {number}: the color {cell!r:.80} is neither #rrggbb nor three numbers")
        return " ".join(map(str, parts))
    if not text:
        raise MedPLIBError(f"{file}, line {number}: there is no {kind}")
    return str(int(text)) if kind == "class" and text.isdecimal() else text


def _name(cell: str, file: Path, number: int) -> str:
    name = " ".join(cell.split())
    if not name or "<" in name or ">" in name:
        raise MedPLIBError(f"{file}, line {number}: the name {cell!r:.80} is empty or holds < or >; write it in words")
    return name
