"""An answer's masks as files that other programs read: PNG, RLE, NIfTI, DICOM-SEG, and the picture as it is shown."""

from __future__ import annotations

import io
import json
import re
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from model.data.volumes import DicomVolume, Volume, VoxelVolume, Window
from model.data.voxels import write_nifti
from model.errors import MedPLIBError
from model.inference.answer import Mask
from model.inference.overlay import ALPHA
from model.serve.limits import safe_file_name
from model.serve.web.dicom_seg import dicom_segmentation
from model.serve.web.pictures import of_size, overlay

Kind = Literal["png", "overlay", "rle", "nifti", "dicom-seg"]

_ENDINGS = re.compile(r"(\.nii\.gz|\.[A-Za-z0-9]{1,6})$")


def kinds(volume: Volume) -> tuple[Kind, ...]:
    """What masks in this volume can be downloaded as; whether a DICOM file has what DICOM-SEG needs is told later."""
    return tuple(kind for kind in get_args(Kind) if kind != "dicom-seg" or isinstance(volume, DicomVolume))


def write(
    kind: Kind,
    masks: Sequence[Mask],
    volume: Volume,
    slice_index: int,
    folder: Path,
    *,
    shown: Sequence[bool] = (),
    opacity: float = ALPHA,
    contour: bool = True,
    window: Window | None = None,
) -> Path:
    """Write the masks that are shown into ``folder`` as one file, whole or not at all; each keeps its number.

    - ``png``: 0 and 255, at the slice's size; a zip of them where there are several.
    - ``overlay``: the picture as it is shown.
    - ``rle``: JSON; each mask as COCO run lengths with number, label, score, box ``[x1, y1, x2, y2]``, size and area.
    - ``nifti``: a map of the masks' numbers in the input's geometry: of a whole NIfTI volume to the bit, of one DICOM
      frame where it lies in the patient, of any other picture with the identity and the spacing, if it is known.
      Where masks overlap, the later one stands.
    - ``dicom-seg``: a segment for each mask; see ``dicom_seg``.

    Args:
        kind: of file.
        masks: of the slice's size, in the order of their numbers.
        volume: that was asked about.
        slice_index: of the slice that was asked about, from 0.
        folder: to write in; it is made where it is missing. File names are derived from the volume's, made safe.
        shown: whether each mask is written; masks beyond its length are. Of those that are not, the size is free.
        opacity, contour, window: as the picture is shown.

    Returns:
        The file.

    Raises:
        MedPLIBError: there are no masks, they are of another slice, the input cannot have such a file, or the folder
            cannot be written.
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
        drawn = overlay(volume.slice(slice_index, window), masks, shown, opacity, contour)
        return _save(folder, f"{stem}_overlay.png", _png(drawn))
    if kind == "rle":
        return _save(folder, f"{stem}_masks.json", _run_lengths(kept, volume, slice_index))
    if kind == "nifti":
        return _save(folder, f"{stem}_masks.nii.gz", _nifti(kept, arrays, volume, slice_index))
    if kind == "dicom-seg":
        if not isinstance(volume, DicomVolume):
            raise MedPLIBError(
                f"{volume.name} is no DICOM file, which DICOM-SEG has to refer to; choose another format"
            )
        return _save(folder, f"{stem}_seg.dcm", dicom_segmentation(kept, volume.frames, slice_index, volume.name))
    return _save_pngs(folder, stem, kept, arrays)


def _save_pngs(folder: Path, stem: str, masks: Sequence[tuple[int, Mask]], arrays: list[np.ndarray]) -> Path:
    pictures = {
        f"{stem}_mask_{number}{_slug(mask.label)}.png": _png(inside.astype(np.uint8) * 255)
        for (number, mask), inside in zip(masks, arrays, strict=True)
    }
    if len(pictures) == 1:
        return _save(folder, *next(iter(pictures.items())))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:  # PNG is compressed already
        for name, content in pictures.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = 0o644 << 16  # else whoever unpacks it may not read it
            archive.writestr(entry, content)
    return _save(folder, f"{stem}_masks.zip", packed.getvalue())


def _run_lengths(masks: Sequence[tuple[int, Mask]], volume: Volume, index: int) -> bytes:
    told: dict[str, Any] = {"slice": index, "slices": volume.num_slices}
    if volume.plane:
        told["plane"] = volume.plane
    if volume.spacing_mm:
        told["spacing_mm"] = list(volume.spacing_mm)
    told["masks"] = [{"number": number, **mask.to_dict(), "size": mask.rle["size"]} for number, mask in masks]
    return json.dumps(told, ensure_ascii=False, indent=1).encode()


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


def _save(folder: Path, name: str, content: bytes) -> Path:
    target = folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as staging:
            staged = Path(staging) / name
            staged.write_bytes(content)
            staged.replace(target)
    except OSError as error:
        reason = error.strerror or error
        raise MedPLIBError(f"cannot write {name}: {reason}; choose another folder or free some space") from error
    return target
