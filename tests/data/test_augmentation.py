from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from torch.utils.data import DataLoader

from model.data.augmentation import AugmentationConfig, augment_pictures, tells_colors, tells_places
from model.data.dataset import MedPLIBDataset
from model.data.sampling import Draw
from model.errors import MedPLIBError
from tests.data.test_dataset import Echo

GEOMETRY = AugmentationConfig(
    horizontal_flip=(0.5,), vertical_flip=(0.5,), rotation=(1, 40), scale=(1, 0.3), translation=(1, 0.1)
)


def picture(size: tuple[int, int] = (96, 120)) -> tuple[np.ndarray, list[np.ndarray]]:
    """A red disc and a green box on black; the masks are what the channels say."""
    image = np.zeros((*size, 3), np.uint8)
    cv2.circle(image, (70, 40), 18, (220, 0, 0), -1)
    cv2.rectangle(image, (20, 50), (45, 80), (0, 220, 0), -1)
    return image, [image[..., 0] > 110, image[..., 1] > 110]


def changed(config: AugmentationConfig, seed: int, **options: Any) -> tuple[np.ndarray, list[np.ndarray]]:
    image, masks = picture()
    return augment_one(image, masks, np.random.default_rng(seed), config, **{"flip_allowed": True, **options})


def augment_one(image: np.ndarray, *arguments: Any, **options: Any) -> tuple[np.ndarray, list[np.ndarray]]:
    (changed,), masks = augment_pictures([image], *arguments, **options)
    return changed, masks


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())


def test_masks_follow_the_picture() -> None:
    before, masks = picture()
    moved = 0
    for seed in range(40):
        image, found = changed(GEOMETRY, seed)
        assert image.dtype == np.uint8 and image.shape == before.shape
        for channel, mask in enumerate(found):
            assert mask.dtype == np.bool_
            assert overlap(mask, image[..., channel] > 110) > 0.9
        moved += overlap(found[1], masks[1]) < 0.8
    assert moved > 20


def test_uint8_masks_keep_values_and_inputs_stay() -> None:
    image, masks = picture()
    copies = image.copy(), masks[0].copy()
    numbers = masks[0].astype(np.uint8) * 255
    strong = AugmentationConfig(preset="strong")
    _, (found,) = augment_one(image, [numbers], np.random.default_rng(1), strong, flip_allowed=True)
    assert found.dtype == np.uint8 and set(np.unique(found)) == {0, 255}
    assert np.array_equal(image, copies[0]) and np.array_equal(masks[0], copies[1])


def test_the_same_generator_gives_the_same_picture() -> None:
    strong = AugmentationConfig(preset="strong")
    first, second, other = (changed(strong, seed)[0] for seed in (3, 3, 4))
    assert np.array_equal(first, second) and not np.array_equal(first, other)


def test_a_flip_is_exact_and_forbidden_where_sides_matter() -> None:
    before, masks = picture()
    image, found = changed(AugmentationConfig(horizontal_flip=(1,)), 0)
    assert np.array_equal(image, before[:, ::-1]) and np.array_equal(found[0], masks[0][:, ::-1])
    image, found = changed(AugmentationConfig(horizontal_flip=(1,), vertical_flip=(1,)), 0, flip_allowed=False)
    assert np.array_equal(image, before) and np.array_equal(found[0], masks[0])
    centers = [np.argwhere(changed(GEOMETRY, seed, flip_allowed=False)[1][0]).mean(axis=0) for seed in range(30)]
    assert np.abs(np.array(centers) - np.argwhere(masks[0]).mean(axis=0)).max() < 12  # pixels: places stay


def test_presets_never_flip_vertically() -> None:
    for preset in ("none", "light", "strong"):
        settings = AugmentationConfig(preset=preset).settings()
        assert settings["vertical_flip"] == (0, 0)
        assert (settings["horizontal_flip"][0] > 0) == AugmentationConfig(preset=preset).active == (preset != "none")
    assert AugmentationConfig(preset="strong", rotation=(0.1, 3.0)).settings()["rotation"] == (0.1, 3.0)


def test_targets_at_the_edge_are_not_cut_off() -> None:
    image, mask = np.zeros((80, 80, 3), np.uint8), np.zeros((80, 80), bool)
    mask[30:40, 72:80] = True
    far = AugmentationConfig(translation=(1, 0.6))
    unmoved = 0
    for seed in range(60):
        _, (found,) = augment_one(image, [mask], np.random.default_rng(seed), far, flip_allowed=True)
        assert found.sum() >= mask.sum() / 2
        unmoved += np.array_equal(found, mask)
    assert 0 < unmoved < 40


