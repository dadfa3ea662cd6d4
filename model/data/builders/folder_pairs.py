"""Which masks of a user's folder belong to which image, and what they show.

A mask belongs to the image with the same path below its folder, or whose name its own begins with, a separator between:
``a.png``, ``a_liver.png``, ``a--0003_000.png``. A folder around it may name the class: ``liver/a.png``.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from model.data.builders.folder_names import Names, composed
from model.errors import MedPLIBError

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".dcm", ".dicom"}  # what the readers decode
)
_SEPARATORS = ("--", "_", "-", ".", " ")
_WORDS_FOR_MASK = frozenset(
    {"mask", "masks", "seg", "segmentation", "label", "labels", "labelmap", "gt", "annotation", "groundtruth"}
)
_WORD = "|".join(sorted(_WORDS_FOR_MASK))
_ENDS_FOR_MASK = re.compile(rf"^(?:(?:{_WORD})(?:[-_. ]+|$))+|(?:(?:^|[-_. ]+)(?:{_WORD}))+$", re.IGNORECASE)
_VOLUMES = (".nii", ".nii.gz", ".nrrd", ".mha", ".mhd")
_VOLUME_TOLD = "it is a volume; write the slices of images and masks as pictures, such as PNG"


@dataclass(frozen=True)
class Entry:
    """One image with its masks.

    Attributes:
        key: its path below the folder of images, without suffix.
        image: its file.
        targets: name of a structure and the masks whose union shows it.
        maps: label maps, whose values are named.
    """

    key: str
    image: Path
    targets: tuple[tuple[str, tuple[Path, ...]], ...] = ()
    maps: tuple[Path, ...] = ()


@dataclass
class Pairing:
    """All images that have a mask, in order of their keys; and what is left over, as (kind, message, file)."""

    entries: list[Entry] = field(default_factory=list)
    left: list[tuple[str, str, str]] = field(default_factory=list)
    source: dict[str, str] = field(default_factory=dict)


def pair(images: Path, masks: Path, names: Names, out: Path) -> Pairing:
    """Find the masks of every image; what lies below ``out`` is none of either.

    Raises:
        MedPLIBError: a folder does not exist, both are the same, or not one mask has an image.
    """
    for folder, flag in ((images, "--images"), (masks, "--masks")):
        if not folder.is_dir():
            raise MedPLIBError(f"{flag} {folder} is no folder; give the one with the {flag[2:]}")
    if images.resolve() == masks.resolve():
        raise MedPLIBError(f"{images} is given for images and masks; put the masks into a folder of their own")
    pairing = Pairing()
    pictures = _Images(images, _walk(images, (masks, out), pairing, "images"), pairing)
    found: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    maps: dict[str, list[Path]] = defaultdict(list)
    used: set[str] = set()
    for relative in _walk(masks, (images, out), pairing, "masks"):
        key, name_key = _meant(masks, relative, pictures, names, pairing)
        if name_key is None:
            continue
        if names.kind == "value":
            maps[key].append(masks / relative)
        else:
            used.add(name_key)
            found[key][names.names[name_key]].append(masks / relative)
    for key, image in pictures.files.items():
        if key in found or key in maps:
            targets = tuple((name, tuple(files)) for name, files in sorted(found.get(key, {}).items()))
            pairing.entries.append(Entry(key, image, targets, tuple(maps.get(key, ()))))
        else:
            pairing.left.append(("image_without_mask", "no mask belongs to it", str(image)))
    if not pairing.entries:
        none = ("", "there is no file", str(masks))
        _, message, file = next((one for one in pairing.left if one[0].startswith("mask")), [*pairing.left, none][0])
        raise MedPLIBError(
            f"not one mask of {masks} belongs to an image of {images} (first: {file}: {message}); a mask is "
            "named as its image (a.png), begins with its name (a_liver.png) or lies in its class's folder (liver/a.png)"
        )
    for name_key in sorted(set(names.names) - used) if names.kind != "value" else []:
        pairing.left.append(("unused_name", f"no mask is named by {name_key:.80} ({names.names[name_key]:.80})", ""))
    return pairing


class _Images:
    """Image files by key, and by bare name for masks in other folders."""

    def __init__(self, folder: Path, listed: Iterator[str], pairing: Pairing) -> None:
        self.files: dict[str, Path] = {}
        self._bare: dict[str, list[str]] = defaultdict(list)
        for relative in listed:
            key = composed(_without_suffix(relative))
            if key in self.files:
                message = f"{self.files[key].name} has the same name but for its suffix and is taken instead"
                pairing.left.append(("same_name", message, str(folder / relative)))
                continue
            self.files[key] = folder / relative
            self._bare[Path(key).name].append(key)

    def find(self, parents: tuple[str, ...], stem: str) -> str | None:
        """The key of an image named ``stem``: in the folder of the same path, else the only one of that name."""
        exact = "/".join((*parents, stem))
        if exact in self.files:
            return exact
        bare = self._bare.get(stem, [])
        return bare[0] if len(bare) == 1 else None

    def several(self, stem: str) -> bool:
        """Whether images in several folders have this name."""
        return len(self._bare.get(stem, [])) > 1


def _meant(folder: Path, relative: str, pictures: _Images, names: Names, pairing: Pairing) -> tuple[str, str | None]:
    """Key of the image that a mask belongs to, and of what it shows ("" for a label map); None if it is left over."""
    file, relative = str(folder / relative), composed(relative)
    parents, stem = Path(relative).parent.parts, Path(_without_suffix(relative)).name
    classes = [names.of_class(part) if names.kind == "class" else None for part in parents]
    below = tuple(part for part, name in zip(parents, classes, strict=True) if name is None)
    match = next(
        ((key, token) for start, token in _beginnings(stem) if (key := pictures.find(below, start)) is not None), None
    )
    if match is None:
        several = next((start for start, _ in _beginnings(stem) if pictures.several(start)), None)
        message = f"several images are named {several}" if several else "no image has its name or the beginning of it"
        pairing.left.append(("mask_without_image", message, file))
        return "", None
    key, token = match
    if names.kind == "value":
        named = None if token else ""
        message = f"it ends in {token!r:.80}, and a label map has its image's name"
    else:
        by_name = names.of_file(folder, relative) if names.kind == "file" else _class_of(token, names)
        named = by_name or next((name for name in classes if name is not None), None)
        message = _nameless(token, relative, names)
    if named is None:
        pairing.left.append(("mask_without_name", message, file))
    return key, named


def _class_of(token: str, names: Names) -> str | None:
    """The class that the end of a mask's name says, with or without a word for mask before or behind it."""
    bare = _ENDS_FOR_MASK.sub("", token)
    return next((key for text in (token, bare) if text and (key := names.of_class(text)) is not None), None)


