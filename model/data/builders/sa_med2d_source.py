"""SA-Med2D-20M on disk: its folders, its file names, its class names (reference §8)."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from model.data.builders.work import fingerprint
from model.data.schema import modality_of
from model.errors import MedPLIBError

CLASS_FILE = "SAMed2D_v1_class_mapping_id.json"
LIST_FILE = "SAMed2D_v1.json"
_CLASS_AND_INSTANCE = re.compile(r"(\d+)_(\d+)")
_UNNAMED = re.compile(r"(class|label|region)?[ _]*\d*|left|right|background|others?|unknown", re.IGNORECASE)

ClassNames = Mapping[str, Mapping[int, str]]
"""Data set → class id → name."""


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


def merged_name(image_stem: str, class_text: str) -> str:
    """Where the published records look for the union of a class's instances."""
    return f"masks_merged/{image_stem}--{class_text}_merged.png"


def spoken_name(class_name: str) -> str | None:
    """A class as a question calls it; None for one that only its data set's makers understand, and for unions.

    A ``union_…`` class joins others that are there too, under a name that is no anatomical term.
    """
    words = class_name.replace("_", " ").strip()
    if class_name.startswith("union_") or _UNNAMED.fullmatch(words):
        return None
    return words


@dataclass(frozen=True)
class Source:
    """The unpacked data set.

    Attributes:
        root: folder of ``images/``, ``masks/`` and the two JSON files.
        has_folders: images and masks are there as files.
        has_list: ``SAMed2D_v1.json`` is there.
    """

    root: Path
    has_folders: bool
    has_list: bool

    @classmethod
    def open(cls, root: Path) -> Source:
        """Look at what is there.

        Raises:
            MedPLIBError: it is not the data set's folder, or the class names are missing.
        """
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
        return {Path(name).name: text for name, text in fingerprint([self.root / name for name in names]).items()}

    def class_names(self) -> ClassNames:
        """Names of all classes.

        The published file maps names to ids; one that maps ids to names is understood too.

        Raises:
            MedPLIBError: the file is something else.
        """
        path = self.root / CLASS_FILE
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            return {dataset: _by_id(classes) for dataset, classes in stored.items()}
        except (ValueError, AttributeError, TypeError) as error:
            raise MedPLIBError(
                f"{path} is not the class list ({error}); expected {{data set: {{class name: id}}}}"
            ) from error


def _by_id(classes: Mapping[str, int | str]) -> dict[int, str]:
    if classes and all(str(key).isdecimal() for key in classes):
        return {int(key): str(name) for key, name in classes.items()}
    return {int(number): name for name, number in classes.items()}


def check_datasets(names: Iterable[str], classes: ClassNames) -> None:
    """Refuse a data set that the class list does not know.

    Raises:
        MedPLIBError: names it and the nearest known one.
    """
    for name in names:
        if name not in classes:
            near = difflib.get_close_matches(name, list(classes), 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(classes)[:20])} …"
            raise MedPLIBError(f"--hold-out {name}: {CLASS_FILE} knows no such data set; {hint}")
