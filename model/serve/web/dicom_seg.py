"""Masks as a DICOM segmentation that refers to the frame they were drawn in.

Of the source nothing goes along but ``dicom.IDENTIFIERS`` and ``PLACE``: the study, series and image it belongs
to, the patient's identifier, the frame of reference and where the frame lies in it. Names, dates and the rest of the
patient and study modules are left empty, as the standard allows.
"""

from __future__ import annotations

import importlib.metadata
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from model.data.dicom import DicomFrames, first_line
from model.errors import MedPLIBError
from model.inference.answer import Mask
from model.serve.web.pictures import colour, of_size

_NEEDED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
_PLACED = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness")
_LEFT_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("StudyID", "StudyDate", "StudyTime", "AccessionNumber"),
)
_INSTEAD = "download the masks as PNG, RLE or NIfTI"


def dicom_segmentation(masks: Sequence[tuple[int, Mask]], frames: DicomFrames, index: int, name: str) -> bytes:
    """A DICOM-SEG file of binary segments, one for each mask.

    Args:
        masks: the page's number of each, from 1, and the mask at the frame's size; at least one.
        frames: of the source file.
        index: of the frame that the masks belong to, from 0.
        name: what messages call the source.

    Raises:
        MedPLIBError: every mask is empty, or the source lacks what a segmentation has to refer to.
    """
    layers = np.stack([of_size(mask, frames.size) for _, mask in masks], axis=-1).astype(np.uint8)
    if not layers.any():
        raise MedPLIBError(f"every mask of {name} is empty, and DICOM-SEG cannot tell of nothing; {_INSTEAD}")
    source = frames.reference()
    positions = _positions(source, index, name)
    for keyword in _LEFT_EMPTY:
        if keyword not in source:
            setattr(source, keyword, "")
    try:
        return _written(_segmentation(source, layers, masks, positions))
    except Exception as error:  # highdicom raises whatever a contradictory header makes it
        raise MedPLIBError(f"{name} cannot be referred to by DICOM-SEG ({first_line(error)}); {_INSTEAD}") from error


def _positions(source: Any, index: int, name: str) -> list[Any] | None:
    """Where the frame lies, of a file of several; None where the source has one place or none.

    Raises:
        MedPLIBError: the source lacks what a segmentation needs.
    """
    from highdicom.spatial import get_image_coordinate_system
    from highdicom.utils import get_plane_positions_of_image

    lacking = [keyword for keyword in _NEEDED if _absent(source, keyword)]
    if "ImagePositionPatient" in source and _absent(source, "FrameOfReferenceUID"):
        lacking.append("FrameOfReferenceUID")
    placed = get_image_coordinate_system(source) is not None
    several = int(source.get("NumberOfFrames") or 1) > 1 or bool(source.get("PerFrameFunctionalGroupsSequence"))
    if placed and not several and not source.get("SharedFunctionalGroupsSequence"):
        lacking += [keyword for keyword in _PLACED if _absent(source, keyword)]
    if lacking:
        raise MedPLIBError(f"{name} lacks {', '.join(lacking)}, which DICOM-SEG refers to; {_INSTEAD}")
    if not several:
        if not placed and "SliceThickness" not in source and "PixelSpacing" in source:
            del source.PixelSpacing  # pixel measures without a thickness cannot be read; the source's own still hold
        return None
    groups = [source.get(f"{which}FunctionalGroupsSequence") for which in ("Shared", "PerFrame")]
    if not placed or not all(groups) or "PlaneOrientationSequence" not in groups[0][0]:
        raise MedPLIBError(
            f"{name} does not tell where each of its frames lies in the patient, without which DICOM-SEG cannot refer "
            f"to one of several; {_INSTEAD}"
        )
    source.NumberOfFrames = len(groups[1])  # some files of one frame leave it out
    try:
        return [get_plane_positions_of_image(source)[index]]
    except Exception as error:  # as above
        raise MedPLIBError(f"{name} has frame positions that cannot be followed; {_INSTEAD}") from error


def _absent(source: Any, keyword: str) -> bool:
    value = source.get(keyword)
    return value is None or str(value) == ""


def _segmentation(
    source: Any, layers: np.ndarray, masks: Sequence[tuple[int, Mask]], positions: list[Any] | None
) -> Any:
    import highdicom

    return highdicom.seg.Segmentation(
        source_images=[source],
        pixel_array=layers[np.newaxis],
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[_segment(place, *numbered) for place, numbered in enumerate(masks, start=1)],
        series_instance_uid=highdicom.UID(),
        series_number=9000,  # out of the way of the scanner's own
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="MedPLIB",
        manufacturer_model_name="MedPLIB",
        software_versions=_version(),
        device_serial_number="0",
        plane_positions=positions,
        content_label="MEDPLIB",
        content_description="Masks by a model, for research use only",
        series_description="MedPLIB masks",
        specific_character_set="ISO_IR 192",
    )


def _segment(place: int, number: int, mask: Mask) -> Any:
    import highdicom
    from pydicom.sr.codedict import codes

    segment = highdicom.seg.SegmentDescription(
        segment_number=place,  # DICOM wants 1, 2, 3 …
        segment_label=_label(mask, number),
        segmented_property_category=codes.SCT.Tissue,  # the model's own words are no code; this is the general one
        segmented_property_type=codes.SCT.Tissue,
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name="MedPLIB", version=_version(), family=codes.DCM.ArtificialIntelligence
        ),
        display_color=highdicom.color.CIELabColor.from_rgb(*colour(number - 1)),
    )
    segment.SegmentDescription = f"mask {number}; the model's own estimate of the overlap (IoU) is {mask.score:.2f}"
    return segment


def _label(mask: Mask, number: int) -> str:
    """At most 64 characters, of which DICOM allows neither backslashes nor control characters."""
    allowed = "".join(character for character in mask.label if character.isprintable() and character != "\\")
    return allowed.strip()[:64].strip() or f"mask {number}"


def _version() -> str:
    try:
        return importlib.metadata.version("medplib")
    except importlib.metadata.PackageNotFoundError:  # run from a folder that was not installed
        return "unknown"


def _written(segmentation: Any) -> bytes:
    stream = io.BytesIO()
    segmentation.save_as(stream)
    return stream.getvalue()