def _nameless(token: str, relative: str, names: Names) -> str:
    if names.kind == "file":
        return f"the table of names does not list {relative}"
    if token:
        return f"nothing in the table of names is {token!r:.80}"
    return "its name says no class: lay it into a folder of the class (liver/a.png), or name pixel values (value,name)"


def _beginnings(stem: str) -> Iterator[tuple[str, str]]:
    """(beginning, rest) at every separator, longest beginning first; words for mask count as no rest."""
    yield stem, ""
    for place in range(len(stem) - 1, 0, -1):
        for separator in _SEPARATORS:
            if stem.startswith(separator, place):
                rest = stem[place + len(separator) :]
                yield stem[:place], rest if _ENDS_FOR_MASK.sub("", rest) else ""
                break


def _walk(folder: Path, others: tuple[Path, ...], pairing: Pairing, what: str) -> Iterator[str]:
    """Image files below ``folder`` in a fixed order, without hidden ones and what lies below ``others``."""
    digest, count = blake2b(digest_size=8), 0
    seen = {os.path.realpath(other) for other in (*others, folder)}  # links may lead to what is listed already

    def leave(kind: str, message: str, file: Path) -> None:
        pairing.left.append((kind, message, os.fsencode(file).decode("utf-8", "backslashreplace")))

    def unlisted(error: OSError) -> None:
        leave("not_an_image", f"the folder cannot be read ({error.strerror})", Path(error.filename))

    for root, folders, files in os.walk(folder, onerror=unlisted, followlinks=True):
        place = Path(root)
        inside = sorted(
            (name for name in folders if name[0] != "."), key=lambda name: ((place / name).is_symlink(), name)
        )
        folders.clear()
        for name in inside:
            real = os.path.realpath(place / name)
            if real not in seen:
                seen.add(real)
                folders.append(name)
        for name in sorted(files):
            if name.startswith("."):
                continue
            file = place / name
            if not _is_text(str(file.relative_to(folder))):
                leave("odd_name", "its name is not in UTF-8; give it another", file)
                continue
            try:
                state = file.stat()
                is_image = file.suffix.lower() in IMAGE_SUFFIXES or _is_bare_dicom(file)
            except OSError as error:
                leave("not_an_image", f"it cannot be read ({error.strerror})", file)
                continue
            if not is_image:
                volume = name.lower().endswith(_VOLUMES)
                leave("not_an_image", _VOLUME_TOLD if volume else "its suffix is none of an image's", file)
                continue
            digest.update(f"{file.relative_to(folder)} {state.st_size} {state.st_mtime_ns}\n".encode())
            count += 1
            yield file.relative_to(folder).as_posix()
    pairing.source[what] = f"{count} files ({digest.hexdigest()})"


def _is_text(name: str) -> bool:
    """Whether a file name is UTF-8; those of archives from elsewhere may not be, and no record could hold them."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _without_suffix(relative: str) -> str:
    """An identifier's dots in the name of a bare DICOM file are no suffix."""
    path = Path(relative)
    return (path.with_suffix("") if path.suffix.lower() in IMAGE_SUFFIXES else path).as_posix()


def _is_bare_dicom(file: Path) -> bool:
    """DICOM files often have no suffix, or the end of an identifier for one."""
    if file.suffix and not file.suffix[1:].isdecimal():
        return False
    with file.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"
