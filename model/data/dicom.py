"""DICOM files of one or several frames, as they ask to be shown: 8-bit RGB, spacing and place in the patient.

Stored values go through the modality transform (rescale slope and intercept, or look-up table), then through the
file's VOI look-up table or its first usable window, then through inversion for MONOCHROME1; padding is black (DICOM
PS3.3 C.7.6.3, C.7.5.1.1.2, C.11.1, C.11.2). A file without a window is scaled over its actual range, padding left out.
Values of a frame's functional groups (PS3.3 C.7.6.16) stand before those of the file.

Of the header only what is named here is kept once the file is open; names, dates, comments, overlays, private elements
and the rest are gone before anything else sees the data set. What may leave again, inside a DICOM segmentation that
refers to the file, is ``IDENTIFIERS`` and ``PLACE``.
"""

from __future__ import annotations

import io
import logging
import re
import textwrap
import zlib
from importlib.util import find_spec
from typing import Any

import numpy as np

from model.errors import MedPLIBError

_TABLE_PAYS = 1 << 20  # pixels


def scale_to_uint8(values: np.ndarray, ignore: np.ndarray | None = None) -> np.ndarray:
    """Linear map of the actual smallest … largest value to 0 … 255; 8-bit values are kept, booleans become 0 and 255.
    Raises MedPLIBError: the values are no real numbers, or none of them is finite.

    Args:
        values: array of any shape and real type; values that are not finite become the smallest one.
        ignore: bool array of the same shape; these values do not count for the range.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind not in "iuf":
        raise MedPLIBError(f"expected image values that are numbers, got {values.dtype}")
    if values.dtype in (np.int16, np.uint16) and values.size > _TABLE_PAYS:
        return _scale_by_table(values, ignore)
    exact = values.astype(np.float64)
    finite = np.isfinite(exact)
    if values.size and not finite.any():
        raise MedPLIBError("every pixel is NaN or infinite; give an image of finite values")
    counted = finite if ignore is None else finite & ~ignore
    if not counted.any():
        return np.zeros(values.shape, dtype=np.uint8)
    low, high = float(exact[counted].min()), float(exact[counted].max())
    if high <= low:
        return np.zeros(values.shape, dtype=np.uint8)
    exact = np.where(finite, exact, low)
    return (np.clip((exact - low) / (high - low), 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def _scale_by_table(values: np.ndarray, ignore: np.ndarray | None) -> np.ndarray:
    """The same for 16-bit values, whose few levels are scaled once: without the memory and time of exact pixels."""
    counted = values if ignore is None else values[~ignore]
    levels = np.arange(np.iinfo(values.dtype).min, np.iinfo(values.dtype).max + 1)
    if not counted.size:
        return np.zeros(values.shape, dtype=np.uint8)
    outside = (levels < counted.min()) | (levels > counted.max())
    shades = scale_to_uint8(np.clip(levels, counted.min(), counted.max()).astype(np.float64), ignore=outside)
    scaled = np.empty(values.shape, dtype=np.uint8)
    for target, row in zip(scaled, values, strict=True):
        target[...] = shades[row.astype(np.intp) - levels[0]]
    return scaled


def apply_window(values: np.ndarray, window: tuple[float, float], function: str = "LINEAR_EXACT") -> np.ndarray:
    """uint8 shades of values through a display window (DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3).

    Args:
        values: of any real type; NaN becomes black.
        window: (centre, width) in the values' unit, width above 0.
        function: ``LINEAR``, ``LINEAR_EXACT`` or ``SIGMOID``. The standard gives ``LINEAR`` widths from 1 (a step);
            a smaller one, as files of small units have, is taken as ``LINEAR_EXACT``.
    """
    exact, (centre, width) = values.astype(np.float64), window
    if function == "SIGMOID":
        share = 1.0 / (1.0 + np.exp(np.clip(-4.0 * (exact - centre) / width, -700.0, 700.0)))
    elif function == "LINEAR_EXACT" or width < 1.0:
        share = (exact - centre) / width + 0.5
    elif width == 1.0:
        share = (exact > centre - 0.5).astype(np.float64)
    else:
        share = (exact - (centre - 0.5)) / (width - 1.0) + 0.5
    return (np.clip(np.nan_to_num(share, nan=0.0), 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def apply_table(values: np.ndarray, entries: np.ndarray, first: int) -> np.ndarray:
    """Entries [N] of a look-up table for values, of which ``first`` and all below it have the first entry."""
    index = np.clip(np.rint(np.nan_to_num(values.astype(np.float64))) - first, 0, len(entries) - 1)
    return entries[index.astype(np.intp)]


Window = tuple[float, float]
"""(centre, width) in modality units: Hounsfield units, Bq/ml …"""

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
_PADDING = tuple((f"{kind}PixelPaddingValue", f"{kind}PixelPaddingRangeLimit") for kind in ("", "Float", "DoubleFloat"))
_PIXELS = (
    *("PixelData", "FloatPixelData", "DoubleFloatPixelData", "ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
    *("SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", *(word for pair in _PADDING for word in pair)),
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
_RLE, _JPEG_BASELINE, _JPEG_EXTENDED = (f"1.2.840.10008.1.2.{last}" for last in ("5", "4.50", "4.51"))
_MAX_INFLATED = 256 * 2**20  # bytes that a deflated data set may become
_MAX_SCANS = 64  # programs write about ten
_MAX_RLE = 16 * 2**20  # bytes of a run-length encoded frame, which can grow 64-fold before its size is seen


class DicomFrames:
    """The frames of one DICOM file.

    Attributes:
        count: of frames.
        window: (centre, width) that the slider of a viewer starts at: the first frame's own, or its range; None
            where the file has colours, which have no window.
        spacing_mm: (row, column) of pixel centres; None where the file holds no ``PixelSpacing`` (the detector
            spacing of projection images is not one: it ignores magnification).
        notes: what was mended or ignored in the header of a frame, naming the field, one sentence each.
    """

    def __init__(self, data: Any, name: str, count: int) -> None:
        self._data, self._name, self.count = data, name, count
        self.notes: list[str] = []
        self._shift = _mend_high_bit(data)
        self._last: tuple[int, np.ndarray] | None = None
        header, first = self._header(0), self._values(0)  # also finds out at once whether the file can be shown at all
        self.spacing_mm = self._spacing(header)
        self.size: tuple[int, int] = (first.shape[0], first.shape[1])
        self.window: Window | None = None
        if not self._has_colours(first):
            self.window = self._file_window(header)[0]
        if not self._has_colours(first) and self.window is None:  # its range, padding left out
            values, padding = self._modality_values(header, first).astype(np.float64), _padding_of(header, first)
            counted = values[np.isfinite(values) if padding is None else np.isfinite(values) & ~padding]
            low, high = (float(counted.min()), float(counted.max())) if counted.size else (0.0, 1.0)
            self.window = (low + high) / 2, high - low if high > low else 1.0

    def frame(self, index: int, window: Window | None = None) -> np.ndarray:
        """One frame as uint8 [H, W, 3]. Raises MedPLIBError: there is no such frame, it is damaged, or holds no finite
        value."""
        if not 0 <= index < self.count:
            raise MedPLIBError(f"{self._name} has frames 0 to {self.count - 1}; there is no frame {index}")
        return followed(self._name, lambda: self._displayed(self._header(index), self._values(index), window))

    def modality_values(self, index: int) -> np.ndarray:
        """One frame's values in modality units, such as Hounsfield units, [H, W]. Raises MedPLIBError: it is damaged,
        or has colours, which have no such values."""
        stored = followed(self._name, lambda: self._values(index))
        if self._has_colours(stored):
            raise MedPLIBError(f"{self._name} holds colours; the slices of a volume have one value for each pixel")
        return followed(self._name, lambda: self._modality_values(self._header(index), stored))

    def reference(self, index: int = 0) -> Any:
        """What a segmentation of a frame needs to refer to it: a data set of ``IDENTIFIERS`` and ``PLACE`` alone.

        Of a file with functional groups these are kept too, with positions and measures only."""
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
        """Where a frame lies in the patient. Returns position [3] of the first pixel, direction cosines [2, 3] along
        rows and along columns, and slice thickness in mm (1 where unknown), in DICOM's axes (towards the left, the
        back, the head); None where it is unknown."""
        header = self._header(index)
        position, cosines = (
            np.array(_numbers(header, f"Image{what}Patient")[0]) for what in ("Position", "Orientation")
        )
        if position.shape != (3,) or cosines.shape != (6,) or not np.isfinite([*position, *cosines]).all():
            return None
        thickness = [*_numbers(header, "SliceThickness")[0], *_numbers(header, "SpacingBetweenSlices")[0], 1.0]
        return position, cosines.reshape(2, 3), next(value for value in thickness if value > 0)

    def _values(self, index: int) -> np.ndarray:
        last = self._last
        if last is None or last[0] != index:
            values = _decode_frame(self._data, self._name, index)
            last = self._last = (index, values >> self._shift if self._shift else values)
        return last[1]

    def _header(self, index: int) -> Any:
        """The frame's header: the file's, with what the functional groups say of this frame."""
        from pydicom.datadict import keyword_for_tag
        from pydicom.dataset import Dataset

        if not any(self._data.get(keyword) for keyword in _GROUPS):
            return self._data
        header = Dataset()
        header.set_original_encoding(*self._data.original_encoding)
        shared = self._data.get("SharedFunctionalGroupsSequence") or []
        own = self._data.get("PerFrameFunctionalGroupsSequence") or []
        macros = [macro.value[0] for group in (*shared[:1], *own[index : index + 1]) for macro in group if macro.value]
        for source in (self._data, *macros):
            for tag in source.keys():  # noqa: SIM118 - iterating a data set converts its elements, which may be damaged
                if keyword_for_tag(tag) not in (*_STANDS_FOR_PIXELS, *_GROUPS):
                    header[tag] = source.get_item(tag)
        return header

    def _has_colours(self, values: np.ndarray) -> bool:
        return values.ndim == 3 or _photometric(self._data) == "PALETTE COLOR"

    def _displayed(self, header: Any, stored: np.ndarray, window: Window | None) -> np.ndarray:
        """uint8 [H, W, 3] of stored values [H, W] or colours [H, W, 3].

        Modality values become shades by the given window, the file's VOI table or window, or their actual range."""
        from pydicom.pixels import apply_color_lut

        photometric = _photometric(header)
        if photometric == "PALETTE COLOR":
            colours = apply_color_lut(stored, header)
            wide = int(header.RedPaletteColorLookupTableDescriptor[2]) == 16 and colours.max(initial=0) > 255
            return _narrow(colours, 16 if wide else 8)
        if stored.ndim == 3:
            return _narrow(stored, int(header.get("BitsStored", 8)))
        values, padding = self._modality_values(header, stored), _padding_of(header, stored)
        if values.dtype.kind == "f" and not np.isfinite(values).any():
            raise MedPLIBError(f"{self._name} holds NaN or infinity in every pixel; there is no picture in it")
        own, function = self._file_window(header)
        if not window and (table := self._table(header, "VOILUTSequence", values)) is not None:
            entries, first, bits = table
            shades = _narrow(apply_table(values, entries, first), bits)
        elif (window := window or own) is None:
            shades = scale_to_uint8(values.astype(np.float64), ignore=padding)
        else:
            shades = apply_window(values, window, function)
        if photometric == "MONOCHROME1":
            shades = 255 - shades
        if padding is not None:
            shades[padding] = 0
        return np.ascontiguousarray(np.repeat(shades[:, :, None], 3, axis=2))

    def _modality_values(self, header: Any, stored: np.ndarray) -> np.ndarray:
        """Modality units of stored values (PS3.3 C.11.1)."""
        if (table := self._table(header, "ModalityLUTSequence", stored)) is not None:
            entries, first, _ = table
            return apply_table(stored, entries, first)
        slope = self._number(header, "RescaleSlope", 1.0, lambda value: value != 0)
        intercept = self._number(header, "RescaleIntercept", 0.0)
        return stored if (slope, intercept) == (1.0, 0.0) else stored.astype(np.float64) * slope + intercept

    def _file_window(self, header: Any) -> tuple[Window | None, str]:
        """The first usable window in modality units, None where there is none, and its VOI LUT function."""
        (centres, mended), (widths, mended_too) = (_numbers(header, f"Window{part}") for part in ("Center", "Width"))
        pairs = list(zip(centres, widths, strict=False))
        usable = [(centre, width) for centre, width in pairs if np.isfinite([centre, width]).all() and width > 0]
        if not usable and (centres or widths):
            self._note("WindowCenter and WindowWidth hold no usable window; the actual range of the values is shown")
        elif usable and (usable[0] != pairs[0] or mended or mended_too):
            self._note("WindowCenter and WindowWidth are malformed; the first window that can be read is used")
        function = re.sub(r"[\s-]+", "_", str(header.get("VOILUTFunction") or "LINEAR").strip().upper())
        if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
            self._note("VOILUTFunction is none of LINEAR, LINEAR_EXACT and SIGMOID; LINEAR is used")
            function = "LINEAR"
        return (usable[0] if usable else None), function

    def _spacing(self, header: Any) -> tuple[float, float] | None:
        numbers, mended = _numbers(header, "PixelSpacing")
        if len(numbers) == 2 and np.isfinite(numbers).all() and min(numbers) > 0:
            if mended:
                self._note("PixelSpacing is malformed; the two numbers in it are used")
            return numbers[0], numbers[1]
        if numbers:
            self._note("PixelSpacing holds no two distances above 0; areas in mm² are left out")
        return None

    def _number(self, header: Any, keyword: str, default: float, valid: Any = np.isfinite) -> float:
        numbers, mended = _numbers(header, keyword)
        usable = bool(numbers) and bool(np.isfinite(numbers[0]) and valid(numbers[0]))
        if numbers and (mended or not usable):
            self._note(f"{keyword} is malformed; {'the number in it' if usable else f'{default:g}'} is used")
        return numbers[0] if usable else default

    def _table(self, header: Any, keyword: str, values: np.ndarray) -> tuple[np.ndarray, int, int] | None:
        """Entries, first mapped value and bits of a look-up table; None where there is none that can be followed.

        PS3.3 C.11.1.1: a length of 0 means 65536, the first mapped value is signed where the values are, and entries of
        8 bits lie in bytes or in words."""
        sequence = header.get(keyword)
        if not sequence:
            return None
        item = sequence[0]
        descriptor, words = _words(item, "LUTDescriptor"), _words(item, "LUTData") & 0xFFFF
        if len(descriptor) != 3 or not len(words):
            self._note(f"{keyword} holds a table that cannot be followed; it is left out")
            return None
        length, first, bits = int(descriptor[0]) & 0xFFFF or 65536, int(descriptor[1]), int(descriptor[2])
        if first > 32767 and float(np.nan_to_num(values).min(initial=0)) < 0:
            first -= 65536
        if bits <= 8 and len(words) == (length + 1) // 2:  # two entries a word
            words = words.astype("<u2").view(np.uint8)
        entries = words[:length].astype(np.uint16)
        needed = max(int(entries.max()).bit_length(), 1)
        if len(entries) < length or not needed <= bits <= 16:
            self._note(f"{keyword} holds other entries than its LUTDescriptor says; those that are there are used")
        return entries, first, min(max(bits, needed), 16)

    def _note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)


