"""Single-frame DICOM → 8-bit RGB as the file itself asks to be shown.

Stored values go through the modality transform (rescale slope and intercept or look-up table), then the file's first
window or VOI look-up table, then inversion for MONOCHROME1 (DICOM PS3.3 C.11, C.7.6.3). A file without a window is
scaled linearly over its actual range, padding left out.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from model.errors import MedPLIBError


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
    data = _parse(content, name)
    try:
        _check_image(data, name, max_pixels)
        values = _decode_pixels(data, name)
        return _to_display(data, values), _spacing(data)
    except MedPLIBError:
        raise
    except Exception as error:  # header values are parsed on access, and contradictory ones break pydicom in many ways
        raise MedPLIBError(f"{name} has a DICOM header that cannot be followed ({_first_line(error)})") from error


def _parse(content: bytes, name: str) -> Any:
    import pydicom

    try:
        return pydicom.dcmread(io.BytesIO(content), force=content[128:132] != b"DICM")
    except Exception as error:  # pydicom raises many types on damaged files
        raise MedPLIBError(f"{name} is not a readable DICOM file ({_first_line(error)})") from error


def _check_image(data: Any, name: str, max_pixels: int) -> None:
    try:
        rows, columns = int(data.get("Rows") or 0), int(data.get("Columns") or 0)
        frames = int(data.get("NumberOfFrames") or 1)
    except (TypeError, ValueError) as error:
        raise MedPLIBError(f"{name} has an unreadable image size in its DICOM header") from error
    if not any(keyword in data for keyword in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        modality = data.get("Modality")
        what = f" (modality {modality})" if modality else ""
        raise MedPLIBError(f"{name} holds no DICOM image{what}; give an image file")
    if frames > 1:
        raise MedPLIBError(f"{name} holds {frames} frames; extract the single frame to look at")
    if rows < 1 or columns < 1:
        raise MedPLIBError(f"{name} is {rows} × {columns} pixels according to its DICOM header; the file is damaged")
    if rows * columns > max_pixels:
        raise MedPLIBError(
            f"{name} has {rows} × {columns} pixels, more than the limit of {max_pixels:,}; shrink it first"
        )


def _decode_pixels(data: Any, name: str) -> np.ndarray:
    try:
        _supply_transfer_syntax(data)
        return data.pixel_array
    except Exception as error:  # each decoder plug-in has errors of its own
        syntax: Any = getattr(getattr(data, "file_meta", None), "TransferSyntaxUID", None)
        if getattr(syntax, "is_compressed", False):
            raise MedPLIBError(
                f"{name} is compressed as {syntax.name} and cannot be decoded here; "
                "install pylibjpeg with its plug-ins, or convert the file to an uncompressed one if it is intact"
            ) from error
        raise MedPLIBError(f"{name} holds pixels that cannot be decoded ({_first_line(error)})") from error


def _supply_transfer_syntax(data: Any) -> None:
    """Files without a meta header say their encoding only through how they were parsed."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    if getattr(data, "file_meta", None) is None:
        data.file_meta = FileMetaDataset()
    if "TransferSyntaxUID" not in data.file_meta:
        implicit, little = data.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        data.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit


def _to_display(data: Any, values: np.ndarray) -> np.ndarray:
    from pydicom.pixels import apply_color_lut, apply_modality_lut

    photometric = str(data.get("PhotometricInterpretation", "MONOCHROME2")).upper()
    if photometric == "PALETTE COLOR":
        return _narrow(apply_color_lut(values, data), 16 if _palette_is_wide(data) else 8)
    if values.ndim == 3:
        return _narrow(values, int(data.get("BitsStored", 8)))
    shades = _apply_window(data, np.asarray(apply_modality_lut(values, data)), _padding(data, values))
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


def _padding(data: Any, stored: np.ndarray) -> np.ndarray | None:
    """Where the scanner saw nothing: outside a round field of view, say."""
    first = data.get("PixelPaddingValue")
    if first is None:
        return None
    last = data.get("PixelPaddingRangeLimit", first)
    low, high = sorted((int(first), int(last)))
    return (stored >= low) & (stored <= high)


def _apply_window(data: Any, values: np.ndarray, padding: np.ndarray | None) -> np.ndarray:
    """uint8 shades of modality values [H, W] through the file's VOI table, its first window, or its actual range."""
    from pydicom.pixels import apply_voi

    from model.data.readers import scale_to_uint8

    if data.get("VOILUTSequence"):
        bits = int(data.VOILUTSequence[0].LUTDescriptor[2])
        return _narrow(apply_voi(values, data, index=0), bits)
    center, width = _first_number(data.get("WindowCenter")), _first_number(data.get("WindowWidth"))
    function = str(data.get("VOILUTFunction") or "LINEAR").upper()
    if center is None or width is None or width <= (1 if function == "LINEAR" else 0):
        return scale_to_uint8(values.astype(np.float64), ignore=padding)
    exact = values.astype(np.float64)
    if function == "SIGMOID":
        share = 1.0 / (1.0 + np.exp(np.clip(-4.0 * (exact - center) / width, -700.0, 700.0)))
    elif function == "LINEAR_EXACT":
        share = (exact - center) / width + 0.5
    else:
        share = (exact - (center - 0.5)) / (width - 1.0) + 0.5
    return (np.clip(share, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def _first_number(value: Any) -> float | None:
    """First of one or several decimal strings; None where there is no finite one."""
    if value is None or value == "":
        return None
    number = float(value[0] if hasattr(value, "__getitem__") and not isinstance(value, str) else value)
    return number if np.isfinite(number) else None


def _spacing(data: Any) -> tuple[float, float] | None:
    try:
        row, column = (float(distance) for distance in data.get("PixelSpacing") or ())
    except (TypeError, ValueError):
        return None
    return (row, column) if row > 0 and column > 0 else None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
