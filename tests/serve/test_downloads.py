"""Masks as files, read back by the libraries that others read them with."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from model.data.volumes import Volume, open_volume
from model.errors import MedPLIBError
from model.inference.answer import Mask
from model.processing.masks import decode_rle
from model.serve.limits import ServeLimits
from model.serve.web.downloads import encode, kinds
from model.serve.web.pictures import overlay

AFFINE = np.array([[0.0, 0.1, -3.0, 11], [-0.9, 0.05, 0.2, -7], [0.02, 1.1, 0.1, 5], [0, 0, 0, 1]])


def write(kind: Any, masks: Any, volume: Any, index: int, folder: Path, **options: Any) -> Path:
    name, content = encode(kind, masks, volume, index, **options)
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


def opened(data: bytes, name: str) -> Volume:
    return open_volume(data, name, ServeLimits())


def picture() -> Volume:
    stream = io.BytesIO()
    Image.fromarray(np.full((30, 40, 3), 90, dtype=np.uint8)).save(stream, "PNG")
    return opened(stream.getvalue(), "chest.png")


def shipped(name: str) -> Volume:
    path = get_testdata_file(name, download=False)
    assert isinstance(path, str)
    return opened(Path(path).read_bytes(), name)


def header(name: str) -> Dataset:
    path = get_testdata_file(name, download=False)
    assert isinstance(path, str)
    return pydicom.dcmread(path)


def masks_in(volume: Volume, count: int = 2) -> list[Mask]:
    """Masks without symmetry, so that a flip or a turn is seen; the later ones lie over the first."""
    height, width = volume.size
    made = []
    for number in range(count):
        inside = np.zeros(volume.size, dtype=bool)
        inside[1 + number : height // 2, 2 : width // 3] = True
        inside[0, width - 1 - number] = True
        made.append(Mask.from_array(inside, ("left lung", "")[number % 2], 0.75, volume.spacing_mm))
    return made


def altered(name: str, **values: Any) -> Volume:
    data = header(name)
    for keyword, value in values.items():
        if value is None:
            del data[keyword]
        else:
            setattr(data, keyword, value)
    stream = io.BytesIO()
    data.save_as(stream)
    return opened(stream.getvalue(), name)


def enhanced(count: int = 4) -> tuple[Volume, FileDataset]:
    """An enhanced MR image of several frames, each with its place in the patient."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4.1"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = (generate_uid() for _ in range(3))
    data.PatientID, data.PatientName, data.Modality = "ID 7", "Secret^Name", "MR"
    data.Rows, data.Columns, data.NumberOfFrames = 12, 16, count
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
    data.PixelData = np.arange(count * 12 * 16).astype(np.uint8).tobytes()
    shared = Dataset()
    shared.PixelMeasuresSequence = [item(PixelSpacing=[0.5, 0.25], SliceThickness=3, SpacingBetweenSlices=3)]
    shared.PlaneOrientationSequence = [item(ImageOrientationPatient=[0, 1, 0, 0, 0, -1])]
    data.SharedFunctionalGroupsSequence = [shared]
    data.PerFrameFunctionalGroupsSequence = [
        item(PlanePositionSequence=[item(ImagePositionPatient=[10 + 3 * number, 20, 30])]) for number in range(count)
    ]
    stream = io.BytesIO()
    data.save_as(stream)
    return opened(stream.getvalue(), "mr.dcm"), data


def item(**values: Any) -> Dataset:
    made = Dataset()
    for keyword, value in values.items():
        setattr(made, keyword, value)
    return made


# --- pictures and run lengths ---------------------------------------------------------------------------------------


