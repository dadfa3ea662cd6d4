"""Phantom scenes: deterministic, varied, with exact masks that do not overlap."""

from __future__ import annotations

from collections import Counter, defaultdict

import cv2
import numpy as np
import pytest

from model.data.builders.phantom import PhantomStream
from model.data.builders.phantom_scenes import (
    CLASS_NAMES,
    LESIONS,
    MODALITIES,
    PLANS,
    Scene,
    render_scene,
    structures_of,
)

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
def test_structures_can_be_told_from_their_surroundings(scenes: dict[str, list[Scene]], modality: str) -> None:
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
