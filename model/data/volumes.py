"""Volume reader: DICOM frames, the first volume of a NIfTI file or one picture, as slices to show and to ask about.

A volume is opened from bytes; its name is for messages and never opened. Formats are recognised by content. Sizes are
checked before pixels are decoded: a NIfTI header is judged before anything else is decompressed, and no more is
decompressed than the first volume takes. Of that header only the geometry is kept: descriptions, file names and
extensions may name the patient. What goes to the model is a PNG of one slice, nothing of the file itself.

Slices of NIfTI volumes are shown as radiologists look at them: axial ones with the patient's front at the top,
coronal and sagittal ones with the head at the top, the patient's right on the left of the picture, sagittal ones with
the front on the left. DICOM frames and plain pictures are shown as they are stored.
"""

from __future__ import annotations

import gzip
import io
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np
from PIL import Image

from model.data.dicom import DicomFrames, Window, first_line, open_dicom
from model.data.image_io import ImageData, ReadLimits, file_kind, read_image
from model.data.windowing import apply_window
from model.errors import MedPLIBError

Plane = Literal["axial", "coronal", "sagittal"]

_PLANES: tuple[Plane, ...] = ("sagittal", "coronal", "axial")  # by the axis of a left-posterior-superior array
_ANISOTROPIC = 1.5  # times coarser across slices than within: the plane that the scanner acquired
_SAMPLES = 1_000_000  # voxels that the first window of a NIfTI volume is estimated from
MAX_VOLUME_BYTES = 2**29
"""Values of one volume, decompressed, and what lies before them in the file."""
_HEADER_BYTES = {348: "1", 540: "2"}
_LONGEST_SIDE = 32_767  # of NIfTI-1
_GEOMETRY = (
    *("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z", "xyzt_units"),
)


class Limits(Protocol):
    """The part of ``ServeLimits`` that an upload has to keep."""

    @property
    def max_image_bytes(self) -> int:
        """Of an encoded picture."""

    @property
    def max_volume_bytes(self) -> int:
        """Of an encoded DICOM or NIfTI file."""

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
        notes: what a viewer has to know of the file: volumes not shown, header fields mended or ignored.
    """

    kind: Literal["picture", "dicom", "nifti"]
    name: str
    num_slices: int = 1
    size: tuple[int, int]
    window: Window | None = None
    spacing_mm: tuple[float, float] | None = None
    planes: tuple[Plane, ...] = ()
    plane: Plane | None = None
    notes: Sequence[str] = ()

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
        self.notes = frames.notes

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
        if source.volumes > 1:
            self.notes = (f"volume 1 of {source.volumes}",)

    def _pixels(self, index: int, window: Window | None) -> np.ndarray:
        values = self.source.scaled(_displayed(self._lps, self._axis, index))
        return np.repeat(apply_window(values, window or self.window or (0.0, 1.0))[:, :, None], 3, axis=2)

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
        name: what somebody called the file; in messages, and its ending helps to recognise DICOM without a preamble.
            Never opened.
        limits: on bytes, pixels of a slice, and slices.

    Raises:
        MedPLIBError: unreadable, damaged, two formats at once, too large, or none of these formats.
    """
    if not isinstance(data, bytes | bytearray):
        raise TypeError(f"expected a file's bytes, got {type(data).__name__}")
    data, name = bytes(data), _display_name(name)
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
        return NiftiVolume(read_nifti(data, name, MAX_VOLUME_BYTES), name, limits)
    try:
        return Picture(read_image(data, ReadLimits(limits.max_image_bytes, limits.max_pixels)), name)
    except MedPLIBError as error:
        sentence = str(error).replace("the image given as bytes", name)
        raise MedPLIBError(sentence.replace("BMP or DICOM was", "BMP, DICOM or NIfTI was")) from error


def _display_name(name: str) -> str:
    """A name for messages: the last part alone, printable, at most 80 characters with its ending."""
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    printable = "".join(character if character.isprintable() else "?" for character in last).strip()
    return (printable if len(printable) <= 80 else f"{printable[:64]}…{printable[-15:]}") or "the file"


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