def test_one_mask_is_a_png_and_several_are_a_zip(tmp_path: Path) -> None:
    volume = picture()
    masks = masks_in(volume)
    one = write("png", masks[:1], volume, 0, tmp_path / "new")
    assert one.name == "chest_mask_1_left-lung.png"
    assert np.array_equal(np.asarray(Image.open(one)), masks[0].to_array() * np.uint8(255))
    with zipfile.ZipFile(write("png", masks, volume, 0, tmp_path)) as archive:
        assert archive.namelist() == ["chest_mask_1_left-lung.png", "chest_mask_2.png"]
        assert all(entry.external_attr >> 16 == 0o644 for entry in archive.infolist())
        for name, mask in zip(archive.namelist(), masks, strict=True):
            assert np.array_equal(np.asarray(Image.open(archive.open(name))) == 255, mask.to_array())


def test_masks_keep_the_numbers_of_the_page(tmp_path: Path) -> None:
    volume = shipped("CT_small.dcm")
    masks, shown = masks_in(volume), [False, True]
    assert write("png", masks, volume, 0, tmp_path, shown=shown).name == "CT_small_mask_2.png"
    (told,) = json.loads(write("rle", masks, volume, 0, tmp_path, shown=shown).read_text(encoding="utf-8"))["masks"]
    labels = np.asarray(nibabel.load(write("nifti", masks, volume, 0, tmp_path, shown=shown)).dataobj)
    assert told["number"] == 2 and set(np.unique(labels)) == {0, 2} and (labels > 0).sum() == masks[1].area_px
    (segment,) = pydicom.dcmread(write("dicom-seg", masks, volume, 0, tmp_path, shown=shown)).SegmentSequence
    assert (segment.SegmentNumber, segment.SegmentLabel) == (1, "mask 2")


def test_the_overlay_is_what_the_page_shows(tmp_path: Path) -> None:
    volume = shipped("MR_small.dcm")
    masks, shown, window = masks_in(volume), [True, False], (600.0, 200.0)
    path = write("overlay", masks, volume, 0, tmp_path, shown=shown, opacity=0.7, contour=False, window=window)
    expected = overlay(volume.slice(0, window), masks, shown, 0.7, False)
    assert np.array_equal(np.asarray(Image.open(path)), expected)


def test_run_lengths_tell_everything_about_each_mask(tmp_path: Path) -> None:
    volume = shipped("MR_small.dcm")
    masks = masks_in(volume)
    told = json.loads(write("rle", masks, volume, 0, tmp_path).read_text(encoding="utf-8"))
    assert (told["slice"], told["slices"], told["spacing_mm"]) == (0, 1, [0.3125, 0.3125])
    for stored, mask in zip(told["masks"], masks, strict=True):
        assert np.array_equal(decode_rle(stored["rle"]), mask.to_array())
        assert (stored["label"], stored["score"], stored["size"]) == (mask.label, 0.75, [64, 64])
        assert stored["bbox"] == list(mask.bbox)
        assert stored["area_mm2"] == round(mask.area_px * 0.3125**2, 2)


# --- NIfTI ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 8, 7), (9, 8, 7, 3), (9, 8)])
def test_labels_lie_in_a_volume_where_they_were_drawn(tmp_path: Path, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).random(shape).astype(np.float32)
    source = nibabel.Nifti1Image(values, AFFINE)
    first = opened(source.to_bytes(), "brain.nii")
    for plane in first.planes:
        volume = first.along(plane)
        index = volume.num_slices - 1
        masks = masks_in(volume)
        back = nibabel.load(write("nifti", masks, volume, index, tmp_path))
        assert back.shape == shape[:3]
        assert np.array_equal(back.affine, nibabel.Nifti1Image.from_bytes(source.to_bytes()).affine)
        again = opened(back.to_bytes(), "labels.nii").along(plane)
        expected = np.where(masks[1].to_array(), 2, masks[0].to_array())
        for number in range(volume.num_slices):
            shown = again.slice(number, (1.0, 2.0))[:, :, 0]
            assert np.array_equal(np.rint(shown / 127.5), expected if number == index else np.zeros(volume.size))


def test_a_plain_picture_has_the_identity(tmp_path: Path) -> None:
    volume = picture()
    masks = masks_in(volume, 1)
    back = nibabel.load(write("nifti", masks, volume, 0, tmp_path))
    assert np.array_equal(back.affine, np.eye(4))
    assert np.array_equal(np.asarray(back.dataobj)[:, :, 0].T, masks[0].to_array())
    assert back.header["descrip"].tobytes().startswith(b"MedPLIB: 1 left lung")


