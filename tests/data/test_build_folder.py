from __future__ import annotations

import json
import os
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from model.data.builders.folder import FolderSettings, case_of, splits_of_cases
from model.data.builders.folder_names import read_names
from model.data.builders.folder_questions import unrelated
from model.data.builders.vetting import path_from
from model.data.image_io import read_labels
from model.errors import MedPLIBError
from tests.data.built import build, findings, refused, said, trains
from tests.data.native_samples import mask, picture
from tests.data.test_image_io import dicom

ONE = ("--splits", "train=1")


class Own:
    """A user's folder: images, masks and the CSV."""

    def __init__(self, root: Path) -> None:
        self.root, self.images, self.masks, self.csv, self.out = (
            root,
            root / "img",
            root / "seg",
            root / "n.csv",
            root / "out",
        )
        self.images.mkdir()
        self.masks.mkdir()

    def names(self, text: str, encoding: str = "utf-8") -> None:
        self.csv.write_text(text, encoding=encoding)

    def image(self, name: str) -> None:
        picture(self.images / name, len(name))

    def words(self, *more: object) -> tuple[object, ...]:
        return ("folder", "--images", self.images, "--masks", self.masks, "--names", self.csv, "--out", self.out, *more)

    def built(self, *more: object, split: str = "train") -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Grounding and region records of a split, all of them trained on."""
        assert build(*self.words(*more)) == 0
        grounding, region = (trains(self.out / split / f"{task}.json", self.out) for task in ("grounding", "region"))
        return grounding, region

    def kinds(self) -> list[str]:
        return sorted({row["kind"] for row in findings(self.out, "folder")})


@pytest.fixture
def own(tmp_path: Path) -> Own:
    return Own(tmp_path)


def masked(record: dict[str, Any], own: Own) -> int:
    """Foreground pixels of the mask of a grounding record."""
    path = said(record)[1].split("<mask>")[1].removesuffix("</mask>")
    return int((cv2.imread(str(own.out / path), cv2.IMREAD_UNCHANGED) > 0).sum())


def test_classes_in_file_names_and_folders(own: Own) -> None:
    own.names("class;name\n3;left lung\nLiver;the large, brown liver\n", encoding="utf-8-sig")
    own.image("a.png")
    own.image("B.PNG")
    mask(own.masks / "a--0003_000.png")
    mask(own.masks / "a--0003_001.png", (12, 14, 15, 18))
    mask(own.masks / "a_liver.png")
    mask(own.masks / "LIVER" / "B.PNG")
    grounding, region = own.built("--modality", "CT", *ONE)
    assert sorted(record["about"] for record in grounding) == ["left lung", *["the large, brown liver"] * 2]
    lung = next(record for record in grounding if record["about"] == "left lung")
    assert masked(lung, own) == 6 * 8 + 3 * 4
    assert lung["image"] == "../img/a.png"
    assert {record["modality"] for record in grounding + region} == {"ct"}
    names = [record for record in region if record["kind"] == "region_name"]
    assert {said(record)[1] for record in names} == {"Left lung", "The large, brown liver"}
    assert {record["answer_type"] for record in region if record["kind"] == "region_check"} == {"closed"}


def test_label_maps_hold_a_class_in_each_value(own: Own) -> None:
    own.names("value,name\n0,background\n1,liver\n2,spleen, enlarged\n7,kidney\n")
    labels = np.zeros((20, 24), np.uint8)
    labels[2:5, 2:6], labels[8:10, 8:12], labels[15:18, 3:6] = 1, 2, 9
    for name in ("plain", "palette", "grey"):
        own.image(f"{name}.png")
    Image.fromarray(labels).save(own.masks / "plain_mask.png")
    indexed = Image.fromarray(labels, mode="P")
    indexed.putpalette([0, 0, 0, 255, 0, 0, 0, 0, 0, 0, 0, 255] + [9] * 100)
    indexed.save(own.masks / "palette.png")
    Image.fromarray(np.repeat(labels[..., None], 3, axis=2)).save(own.masks / "grey.png")
    grounding, _ = own.built(*ONE)
    assert sorted((record["about"], masked(record, own)) for record in grounding) == [
        *[("liver", 12)] * 3,
        *[("spleen, enlarged", 8)] * 3,
    ]
    assert own.kinds() == ["value_without_name"]


@pytest.mark.parametrize(
    ("present", "absent", "clear"),
    [
        ("liver", "spleen", True),
        ("liver", "liver tumour", True),
        ("kidneys", "kidney tumor", True),
        ("liver tumour", "liver", False),
        ("left lung", "Lungs", False),
        ("lung", "left lung", False),
        ("left lung", "right lung", True),
        ("liver_tumour", "tumour-liver", False),
    ],
)
def test_a_name_inside_another_is_told_from_it(present: str, absent: str, clear: bool) -> None:
    assert unrelated([absent], ["heart", present]) == (([absent], []) if clear else ([], [(absent, present)]))


def test_what_is_absent_can_be_asked_for(own: Own) -> None:
    own.names("value,name\n1,liver\n2,liver tumour\n3,left liver\n")
    labels = np.zeros((20, 24), np.uint8)
    labels[2:5, 2:6] = 1
    for name, map_ in (("a", labels), ("b", 2 * labels), ("c", 3 * labels)):
        own.image(f"{name}.png")
        Image.fromarray(map_).save(own.masks / f"{name}.png")
    grounding, region = own.built("--absent", *ONE)
    asked = {(record["image"][-5], record["about"], record["kind"]) for record in grounding}
    assert asked == {
        ("a", "liver", "grounding"),
        ("a", "liver tumour", "grounding_absent"),
        ("b", "liver tumour", "grounding"),
        ("b", "left liver", "grounding_absent"),
        ("c", "left liver", "grounding"),
        ("c", "liver tumour", "grounding_absent"),
    }
    assert all("<SEG>" not in said(record)[1] for record in grounding if record["kind"] == "grounding_absent")
    checks = {record["image"][-5] for record in region if record["kind"] == "region_check"}
    listed = [row["message"] for row in findings(own.out, "folder") if row["kind"] == "ambiguous_name"]
    messages = [message.split(": ", 1)[1] for message in listed]
    assert checks == {"a", "b", "c"}
    assert "grounding_absent does not ask for left liver, which may mean liver too" in messages
    assert "region_check of liver tumour does not ask for liver, which may mean liver tumour too" in messages


def test_patients_stay_in_one_split_and_are_counted(own: Own, capsys: pytest.CaptureFixture[str]) -> None:
    own.names("class,name\nlesion,lesion\n")
    for case in range(8):
        for view in ("L_CC", "L_MLO", "R_CC", "R_MLO"):
            own.image(f"patient{case:02d}_{view}.png")
            mask(own.masks / "lesion" / f"patient{case:02d}_{view}.png")
    assert build(*own.words("--splits", "train=0.5,validation=0.25,test=0.25")) == 0
    assert "cases: train 4, test 2, validation 2" in capsys.readouterr().out
    splits: dict[str, set[str]] = {}
    for split in ("train", "validation", "test"):
        for record in trains(own.out / split / "grounding.json", own.out):
            splits.setdefault(record["image"][7:16], set()).add(split)
    assert len(splits) == 8 and all(len(found) == 1 for found in splits.values())
    assert not (own.out / "findings_folder.jsonl").exists()


def test_images_without_cases_are_warned_about(own: Own, capsys: pytest.CaptureFixture[str]) -> None:
    own.names("class,name\nliver,liver\n")
    for name in ("anna", "bert", "carl"):
        own.image(f"{name}.png")
        mask(own.masks / "liver" / f"{name}.png")
    assert build(*own.words()) == 0
    printed = capsys.readouterr().out
    assert "3 images are 3 cases and each image is a case of its own" in printed and "--case-pattern" in printed
    assert own.kinds() == ["cases_in_doubt"]


def test_files_may_have_names_of_their_own(own: Own) -> None:
    own.names("name\tfile\nliver\tscan 1_x.png\nkidney\tsub/scan 2-b.tif\n")
    own.image("scan 1.jpg")
    own.image("sub/scan 2.png")
    mask(own.masks / "scan 1_x.png")
    mask(own.masks / "sub" / "scan 2-b.tif")
    grounding, _ = own.built(*ONE)
    assert sorted((record["image"], record["about"]) for record in grounding) == [
        ("../img/scan 1.jpg", "liver"),
        ("../img/sub/scan 2.png", "kidney"),
    ]


def test_dicom_images_need_no_suffix(own: Own) -> None:
    own.names("class,name\nliver,liver\n")
    for name in ("1.2.840.1", "1.2.840.2"):
        (own.images / name).write_bytes(dicom(np.arange(480, dtype=np.int16).reshape(20, 24)))
        mask(own.masks / "liver" / f"{name}.png")
    grounding, _ = own.built(*ONE)
    assert [record["image"] for record in grounding] == ["../img/1.2.840.1", "../img/1.2.840.2"]


def test_what_does_not_fit_is_listed(own: Own) -> None:
    own.names("class,name\nliver,liver\nspleen,spleen\n")
    for name in ("a.png", "b.png", "c.png", "d.png", "x/e.png", "y/e.png", "alone.png"):
        own.image(name)
    (own.images / "broken.png").write_bytes(b"\x89PNG nothing")
    (own.images / "read me.txt").write_text("hello")
    (own.images / ".hidden").write_text("hello")
    mask(own.masks / "a_liver.png")
    mask(own.masks / "b_liver.png", size=(9, 9))
    mask(own.masks / "c_liver.png", (0, 0, 0, 0))
    mask(own.masks / "broken_liver.png")
    mask(own.masks / "d_heart.png")
    mask(own.masks / "nowhere_liver.png")
    mask(own.masks / "e_liver.png")
    grounding, _ = own.built(*ONE)
    assert len(grounding) == 1
    assert own.kinds() == [
        "empty_mask",
        "image_without_mask",
        "mask_without_image",
        "mask_without_name",
        "not_an_image",
        "size_mismatch",
        "unreadable_image",
        "unused_name",
    ]
    messages = {row["message"] for row in findings(own.out, "folder")}
    assert any(text.endswith("e_liver.png: several images are named e") for text in messages)


def test_no_case_is_in_two_splits(own: Own) -> None:
    own.names("class,name\nliver,liver\n")
    for case in range(6):
        for number in range(3):
            own.image(f"patient{case}_{number:03d}.png")
            mask(own.masks / f"patient{case}_{number:03d}_liver.png")
    assert build(*own.words("--splits", "train=0.6,validation=0.2,test=0.2")) == 0
    cases: dict[str, str] = {}
    for split in ("train", "validation", "test"):
        for record in trains(own.out / split / "grounding.json", own.out):
            case = record["image"].split("_")[0]
            assert cases.setdefault(case, split) == split
    assert len(cases) == 6
    report = json.loads((own.out / "report_folder.json").read_text())
    assert sum(report["counts"]["images"].values()) == 18


def test_results_inside_the_images_are_no_images(own: Own) -> None:
    own.names("class,name\nliver,liver\n")
    own.image("a.png")
    mask(own.masks / "a_liver.png")
    own.out = own.images / "out"
    first = own.built(*ONE)
    assert own.built(*ONE, "--overwrite") == first
    assert len(first[0]) == 1
    assert first[0][0]["image"] == "../a.png"


def test_links_lead_to_no_picture_twice(own: Own) -> None:
    own.names("class,name\nliver,liver\n")
    (own.images / "b").mkdir()
    own.image("b/a.png")
    mask(own.masks / "a_liver.png")
    for name, target in (("a", "b"), ("b/loop", "."), ("b/up", "..")):
        (own.images / name).symlink_to(target)
    grounding, _ = own.built(*ONE)
    assert [record["image"] for record in grounding] == ["../img/b/a.png"]


@pytest.mark.parametrize(
    ("count", "shares", "expected"),
    [
        (60, (0.6, 0.1, 0.3), (36, 6, 18)),
        (10, (0.8, 0.1, 0.1), (8, 1, 1)),
        (4, (0.8, 0.1, 0.1), (2, 1, 1)),
        (2, (0.8, 0.1, 0.1), (1, 1, 0)),
        (7, (0.7, 0.15, 0.15), (5, 1, 1)),
        (8, (0.01, 0.01, 0.98), (1, 1, 6)),
    ],
)
def test_few_cases_get_exact_shares(count: int, shares: tuple[float, ...], expected: tuple[int, ...]) -> None:
    names = ("train", "validation", "test")
    cases = {f"p{number}": f"p{number}" for number in range(count)}
    draws = set()
    for seed in range(5):
        settings = FolderSettings(seed=seed, splits=dict(zip(names, shares, strict=True)))
        found = splits_of_cases(cases, settings)
        assert tuple(list(found.values()).count(name) for name in names) == expected
        assert found == splits_of_cases(cases, settings)
        draws.add(tuple(found.values()))
    assert len(draws) > 1 or count < 4


def test_many_cases_are_drawn_each_by_its_own_name() -> None:
    cases = {f"p{number}": f"p{number}" for number in range(2000)}
    found = splits_of_cases(cases, FolderSettings())
    more = splits_of_cases({**cases, "x": "x"}, FolderSettings())
    assert {key: more[key] for key in cases} == found
    assert abs(list(found.values()).count("test") - 200) < 60


@pytest.mark.parametrize(
    ("keys", "case"),
    [
        ("patient12_slice003 set2/patient12_slice004 Patient_12", "patient12"),
        ("patient02_L_CC patient02_R_MLO", "patient02"),
        ("P12-left-1 P12-right-1 mri/P12/axial/3", "p12"),
        ("case_03_slice_014 case_03_tumor_1", "case03"),
        ("Mass_P_00001_LEFT_CC Calc_P_00001_RIGHT_MLO_1", "p00001"),
        ("patient00001/study1/view1_frontal patient00001/study2/view1", "patient00001"),
        ("sub-01/ses-02/sub-01_ses-02_T1w", "sub01"),
        ("case01/007 case01/axial case01/axial_7 case01/t2/slice_7", "case01"),
        ("IM-0001-0002 IM-0001-0003", "IM-0001-"),
        ("0012_L_CC 0012-right.mlo", "0012"),
        ("BraTS_001_flair BraTS_001_t1ce", "BraTS_001"),
        ("00000001_000 00000001_001", "00000001_"),
        ("Smith_John_2021-01-10 Smith_John_20210211 Smith_John_11.03.2021_2", "Smith_John"),
        ("0012_2021-01-10_1 0012_2021-02-10_7", "0012"),
        ("IMG_20210110_1 IMG_20210110_2", "IMG_20210110_"),
        ("012/axial/7 012/L_CC", "012"),
        ("img001", "img001"),
        ("scan", "scan"),
        ("a/img7 b", "a/img7 b"),
    ],
)
def test_the_case_of_an_image(keys: str, case: str) -> None:
    listed = [keys] if " b" in keys else keys.split()
    assert {case_of(key) for key in listed} == {case}


def test_a_split_without_a_usable_mask_is_named(own: Own, capsys: pytest.CaptureFixture[str]) -> None:
    own.names("value,name\n255,liver\n")
    for number in range(4):
        own.image(f"p{number}.png")
        mask(own.masks / f"p{number}.png") if number else (own.masks / "p0.png").write_text("no picture")
    assert build(*own.words("--splits", "train=0.75,test=0.25", "--seed", "2")) == 0  # p0 is all of test
    assert "test has no record" in capsys.readouterr().err


def test_wrong_input_is_told_in_a_sentence(own: Own, capsys: pytest.CaptureFixture[str]) -> None:
    own.image("a.png")
    mask(own.masks / "b_liver.png")
    words = own.words()
    assert "cannot read" in refused(capsys, *words)
    own.names("class,name\nliver,liver\n")
    assert "b_liver.png: no image has its name or the beginning of it" in refused(capsys, *words)
    mask(own.masks / "a_liver.png")
    assert "is no regular expression" in refused(capsys, *words, "--case-pattern", "(")
    assert "'(\\\\d+)' is not found in 'a'" in refused(capsys, *words, "--case-pattern", r"(\d+)")
    assert "--splits sums to 0.5" in refused(capsys, *words, "--splits", "train=0.5")
    same = ("folder", "--images", own.images, "--masks", own.images, "--names", own.csv, "--out", own.out)
    assert "put the masks into a folder of their own" in refused(capsys, *same)
    assert not own.out.exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty; expected a first line file,name"),
        (b"colour,name\n1,liver\n", "begins with 'colour,name'; expected a first line file,name"),
        (b"value,name\none,liver\n", "line 2: the value 'one' is not a whole number"),
        (b"value,name\n1,liver\n1,spleen\n", "line 3: 1 is 'spleen' here, 'liver' above"),
        (b"value,name\n1,<SEG>\n", "line 2: the name '<SEG>' is empty or holds < or >"),
        (b"value,name\n1\n", "line 2: 1 fields, expected 2"),
        (b"value,name\n", "names nothing"),
        ("class,name\nrein,Nièré\n".encode("utf-16"), "is not UTF-8 text"),
    ],
)
def test_names_that_cannot_be_read(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "n.csv").write_bytes(content)
    with pytest.raises(MedPLIBError, match=r"n\.csv") as error:
        read_names(tmp_path / "n.csv")
    assert told in str(error.value)


def test_colours_are_no_labels(tmp_path: Path) -> None:
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(tmp_path / "c.png")
    with pytest.raises(MedPLIBError, match="holds colours or fractions"):
        read_labels(tmp_path / "c.png")
    Image.fromarray(np.full((4, 4), 300, dtype=np.uint16)).save(tmp_path / "w.png")
    assert read_labels(tmp_path / "w.png").max() == 300


def test_paths_lead_out_of_where_links_point_to(tmp_path: Path) -> None:
    (tmp_path / "big" / "disk").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "big" / "disk")
    picture(tmp_path / "img" / "a.png")
    path = path_from(tmp_path / "out", tmp_path / "img" / "a.png")
    assert (tmp_path / "out" / path).is_file()
    assert path_from(tmp_path / "img", tmp_path / "img" / "a.png") == "a.png"


def test_accents_may_be_written_in_two_ways(own: Own) -> None:
    whole, apart = (unicodedata.normalize(form, "Bäuch_é") for form in ("NFC", "NFD"))
    own.names("class,name\n" + unicodedata.normalize("NFD", "séreux") + ",liver\n")
    own.image(f"{whole}.png")
    own.image(f"2{apart}.png")
    mask(own.masks / f"{apart}_séreux.png")
    mask(own.masks / f"2{whole}_{unicodedata.normalize('NFD', 'séreux')}.png")
    grounding, _ = own.built(*ONE)
    assert len(grounding) == 2


@pytest.mark.parametrize("name", ["a_liver_mask", "a_mask_liver", "a-seg-liver", "a_liver_1_seg", "a.Liver.GT"])
def test_words_for_mask_may_stand_around_the_class(own: Own, name: str) -> None:
    own.names("class,name\nliver,liver\n")
    own.image("a.png")
    mask(own.masks / f"{name}.png")
    grounding, _ = own.built(*ONE)
    assert [record["about"] for record in grounding] == ["liver"]


def test_a_table_may_list_files_with_the_folders_before_them(own: Own) -> None:
    own.names(f"image;mask;label\rimg/a.png;seg\\a_1.png;liver\rimg/b.png;{own.masks}/b_1.png;spleen\r")
    for name in "ab":
        own.image(f"{name}.png")
        mask(own.masks / f"{name}_1.png")
    grounding, _ = own.built(*ONE)
    assert [record["about"] for record in grounding] == ["liver", "spleen"]


def test_what_jpeg_smears_around_a_mask_is_no_foreground(own: Own) -> None:
    own.names("class,name\nliver,liver\n")
    picture(own.images / "a.png", size=(64, 64))
    picture(own.images / "black.png", size=(64, 64))
    shown = np.zeros((64, 64), np.uint8)
    shown[20:41, 13:38] = 255
    Image.fromarray(shown).save(own.masks / "a_liver.jpg", quality=75)
    Image.fromarray(shown * 0).save(own.masks / "black_liver.jpg")
    (record,), _ = own.built(*ONE)
    assert masked(record, own) == 21 * 25
    assert own.kinds() == ["empty_mask", "soft_mask"]


@pytest.mark.parametrize("form", ["png", "jpg"])
def test_a_soft_edged_mask_whose_only_name_is_white_is_no_label_map(own: Own, form: str) -> None:
    own.names("value,name\n0,background\n255,lesion\n")
    picture(own.images / "a.png", size=(64, 64))
    sharp = np.zeros((64, 64), np.float32)
    sharp[20:41, 13:38] = 255
    Image.fromarray(cv2.GaussianBlur(sharp, (0, 0), 2).round().astype(np.uint8)).save(own.masks / f"a.{form}")
    (record,), _ = own.built(*ONE)
    assert abs(masked(record, own) - 21 * 25) < 20
    assert own.kinds() == ["soft_mask"]


def test_values_without_a_name_are_one_finding_a_file(own: Own) -> None:
    own.names("value,name\n255,lesion\n7,other\n")
    picture(own.images / "a.png", size=(64, 64))
    Image.fromarray(np.arange(4096).reshape(64, 64).astype(np.uint8)).save(own.masks / "a.png")
    grounding, _ = own.built(*ONE)
    assert sorted(masked(record, own) for record in grounding) == [16, 16]  # label maps are never thresholded
    (finding,) = findings(own.out, "folder")
    assert finding["message"].endswith("is 1, 2, 3, 4, 5, 6, 8, 9 and 245 more")


def test_a_label_map_is_no_jpeg(own: Own) -> None:
    own.names("value,name\n1,liver\n")
    for name in ("a", "b"):
        own.image(f"{name}.png")
    labels = np.zeros((20, 24), np.uint8)
    labels[2:5, 2:6] = 1
    Image.fromarray(labels).save(own.masks / "a.png")
    Image.fromarray(labels).save(own.masks / "b.jpg")
    grounding, _ = own.built(*ONE)
    assert len(grounding) == 1
    (finding,) = findings(own.out, "folder")
    assert finding["kind"] == "unreadable_mask" and "save label maps as PNG" in finding["message"]


def test_files_that_no_record_can_name_are_listed(own: Own, monkeypatch: pytest.MonkeyPatch) -> None:
    own.names("class,name\nliver,liver\n")
    own.image("a.png")
    own.image("locked/c.png")
    mask(own.masks / "a_liver.png")
    (own.images / "gone.png").symlink_to(own.root / "nowhere.png")
    (own.images / "gone").symlink_to(own.root / "nowhere")
    (own.images / "volume.nii.gz").write_bytes(b"\x1f\x8b")
    shutil.copy(own.images / "a.png", os.fsencode(own.images) + b"/caf\xe9.png")
    scandir = os.scandir

    def guarded(place: Any) -> Any:
        if str(place).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", guarded)
    grounding, _ = own.built(*ONE)
    assert len(grounding) == 1
    messages = [row["message"].removeprefix(f"{own.images}/") for row in findings(own.out, "folder")]
    assert sorted(messages) == [
        "caf\\xe9.png: its name is not in UTF-8; give it another",
        "gone.png: it cannot be read (No such file or directory)",
        "gone: it cannot be read (No such file or directory)",
        "locked: the folder cannot be read (Permission denied)",
        "volume.nii.gz: it is a volume; write the slices of images and masks as pictures, such as PNG",
    ]


def test_the_first_mask_that_fits_nothing_is_told(own: Own, capsys: pytest.CaptureFixture[str]) -> None:
    own.names("class,name\nliver,liver\n")
    own.image("a.png")
    (own.images / "Thumbs.db").write_bytes(b"x")
    mask(own.masks / "a_mask.png")
    told = refused(capsys, *own.words())
    assert "a_mask.png: its name says no class: lay it into a folder of the class (liver/a.png)" in told
    own.names("file,name\nb.png,liver\n")
    assert "a_mask.png: the table of names does not list a_mask.png" in refused(capsys, *own.words())
