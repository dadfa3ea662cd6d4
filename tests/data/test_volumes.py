"""Uploads of every kind as slices: what is seen, what is sent, and what is refused before it costs anything."""

from __future__ import annotations

import gzip
import io
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file

from model.data.image_io import read_image
from model.data.volumes import Volume, VoxelVolume, open_volume
from model.errors import MedPLIBError
from model.serve.limits import ServeLimits

LIMITS = ServeLimits()
COLOURS = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)


def shipped(name: str) -> bytes:
    path = get_testdata_file(name, download=False)
    assert isinstance(path, str)
    return Path(path).read_bytes()


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def decoded(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def body(codes: str = "RAS", side: tuple[int, int, int] = (9, 8, 7), mm: float = 1.0) -> nibabel.Nifti1Image:
    """A volume stored in any orientation, whose brightness tells of the place: right 100, front 10, head 1."""
    right_front_head = np.zeros(side)
    right_front_head[5:] += 100
    right_front_head[:, 4:] += 10
    right_front_head[:, :, 4:] += 1
    plain = nibabel.Nifti1Image(right_front_head, np.diag([mm, mm, mm, 1.0]))
    turn = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(codes)
    )
    return plain.as_reoriented(turn)


def opened(data: bytes, name: str = "upload") -> Volume:
    return open_volume(data, name, LIMITS)


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "JPEG"])
def test_a_picture_is_one_slice_and_sent_as_it_is_seen(form: str) -> None:
    data = encoded(Image.fromarray(COLOURS), form)
    volume = opened(data, f"a.{form.lower()}")
    assert (volume.kind, volume.num_slices, volume.window, volume.spacing_mm) == ("picture", 1, None, None)
    assert (volume.planes, volume.plane, volume.size) == ((), None, (30, 40))
    assert np.array_equal(volume.slice(0), read_image(data).pixels)
    assert np.array_equal(decoded(volume.png(0)), volume.slice(0))
    assert np.array_equal(volume.slice(0, (10, 1)), volume.slice(0))  # nothing to window
    with pytest.raises(MedPLIBError, match="slices 1 to 1; there is no slice 2"):
        volume.slice(1)


def test_unusual_pictures_are_understood() -> None:
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16)
    wide = opened(encoded(Image.fromarray(ramp * 200 + 5), "PNG")).slice(0)
    assert np.abs(wide[:, :, 0].astype(int) - ramp).max() <= 1
    cmyk = opened(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")).slice(0)
    assert cmyk[8, 8, 0] > 200
    assert cmyk[8, 8, 1:].max() < 60
    palette = Image.fromarray(COLOURS).convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
    assert np.array_equal(opened(encoded(palette, "PNG")).slice(0), np.asarray(palette.convert("RGB")))
    grey = opened(encoded(Image.fromarray(COLOURS[:, :, 0]), "PNG"))
    assert Image.open(io.BytesIO(grey.png(0))).mode == "L"


def test_dicom_is_windowed_by_the_file_and_then_by_the_user() -> None:
    volume = opened(shipped("MR_small.dcm"), "MR_small.dcm")
    assert (volume.kind, volume.num_slices, volume.spacing_mm) == ("dicom", 1, (0.3125, 0.3125))
    assert volume.window == (600.0, 1600.0)
    assert np.array_equal(volume.slice(0), volume.slice(0, volume.window))
    narrow = volume.slice(0, (600, 10))
    assert (np.isin(narrow, (0, 255)).mean(), volume.slice(0).mean()) > (0.9, 0)
    assert np.array_equal(decoded(volume.png(0, (600, 10))), narrow)
    for wrong in ((1, 0), (1, -5), (float("nan"), 1), (1,), "wide"):
        with pytest.raises(MedPLIBError, match="a window is"):
            volume.slice(0, wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["CT_small.dcm", "MR_small_bigendian.dcm", "MR_small_RLE.dcm", "examples_palette.dcm", "liver_1frame.dcm"]
)
def test_the_page_shows_what_every_other_face_reads(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(shipped(name))
    volume, image = opened(shipped(name), name), read_image(tmp_path / name)
    assert np.array_equal(volume.slice(0), image.pixels)
    assert volume.spacing_mm == image.spacing_mm


def test_a_film_has_a_slice_for_each_frame() -> None:
    volume = opened(shipped("examples_ybr_color.dcm"), "film")
    assert (volume.num_slices, volume.size, volume.window) == (30, (240, 320), None)
    assert not np.array_equal(volume.slice(0), volume.slice(29))


def test_dicom_without_its_mark_is_known_by_its_name() -> None:
    bare = shipped("MR_small.dcm")[132:]
    assert opened(bare, "scan.DCM").kind == "dicom"
    assert np.array_equal(opened(bare, "scan.dcm").slice(0), opened(shipped("MR_small.dcm")).slice(0))
    with pytest.raises(MedPLIBError):
        opened(bare, "scan.png")
    assert opened(encoded(Image.fromarray(COLOURS), "PNG"), "wrong.dcm").kind == "picture"


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "PIR", "SRA", "AIL"])
@pytest.mark.parametrize("packed", [False, True])
def test_volumes_look_the_same_however_they_are_stored(codes: str, packed: bool) -> None:
    data = body(codes).to_bytes()
    volume = opened(gzip.compress(data) if packed else data, "a.nii.gz" if packed else "a.nii")
    assert (volume.kind, volume.plane, volume.planes) == ("nifti", "axial", ("axial", "coronal", "sagittal"))
    window = (55.5, 111.0)

    def values(plane: Any, index: int) -> np.ndarray:
        return np.rint(volume.along(plane).slice(index, window)[:, :, 0] / 255 * 111)

    axial = values("axial", 6)  # the last one is at the head
    assert axial.shape == (8, 9)
    assert (axial[0, 0], axial[0, -1], axial[-1, 0], axial[-1, -1]) == (111, 11, 101, 1)
    assert values("axial", 0)[0, 0] == 110
    coronal = values("coronal", 0)  # the first one is at the front
    assert coronal.shape == (7, 9)
    assert (coronal[0, 0], coronal[0, -1], coronal[-1, 0], coronal[-1, -1]) == (111, 11, 110, 10)
    sagittal = values("sagittal", 0)  # the first one is at the right
    assert sagittal.shape == (7, 8)
    assert (sagittal[0, 0], sagittal[0, -1], sagittal[-1, 0], sagittal[-1, -1]) == (111, 101, 110, 100)
    assert [volume.along(plane).num_slices for plane in volume.planes] == [7, 8, 9]


