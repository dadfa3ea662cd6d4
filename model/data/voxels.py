"""Voxels on their grid: the first volume of a NIfTI file, or the images of a DICOM series.

Sizes are checked before pixels are decoded: a NIfTI header is judged before anything else is decompressed, and no more
is decompressed than the first volume takes. Of headers only the geometry is kept: descriptions, file names and
extensions may name the patient.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import nibabel
import numpy as np
from nibabel import orientations

from model.data.dicom import first_line, followed, open_dicom
from model.data.image_io import nifti_header_size
from model.errors import MedPLIBError

MAX_VOLUME_BYTES = 2**29
"""Values of one uploaded volume, decompressed, and what lies before them in the file."""
UNLIMITED = 2**40
"""Bytes, voxels, pixels: for files of one's own."""
MODALITY_CODES = {"CT": "ct", "MR": "mr", "PT": "pet", "US": "ultrasound", "CR": "x_ray", "DX": "x_ray", "MG": "x_ray"}
_SAMPLES = 1_000_000  # voxels that percentiles are estimated from
_LONGEST_SIDE = 32_767  # of NIfTI-1
_GEOMETRY = (
    *("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z", "xyzt_units"),
)
_SERIES_TAGS = (
    *("SeriesInstanceUID", "Modality", "PatientID", "FrameOfReferenceUID", "Rows", "Columns", "NumberOfFrames"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"),
    *("ReferencedSeriesSequence", "ReferencedFrameOfReferenceSequence"),
)
TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""Turns mm of DICOM, towards the left and the back, into ours."""


@dataclass(frozen=True)
class Grid:
    """Where voxels lie: sides of the array as it is stored, and its affine [4, 4] to mm (right, front, head)."""

    shape: tuple[int, int, int]
    affine: np.ndarray

    @cached_property
    def _turn(self) -> np.ndarray:
        stored = orientations.io_orientation(self.affine)
        return orientations.ornt_transform(stored, orientations.axcodes2ornt("LPS"))

    @cached_property
    def lps(self) -> Grid:
        """The same places with the axis nearest to right-left first, towards the left, then the back, then the head."""
        shape = tuple(self.shape[axis] for axis in np.argsort(self._turn[:, 0]))
        return Grid(shape, self.affine @ orientations.inv_ornt_aff(self._turn, self.shape))  # type: ignore[arg-type]

    @property
    def spacing(self) -> np.ndarray:
        """[3] distances in mm of neighbours along the stored axes."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    def to_lps(self, stored: np.ndarray) -> np.ndarray:
        """View of an array of ``shape`` in the order of ``lps``."""
        return orientations.apply_orientation(stored, self._turn)

    def from_lps(self, turned: np.ndarray) -> np.ndarray:
        """The reverse of ``to_lps``."""
        axes = self._turn[:, 0].argsort()
        return orientations.apply_orientation(turned, np.stack([axes, self._turn[axes, 1]], axis=1))

    def offset(self, other: Grid) -> np.ndarray | None:
        """[3] voxel of ``lps`` that the first one of ``other.lps`` is at; None where voxels lie between these."""
        matrix = np.linalg.inv(self.lps.affine) @ other.lps.affine
        drift = np.abs((matrix[:3, :3] - np.eye(3)) * other.lps.shape).sum(axis=1).max()
        start = matrix[:3, 3].round()
        return start.astype(int) if drift < 0.2 and np.abs(matrix[:3, 3] - start).max() < 0.1 else None


@dataclass(frozen=True)
class Voxels:
    """A volume as it is stored."""

    values: np.ndarray  # [X, Y, Z] in the file's own type and order
    scaling: tuple[float, float]  # (slope, intercept) that make real values of them
    affine: np.ndarray  # float64 [4, 4], from voxel indices to mm towards the right, the front and the head
    shape: tuple[int, ...]  # of the file without its further volumes, 2 or 3 sides
    volumes: int  # in the file
    # (smallest, largest) value that the file asks to be shown; None where it does not
    range_shown: tuple[float, float] | None
    header: Any = None  # of nibabel, geometry only; None for a DICOM series
    modality: str = ""  # one of ``schema.MODALITIES`` where the file says it, else empty

    @cached_property
    def grid(self) -> Grid:
        """Where the values lie."""
        return Grid(self.values.shape, self.affine)  # type: ignore[arg-type]

    @cached_property
    def percentile_window(self) -> tuple[float, float]:
        """(centre, width) from the darkest to the brightest half percent."""
        flat = self.values.reshape(-1, order="A")
        sample = self.scaled(flat[:: max(1, flat.size // _SAMPLES)])
        sample = sample[np.isfinite(sample)]
        low, high = (float(value) for value in np.percentile(sample, (0.5, 99.5))) if sample.size else (0.0, 1.0)
        if high <= low and sample.size:
            low, high = float(sample.min()), float(sample.max())
        return (low + high) / 2, high - low if high > low else 1.0

    def scaled(self, values: np.ndarray) -> np.ndarray:
        """Stored values as real ones, float64."""
        slope, intercept = self.scaling
        return values.astype(np.float64) * slope + intercept


def read_nifti(content: bytes, name: str, max_voxels: int, max_bytes: int = MAX_VOLUME_BYTES) -> Voxels:
    """Read the first volume of a ``.nii`` or ``.nii.gz`` file. Raises MedPLIBError: no NIfTI single file, values that
    are no real numbers, too large, an orientation that cannot be followed, no finite value, damaged or cut short.

    Args:
        content: the whole file, compressed with gzip or not.
        name: what messages call the file.
        max_voxels: of the volume.
        max_bytes: of its values, decompressed, and what lies before them.
    """
    try:
        with _opened(io.BytesIO(content)) as stream:
            header = _read_header(stream, name)
            shape = _shape(header, name, max_voxels)
            values = _read_values(stream, header, shape, name, max_bytes)
    except MedPLIBError:
        raise
    except (EOFError, OSError, zlib.error) as error:
        raise MedPLIBError(
            f"{name} cannot be decompressed ({first_line(error)}); it is damaged or cut short"
        ) from error
    if values.dtype.kind == "f" and not np.isfinite(values).any():
        raise MedPLIBError(f"{name} holds NaN or infinity in every voxel; there is no picture in it")
    geometry = type(header)()
    geometry.set_data_dtype(np.uint8)
    geometry.set_data_shape(shape)
    for field in _GEOMETRY:
        geometry[field] = header[field]
    geometry["pixdim"][:4] = header["pixdim"][:4]
    slope, intercept = header.get_slope_inter()
    low, high = float(header["cal_min"]), float(header["cal_max"])
    return Voxels(
        values=values,
        scaling=(1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept)),
        affine=_affine(header, name),
        shape=shape,
        volumes=int(np.prod([int(side) for side in header.get_data_shape()[3:]], dtype=np.int64)),
        range_shown=(low, high) if np.isfinite([low, high]).all() and high > low else None,
        header=geometry,
    )


def write_nifti(labels: np.ndarray, affine: np.ndarray, like: Voxels | None = None, description: str = "") -> bytes:
    """A label map as the bytes of a compressed NIfTI file.

    Args:
        labels: uint8 or uint16, two or three sides.
        affine: [4, 4], taken where ``like`` is None or no NIfTI file.
        like: file whose geometry it has, to the bit.
        description: at most 79 ASCII characters of it are written.
    """
    if like is None or like.header is None:
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


def _opened(plain: BinaryIO) -> BinaryIO:
    packed = plain.read(2) == b"\x1f\x8b"
    plain.seek(0)
    return gzip.GzipFile(fileobj=plain) if packed else plain  # type: ignore[return-value]


def _read_header(stream: BinaryIO, name: str) -> Any:
    block = stream.read(348)
    size = nifti_header_size(block)
    if not size:
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
    if math.prod(shape) > max_voxels:
        raise MedPLIBError(f"{name} is {sizes} voxels, more than the limit of {max_voxels:,}; crop or resample it")
    return shape


def _read_values(stream: BinaryIO, header: Any, shape: tuple[int, ...], name: str, max_bytes: int) -> np.ndarray:
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise MedPLIBError(f"{name} holds values of type {dtype}; whole or floating-point numbers were expected")
    offset, count = int(header.get_data_offset()), int(np.prod(shape, dtype=np.int64))
    size = count * dtype.itemsize
    if offset + size > max_bytes:
        raise MedPLIBError(
            f"{name} takes {(offset + size) / 2**20:,.0f} MiB once it is decompressed, more than the limit of "
            f"{max_bytes >> 20:,} MiB; crop it or store it in fewer bits"
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


def read_nifti_grid(path: Path) -> tuple[Grid, int]:
    """Grid and number of volumes of a NIfTI file, from its header. Raises MedPLIBError: as ``read_nifti``."""
    try:
        with path.open("rb") as file, _opened(file) as stream:
            header = _read_header(stream, str(path))
    except (EOFError, OSError, zlib.error) as error:
        raise MedPLIBError(f"{path} cannot be read ({first_line(error)}); it is damaged or cut short") from error
    sides: Any = (*_shape(header, str(path), UNLIMITED), 1)[:3]
    return Grid(sides, _affine(header, str(path))), int(np.prod(header.get_data_shape()[3:], dtype=np.int64))


def scan_dicom(files: Iterable[Path]) -> Iterator[tuple[Path, Any]]:
    """The files that are DICOM, each with the part of its header that says what it is and where it lies."""
    import pydicom

    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    for path in files:
        try:
            with path.open("rb") as file:
                marked = file.read(132)[128:] == b"DICM"
            if marked or path.suffix.lower() in (".dcm", ".dicom", ".ima"):
                yield path, pydicom.dcmread(path, True, None, not marked, _SERIES_TAGS)  # type: ignore[arg-type]
        except Exception:  # noqa: BLE001 - no DICOM file; pydicom raises many types
            continue


@dataclass(frozen=True)
class Series:
    """The images of one DICOM series in one folder."""

    folder: Path  # that they lie in
    uid: str  # SeriesInstanceUID
    headers: tuple[tuple[Path, Any], ...]  # (file, header) of each, as ``scan_dicom`` gives them

    @property
    def modality(self) -> str:
        """One of ``schema.MODALITIES``, else empty."""
        return MODALITY_CODES.get(str(self.headers[0][1].get("Modality")), "")

    @property
    def patient(self) -> str | None:
        """The same for the same PatientID, which it does not show."""
        identity = str(self.headers[0][1].get("PatientID") or "")
        return "p" + hashlib.sha256(identity.encode()).hexdigest()[:12] if identity else None

    @cached_property
    def stack(self) -> tuple[list[Path], Grid]:
        """Files from one end to the other, and the grid of their columns, rows and slices. Raises MedPLIBError: the
        images make no volume: slices are missing, or several lie at one place."""
        return followed(str(self.folder), self._stacked)

    def _stacked(self) -> tuple[list[Path], Grid]:
        failed, first = f"the DICOM series in {self.folder} makes no volume: ", self.headers[0][1]
        if any(
            header.get("NumberOfFrames", 1) != 1 or "ImagePositionPatient" not in header for _, header in self.headers
        ):
            raise MedPLIBError(failed + "an image has several frames or no place in the patient; convert it to NIfTI")
        position = np.array([header.ImagePositionPatient for _, header in self.headers], dtype=np.float64)
        cosines, spacing = (
            np.array([header[word].value for _, header in self.headers], dtype=np.float64)
            for word in ("ImageOrientationPatient", "PixelSpacing")
        )
        if max(np.ptp(cosines, axis=0).max(), np.ptp(spacing, axis=0).max()) > 1e-2:
            raise MedPLIBError(failed + "its images differ in direction or pixel size; keep those of one volume")
        across, down = cosines[0].reshape(2, 3)
        along = position @ np.cross(across, down)
        order = np.argsort(along, kind="stable")
        steps = np.diff(along[order]) if len(order) > 1 else np.array([float(first.get("SliceThickness") or 1)])
        if steps.min() < 1e-3:
            raise MedPLIBError(failed + "several images lie at one place (phases, echoes); keep one of each")
        if np.ptp(steps) > 0.1 * np.median(steps):
            apart = f"{steps.min():.3g} to {steps.max():.3g} mm"
            raise MedPLIBError(
                failed + f"its slices are {apart} apart; add those that are missing or convert it to NIfTI"
            )
        affine, low, high = np.eye(4), position[order[0]], position[order[-1]]
        affine[:3, 0], affine[:3, 1], affine[:3, 3] = across * spacing[0, 1], down * spacing[0, 0], low
        affine[:3, 2] = (high - low) / (len(order) - 1) if len(order) > 1 else np.cross(across, down) * steps[0]
        grid = Grid((int(first.Columns), int(first.Rows), len(order)), TO_RAS @ affine)
        return [self.headers[at][0] for at in order], grid


def find_series(files: Iterable[tuple[Path, Any]]) -> list[Series]:
    """Series of images among what ``scan_dicom`` gave, in the order of their folders."""
    found: dict[tuple[Path, str], list[tuple[Path, Any]]] = {}
    for path, header in files:
        if header.get("Rows") and str(header.get("Modality")) not in ("SEG", "RTSTRUCT", "RTDOSE"):
            found.setdefault((path.parent, str(header.get("SeriesInstanceUID"))), []).append((path, header))
    return [Series(folder, uid, tuple(headers)) for (folder, uid), headers in sorted(found.items())]


@lru_cache(maxsize=4)
def series_in(folder: Path, uid: str = "") -> Series:
    """The series of a folder; ``uid`` where there are several. Raises MedPLIBError: there is none, or several."""
    found = [one for one in find_series(scan_dicom(sorted(folder.iterdir()))) if uid in ("", one.uid)]
    if len(found) != 1:
        raise MedPLIBError(f"{folder} holds {len(found)} DICOM series; give a folder of one series")
    return found[0]


def read_series(series: Series) -> Voxels:
    """The values of a series in modality units, [columns, rows, slices]: int16 where that holds them, else float32.
    Raises MedPLIBError: the series makes no volume, or an image is damaged or has colours."""
    files, grid = series.stack
    values = []
    for path in files:
        image = open_dicom(path.read_bytes(), str(path), UNLIMITED).modality_values(0).T
        if image.shape != grid.shape[:2]:
            raise MedPLIBError(f"{path} has {image.shape[1]} × {image.shape[0]} pixels, unlike its series; remove it")
        whole = np.nan_to_num(image).clip(-32768, 32767).astype(np.int16)
        values.append(whole if np.array_equal(whole, image) else image.astype(np.float32))
    return Voxels(np.stack(values, axis=2), (1.0, 0.0), grid.affine, grid.shape, 1, None, modality=series.modality)
