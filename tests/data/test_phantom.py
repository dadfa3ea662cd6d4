"""Phantoms: scenes, questions that cannot be answered blind, and data sets on disk, the same for any workers."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from model.data.builders.questions import blind_baseline, position_prior_dice
from model.data.phantom import TASKS, PhantomStream, build_phantoms, record_of, write_json
from model.data.phantom.questions import Question
from model.data.phantom.scenes import CLASS_NAMES, LESIONS, MODALITIES, PLANS, Scene, render_scene, structures_of
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


SCENES_EACH = 24


@pytest.fixture(scope="module")
def scenes() -> dict[str, list[Scene]]:
    """Small scenes of every modality."""
    return {
        modality: [render_scene(np.random.default_rng([3, number, case]), modality, 128) for case in range(SCENES_EACH)]
        for number, modality in enumerate(MODALITIES)
    }


def test_world_has_eight_modalities_and_many_structures() -> None:
    assert set(MODALITIES) == {"ct", "mr", "x_ray", "pet", "fundus", "dermoscopy", "endoscopy", "ultrasound"}
    assert len(CLASS_NAMES) - 1 >= 28
    assert CLASS_NAMES[0] == "background"
    assert set(CLASS_NAMES) >= LESIONS
    assert {name for modality in MODALITIES for name in structures_of(modality)} == set(CLASS_NAMES[1:])


@pytest.mark.parametrize("modality", MODALITIES)
def test_masks_are_the_visible_parts(scenes: dict[str, list[Scene]], modality: str) -> None:
    for scene in scenes[modality]:
        assert scene.image.shape == (128, 128, 3)
        assert scene.image.dtype == np.uint8
        assert 1 <= len(scene.structures) <= 5
        assert set(scene.present) <= set(structures_of(modality))
        assert set(scene.present) | set(scene.absent) == set(structures_of(modality))
        overlap = np.sum([structure.mask for structure in scene.structures], axis=0)
        assert overlap.max() == 1
        assert np.array_equal(scene.label_map() > 0, overlap > 0)


@pytest.mark.parametrize("modality", MODALITIES)
def test_structures_differ_from_their_surroundings(scenes: dict[str, list[Scene]], modality: str) -> None:
    """Inside and just outside of a mask the picture differs: a mask that slipped off its structure would not."""
    contrast: dict[str, list[float]] = defaultdict(list)
    for scene in scenes[modality]:
        picture = scene.image.astype(np.float32)
        for structure in scene.structures:
            ring = cv2.dilate(structure.mask.astype(np.uint8), np.ones((9, 9), np.uint8)).astype(bool)
            ring &= scene.label_map() == 0
            inside = cv2.erode(structure.mask.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
            if ring.sum() < 20 or inside.sum() < 20:
                continue
            centre = np.abs(picture[inside].mean(0) - picture[ring].mean(0)).max()
            spread = abs(float(picture[inside].std()) - float(picture[ring].std()))
            contrast[structure.name].append(max(float(centre), spread))
    assert set(contrast) == set(structures_of(modality))
    assert all(np.median(values) > 8 for values in contrast.values()), {k: np.median(v) for k, v in contrast.items()}


def test_most_targets_are_large_enough(scenes: dict[str, list[Scene]]) -> None:
    shares = [one.area / one.mask.size for group in scenes.values() for scene in group for one in scene.structures]
    assert np.mean(np.array(shares) >= 0.015) > 0.85
    assert min(shares) > 0.004


def test_each_optional_structure_is_in_about_half_of_the_scenes() -> None:
    found: Counter[tuple[str, str]] = Counter()
    count = 100
    for modality in MODALITIES:
        for case in range(count):
            scene = render_scene(np.random.default_rng([8, case, MODALITIES.index(modality)]), modality, 64)
            found.update((modality, name) for name in scene.present)
    for modality, plan in PLANS.items():
        assert all(found[modality, name] == count for name in plan.always)
        assert all(0.33 < found[modality, name] / count < 0.72 for name in plan.optional)


def test_a_seed_fixes_the_scene_and_another_changes_it() -> None:
    first, again, other = (render_scene(np.random.default_rng(seed), "fundus", 96) for seed in (5, 5, 6))
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.label_map(), again.label_map())
    assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("modality", MODALITIES)
def test_any_shape_can_be_drawn(modality: str) -> None:
    scene = render_scene(np.random.default_rng(1), modality, (120, 200))
    assert scene.image.shape == (120, 200, 3)
    assert all(structure.mask.shape == (120, 200) for structure in scene.structures)


def test_stream_can_start_anywhere_and_covers_all_modalities() -> None:
    whole = iter(PhantomStream(4, size=64))
    cases = [next(whole) for _ in range(8)]
    later, questions = next(iter(PhantomStream(4, start=5, size=64)))
    assert {scene.modality for scene, _ in cases} == set(MODALITIES)
    assert np.array_equal(later.image, cases[5][0].image)
    assert questions == cases[5][1]


TRAINING, HELD_OUT = 1000, 500
CLOSED = {"modality", "presence", "side", "relation", "region_check", "region_side"}

Case = tuple[Scene, list[Question]]


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """Many tiny scenes with their questions: the questions do not depend on how finely a scene is drawn."""
    stream = PhantomStream(21, size=64)
    return [stream.item(index) for index in range(TRAINING + HELD_OUT)]


def _records(cases: list[Case]) -> list[dict[str, Any]]:
    return [
        record_of(question, str(index), "images/x.png", scene.modality, "masks/{}.png".format)
        for index, (scene, questions) in enumerate(cases)
        for question in questions
    ]


def test_no_kind_can_be_answered_blind(cases: list[Case]) -> None:
    accuracy = blind_baseline(_records(cases[:TRAINING]), _records(cases[TRAINING:]))
    assert set(accuracy) >= {*CLOSED, "region_name", "list", "place", "finding"}
    assert max(accuracy.values()) <= 0.6, accuracy


def test_blind_baseline_sees_a_leak() -> None:
    """A set whose answer follows from the question is found out, one of coin flips is not."""
    rng = np.random.default_rng(0)

    def record(question: str, answer: str) -> dict[str, Any]:
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        return {"kind": question[0], "task": "vqa", "about": "", "conversations": turns}

    leaky = [record(f"a{n % 2} <region>masks/{n}.png</region>", ("Yes", "No")[n % 2]) for n in range(100)]
    fair = [record("b", ("Yes", "No")[int(rng.integers(2))]) for _ in range(400)]
    accuracy = blind_baseline(leaky + fair[:200], leaky + fair[200:])
    assert accuracy["a"] == 1.0
    assert accuracy["b"] < 0.6


def test_presence_questions_are_true_balanced_and_hard(cases: list[Case]) -> None:
    answers: Counter[str] = Counter()
    for scene, questions in cases:
        for question in (one for one in questions if one.kind in {"presence"}):
            assert (question.about in scene.present) == (question.answer == "Yes")
            answers[question.answer] += 1
            answers["other modality"] += question.about not in scene.plan.structures
    assert answers["Yes"] == answers["No"] > 500
    assert 0.15 * answers["No"] < answers["other modality"] < 0.35 * answers["No"]


@pytest.mark.parametrize("kind", ["presence", "region_check"])
def test_no_name_gives_its_yes_or_no_away(cases: list[Case], kind: str) -> None:
    yes: dict[str, list[bool]] = {}
    for _, questions in cases:
        for question in (one for one in questions if one.kind == kind):
            yes.setdefault(question.about, []).append(question.answer == "Yes")
    assert all(0.35 < np.mean(answers) < 0.65 for answers in yes.values()), {k: np.mean(v) for k, v in yes.items()}


def test_sides_are_true(cases: list[Case]) -> None:
    checked = 0
    for scene, questions in cases[:300]:
        for question in questions:
            if question.kind in {"side", "region_side"}:
                x, y = scene.structure(question.about).centre
                expected = {"Left": x < 0.5, "Right": x > 0.5, "Upper": y < 0.5, "Lower": y > 0.5}
                assert expected[question.answer]
                assert question.answer.lower() in question.question
                checked += 1
    assert checked > 200


def test_relations_are_true(cases: list[Case]) -> None:
    checked = 0
    for scene, questions in cases[:300]:
        for question in (one for one in questions if one.kind == "relation"):
            named = [name for name in scene.present if re.search(rf"\b{name}\b", question.question)]
            (other,) = [name for name in named if name != question.about]
            (x, y), (other_x, other_y) = scene.structure(question.about).centre, scene.structure(other).centre
            expected = {"Left": x < other_x, "Right": x > other_x, "Above": y < other_y, "Below": y > other_y}
            assert expected[question.answer]
            checked += 1
    assert checked > 100


def test_modality_is_not_in_the_question_that_asks_for_it(cases: list[Case]) -> None:
    for scene, questions in cases[:100]:
        (question,) = [one for one in questions if one.kind == "modality"]
        assert question.answer.lower() == scene.plan.spoken.lower()
        assert question.answer.lower() not in re.findall(r"[\w-]+", question.question.lower())


def test_grounding_writes_the_name_before_the_marker(cases: list[Case]) -> None:
    kinds: Counter[str] = Counter()
    for scene, questions in cases:
        for question in (one for one in questions if one.task == "grounding"):
            kinds[question.kind] += 1
            assert question.answer.count("<SEG>") == len(question.targets)
            pieces = question.answer.split("<SEG>")
            for name, before in zip(question.targets, pieces, strict=False):
                assert name in before
                assert name in scene.present
            if question.kind == "grounding_absent":
                assert question.about not in scene.present
                assert question.about in question.answer
                kinds["other modality"] += question.about not in scene.plan.structures
    assert 0.2 < kinds["other modality"] / kinds["grounding_absent"] < 0.45
    absent = kinds["grounding_absent"] / (sum(kinds.values()) - kinds["other modality"])
    assert 0.2 <= absent <= 0.3
    assert kinds["grounding_pair"] > 100


def test_every_kind_has_several_wordings(cases: list[Case]) -> None:
    wordings: dict[str, set[str]] = {}
    names = "|".join(sorted(CLASS_NAMES[1:], key=len, reverse=True))
    for _, questions in cases[:400]:
        for question in questions:
            bare = re.sub(rf"\b({names}|left|right|upper|lower|above|below|of|an?)\b", "", question.question)
            wordings.setdefault(question.kind, set()).add(bare)
    assert all(len(found) >= 4 for found in wordings.values()), {kind: len(found) for kind, found in wordings.items()}


def test_published_markup_names_the_files() -> None:
    two = Question("grounding_pair", "grounding", "Both?", "A <SEG> and b <SEG>.", "open", "a", (), ("a", "b"))
    region = Question("region_name", "region", "What is <region></region>?", "A", "open", "a", ("a",))
    assert two.published("masks/{}.png".format)[1] == (
        "A <SEG> and b <SEG>.<mask>masks/a.png</mask><mask>masks/b.png</mask>"
    )
    assert region.published("masks/{}.png".format)[0] == "What is <region>masks/a.png</region>?"
