"""Layouts of volumes with labels: nnU-Net, Medical Segmentation Decathlon, tables, folders of NIfTI and DICOM."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from model.data.builders.cases import (
    IMAGE_SUFFIXES,
    SPLIT_WORDS,
    Case,
    Problem,
    ReadOptions,
    Source,
    Target,
    file_key,
    read_names,
    terms_of,
)
from model.data.builders.image_layouts import modality_stated
from model.data.builders.table_layouts import read_rows
from model.data.image_io import ImageData, read_labels
from model.data.structures import Drawing, read_dicom_seg, read_label_nifti, read_rtstruct, tidy_name
from model.data.volumes import CT_WINDOWS, Plane, cut, grid_of, open_path
from model.data.voxels import Series, find_series, scan_dicom
from model.errors import MedPLIBError

_NIFTI = (".nii", ".nii.gz")
_LABEL_WORDS = frozenset(
    ("label", "labels", "labelstr", "labelsts", "mask", "masks", "seg", "segs", "segmentation", "segmentations", "gt")
) | {"ground", "truth", "groundtruth", "annotation", "annotations", "roi", "rois", "contour", "contours"}
_IMAGE_WORDS = frozenset(("image", "images", "imagestr", "imagests", "img", "imgs", "volume", "volumes", "vol", "scan"))
_MODALITY_WORDS = {
    **dict.fromkeys(("ct", "cta", "cbct", "ncct", "cect"), "ct"),
    **dict.fromkeys(("mr", "mri", "t1", "t1w", "t1c", "t1ce", "t1gd", "t1n", "t2", "t2w", "t2f", "flair", "adc"), "mr"),
    **dict.fromkeys(("dwi", "dce"), "mr"),
    **dict.fromkeys(("pet", "pt", "suv"), "pet"),
    **dict.fromkeys(("us", "ultrasound"), "ultrasound"),
}


@dataclass(frozen=True)
class Labels:
    """A file of labels: ``names`` gives the values of each structure, ``default`` the name of an only value."""

    path: Path
    form: str = "nifti"
    names: tuple[tuple[str, tuple[int, ...]], ...] = ()
    default: str = ""


@dataclass(frozen=True)
class Item:
    """One volume of a source, or one flat picture with a label map; of several ``channels`` the first is used."""

    key: str
    image: Path
    labels: tuple[Labels, ...] = ()
    series: str = ""
    patient: str | None = None
    split: str | None = None
    modality: str | None = None
    channels: bool = False


def read_slice(
    path: Path, series: str, modality: str | None, window: tuple[float, float] | None, plane: Plane, index: int
) -> ImageData:
    """One slice as shown, uint8 [H, W, 3], in (lower, upper) or the modality's own window."""
    volume = open_path(path, series)
    low, high = window or CT_WINDOWS["soft_tissue"]
    shown = ((low + high) / 2, high - low) if window or modality == "ct" else volume.source.percentile_window
    cut_along = volume.along(plane)
    return ImageData(cut_along.slice(index, shown), cut_along.spacing_mm, "dicom" if path.is_dir() else "nifti")


def read_slice_mask(
    path: Path, series: str, labels: tuple[Labels, ...], name: str, axis: int, index: int
) -> np.ndarray:
    """One structure on one slice, bool [H, W] as shown."""
    shape = grid_of(path, series)[0].lps.shape
    return drawn(path, series, labels).structures[name].mask(shape, axis, index)


def read_values(path: Path, values: tuple[int, ...]) -> np.ndarray:
    """Where a flat label map has one of these values, bool [H, W]."""
    return np.isin(read_labels(path), values)


@lru_cache(maxsize=2)
def drawn(path: Path, series: str, labels: tuple[Labels, ...]) -> Drawing:
    """All that is drawn on a volume; a file that cannot be used is a note."""
    grid, whole = grid_of(path, series)[0], Drawing()
    for one in labels:
        try:
            if one.form == "nifti":
                found = read_label_nifti(one.path, grid, dict(one.names), one.default)
            else:
                found = (read_dicom_seg if one.form == "SEG" else read_rtstruct)(one.path, grid)
        except (MedPLIBError, OSError) as error:
            found = Drawing(notes=[("labels", str(error), "mend the file or take it away")])
        if found.seen:
            both = zip(whole.seen or found.seen, found.seen, strict=True)
            whole.seen = tuple(mine & others for mine, others in both)
        if twice := sorted(set(found.names) & set(whole.names)):
            found.notes.append(("name_twice", f"{twice[0]!r} is in two files of labels; the first is used", "keep one"))
        whole.structures = {**found.structures, **whole.structures}
        whole.names = tuple(dict.fromkeys((*whole.names, *found.names)))
        whole.notes += [(kind, f"{one.path.name}: {said}", fix) for kind, said, fix in found.notes]
    return whole


