"""Volumes with labels of every layout: read as slices whose masks lie where the structures are."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import highdicom
import nibabel
import numpy as np
import pytest
from highdicom import AlgorithmIdentificationSequence as Algorithm
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, RTStructureSetStorage, generate_uid

from model.data.builders.build import BuildSettings, build_dataset, recognize
from model.data.builders.cases import Case, ReadOptions
from model.data.structures import read_label_nifti, read_rtstruct
from model.data.volumes import grid_of, open_path
from model.data.voxels import TO_RAS, Grid, series_in
from model.errors import MedPLIBError

REAL = Path(os.environ.get("MEDPLIB_REAL", "../shared/real")) / "volumes.tar"
SHAPE = (20, 18, 12)
TILTED = np.array([[0.9, 0.1, 0.2, -9], [-0.1, 1.4, 0.1, -14], [-0.3, -0.1, 3.8, 5], [0, 0, 0, 1.0]])
FLIPPED = np.diag([-1.0, 1.0, -4.0, 1.0])


def ball(centre: tuple[float, ...] = (6, 8, 5), radius: float = 3.4) -> np.ndarray:
    return sum((axis - at) ** 2 for axis, at in zip(np.indices(SHAPE), centre, strict=True)) <= radius**2


def bright(*inside: np.ndarray) -> np.ndarray:
    return (sum(part.astype(np.int16) * 300 for part in inside) - 100).astype(np.int16)


def save(path: Path, values: np.ndarray, affine: np.ndarray = FLIPPED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, affine), path)
    return path


def series(folder: Path, values: np.ndarray, affine: np.ndarray = FLIPPED, patient: str = "Doe") -> list[Dataset]:
    """A CT series of the values [columns, rows, slices], its files in no order."""
    folder.mkdir(parents=True)
    lps, study, uid, frame = TO_RAS @ affine, generate_uid(), generate_uid(), generate_uid()
    lengths = np.linalg.norm(lps[:3, :3], axis=0)
    saved = []
    for index in range(values.shape[2]):
        data = Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = CTImageStorage
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
        data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = study, uid, frame
        data.Modality, data.PatientID, data.PatientName = "CT", patient, f"{patient}^"
        data.PatientBirthDate = data.PatientSex = data.StudyDate = data.StudyTime = data.AccessionNumber = ""
        data.StudyID, data.SeriesNumber, data.InstanceNumber = "1", 1, index + 1
        data.Columns, data.Rows = values.shape[:2]
        data.ImagePositionPatient = [float(mm) for mm in (lps @ [0, 0, index, 1])[:3]]
        data.ImageOrientationPatient = [float(part) for axis in (0, 1) for part in lps[:3, axis] / lengths[axis]]
        data.PixelSpacing, data.SliceThickness = [lengths[1], lengths[0]], lengths[2]
        data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
        data.BitsAllocated = data.BitsStored = 16
        data.HighBit, data.RescaleSlope, data.RescaleIntercept = 15, 1, -1024
        data.PixelData = (values[:, :, index].T + 1024).astype("<u2").tobytes()
        data.save_as(folder / f"{(index * 7) % 12:02d}.dcm", enforce_file_format=True)
        saved.append(data)
    return saved


def segmentation(path: Path, images: list[Dataset], masks: dict[str, np.ndarray], kind: str = "BINARY") -> None:
    by = Algorithm("a", codes.DCM.ArtificialIntelligence, "1")
    describe = [
        highdicom.seg.SegmentDescription(number, name, codes.SCT.Organ, codes.SCT.Organ, "AUTOMATIC", by)
        for number, name in enumerate(masks, start=1)
    ]
    pixels = np.stack([mask.transpose(2, 1, 0) for mask in masks.values()], axis=-1)
    dtype = np.float32 if kind == "FRACTIONAL" else np.uint8
    highdicom.seg.Segmentation(
        images, pixels.astype(dtype), kind, describe, generate_uid(), 2, generate_uid(), 1, "m", "m", "1", "1"
    ).save_as(path)


def contours(
    path: Path, images: list[Dataset], regions: dict[str, list[tuple[int, list[tuple[float, float]]]]]
) -> None:
    """An RTSTRUCT of polygons (slice, [(column, row)])."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = RTStructureSetStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
    data.Modality, data.SeriesInstanceUID = "RTSTRUCT", generate_uid()
    of_series, study, frame = Dataset(), Dataset(), Dataset()
    of_series.SeriesInstanceUID = images[0].SeriesInstanceUID
    study.RTReferencedSeriesSequence, frame.RTReferencedStudySequence = [of_series], [study]
    data.ReferencedFrameOfReferenceSequence = [frame]
    data.StructureSetROISequence, data.ROIContourSequence = [], []
    for number, (name, polygons) in enumerate(regions.items(), start=1):
        roi, drawn = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName, drawn.ReferencedROINumber, drawn.ContourSequence = number, name, number, []
        for index, points in polygons:
            image, contour = images[index], Dataset()
            across, down = np.array(image.ImageOrientationPatient, dtype=float).reshape(2, 3)
            row, column = image.PixelSpacing
            mm = [np.array(image.ImagePositionPatient, float) + x * column * across + y * row * down for x, y in points]
            contour.ContourGeometricType, contour.NumberOfContourPoints = "CLOSED_PLANAR", len(points)
            contour.ContourData = [f"{value:.6f}" for point in mm for value in point]
            drawn.ContourSequence.append(contour)
        data.StructureSetROISequence.append(roi)
        data.ROIContourSequence.append(drawn)
    data.save_as(path, enforce_file_format=True)


