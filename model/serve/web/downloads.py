"""Downloads of an answer's masks: PNG, RLE, NIfTI, DICOM-SEG, and the overlay."""

from __future__ import annotations

import importlib.metadata
import io
import json
import re
import zipfile
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from model.data.dicom import DicomFrames, first_line
from model.data.volumes import DicomVolume, Volume, VoxelVolume, Window
from model.data.voxels import write_nifti
from model.errors import MedPLIBError
from model.inference.answer import Mask
from model.serve.limits import safe_file_name
from model.serve.web.pictures import colour, of_size, overlay
from model.visualize import ALPHA

Kind = Literal["png", "overlay", "rle", "nifti", "dicom-seg"]

_NEEDED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
_PLACED = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness")
_LEFT_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("StudyID", "StudyDate", "StudyTime", "AccessionNumber"),
)
_INSTEAD = "download the masks as PNG, RLE or NIfTI"
_ENDINGS = re.compile(r"(\.nii\.gz|\.[A-Za-z0-9]{1,6})$")


def kinds(volume: Volume) -> tuple[Kind, ...]:
    """What masks in this volume can be downloaded as; what DICOM-SEG needs of a DICOM file is checked later."""
    return tuple(kind for kind in get_args(Kind) if kind != "dicom-seg" or isinstance(volume, DicomVolume))


def encode(
    kind: Kind,
    masks: Sequence[Mask],
    volume: Volume,
    slice_index: int,
    *,
    shown: Sequence[bool] = (),
    opacity: float = ALPHA,
    contour: bool = True,
    window: Window | None = None,
) -> tuple[str, bytes]:
    """The masks that are shown as one file; each keeps its number.

    - ``png``: 0 and 255, at the slice's size; a zip of them where there are several.
    - ``overlay``: the picture as it is shown.
    - ``rle``: JSON; each mask as COCO run lengths with number, label, score, box ``[x1, y1, x2, y2]``, size and area.
    - ``nifti``: a map of the masks' numbers in the input's geometry: of a whole NIfTI volume to the bit, of one DICOM
      frame where it lies in the patient, of any other picture with the identity and the spacing, if it is known.
      Where masks overlap, the later one stands.
    - ``dicom-seg``: a segment for each mask; see ``dicom_segmentation``.

    Args:
        kind: of file.
        masks: of the slice's size, in the order of their numbers.
        volume: that was asked about.
        slice_index: of the slice that was asked about, from 0.
        shown: whether each mask goes in; masks beyond its length are. Of those that are not, the size is free.
        opacity, contour, window: as the picture is shown.

    Returns:
        The file's name, derived from the volume's and made safe, and its content.

    Raises:
        MedPLIBError: there are no masks, they are of another slice, or the input cannot have such a file.
    """
    if kind not in get_args(Kind):
        raise MedPLIBError(f"masks are downloaded as {', '.join(get_args(Kind))}; got {kind!r:.40}")
    slice_index = volume.checked(slice_index)
    if not masks:
        raise MedPLIBError("there is no mask to download; ask for one first")
    kept = [(number, mask) for number, mask in enumerate(masks, start=1) if number > len(shown) or shown[number - 1]]
    arrays = [of_size(mask, volume.size) for _, mask in kept]
    stem = _stem(volume, slice_index)
    if kind == "overlay":
        return f"{stem}_overlay.png", _png(overlay(volume.slice(slice_index, window), masks, shown, opacity, contour))
    if kind == "rle":
        return f"{stem}_masks.json", _run_lengths(kept, volume, slice_index)
    if kind == "nifti":
        return f"{stem}_masks.nii.gz", _nifti(kept, arrays, volume, slice_index)
    if kind == "dicom-seg":
        if not isinstance(volume, DicomVolume):
            raise MedPLIBError(
                f"{volume.name} is no DICOM file, which DICOM-SEG has to refer to; choose another format"
            )
        return f"{stem}_seg.dcm", dicom_segmentation(kept, volume.frames, slice_index, volume.name)
    pictures = {
        f"{stem}_mask_{number}{_slug(mask.label)}.png": _png(inside.astype(np.uint8) * 255)
        for (number, mask), inside in zip(kept, arrays, strict=True)
    }
    if len(pictures) == 1:
        return next(iter(pictures.items()))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:  # PNG is compressed already
        for name, content in pictures.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = 0o644 << 16  # else the user who unpacks it may lack read permission
            archive.writestr(entry, content)
    return f"{stem}_masks.zip", packed.getvalue()


def _run_lengths(masks: Sequence[tuple[int, Mask]], volume: Volume, index: int) -> bytes:
    content: dict[str, Any] = {"slice": index, "slices": volume.num_slices}
    if volume.plane:
        content["plane"] = volume.plane
    if volume.spacing_mm:
        content["spacing_mm"] = list(volume.spacing_mm)
    content["masks"] = [{"number": number, **mask.to_dict(), "size": mask.rle["size"]} for number, mask in masks]
    return json.dumps(content, ensure_ascii=False, indent=1).encode()