def test_labels_of_a_dicom_frame_lie_where_it_lies_in_the_patient(tmp_path: Path) -> None:
    volume, source = shipped("CT_small.dcm"), header("CT_small.dcm")
    masks = masks_in(volume, 1)
    back = nibabel.load(write("nifti", masks, volume, 0, tmp_path))
    assert back.shape == (128, 128, 1)
    assert back.header.get_zooms() == pytest.approx((0.661468, 0.661468, 5.0))
    cosines = np.array(source.ImageOrientationPatient, dtype=float)
    for row, column in np.argwhere(masks[0].to_array())[::50]:
        along = column * cosines[:3] * source.PixelSpacing[1] + row * cosines[3:] * source.PixelSpacing[0]
        left_back_head = np.array(source.ImagePositionPatient, dtype=float) + along
        assert back.affine @ [column, row, 0, 1] == pytest.approx([*(left_back_head * [-1, -1, 1]), 1], abs=1e-3)
        assert back.dataobj[column, row, 0] == 1


# --- DICOM-SEG ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["CT_small.dcm", "MR_small.dcm", "MR_small_RLE.dcm", "examples_palette.dcm", "SC_rgb_rle.dcm"]
)
def test_a_segmentation_refers_to_its_image_and_holds_the_masks(tmp_path: Path, name: str) -> None:
    volume, source = shipped(name), header(name)
    masks = masks_in(volume)
    path = write("dicom-seg", masks, volume, 0, tmp_path)
    segments = highdicom.seg.segread(path)
    for number, mask in enumerate(masks, start=1):
        layers = segments.get_pixels_by_source_instance(
            [source.SOPInstanceUID], segment_numbers=[number], ignore_spatial_locations=True
        )
        assert np.array_equal(layers[0, :, :, 0] > 0, mask.to_array())
    first = segments.get_segment_description(1)
    assert (first.segment_label, first.algorithm_type.name) == ("left lung", "AUTOMATIC")
    assert segments.get_segment_description(2).segment_label == "mask 2"
    assert first.algorithm_identification.name == "MedPLIB"
    for keyword in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID"):
        assert segments.get(keyword, "") == source.get(keyword, "")
    assert segments.SeriesInstanceUID != source.SeriesInstanceUID
    if "ImagePositionPatient" in source:
        place = segments.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0]
        assert place.ImagePositionPatient == source.ImagePositionPatient
        measures = segments.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
        assert measures.PixelSpacing == source.PixelSpacing


@pytest.mark.parametrize("index", [0, 2])
def test_a_frame_of_several_is_referred_to_by_its_number_and_place(tmp_path: Path, index: int) -> None:
    volume, source = enhanced()
    masks = masks_in(volume)
    path = write("dicom-seg", masks, volume, index, tmp_path)
    assert path.name == f"mr_frame_{index + 1}_seg.dcm"
    segments = highdicom.seg.segread(path)
    layers = segments.get_pixels_by_source_frame(source.SOPInstanceUID, [index + 1])
    assert layers.shape == (1, 12, 16, 2)
    for number, mask in enumerate(masks):
        assert np.array_equal(layers[0, :, :, number] > 0, mask.to_array())
    place = segments.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0]
    assert list(place.ImagePositionPatient) == [10 + 3 * index, 20, 30]
    assert "Secret" not in str(segments)


def test_one_frame_with_functional_groups_is_referred_to(tmp_path: Path) -> None:
    volume = shipped("liver_1frame.dcm")  # which does not tell how many frames it has
    (mask,) = masks_in(volume, 1)
    segments = highdicom.seg.segread(write("dicom-seg", [mask], volume, 0, tmp_path))
    layers = segments.get_pixels_by_source_frame(header("liver_1frame.dcm").SOPInstanceUID, [1])
    assert np.array_equal(layers[0, :, :, 0] > 0, mask.to_array())


