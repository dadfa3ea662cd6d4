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

from model.data.windowing import scale_to_uint8, shade
from model.errors import MedPLIBError

IDENTIFIERS = (
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "PositionReferenceIndicator",
    "PatientID",  # without it an archive files the segmentation under another patient
    "Modality",
    "SpecificCharacterSet",
)
PLACE = (
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices"),
    *("Rows", "Columns", "NumberOfFrames"),
    *("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod"),
)
_PIXELS = (
    *("PixelData", "FloatPixelData", "DoubleFloatPixelData", "ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
    *("SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit"),
    *("RescaleSlope", "RescaleIntercept", "RescaleType", "ModalityLUTSequence"),
    *("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence", "LUTDescriptor", "LUTData"),
    *(
        f"{segmented}{colour}PaletteColorLookupTable{part}"
        for colour in ("Red", "Green", "Blue")
        for segmented, part in (("", "Descriptor"), ("", "Data"), ("Segmented", "Data"))
    ),
)
_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
_GROUPED = (
    *("PixelMeasuresSequence", "PlanePositionSequence", "PlaneOrientationSequence"),
    *("FrameVOILUTSequence", "PixelValueTransformationSequence"),
)
_KEPT = frozenset((*IDENTIFIERS, *PLACE, *_PIXELS, *_GROUPS, *_GROUPED))
_STANDS_FOR_PIXELS = frozenset(("PixelData", "FloatPixelData", "DoubleFloatPixelData"))
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_RLE = "1.2.840.10008.1.2.5"
_MAX_INFLATED = 256 * 2**20  # bytes that a deflated data set may become
_MAX_SCANS = 64  # programs write about ten
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


def check_scans(content: bytes, name: str) -> None:
    """A progressive JPEG goes over all its pixels once for each scan, and a scan may take a hundred bytes.

    Raises:
        MedPLIBError: it has more scans than any camera or program writes.
    """
    scans = content.count(b"\xff\xda")
    if scans > _MAX_SCANS:
        raise MedPLIBError(f"{name} is a JPEG of {scans:,} scans; save it anew with at most {_MAX_SCANS}")


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

    if window is None and data.get("VOILUTSequence"):
        bits = int(data.VOILUTSequence[0].LUTDescriptor[2])
        return _narrow(apply_voi(values, data, index=0), bits)
    window = window or file_window(data)
    if window is None:
        return scale_to_uint8(values.astype(np.float64), ignore=padding)
    return shade(values, window, _voi_function(data))


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


class DicomFrames:
    """The frames of one DICOM file.

    Attributes:
        count: of frames.
        window: (centre, width) that the slider of a viewer starts at: the first frame's own, or its range; None where
            the file has colours, which have no window.
        spacing_mm: (row, column) of pixel centres; None where the file does not say.
    """

    def __init__(self, data: Any, name: str, count: int) -> None:
        self._data, self._name, self.count = data, name, count
        header = self._header(0)
        self._last: tuple[int, np.ndarray] | None = None
        first = self._values(0)  # also finds out at once whether the file can be shown at all
        self.spacing_mm = pixel_spacing(header)
        self.size: tuple[int, int] = (first.shape[0], first.shape[1])
        self.window = None if self._has_colours(first) else file_window(header) or _range(header, first)

    def frame(self, index: int, window: tuple[float, float] | None = None) -> np.ndarray:
        """One frame as uint8 [H, W, 3].

        Args:
            index: from 0.
            window: (centre, width) in place of the file's own, its look-up table or its range.

        Raises:
            MedPLIBError: there is no such frame, it is damaged, or the window has no width.
        """
        if not 0 <= index < self.count:
            raise MedPLIBError(f"{self._name} has frames 0 to {self.count - 1}; there is no frame {index}")
        return _followed(self._name, lambda: to_display(self._header(index), self._values(index), window))

    def reference(self, index: int = 0) -> Any:
        """What a segmentation of a frame needs to refer to it: a data set of ``IDENTIFIERS`` and ``PLACE`` alone.

        Of a file with functional groups these are kept too, with positions and measures only.
        """
        from pydicom.dataset import Dataset

        kept = Dataset()
        for keyword in (*IDENTIFIERS, *PLACE):
            if keyword in self._data:
                kept[keyword] = self._data[keyword]
        for keyword in _GROUPS:
            if keyword in self._data:
                groups = [_pick(group, {*PLACE, *_GROUPED[:3]}) for group in self._data[keyword].value]
                setattr(kept, keyword, groups)
        return kept

    def place(self, index: int) -> tuple[np.ndarray, np.ndarray, float] | None:
        """Where a frame lies in the patient.

        Returns:
            position [3] of the first pixel, direction cosines [2, 3] along rows and along columns, and slice thickness
            in mm (1 where unknown), as DICOM tells them (towards the left, the back, the head); None where it does not.
        """
        header = self._header(index)
        try:
            position = np.array([float(value) for value in header.get("ImagePositionPatient") or ()])
            cosines = np.array([float(value) for value in header.get("ImageOrientationPatient") or ()])
            thickness = float(header.get("SliceThickness") or header.get("SpacingBetweenSlices") or 1.0)
        except (TypeError, ValueError):
            return None
        if position.shape != (3,) or cosines.shape != (6,) or not np.isfinite([*position, *cosines]).all():
            return None
        return position, cosines.reshape(2, 3), thickness if thickness > 0 else 1.0

    def _values(self, index: int) -> np.ndarray:
        """Stored values of a frame; the last ones are kept, as a window is changed in many small steps."""
        last = self._last
        if last is None or last[0] != index:
            last = self._last = (index, decode_frame(self._data, self._name, index))
        return last[1]

    def _header(self, index: int) -> Any:
        """The frame's header: the file's, with what the functional groups say of this frame."""
        from pydicom.dataset import Dataset

        if not any(self._data.get(keyword) for keyword in _GROUPS):
            return self._data
        header = Dataset()
        for element in self._data:
            if element.keyword not in _STANDS_FOR_PIXELS and element.keyword not in _GROUPS:
                header[element.tag] = element
        shared = self._data.get("SharedFunctionalGroupsSequence") or []
        own = self._data.get("PerFrameFunctionalGroupsSequence") or []
        for group in (*shared[:1], *own[index : index + 1]):
            for macro in group:
                for element in macro.value[0] if macro.value else ():
                    header[element.tag] = element
        return header

    def _has_colours(self, values: np.ndarray) -> bool:
        return values.ndim == 3 or str(self._data.get("PhotometricInterpretation", "")).upper() == "PALETTE COLOR"


def dicom_frames(content: bytes, name: str, max_pixels: int, max_frames: int) -> DicomFrames:
    """Open a DICOM file of one or several frames.

    Args:
        content: the whole file.
        name: what messages call the file.
        max_pixels: of one frame; checked, as everything here, before pixels are decoded.
        max_frames: of the file.

    Raises:
        MedPLIBError: no image, too large, fewer frames than the header tells, damaged, or a compression that cannot be
            decoded here.
    """

    def opened() -> DicomFrames:
        parsed = parse_dicom(content, name)
        count = check_image(parsed, name, max_pixels)
        if count > max_frames:
            raise MedPLIBError(f"{name} holds {count:,} frames, more than the limit of {max_frames:,}; give fewer")
        data = _without_the_rest(parsed)
        _check_count(data, name, count)
        return DicomFrames(data, name, count)

    return _followed(name, opened)


def _followed(name: str, act: Any) -> Any:
    try:
        return act()
    except MedPLIBError:
        raise
    except Exception as error:  # header values are parsed on access, and contradictory ones break pydicom in many ways
        raise MedPLIBError(f"{name} has a DICOM header that cannot be followed ({first_line(error)})") from error


def _without_the_rest(parsed: Any) -> Any:
    """A data set of what is kept alone; the parsed one holds on to the whole file."""
    from pydicom.dataset import FileMetaDataset

    supply_transfer_syntax(parsed)
    kept = _pick(parsed, _KEPT)
    kept.file_meta = FileMetaDataset()
    kept.file_meta.TransferSyntaxUID = parsed.file_meta.TransferSyntaxUID
    kept.set_original_encoding(*parsed.original_encoding)
    return kept


def _pick(data: Any, keywords: frozenset[str] | set[str]) -> Any:
    from pydicom.datadict import tag_for_keyword
    from pydicom.dataset import Dataset

    kept = Dataset()
    for tag in sorted(tag_for_keyword(keyword) or 0 for keyword in keywords):
        if tag not in data:
            continue
        element = data[tag]
        if element.VR == "SQ":
            setattr(kept, element.keyword, [_pick(item, keywords) for item in element.value])
        else:
            kept[tag] = element
    return kept


def _check_count(data: Any, name: str, count: int) -> None:
    """The pixels of as many frames as the header tells have to be there."""
    from pydicom.encaps import parse_fragments
    from pydicom.pixels.utils import get_expected_length

    pixels = next(data[keyword].value for keyword in _STANDS_FOR_PIXELS if keyword in data)
    if data.file_meta.TransferSyntaxUID.is_encapsulated:
        items, _ = parse_fragments(io.BytesIO(pixels))
        if items - 1 < count:  # the first one is a table
            raise MedPLIBError(f"{name} tells of {count:,} frames but holds {items - 1:,} at most; the file is damaged")
        return
    expected = get_expected_length(data)
    if len(pixels) < expected:
        raise MedPLIBError(
            f"{name} holds {len(pixels):,} bytes of pixels where its header, with {count:,} frames, tells of "
            f"{expected:,}; the file is damaged or cut short"
        )


def _range(header: Any, stored: np.ndarray) -> tuple[float, float]:
    """(centre, width) from the smallest to the largest modality value."""
    from pydicom.pixels import apply_modality_lut

    values = np.asarray(apply_modality_lut(stored, header)).astype(np.float64)
    padding = padding_of(header, stored)
    counted = values[np.isfinite(values) if padding is None else np.isfinite(values) & ~padding]
    low, high = (float(counted.min()), float(counted.max())) if counted.size else (0.0, 1.0)
    return (low + high) / 2, max(high - low, 1.0)