def _nifti(masks: Sequence[tuple[int, Mask]], arrays: list[np.ndarray], volume: Volume, index: int) -> bytes:
    labels = np.zeros(volume.size, dtype=np.uint8 if masks[-1][0] < 256 else np.uint16)
    for (number, _), inside in zip(masks, arrays, strict=True):
        labels[inside] = number
    names = "MedPLIB: " + ", ".join(f"{number} {mask.label or 'mask'}" for number, mask in masks)
    if isinstance(volume, VoxelVolume):
        return write_nifti(volume.in_file(labels, index), volume.source.affine, volume.source, names)
    placed = _dicom_affine(volume, index) if isinstance(volume, DicomVolume) else None
    if placed is None:
        row, column = volume.spacing_mm or (1.0, 1.0)
        placed = np.diag([column, row, 1.0, 1.0])
    return write_nifti(labels.T[:, :, np.newaxis], placed, description=names)


def _dicom_affine(volume: DicomVolume, index: int) -> np.ndarray | None:
    """From (column, row, 0) of a frame to mm towards the right, the front and the head; None where it has no place."""
    place = volume.frames.place(index)
    if place is None or volume.spacing_mm is None:
        return None
    position, (across, down), thickness = place
    affine = np.eye(4)
    affine[:3, 0] = across * volume.spacing_mm[1]
    affine[:3, 1] = down * volume.spacing_mm[0]
    affine[:3, 2] = np.cross(across, down) * thickness
    affine[:3, 3] = position
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # DICOM counts towards the left and the back


def _stem(volume: Volume, index: int) -> str:
    stem = safe_file_name(_ENDINGS.sub("", volume.name), "image")[:60].rstrip("._ ") or "image"
    if volume.num_slices == 1:
        return stem
    return f"{stem}_{volume.plane or 'frame'}_{index + 1}"


def _slug(label: str) -> str:
    kept = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")[:40]
    return f"_{kept}" if kept else ""


def _png(pixels: np.ndarray) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    return encoded.getvalue()


# --- DICOM-SEG ----------------------------------------------------------------------------------------------------


def dicom_segmentation(masks: Sequence[tuple[int, Mask]], frames: DicomFrames, index: int, name: str) -> bytes:
    """A DICOM-SEG file of binary segments, one for each mask; it refers to the frame they were drawn in.

    Of the source nothing goes along but ``dicom.IDENTIFIERS`` and ``PLACE``: the study, series and image it belongs
    to, the patient's identifier, the frame of reference and where the frame lies in it. Names, dates and the rest of
    the patient and study modules are left empty, as the standard allows.

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
        raise MedPLIBError(f"every mask of {name} is empty, and DICOM-SEG cannot hold nothing; {_INSTEAD}")
    source = frames.reference()
    positions = _positions(source, index, name)
    for keyword in _LEFT_EMPTY:
        if keyword not in source:
            setattr(source, keyword, "")
    try:
        stream = io.BytesIO()
        _segmentation(source, layers, masks, positions).save_as(stream)
        return stream.getvalue()
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
            f"{name} does not say where each of its frames lies in the patient, without which DICOM-SEG cannot refer "
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

    try:
        version = importlib.metadata.version("medplib")
    except importlib.metadata.PackageNotFoundError:  # run from a folder that was not installed
        version = "unknown"
    return highdicom.seg.Segmentation(
        source_images=[source],
        pixel_array=layers[np.newaxis],
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[_segment(place, *numbered, version) for place, numbered in enumerate(masks, start=1)],
        series_instance_uid=highdicom.UID(),
        series_number=9000,  # out of the way of the scanner's own
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="MedPLIB",
        manufacturer_model_name="MedPLIB",
        software_versions=version,
        device_serial_number="0",
        plane_positions=positions,
        content_label="MEDPLIB",
        content_description="Masks by a model, for research use only",
        series_description="MedPLIB masks",
        specific_character_set="ISO_IR 192",
    )


def _segment(place: int, number: int, mask: Mask, version: str) -> Any:
    import highdicom
    from pydicom.sr.codedict import codes

    label = "".join(character for character in mask.label if character.isprintable() and character != "\\")
    label = label.strip()[:64].strip()  # all that DICOM allows
    segment = highdicom.seg.SegmentDescription(
        segment_number=place,  # DICOM wants 1, 2, 3 …
        segment_label=label or f"mask {number}",
        segmented_property_category=codes.SCT.Tissue,  # the model's own words are no code; this is the general one
        segmented_property_type=codes.SCT.Tissue,
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name="MedPLIB", version=version, family=codes.DCM.ArtificialIntelligence
        ),
        display_color=highdicom.color.CIELabColor.from_rgb(*colour(number - 1)),
    )
    segment.SegmentDescription = f"mask {number}; the model's own estimate of the overlap (IoU) is {mask.score:.2f}"
    return segment
