"""DICOM → 8-bit RGB as the file itself asks to be shown; ``read_dicom`` for one frame, ``dicom_frames`` for several.

Stored values go through the modality transform (rescale slope and intercept or look-up table), then the file's first
window or VOI look-up table, then inversion for MONOCHROME1 (DICOM PS3.3 C.11, C.7.6.3). A file without a window is
scaled linearly over its actual range, padding left out.
"""

from __future__ import annotations

import io
import re
import textwrap
import zlib
from typing import Any

import numpy as np

from model.errors import MedPLIBError

_DEFLATED = b"1.2.840.10008.1.2.1.99"
_RLE = "1.2.840.10008.1.2.5"
_MAX_INFLATED = 256 * 2**20  # bytes that a deflated data set may become
_MAX_RLE = 16 * 2**20  # bytes of a run-length encoded frame, which can grow 64-fold before its size is seen


def read_dicom(content: bytes, name: str, max_pixels: int) -> tuple[np.ndarray, tuple[float, float] | None]:
    """Decode one single-frame DICOM image.

    Args:
        content: the whole file.
        name: what messages call the file.
        max_pixels: limit, checked before decoding.

    Returns:
        uint8 [H, W, 3] and the (row, column) pixel spacing in mm; None where the file holds no ``PixelSpacing`` (the
        detector spacing of projection images is not one: it ignores magnification).

    Raises:
        MedPLIBError: not DICOM, no image in it, several frames, too large, damaged, or a compression that cannot be
            decoded here.
    """
    data = parse_dicom(content, name)
    try:
        frames = check_image(data, name, max_pixels)
        if frames > 1:
            raise MedPLIBError(f"{name} holds {frames} frames; extract the single frame to look at")
        return to_display(data, decode_frame(data, name)), pixel_spacing(data)
    except MedPLIBError:
        raise
    except Exception as error:  # header values are parsed on access, and contradictory ones break pydicom in many ways
        raise MedPLIBError(f"{name} has a DICOM header that cannot be followed ({first_line(error)})") from error


def parse_dicom(content: bytes, name: str) -> Any:
    """The file's data set; pixels are not decoded yet.

    Raises:
        MedPLIBError: it is no DICOM file, or inflates beyond reason.
    """
    import pydicom

    _check_inflated(content, name)
    try:
        return pydicom.dcmread(io.BytesIO(content), force=content[128:132] != b"DICM")
    except Exception as error:  # pydicom raises many types on damaged files
        raise MedPLIBError(f"{name} is not a readable DICOM file ({first_line(error)})") from error


def _check_inflated(content: bytes, name: str) -> None:
    """A deflated data set is inflated whole when it is parsed, so its size is found out first."""
    if _DEFLATED not in content:
        return
    start = 144 + int.from_bytes(content[140:144], "little")  # behind preamble, prefix and the meta group's length
    if content[128:138] != b"DICM\x02\0\0\0UL" or _DEFLATED not in content[:start]:
        raise MedPLIBError(f"{name} is a deflated DICOM file of unknown header length; convert it to an undeflated one")
    inflater, size, rest = zlib.decompressobj(-zlib.MAX_WBITS), 0, content[start:]
    while rest and not inflater.eof and size <= _MAX_INFLATED:
        try:
            size += len(inflater.decompress(rest, 1 << 20))
        except zlib.error:
            return  # the parser finds the words for it
        rest = inflater.unconsumed_tail
    if size > _MAX_INFLATED:
        raise MedPLIBError(f"{name} inflates to more than {_MAX_INFLATED >> 20} MiB; give a smaller DICOM file")


