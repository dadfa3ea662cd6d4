"""Volume reader: DICOM frames or series, the first volume of a NIfTI file or one picture, as slices to be asked about.

An upload is opened from bytes; its name is for messages and never opened. Formats are recognised by content. A file of
one's own, or a DICOM series, is opened by its path and has no limits. What goes to the model is a PNG of one slice,
nothing of the file itself.

Slices of NIfTI volumes and DICOM series are shown as radiologists look at them: axial ones with the patient's front at
the top, coronal and sagittal ones with the head at the top, the patient's right on the left of the picture, sagittal
ones with the front on the left. Frames of one DICOM file and plain pictures are shown as they are stored.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
from PIL import Image

from model.data.dicom import DicomFrames, Window, apply_window, open_dicom
from model.data.image_io import ImageData, ReadLimits, file_kind, read_image
from model.data.voxels import (
    MAX_VOLUME_BYTES,
    UNLIMITED,
    Grid,
    Voxels,
    read_nifti,
    read_nifti_grid,
    read_series,
    series_in,
)
from model.errors import MedPLIBError

Plane = Literal["axial", "coronal", "sagittal"]

_PLANES: tuple[Plane, ...] = ("sagittal", "coronal", "axial")  # by the axis of a left-posterior-superior array
_DOWN_AND_ACROSS = ((2, 1), (2, 0), (1, 0))  # the other axes, as a slice along each is shown
_ANISOTROPIC = 1.5  # times coarser across slices than within: the plane that the scanner acquired
CT_WINDOWS = {"soft_tissue": (-160.0, 240.0), "lung": (-1350.0, 150.0), "bone": (-450.0, 1050.0), "brain": (0.0, 80.0)}
"""Name → (lower, upper) Hounsfield units."""


class Limits(Protocol):
    """The part of ``ServeLimits`` that an upload has to keep.

    Attributes:
        max_image_bytes: of an encoded picture.
        max_volume_bytes: of an encoded DICOM or NIfTI file.
        max_pixels: of one slice.
        max_frames: slices of a volume.
    """

    @property
    def max_image_bytes(self) -> int: ...
    @property
    def max_volume_bytes(self) -> int: ...
    @property
    def max_pixels(self) -> int: ...
    @property
    def max_frames(self) -> int: ...


class Volume(ABC):
    """One or several slices of one file."""

    kind: Literal["picture", "dicom", "nifti"]  # ``picture``, ``dicom`` or ``nifti``
    name: str  # what messages call the file
    num_slices: int = 1  # at least 1
    size: tuple[int, int]  # (height, width) of a slice in pixels
    # (centre, width) in the file's own values that a slider starts at; None where there is nothing to window
    window: Window | None = None
    # (row, column) distance of a slice's pixel centres; None where the file does not say
    spacing_mm: tuple[float, float] | None = None
    planes: tuple[Plane, ...] = ()  # that slices can be taken along; empty where there is no choice
    plane: Plane | None = None  # that they are taken along; None where the file does not know
    # what a viewer has to know of the file: volumes not shown, header fields mended or ignored
    notes: Sequence[str] = ()

    @abstractmethod
    def _pixels(self, index: int, window: Window | None) -> np.ndarray:
        """uint8 [H, W, 3] of a slice that exists."""

    def slice(self, index: int, window: Window | None = None) -> np.ndarray:
        """One slice as uint8 [H, W, 3]. Raises MedPLIBError: there is no such slice, the window has no width, or the
        slice is damaged.

        Args:
            index: from 0 to ``num_slices`` − 1.
            window: (centre, width) in place of the file's own; of no effect where ``self.window`` is None.
        """
        index = self.checked(index)
        if self.window is None or window is None:
            return self._pixels(index, None)
        try:
            centre, width = (float(value) for value in window)
        except (TypeError, ValueError):
            centre = width = float("nan")
        if not np.isfinite([centre, width]).all() or width <= 0:
            raise MedPLIBError(f"a window is a centre and a width above 0; got {window!r:.60}")
        return self._pixels(index, (centre, width))

    def png(self, index: int, window: Window | None = None) -> bytes:
        """The slice as ``slice`` gives it, as a PNG file: what the model is sent."""
        pixels = self.slice(index, window)
        grey = bool((pixels[:, :, :1] == pixels[:, :, 1:]).all())
        encoded = io.BytesIO()
        Image.fromarray(pixels[:, :, 0] if grey else pixels).save(encoded, "PNG", compress_level=3)
        return encoded.getvalue()

    def along(self, plane: Plane) -> Volume:
        """The same volume in slices of another plane. Raises MedPLIBError: it cannot be cut that way."""
        if plane == self.plane:
            return self
        choice = " or ".join(self.planes) or "none"
        raise MedPLIBError(f"{self.name} has no {plane} slices to choose; it can be cut {choice}")

    def checked(self, index: int) -> int:
        """The index of a slice that exists, as an int. Raises MedPLIBError: it does not."""
        if not 0 <= index < self.num_slices:
            raise MedPLIBError(f"{self.name} has slices 1 to {self.num_slices}; there is no slice {int(index) + 1}")
        return int(index)


class Picture(Volume):
    """A plain picture: one slice, turned upright."""

    kind = "picture"

    def __init__(self, data: ImageData, name: str) -> None:
        self.data, self.name, self.size, self.spacing_mm = data, name, data.size, data.spacing_mm

    def _pixels(self, index: int, window: Window | None) -> np.ndarray:
        return self.data.pixels


class DicomVolume(Volume):
    """The frames of a DICOM file."""

    kind = "dicom"

    def __init__(self, frames: DicomFrames, name: str) -> None:
        self.frames, self.name = frames, name
        self.size = frames.size
        self.num_slices, self.window, self.spacing_mm = frames.count, _legible(frames.window), frames.spacing_mm
        self.notes = frames.notes

    def _pixels(self, index: int, window: Window | None) -> np.ndarray:
        return self.frames.frame(index, window)


class Cut(NamedTuple):
    """A grid in slices of one plane: axis of ``grid.lps`` they follow, number, (height, width), (row, column) mm."""

    plane: Plane
    axis: int
    slices: int
    size: tuple[int, int]
    spacing_mm: tuple[float, float]


def cut(grid: Grid, plane: str = "acquired", limits: Limits | None = None) -> Cut:
    """Slices of a grid along ``axial``, ``coronal`` or ``sagittal``, or along the plane it was acquired in. Raises
    MedPLIBError: it has no such slices, or they do not keep the limits."""
    shape, lengths, planes = grid.lps.shape, grid.lps.spacing, _planes(grid.lps.shape, limits)
    if not planes or (plane != "acquired" and plane not in planes):
        fitting = f"; at most {limits.max_frames:,} slices of {limits.max_pixels:,} pixels fit" if limits else ""
        sides = " × ".join(str(side) for side in grid.shape)
        raise MedPLIBError(f"it is {sides} voxels and has no {plane} slices" + fitting)
    if plane == "acquired":  # that with the finest pixels where slices are clearly further apart, else the first
        coarsest = max(map(_PLANES.index, planes), key=lambda axis: lengths[axis])
        apart = lengths[coarsest] > _ANISOTROPIC * max(np.delete(lengths, coarsest))
        plane = _PLANES[coarsest] if apart else planes[0]
    axis = list[str](_PLANES).index(plane)
    down, across = _DOWN_AND_ACROSS[axis]
    return Cut(
        _PLANES[axis], axis, shape[axis], (shape[down], shape[across]), (float(lengths[down]), float(lengths[across]))
    )


class VoxelVolume(Volume):
    """A volume of a NIfTI file or a DICOM series, cut along one of its planes.

    Args:
        source: its voxels.
        name: what messages call it.
        limits: on slices and their pixels; planes that do not keep them are not offered.
        plane: to cut along; the one it was acquired in when None.
        window: estimated already; from the values when None.
    """

    kind = "nifti"

    def __init__(
        self,
        source: Voxels,
        name: str,
        limits: Limits | None = None,
        plane: Plane | None = None,
        window: Window | None = None,
    ) -> None:
        self.source, self.name, self._limits = source, name, limits
        self._lps = source.grid.to_lps(source.values)
        self.planes = _planes(self._lps.shape, limits)
        try:
            found = cut(source.grid, plane or "acquired", limits)
        except MedPLIBError as error:
            raise MedPLIBError(f"{name}: {error}") from error
        self.plane, self._axis, self.num_slices, self.size, self.spacing_mm = found
        low, high = source.range_shown or (0.0, 0.0)  # what the file asks for, else its percentiles
        own = ((low + high) / 2, high - low) if source.range_shown else source.percentile_window
        self.window = window or _legible(own)
        if source.volumes > 1:
            self.notes = (f"volume 1 of {source.volumes}",)

    def _pixels(self, index: int, window: Window | None) -> np.ndarray:
        values = self.source.scaled(slice_of(self._lps, self._axis, index))
        return np.repeat(apply_window(values, window or self.window or (0.0, 1.0))[:, :, None], 3, axis=2)

    def along(self, plane: Plane) -> Volume:
        """The same volume in slices of another plane; the values are shared."""
        if plane not in self.planes or plane == self.plane:
            return super().along(plane)
        return VoxelVolume(self.source, self.name, self._limits, plane, self.window)

    def in_file(self, picture: np.ndarray, index: int) -> np.ndarray:
        """A slice's labels [H, W], as shown, at their place in an empty array of the file's own shape and order."""
        labels = np.zeros(self._lps.shape, dtype=picture.dtype)
        slice_of(labels, self._axis, self.checked(index))[:] = picture
        return np.ascontiguousarray(self.source.grid.from_lps(labels)).reshape(self.source.shape)


def parse_window(words: Sequence[str]) -> tuple[float, float]:
    """(lower, upper) of two numbers, or of a name of ``CT_WINDOWS``. Raises MedPLIBError: neither."""
    try:
        low, high = CT_WINDOWS[words[0]] if len(words) == 1 else map(float, words)
    except (KeyError, ValueError):
        low = high = 0.0
    if not low < high:
        raise MedPLIBError(
            f"a window is two rising values or one of {', '.join(CT_WINDOWS)}; got {' '.join(words)!r:.80}"
        )
    return low, high


def open_volume(data: bytes, name: str, limits: Limits) -> Volume:
    """Open an upload: PNG, JPEG, TIFF, BMP, DICOM of one or several frames, NIfTI of two to four dimensions. Raises
    MedPLIBError: unreadable, damaged, two formats at once, too large, or none of these formats.

    Args:
        data: the file's bytes.
        name: what somebody called the file; in messages, and its ending helps to recognise DICOM without a
            preamble. Never opened.
        limits: on bytes, pixels of a slice, and slices.
    """
    if not isinstance(data, bytes | bytearray):
        raise TypeError(f"expected a file's bytes, got {type(data).__name__}")
    data = bytes(data)
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    name = "".join(character if character.isprintable() else "?" for character in last).strip() or "the file"
    name = name if len(name) <= 80 else f"{name[:64]}…{name[-15:]}"
    if not data:
        raise MedPLIBError(f"{name} is empty; give an image")
    kind = file_kind(name, data)
    if kind == "picture" and data.startswith(b"\x1f\x8b"):
        kind = "nifti"
    most = limits.max_image_bytes if kind == "picture" else limits.max_volume_bytes
    if len(data) > most:
        raise MedPLIBError(f"{name} is larger than the limit of {most / 2**20:.3g} MiB; give a smaller file")
    if kind == "dicom":
        return DicomVolume(open_dicom(data, name, limits.max_pixels, limits.max_frames), name)
    if kind == "nifti":
        return VoxelVolume(read_nifti(data, name, MAX_VOLUME_BYTES), name, limits)
    try:
        return Picture(read_image(data, ReadLimits(limits.max_image_bytes, limits.max_pixels)), name)
    except MedPLIBError as error:
        sentence = str(error).replace("the image given as bytes", name)
        raise MedPLIBError(sentence.replace("BMP or DICOM was", "BMP, DICOM or NIfTI was")) from error


@lru_cache(maxsize=2)
def open_path(path: Path, series: str = "") -> VoxelVolume:
    """Open a NIfTI file or the DICOM series of a folder, of any size; the last two stay open. Raises MedPLIBError: it
    cannot be read, is no volume, or the folder holds no or several series.

    Args:
        path: of the file or the folder.
        series: SeriesInstanceUID, where the folder has several.
    """
    if path.is_dir():
        return VoxelVolume(read_series(series_in(path, series)), str(path))
    try:
        content = path.read_bytes()
    except OSError as error:
        raise MedPLIBError(f"cannot read {path}: {error.strerror}; give a NIfTI file or a folder of DICOM") from error
    return VoxelVolume(read_nifti(content, str(path), UNLIMITED, UNLIMITED), str(path))


def grid_of(path: Path, series: str = "") -> tuple[Grid, int]:
    """Grid and number of volumes of what ``open_path`` opens, from headers alone."""
    return (series_in(path, series).stack[1], 1) if path.is_dir() else read_nifti_grid(path)


def slice_of(lps: np.ndarray, axis: int, index: int) -> np.ndarray:
    """View of one slice of a left-posterior-superior array as shown: heads are up, which is against the axis."""
    picture = np.moveaxis(lps, axis, 0)[index].T
    return picture if axis == 2 else picture[::-1]


def _planes(shape: tuple[int, ...], limits: Limits | None) -> tuple[Plane, ...]:
    """Planes to choose from: flat volumes have one, and each keeps the limits."""
    fitting = []
    for axis in (2, 1, 0):
        down, across = _DOWN_AND_ACROSS[axis]
        flat = min(shape[down], shape[across]) == 1 and sorted(shape)[1] > 1
        kept = limits is None or (shape[axis] <= limits.max_frames and shape[down] * shape[across] <= limits.max_pixels)
        if not flat and kept:
            fitting.append(_PLANES[axis])
    return tuple(fitting)


def _legible(window: Window | None) -> Window | None:
    """A window in figures that fit beside a slider: to a thousandth of its width, one decimal at least."""
    if window is None or not (np.isfinite(window).all() and window[1] > 0):
        return window
    digits = max(1, 3 - int(np.floor(np.log10(window[1]))))
    return round(window[0], digits), round(window[1], digits)