@pytest.mark.parametrize("codes", ["RAS", "PIR", "SLA"])
def test_a_mask_goes_back_to_the_voxels_it_was_drawn_on(codes: str) -> None:
    stored = body(codes)
    for plane in ("axial", "coronal", "sagittal"):
        volume = opened(stored.to_bytes()).along(plane)  # type: ignore[arg-type]
        assert isinstance(volume, VoxelVolume)
        picture = np.zeros(volume.size, dtype=np.uint8)
        for index in range(volume.num_slices):
            shown = volume.slice(index, (55.5, 111.0))[:, :, 0]
            picture[:] = shown == 255  # right, front and head together
            labels = volume.in_file(picture, index)
            assert labels.shape == stored.shape
            assert labels.sum() == picture.sum()
            assert (stored.get_fdata()[labels > 0] == 111).all()


def test_spacing_and_plane_follow_the_voxels() -> None:
    thick = nibabel.Nifti1Image(np.random.default_rng(0).random((10, 4, 12)), np.diag([0.5, 4.0, 0.8, 1.0]))
    volume = opened(thick.to_bytes())
    assert volume.plane == "coronal"  # as it was acquired
    assert volume.spacing_mm == pytest.approx((0.8, 0.5))
    assert volume.along("axial").spacing_mm == pytest.approx((4.0, 0.5))
    assert volume.along("sagittal").spacing_mm == pytest.approx((0.8, 4.0))
    flat = opened(nibabel.Nifti1Image(np.zeros((10, 12), dtype=np.uint8), np.eye(4)).to_bytes())
    assert (flat.planes, flat.num_slices, flat.size) == (("axial",), 1, (12, 10))
    with pytest.raises(MedPLIBError, match="it can be cut axial"):
        flat.along("coronal")
    four = nibabel.Nifti1Image(np.stack([np.full((4, 4, 3), value) for value in (7.0, 9.0)], axis=3), np.eye(4))
    first = opened(four.to_bytes())
    assert np.array_equal(first.slice(1, (7, 1e-3))[:, :, 0], np.full((4, 4), 128))
    assert (first.notes, first.along("sagittal").notes, tuple(volume.notes)) == (("volume 1 of 2",),) * 2 + ((),)


def test_first_window_of_a_volume_is_the_file_s_or_percentiles() -> None:
    values = np.random.default_rng(0).normal(40, 10, (20, 20, 20))
    values[0, 0, 0], values[1, 1, 1] = 30_000, np.nan
    image = nibabel.Nifti1Image(values, np.eye(4))
    centre, width = opened(image.to_bytes()).window or (0, 0)
    assert 35 < centre < 45
    assert 40 < width < 70
    assert max(len(str(centre)), len(str(width))) <= 5  # legible beside a slider
    image.header["cal_min"], image.header["cal_max"] = 0, 80
    assert opened(image.to_bytes()).window == (40.0, 80.0)
    with pytest.raises(MedPLIBError, match="NaN or infinity in every voxel"):
        opened(nibabel.Nifti1Image(np.full((4, 4, 4), np.nan), np.eye(4)).to_bytes())
    assert opened(nibabel.Nifti1Image(np.zeros((4, 4, 4)), np.eye(4)).to_bytes()).slice(0).shape == (4, 4, 3)