def check_image(data: Any, name: str, max_pixels: int) -> int:
    """Number of frames of a data set that holds an image of acceptable size, as its header tells.

    Raises:
        MedPLIBError: there is no image, or it is too large.
    """
    try:
        rows, columns = int(data.get("Rows") or 0), int(data.get("Columns") or 0)
        frames = int(data.get("NumberOfFrames") or 1)
    except (TypeError, ValueError) as error:
        raise MedPLIBError(f"{name} has an unreadable image size in its DICOM header") from error
    if not any(keyword in data for keyword in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        modality = str(data.get("Modality") or "")  # in a damaged file it may be anything, names included
        what = f" (modality {modality})" if re.fullmatch("[A-Z]{2,12}", modality) else ""
        raise MedPLIBError(f"{name} holds no DICOM image{what}; give an image file")
    if rows < 1 or columns < 1:
        raise MedPLIBError(f"{name} is {rows} × {columns} pixels according to its DICOM header; the file is damaged")
    if rows * columns > max_pixels:
        raise MedPLIBError(
            f"{name} has {rows} × {columns} pixels, more than the limit of {max_pixels:,}; shrink it first"
        )
    return max(frames, 1)


def decode_frame(data: Any, name: str, index: int = 0) -> np.ndarray:
    """Stored values [H, W] or colours [H, W, 3] of one frame.

    Raises:
        MedPLIBError: it cannot be decoded here, or is damaged.
    """
    from pydicom.pixels import pixel_array

    try:
        supply_transfer_syntax(data)
        _check_compressed(data, name, index)
        return pixel_array(data, index=index)
    except MedPLIBError:
        raise
    except Exception as error:  # each decoder plug-in has errors of its own
        syntax: Any = getattr(getattr(data, "file_meta", None), "TransferSyntaxUID", None)
        if getattr(syntax, "is_compressed", False):
            raise MedPLIBError(
                f"{name} is compressed as {syntax.name} and cannot be decoded here; "
                "install pylibjpeg with its plug-ins, or convert the file to an uncompressed one if it is intact"
            ) from error
        raise MedPLIBError(f"{name} holds pixels that cannot be decoded ({first_line(error)})") from error


def _check_compressed(data: Any, name: str, index: int) -> None:
    """What a compressed frame says of its own size, which decoders believe, has to agree with the header."""
    from PIL import Image
    from pydicom.encaps import get_frame

    from model.data.readers import check_scans

    syntax = data.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated:
        return
    frame = get_frame(data.PixelData, index, number_of_frames=int(data.get("NumberOfFrames") or 1))
    if syntax == _RLE:
        if len(frame) > _MAX_RLE:
            raise MedPLIBError(
                f"{name} has a run-length encoded frame of more than {_MAX_RLE >> 20} MiB; "
                "convert the file to an uncompressed one"
            )
        return
    check_scans(frame, name)
    try:
        size = Image.open(io.BytesIO(frame), formats=("JPEG", "JPEG2000")).size
    except Exception:  # noqa: BLE001 - formats that this library does not know are left to their decoder
        return
    if size != (int(data.Columns), int(data.Rows)):
        raise MedPLIBError(
            f"{name} is {data.Rows} × {data.Columns} pixels according to its DICOM header, but its compressed frame is "
            f"{size[1]} × {size[0]}; the file is damaged"
        )


def supply_transfer_syntax(data: Any) -> None:
    """Files without a meta header say their encoding only through how they were parsed."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    if getattr(data, "file_meta", None) is None:
        data.file_meta = FileMetaDataset()
    if "TransferSyntaxUID" not in data.file_meta:
        implicit, little = data.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        data.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit


def to_display(data: Any, values: np.ndarray, window: tuple[float, float] | None = None) -> np.ndarray:
    """uint8 [H, W, 3] of stored values [H, W] or colours [H, W, 3].

    Args:
        data: header of the frame.
        values: as ``decode_frame`` gives them.
        window: (centre, width) in modality units, in place of the file's own; colours have none.
    """
    from pydicom.pixels import apply_color_lut, apply_modality_lut

    photometric = str(data.get("PhotometricInterpretation", "MONOCHROME2")).upper()
    if photometric == "PALETTE COLOR":
        return _narrow(apply_color_lut(values, data), 16 if _palette_is_wide(data) else 8)
    if values.ndim == 3:
        return _narrow(values, int(data.get("BitsStored", 8)))
    shades = _apply_window(data, np.asarray(apply_modality_lut(values, data)), padding_of(data, values), window)
    if photometric == "MONOCHROME1":
        shades = 255 - shades
    return np.ascontiguousarray(np.repeat(shades[:, :, None], 3, axis=2))


def _palette_is_wide(data: Any) -> bool:
    return int(data.RedPaletteColorLookupTableDescriptor[2]) == 16


def _narrow(values: np.ndarray, bits: int) -> np.ndarray:
    """uint8 of unsigned colour values of ``bits`` bits."""
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    return (values.astype(np.float64) * (255.0 / (2**bits - 1)) + 0.5).clip(0, 255).astype(np.uint8)


def padding_of(data: Any, stored: np.ndarray) -> np.ndarray | None:
    """Where the scanner saw nothing: outside a round field of view, say."""
    first = data.get("PixelPaddingValue")
    if first is None:
        return None
    last = data.get("PixelPaddingRangeLimit", first)
    low, high = sorted((int(first), int(last)))
    return (stored >= low) & (stored <= high)


def file_window(data: Any) -> tuple[float, float] | None:
    """The file's first window as (centre, width) in modality units; None where it has no usable one."""
    centre, width = _first_number(data.get("WindowCenter")), _first_number(data.get("WindowWidth"))
    if centre is None or width is None or width <= (1 if _voi_function(data) == "LINEAR" else 0):
        return None
    return centre, width


def _voi_function(data: Any) -> str:
    return str(data.get("VOILUTFunction") or "LINEAR").upper()


def _apply_window(
    data: Any, values: np.ndarray, padding: np.ndarray | None, window: tuple[float, float] | None
) -> np.ndarray:
    """uint8 shades of modality values [H, W]: the given window, the file's VOI table or window, or the actual range."""
    from pydicom.pixels import apply_voi

    from model.data.readers import scale_to_uint8

    if window is None and data.get("VOILUTSequence"):
        bits = int(data.VOILUTSequence[0].LUTDescriptor[2])
        return _narrow(apply_voi(values, data, index=0), bits)
    window = window or file_window(data)
    if window is None:
        return scale_to_uint8(values.astype(np.float64), ignore=padding)
    return shade(values, window, _voi_function(data))


def shade(values: np.ndarray, window: tuple[float, float], function: str = "LINEAR_EXACT") -> np.ndarray:
    """uint8 shades of values through a window (DICOM PS3.3 C.11.2.1.2).

    Args:
        values: of any real type; those that are not numbers become black.
        window: (centre, width), in the values' unit.
        function: ``LINEAR``, ``LINEAR_EXACT`` or ``SIGMOID``.
    """
    exact, (centre, width) = values.astype(np.float64), window
    if function == "SIGMOID":
        share = 1.0 / (1.0 + np.exp(np.clip(-4.0 * (exact - centre) / width, -700.0, 700.0)))
    elif function == "LINEAR_EXACT":
        share = (exact - centre) / width + 0.5
    else:
        share = (exact - (centre - 0.5)) / max(width - 1.0, 1e-6) + 0.5
    return (np.clip(np.nan_to_num(share, nan=0.0), 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def _first_number(value: Any) -> float | None:
    """First of one or several decimal strings; None where there is no finite one."""
    if value is None or value == "":
        return None
    number = float(value[0] if hasattr(value, "__getitem__") and not isinstance(value, str) else value)
    return number if np.isfinite(number) else None


def pixel_spacing(data: Any) -> tuple[float, float] | None:
    """(row, column) spacing in mm; None where the header holds no usable one."""
    try:
        row, column = (float(distance) for distance in data.get("PixelSpacing") or ())
    except (TypeError, ValueError):
        return None
    return (row, column) if row > 0 and column > 0 else None


def first_line(error: Exception) -> str:
    """What an error says, in one line without the values it quotes, which may be anything that the header holds."""
    said = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
    if not isinstance(error, AttributeError):  # which quotes names of our own
        said = re.sub(r"b?(['\"]).*\1", "…", said)
    return textwrap.shorten("".join(character for character in said if character.isprintable()), 160, placeholder=" …")