def open_dicom(content: bytes, name: str, max_pixels: int, max_frames: int = 2000) -> DicomFrames:
    """Open a DICOM file of one or several frames. Raises MedPLIBError: no image, too large, fewer frames than the
    header says, damaged, or a compression that cannot be decoded here."""

    def opened() -> DicomFrames:
        parsed = _parse(content, name)
        count = _check_image(parsed, name, max_pixels)
        if count > max_frames:
            raise MedPLIBError(f"{name} holds {count:,} frames, more than the limit of {max_frames:,}; give fewer")
        data = _without_the_rest(parsed)
        _check_count(data, name, count)
        return DicomFrames(data, name, count)

    return followed(name, opened)


def followed(name: str, act: Any) -> Any:
    """What ``act`` gives; whatever it raises over contradictory header values becomes a ``MedPLIBError``."""
    try:
        return act()
    except MedPLIBError:
        raise
    except Exception as error:  # header values are parsed on access, and contradictory ones break pydicom in many ways
        raise MedPLIBError(f"{name} has a DICOM header that cannot be followed ({first_line(error)})") from error


def _parse(content: bytes, name: str) -> Any:
    import pydicom

    _check_inflated(content, name)
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE  # its warnings quote values into logs
    logging.getLogger("pydicom.pixels.decoders").setLevel(logging.CRITICAL)  # it logs tracebacks of what it raises
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


