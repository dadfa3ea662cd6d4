"""NIfTI-1 and -2 single files → the first volume's values and where they lie; masks → NIfTI of the same geometry.

The header is read and judged before anything else is decompressed, and no more is decompressed than the first volume
takes. Of the header only the geometry is kept: descriptions, file names and extensions may tell who the patient is.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from model.data.dicom import first_line
from model.errors import MedPLIBError

MAX_VOLUME_BYTES = 2**29
"""Values of one volume, decompressed, and what lies before them in the file."""
_HEADER_BYTES = {348: "1", 540: "2"}
_LONGEST_SIDE = 32_767  # of NIfTI-1
_GEOMETRY = (
    *("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z", "xyzt_units"),
)


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


def looks_like_nifti(content: bytes) -> bool:
    """Whether the first bytes are a NIfTI header; compressed content is not looked into."""
    return len(content) >= 348 and _header_size(content) is not None and b"n" in content[4:5] + content[344:345]


def read_nifti(content: bytes, name: str, max_voxels: int) -> Nifti:
    """Read the first volume of a ``.nii`` or ``.nii.gz`` file.

    Args:
        content: the whole file, compressed with gzip or not.
        name: what messages call the file.
        max_voxels: of the volume.

    Raises:
        MedPLIBError: no NIfTI single file, values that are no real numbers, too large, an orientation that cannot be
            followed, damaged or cut short.
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
    told = " × ".join(str(side) for side in sides)
    if not 2 <= len(sides) <= 7 or any(side < 1 for side in sides):
        raise MedPLIBError(f"{name} is a NIfTI file of {told or 'no'} values; an image or a volume was expected")
    shape = sides[:3]
    if sum(side > 1 for side in shape) < 2:
        raise MedPLIBError(f"{name} is a NIfTI file of {told} values, which is no picture; give an image or a volume")
    voxels = 1
    for side in shape:
        voxels *= side
    if voxels > max_voxels:
        raise MedPLIBError(f"{name} is {told} voxels, more than the limit of {max_voxels:,}; crop or resample it")
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
