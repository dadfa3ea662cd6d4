"""Frames of one DICOM file, each decoded when it is asked for, with a window of one's own.

Of the header only what is named here is kept once the file is open; names, dates, comments, private elements and the
rest are gone before anything else sees the data set. What may leave again, inside a DICOM segmentation that refers to
the file, is ``IDENTIFIERS`` and ``PLACE``.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from model.data.dicom import (
    check_image,
    decode_frame,
    file_window,
    first_line,
    padding_of,
    parse_dicom,
    pixel_spacing,
    supply_transfer_syntax,
    to_display,
)
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