def _check_image(data: Any, name: str, max_pixels: int) -> int:
    """Number of frames of a data set that holds an image of acceptable size, by its header."""
    try:
        rows, columns = int(data.get("Rows") or 0), int(data.get("Columns") or 0)
        frames = int(data.get("NumberOfFrames") or 1)
    except (TypeError, ValueError) as error:
        raise MedPLIBError(f"{name} has an unreadable image size in its DICOM header") from error
    if not any(keyword in data for keyword in _STANDS_FOR_PIXELS):
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


def _without_the_rest(parsed: Any) -> Any:
    """A data set of what is kept alone; the parsed one holds on to the whole file."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    implicit, little = parsed.original_encoding
    explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
    meta = getattr(parsed, "file_meta", None) or {}  # files without one say their encoding only by how they were parsed
    kept = _pick(parsed, _KEPT)
    kept.file_meta = FileMetaDataset()
    kept.file_meta.TransferSyntaxUID = meta.get("TransferSyntaxUID") or (
        ImplicitVRLittleEndian if implicit else explicit
    )
    return kept


def _pick(data: Any, keywords: frozenset[str] | set[str]) -> Any:
    from pydicom.datadict import tag_for_keyword
    from pydicom.dataset import Dataset

    kept = Dataset()
    kept.set_original_encoding(*data.original_encoding)
    for tag in sorted(tag_for_keyword(keyword) or 0 for keyword in keywords):
        if tag not in data:
            continue
        try:
            element = data[tag]
        except Exception:  # noqa: BLE001 - a malformed value, which ``_numbers`` mends; pydicom raises many types
            kept[tag] = data.get_item(tag)
            continue
        if element.VR == "SQ":
            setattr(kept, element.keyword, [_pick(item, keywords) for item in element.value])
        else:
            kept[tag] = element
    return kept


def _check_count(data: Any, name: str, count: int) -> None:
    """The pixels of as many frames as the header says have to be there."""
    from pydicom.encaps import parse_fragments
    from pydicom.pixels.utils import get_expected_length

    pixels = next(data[keyword].value for keyword in _STANDS_FOR_PIXELS if keyword in data)
    if data.file_meta.TransferSyntaxUID.is_encapsulated:
        items, _ = parse_fragments(io.BytesIO(pixels))
        if items - 1 < count:  # the first one is a table
            raise MedPLIBError(
                f"{name} has {count:,} frames by its header but holds {items - 1:,} at most; the file is damaged"
            )
        return
    expected = get_expected_length(data)
    if len(pixels) < expected:
        raise MedPLIBError(
            f"{name} holds {len(pixels):,} bytes of pixels where its header, with {count:,} frames, needs "
            f"{expected:,}; the file is damaged or cut short"
        )


def _mend_high_bit(data: Any) -> int:
    """Bits to shift values down by that do not end at the lowest bit, as old files have them (PS3.5 8.1.1)."""
    stored, high = int(data.get("BitsStored") or 0), int(data.get("HighBit") or 0)
    syntax = data.file_meta.TransferSyntaxUID
    if (syntax.is_encapsulated and syntax != _RLE) or not 0 < stored <= high < int(data.get("BitsAllocated") or 0):
        return 0
    data.BitsStored = high + 1
    return high + 1 - stored


def _decode_frame(data: Any, name: str, index: int = 0) -> np.ndarray:
    """Stored values [H, W] or colours [H, W, 3] of one frame."""
    from pydicom.pixels import pixel_array

    syntax = data.file_meta.TransferSyntaxUID
    try:
        _check_compressed(data, name, index)
        return pixel_array(data, index=index)
    except MedPLIBError:
        raise
    except Exception as error:  # each decoder plug-in has errors of its own
        if not syntax.is_compressed:
            raise MedPLIBError(f"{name} holds pixels that cannot be decoded ({first_line(error)})") from error
        extra = all(find_spec(module) for module in ("gdcm", "openjpeg", "pylibjpeg"))
        helps = not extra and syntax not in (_JPEG_BASELINE, _JPEG_EXTENDED)
        remedy = "if it is intact," if not helps else "install the extra (pip install 'medplib[dicom]') or"
        raise MedPLIBError(
            f"{name} is compressed as {syntax.name} and cannot be decoded here; {remedy} store it uncompressed"
        ) from error


def _check_compressed(data: Any, name: str, index: int) -> None:
    """What a compressed frame says of its own size, which decoders believe, has to agree with the header."""
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
    size = _encoded_size(frame)
    if size not in (None, (int(data.Rows), int(data.Columns))):
        raise MedPLIBError(
            f"{name} is {data.Rows} × {data.Columns} pixels according to its DICOM header, but its compressed frame is "
            f"{size[0]} × {size[1]}; the file is damaged"
        )


def _encoded_size(frame: bytes) -> tuple[int, int] | None:
    """(height, width) that a JPEG, lossless JPEG, JPEG-LS or JPEG 2000 code stream gives; None where it gives none."""
    start = frame.find(b"\xff\x4f\xff\x51")  # JPEG 2000: SOC, SIZ
    if 0 <= start < 256:
        numbers = [int.from_bytes(frame[start + at : start + at + 4], "big") for at in (8, 12, 16, 20)]
        return numbers[1] - numbers[3], numbers[0] - numbers[2]
    at = 2
    while frame[:2] == b"\xff\xd8" and at + 9 <= len(frame) and frame[at] == 0xFF:
        marker = frame[at + 1]
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return int.from_bytes(frame[at + 5 : at + 7], "big"), int.from_bytes(frame[at + 7 : at + 9], "big")
        at += 1 if marker == 0xFF else 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
    return None


def check_scans(content: bytes, name: str) -> None:
    """A progressive JPEG goes over all its pixels once for each scan, and a scan may take a hundred bytes. Raises
    MedPLIBError: it has more scans than any camera or program writes."""
    scans = content.count(b"\xff\xda")
    if scans > _MAX_SCANS:
        raise MedPLIBError(f"{name} is a JPEG of {scans:,} scans; save it anew with at most {_MAX_SCANS}")


def _photometric(data: Any) -> str:
    return str(data.get("PhotometricInterpretation") or "MONOCHROME2").strip().upper()


def _narrow(values: np.ndarray, bits: int) -> np.ndarray:
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    return (values.astype(np.float64) * (255.0 / (2**bits - 1)) + 0.5).clip(0, 255).astype(np.uint8)


def _padding_of(header: Any, stored: np.ndarray) -> np.ndarray | None:
    """Where the scanner saw nothing, outside a round field of view say (PS3.3 C.7.5.1.1.2); None where nowhere."""
    for keywords in _PADDING:
        ends = [numbers[0] for keyword in keywords if (numbers := _numbers(header, keyword)[0])]
        if not ends or not np.isfinite(ends).all() or (stored.dtype.kind == "f") == (keywords == _PADDING[0]):
            continue
        if stored.dtype.kind != "f":
            # In the representation of the pixels: files write 63536 (US) for -2000 (SS) and the reverse.
            wrapped = [int(np.array(int(end)).astype(stored.dtype)) for end in ends]
            bits = int(header.get("BitsStored") or 16)
            ends = [end - 2**bits if stored.dtype.kind == "i" and end >= 2 ** (bits - 1) else end for end in wrapped]
        return (stored >= min(ends)) & (stored <= max(ends))
    return None


def _words(item: Any, keyword: str) -> np.ndarray:
    """Whole numbers of an element that holds words as bytes, as one number or as several; empty where it is damaged."""
    try:
        value = item.get(keyword)
        if isinstance(value, bytes):
            return np.frombuffer(
                value[: len(value) // 2 * 2], "<u2" if item.original_encoding[1] is not False else ">u2"
            )
        return np.atleast_1d(np.array(value, dtype=np.int64))
    except (TypeError, ValueError, OverflowError):
        return np.zeros(0, dtype=np.int64)


def _numbers(data: Any, keyword: str) -> tuple[list[float], bool]:
    """Numbers of an element, NaN for what is none, and whether they had to be mended.

    Brackets, quotes, decimal commas and lists with commas are understood, as some programs write them."""
    from pydicom.datadict import tag_for_keyword

    try:
        value: Any = data.get(keyword)
    except Exception:  # noqa: BLE001 - values are parsed on access, and pydicom raises many types
        value = data.get_item(tag_for_keyword(keyword)).value
    if value is None:
        return [], False
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    parts = value.split("\\") if isinstance(value, str) else value if hasattr(value, "__iter__") else [value]
    numbers, mended = [], False
    for part in parts:
        try:
            numbers.append(float(part))
        except (TypeError, ValueError):
            mended = True
            for piece in _pieces(str(part)):
                try:
                    numbers.append(float(piece))
                except ValueError:
                    numbers.append(float("nan"))
    if all(np.isnan(number) for number in numbers) and not "".join(str(part) for part in parts).strip(" \0"):
        return [], False
    return numbers, mended


def _pieces(text: str) -> list[str]:
    """Parts of a text that should be one number: a list in brackets has several."""
    bare = text.strip(" \0\t\r\n[](){}'\"")
    if re.fullmatch(r"[-+]?\d+,\d+", bare) and "[" not in text and "(" not in text:
        return [bare.replace(",", ".")]
    return re.split(r"[,;\s]+", bare)


def first_line(error: Exception) -> str:
    """What an error says, in one line without the values it quotes, which may be anything that the header holds."""
    said = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
    if not isinstance(error, AttributeError):  # which quotes names of our own
        said = re.sub(r"b?(['\"]).*\1", "…", said)
    return textwrap.shorten("".join(character for character in said if character.isprintable()), 160, placeholder=" …")