@dataclass
class Listing:
    """What was found at ``root``, and the cases that it makes."""

    title: str
    root: Path
    options: ReadOptions
    names: tuple[str, ...] = ()
    terms: str = ""
    items: list[Item] = field(default_factory=list)
    found: list[Problem] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.table = read_names(self.options.names) if self.options.names else None

    def add(self, image: Path, labels: tuple[Labels, ...], modality: str | None, **known: Any) -> None:
        """A volume or picture whose modality is called so where the user says no other."""
        stated = modality_stated(self.options, modality or "", "")
        self.items.append(Item(_bare(image) or self.root.name, image, labels, modality=stated, **known))

    def problem(self, kind: str, file: Path, message: str, fix: str) -> None:
        """Something that is left out before cases are listed."""
        self.found.append(Problem(kind, str(file), message, fix))

    def labels(self, path: Path, name: str) -> Labels:
        """A NIfTI file of labels by the user's names of values; ``name`` is what it says itself."""
        values = self.table.names.items() if self.table and self.table.kind == "value" else ()
        return Labels(path, "nifti", tuple((said, (int(key),)) for key, said in values), name or self.options.target)

    def source(self, kind: str) -> Source:
        """The source of all items that have labels."""
        keys, images = ([getattr(item, word) for item in self.items] for word in ("key", "image"))
        for at, item in enumerate(self.items):  # names that are twice become paths
            path = item.image.relative_to(self.root).as_posix() if item.image.is_relative_to(self.root) else item.key
            path += f"_{item.series[-8:]}" if images.count(item.image) > 1 else ""
            self.items[at] = replace(item, key=file_key(item.key if keys.count(item.key) == 1 else path))
        problems: list[Problem] = []
        terms = self.terms or (terms_of(self.root) if self.root.is_dir() else "")
        return Source(kind, self._summary(), partial(self._cases, problems), problems, terms)

    def _renamed(self, names: tuple[str, ...]) -> dict[str, str]:
        if self.options.target and len(names) == 1:
            return {names[0]: self.options.target}
        table = self.table if self.table and self.table.kind == "class" else None
        keys = {name: table.of_class(name) if table else None for name in names}
        return {name: table.names[key] if table and key else name for name, key in keys.items()}

    def _summary(self) -> str:
        known = sorted({item.modality or "" for item in self.items})
        names = {one: one.upper() if len(one) < 4 else one or "unknown modality" for one in known}
        shown = ["−160 to 240 HU for CT"] if "ct" in known else []
        if others := [name for one, name in names.items() if one != "ct"]:
            shown.append(f"0.5th to 99.5th percentile of the volume for {'/'.join(others)}")
        window = "{:g} to {:g}".format(*self.options.window) if self.options.window else ", ".join(shown)
        flat = any(_is_flat(item.image) for item in self.items)
        said = f"{len(self.items)} {'/'.join(names.values())} {'picture' if flat else 'volume'}"
        said += "s" * (len(self.items) != 1) + (f", labels {', '.join(self.names)}" if self.names else "")
        return f"{self.title}: {said}" + ("" if flat else f"; {self.options.plane} plane, window {window}")

    def _cases(self, problems: list[Problem]) -> Iterator[Case]:
        problems[:] = self.found
        for item in self.items:
            try:
                yield from _flat(item) if _is_flat(item.image) else self._slices(item, problems)
            except (MedPLIBError, OSError) as error:
                problems.append(Problem("unreadable", str(item.image), str(error), "mend the file or take it away"))

    def _slices(self, item: Item, problems: list[Problem]) -> Iterator[Case]:
        options, where = self.options, str(item.image)
        grid, volumes = grid_of(item.image, item.series)
        if volumes > 1:
            if not item.channels:
                raise MedPLIBError(f"it holds {volumes} volumes; give one file for each")
            problems.append(
                Problem("channels", where, f"only the first of {volumes} channels is used", "export others")
            )
        if not item.modality:
            fix = "give --modality ct, mr or pet"
            problems.append(Problem("no_modality", where, "nothing says its modality; the window is a guess", fix))
        drawing, layers = drawn(item.image, item.series, item.labels), cut(grid, options.plane)
        problems += [Problem(kind, where, said, fix) for kind, said, fix in drawing.notes]
        if not drawing.names:
            if not drawing.notes:
                problems.append(Problem("no_labels", where, "it has no labels", "give labels or take it away"))
            return
        called = self._renamed(drawing.names)
        on = {name: structure.slices(layers.axis) for name, structure in drawing.structures.items()}
        seen = drawing.seen[layers.axis] if drawing.seen else np.ones(layers.slices, dtype=bool)
        usable = [index for index in range(0, layers.slices, max(1, options.every)) if seen[index]]
        shown = [index for index in usable if any(index in slices for slices in on.values())]
        free = [index for index in usable if index not in set(shown)]
        spread = np.linspace(0, len(free) - 1, min(len(free), max(1, len(shown)))).round().astype(int)
        for index in sorted([*shown, *(free[at] for at in spread)]):
            present = [name for name in drawing.names if index in on.get(name, ())]
            reads = {name: partial(read_slice_mask, item.image, item.series, item.labels, name, layers.axis, index)
                     for name in present}  # fmt: skip
            yield Case(
                key=f"{item.key}_{layers.plane}_{index:04d}",
                image=partial(read_slice, item.image, item.series, item.modality, options.window, layers.plane, index),
                targets=tuple(Target(called[name], read, str(item.labels[0].path)) for name, read in reads.items()),
                absent=tuple(called[name] for name in drawing.names if name not in present),
                patient=item.patient,
                split=item.split,
                modality=item.modality,
                spacing_mm=layers.spacing_mm,
                volume=item.key,
                plane=layers.plane,
                slice_index=index,
                origin=where,
            )