def listed(root: Path, **options: Any) -> tuple[Any, list[Case]]:
    source = recognize(root, ReadOptions(**options))
    return source, [pickle.loads(pickle.dumps(case)) for case in source.cases()]


def agree(cases: list[Case], name: str, level: int = 128) -> int:
    """Voxels of a structure, after comparing its masks with where the slices are bright."""
    count = 0
    for case in cases:
        assert callable(case.image)
        shown = case.image().pixels[:, :, 0] > level
        masks = [target.read() for target in case.targets if target.name == name]
        assert (name in case.absent) == (not masks)
        assert np.array_equal(masks[0] if masks else np.zeros(shown.shape, bool), shown), case.key
        count += int(shown.sum())
    return count


@pytest.mark.parametrize("plane", ["acquired", "axial", "coronal", "sagittal"])
@pytest.mark.parametrize("affine", [FLIPPED, TILTED], ids=["flipped", "tilted"])
def test_nnunet_masks_lie_on_what_they_label(tmp_path: Path, affine: np.ndarray, plane: str) -> None:
    save(tmp_path / "imagesTr" / "a_0000.nii.gz", bright(ball()), affine)
    save(tmp_path / "labelsTr" / "a.nii.gz", ball().astype(np.uint8), affine)
    save(tmp_path / "imagesTs" / "b_0000.nii.gz", bright(ball((9, 9, 9))), affine)
    save(tmp_path / "labelsTs" / "b.nii.gz", ball((9, 9, 9)).astype(np.uint8), affine)
    info = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "Big_Tumor": 1}, "file_ending": ".nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps(info))
    source, cases = listed(tmp_path, plane=plane)
    assert (source.kind, source.problems) == ("nnunet", [])
    assert "nnU-Net: 2 CT volumes, labels big tumor" in source.summary
    assert "−160 to 240 HU for CT" in source.summary
    assert agree(cases, "big tumor") == int(ball().sum() + ball((9, 9, 9)).sum())
    assert {(case.patient, case.split, case.modality) for case in cases} == {("a", None, "ct"), ("b", "test", "ct")}
    first = cases[0]
    assert first.plane == ("axial" if plane == "acquired" else plane)
    assert first.spacing_mm == pytest.approx(
        open_path(tmp_path / "imagesTr" / "a_0000.nii.gz").along(first.plane).spacing_mm
    )
    free = [case for case in cases if not case.targets]
    assert 0 < len(free) <= len(cases) / 2


