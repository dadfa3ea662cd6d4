"""``medplib data build SOURCE``: each layout of own data from files to records."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from PIL import Image
from pycocotools import mask as coco

from model.cli import main
from model.data.builders.build import BuildSettings, build_dataset, recognize
from model.data.builders.cases import ReadOptions, patient_of
from model.data.builders.questions import unrelated
from model.data.image_io import read_mask
from model.data.validate import check_file
from model.errors import MedPLIBError
from tests.conftest import ROOT

SIZE = (24, 32)
REAL = Path(os.environ.get("MEDPLIB_REAL", ROOT.parent / "shared" / "real"))


def picture(path: Path, seed: int = 0) -> Path:
    """A small colour picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def box(left: int = 2, right: int = 10, top: int = 4, bottom: int = 12) -> np.ndarray:
    """A mask with one rectangle."""
    mask = np.zeros(SIZE, dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def mask_file(path: Path, mask: np.ndarray | None = None, value: int = 255) -> Path:
    """A mask, or a map as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = box() if mask is None else mask
    Image.fromarray((mask * np.uint8(value)) if mask.dtype == bool else mask).save(path)
    return path


def table_file(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def build(source: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Build and check every record file; gives ``dataset.json``."""
    seed, splits = options.pop("seed", 0), options.pop("splits", None)
    settings = BuildSettings(ReadOptions(**options), splits=splits, seed=seed)
    dataset = build_dataset(source, out, settings)
    assert json.loads((out / "dataset.json").read_text()) == dataset
    for files in dataset["splits"].values():
        for file in files:
            report = check_file(out / file, out)
            assert report.ok, report.format()
    return dataset


def records(out: Path, kind: str | None = None) -> list[dict[str, Any]]:
    dataset = json.loads((out / "dataset.json").read_text())
    files = [out / file for listed in dataset["splits"].values() for file in listed]
    return [one for file in files for one in json.loads(file.read_text()) if kind in (None, one["kind"])]


def problems(out: Path) -> set[str]:
    with (out / "problems.csv").open(newline="") as stream:
        return {row["kind"] for row in csv.DictReader(stream)}


def mask_of(out: Path, record: Mapping[str, Any]) -> np.ndarray:
    found = re.search(r"<mask>(.*?)</mask>", record["conversations"][1]["value"])
    assert found is not None
    return read_mask(out / found[1])


@pytest.mark.parametrize(
    ("image", "mask", "options", "name"),
    [
        ("X{}.png", "X{}_segmentation.png", {"target": "polyp"}, "polyp"),
        ("X{}.jpg", "X{}_mask.png", {"target": "polyp"}, "polyp"),
        ("a/X{}.jpg", "b_Segmentation/X{}_Segmentation.png", {"target": "skin lesion"}, "skin lesion"),
        ("X{}.png", "masks/X{}.png", {"target": "polyp"}, "polyp"),
        ("Kvasir/images/X{}.jpg", "Kvasir/masks/X{}.png", {"target": "polyp"}, "polyp"),
        ("images/X{}.png", "optic_disc/X{}.png", {}, "optic disc"),
        ("images/X{}.png", "masks/X{}_left_lung.png", {}, "left lung"),
        ("images/X{}.png", "labels/liver/X{}.png", {}, "liver"),
        ("ISIC_Training_Input/ISIC_{}.jpg", "ISIC_Training_GroundTruth/ISIC_{}_segmentation.png", {"target": "a"}, "a"),
    ],
)
def test_common_names_of_masks(tmp_path: Path, image: str, mask: str, options: dict[str, str], name: str) -> None:
    for number in range(10):
        picture(tmp_path / "in" / image.format(number), number)
        mask_file(tmp_path / "in" / mask.format(number))
    dataset = build(tmp_path / "in", tmp_path / "out", **options)
    assert {split: count["images"] for split, count in dataset["counts"].items()} == {
        "train": 8,
        "validation": 1,
        "test": 1,
    }
    assert list(dataset["targets"]) == [name]
    found = records(tmp_path / "out", "grounding")
    assert len(found) == 10 and all((mask_of(tmp_path / "out", one) == box()).all() for one in found)


def test_instances_are_joined_and_classes_kept(tmp_path: Path) -> None:
    for name in ("benign", "malignant"):
        for number in range(8):
            picture(tmp_path / "in" / name / f"{name} ({number}).png", number)
            mask_file(tmp_path / "in" / name / f"{name} ({number})_mask.png")
            mask_file(tmp_path / "in" / name / f"{name} ({number})_mask_1.png", box(20, 30))
    dataset = build(tmp_path / "in", tmp_path / "out", target="breast lesion", modality="ultrasound")
    assert dataset["labels"] == {"class": ["benign", "malignant"]} and dataset["modalities"] == ["ultrasound"]
    assert (mask_of(tmp_path / "out", records(tmp_path / "out", "grounding")[0]) == box() | box(20, 30)).all()


@pytest.mark.parametrize("legend", [True, False])
def test_label_maps_with_and_without_legend(tmp_path: Path, legend: bool) -> None:
    for number in range(10):
        picture(tmp_path / "in/images" / f"{number}.png", number)
        values = box().astype(np.uint8) + 2 * box(20, 30).astype(np.uint8) * (number % 2)
        mask_file(tmp_path / "in/masks" / f"{number}.png", values)
    if legend:
        (tmp_path / "in/legend.csv").write_text("value,name\n0,background\n1,liver\n2,liver tumor\n")
    dataset = build(tmp_path / "in", tmp_path / "out")
    names = ["liver", "liver tumor"] if legend else ["class 1", "class 2"]
    assert list(dataset["targets"]) == names and sum(dataset["absent"][names[1]].values()) == 5
    assert ("legend_missing" in problems(tmp_path / "out")) is not legend
    refused = records(tmp_path / "out", "grounding_absent")
    assert len(refused) == 5 and all("<SEG>" not in one["conversations"][1]["value"] for one in refused)


def test_color_masks_need_a_legend(tmp_path: Path) -> None:
    for number in range(6):
        picture(tmp_path / "in/images" / f"{number}.png", number)
        colors = np.zeros((*SIZE, 3), dtype=np.uint8)
        colors[box()], colors[box(20, 30)] = (255, 0, 0), (0, 255, 0)
        mask_file(tmp_path / "in/masks" / f"{number}.png", colors)
    with pytest.raises(MedPLIBError, match=r"without a legend \(colors 0 255 0; 255 0 0\); give --names CSV"):
        build(tmp_path / "in", tmp_path / "out")
    (tmp_path / "names.csv").write_text("color,name\n#ff0000,polyp\n0 255 0,instrument\n")
    dataset = build(tmp_path / "in", tmp_path / "out", names=tmp_path / "names.csv")
    assert list(dataset["targets"]) == ["instrument", "polyp"]
    polyp = next(one for one in records(tmp_path / "out", "grounding") if one["about"] == "polyp")
    assert (mask_of(tmp_path / "out", polyp) == box()).all()


def test_folders_per_class_become_closed_questions(tmp_path: Path) -> None:
    for number in range(12):
        picture(tmp_path / "in/train" / "ab"[number % 2] / f"i{number}.png", number)
        picture(tmp_path / "in/val" / "ab"[number % 2] / f"j{number}.png", number)
    (tmp_path / "in/train/c").mkdir()
    dataset = build(tmp_path / "in", tmp_path / "out")
    assert set(dataset["splits"]) == {"train", "validation"} and "empty_class" in problems(tmp_path / "out")
    asked = records(tmp_path / "out", "label")
    assert len(asked) == 24 and all("Answer with one of these: a; b." in r["conversations"][0]["value"] for r in asked)


def test_coco_polygons_and_run_lengths(tmp_path: Path) -> None:
    shapes: list[Any] = [[[2, 4, 10, 4, 10, 12, 2, 12]]]
    packed = coco.encode(np.asfortranarray(box(20, 30).astype(np.uint8)))
    shapes.append({"size": list(SIZE), "counts": packed["counts"].decode()})
    flat = box(12, 18).T.ravel()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat.view(np.uint8), [0]])))
    shapes.append({"size": list(SIZE), "counts": np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()})
    content = {
        "images": [{"id": n, "file_name": f"{n}.png", "height": SIZE[0], "width": SIZE[1]} for n in range(10)],
        "categories": [{"id": 1, "name": "polyp"}, {"id": 2, "name": "instrument"}, {"id": 3, "name": "none"}],
        "annotations": [
            {"id": 3 * n + k, "image_id": n, "category_id": 1 + (k > 1), "segmentation": shape, "iscrowd": k // 2}
            for n in range(10)
            for k, shape in enumerate(shapes)
        ],
    }
    for number in range(9):
        picture(tmp_path / "in/images" / f"{number}.png", number)
    (tmp_path / "in/annotations").mkdir()
    (tmp_path / "in/annotations/instances.json").write_text(json.dumps(content))
    dataset = build(tmp_path / "in", tmp_path / "out")
    assert dataset["kind"] == "coco" and list(dataset["targets"]) == ["instrument", "polyp"] and not dataset["absent"]
    assert {"missing_image", "empty_class"} <= problems(tmp_path / "out")
    shown = {one["about"]: mask_of(tmp_path / "out", one) for one in records(tmp_path / "out", "grounding")}
    assert (shown["instrument"] == box(12, 18)).all()
    assert (shown["polyp"][:, 16:] == box(20, 30)[:, 16:]).all() and shown["polyp"][5:11, 3:9].all()


def test_parquet_with_image_bytes(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    rows = []
    for number in range(12):
        arrays = np.full(SIZE, number, np.uint8), box() * np.uint8(255)
        cells = [{"bytes": cv2.imencode(".png", one)[1].tobytes(), "path": None} for one in arrays]
        rows.append({"image": cells[0], "mask": cells[1], "label": number % 2})
    features = {"label": {"names": ["benign", "malignant"], "_type": "ClassLabel"}}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.Table.from_pylist(rows).replace_schema_metadata(about)
    parquet.write_table(table, tmp_path / "in/train-00000-of-00001.parquet", row_group_size=5)
    dataset = build(tmp_path / "in", tmp_path / "out", target="nodule")
    assert dataset["labels"] == {"label": ["benign", "malignant"]} and len(dataset["splits"]) == 3
    last = records(tmp_path / "out", "grounding")[-1]
    row = int(Path(last["image"]).stem.rpartition("-")[2])
    assert np.asarray(Image.open(tmp_path / "out" / last["image"]))[0, 0, 0] == row
    assert (mask_of(tmp_path / "out", last) == box()).all()


@pytest.mark.parametrize("form", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_question_tables(tmp_path: Path, form: str) -> None:
    answers = ("a lung", "Yes")
    rows = [{"image": f"i{n // 2}.png", "question": f"What is {n}?", "answer": answers[n % 2]} for n in range(20)]
    for number in range(10):
        picture(tmp_path / "in" / f"i{number}.png", number)
    file = tmp_path / "in" / f"qa.{form}"
    if form in ("csv", "tsv"):
        table_file(file, rows)
        file.write_text(file.read_text().replace(",", "\t") if form == "tsv" else file.read_text())
    elif form == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text(json.dumps(rows) if form == "json" else "\n".join(map(json.dumps, rows)))
    for source, out in ((tmp_path / "in", tmp_path / "a"), (file, tmp_path / "b")):
        assert build(source, out)["kind"] == "table"
        assert len(records(out, "question")) == 20
        assert {one["answer_type"] for one in records(out)} == {"open", "closed"}


def test_openai_messages_keep_their_turns(tmp_path: Path) -> None:
    lines = []
    for number in range(10):
        picture(tmp_path / "in" / f"i{number}.png", number)
        mask_file(tmp_path / "in/m" / f"{number}.png")
        parts = [{"type": "image_url", "image_url": {"url": f"i{number}.png"}}, {"type": "text", "text": "What is it?"}]
        answer = {"role": "assistant", "content": "A lung."}
        more = {"role": "user", "content": f"And <region>m/{number}.png</region>?"}
        lines.append(json.dumps({"messages": [{"role": "user", "content": parts}, answer, more, answer]}))
    (tmp_path / "in/chat.jsonl").write_text("\n".join([*lines, '{"messages": []}']))
    dataset = build(tmp_path / "in", tmp_path / "out")
    made = records(tmp_path / "out")
    assert dataset["kind"] == "conversations" and len(made) == 10 and len(made[0]["conversations"]) == 4
    assert {one["task"] for one in made} == {"region"} and problems(tmp_path / "out")


@pytest.mark.parametrize("published", [False, True], ids=["id to name", "name to id"])
def test_sa_med2d_names(tmp_path: Path, published: bool) -> None:
    assert main(["data", "build", "phantom", "--out", str(tmp_path / "in"), "--num-images", "12"]) == 0
    for file in (tmp_path / "in").glob("*.json"):
        if "class_mapping" not in file.name:
            file.unlink()
        elif published:  # as SA-Med2D-20M has it
            listed = json.loads(file.read_text())
            turned = {name: {called: int(number) for number, called in of.items()} for name, of in listed.items()}
            file.write_text(json.dumps(turned))
    dataset = build(tmp_path / "in", tmp_path / "out")
    assert dataset["kind"] == "sa-med2d" and sum(count["images"] for count in dataset["counts"].values()) == 12


def own_table(root: Path, count: int = 24) -> Path:
    """Pictures of two structures, classes, patients of two images and a stated split without validation."""
    rows = []
    for number in range(count):
        picture(root / "images" / f"{number}.png", number)
        for name, left in (("optic disc", 2), ("optic cup", 20)):
            gone = name == "optic cup" and number % 3 == 0
            mask = np.zeros(SIZE, bool) if gone else box(left, left + 8)
            mask_file(root / "masks" / f"{number}_{name[-3:]}.png", mask)
            rows.append(
                {"image": f"images/{number}.png", "mask": f"masks/{number}_{name[-3:]}.png", "target": name}
                | {"modality": "fundus", "patient": f"p{number // 2}", "glaucoma": str(number % 2), "age": number}
                | {"license": "CC BY 4.0", "split": "train" if number < count * 2 // 3 else "test"}
            )
    table_file(root / "meta.csv", rows)
    return root


def test_a_table_of_paths_labels_and_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = own_table(tmp_path / "in")
    assert main(["data", "build", "--out", str(tmp_path / "out"), str(source), "--workers", "1"]) == 0
    told = capsys.readouterr().out
    assert "no validation split" in told and "optic cup 16, optic disc 24" in told and "--kind table" in told
    dataset = json.loads((tmp_path / "out/dataset.json").read_text())
    assert dataset["counts"]["train"] | {"records": 0} == {"cases": 8, "images": 16, "targets": 26, "records": 0}
    assert dataset["labels"] == {"glaucoma": ["0", "1"]} and dataset["absent"] == {"optic cup": {"train": 6, "test": 2}}
    assert all(share <= 0.6 for kinds in dataset["blind"].values() for share in kinds.values())
    kinds = {one["kind"] for one in records(tmp_path / "out")}
    assert kinds == {"grounding", "grounding_absent", "region_name", "region_check", "presence", "label"}
    assert all(one["patient"] and one["modality"] == "fundus" for one in records(tmp_path / "out"))
    assert dataset["terms"] == "CC BY 4.0" == records(tmp_path / "out")[0]["terms"]
    assert main(["data", "build", str(source), "--out", str(tmp_path / "out")]) == 0
    assert "holds this build already" in capsys.readouterr().out
    assert main(["data", "build", str(source), "--out", str(tmp_path / "out"), "--seed", "1"]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_a_table_of_classes_keeps_masks_beside_it(tmp_path: Path) -> None:
    for number in range(10):
        picture(tmp_path / "in" / f"ISIC_{number}.jpg", number)
        mask_file(tmp_path / "in" / f"ISIC_{number}_Segmentation.png")
    rows = [{"image": f"ISIC_{number}", "diagnosis": ("nevus", "melanoma")[number % 2]} for number in range(10)]
    table_file(tmp_path / "in/GroundTruth.csv", rows)
    dataset = build(tmp_path / "in", tmp_path / "out", target="skin lesion")
    assert dataset["kind"] == "table" and sum(dataset["targets"]["skin lesion"].values()) == 10
    assert dataset["labels"] == {"diagnosis": ["melanoma", "nevus"]}


def test_patients_and_groups_stay_in_one_split(tmp_path: Path) -> None:
    rows = [
        {"image": f"{n}.png", "label": "ab"[n % 2], "dup_group": n // 2, "split": ("train", "val", "test")[n % 11 % 3]}
        for n in range(24)
    ]
    for number in range(24):
        picture(tmp_path / "in" / f"{number}.png", number)
    table_file(tmp_path / "in/list.csv", rows)
    build(tmp_path / "in", tmp_path / "given")
    build(tmp_path / "in", tmp_path / "drawn", splits={"train": 0.5, "test": 0.5})
    assert "patient_in_two_splits" in problems(tmp_path / "given")
    for out in ("given", "drawn"):
        splits: dict[str, set[str]] = {}
        for split, files in json.loads((tmp_path / out / "dataset.json").read_text())["splits"].items():
            for one in (one for file in files for one in json.loads((tmp_path / out / file).read_text())):
                splits.setdefault(one["patient"], set()).add(split)
        assert all(len(found) == 1 for found in splits.values())


def test_what_is_wrong_is_listed_with_its_fix(tmp_path: Path) -> None:
    root = tmp_path / "in"
    for number in range(10):
        picture(root / "images" / f"{number}.png", number)
        mask_file(root / "masks" / f"{number}.png", value=1 if number == 3 else 255)
    picture(root / "images/lonely.png")
    mask_file(root / "masks/stray.png")
    mask_file(root / "masks/5.bmp", box(20, 30))
    mask_file(root / "masks/6.png", np.ones((5, 5), bool))
    (root / "images/7.png").write_bytes(b"no picture")
    dataset = build(root, tmp_path / "out", target="polyp")
    assert (
        set(dataset["problems"])
        == problems(tmp_path / "out")
        == {
            *("image_without_mask", "mask_without_image", "two_candidates", "size_mismatch", "unreadable_image"),
            *("mask_values_differ", "patients_in_doubt"),
        }
    )
    assert sum(dataset["targets"]["polyp"].values()) == 8


def test_dry_run_writes_nothing_and_a_stop_is_resumed(tmp_path: Path) -> None:
    source, out = own_table(tmp_path / "in", 80), tmp_path / "out"
    dry = build_dataset(source, out, dry_run=True)
    assert not out.exists()
    stopped = [0]

    def stop(cases: int) -> None:
        stopped[0] += cases
        if stopped[0] >= 32:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_dataset(source, out, progress=stop)
    assert not (out / "dataset.json").exists()
    kept = (out / "masks").stat().st_mtime_ns, sorted((out / "masks").iterdir())[0].stat().st_mtime_ns
    assert build_dataset(source, out) == dry and not (out / ".partial").exists()
    assert sorted((out / "masks").iterdir())[0].stat().st_mtime_ns == kept[1]
    build_dataset(source, tmp_path / "whole")
    for file in (path.relative_to(out) for path in out.rglob("*.json") if path.name != "dataset.json"):
        assert (out / file).read_text() == (tmp_path / "whole" / file).read_text()


def test_side_questions_need_a_clear_side(tmp_path: Path) -> None:
    for number in range(20):
        picture(tmp_path / "in/images" / f"{number}.png", number)
        left = (1, 20, 12)[number % 3]
        mask_file(tmp_path / "in/masks" / f"{number}.png", box(left, left + 8))
    build(tmp_path / "in", tmp_path / "out", target="polyp", splits={"train": 1.0})
    asked = records(tmp_path / "out", "side")
    assert sorted(one["conversations"][1]["value"] for one in asked) == ["Left"] * 7 + ["Right"] * 7


def test_names_of_builders_win_over_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    own_table(tmp_path / "phantom", 12)
    with pytest.raises(SystemExit):
        main(["data", "build", "phantom", "--out", "a"])  # the builder: --num-images is missing
    assert main(["data", "build", "./phantom", "--out", "a", "--workers", "1"]) == 0
    with pytest.raises(SystemExit):
        main(["data", "build", "folder", "--images", "a", "--masks", "b"])
    assert "data build SOURCE --out DIR" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere", "--out", "out"], "does not exist"),
        (["in", "--out", "out", "--kind", "tape"], "is no layout; give one of"),
        (["in", "--out", "out", "--kind", "coco"], "is not recognized as coco"),
        (["in", "--out", "in/out"], "lies inside the source"),
        (["in"], "--out is missing"),
        (["in", "--out", "out", "--patient-pattern", "("], "no regular expression"),
        (["in", "--out", "out", "--modality", "photo"], "is unknown; give one of"),
        (["in", "--out", "full"], "is not empty and holds no build"),
        (["masks", "--out", "out"], "give --target NAME"),
        (["masks/masks", "--out", "out"], "holds masks, as in a_mask.png, but no images"),
    ],
)
def test_wrong_input_ends_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    own_table(tmp_path / "in", 4)
    picture(tmp_path / "full/a.png")
    picture(tmp_path / "masks/images/a.png")
    mask_file(tmp_path / "masks/masks/a_mask.png")
    assert main(["data", "build", *arguments]) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("present", "absent", "clear"),
    [
        ("liver", "liver tumour", True),
        ("liver tumour", "liver", False),
        ("lung", "left lung", False),
        ("lungs", "lung", False),
        ("left lung", "right lung", True),
    ],
)
def test_a_name_inside_another_is_distinguished(present: str, absent: str, clear: bool) -> None:
    assert bool(unrelated([absent], [present])) is clear


@pytest.mark.parametrize(
    ("path", "patient"),
    [
        ("patient02_L_CC", "patient02"),
        ("P12-left-1", "p12"),
        ("case_03_slice_014", "case03"),
        ("ISIC2018_Task1-2_Training_Input/ISIC_0000003", "ISIC2018_Task1-2_Training_Input/ISIC_0000003"),
        ("train1/0007", "train1/0007"),
        ("patient1/study2/view1", "patient1"),
        ("Smith_John_2021-01-10", "Smith_John"),
        ("0012_20210110_2", "0012"),
        ("IM-0001-0002", "IM-0001-"),
        ("BraTS_001_t1ce", "BraTS_001"),
        ("012/axial/7", "012"),
        ("0012_L_CC", "0012"),
    ],
)
def test_the_patient_of_an_image(path: str, patient: str) -> None:
    assert patient_of(path) == patient


def test_a_stop_by_signal_leaves_no_half_file(tmp_path: Path) -> None:
    source, out = own_table(tmp_path / "in", 60), tmp_path / "out"
    code = (
        "import os, sys; from pathlib import Path; from model.data.builders import build as b\n"
        "b.build_dataset(Path(sys.argv[1]), Path(sys.argv[2]), progress=lambda n: os._exit(9))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(source), str(out)], cwd=ROOT, check=False).returncode == 9
    assert not (out / "dataset.json").exists() and not list(out.glob("*/*.json.*"))
    build(source, out)


@pytest.mark.parametrize("name", ["busi", "drishti_gs", "ph2"])
def test_real_sets_are_balanced(tmp_path: Path, name: str) -> None:
    if not (REAL / f"{name}.tar").is_file():
        pytest.skip(f"{REAL}/{name}.tar is absent; MEDPLIB_REAL names the folder of the real sets")
    listed = subprocess.run(["tar", "-xOf", REAL / f"{name}.tar", f"{name}/meta.csv"], capture_output=True, check=True)
    rows = list(csv.DictReader(listed.stdout.decode().splitlines()))[::8]
    files = [f"{name}/{row[column]}" for row in rows for column in ("image", "mask")]
    subprocess.run(["tar", "-xf", REAL / f"{name}.tar", "-C", tmp_path, *dict.fromkeys(files)], check=True)
    table_file(tmp_path / name / "meta.csv", rows)
    dataset = build(tmp_path / name, tmp_path / "out")
    assert recognize(tmp_path / name).kind == "table" and not dataset["problems"].keys() - {"patients_in_doubt"}
    assert all(share <= 0.6 for split in dataset["blind"].values() for share in split.values()), dataset["blind"]