def _flat(item: Item) -> Iterator[Case]:
    targets = tuple(
        Target(name, partial(read_values, labels.path, values), str(labels.path))
        for labels in item.labels for name, values in labels.names
    )  # fmt: skip
    yield Case(item.key, item.image, targets, patient=item.patient, split=item.split, modality=item.modality,
               origin=str(item.image))  # fmt: skip


def _is_flat(path: Path) -> bool:
    return not path.name.endswith(_NIFTI) and not path.is_dir()


def _words(text: str) -> list[str]:
    return [word for word in re.split(r"[\W_]+", text.casefold()) if word]


def modality_of(*texts: str) -> str | None:
    """The modality that a word of the first text with one means ("MR_T1", "PET", "chest_ct_003.nii.gz")."""
    return next((_MODALITY_WORDS[word] for text in texts for word in _words(text) if word in _MODALITY_WORDS), None)


def _bare(path: Path) -> str:
    return path.name if path.is_dir() else re.sub(r"(\.nii)?\.[^.]+$", "", path.name)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []


def recognize_dataset_json(kind: str, root: Path, options: ReadOptions) -> Source | None:
    """``dataset.json`` beside ``imagesTr`` and ``labelsTr``: of nnU-Net, channels in files of their own, or of MSD."""
    if not (root / "dataset.json").is_file() or not (images := _files(root / "imagesTr")):
        return None
    if any(re.search(r"_\d{4}$", _bare(path)) for path in images) != (kind == "nnunet"):
        return None
    try:
        info = json.loads((root / "dataset.json").read_text(encoding="utf-8"))
        channels = [str(value) for value in (info.get("channel_names") or info.get("modality") or {}).values()]
        labels = info["labels"]
        if all(str(key).isdecimal() for key in labels):  # version 1 and MSD: value → name; 2: name → value or several
            labels = {str(name): int(value) for value, name in labels.items()}
        groups = {name: tuple(map(int, of if isinstance(of, list) else [of])) for name, of in labels.items()}
        names = {tidy_name(name): group for name, group in groups.items() if group != (0,) and name != "ignore"}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise MedPLIBError(f"{root / 'dataset.json'} cannot be followed ({error!r}); mend it") from error
    title = "nnU-Net" if kind == "nnunet" else "Medical Segmentation Decathlon"
    listing = Listing(title, root, options, tuple(names), str(info.get("licence") or info.get("license") or ""))
    for images_in, labels_in, split in (("imagesTr", "labelsTr", None), ("imagesTs", "labelsTs", "test")):
        if (root / images_in).is_dir() and not (root / labels_in).is_dir():
            listing.problem("no_labels", root / images_in, f"there is no {labels_in}", "add it")
            continue
        files: dict[str, list[Path]] = {}
        for path in _files(root / images_in):
            files.setdefault(re.sub(r"_\d{4}$", "", _bare(path)), []).append(path)
        drawn_on = {_bare(path): path for path in _files(root / labels_in)}
        for case in sorted(files.keys() | drawn_on.keys()):
            if case not in files or case not in drawn_on:
                lacking, where = ("image", drawn_on[case]) if case not in files else ("labels", files[case][0])
                listing.problem(f"no_{lacking}", where, f"there is no file of {lacking}", "add it")
                continue
            if len(files[case]) > 1:
                said = f"only the first of its {len(files[case])} channels ({', '.join(channels)}) is used"
                listing.problem("channels", files[case][0], said, "number another channel 0000")
            labels = (Labels(drawn_on[case], names=tuple(names.items())),)
            modality, many = modality_of(*channels[:1], case), len(channels) > 1
            listing.add(files[case][0], labels, modality, patient=case, split=split, channels=many)
    return listing.source(kind)