def test_nnunet_regions_channels_and_lone_files(tmp_path: Path) -> None:
    inner, outer = ball(radius=2), ball()
    for channel in (0, 1):
        save(tmp_path / "imagesTr" / f"a_000{channel}.nii.gz", bright(outer, inner))
    save(tmp_path / "labelsTr" / "a.nii.gz", outer.astype(np.float32) + inner)
    save(tmp_path / "labelsTr" / "c.nii.gz", outer.astype(np.uint8))
    labels = {"background": 0, "whole tumor": [1, 2], "core": 2, "never": 3}
    (tmp_path / "dataset.json").write_text(json.dumps({"channel_names": {"0": "T1", "1": "FLAIR"}, "labels": labels}))
    source, cases = listed(tmp_path)
    assert {problem.kind for problem in source.problems} == {"channels", "no_image"}
    sizes = {name: sum(int(target.read().sum()) for case in cases for target in case.targets if target.name == name)
             for name in labels}  # fmt: skip
    assert sizes == {"background": 0, "whole tumor": outer.sum(), "core": inner.sum(), "never": 0}
    assert all("never" in case.absent for case in cases)
    assert {case.modality for case in cases} == {"mr"}


def test_msd_takes_the_first_channel(tmp_path: Path) -> None:
    save(tmp_path / "imagesTr" / "x_1.nii.gz", np.stack([bright(ball())] * 2, axis=3))
    save(tmp_path / "labelsTr" / "x_1.nii.gz", ball().astype(np.uint8))
    info = {"modality": {"0": "FLAIR", "1": "T1w"}, "labels": {"0": "background", "1": "edema"}}
    (tmp_path / "dataset.json").write_text(json.dumps(info))
    source, cases = listed(tmp_path, every=2)
    assert (source.kind, [problem.kind for problem in source.problems]) == ("msd", ["channels"])
    assert {case.slice_index % 2 for case in cases if case.slice_index is not None} == {0}
    assert agree(cases, "edema") > 0


def test_label_values_without_names_are_classes(tmp_path: Path) -> None:
    both = ball().astype(np.uint8) + ball(radius=2).astype(np.uint8)
    save(tmp_path / "images" / "x_t1.nii.gz", bright(ball()))
    save(tmp_path / "labels" / "x.nii.gz", both)
    (tmp_path / "LICENSE").write_text("CC BY 4.0\n")
    source, cases = listed(tmp_path)
    assert {target.name for case in cases for target in case.targets} == {"class 1", "class 2"}
    assert "legend_missing" in [problem.kind for problem in source.problems]
    assert source.terms == "CC BY 4.0"


def test_flat_nnunet_pictures_stay_where_they_are(tmp_path: Path) -> None:
    from PIL import Image

    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (9, 8)).save(tmp_path / "imagesTr" / "a_0000.png")
    labels = np.zeros((8, 9), np.uint8)
    labels[2:4] = 1
    Image.fromarray(labels).save(tmp_path / "labelsTr" / "a.png")
    info = {"channel_names": {"0": "R", "1": "G", "2": "B"}, "labels": {"background": 0, "cell": 1}}
    (tmp_path / "dataset.json").write_text(json.dumps(info))
    _, (case,) = listed(tmp_path, modality="endoscopy")
    assert case.image == tmp_path / "imagesTr" / "a_0000.png"
    assert np.array_equal(case.targets[0].read(), labels == 1)  # type: ignore[arg-type]


def test_folders_pair_labels_by_name(tmp_path: Path) -> None:
    other = ball((13, 10, 7))
    save(tmp_path / "images" / "p1.nii.gz", bright(ball()))
    save(tmp_path / "labels" / "p1.nii.gz", ball().astype(np.uint8) * 255)
    save(tmp_path / "s2" / "ct.nii.gz", bright(other))
    save(tmp_path / "s2" / "segmentations" / "liver.nii.gz", other.astype(np.uint8))
    for channel in ("t1", "flair"):
        save(tmp_path / "s3" / f"s3_{channel}.nii.gz", bright(other))
    save(tmp_path / "s3" / "s3_seg.nii.gz", other.astype(np.uint8))
    save(tmp_path / "s4_image.nii.gz", bright(other))
    save(tmp_path / "labels" / "nobody.nii.gz", other.astype(np.uint8))
    save(tmp_path / "four.nii.gz", np.stack([bright(other)] * 2, axis=3))
    source, cases = listed(tmp_path, target="spleen", window=(-100, 200))
    found = {(case.volume, case.patient): {target.name for target in case.targets} for case in cases if case.targets}
    assert found == {("p1", "p1"): {"spleen"}, ("ct", "s2"): {"spleen"}, ("s3_t1", "s3_s3"): {"spleen"},
                     ("s3_flair", "s3_s3"): {"spleen"}}  # fmt: skip
    assert agree(cases, "spleen") > 0
    assert {problem.kind for problem in source.problems} == {
        "value_255",
        "no_modality",
        "no_labels",
        "no_image",
        "unreadable",
    }
    names = {target.name for case in listed(tmp_path)[1] for target in case.targets}
    assert names == {"liver"}  # the others are not named by anything