def test_of_the_patient_only_the_identifier_goes_along(tmp_path: Path) -> None:
    volume = altered(
        "CT_small.dcm",
        PatientName="Secret^Name",
        PatientBirthDate="19700203",
        AccessionNumber="Secret",
        ReferringPhysicianName="Secret^Doctor",
        InstitutionName="Secret",
        StudyDescription="Secret",
        OperatorsName="Secret",
        PatientComments="Secret",
    )
    content = write("dicom-seg", masks_in(volume), volume, 0, tmp_path).read_bytes()
    for secret in (b"Secret", b"19700203"):
        assert secret not in content
    assert str(pydicom.dcmread(io.BytesIO(content)).PatientID) == "1CT1"


def test_labels_that_dicom_does_not_allow_are_shortened_not_refused(tmp_path: Path) -> None:
    volume = shipped("MR_small.dcm")
    mask = masks_in(volume, 1)[0]
    strange = Mask.from_array(mask.to_array(), "Leber\\groß\n" + "é" * 100, 0.5)
    (segment,) = pydicom.dcmread(write("dicom-seg", [strange], volume, 0, tmp_path)).SegmentSequence
    assert segment.SegmentLabel == ("Lebergroß" + "é" * 100)[:64]


def test_what_dicom_seg_cannot_refer_to_is_told_in_a_sentence(tmp_path: Path) -> None:
    film = shipped("examples_ybr_color.dcm")
    cases = {
        "is no DICOM file": picture(),
        "lacks FrameOfReferenceUID": altered("CT_small.dcm", FrameOfReferenceUID=None),
        "lacks SliceThickness": altered("CT_small.dcm", SliceThickness=""),
        "lacks StudyInstanceUID, SeriesInstanceUID": altered(
            "CT_small.dcm", StudyInstanceUID=None, SeriesInstanceUID=None
        ),
        "does not say where each of its frames lies": film,
    }
    for reason, volume in cases.items():
        with pytest.raises(MedPLIBError, match=reason) as raised:
            write("dicom-seg", masks_in(volume), volume, 0, tmp_path)
        assert "\n" not in str(raised.value)
        assert write("rle", masks_in(volume), volume, 0, tmp_path).exists()
    empty = Mask.from_array(np.zeros(film.size, dtype=bool), "liver", 0.1)
    with pytest.raises(MedPLIBError, match="is empty"):
        write("dicom-seg", [empty], film, 0, tmp_path)
    assert "dicom-seg" in kinds(film)
    assert "dicom-seg" not in kinds(picture())


# --- whatever the kind ----------------------------------------------------------------------------------------------


def test_wrong_requests_write_nothing(tmp_path: Path) -> None:
    volume = picture()
    masks, other = masks_in(volume), masks_in(shipped("MR_small.dcm"))
    for reason, arguments in {
        "no mask to download": ("png", [], volume, 0),
        "there is no slice 2": ("png", masks, volume, 1),
        "64×64, the image 30×40": ("nifti", other, volume, 0),
        "downloaded as png": ("docx", masks, volume, 0),
    }.items():
        with pytest.raises(MedPLIBError, match=reason):
            write(*arguments, tmp_path)  # type: ignore[arg-type]
    for kind in ("png", "overlay", "rle"):
        with pytest.raises(MedPLIBError, match="64×64, the image 30×40"):
            write(kind, other, volume, 0, tmp_path)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["../../up.png", "/etc/passwd", "a\\..\\b.png", "..", ".hidden.nii.gz", "\0\n", "x" * 999]
)
def test_file_names_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    stream = io.BytesIO()
    Image.new("L", (9, 9)).save(stream, "PNG")
    volume = opened(stream.getvalue(), name)
    for kind in kinds(volume):
        path = write(kind, masks_in(volume), volume, 0, tmp_path / "in")
        assert path.parent == tmp_path / "in"
        assert path.is_file()
        assert len(path.name) < 120
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert all(not path.name.startswith(".") for path in (tmp_path / "in").iterdir())