@dataclass(frozen=True)
class Nifti:
    """The first volume of a NIfTI file, as it is stored.

    Attributes:
        values: [X, Y, Z] in the file's own type and order.
        scaling: (slope, intercept) that make real values of them.
        affine: float64 [4, 4], from voxel indices to mm towards the right, the front and the head.
        shape: of the file without its further volumes, 2 or 3 sides.
        volumes: in the file.
        range_shown: (smallest, largest) value that the file asks to be shown; None where it does not.
        header: of nibabel, geometry only.
    """

    values: np.ndarray
    scaling: tuple[float, float]
    affine: np.ndarray
    shape: tuple[int, ...]
    volumes: int
    range_shown: tuple[float, float] | None
    header: Any

    def scaled(self, values: np.ndarray) -> np.ndarray:
        """Stored values as real ones, float64."""
        slope, intercept = self.scaling
        return values.astype(np.float64) * slope + intercept


def read_nifti(content: bytes, name: str, max_voxels: int) -> Nifti:
    """Read the first volume of a ``.nii`` or ``.nii.gz`` file.

    Args:
        content: the whole file, compressed with gzip or not.
        name: what messages call the file.
        max_voxels: of the volume.

    Raises:
        MedPLIBError: no NIfTI single file, values that are no real numbers, too large, an orientation that cannot be
            followed, no finite value, damaged or cut short.
    """
    try:
        with _opened(content) as stream:
            header = _read_header(stream, name)
            shape = _shape(header, name, max_voxels)
            values = _read_values(stream, header, shape, name)
    except MedPLIBError:
        raise
    except (EOFError, OSError, zlib.error) as error:
        raise MedPLIBError(
            f"{name} cannot be decompressed ({first_line(error)}); it is damaged or cut short"
        ) from error
    if values.dtype.kind == "f" and not np.isfinite(values).any():
        raise MedPLIBError(f"{name} holds NaN or infinity in every voxel; there is no picture in it")
    slope, intercept = header.get_slope_inter()
    low, high = float(header["cal_min"]), float(header["cal_max"])
    return Nifti(
        values=values,
        scaling=(1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept)),
        affine=_affine(header, name),
        shape=shape,
        volumes=int(np.prod([int(side) for side in header.get_data_shape()[3:]], dtype=np.int64)),
        range_shown=(low, high) if np.isfinite([low, high]).all() and high > low else None,
        header=_geometry(header, shape),
    )


def write_nifti(labels: np.ndarray, affine: np.ndarray, like: Nifti | None = None, description: str = "") -> bytes:
    """A label map as the bytes of a compressed NIfTI file.

    Args:
        labels: uint8 or uint16, two or three sides.
        affine: [4, 4], taken where ``like`` is None.
        like: file whose geometry it has, to the bit.
        description: at most 79 ASCII characters of it are written.
    """
    import nibabel

    if like is None:
        wide = max(labels.shape) > _LONGEST_SIDE
        image: Any = (nibabel.Nifti2Image if wide else nibabel.Nifti1Image)(labels, affine)
        image.header.set_xyzt_units("mm")
    else:
        header = like.header.copy()
        header.set_data_dtype(labels.dtype)
        two = isinstance(header, nibabel.Nifti2Header)
        image = (nibabel.Nifti2Image if two else nibabel.Nifti1Image)(labels, None, header)
    image.header["descrip"] = description.encode("ascii", "replace")[:79]
    image.header["cal_max"] = int(labels.max(initial=0))
    return gzip.compress(image.to_bytes(), compresslevel=6, mtime=0)


def _header_size(content: bytes) -> int | None:
    """Bytes of the header by its first number, in either byte order."""
    sizes = {int.from_bytes(content[:4], order) for order in ("little", "big")}  # type: ignore[arg-type]
    return next((size for size in sizes if size in _HEADER_BYTES), None)