def test_labels_of_another_grid_are_resampled_or_refused(tmp_path: Path) -> None:
    grid = Grid(SHAPE, FLIPPED)
    shifted = FLIPPED.copy()
    shifted[:3, 3] = [-2.0, 0, 0]
    fine = FLIPPED @ np.diag([0.5, 0.5, 0.5, 1])
    fine[:3, 3] = -0.25 * np.array([-1, 1, -4.0])
    names = {"a": (1,)}
    same = read_label_nifti(
        save(tmp_path / "same.nii.gz", ball()[::-1].astype(np.uint8), TILTED), Grid(SHAPE, TILTED), names
    )
    assert not same.notes
    turned = nibabel.Nifti1Image(ball().astype(np.uint8), FLIPPED).as_reoriented(np.array([[1, -1], [0, 1], [2, -1]]))
    nibabel.save(turned, tmp_path / "turned.nii.gz")
    assert read_label_nifti(tmp_path / "turned.nii.gz", grid, names).structures["a"].inside.sum() == ball().sum()
    crop = read_label_nifti(save(tmp_path / "crop.nii.gz", ball()[2:].astype(np.uint8), shifted), grid, names)
    assert [kind for kind, *_ in crop.notes] == ["other_grid"]
    assert crop.structures["a"].inside.sum() == ball().sum()
    doubled = ball().repeat(2, 0).repeat(2, 1).repeat(2, 2).astype(np.uint8)
    fitted = read_label_nifti(save(tmp_path / "fine.nii.gz", doubled, fine), grid, names)
    assert fitted.structures["a"].inside.sum() == ball().sum()
    far = FLIPPED.copy()
    far[0, 3] = 500
    for affine, values in ((far, ball()), (FLIPPED, ball()[:, :, :9])):
        with pytest.raises(MedPLIBError, match=r"outside of the image|begin where"):
            read_label_nifti(save(tmp_path / "off.nii.gz", values.astype(np.uint8), affine), grid, names)
    with pytest.raises(MedPLIBError, match="fractions"):
        read_label_nifti(save(tmp_path / "half.nii.gz", ball() * 2.5), grid, {"a": (1,), "b": (2,)})


@pytest.mark.parametrize("affine", [FLIPPED, TILTED[:, [1, 2, 0, 3]]], ids=["flipped", "tilted"])
@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL", "nifti"])
def test_series_with_segmentation_or_nifti(tmp_path: Path, kind: str, affine: np.ndarray) -> None:
    turn = affine.copy()
    turn[:3, 1] -= turn[:3, 0] * (turn[:3, 0] @ turn[:3, 1]) / (turn[:3, 0] @ turn[:3, 0])  # pixels are rectangles
    normal = np.cross(turn[:3, 0], turn[:3, 1])
    turn[:3, 2] = normal / np.linalg.norm(normal) * 4
    images = series(tmp_path / "scan", bright(ball()), turn)
    if kind == "nifti":
        save(tmp_path / "Liver.nii.gz", ball().astype(np.uint8), turn)
    else:
        segmentation(tmp_path / "seg.dcm", images, {"Liver": ball(), "Spleen": ball((13, 10, 7))}, kind)
    source, cases = listed(tmp_path)
    assert source.problems == []
    assert agree(cases, "liver") == ball().sum()
    assert {case.modality for case in cases} == {"ct"}
    assert "Doe" not in str(cases)
    assert (kind == "nifti") or any(target.name == "spleen" for case in cases for target in case.targets)


