"""Masks over an image."""

from __future__ import annotations

import numpy as np
import pytest

from model.errors import MedPLIBError
from model.inference.answer import Mask
from model.serve.web.pictures import colour, overlay, read_masks
from model.visualize import PALETTE

GREY = np.full((60, 80, 3), 100, dtype=np.uint8)


def square(top: int, left: int, side: int = 20, label: str = "liver", score: float = 0.87) -> Mask:
    inside = np.zeros(GREY.shape[:2], dtype=bool)
    inside[top : top + side, left : left + side] = True
    return Mask.from_array(inside, label, score)


def test_each_mask_has_its_colour_and_the_picture_is_left_as_it_is() -> None:
    before = GREY.copy()
    drawn = overlay(GREY, [square(5, 5), square(5, 50)], opacity=0.5, contour=False)
    assert np.array_equal(GREY, before)
    for number, place in ((0, (10, 10)), (1, (10, 60))):
        assert drawn[place].tolist() == [(100 + channel) // 2 for channel in colour(number)]
    assert (drawn[40:] == 100).all()
    assert [colour(number) for number in range(7)] == list(PALETTE)
    assert colour(7) == colour(0)


def test_masks_are_shown_one_by_one_with_or_without_outline() -> None:
    masks = [square(5, 5), square(5, 50)]
    second = overlay(GREY, masks, [False, True], opacity=1, contour=False)
    assert (second[:, :40] == 100).all()
    assert second[10, 60].tolist() == list(colour(1))
    assert np.array_equal(overlay(GREY, masks, [False, False]), GREY)
    assert np.array_equal(overlay(GREY, masks, opacity=0, contour=False), GREY)
    outline = overlay(GREY, [masks[0].to_array()], opacity=0, contour=True)
    assert np.abs(outline[5, 15].astype(int) - colour(0)).max() < 20  # smoothed
    assert (outline[15, 15] == 100).all()
    assert np.array_equal(overlay(GREY, masks, [False], opacity=7, contour=False)[10, 60], colour(1))


def test_empty_masks_and_single_pixels_are_drawn() -> None:
    nothing = Mask.from_array(np.zeros((60, 80), dtype=bool), "", 0.1)
    assert np.array_equal(overlay(GREY, [nothing]), GREY)
    dot = np.zeros((60, 80), dtype=bool)
    dot[59, 79] = True
    assert overlay(GREY, [dot], opacity=1)[59, 79].tolist() == list(colour(0))
    one = np.zeros((1, 1, 3), dtype=np.uint8)
    assert overlay(one, [np.ones((1, 1), dtype=bool)], opacity=1).tolist() == [[list(colour(0))]]


def test_a_mask_of_another_size_is_told_of() -> None:
    wrong = np.ones((30, 80), dtype=bool)
    with pytest.raises(MedPLIBError, match="30×80, the image 60×80"):
        overlay(GREY, [wrong])


def test_masks_are_read_with_the_spacing_of_their_slice() -> None:
    stored = [square(5, 5).to_dict()]
    assert [mask.area_mm2 for mask in read_masks(stored)] == [None]
    (mask,) = read_masks(stored, spacing_mm=(0.5, 2.0))
    assert (mask.label, mask.area_px, mask.area_mm2) == ("liver", 400, 400.0)


def test_masks_come_back_from_what_an_answer_stores() -> None:
    mask = square(5, 5)
    (again,) = read_masks([mask.to_dict()])
    assert again == mask
    for wrong in ({}, {"rle": None, "bbox": [0, 0, 1, 1], "area_px": 1}, {**mask.to_dict(), "area_px": "many"}):
        with pytest.raises(MedPLIBError, match="malformed mask"):
            read_masks([wrong])
