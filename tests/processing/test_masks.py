"""Regions on the grid, run lengths, boxes."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as coco

from model.errors import MedPLIBError
from model.processing.masks import (
    bounding_box,
    decode_rle,
    encode_rle,
    example_mask_input,
    largest_component,
    random_sub_region,
    region_grid,
    sampled_region_grid,
    threshold_mask,
)


def disc(size: tuple[int, int], centre: tuple[float, float], radius: float) -> np.ndarray:
    rows, columns = np.ogrid[: size[0], : size[1]]
    return (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 <= radius**2


def test_region_lands_on_the_patches_that_show_it() -> None:
    mask = np.zeros((100, 200), dtype=bool)
    mask[:50, :100] = True  # upper left quarter of a wide image: columns 0–11, below the padding, rows 6–11
    expected = np.zeros((24, 24), dtype=np.float32)
    expected[6:12, :12] = 1
    np.testing.assert_array_equal(region_grid(mask), expected)
    assert region_grid(mask, clip_size=140, grid=10).shape == (10, 10)


def test_tiny_region_that_falls_between_the_samples_is_kept() -> None:
    mask = np.zeros((512, 512), dtype=bool)
    mask[300, 411] = True
    assert not sampled_region_grid(mask).any()  # the published behaviour: the region is lost
    cells = np.argwhere(region_grid(mask))
    np.testing.assert_array_equal(cells, [[300 * 24 // 512, 411 * 24 // 512]])


@pytest.mark.parametrize("size", [(512, 512), (301, 97), (64, 255), (17, 23), (3, 900)])
def test_no_single_pixel_is_ever_lost(size: tuple[int, int]) -> None:
    for row, column in np.random.default_rng(1).integers(0, size, (40, 2)):
        mask = np.zeros(size, dtype=bool)
        mask[row, column] = True
        assert region_grid(mask).sum() >= 1


def test_empty_or_misshapen_region_is_refused() -> None:
    with pytest.raises(MedPLIBError, match="empty"):
        region_grid(np.zeros((20, 20), dtype=bool))
    with pytest.raises(MedPLIBError, match="H×W"):
        region_grid(np.ones((20, 20, 3), dtype=bool))


def test_sub_region_is_a_random_connected_part_of_the_largest_component() -> None:
    mask = disc((24, 24), (8, 8), 6).astype(np.float32)
    mask[20:23, 20:23] = 1
    body = largest_component(mask)
    rng = np.random.default_rng(3)
    shares = []
    for _ in range(200):
        part = random_sub_region(mask, rng)
        assert part.dtype == mask.dtype
        assert not (part.astype(bool) & ~body).any()
        assert cv2.connectedComponents(part.astype(np.uint8), connectivity=8)[0] == 2  # background and one part
        shares.append(part.sum() / body.sum())
    assert 0.19 <= min(shares) < 0.3
    assert 0.9 < max(shares) <= 1
    assert 0.5 < np.mean(shares) < 0.7  # uniform over 0.2 … 1.0, not nearly always the whole


def test_sub_region_repeats_with_its_generator() -> None:
    mask = disc((24, 24), (12, 12), 8)
    first, second = (random_sub_region(mask, np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert random_sub_region(np.zeros((4, 4)), np.random.default_rng(0)).sum() == 0
    single = np.zeros((4, 4))
    single[1, 2] = 1
    np.testing.assert_array_equal(random_sub_region(single, np.random.default_rng(0)), single)


@pytest.mark.parametrize("kind", ["noise", "disc", "empty", "full", "one row"])
def test_rle_round_trips_and_agrees_with_coco(kind: str) -> None:
    rng = np.random.default_rng(0)
    mask = {
        "noise": rng.random((37, 53)) > 0.5,
        "disc": disc((600, 500), (300, 200), 150),
        "empty": np.zeros((5, 7), dtype=bool),
        "full": np.ones((5, 7), dtype=bool),
        "one row": rng.random((1, 90)) > 0.3,
    }[kind]
    rle = encode_rle(mask)
    assert isinstance(rle["counts"], str)
    assert rle["size"] == list(mask.shape)
    np.testing.assert_array_equal(decode_rle(rle), mask)
    np.testing.assert_array_equal(coco.decode(rle).astype(bool), mask)
    assert decode_rle({"size": rle["size"], "counts": rle["counts"].encode()}).dtype == bool


def test_uncompressed_rle_is_read() -> None:
    np.testing.assert_array_equal(decode_rle({"size": [2, 2], "counts": [1, 2, 1]}), [[False, True], [True, False]])


@pytest.mark.parametrize(
    "rle",
    [
        {"size": [2, 2], "counts": "zzzzzzzzzzzzzzz"},
        {"size": [2, 2], "counts": "\x01"},
        {"size": [2, 2], "counts": [1, 2]},
        {"size": [2, 2], "counts": [5, -1]},
        {"size": [1 << 40, 1 << 40], "counts": "4"},
        {"size": [1 << 20, 1 << 20], "counts": [1 << 40]},
        {"size": [2], "counts": "4"},
        {"size": [float("inf"), 2], "counts": "4"},
        {"counts": "4"},
        {"size": [2, 2], "counts": 4},
    ],
)
def test_damaged_rle_is_refused(rle: dict[str, object]) -> None:
    with pytest.raises(MedPLIBError, match="mask encoding"):
        decode_rle(rle)


def test_bounding_box_excludes_right_and_bottom() -> None:
    mask = np.zeros((10, 20), dtype=bool)
    mask[2:5, 7:11] = True
    assert bounding_box(mask) == [7, 2, 11, 5]
    assert bounding_box(np.zeros((3, 3), dtype=bool)) == [0, 0, 0, 0]


def test_threshold_is_a_probability() -> None:
    logits = torch.tensor([[-3.0, -2.0, 0.0, 2.0]])  # 0.047, 0.119, 0.5, 0.88
    np.testing.assert_array_equal(threshold_mask(logits, 0.1), [[False, True, True, True]])
    np.testing.assert_array_equal(threshold_mask(logits, 0.5), [[False, False, False, True]])


def test_example_masks_are_scaled_to_clip_geometry() -> None:
    mask = np.zeros((4, 8), dtype=bool)
    mask[:2, :4] = True
    example = example_mask_input(mask, 32)
    assert example.shape == (1, 32, 32)
    assert example[0, 8:16, :16].all()
    assert example.sum() == 8 * 16