def recognize_volume_table(root: Path, options: ReadOptions) -> Source | None:
    """A CSV with a row for each volume and file of labels: image, mask, target, modality, patient, split."""
    for file in [root] if root.is_file() else sorted(root.glob("*.csv")):
        rows = read_rows(file) if file.suffix == ".csv" else []
        first = file.parent / (rows[0].get("image") or "") if rows else file.parent
        if first != file.parent and rows[0].get("mask") and (first.name.endswith(_NIFTI) or first.is_dir()):
            return _listed(file, rows, options)
    return None


def _listed(file: Path, rows: Any, options: ReadOptions) -> Source:
    listing, grouped = Listing(f"table {file.name}", file.parent, options), dict[Path, list[Any]]()
    names: dict[str, None] = {}
    for row in rows:
        grouped.setdefault(file.parent / row["image"], []).append(row)
    for image, of_image in grouped.items():
        labels = []
        for row in of_image:
            pairs = re.findall(r"(\d+)\s*=\s*([^;]+)", row.get("target") or "")
            one = listing.labels(file.parent / row["mask"], "" if pairs else row.get("target") or "")
            if pairs:
                one = replace(one, names=tuple((name.strip(), (int(value),)) for value, name in pairs))
            names |= dict.fromkeys([name for name, _ in one.names] or [one.default])
            labels.append(one)
        for missing in [path for path in (image, *(one.path for one in labels)) if not path.exists()]:
            listing.problem("missing", missing, f"{file.name} names it, but it is not there", "add it")
        if image.exists():
            first, there = of_image[0], tuple(one for one in labels if one.path.exists())
            split = SPLIT_WORDS.get((first.get("split") or "").casefold())
            modality = modality_of(first.get("modality") or "", _bare(image))
            listing.add(image, there, modality, patient=first.get("patient") or _bare(image), split=split)
    listing.names = tuple(name for name in names if name)
    return listing.source("volume_table")


