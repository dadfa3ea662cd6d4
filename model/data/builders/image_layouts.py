"""Readers of folders of pictures: SA-Med2D names, masks beside images or in their own folders, folders per class."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.data.builders.cases import (
    SPLIT_WORDS,
    Case,
    Names,
    Problem,
    ReadOptions,
    Source,
    Target,
    composed,
    file_key,
    image_files,
    named_patient,
    read_names,
    split_in,
    terms_of,
    without_suffix,
)
from model.data.builders.sa_med2d_index import parse_image_name, parse_mask_name, read_class_names, spoken_name
from model.data.builders.vqa_rows import modality_name
from model.data.image_io import MAX_MASK_LEVELS, MaskData, read_image, read_labels, read_mask_data
from model.data.schema import MODALITIES, modality_of
from model.errors import MedPLIBError, shown

_SEPARATORS = ("--", "_", "-", ".", " ")
_MASK_WORDS = (
    *("mask", "masks", "seg", "segmentation", "segmentations", "label", "labels", "labelmap", "gt", "annotation"),
    *("annotations", "groundtruth", "manual", "manual1", "manual2", "1stho", "2ndho"),
)
_WORD = "|".join(_MASK_WORDS)
_ENDS_FOR_MASK = re.compile(rf"^(?:(?:{_WORD})(?:[-_. ]+|$))+|(?:(?:^|[-_. ]+)(?:{_WORD}))+$", re.IGNORECASE)
_MASK_FOLDER = re.compile(
    rf"(?:.*[-_. ])?(?:{_WORD}|.*groundtruth|labels?t[rs]|segmentation(?:class|object))(?:[-_. ].*)?"
)
_IMAGE_FOLDER = re.compile(r"(?:.*[-_. ])?(?:images?|imgs?|input|originals?|jpegimages|pictures|photos)(?:t[rs])?")
_INSTANCE = re.compile(r"(?:^|[-_. ])\d+$")
_LOOKED_AT = 12
_MOST_CLASSES = 30


def modality_stated(options: ReadOptions, stated: str, path: str) -> str | None:
    """A modality that the user, the source or the file's name says; None where none of ours is said. Raises
    MedPLIBError: the user's is unknown."""
    if options.modality and modality_name(options.modality) not in MODALITIES:
        raise MedPLIBError(f"--modality {shown(options.modality)} is unknown; give one of {', '.join(MODALITIES)}")
    found = modality_name(options.modality or stated)
    return found if found in MODALITIES else modality_of(Path(path).name)


