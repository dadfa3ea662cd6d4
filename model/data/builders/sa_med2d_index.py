"""The index of SA-Med2D-20M: one row an image, with its masks, in a Parquet file that is never whole in memory.

Twenty million file names are read once, by one process as folders are, and sorted into buckets on disk by data set and
case; a bucket holds all images of its cases with all their masks, and buckets become rows of the index, many at once.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import pyarrow as arrow

from model.data.builders.cases import SplitPlan
from model.data.builders.jobs import Output, Part, Piece, fingerprint
from model.data.schema import modality_of
from model.errors import MedPLIBError

CLASS_FILE = "SAMed2D_v1_class_mapping_id.json"
LIST_FILE = "SAMed2D_v1.json"
INDEX_FILE = "index.parquet"
CLASS_COUNTS = "masks by class"
"""Group of the report's counts whose labels are ``modality / data set / class id / class name``."""
NAMELESS = "(no name)"
BUCKETS = 512  # open files: below the usual limit of 1024; 40,000 names each of the real set
KINDS = ("images", "masks", "list")
BYTES_A_PIECE = 4 << 20  # of names: some 50,000
_BUFFER = 16 * 1024
_BAR_EVERY = 5000
_RELEASE = 64 << 20  # bytes of the list that stay in memory
_RAW_STRING = rb'"((?:[^"\\]++|\\.)*+)"'
_STRING = re.compile(_RAW_STRING)
_ENTRY = re.compile(rb"\s*" + _RAW_STRING + rb"\s*:\s*\[((?:[^\]\"]++|\"(?:[^\"\\]++|\\.)*+\")*+)\]\s*(,|\})")
_CLASS_AND_INSTANCE = re.compile(r"(\d+)_(\d+)")
_UNNAMED = re.compile(r"(class|label|region)?[ _]*\d*|left|right|background|others?|unknown", re.IGNORECASE)

_TEXTS = ("path", "modality", "tag", "dataset", "case", "slice", "split")
_CLASS = [("class_id", arrow.int32()), ("class_name", arrow.string())]
_MASK = arrow.struct([*_CLASS, ("instance", arrow.int32()), ("file", arrow.string())])
_MERGED = arrow.struct([*_CLASS, ("file", arrow.string())])
SCHEMA = arrow.schema(
    [*((name, arrow.string()) for name in _TEXTS), ("masks", arrow.list_(_MASK)), ("merged", arrow.list_(_MERGED))]
)
"""Columns of the index. Paths start from the data set's folder; ``tag`` is the file name's first part (``mr_t1``),
``merged`` has one entry a class, ``class_name`` is null where the class list does not know the class."""
INDEX_OUTPUT = Output(INDEX_FILE, SCHEMA, 16_384)


class ImageName(NamedTuple):
    """What an image's file name says."""

    tag: str  # ct_00, mr_t1, x_ray …
    modality: str
    dataset: str
    case: str
    slice: str


class MaskName(NamedTuple):
    """What a mask's file name says."""

    image_stem: str
    class_text: str  # the id as the name writes it, with its zeros
    instance: int
    file: str  # from the data set's folder

    @property
    def class_id(self) -> int:
        return int(self.class_text)


def parse_image_name(name: str) -> ImageName | None:
    """``<modality>_<nn>--<data set>--<case>--<slice>.png``; None where a name is not of that form."""
    parts = name.removesuffix(".png").split("--")
    modality = modality_of(parts[0] + "--") if "_" in parts[0] else None
    if not name.endswith(".png") or len(parts) < 4 or not all(parts) or modality is None:
        return None
    return ImageName(parts[0], modality, parts[1], "--".join(parts[2:-1]), parts[-1])


