"""``medplib data build`` of MeCoVQA and LLaVA-Med: kept, mended or listed, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import pytest

from model.data.validate import check_file
from model.processing.conversation import Turn, render
from tests.data.built import build, findings, refused, said, trains
from tests.data.native_samples import CT, MR, llava_med, mecovqa, turns, write_json

GROUNDING = "train/MeCoVQA-Grounding.json"


@pytest.fixture
def raw(tmp_path: Path) -> tuple[Path, Path]:
    return mecovqa(tmp_path)


def test_what_cannot_be_trained_on_is_left_out_and_listed(tmp_path: Path, raw: tuple[Path, Path]) -> None:
    source, images = raw
    out = tmp_path / "out"
    assert build("mecovqa", "--source", source, "--images", images, "--out", out) == 0
    kept = trains(out / GROUNDING, images)
    assert [record["id"] for record in kept] == ["g0", "g1", "g6"]
    assert kept[1]["image"] == f"images/{MR}.png"
    assert said(kept[1])[1] == f"It is <SEG>.<mask>masks_merged/{MR}--0001_merged.png</mask>"
    (region,) = trains(out / "train" / "MeCoVQA-Region.json", images)
    assert f"<region>masks_merged/{MR}--0001_merged.png</region>" in said(region)[0]
    assert [record["id"] for record in trains(out / "test" / "MeCoVQA_Complex_VQA_test.json", images)] == [0]
    assert len(trains(out / "zeroshot4grounding" / "mr.json", images)) == 1

    listed = {(row["file"], row["record"], row["kind"], row["dropped"]) for row in findings(out, "mecovqa")}
    assert {row for row in listed if row[0] == GROUNDING} == {
        (GROUNDING, 1, "suffix_missing", False),
        (GROUNDING, 2, "missing_mask", True),
        (GROUNDING, 3, "empty_mask", True),
        (GROUNDING, 4, "size_mismatch", True),
        (GROUNDING, 5, "missing_image", True),
        (GROUNDING, 6, "repeated_record", False),
    }
    assert ("test/MeCoVQA_Complex_VQA_test.json", 1, "empty_answer", True) in listed
    report = json.loads((out / "report_mecovqa.json").read_text())
    assert report["counts"]["records"] == {"dropped": 6, "kept": 6}
    assert report["counts"][GROUNDING] == {"ct grounding": 2, "mr grounding": 1}


def test_a_cleaned_file_stays_as_it_is(tmp_path: Path, raw: tuple[Path, Path]) -> None:
    source, images = raw
    first, second = tmp_path / "first", tmp_path / "second"
    assert build("mecovqa", "--source", source, "--images", images, "--out", first) == 0
    assert build("mecovqa", "--source", first, "--images", images, "--out", second, "--workers", 2) == 0
    files = sorted(path.relative_to(first) for path in first.glob("*/*.json"))
    assert len(files) == 4
    assert all((first / path).read_bytes() == (second / path).read_bytes() for path in files)
    assert {row["kind"] for row in findings(second, "mecovqa")} == {"repeated_record"}


def test_merged_masks_can_be_written(tmp_path: Path, raw: tuple[Path, Path]) -> None:
    source, images = raw
    out = tmp_path / "out"
    merged = images / "masks_merged" / f"{CT}--0003_merged.png"
    assert build("mecovqa", "--source", source / GROUNDING, "--images", images, "--out", out) == 0
    assert not merged.exists()
    assert (
        build("mecovqa", "--source", source / GROUNDING, "--images", images, "--out", out, "--merge", "--overwrite")
        == 0
    )
    assert set(cv2.imread(str(merged), cv2.IMREAD_UNCHANGED).ravel()) == {0, 255}
    assert (cv2.imread(str(merged), cv2.IMREAD_UNCHANGED) > 0).sum() == 6 * 8 + 3 * 4
    assert len(trains(out / "MeCoVQA-Grounding.json", images)) == 3


def test_existence_alone_can_be_looked_at(tmp_path: Path, raw: tuple[Path, Path]) -> None:
    source, images = raw
    assert (
        build("mecovqa", "--source", source / GROUNDING, "--images", images, "--out", tmp_path / "o", "--no-pixels")
        == 0
    )
    report = check_file(tmp_path / "o" / "MeCoVQA-Grounding.json", images, check_pixels=False)
    assert report.ok and report.total == 5


def test_wrong_folders_are_refused(tmp_path: Path, raw: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    source, images = raw
    common = ("mecovqa", "--out", tmp_path / "out")
    told = refused(capsys, *common, "--source", images, "--images", images)
    assert "holds no file of MeCoVQA; expected train/MeCoVQA-Complex.json" in told
    assert "nowhere does not exist" in refused(capsys, *common, "--source", source, "--images", tmp_path / "nowhere")
    told = refused(capsys, "mecovqa", "--source", source, "--images", images, "--out", source, "--overwrite")
    assert "name another folder" in told
    assert len(json.loads((source / GROUNDING).read_text())) == 7


def test_records_that_are_no_records_are_listed(tmp_path: Path, raw: tuple[Path, Path]) -> None:
    _, images = raw
    broken = tmp_path / "broken.json"
    good = {"id": 1, "image": f"images/{CT}.png", "conversations": [{"from": "human", "value": "<image>\nCT?"}]}
    good["conversations"] += [{"from": "gpt", "value": "Yes"}]
    broken.write_text('[{"id": 0, "image": bad},\n' + json.dumps(good) + "]")
    assert build("mecovqa", "--source", broken, "--images", images, "--out", tmp_path / "out") == 0
    assert len(trains(tmp_path / "out" / "broken.json", images)) == 1
    (finding,) = findings(tmp_path / "out", "mecovqa")
    assert (finding["kind"], finding["record"]) == ("invalid_json", 0)


def test_every_image_of_a_record_is_mended(tmp_path: Path, raw: tuple[Path, Path]) -> None:
    _, images = raw
    talk = turns("<image>\n<image>\nWhich is MR?", "The second.")
    record = {"id": "two", "image": [f"images/{CT}.png", f"images/{MR}"], "conversatons": talk, "extra": {"kept": [1]}}
    write_json(tmp_path / "two.json", [record])
    assert build("mecovqa", "--source", tmp_path / "two.json", "--images", images, "--out", tmp_path / "out") == 0
    (kept,) = trains(tmp_path / "out" / "two.json", images)
    assert kept["image"] == [f"images/{CT}.png", f"images/{MR}.png"]
    assert (kept["conversations"], kept["extra"]) == (talk, {"kept": [1]})


def test_a_file_without_records_exits_with_1(
    tmp_path: Path, raw: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    empty = write_json(tmp_path / "empty.json", [])
    assert build("mecovqa", "--source", empty, "--images", raw[1], "--out", tmp_path / "out") == 1
    assert capsys.readouterr().err == "medplib: the source holds no record\n"


def test_a_parquet_file_becomes_a_list(tmp_path: Path, raw: tuple[Path, Path]) -> None:
    import pyarrow
    import pyarrow.parquet

    source, images = raw
    rows = json.loads((source / GROUNDING).read_text())[:2]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "own.parquet")
    assert build("mecovqa", "--source", tmp_path / "own.parquet", "--images", images, "--out", tmp_path / "out") == 0
    assert len(trains(tmp_path / "out" / "own.json", images)) == 2


NAME = "llava_med_alignment_500k.json"


def test_captions_whose_images_are_there_are_kept(tmp_path: Path) -> None:
    source, images = llava_med(tmp_path / "raw", count=6)
    out = tmp_path / "out"
    assert build("llava-med", "--source", source, "--images", images, "--out", out) == 0
    kept = trains(out / NAME, images)
    assert [record["id"] for record in kept] == ["25867105_F1", "25867107_F1", "25867109_F1"]
    assert all(record["task"] == "caption" and "conversatons" not in record for record in kept)
    assert said(kept[0]) == ("<image>\nProvide a brief description of the given image.", "Axial view, number 0.")
    assert (kept[0]["modality"], kept[1].get("modality")) == ("ct", None)
    listed = findings(out, "llava_med")
    assert [(row["kind"], row["record"], row["id"]) for row in listed] == [
        ("missing_image", 1, "25867106_F1"),
        ("missing_image", 3, "25867108_F1"),
        ("missing_image", 5, "25867110_F1"),
    ]


def test_stage_i_learns_the_caption_alone(tmp_path: Path) -> None:
    source, images = llava_med(tmp_path / "raw", count=1)
    assert build("llava-med", "--source", source, "--images", images, "--out", tmp_path / "out") == 0
    (record,) = trains(tmp_path / "out" / NAME, images)
    turns = [Turn(turn["from"], turn["value"]) for turn in record["conversations"]]
    assert render(turns, "plain") == "<image>Axial view, number 0.\n"


def test_downloads_that_broke_off_are_left_out(tmp_path: Path) -> None:
    source, images = llava_med(tmp_path / "raw", count=4)
    whole = images / "25867107_F1.jpg"
    whole.write_bytes(whole.read_bytes()[:300])
    common = ("llava-med", "--source", source, "--images", images)
    assert build(*common, "--out", tmp_path / "out") == 0
    assert len(trains(tmp_path / "out" / NAME, images)) == 1
    assert "unreadable_image" in {row["kind"] for row in findings(tmp_path / "out", "llava_med")}
    assert build(*common, "--out", tmp_path / "quick", "--no-pixels") == 0
    assert len(json.loads((tmp_path / "quick" / NAME).read_text())) == 2


def test_nothing_left_exits_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, _ = llava_med(tmp_path / "raw")
    (tmp_path / "empty").mkdir()
    assert build("llava-med", "--source", source, "--images", tmp_path / "empty", "--out", tmp_path / "out") == 1
    assert "no record is left to train on" in capsys.readouterr().err


def test_another_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, images = llava_med(tmp_path / "raw")
    common = ("llava-med", "--images", images, "--out", tmp_path / "out")
    other = write_json(tmp_path / "other.json", [{"caption": "x"}])
    assert "does not look like LLaVA-Med's alignment set" in refused(capsys, *common, "--source", other)
    assert "is a folder; give the file" in refused(capsys, *common, "--source", tmp_path)
    told = refused(capsys, "llava-med", "--source", source, "--images", images, "--out", source.parent, "--overwrite")
    assert "holds the file to be built from" in told
