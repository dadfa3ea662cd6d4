"""``medplib data build sa-med2d`` on a small faithful sample of the native layout, with one of everything wrong."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from model.cli import main
from model.data.builders.cases import SplitPlan
from model.data.builders.jobs import Execution
from model.data.builders.sa_med2d import Quota, SaMed2dSettings, absent_names, build_sa_med2d
from model.data.builders.sa_med2d_index import (
    BUCKETS,
    Source,
    bucket_file,
    list_names,
    parse_image_name,
    parse_mask_name,
    spoken_name,
)
from model.data.dataset import usable_records
from model.data.image_io import read_mask
from model.data.records import open_records
from model.data.validate import check_file
from model.errors import MedPLIBError

CLASSES = {
    "AbdomenCT1K": {"liver": 0, "right_kidney": 1, "spleen": 2, "union_liver_spleen": 3},
    "BraTS2021": {"edema": 0, "tumor_core": 1, "class7": 7},
    "COVIDQU": {"lung": 0, "left_lung": 1, "COVID_lesion": 2},
    "REFUGE": {"optic_disc": 0, "optic_cup": 1},
    "HeldOut": {"optic_disc": 0, "macula": 1},
}
SIZE = (24, 32)
ROOT = Path(__file__).resolve().parents[2]
RECORDS = ("train.jsonl", "validation.jsonl", "test.jsonl", "zero_shot.jsonl")


class Native:
    """Writes files as SA-Med2D-20M has them, and keeps the list of them."""

    def __init__(self, root: Path) -> None:
        self.root, self.listed = root, defaultdict(list)
        self._rng = np.random.default_rng(5)
        for folder in ("images", "masks"):
            (root / folder).mkdir(parents=True)

    def image(self, stem: str, *masks: str) -> None:
        self._save(f"images/{stem}.png", self._rng.integers(0, 255, SIZE, dtype=np.uint8))
        self.listed[f"images/{stem}.png"] = []
        for tail in masks:
            top, left = self._rng.integers(0, 16, 2)
            self.mask(stem, tail, (slice(top, top + 6), slice(left, left + 9)))

    def mask(self, stem: str, tail: str, place: Any, size: tuple[int, int] = SIZE) -> None:
        pixels = np.zeros(size, dtype=np.uint8)
        pixels[place] = 255
        self._save(f"masks/{stem}--{tail}.png", pixels)
        self.listed[f"images/{stem}.png"].append(f"masks/{stem}--{tail}.png")

    def finish(self) -> None:
        (self.root / "SAMed2D_v1.json").write_text(json.dumps(self.listed, indent=4))
        (self.root / "SAMed2D_v1_class_mapping_id.json").write_text(json.dumps(CLASSES))

    def _save(self, name: str, pixels: np.ndarray) -> None:
        Image.fromarray(pixels).save(self.root / name)


def make_native(root: Path, cases: int = 12) -> Native:
    """Some cases of five data sets in four modalities."""
    native = Native(root)
    for case in range(cases):
        for place in range(3):
            stem = f"ct_00--AbdomenCT1K--Case_{case:05d}--x_{place * 17:04d}"
            native.image(stem, "0000_000", "0000_001", "0001_000", *(("0002_000", "0003_000") if place else ()))
        for tag in ("mr_t1", "mr_flair"):
            native.image(f"{tag}--BraTS2021--BraTS2021_{case:05d}--z_0070", "0000_000", "0007_000")
        native.image(
            f"x_ray--COVIDQU--covid_{case}--2d_none", *(("0001_000",) if case % 2 else ("0000_000", "0002_000"))
        )
        native.image(f"fundus_photography--REFUGE--V{case:04d}--2d_none", "0000_000", "0001_000")
        native.image(f"fundus_photography--HeldOut--H{case:04d}--2d_none", "0000_000")
    return native


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample with one of everything that goes wrong."""
    files = make_native(tmp_path_factory.mktemp("SAMed2Dv1"))
    files.image("ct_00--AbdomenCT1K--Case_00900--x_0001")  # no mask
    files.image("ct_00--AbdomenCT1K--Case_00901--x_0001", "0000_000", "0055_000")  # a class without a name
    files.image("ct_00--AbdomenCT1K--Case_00902--x_0001", "0000_000")
    files.mask("ct_00--AbdomenCT1K--Case_00902--x_0001", "0001_000", slice(0, 0))  # empty
    files.mask("ct_00--AbdomenCT1K--Case_00902--x_0001", "0002_000", slice(0, 4), (24, 30))  # of another size
    files.image("ct_00--AbdomenCT1K--Case_00903--x_0001", "0000_000", "0001_000")
    (files.root / "masks/ct_00--AbdomenCT1K--Case_00903--x_0001--0001_000.png").write_bytes(b"\x89PNG broken")
    files.image("ct_00--AbdomenCT1K--Case_00904--x_0001", "0000_000", "0000_020")  # too wide a gap for the reader
    files.image("ct_00--Abdomen--odd--Case--x_0001", "0000_000")  # dashes in the case: fine
    files.mask("mr_t1--BraTS2021--BraTS2021_99999--z_0070", "0000_000", slice(0, 4))  # no image
    del files.listed["images/mr_t1--BraTS2021--BraTS2021_99999--z_0070.png"]
    files.listed["images/x_ray--COVIDQU--gone--2d_none.png"] = ["masks/x_ray--COVIDQU--gone--2d_none--0000_000.png"]
    files.image("x_ray--COVIDQU--unlisted--2d_none", "0000_000")
    del files.listed["images/x_ray--COVIDQU--unlisted--2d_none.png"]
    for odd in ("images/notes.txt", "images/scan.png", "masks/ct_00--AbdomenCT1K--Case_00001--x_0001--liver.png"):
        (files.root / odd).write_bytes(b"?")
    files.finish()
    return files.root


