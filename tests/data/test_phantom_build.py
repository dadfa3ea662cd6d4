"""Phantom data sets on disk: the published layout, the same whatever the number of workers."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from model.data.builders.blind import position_prior_dice
from model.data.builders.phantom import TASKS, build_phantoms, write_json
from model.data.builders.phantom_scenes import CLASS_NAMES, MODALITIES
from model.data.schema import parse_record
from model.errors import MedPLIBError

SAMPLE = Path(__file__).resolve().parents[2] / "data" / "sample"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small phantom set."""
    out = tmp_path_factory.mktemp("phantom")
    report = build_phantoms(out, 48, 3, size=96)
    assert report.images == len(list((out / "images").iterdir())) == 48
    assert report.masks == len(list((out / "masks").iterdir()))
    assert report.records == {task: len(json.loads((out / f"{task}.json").read_text())) for task in TASKS}
    return out


def test_layout_is_the_published_one(built: Path) -> None:
    index = json.loads((built / "SAMed2D_phantom.json").read_text())
    names = json.loads((built / "SAMed2D_phantom_class_mapping_id.json").read_text())["Phantom"]
    assert [names[str(number)] for number in range(len(CLASS_NAMES))] == list(CLASS_NAMES)
    pattern = re.compile(rf"images/({'|'.join(MODALITIES)})_00--Phantom--seed3case\d{{6}}--0000\.png")
    shapes = set()
    for image, masks in index.items():
        assert pattern.fullmatch(image)
        picture = cv2.imread(str(built / image))
        shapes.add(picture.shape[:2])
        for mask in masks:
            stem, class_id = re.fullmatch(r"masks/(.+)--(\d{4})_000\.png", mask).groups()
            assert stem == Path(image).stem
            assert 0 < int(class_id) < len(CLASS_NAMES)
            pixels = cv2.imread(str(built / mask), cv2.IMREAD_UNCHANGED)
            assert pixels.shape == picture.shape[:2]
            assert set(np.unique(pixels)) == {0, 255}
    assert (96, 96) in shapes
    assert len(shapes) > 2


@pytest.mark.parametrize("task", TASKS)
def test_every_record_is_readable(built: Path, task: str) -> None:
    for record in json.loads((built / f"{task}.json").read_text()):
        sample = parse_record(record, built)
        assert sample.task == task
        assert sample.modality == record["modality"]
        assert sample.answer_type in {"open", "closed"}
        assert len(sample.masks) == sample.turns[1].text.count("<SEG>")
        assert len(sample.regions) == sample.turns[0].text.count("<region></region>") == (task == "region")
        assert record["kind"]


def test_workers_do_not_change_the_files(tmp_path: Path) -> None:
    for workers in (1, 2):
        build_phantoms(tmp_path / str(workers), 6, 11, size=64, workers=workers)
    files = [sorted(path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*") if path.is_file())]
    assert len(files[0]) > 15
    for name in files[0]:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_seeds_have_no_case_in_common(built: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    build_phantoms(tmp_path, 8, 4, size=64, progress=seen.append)
    assert not {path.name for path in (tmp_path / "images").iterdir()} & {p.name for p in (built / "images").iterdir()}
    assert seen == [1] * 8
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".tmp"]


def test_places_do_not_give_masks_away(tmp_path: Path) -> None:
    build_phantoms(tmp_path, 240, 5, size=64)
    records = json.loads((tmp_path / "grounding.json").read_text())
    half = len(records) // 2
    assert 0.0 < position_prior_dice(records[:half], records[half:], tmp_path) < 0.3


@pytest.mark.parametrize(("number", "seed", "size"), [(0, 1, 96), (1, -1, 96), (1, 1, 8)])
def test_impossible_wishes_are_refused_in_a_sentence(tmp_path: Path, number: int, seed: int, size: int) -> None:
    with pytest.raises(MedPLIBError, match="give"):
        build_phantoms(tmp_path / "out", number, seed, size=size)
    assert not (tmp_path / "out").exists()


def build_sample(out: Path) -> None:
    """As data/sample/README.md says: 16 images for training, 8 others whose records are in one file."""
    build_phantoms(out, 16, seed=61)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        build_phantoms(other := Path(folder), 8, seed=505)
        held_out = [record for task in TASKS for record in json.loads((other / f"{task}.json").read_text("utf-8"))]
        for path in (*(other / "images").iterdir(), *(other / "masks").iterdir()):
            path.replace(out / path.parent.name / path.name)
        parts = [json.loads((root / "SAMed2D_phantom.json").read_text("utf-8")) for root in (out, other)]
    write_json(out / "held_out.json", held_out)
    write_json(out / "SAMed2D_phantom.json", parts[0] | parts[1])


def test_committed_sample_is_what_the_builder_makes(tmp_path: Path) -> None:
    build_sample(tmp_path)
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    kept = sorted(path.relative_to(SAMPLE) for path in SAMPLE.rglob("*") if path.suffix in {".json", ".png"})
    assert made == kept
    assert sum((SAMPLE / name).stat().st_size for name in kept) < 2_000_000
    for name in made:
        if name.suffix == ".json":
            assert json.loads((tmp_path / name).read_text()) == json.loads((SAMPLE / name).read_text()), name
            continue
        first, second = (cv2.imread(str(root / name), cv2.IMREAD_UNCHANGED).astype(int) for root in (tmp_path, SAMPLE))
        assert first.shape == second.shape
        assert np.abs(first - second).mean() < 0.5, name  # processors round differently


def test_sample_covers_all_modalities_and_structures() -> None:
    held_out, training = (json.loads((SAMPLE / f"{name}.json").read_text()) for name in ("held_out", "grounding"))
    assert {record["modality"] for record in held_out} == {record["modality"] for record in training} == set(MODALITIES)
    shown = {record["about"] for record in held_out + training if record["kind"] == "grounding"}
    assert shown == set(CLASS_NAMES[1:])