class LegendReader:
    """Targets of mask files: whole masks, or values or colors of a map that a legend gives names to."""

    def __init__(self, options: ReadOptions, problems: list[Problem], root: Path | None = None) -> None:
        self.options, self.problems = options, problems
        self.names: Names | None = read_names(options.names) if options.names else _legend_in(root)

    def targets(self, masks: Sequence[Any], name: str) -> Iterator[Target]:
        """The targets of an image's masks that are called ``name`` (empty where nothing says). Raises MedPLIBError:
        nothing says what they show."""
        files = tuple(masks)
        if not name and self.names is not None and self.names.kind in ("value", "color"):
            values: dict[str, list[str]] = {}
            for value, called in self.names.names.items():
                values.setdefault(called, []).append(value)
            for number, (called, keys) in enumerate(values.items()):
                known = () if number else tuple(self.names.names)
                read = partial(read_values, files, tuple(keys), self.names.kind == "color", known)
                yield Target(called, read, str(files[0]))
            return
        name = name or self.options.target
        if not name:
            raise MedPLIBError(
                f"nothing says what the mask {files[0]} shows; give --target NAME (--target polyp), or --names CSV"
            )
        yield Target(name, partial(read_union, files), str(files[0]))

    def look(self, masks: Sequence[Path]) -> str:
        """Find out by some masks without a name of their own what they are, and a legend if they need one. Returns
        ``masks``, ``label maps`` or ``color maps``. Raises MedPLIBError: colors have no names."""
        if not masks or self.names is not None:
            kind = self.names.kind if self.names is not None else ""
            return {"value": "label maps", "color": "color maps"}.get(kind, "masks")
        numbers: Counter[int] = Counter()
        for file in masks[:: max(1, len(masks) // _LOOKED_AT)]:
            try:
                values = np.unique(read_labels(file))
            except MedPLIBError as error:
                if "colours" in str(error):
                    found = np.unique(read_image(file).pixels.reshape(-1, 3), axis=0)
                    if 2 < len(found) <= MAX_MASK_LEVELS:
                        listed = "; ".join(f"{r} {g} {b}" for r, g, b in found if (r, g, b) != (0, 0, 0))
                        raise MedPLIBError(
                            f"{file} is a color mask without a legend (colors {listed}); give --names CSV with a first "
                            "line color,name and a row for each color"
                        ) from None
                continue
            if len(values) <= MAX_MASK_LEVELS:
                numbers.update(int(value) for value in values if value)
        if len(numbers) < 2 or (set(numbers) == {1, 255} and self._mixed(masks)):
            return "masks"
        values_of = set(numbers)
        for file in masks:  # no legend: a rare value may be in any of them
            try:
                values_of |= {int(value) for value in np.unique(read_labels(file))}
            except MedPLIBError:
                continue
        names = {str(value): f"class {value}" for value in sorted(values_of - {0})}
        self.names = Names("value", names)
        message = f"the values {', '.join(names)} have no names and are asked for as {', '.join(names.values())}"
        fix = "give --names CSV with a first line value,name and a row for each value"
        self.problems.append(Problem("legend_missing", str(masks[0].parent), message, fix))
        return "label maps"

    def _mixed(self, masks: Sequence[Path]) -> bool:
        """Whether masks of 0/1 are among those of 0/255, each of one value: both are whole masks."""
        ones = []
        for file in masks:
            try:
                values = set(np.unique(read_labels(file)).tolist()) - {0}
            except MedPLIBError:
                continue
            if len(values) > 1:
                return False
            ones += [file] if values == {1} else []
        for file in ones:
            message = "it holds 0 and 1, others 0 and 255; every pixel that is not 0 counts as foreground in both"
            self.problems.append(Problem("mask_values_differ", str(file), message, "nothing, or save all as 0 and 255"))
        return True


def _legend_in(root: Path | None) -> Names | None:
    """Names of values or colors in a CSV or JSON file of the source's own folder."""
    for file in sorted(root.glob("*")) if root is not None else ():
        try:
            if file.suffix.lower() in (".csv", ".txt") and file.stat().st_size < 1 << 20:
                names = read_names(file)
                if names.kind in ("value", "color"):
                    return names
            elif file.suffix.lower() == ".json" and file.stat().st_size < 1 << 20:
                plain = json.loads(file.read_text(encoding="utf-8"))
                plain = next((plain[key] for key in ("labels", "classes", "legend") if key in plain), plain)
                pairs = {str(key): str(value) for key, value in plain.items()}
                if pairs and all(value.isdecimal() for value in pairs.values()):
                    pairs = {value: key for key, value in pairs.items()}
                if pairs and all(key.isdecimal() for key in pairs):
                    return Names("value", {key: words(name) for key, name in pairs.items() if key != "0"})
        except (MedPLIBError, ValueError, OSError, AttributeError, TypeError):
            continue
    return None


def words(name: str) -> str:
    """A name of a file or folder as words."""
    return " ".join(re.sub(r"[-_]+", " ", name).split())


def _content(file: Any) -> Any:
    return file if isinstance(file, Path) else file.content()


def read_union(files: Sequence[Any]) -> MaskData:
    """Foreground of any of ``files``, which are of one size. Raises MedPLIBError: one is unreadable, or they differ in
    size."""
    parts = [read_mask_data(_content(file)) for file in files]
    if any(part.pixels.shape != parts[0].pixels.shape for part in parts):
        raise MedPLIBError(f"the masks of one structure differ in size ({', '.join(map(str, files))})")
    note = next((f"{file} {part.note}" for file, part in zip(files, parts, strict=True) if part.note), "")
    return MaskData(np.logical_or.reduce([part.pixels for part in parts]), note)


@lru_cache(maxsize=4)
def _map(file: Any, color: bool) -> NDArray[Any]:
    """Labels [H, W] or colors as one number each; kept, as each structure of an image asks for them."""
    if not color:
        return read_labels(_content(file))
    pixels = read_image(_content(file)).pixels.astype(np.int64)
    return pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]


def read_values(files: Sequence[Any], keys: Sequence[str], color: bool, known: Sequence[str] = ()) -> MaskData:
    """Pixels of label maps that hold one of the values, or "r g b" colors, ``keys``; notes those not ``known``. Raises
    MedPLIBError: a map is unreadable, or no label map."""
    maps = [_map(file, color) for file in files]
    nameless = set()
    if known:
        named = {0, *map(_number, known)}
        nameless = {int(value) for one in maps for value in np.unique(one)} - named
    note = (
        f"holds {', '.join(_text(value, color) for value in sorted(nameless)[:8])} without a name" if nameless else ""
    )
    return MaskData(np.logical_or.reduce([np.isin(one, [_number(key) for key in keys]) for one in maps]), note)


def _number(key: str) -> int:
    parts = [int(part) for part in key.split()]
    return parts[0] if len(parts) == 1 else parts[0] << 16 | parts[1] << 8 | parts[2]


def _text(value: int, color: bool) -> str:
    return f"{value >> 16} {value >> 8 & 255} {value & 255}" if color else str(value)


# ---- masks ---------------------------------------------------------------------------------------------------------


@dataclass
class _Files:
    images: dict[str, str] = field(default_factory=dict)
    masks: list[tuple[str, str, str]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def is_mask(relative: str) -> bool:
    """Whether a path looks like a mask: in a folder of masks, or with such a word at an end of its name."""
    *folders, name = Path(relative).parts
    return any(map(_is_mask_folder, folders)) or bool(_ENDS_FOR_MASK.search(Path(name).stem))


def recognize_masks(root: Path, options: ReadOptions) -> Source | None:
    """Images with masks: ``a_mask.png`` beside ``a.png``, ``masks/a.png``, ``liver/a.png`` beside ``images/a.png``."""
    if not root.is_dir():
        return None
    root = _single_folder(root)
    found = sort_files(root, options)
    if not found.masks:
        return None
    problems = list(found.problems)
    reader = LegendReader(options, problems, root)
    nameless = [root / file for _, name, file in found.masks if not name]
    what = reader.look(nameless)
    classes = _class_folders(found.images)
    names = sorted({name for _, name, _ in found.masks if name})
    if nameless and what == "masks" and not options.target:
        next(reader.targets(nameless[:1], ""))  # raises
    legend = list(dict.fromkeys(reader.names.names.values())) if nameless and what != "masks" and reader.names else []
    named = ", ".join([*names, *legend, *([options.target] if nameless and what == "masks" else [])])
    said = f"{len(found.images)} images and {len(found.masks)} {what} of {named}"
    said += f"; classes by folder: {', '.join(sorted(set(classes.values())))}" if classes else ""
    cases = partial(_masked_cases, root, options, found, reader, classes, len(problems))
    return Source("masks", said, cases, problems, terms_of(root))


def sort_files(root: Path, options: ReadOptions) -> _Files:
    """Which pictures are images, and which image each mask belongs to."""
    found = _Files()
    table = read_names(options.names) if options.names else None
    listed = [composed(relative) for relative in image_files(root, found.problems)]
    has_images = {part for relative in listed for part in Path(relative).parts[:-1] if _is_image_folder(part)}
    others, bare = [], defaultdict(list)
    stems = {without_suffix(relative) for relative in listed}
    for relative in listed:
        folder, stem = Path(relative).parent, Path(without_suffix(relative)).name
        in_masks = any(_is_mask_folder(part) for part in folder.parts)
        beside = not in_masks and any(
            (folder / start).as_posix() in stems and _ENDS_FOR_MASK.search(_INSTANCE.sub("", rest) or rest)
            for start, rest in _beginnings(stem)
            if rest
        )
        apart = has_images and not any(_is_image_folder(part) for part in folder.parts)
        if in_masks or beside or apart:
            others.append(relative)
            continue
        key = without_suffix(relative)
        if key in found.images:
            message = f"{found.images[key]} has the same name but for its suffix and is taken instead"
            found.problems.append(Problem("same_name", str(root / relative), message, "rename or remove one"))
            continue
        found.images[key] = relative
        bare[Path(key).name].append(key)
    taken: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for relative in others:
        parents, stem = Path(relative).parent.parts, Path(without_suffix(relative)).name
        match = next(
            ((own, rest) for start, rest in _beginnings(stem) if (own := _image_of(parents, start, bare))), None
        )
        if match is None:
            several = any(len(bare.get(start, ())) > 1 for start, _ in _beginnings(stem))
            message = "several images could be its own" if several else "no image has its name or the beginning of it"
            fix = "name the mask as its image, or as its image with an ending: a.png, a_mask.png"
            found.problems.append(Problem("mask_without_image", str(root / relative), message, fix))
            continue
        image, rest = match
        token = _ENDS_FOR_MASK.sub("", _INSTANCE.sub("", rest))
        token = "" if _ENDS_FOR_MASK.fullmatch(token) else token
        classes = [part for part in parents if part not in Path(image).parts and not _is_mask_folder(part)]
        classes = [part for part in classes if not _is_image_folder(part) and part.casefold() not in SPLIT_WORDS]
        name = _called(table, root, relative, [token, *reversed(classes)])
        taken[image, name].append((rest, relative))
    for (key, name), files in taken.items():
        files.sort(key=lambda one: (len(one[0]), one))
        base = _INSTANCE.sub("", files[0][0])
        folder = Path(files[0][1]).parent
        for number, (rest, relative) in enumerate(files):
            same = _INSTANCE.sub("", rest) == base and Path(relative).parent == folder
            if number and (not same or rest == files[0][0]):
                message = f"{files[0][1]} is a mask of the same image and structure and is taken instead"
                found.problems.append(Problem("two_candidates", str(root / relative), message, "remove one of both"))
            else:
                found.masks.append((key, name, relative))
    return found


def _called(table: Names | None, root: Path, relative: str, tokens: Sequence[str]) -> str:
    if table is not None and table.kind == "file":
        key = table.of_file(root, relative)
        return table.names[key] if key else ""
    given = [token for token in tokens if token]
    if table is not None and table.kind == "class":
        keys = [
            key for token in given for text in (token, _ENDS_FOR_MASK.sub("", token)) if (key := table.of_class(text))
        ]
        return table.names[keys[0]] if keys else words(given[0]) if given else ""
    return words(given[0]) if given else ""


def _masked_cases(
    root: Path, options: ReadOptions, found: _Files, reader: LegendReader, classes: dict[str, str], known: int
) -> Iterator[Case]:
    of_image: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for key, name, file in found.masks:
        of_image[key][name].append(root / file)
    del reader.problems[known:]  # of an earlier listing
    for key, relative in found.images.items():
        if key not in of_image:
            fix = "add its mask, an empty one if nothing is there"
            reader.problems.append(Problem("image_without_mask", str(root / relative), "no mask belongs to it", fix))
            if key not in classes:
                continue
        targets = [target for name, files in of_image[key].items() for target in reader.targets(files, name)]
        yield _case(root, relative, options, tuple(targets), classes.get(key))


def _case(root: Path, relative: str, options: ReadOptions, targets: tuple[Target, ...], label: str | None) -> Case:
    key = without_suffix(relative)
    return Case(
        key=file_key(key),
        image=root / relative,
        targets=targets,
        labels={"class": label} if label else {},
        split=split_in(Path(relative).parent.as_posix()),
        modality=modality_stated(options, "", relative),
        origin=str(root / relative),
    )


def _single_folder(root: Path) -> Path:
    while len(inside := [path for path in root.iterdir() if path.name[0] != "."]) == 1 and inside[0].is_dir():
        if _is_image_folder(inside[0].name) or inside[0].name.casefold() in SPLIT_WORDS:
            break
        root = inside[0]
    return root


def _image_of(parents: Sequence[str], stem: str, bare: dict[str, list[str]]) -> str | None:
    listed = bare.get(stem, [])
    if len(listed) < 2:
        return listed[0] if listed else None
    shared = [len(set(parents) & set(Path(key).parts[:-1])) for key in listed]
    best = [key for key, count in zip(listed, shared, strict=True) if count == max(shared)]
    return best[0] if len(best) == 1 else None


def _is_mask_folder(part: str) -> bool:
    return _MASK_FOLDER.fullmatch(part.casefold()) is not None


def _is_image_folder(part: str) -> bool:
    return _IMAGE_FOLDER.fullmatch(part.casefold()) is not None


def _beginnings(stem: str) -> Iterator[tuple[str, str]]:
    """(beginning, rest) at every separator, longest beginning first."""
    yield stem, ""
    for place in range(len(stem) - 1, 0, -1):
        separator = next((one for one in _SEPARATORS if stem.startswith(one, place)), None)
        if separator:
            yield stem[:place], stem[place + len(separator) :]


# ---- classes -------------------------------------------------------------------------------------------------------


def _class_folders(images: dict[str, str]) -> dict[str, str]:
    """Image → the folder that names its class; nothing where folders name none (patients, one folder …)."""
    of_image = {}
    for key in images:
        parts = [part for part in Path(key).parent.parts if part.casefold() not in SPLIT_WORDS]
        parts = [part for part in parts if not _is_image_folder(part) and not _is_mask_folder(part)]
        if parts:
            of_image[key] = parts[-1]
    counts = Counter(of_image.values())
    patients = sum(named_patient(name) is not None or any(sign.isdigit() for sign in name) for name in counts)
    if len(of_image) < len(images) or not 2 <= len(counts) <= _MOST_CLASSES:
        return {}
    return (
        {} if patients * 2 > len(counts) and len(counts) > 4 else {key: words(name) for key, name in of_image.items()}
    )


def recognize_classes(root: Path, options: ReadOptions) -> Source | None:
    """A folder of images for each class, two at least, without masks."""
    problems: list[Problem] = []
    root = _single_folder(root) if root.is_dir() else root
    images = {without_suffix(file): file for file in image_files(root, problems)} if root.is_dir() else {}
    classes = _class_folders(images)
    if not classes:
        return None
    table = read_names(options.names) if options.names else None
    for folder in sorted({(root / file).parent.parent for file in images.values()}):
        for empty in sorted(folder.iterdir()):
            if empty.is_dir() and not any(image_files(empty, [])):
                fix = "add images, or remove the folder"
                problems.append(Problem("empty_class", str(empty), "the folder of this class has no image", fix))
    if table is not None:
        named = {name: table.of_class(name) or table.of_class(name.replace(" ", "_")) for name in classes.values()}
        classes = {image: table.names[key] if (key := named[name]) else name for image, name in classes.items()}
    counts = Counter(classes.values())
    said = f"folders per class: {', '.join(f'{name} {count}' for name, count in sorted(counts.items()))} images"

    def cases() -> Iterator[Case]:
        for key, relative in images.items():
            yield _case(root, relative, options, (), classes[key])

    return Source("classes", said, cases, problems, terms_of(root))


# ---- SA-Med2D ------------------------------------------------------------------------------------------------------


def recognize_sa_med2d(root: Path, options: ReadOptions) -> Source | None:
    """``images/ct_00--SET--CASE--SLICE.png`` with ``masks/STEM--CLASS_INSTANCE.png``."""
    folders = [root / "images", root / "masks"]
    if not all(folder.is_dir() for folder in folders):
        return None
    problems: list[Problem] = []
    names = [Path(file).name for file in image_files(root / "images", problems)]
    if not names or any(parse_image_name(name) is None for name in names[:20]):
        return None
    tables = sorted(root.glob("*class_mapping_id.json"))
    classes = read_class_names(tables[0]) if tables else {}
    masks: dict[str, dict[tuple[str, int], list[Path]]] = defaultdict(lambda: defaultdict(list))
    for relative in image_files(root / "masks", problems):
        mask = parse_mask_name(Path(relative).name)
        if mask is not None:
            masks[mask.image_stem][mask.class_text, mask.class_id].append(root / "masks" / relative)
    said = f"SA-Med2D names: {len(names)} images, {sum(map(len, masks.values()))} structures in them"
    return Source(
        "sa-med2d",
        said,
        lambda: _sa_med2d_cases(root, options, names, masks, classes, problems),
        problems,
        terms_of(root),
    )


def _sa_med2d_cases(
    root: Path, options: ReadOptions, names: list[str], masks: Any, classes: Any, problems: list[Problem]
) -> Iterator[Case]:
    problems.clear()
    for name in names:
        image = parse_image_name(name)
        if image is None:
            fix = "rename it to MODALITY_NN--SET--CASE--SLICE.png"
            problems.append(Problem("odd_name", str(root / "images" / name), "its name is of another form", fix))
            continue
        known = classes.get(image.dataset, {})
        targets = []
        for (_, number), files in sorted(masks.get(Path(name).stem, {}).items()):
            called = spoken_name(known[number]) if number in known else None
            if called is None:
                fix = "add it to SAMed2D_v1_class_mapping_id.json"
                problems.append(Problem("mask_without_name", str(files[0]), f"class {number} has no name", fix))
            else:
                targets.append(Target(called, partial(read_union, tuple(sorted(files))), str(files[0])))
        yield Case(
            key=file_key(Path(name).stem),
            image=root / "images" / name,
            targets=tuple(targets),
            patient=f"{image.dataset} {image.case}",
            modality=modality_stated(options, image.modality, name),
            origin=str(root / "images" / name),
        )