def test_colors_change_in_color_pictures_alone() -> None:
    colors = AugmentationConfig(hue=(1, 30), saturation=(1, 0.5))
    grey = np.repeat(np.random.default_rng(0).integers(0, 256, (40, 40, 1), np.uint8), 3, axis=2)
    same, _ = augment_one(grey, [], np.random.default_rng(0), colors, flip_allowed=True)
    assert np.array_equal(same, grey)
    noisy, _ = augment_one(
        grey, [], np.random.default_rng(0), AugmentationConfig(noise=(1, 9), blur=(1, 2)), flip_allowed=True
    )
    assert not np.array_equal(noisy, grey) and (noisy == noisy[..., :1]).all()
    image, (disc, _) = changed(colors, 5)
    assert not np.array_equal(image, picture()[0]) and np.array_equal(disc, picture()[1][0])


@pytest.mark.parametrize(
    "text",
    [
        "Segment the left lung.",
        "<image>\nIs the liver in the Upper half?",
        "Where is the polyp?",
        "region_side",
        "On which side?",
        "Is it in the top-right quadrant?",
        "the inferolateral wall",
        "Outline the RV.",
        "a right-sided effusion",
        "Which is above the kidney?",
    ],
)
def test_texts_that_tell_places(text: str) -> None:
    assert tells_places([None, "Segment it.", text])


@pytest.mark.parametrize(
    "text",
    [
        "Segment the liver.",
        "Is there a bright lesion?",
        "grounding_absent",
        "Sure, it is <SEG>.",
        "a topical stopper",
        "",
    ],
)
def test_texts_without_places(text: str) -> None:
    assert not tells_places([text, None, 3])
    assert not tells_colors([text])


def test_texts_about_colors_are_recognized() -> None:
    assert tells_colors(["What color is it?"]) and tells_colors(["Which colour?"]) and tells_colors(["H&E staining"])


class Pixels(Echo):
    """Gives the pixels on, too."""

    def encode(self, turns: Any, images: Any, *args: Any, **options: Any) -> dict[str, Any]:
        return {**super().encode(turns, images, *args, **options), "pixels": images}


def dataset(folder: Any, records: list[Any], training: bool = True, **values: Any) -> MedPLIBDataset:
    config = AugmentationConfig(**{"preset": "strong", **values})
    path = folder.write_records(records)
    return MedPLIBDataset(path, folder.root, Pixels(), training=training, augmentation=config)


def test_training_items_change_by_epoch_and_record_alone(folder: Any) -> None:
    data = dataset(folder, [folder.grounding() for _ in range(4)])
    before = [data[index] for index in range(4)]
    assert not np.array_equal(before[0]["pixels"][0], before[1]["pixels"][0])
    assert np.array_equal(data[2]["pixels"][0], before[2]["pixels"][0])
    loader = DataLoader(data, batch_size=2, num_workers=1, collate_fn=list)
    for item, own in zip((item for batch in loader for item in batch), before, strict=True):
        assert np.array_equal(item["pixels"][0], own["pixels"][0]) and np.array_equal(item["masks"], own["masks"])
    data.set_epoch(1)
    assert not np.array_equal(data[2]["pixels"][0], before[2]["pixels"][0])
    still = dataset(folder, [folder.grounding()], training=False)
    assert np.array_equal(still[0]["pixels"][0], still.load(0).images[0])


def test_each_draw_of_a_record_changes_it_anew(folder: Any) -> None:
    data = dataset(folder, [folder.grounding()])
    first, again = data.item(0), data.item(0, 1)
    assert not np.array_equal(first["pixels"][0], again["pixels"][0])
    assert np.array_equal(data[Draw.of(0, 1)]["pixels"][0], again["pixels"][0])


def test_side_questions_are_never_flipped(folder: Any) -> None:
    flip = {"preset": "none", "horizontal_flip": (1,)}
    sided = {"kind": "side"}, {"about": "left lung"}, {}
    records = [folder.grounding(**more) for more in sided]
    records.append(folder.record("<image>\nIs the liver on the left?", "No."))
    data = dataset(folder, records, **flip)
    whole = data.load(0)
    for index, flipped in enumerate((False, False, True, False)):
        expected = whole.images[0][:, ::-1] if flipped else whole.images[0]
        assert np.array_equal(data[index]["pixels"][0], expected), index
    assert np.array_equal(data[2]["masks"][0], whole.masks[0][:, ::-1])


def test_regions_follow_and_caches_are_refused(folder: Any) -> None:
    data = dataset(folder, [folder.region()], preset="none", horizontal_flip=(1,))
    assert np.array_equal(data[0]["regions"][0], data.load(0).regions[0][:, ::-1])
    with pytest.raises(MedPLIBError, match="augmentation changes pictures"):
        data.use_features(object())  # type: ignore[arg-type]