def parse_mask_name(name: str) -> MaskName | None:
    """``<image stem>--<class id>_<instance>.png``; None where a name is not of that form."""
    stem, _, tail = name.removesuffix(".png").rpartition("--")
    numbers = _CLASS_AND_INSTANCE.fullmatch(tail)
    if not name.endswith(".png") or numbers is None or stem.count("--") < 3:
        return None
    return MaskName(stem, numbers[1], int(numbers[2]), f"masks/{name}")


def spoken_name(class_name: str) -> str | None:
    """A class as a question calls it; None for one that only its data set's makers understand, and for unions.

    A ``union_…`` class joins others that are there too, under a name that is no anatomical term."""
    words = class_name.replace("_", " ").strip()
    if class_name.startswith("union_") or _UNNAMED.fullmatch(words):
        return None
    return words


def read_class_names(path: Path) -> dict[str, dict[int, str]]:
    """Data set → class id → name. The published file maps names to ids; one that maps ids to names is understood too.
    Raises MedPLIBError: the file is something else."""
    try:
        names: dict[str, dict[int, str]] = {}
        for dataset, classes in json.loads(path.read_text(encoding="utf-8")).items():
            by_id = bool(classes) and all(str(key).isdecimal() for key in classes)
            pairs = classes.items() if by_id else ((number, name) for name, number in classes.items())
            names[dataset] = {int(number): str(name) for number, name in pairs}
        return names
    except (ValueError, AttributeError, TypeError) as error:
        raise MedPLIBError(
            f"{path} is not the class list ({error}); expected {{data set: {{class name: id}}}}"
        ) from error


@dataclass(frozen=True)
class Source:
    """The unpacked data set: folder of ``images/``, ``masks/`` and the two JSON files."""

    root: Path
    has_folders: bool  # images and masks are there as files
    has_list: bool  # ``SAMed2D_v1.json`` is there

    @classmethod
    def open(cls, root: Path) -> Source:
        """Look at what is there. Raises MedPLIBError: it is not the data set's folder, or class names are missing."""
        if not root.is_dir():
            raise MedPLIBError(f"--source {root} is not a folder; name the one that SA-Med2D-20M was unpacked into")
        folders = [(root / name).is_dir() for name in ("images", "masks")]
        has_list = (root / LIST_FILE).is_file()
        if any(folders) and not all(folders):
            absent = "masks" if folders[0] else "images"
            raise MedPLIBError(f"{root} has no folder {absent}/; unpack all parts of SA-Med2D-20M into it")
        if not all(folders) and not has_list:
            inner = [path.parent for path in sorted(root.glob("*/images"))]
            hint = f"; did you mean {inner[0]}?" if inner else "; name the folder with images/ and masks/ in it"
            raise MedPLIBError(f"{root} holds neither images/ nor {LIST_FILE}{hint}")
        if not (root / CLASS_FILE).is_file():
            raise MedPLIBError(f"{root} lacks {CLASS_FILE}, which names the classes; copy it there from the download")
        return cls(root, all(folders), has_list)

    @property
    def prints(self) -> dict[str, str]:
        """What changes when files are added or taken away."""
        names = ["images", "masks"] if self.has_folders else []
        names += [LIST_FILE, CLASS_FILE] if self.has_list else [CLASS_FILE]
        return fingerprint([self.root / name for name in names])


# --- names in buckets ------------------------------------------------------------------------------------------------


def list_names(source: Source, folder: Path, progress: Callable[[int], object]) -> None:
    """Fill the buckets below ``folder``; kinds of names that are there already are not read again.

    Data set and case choose the bucket, so that an image and its masks share one; ``progress`` is called with the
    number of names read since the last call. Raises MedPLIBError: ``SAMed2D_v1.json`` is damaged."""
    for kind in [*(("images", "masks") if source.has_folders else ()), *(("list",) if source.has_list else ())]:
        target, temporary = folder / kind, folder / f".{kind}.tmp"
        if target.is_dir():
            continue
        shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
        temporary.mkdir(parents=True)
        lines = _listed(source.root / LIST_FILE) if kind == "list" else _entries(source.root / kind)
        with ExitStack() as stack:
            files = [stack.enter_context(bucket_file(temporary, at).open("wb", _BUFFER)) for at in range(BUCKETS)]
            count = 0
            for count, line in enumerate(lines, start=1):
                parts = line.split(b"--", 3)
                key = b"--".join(parts[1:3]) if len(parts) == 4 else line  # a name without them goes anywhere
                files[crc32(key) % BUCKETS].write(line + b"\n")
                if count % _BAR_EVERY == 0:
                    progress(_BAR_EVERY)
            progress(count % _BAR_EVERY)
        temporary.rename(target)