def recognize_volumes(root: Path, options: ReadOptions) -> Source | None:
    """NIfTI volumes and DICOM series with labels as NIfTI, DICOM-SEG or RTSTRUCT, paired by their names or UIDs."""
    if not root.is_dir():
        return None
    files = [path for path in sorted(root.rglob("*")) if "/." not in f"/{path.relative_to(root)}"]
    files = [path for path in files if path.is_file()]
    nifti = [path for path in files if path.name.lower().endswith(_NIFTI)]
    dicom = list(scan_dicom(path for path in files if path.suffix.lower() in (".dcm", ".dicom", ".ima", "")
                            or path.suffix[1:].isdecimal()))  # fmt: skip
    drawings = [(path, header) for path, header in dicom if str(header.get("Modality")) in ("SEG", "RTSTRUCT")]
    series = [one for one in find_series(dicom) if "ImagePositionPatient" in one.headers[0][1]]
    others = IMAGE_SUFFIXES - {".dcm", ".dicom"} | {".csv", ".tsv", ".json", ".jsonl", ".parquet"}
    if not nifti and (not series or not (drawings or all(path.suffix.lower() not in others for path in files))):
        return None
    labels = [path for path in nifti if _is_label(path.relative_to(root))] or (nifti if series else [])
    images: list[tuple[Path, Series | None]] = [(path, None) for path in nifti if path not in labels]
    images += [(one.folder, one) for one in series]
    listing = Listing("folder", root, options)
    of_image: list[list[Labels]] = [[] for _ in images]
    words = [_tokens(image, root) for image, _ in images]
    for path in labels:
        matches, name = _matches(_tokens(path, root), words)
        if not matches:
            below = [at for at, (image, _) in enumerate(images) if path.parent in (image, *image.parents)]
            matches = below if len(below) == 1 else []
        if not matches:
            fix = "name the labels as the image, with _seg or in a folder labels"
            listing.problem("no_image", path, "no image, or more than one, has its name", fix)
        for at in matches:
            of_image[at].append(listing.labels(path, name))
    for path, header in drawings:
        ids = [(one.uid, one.headers[0][1].get("FrameOfReferenceUID")) if one else ("", "") for _, one in images]
        places = [place for place, (uid, _) in enumerate(ids) if uid in _referenced(header)]
        frame = str(header.get("FrameOfReferenceUID") or "unknown")
        places = places or [place for place, (_, of_series) in enumerate(ids) if of_series == frame]
        if len(places) == 1:
            of_image[places[0]].append(Labels(path, str(header.Modality)))
        else:
            listing.problem("no_image", path, "its series is not there", "add the series that it was drawn on")
    for at, (image, one) in enumerate(images):
        case = "_".join(word for word in words[at] if word not in _MODALITY_WORDS) or root.name
        told_by = one.modality if one else modality_of(_bare(image))
        patient, uid = (one.patient or case, one.uid) if one else (case, "")
        listing.add(image, tuple(of_image[at]), told_by, patient=patient, series=uid)
    return listing.source("volumes")


def _is_label(path: Path) -> bool:
    """By a word of the file's name, else of the nearest folder that has a word of either kind."""
    if _LABEL_WORDS & set(_words(_bare(path))):
        return True
    named = [set(_words(part)) & (_LABEL_WORDS | _IMAGE_WORDS) for part in reversed(path.parts[:-1])]
    return bool(next((words for words in named if words), set()) & _LABEL_WORDS)


def _tokens(path: Path, root: Path) -> list[str]:
    parts = path.relative_to(root).parts
    words = [word for part in (*parts[:-1], _bare(path) if parts else "") for word in _words(part)]
    return [word for word in words if word not in _LABEL_WORDS | _IMAGE_WORDS]


def _matches(label: list[str], images: list[list[str]]) -> tuple[list[int], str]:
    """Images whose words are all in the label's path, those with the most of them, and the words left over as a name.

    Where there are none, the words for modalities of images do not count: one file of labels then serves several."""
    for ignored in (frozenset[str](), _MODALITY_WORDS.keys()):
        kept = [[word for word in words if word not in ignored] for words in images]
        fitting = [at for at, words in enumerate(kept) if not set(words) - set(label)]
        if best := [at for at in fitting if len(kept[at]) == max(len(kept[other]) for other in fitting)]:
            left = [word for word in label if word not in images[best[0]] and not word.isdecimal()]
            apart = len({tuple(images[at]) for at in best}) == len(best)
            return (best if apart else []), " ".join(left)
    return [], ""


def _referenced(header: Any) -> set[str]:
    """UIDs of the series that a DICOM-SEG or RTSTRUCT was drawn on."""
    found = list(header.get("ReferencedSeriesSequence") or ())
    for frame in header.get("ReferencedFrameOfReferenceSequence") or ():
        for study in frame.get("RTReferencedStudySequence") or ():
            found += study.get("RTReferencedSeriesSequence") or ()
    return {str(item.SeriesInstanceUID) for item in found}
