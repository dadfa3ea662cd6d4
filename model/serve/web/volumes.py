"""What a person uploads, as slices that a page can show and a model can be asked about.

A volume is opened from bytes; its name is only ever told, never opened. Formats are recognised by content. Sizes are
checked before pixels are decoded, and what goes to the model is a PNG of one slice, nothing of the file itself.

Slices of NIfTI volumes are shown as radiologists look at them: axial ones with the patient's front at the top,
coronal and sagittal ones with the head at the top, the patient's right on the left of the picture, sagittal ones with
the front on the left. DICOM frames and plain pictures are shown as they are stored.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from model.data.dicom import shade
from model.data.dicom_frames import DicomFrames, dicom_frames
from model.data.nifti import MAX_VOLUME_BYTES, Nifti, looks_like_nifti, read_nifti
from model.data.readers import ImageData, ReadLimits, read_image
from model.errors import MedPLIBError

Window = tuple[float, float]
Plane = Literal["axial", "coronal", "sagittal"]

_PLANES: tuple[Plane, ...] = ("sagittal", "coronal", "axial")  # by the axis of a left-posterior-superior array
_OTHER_BEGINNINGS = (  # not TIFF: a DICOM file may carry a TIFF header, so that either kind of program finds its pixels
    *(b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"RIFF"),
    *(b"\x1f\x8b", b"PK", b"%PDF", b"MZ", b"\x7fELF", b"#!", b"<"),
)
_TIFF = (b"II*\0", b"MM\0*")
_ANISOTROPIC = 1.5  # times coarser across slices than within: the plane that the scanner acquired
_SAMPLES = 1_000_000  # voxels that the first window of a NIfTI volume is estimated from


class Limits(Protocol):
    """The part of ``ServeLimits`` that an upload has to keep."""

    @property
    def max_image_bytes(self) -> int:
        """Of the encoded file."""

    @property
    def max_pixels(self) -> int:
        """Of one slice."""

    @property
    def max_frames(self) -> int:
        """Slices of a volume."""


class Volume(ABC):
    """One or several slices of one file.

    Attributes:
        kind: ``picture``, ``dicom`` or ``nifti``.
        name: what messages call the file.
        num_slices: at least 1.
        size: (height, width) of a slice in pixels.
        window: (centre, width) in the file's own values that a slider starts at; None where there is nothing to window.
        spacing_mm: (row, column) distance of a slice's pixel centres; None where the file does not say.
        planes: that slices can be taken along; empty where there is no choice.
        plane: that they are taken along; None where the file does not know.
    """

    kind: Literal["picture", "dicom", "nifti"]
    name: str
    num_slices: int = 1
    size: tuple[int, int]
    window: Window | None = None
    spacing_mm: tuple[float, float] | None = None
    planes: tuple[Plane, ...] = ()
    plane: Plane | None = None

    @abstractmethod
    def _pixels(self, index: int, window: Window | None) -> np.ndarray:
        """uint8 [H, W, 3] of a slice that exists."""

    def slice(self, index: int, window: Window | None = None) -> np.ndarray:
        """One slice as uint8 [H, W, 3].

        Args:
            index: from 0 to ``num_slices`` − 1.
            window: (centre, width) in place of the file's own; of no effect where ``self.window`` is None.

        Raises:
            MedPLIBError: there is no such slice, the window has no width, or the slice is damaged.
        """
        index = self.checked(index)
        return self._pixels(index, _checked_window(window) if self.window is not None else None)

    def png(self, index: int, window: Window | None = None) -> bytes:
        """The slice as ``slice`` gives it, as a PNG file: what the model is sent."""
        pixels = self.slice(index, window)
        grey = bool((pixels[:, :, :1] == pixels[:, :, 1:]).all())
        encoded = io.BytesIO()
        Image.fromarray(pixels[:, :, 0] if grey else pixels).save(encoded, "PNG", compress_level=3)
        return encoded.getvalue()

    def along(self, plane: Plane) -> Volume:
        """The same volume in slices of another plane.

        Raises:
            MedPLIBError: it cannot be cut that way.
        """
        if plane == self.plane:
            return self
        choice = " or ".join(self.planes) or "none"
        raise MedPLIBError(f"{self.name} has no {plane} slices to choose; it can be cut {choice}")

    def checked(self, index: int) -> int:
        """The index of a slice that exists, as an int.

        Raises:
            MedPLIBError: it does not.
        """
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

    def _pixels(self, index: int, window: Window | None) -> np.ndarray:
        return self.frames.frame(index, window)


class NiftiVolume(Volume):
    """A NIfTI volume, cut along one of its planes.

    Args:
        source: the file's first volume.
        name: what messages call it.
        limits: on slices and their pixels; planes that do not keep them are not offered.
        plane: to cut along; the one it was acquired in when None.
        window: estimated already; from the values when None.
    """

    kind = "nifti"

    def __init__(
        self, source: Nifti, name: str, limits: Limits, plane: Plane | None = None, window: Window | None = None
    ) -> None:
        from nibabel import orientations

        self.source, self.name, self._limits = source, name, limits
        stored = orientations.io_orientation(source.affine)
        shown = orientations.axcodes2ornt("LPS")
        self._back = orientations.ornt_transform(shown, stored)
        self._lps = orientations.apply_orientation(source.values, orientations.ornt_transform(stored, shown))
        lengths = np.linalg.norm(source.affine[:3, :3], axis=0)
        self._lengths = [float(lengths[list(stored[:, 0]).index(axis)]) for axis in range(3)]
        self.planes = _planes(self._lps.shape, limits)
        if not self.planes:
            sides = " × ".join(str(side) for side in source.shape)
            raise MedPLIBError(
                f"{name} is {sides} voxels; at most {limits.max_frames:,} slices of {limits.max_pixels:,} pixels fit"
            )
        self.plane = plane or _acquired(self._lps.shape, self._lengths, self.planes)
        self._axis = _PLANES.index(self.plane)
        self.num_slices = self._lps.shape[self._axis]
        down, across = _down_and_across(self._axis)
        self.size = (self._lps.shape[down], self._lps.shape[across])
        self.spacing_mm = (self._lengths[down], self._lengths[across])
        self.window = window or _legible(_first_window(source))

    def _pixels(self, index: int, window: Window | None) -> np.ndarray:
        values = self.source.scaled(_displayed(self._lps, self._axis, index))
        return np.repeat(shade(values, window or self.window or (0.0, 1.0))[:, :, None], 3, axis=2)

    def along(self, plane: Plane) -> Volume:
        """The same volume in slices of another plane; the values are shared."""
        if plane not in self.planes or plane == self.plane:
            return super().along(plane)
        return NiftiVolume(self.source, self.name, self._limits, plane, self.window)

    def in_file(self, picture: np.ndarray, index: int) -> np.ndarray:
        """A slice's labels [H, W], as shown, at their place in an empty array of the file's own shape and order."""
        from nibabel import orientations

        labels = np.zeros(self._lps.shape, dtype=picture.dtype)
        _displayed(labels, self._axis, self.checked(index))[:] = picture
        stored = orientations.apply_orientation(labels, self._back)
        return np.ascontiguousarray(stored).reshape(self.source.shape)


def open_volume(data: bytes, name: str, limits: Limits) -> Volume:
    """Open an upload: PNG, JPEG, TIFF, BMP, DICOM of one or several frames, NIfTI of two to four dimensions.

    Args:
        data: the file's bytes.
        name: what somebody called the file; told in messages, and its ending helps to recognise DICOM without a
            preamble. Never opened.
        limits: on bytes, pixels of a slice, and slices.

    Raises:
        MedPLIBError: unreadable, damaged, two formats at once, too large, or none of these formats.
    """
    if not isinstance(data, bytes | bytearray):
        raise TypeError(f"expected a file's bytes, got {type(data).__name__}")
    data, told = bytes(data), _told(name)
    if not data:
        raise MedPLIBError(f"{told} is empty; give an image")
    if len(data) > limits.max_image_bytes:
        raise MedPLIBError(
            f"{told} is larger than the limit of {limits.max_image_bytes / 2**20:.3g} MiB; give a smaller file"
        )
    marked = data[128:132] == b"DICM"
    if marked and data.startswith(_OTHER_BEGINNINGS):
        raise MedPLIBError(f"{told} is a DICOM file and something else at once; export it as plain DICOM")
    if marked or (name.lower().endswith((".dcm", ".dicom")) and not data.startswith(_OTHER_BEGINNINGS + _TIFF)):
        return DicomVolume(dicom_frames(data, told, limits.max_pixels, limits.max_frames), told)
    if data.startswith(b"\x1f\x8b") or looks_like_nifti(data) or name.lower().endswith(".nii"):
        return NiftiVolume(read_nifti(data, told, MAX_VOLUME_BYTES), told, limits)
    return Picture(_read_picture(data, told, limits), told)


def _read_picture(data: bytes, told: str, limits: Limits) -> ImageData:
    try:
        return read_image(data, ReadLimits(limits.max_image_bytes, limits.max_pixels))
    except MedPLIBError as error:
        sentence = str(error).replace("the image given as bytes", told)
        raise MedPLIBError(sentence.replace("BMP or DICOM was", "BMP, DICOM or NIfTI was")) from error


def _told(name: str) -> str:
    """A name for messages: the last part alone, printable, not endless."""
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    printable = "".join(character if character.isprintable() else "?" for character in last).strip()
    return printable[:80] or "the file"


def _checked_window(window: Any) -> Window | None:
    if window is None:
        return None
    try:
        centre, width = (float(value) for value in window)
    except (TypeError, ValueError):
        centre = width = float("nan")
    if not np.isfinite([centre, width]).all() or width <= 0:
        raise MedPLIBError(f"a window is a centre and a width above 0; got {window!r:.60}")
    return centre, width


def _down_and_across(axis: int) -> tuple[int, int]:
    """Axes of a left-posterior-superior array that go down and across a slice taken along ``axis``."""
    return ((2, 1), (2, 0), (1, 0))[axis]


def _displayed(lps: np.ndarray, axis: int, index: int) -> np.ndarray:
    """View of one slice as shown: heads are up, which is against the axis."""
    picture = np.moveaxis(lps, axis, 0)[index].T
    return picture if axis == 2 else picture[::-1]


def _planes(shape: tuple[int, ...], limits: Limits) -> tuple[Plane, ...]:
    """Planes to choose from: flat volumes have one, and each keeps the limits."""
    fitting = []
    for axis in (2, 1, 0):
        down, across = _down_and_across(axis)
        flat = min(shape[down], shape[across]) == 1 and sorted(shape)[1] > 1
        if not flat and shape[axis] <= limits.max_frames and shape[down] * shape[across] <= limits.max_pixels:
            fitting.append(_PLANES[axis])
    return tuple(fitting)


def _acquired(shape: tuple[int, ...], lengths: list[float], planes: tuple[Plane, ...]) -> Plane:
    """The plane with the finest pixels where slices are clearly further apart than that, else the first."""
    axes = [_PLANES.index(plane) for plane in planes]
    coarsest = max(axes, key=lambda axis: lengths[axis])
    others = [lengths[axis] for axis in range(3) if axis != coarsest]
    return _PLANES[coarsest] if lengths[coarsest] > _ANISOTROPIC * max(others) else planes[0]


def _legible(window: Window | None) -> Window | None:
    """A window in figures that fit beside a slider: to a thousandth of its width, one decimal at least."""
    if window is None or not (np.isfinite(window).all() and window[1] > 0):
        return window
    digits = max(1, 3 - int(np.floor(np.log10(window[1]))))
    return round(window[0], digits), round(window[1], digits)


def _first_window(source: Nifti) -> Window:
    """What the file asks for, else from the darkest to the brightest half percent."""
    if source.range_shown:
        low, high = source.range_shown
    else:
        flat = source.values.reshape(-1, order="A")
        sample = source.scaled(flat[:: max(1, flat.size // _SAMPLES)])
        sample = sample[np.isfinite(sample)]
        low, high = (float(value) for value in np.percentile(sample, (0.5, 99.5))) if sample.size else (0.0, 1.0)
        if high <= low and sample.size:
            low, high = float(sample.min()), float(sample.max())
    return (low + high) / 2, high - low if high > low else 1.0
