"""Structures drawn on a volume: label NIfTI, DICOM-SEG and RTSTRUCT, each as booleans on the volume's grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from scipy.ndimage import affine_transform

from model.data.dicom import followed
from model.data.volumes import slice_of
from model.data.voxels import TO_RAS, UNLIMITED, Grid, read_nifti
from model.errors import MedPLIBError

_SEEN = 0.9  # share of a slice's pixels that labels of another grid have to cover


@dataclass(frozen=True)
class Structure:
    """Where one structure is in a volume of the order left, posterior, superior: a bounding box and its booleans."""

    corner: tuple[int, ...]
    inside: np.ndarray

    def slices(self, axis: int) -> set[int]:
        """Numbers of the slices along ``axis`` that show it."""
        others = tuple(other for other in range(3) if other != axis)
        return set((self.corner[axis] + np.flatnonzero(self.inside.any(axis=others))).tolist())

    def mask(self, shape: Sequence[int], axis: int, index: int) -> np.ndarray:
        """bool [H, W] of one slice as shown."""
        plane = np.zeros([1 if at == axis else side for at, side in enumerate(shape)], dtype=bool)
        at = index - self.corner[axis]
        if 0 <= at < self.inside.shape[axis]:
            place = [slice(start, start + side) for start, side in zip(self.corner, self.inside.shape, strict=True)]
            place[axis] = slice(0, 1)
            plane[tuple(place)] = np.take(self.inside, [at], axis=axis)
        return slice_of(plane, axis, 0)


@dataclass
class Drawing:
    """What one file of labels holds."""

    structures: dict[str, Structure] = field(default_factory=dict)  # name → place; empty ones are not in it
    names: tuple[str, ...] = ()  # of all that the file could show
    # bool along each axis: slices that the labels cover; None where that is all
    seen: tuple[np.ndarray, ...] | None = None
    # (kind, sentence, fix) of what was taken another way than it is written
    notes: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, name: str, inside: np.ndarray) -> None:
        """A structure by its booleans in the volume's order."""
        spans = [np.flatnonzero(inside.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
        if len(spans[0]):
            box = tuple(slice(int(span[0]), int(span[-1]) + 1) for span in spans)
            self.structures[name] = Structure(tuple(part.start for part in box), inside[box].copy())


def place_labels(labels: np.ndarray, own: Grid, grid: Grid, drawing: Drawing) -> np.ndarray:
    """Labels in the order of ``grid.lps``; those of another lattice are resampled to the nearest voxel, which is noted.
    Raises MedPLIBError: they do not overlap with the volume."""
    covered = np.zeros(grid.lps.shape, dtype=bool)
    if (offset := grid.offset(own)) is not None:
        turned = own.to_lps(labels)
        if not offset.any() and turned.shape == covered.shape:
            return turned
        if np.allclose(own.affine, grid.affine, atol=1e-3):  # a crop whose place got lost looks like this
            sides, others = (" × ".join(map(str, one.shape)) for one in (own, grid))
            raise MedPLIBError(
                f"its labels of {sides} voxels begin where the image of {others} does; give its own labels"
            )
        start, end = np.maximum(offset, 0), np.maximum(np.minimum(offset + turned.shape, covered.shape), 0)
        there, here = (
            tuple(slice(low, max(low, high)) for low, high in zip(start - by, end - by, strict=True))
            for by in (0, offset)
        )
        placed = np.zeros(covered.shape, dtype=labels.dtype)
        placed[there], covered[there] = turned[here], True
    else:
        matrix, shape = np.linalg.inv(own.affine) @ grid.lps.affine, covered.shape
        where: Any = (matrix[:3, :3], matrix[:3, 3], shape)
        placed = affine_transform(labels, *where, order=0, mode="grid-constant")
        covered = affine_transform(np.ones(labels.shape, dtype=bool), *where, order=0, mode="grid-constant")
    if not covered.any() or (labels.any() and not placed.any()):
        raise MedPLIBError("its labels lie outside of the image; give labels of this image")
    drawing.seen = tuple(covered.mean(axis=tuple({0, 1, 2} - {axis})) >= _SEEN for axis in range(3))
    sides, others = (" × ".join(str(side) for side in one.shape) for one in (own, grid))
    how = "are on a part of" if offset is not None else "were resampled, each voxel from the nearest, to"
    said = f"labels of {sides} voxels {how} the image's grid of {others}; slices that they do not cover are left out"
    drawing.notes.append(("other_grid", said, "give labels on the image's grid"))
    return placed


def read_label_nifti(path: Path, grid: Grid, names: Mapping[str, tuple[int, ...]], default: str = "") -> Drawing:
    """The structures of a NIfTI file of labels. Raises MedPLIBError: unreadable, several volumes, fractions of several
    structures, or off the volume.

    Args:
        path: of the file.
        grid: of the volume.
        names: structure → its values.
        default: name of a file's only value, where ``names`` is empty.
    """
    source = read_nifti(path.read_bytes(), str(path), UNLIMITED, UNLIMITED)
    if source.volumes > 1:
        raise MedPLIBError(f"it holds {source.volumes} volumes of labels; give one file for each")
    drawing, own = Drawing(names=tuple(names)), source.grid
    if source.header["qform_code"] == 0 == source.header["sform_code"] and own.shape == grid.shape:
        if np.abs(own.affine - grid.affine).max() > 1e-3:
            drawing.notes.append(("no_place", "the labels do not say where they lie; they were taken voxel for voxel",
                                  "copy the image's affine into the file of labels"))  # fmt: skip
        own = grid
    values = np.nan_to_num(source.scaled(source.values) if source.scaling != (1.0, 0.0) else source.values)
    if values.dtype.kind == "f":
        whole = np.rint(values)
        if np.abs(values - whole).max() > 1e-3:
            if len(names) > 1 or values.max() > 1:
                raise MedPLIBError("its labels are fractions; save each voxel's label as a whole number")
            drawing.notes.append(("float_labels", "the labels are fractions; half and more was taken as inside",
                                  "save labels as whole numbers"))  # fmt: skip
            whole = values >= 0.5
        values = whole
    values = values.astype(np.int64 if values.min() < 0 or values.max() > 65535 else np.uint16)
    present = {int(value) for value in np.unique(values)} - {0}
    known = {value for group in names.values() for value in group}
    if present == {255} and (known == {1} or not names):
        drawing.notes.append(("value_255", "the labels are 0 and 255; 255 was taken as 1", "save labels as 0 and 1"))
        values, present = (values > 0).astype(np.uint8), {1}
    if not names and len(present) == 1 and default:
        names, known = {default: tuple(present)}, present
        drawing.names = (default,)
    elif not names and not present and default:
        drawing.names = (default,)
    elif not names and len(present) > 1:
        names, known = {f"class {value}": (value,) for value in sorted(present)}, present
        drawing.names = tuple(names)
        said = f"nothing names its {len(present)} label values; they are asked for as {', '.join(drawing.names[:3])} …"
        drawing.notes.append(("legend_missing", said, "name them by --names CSV (value,name)"))
    if unnamed := sorted(present - known):
        listed = ", ".join(str(value) for value in unnamed[:10]) + (" …" if len(unnamed) > 10 else "")
        drawing.notes.append(("unnamed_values", f"nothing says what the label values {listed} are; they are left out",
                              "name them by --names CSV (value,name), or one alone by --target NAME"))  # fmt: skip
    if known & present:
        placed = place_labels(values, own, grid, drawing)
        for name, group in names.items():
            if present & set(group):
                drawing.add(name, placed == group[0] if len(group) == 1 else np.isin(placed, group))
    return drawing


def read_dicom_seg(path: Path, grid: Grid) -> Drawing:
    """The segments of a DICOM segmentation, binary, fractional (half and more) or a label map. Raises MedPLIBError:
    damaged, or off the volume."""
    from highdicom.seg import segread

    def segments() -> Drawing:
        read, drawing = segread(path), Drawing()
        for number in read.segment_numbers:
            name = tidy_name(read.get_segment_description(number).segment_label)
            found = read.get_volume(segment_numbers=[number], rtol=0.05)
            inside, own = found.array[..., 0] >= 0.5, Grid(found.array.shape[:3], TO_RAS @ found.affine)
            placed = place_labels(inside, own, grid, drawing)
            if grid.offset(own) is not None:  # frames without the segment are not in the file
                drawing.seen, drawing.notes = None, []
            drawing.names += (name,)
            drawing.add(name, placed)
        return drawing

    return followed(str(path), segments)


def read_rtstruct(path: Path, grid: Grid) -> Drawing:
    """The regions of an RTSTRUCT: closed contours of one slice are filled together by the even-odd rule, so a contour
    inside of another one is a hole. A pixel is inside where its centre is. Raises MedPLIBError: damaged, or off the
    volume.

    Args:
        path: of the file.
        grid: of the series, in its stored order: contours lie in its slices.
    """
    return followed(str(path), lambda: _regions(pydicom.dcmread(path, force=True), grid))


def _regions(data: Any, grid: Grid) -> Drawing:
    drawing = Drawing()
    names = {int(roi.ROINumber): tidy_name(str(roi.ROIName)) for roi in data.StructureSetROISequence}
    to_voxels = np.linalg.inv(grid.affine) @ TO_RAS
    for roi in data.get("ROIContourSequence") or ():
        name, crossings, skipped = names[int(roi.ReferencedROINumber)], np.zeros(grid.shape, dtype=bool), 0
        for contour in roi.get("ContourSequence") or ():
            points = np.array(contour.ContourData, dtype=np.float64).reshape(-1, 3)
            at = points @ to_voxels[:3, :3].T + to_voxels[:3, 3]
            level = round(float(at[:, 2].mean()))
            flat = np.abs(at[:, 2] - level).max() <= 0.5 and 0 <= level < grid.shape[2]
            if str(contour.ContourGeometricType).startswith("CLOSED") and len(points) > 2 and flat:
                _cross(crossings[:, :, level], at[:, :2])
            else:
                skipped += 1
        if skipped:
            said = f"{skipped} contours of {name!r} are open or lie in no slice of the series; they are left out"
            drawing.notes.append(("contours", said, "draw closed contours on its slices"))
        if roi.get("ContourSequence"):
            drawing.names += (name,)
            drawing.add(name, grid.to_lps(np.logical_xor.accumulate(crossings, axis=0)))
    if drawing.names and not drawing.structures:
        raise MedPLIBError("none of its contours lies in the series; give the series that it was drawn on")
    return drawing


def _cross(crossings: np.ndarray, points: np.ndarray) -> None:
    """Flip, in bool [columns, rows], the first pixel to the right of each edge in each row that the edge crosses."""
    columns, rows = crossings.shape
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
        crossed = np.arange(max(0, int(np.ceil(min(y0, y1)))), min(rows, int(np.ceil(max(y0, y1)))))
        if len(crossed):
            right = np.ceil(x0 + (crossed - y0) * (x1 - x0) / (y1 - y0)).clip(0).astype(int)
            within = right < columns
            crossings[right[within], crossed[within]] ^= True


def tidy_name(text: str) -> str:
    """A name of a structure as it is said: "Liver_Tumor" → "liver tumor"; capitals alone stay ("GTV")."""
    words = text.replace("_", " ").split()
    return " ".join(word if word.isupper() else word.lower() for word in words)