def bucket_file(folder: Path, bucket: int) -> Path:
    """One bucket of a kind of names; a line of ``list`` is an image and its masks, tabs between them."""
    return folder / f"{bucket:03d}.txt"


def _entries(folder: Path) -> Iterator[bytes]:
    """File names of a folder as they come, without asking the file system about each."""
    with os.scandir(os.fsencode(folder)) as entries:
        for entry in entries:
            yield entry.name.replace(b"\n", b"\\n")


def _listed(path: Path) -> Iterator[bytes]:
    """Entries of ``SAMed2D_v1.json``, an object of 1.6 GB, one after the other; folder names are left out."""

    def base_name(text: bytes) -> bytes:
        plain = text if b"\\" not in text else json.loads(b'"' + text + b'"').encode()
        return plain.rpartition(b"/")[2]

    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        opening = re.compile(rb"(?:\xef\xbb\xbf)?\s*\{\s*(\})?").match(content)
        if opening is None:
            raise MedPLIBError(f"{path} begins with {content[:12]!r}; expected an object of images and their masks")
        position, ended, released = opening.end(), opening[1] is not None, 0
        while not ended:
            entry = _ENTRY.match(content, position)
            if entry is None:
                raise MedPLIBError(
                    f"{path} is damaged or cut short at byte {position:,}, where {content[position : position + 40]!r} "
                    "stands; expected an image and the list of its masks"
                )
            yield b"\t".join(base_name(name) for name in (entry[1], *_STRING.findall(entry[2])))
            position, ended = entry.end(), entry[3] == b"}"
            if position - released > _RELEASE:
                released = position // mmap.PAGESIZE * mmap.PAGESIZE
                content.madvise(mmap.MADV_DONTNEED, 0, released)


# --- rows -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class IndexContext:
    """What every piece of the index needs: folder of the buckets, source, names of the classes, splits."""

    names: Path
    source: Source
    classes: Mapping[str, Mapping[int, str]]
    plan: SplitPlan


def index_pieces(names: Path, bytes_a_piece: int = BYTES_A_PIECE) -> list[Piece]:
    """Neighbouring buckets, joined until a piece is worth its files."""
    pieces: list[Piece] = []
    held: list[int] = []
    size = 0
    for bucket in range(BUCKETS):
        files = [bucket_file(names / kind, bucket) for kind in KINDS]
        more = sum(file.stat().st_size for file in files if file.is_file())
        if held and size + more > bytes_a_piece:
            pieces.append(Piece(tuple(held), size))
            held, size = [], 0
        held.append(bucket)
        size += more
    return [*pieces, Piece(tuple(held), size)]


