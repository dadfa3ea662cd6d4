from __future__ import annotations

import json
from pathlib import Path

import cv2
import pytest

from model.data.validate import check_file
from tests.data.built import build, findings, refused, said, trains
from tests.data.native_samples import CT, MR, mecovqa, turns, write_json

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


def test_a_file_without_records_is_told(
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