def _opened(content: bytes) -> BinaryIO:
    plain = io.BytesIO(content)
    return gzip.GzipFile(fileobj=plain) if content.startswith(b"\x1f\x8b") else plain  # type: ignore[return-value]


def _read_header(stream: BinaryIO, name: str) -> Any:
    import nibabel

    block = stream.read(348)
    size = _header_size(block) if len(block) == 348 else None
    if size is None:
        raise MedPLIBError(f"{name} holds no NIfTI image; .nii or .nii.gz was expected")
    block += stream.read(size - len(block))
    kind = nibabel.Nifti2Header if size == 540 else nibabel.Nifti1Header
    try:
        header = kind(block, check=True)
        magic = bytes(np.asarray(header["magic"]).tobytes())[:3]
    except Exception as error:  # nibabel raises many types on damaged headers
        raise MedPLIBError(f"{name} has a NIfTI header that cannot be followed ({first_line(error)})") from error
    if not magic.startswith(b"n+"):
        raise MedPLIBError(f"{name} is half of a NIfTI pair (.hdr and .img); convert it to one .nii file")
    return header


def _shape(header: Any, name: str, max_voxels: int) -> tuple[int, ...]:
    sides = tuple(int(side) for side in header.get_data_shape())
    sizes = " × ".join(str(side) for side in sides)
    if not 2 <= len(sides) <= 7 or any(side < 1 for side in sides):
        raise MedPLIBError(f"{name} is a NIfTI file of {sizes or 'no'} values; an image or a volume was expected")
    shape = sides[:3]
    if sum(side > 1 for side in shape) < 2:
        raise MedPLIBError(f"{name} is a NIfTI file of {sizes} values, which is no picture; give an image or a volume")
    voxels = 1
    for side in shape:
        voxels *= side
    if voxels > max_voxels:
        raise MedPLIBError(f"{name} is {sizes} voxels, more than the limit of {max_voxels:,}; crop or resample it")
    return shape


def _read_values(stream: BinaryIO, header: Any, shape: tuple[int, ...], name: str) -> np.ndarray:
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise MedPLIBError(f"{name} holds values of type {dtype}; whole or floating-point numbers were expected")
    offset, count = int(header.get_data_offset()), int(np.prod(shape, dtype=np.int64))
    size = count * dtype.itemsize
    if offset + size > MAX_VOLUME_BYTES:
        raise MedPLIBError(
            f"{name} takes {(offset + size) / 2**20:,.0f} MiB once it is decompressed, more than the limit of "
            f"{MAX_VOLUME_BYTES >> 20:,} MiB; crop it or store it in fewer bits"
        )
    stream.seek(offset)  # forward only; a compressed stream reads up to there
    data = stream.read(size)
    if len(data) < size:
        raise MedPLIBError(f"{name} holds {len(data):,} bytes of values where {size:,} were expected; it is cut short")
    stream.read(1)  # where nothing follows, this compares the checksum
    values = np.frombuffer(data, dtype=dtype).reshape(shape, order="F")
    return values.reshape((*shape, 1)[:3], order="F")


def _affine(header: Any, name: str) -> np.ndarray:
    try:
        affine = np.asarray(header.get_best_affine(), dtype=np.float64)
    except Exception as error:  # a quaternion that is none, and whatever else
        raise MedPLIBError(f"{name} has an orientation that cannot be followed ({first_line(error)})") from error
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) <= 1e-6 * lengths.prod():
        raise MedPLIBError(f"{name} has an orientation that cannot be followed; mend its sform or qform")
    return affine


def _geometry(header: Any, shape: Sequence[int]) -> Any:
    kept = type(header)()
    kept.set_data_dtype(np.uint8)
    kept.set_data_shape(tuple(shape))
    for field in _GEOMETRY:
        kept[field] = header[field]
    kept["pixdim"][:4] = header["pixdim"][:4]
    return kept