def settings(native: Path, out: Path, **changes: Any) -> SaMed2dSettings:
    plan = SplitPlan({"train": 0.6, "validation": 0.2, "test": 0.2}, 0, frozenset({"HeldOut"}))
    given = {"absent_share": 0.25, "bytes_a_piece": 4096, "images_a_piece": 8, **changes}
    return SaMed2dSettings(native, out, plan=plan, **given)


@pytest.fixture(scope="module")
def built(native: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built")
    build_sa_med2d(settings(native, out), Execution())
    return out


def rows_of(out: Path) -> dict[str, dict[str, Any]]:
    return {row["path"]: row for row in parquet.read_table(out / "index.parquet").to_pylist()}


def findings_of(out: Path, name: str) -> dict[str, list[dict[str, Any]]]:
    found = defaultdict(list)
    for line in (out / f"findings_{name}.jsonl").read_text().splitlines():
        finding = json.loads(line)
        found[finding["kind"]].append(finding)
    return found


def records_of(out: Path, names: Iterable[str] = RECORDS) -> list[dict[str, Any]]:
    return [dict(record) for name in names for record in open_records(out / name)]


def test_index_has_a_row_an_image(native: Path, built: Path) -> None:
    rows = rows_of(built)
    on_disk = {f"images/{path.name}" for path in (native / "images").glob("*--*.png")}
    assert set(rows) == on_disk
    row = rows["images/ct_00--AbdomenCT1K--Case_00003--x_0017.png"]
    assert {key: row[key] for key in ("modality", "tag", "dataset", "case", "slice")} == {
        "modality": "ct",
        "tag": "ct_00",
        "dataset": "AbdomenCT1K",
        "case": "Case_00003",
        "slice": "x_0017",
    }
    assert [(mask["class_id"], mask["class_name"], mask["instance"]) for mask in row["masks"][:3]] == [
        (0, "liver", 0),
        (0, "liver", 1),
        (1, "right_kidney", 0),
    ]
    assert all((native / mask["file"]).is_file() for one in rows.values() for mask in one["masks"])
    assert [merged["file"] for merged in row["merged"]][:2] == [
        "masks_merged/ct_00--AbdomenCT1K--Case_00003--x_0017--0000_merged.png",
        "masks_merged/ct_00--AbdomenCT1K--Case_00003--x_0017--0001_merged.png",
    ]
    assert rows["images/x_ray--COVIDQU--covid_1--2d_none.png"]["modality"] == "x_ray"
    assert rows["images/fundus_photography--REFUGE--V0001--2d_none.png"]["tag"] == "fundus_photography"
    assert rows["images/ct_00--Abdomen--odd--Case--x_0001.png"]["case"] == "odd--Case"


def test_what_does_not_fit_is_reported_and_not_fatal(built: Path) -> None:
    found = findings_of(built, "sa-med2d-index")
    assert {kind: len(lines) for kind, lines in found.items()} == {
        "odd_name": 3,
        "mask_without_image": 1,
        "image_without_mask": 1,
        "images_not_in_folder": 1,
        "images_not_in_list": 1,
        "masks_not_in_folder": 1,
        "masks_not_in_list": 2,
    }
    assert "BraTS2021_99999" in found["mask_without_image"][0]["message"]
    assert "COVIDQU--gone" in found["images_not_in_folder"][0]["message"]
    report = json.loads((built / "report_sa-med2d-index.json").read_text())
    assert report["counts"]["images"]["all"] == len(rows_of(built)) == report["files"]["index.parquet"]["records"]
    unnamed = next(labels for group, labels in report["counts"].items() if "does not name" in group)
    assert unnamed == {"AbdomenCT1K 55": 1, "Abdomen 0": 1}
    assert report["counts"]["images by split"]["zero_shot"] == 12


def test_splits_keep_cases_together(built: Path) -> None:
    rows = rows_of(built).values()
    splits = defaultdict(set)
    for row in rows:
        splits[row["dataset"], row["case"]].add(row["split"])
    assert all(len(of_case) == 1 for of_case in splits.values())
    assert {row["split"] for row in rows if row["dataset"] == "HeldOut"} == {"zero_shot"}
    assert {row["split"] for row in rows if row["dataset"] == "AbdomenCT1K"} == {"train", "validation", "test"}
    plan = SplitPlan({"train": 0.8, "test": 0.2}, 3)
    drawn = Counter(plan.of("Set", f"case {number}") for number in range(5000))
    assert abs(drawn["test"] / 5000 - 0.2) < 0.02


@pytest.mark.parametrize("name", RECORDS)
def test_records_pass_the_check_of_training(native: Path, built: Path, name: str) -> None:
    report = check_file(built / name, native)
    assert report.ok, report.format()
    assert report.counts["tasks"] == {"grounding": report.total}
    usable_records(built / name, native, "refuse")


def test_records_ask_for_all_that_has_a_name(native: Path, built: Path) -> None:
    records = records_of(built)
    present = [record for record in records if record["kind"] == "grounding"]
    asked = {(record["image"], record["about"]) for record in present}
    named = {
        (row["path"], spoken_name(merged["class_name"]))
        for row in rows_of(built).values()
        for merged in row["merged"]
        if merged["class_name"] and spoken_name(merged["class_name"])
    }
    dropped = named - asked
    assert not asked - named
    assert sorted(about for _, about in dropped) == ["liver", "right kidney", "right kidney", "spleen"]
    kinds = {kind: len(lines) for kind, lines in findings_of(built, "sa-med2d").items()}
    assert kinds == {"empty_mask": 1, "size_mismatch": 1, "unreadable_mask": 1, "gap_in_instances": 1}
    assert not [record for record in records if "union" in record["about"] or "class7" in record["about"]]
    assert len({record["id"] for record in records}) == len(records)
    assert len({record["conversations"][0]["value"].replace(record["about"], "") for record in present}) > 8
    assert all(record["about"] in record["conversations"][0]["value"] for record in records)


def test_absent_targets_are_of_the_same_set_and_refused(built: Path) -> None:
    rows, records = rows_of(built), records_of(built)
    absent = [record for record in records if record["kind"] == "grounding_absent"]
    assert 0 < len(absent) / len(records) < 0.25  # most images hold all classes of their set
    for record in absent:
        row = rows[record["image"]]
        assert "<SEG>" not in record["conversations"][1]["value"]
        assert record["about"] not in {(merged["class_name"] or "").replace("_", " ") for merged in row["merged"]}
        assert record["about"].replace(" ", "_") in CLASSES[row["dataset"]]
    lungs = {0: "lung", 1: "left_lung", 2: "COVID_lesion"}
    assert absent_names(["left_lung"], lungs) == ["COVID lesion"]
    assert absent_names(["union_lung_lesion"], lungs) == ["COVID lesion", "left lung"]


def test_merging_writes_the_union_once(native: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_native(source, 2).finish()
    merged = source / "masks_merged"
    with_merge = settings(source, tmp_path / "out", merge="all")
    report = build_sa_med2d(with_merge, Execution())[1]
    union = "ct_00--AbdomenCT1K--Case_00001--x_0017--0000"
    parts = [read_mask(source / f"masks/{union}_{number:03d}.png") for number in (0, 1)]
    assert np.array_equal(read_mask(merged / f"{union}_merged.png"), parts[0] | parts[1])
    expected = {entry["file"] for row in rows_of(tmp_path / "out").values() for entry in row["merged"]}
    assert {f"masks_merged/{path.name}" for path in merged.iterdir()} == expected
    assert report.counts["merged masks"] == {"written": len(expected)}
    torn = merged / f"{union}_merged.png"
    before = {path: path.stat().st_mtime_ns for path in merged.iterdir()}
    torn.write_bytes(torn.read_bytes()[:-5])
    again = build_sa_med2d(with_merge, Execution(overwrite=True))[1]
    assert again.counts["merged masks"] == {"there already": len(expected) - 1, "written": 1}
    assert [path for path in before if path.stat().st_mtime_ns != before[path]] == [torn]
    for name in RECORDS:
        if (tmp_path / "out" / name).exists():
            assert check_file(tmp_path / "out" / name, source).ok


def same_files(left: Path, right: Path, names: Iterable[str]) -> None:
    for name in names:
        assert (left / name).read_bytes() == (right / name).read_bytes(), name


def test_two_workers_give_the_same_bytes(native: Path, built: Path, tmp_path: Path) -> None:
    build_sa_med2d(settings(native, tmp_path), Execution(2))
    same_files(built, tmp_path, ("index.parquet", *RECORDS, "findings_sa-med2d.jsonl"))


def test_records_as_parquet_are_the_same(native: Path, built: Path, tmp_path: Path) -> None:
    build_sa_med2d(settings(native, tmp_path, form="parquet"), Execution())
    for name in RECORDS:
        rows = list(open_records((tmp_path / name).with_suffix(".parquet")))
        assert rows == list(open_records(built / name))


def test_a_second_run_does_nothing(native: Path, built: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*") if path.is_file() and path.name != "lock"}
    reports = build_sa_med2d(settings(native, built), Execution())
    assert [report.did_nothing for report in reports] == [True, True]
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_results_do_not_go_among_the_files_that_are_listed(native: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(native)
    for out in (native / "images" / "new", tmp_path / "link" / "masks"):
        with pytest.raises(MedPLIBError, match="whose files are listed; name another folder"):
            build_sa_med2d(settings(native, out), Execution())
    assert not (native / "images" / "new").exists()


def test_names_that_a_killed_process_left_are_cleared_away(native: Path, tmp_path: Path) -> None:
    left = tmp_path / ".images.tmp"
    left.mkdir()
    (left / "000.txt").write_text("half")
    list_names(Source.open(native), tmp_path, lambda _: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "list", "masks"]
    assert sum(
        len(bucket_file(tmp_path / "images", bucket).read_bytes().splitlines()) for bucket in range(BUCKETS)
    ) == len([*(native / "images").iterdir()])


def test_quotas_are_spread_over_data_sets_and_classes(native: Path, tmp_path: Path) -> None:
    few = settings(native, tmp_path, quota=Quota.parse("30,ct=90"), absent_share=0.0)
    build_sa_med2d(few, Execution())
    records = records_of(tmp_path)
    by_modality = Counter((record["modality"], record["dataset"]) for record in records)
    train = list(open_records(tmp_path / "train.jsonl"))
    about = Counter(record["about"] for record in train if record["modality"] == "ct")
    spleens = sum(
        merged["class_name"] == "spleen"
        for row in rows_of(tmp_path).values()
        for merged in row["merged"]
        if row["split"] == "train"
    )
    assert about == {"liver": (54 - spleens) // 2, "right kidney": (54 - spleens) // 2, "spleen": spleens}
    assert by_modality["fundus", "REFUGE"] > 20
    assert by_modality["fundus", "HeldOut"] == 6
    whole = {record["id"]: record for record in records}
    build_sa_med2d(replace(few, quota=Quota.parse("30,ct=60")), Execution(overwrite=True))
    fewer = {record["id"]: record for record in records_of(tmp_path)}
    assert set(fewer) < set(whole)
    assert all(whole[name] == record for name, record in fewer.items())


def test_the_list_alone_is_enough_for_an_index(native: Path, built: Path, tmp_path: Path) -> None:
    source = tmp_path / "lists"
    source.mkdir()
    for name in ("SAMed2D_v1.json", "SAMed2D_v1_class_mapping_id.json"):
        (source / name).write_bytes((native / name).read_bytes())
    build_sa_med2d(settings(source, tmp_path / "out"), Execution())
    rows, seen = rows_of(tmp_path / "out"), rows_of(built)
    assert set(rows) - set(seen) == {"images/x_ray--COVIDQU--gone--2d_none.png"}
    assert set(seen) - set(rows) == {"images/x_ray--COVIDQU--unlisted--2d_none.png"}
    both = [path for path in rows if path in seen]
    assert all(rows[path] == seen[path] for path in both)


def test_wrong_sources_and_flags_end_in_a_sentence(
    native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*flags: str, source: Path = native) -> str:
        out = tmp_path / f"out of {source.name}"
        command = ["data", "build", "sa-med2d", "--source", str(source), "--out", str(out), *flags]
        assert main(command) == 2
        return capsys.readouterr().err

    assert "not a folder" in told(source=tmp_path / "nowhere")
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer/SAMed2Dv1").symlink_to(native)
    assert "did you mean" in told(source=tmp_path / "outer")
    assert "did you mean BraTS2021" in told("--hold-out", "BraTS21")
    assert "sum to 1" in told("--splits", "train=0.9,test=0.2")
    assert "--per-modality" in told("--per-modality", "xray=10")
    assert "pet" in told("--per-modality", "pet=10")
    assert "--absent-share" in told("--absent-share", "0.9")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "SAMed2D_v1_class_mapping_id.json").write_text(json.dumps(CLASSES))
    (broken / "SAMed2D_v1.json").write_text('{"images/a.png": ["masks/b.png"], "images/c')
    assert "cut short at byte" in told(source=broken)


def test_names_of_the_real_set_are_understood() -> None:
    image = parse_image_name("x_ray--chest_x_ray_images--img--with--dashes--2d_none.png")
    assert image is not None
    assert image[1:] == ("x_ray", "chest_x_ray_images", "img--with--dashes", "2d_none")
    mask = parse_mask_name("ct_00--AbdomenCT1K--Case_00011--x_0041--0000_001.png")
    assert mask is not None
    assert (mask.image_stem, mask.class_id, mask.instance) == ("ct_00--AbdomenCT1K--Case_00011--x_0041", 0, 1)
    for odd in ("ct_00--A--B.png", "ct--A--B--c.png", "xx_00--A--B--c.png", "ct_00--A----c.png", "ct_00--A--B--c.jpg"):
        assert parse_image_name(odd) is None or odd.startswith("xx")
    assert spoken_name("optic_disc") == "optic disc"
    assert [spoken_name(name) for name in ("union_liver_tumor", "class_12", "left", "background")] == [None] * 4