def index_buckets(buckets: Sequence[int], context: IndexContext, part: Part) -> None:
    """Rows of the images in some buckets, as the folders (or else the published list) have them; whatever does not fit
    is reported."""
    source = context.source
    for bucket in buckets:
        lines: dict[str, list[str]] = {}
        for kind in KINDS:
            file = bucket_file(context.names / kind, bucket)
            text = file.read_bytes() if file.is_file() else b""
            lines[kind] = [line.decode("utf-8", "backslashreplace") for line in text.splitlines()]
        listed = [line.split("\t") for line in lines["list"]]
        listed_names = {"images": [one[0] for one in listed], "masks": [name for one in listed for name in one[1:]]}
        here = lines if source.has_folders else listed_names
        images = {name: image for name in here["images"] if (image := _parsed(name, "images", parse_image_name, part))}
        masks: dict[str, list[MaskName]] = defaultdict(list)
        mask_names = set()
        for name in here["masks"]:
            if mask := _parsed(name, "masks", parse_mask_name, part):
                masks[mask.image_stem].append(mask)
                mask_names.add(name)
        if source.has_folders and source.has_list:
            for folder, names in (("images", set(images)), ("masks", mask_names)):
                _compare(folder, names, set(listed_names[folder]), part)
        rows = [_row(name, image, masks.pop(name[:-4], []), context) for name, image in sorted(images.items())]
        for stem, orphans in sorted(masks.items()):
            for mask in sorted(orphans):
                message = f"the mask {mask.file} has no image images/{stem}.png"
                part.find("mask_without_image", message, file=mask.file)
        for row in rows:
            _count(row, part)
            part.write(INDEX_FILE, row)


def _parsed(name: str, folder: str, parse: Callable[[str], Any], part: Part) -> Any:
    parsed = parse(name)
    if parsed is None:
        wanted = "<modality>_<nn>--<data set>--<case>--<slice>"
        wanted += ".png" if folder == "images" else "--<class id>_<instance>.png"
        part.find("odd_name", f"{folder}/{name} is not named {wanted}; it is left out", file=f"{folder}/{name}")
    return parsed


def _compare(folder: str, here: set[str], listed: set[str], part: Part) -> None:
    """Tell what only the published list or only the folder has, one line a case: parts of the set may be missing."""
    for names, kind, prefix in (
        (listed - here, "not_in_folder", f"{LIST_FILE} names but {folder}/ lacks"),
        (here - listed, "not_in_list", f"{folder}/ holds but {LIST_FILE} does not name"),
    ):
        if names:
            part.count(kind.replace("_", " "), folder, len(names))
        for case, of_case in groupby(sorted(names), key=lambda name: name.split("--")[:3]):
            first, *more = of_case
            message = f"{prefix} {1 + len(more)} of {'--'.join(case)}, such as {first}"
            part.find(f"{folder}_{kind}", message, case="--".join(case), number=1 + len(more))


def _row(name: str, image: ImageName, masks: list[MaskName], context: IndexContext) -> dict[str, Any]:
    masks.sort(key=lambda mask: (mask.class_id, mask.instance))
    classes = context.classes.get(image.dataset, {})

    def named(mask: MaskName, **more: Any) -> dict[str, Any]:
        return {"class_id": mask.class_id, "class_name": classes.get(mask.class_id), **more}

    firsts = [next(group) for _, group in groupby(masks, key=lambda mask: mask.class_id)]
    return {
        "path": f"images/{name}",
        **image._asdict(),
        "split": context.plan.of(image.dataset, image.case),
        "masks": [named(mask, instance=mask.instance, file=mask.file) for mask in masks],
        "merged": [
            named(mask, file=f"masks_merged/{mask.image_stem}--{mask.class_text}_merged.png") for mask in firsts
        ],
    }


def _count(row: Mapping[str, Any], part: Part) -> None:
    part.count("images", "all")
    part.count("masks", "all", len(row["masks"]))
    part.count("images by modality", row["modality"])
    part.count("images by data set", row["dataset"])
    part.count("images by split", row["split"])
    for (class_id, name), number in Counter((mask["class_id"], mask["class_name"]) for mask in row["masks"]).items():
        label = f"{row['modality']} / {row['dataset']} / {class_id} / {name or NAMELESS}"
        part.count(CLASS_COUNTS, label, number)
        if name is None:
            part.count(f"masks of classes that {CLASS_FILE} does not name", f"{row['dataset']} {class_id}", number)
    if not row["masks"]:
        part.find("image_without_mask", f"{row['path']} has no mask", file=row["path"])