def huge_png() -> bytes:
    """A header of 10,000 × 10,000 pixels and next to nothing behind it."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 10_000, 10_000, 8, 0, 0, 0, 0)
    pixels = b"IDAT" + zlib.compress(bytes(1000))
    pieces = [
        struct.pack(">I", len(piece) - 4) + piece + struct.pack(">I", zlib.crc32(piece)) for piece in (head, pixels)
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(pieces)


def archive() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as packed:
        packed.writestr("a.png", b"hello")
    return stream.getvalue()


def refused() -> dict[str, tuple[bytes, str]]:
    png = encoded(Image.fromarray(COLOURS), "PNG")
    frames = [Image.fromarray(COLOURS[:, :, 0]), Image.fromarray(255 - COLOURS[:, :, 0])]
    both = bytearray(shipped("CT_small.dcm"))
    both[: len(png[:100])] = png[:100]
    return {
        "nothing": (b"", "is empty"),
        "text": (b"hello", "not a readable image"),
        "markup": (b"<svg onload=alert(1)>", "not a readable image"),
        "an archive": (archive(), "compressed archive"),
        "too many bytes": (bytes(65 * 2**20), "larger than the limit of 64 MiB"),
        "too many pixels": (huge_png(), "10000 × 10000 pixels, more than the limit"),
        "cut": (png[:-400], "damaged or cut short"),
        "a moving picture": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), "several images"),
        "pages": (encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:]), "several images"),
        "two formats at once": (bytes(both), "something else at once"),
        "a compressed picture": (gzip.compress(png), "no NIfTI image"),
    }


@pytest.mark.parametrize("case", refused())
def test_unreadable_uploads_end_in_one_sentence(case: str) -> None:
    data, reason = refused()[case]
    with pytest.raises(MedPLIBError, match=reason) as raised:
        opened(data, "../../etc/x\n<b>.png")
    told = str(raised.value)
    assert "etc" not in told
    assert "\n" not in told
    assert told.startswith("x?<b>.png ")


def test_limits_on_slices_and_their_pixels() -> None:
    few, small = ServeLimits(max_frames=7), ServeLimits(max_pixels=60)
    assert open_volume(body().to_bytes(), "a.nii", few).planes == ("axial",)  # of 9 × 8 × 7 voxels
    assert open_volume(body().to_bytes(), "a.nii", small).planes == ("sagittal",)
    with pytest.raises(MedPLIBError, match="at most 6 slices of 40,000,000 pixels fit"):
        open_volume(body().to_bytes(), "a.nii", ServeLimits(max_frames=6))
    with pytest.raises(MedPLIBError, match="30 frames, more than the limit of 7"):
        open_volume(shipped("examples_ybr_color.dcm"), "film", few)
    with pytest.raises(MedPLIBError, match="64 × 64 pixels, more than the limit of 60"):
        open_volume(shipped("MR_small.dcm"), "scan", small)
    bytes_of_each = ServeLimits(max_image_bytes=50, max_volume_bytes=2**20)
    for content in (body().to_bytes(), gzip.compress(body().to_bytes()), shipped("MR_small.dcm")):
        assert open_volume(content, "unnamed", bytes_of_each).size
    with pytest.raises(MedPLIBError, match="larger than the limit"):
        open_volume(encoded(Image.fromarray(COLOURS), "PNG"), "a.png", bytes_of_each)


def test_a_name_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "there.png"
    path.write_bytes(encoded(Image.fromarray(COLOURS), "PNG"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MedPLIBError):
        opened(b"hello", str(path))
    with pytest.raises(TypeError):
        open_volume(str(path), "there.png", LIMITS)  # type: ignore[arg-type]
    assert opened(encoded(Image.fromarray(COLOURS), "PNG"), "/no/such/folder.png").name == "folder.png"


def test_bytes_behind_a_picture_go_nowhere() -> None:
    secret = b"PK\x03\x04 a second file"
    volume = opened(encoded(Image.fromarray(COLOURS), "PNG") + secret, "two.png")
    assert secret not in volume.png(0)


def test_a_patient_s_name_is_not_sent() -> None:
    data = pydicom.dcmread(io.BytesIO(shipped("CT_small.dcm")))
    assert str(data.PatientName).encode() not in opened(shipped("CT_small.dcm")).png(0)