def test_contours_are_filled_with_their_holes(tmp_path: Path) -> None:
    inside = np.zeros(SHAPE, bool)
    inside[3:13, 4:15, 4:7] = True
    inside[6:9, 7:10, 5] = False
    images = series(tmp_path / "scan", bright(inside))
    outer, hole = ([(x0 - 0.4, y0 - 0.4), (x1 - 0.6, y0 - 0.4), (x1 - 0.6, y1 - 0.6), (x0 - 0.4, y1 - 0.6)]
                   for x0, y0, x1, y1 in ((3, 4, 13, 15), (6, 7, 9, 10)))  # fmt: skip
    contours(tmp_path / "rs.dcm", images, {"GTV_Mass": [(4, outer), (5, outer), (5, hole), (6, outer)]})
    source, cases = listed(tmp_path)
    assert source.problems == []
    assert agree(cases, "GTV mass") == inside.sum()


def test_series_that_make_no_volume_are_reported(tmp_path: Path) -> None:
    images = series(tmp_path / "scan", bright(ball()))
    segmentation(tmp_path / "seg.dcm", images, {"Liver": ball()})
    (tmp_path / "scan" / "02.dcm").unlink()
    source, cases = listed(tmp_path)
    assert cases == []
    assert "4 to 8 mm apart" in source.problems[0].message
    shutil.copy(tmp_path / "scan" / "00.dcm", tmp_path / "scan" / "again.dcm")
    series_in.cache_clear()
    source, cases = listed(tmp_path)
    assert cases == []
    assert "at one place" in source.problems[0].message


def test_volumes_of_a_table_are_built(tmp_path: Path) -> None:
    rows = ["image,mask,target,modality,patient,split"]
    for number, split in enumerate(("train", "train", "test")):
        save(tmp_path / "in" / f"v{number}.nii.gz", bright(ball()))
        save(tmp_path / "in" / f"m{number}.nii.gz", ball().astype(np.uint8) + ball(radius=2))
        rows.append(f"v{number}.nii.gz,m{number}.nii.gz,1=cyst;2=core,MR_T1,q{number},{split}")
    (tmp_path / "in" / "volumes.csv").write_text("\n".join([*rows, "gone.nii.gz,m0.nii.gz,cyst,MR,q9,train"]))
    made = build_dataset(tmp_path / "in", tmp_path / "out", BuildSettings())
    assert (made["kind"], made["modalities"], made["problems"]) == ("volume_table", ["mr"], {"missing": 1})
    assert set(made["targets"]) == {"cyst", "core"}
    record = json.loads((tmp_path / "out" / made["splits"]["test"][0]).read_text())[0]
    assert (record["volume"], record["plane"], record["spacing"], record["patient"]) == (
        "v2",
        "axial",
        [1.0, 1.0],
        "q2",
    )


@pytest.mark.skipif(not REAL.is_file(), reason=f"{REAL} is not there; set MEDPLIB_REAL to the folder of real sets")
def test_real_contours_agree_with_the_sets_own_masks(tmp_path: Path) -> None:
    with tarfile.open(REAL) as tar:
        for member in tar:
            if "dicom_STS_002/MR_T1" in member.name or "dicom_STS_002/PET" in member.name or "STS_002_" in member.name:
                tar.extract(member, tmp_path)
    sts = tmp_path / "volumes" / "sts"
    for modality, voxels in (("PET", 555), ("MR_T1", 17090)):
        folder = sts / "dicom_STS_002" / modality
        grid, _ = grid_of(folder / "image")
        (drawn,) = read_rtstruct(folder / "mask" / "RS.dcm", grid).structures.values()
        told = read_label_nifti(sts / "volumes" / f"STS_002_{modality}_mask.nii.gz", grid, {}, "a").structures["a"]
        assert drawn.corner == told.corner
        assert np.array_equal(drawn.inside, told.inside)  # Dice 1
        assert drawn.inside.sum() == voxels
