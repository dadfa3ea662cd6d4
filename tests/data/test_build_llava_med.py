from __future__ import annotations

import json
from pathlib import Path

import pytest

from model.processing.conversation import Turn, render
from tests.data.built import build, findings, refused, said, trains
from tests.data.native_samples import llava_med, write_json

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


def test_it_goes_in_pieces_and_joins_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, images = llava_med(tmp_path / "raw", count=2)
    (one, two) = json.loads(source.read_text())
    write_json(source, [{**(one, two)[number % 2], "id": str(number)} for number in range(6_000)])
    common = ("llava-med", "--source", source, "--images", images, "--no-pixels")
    assert build(*common, "--out", tmp_path / "whole") == 0
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / f".{NAME}.host.77.tmp").write_text("half of a run that was killed while it joined")
    assert build(*common, "--out", tmp_path / "parts", "--workers", "2") == 0
    assert not list((tmp_path / "parts").glob(".*.tmp"))
    assert (tmp_path / "parts" / NAME).read_bytes() == (tmp_path / "whole" / NAME).read_bytes()
    capsys.readouterr()
    assert build(*common, "--out", tmp_path / "parts") == 0
    assert "nothing was done" in capsys.readouterr().out


def test_nothing_left_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
