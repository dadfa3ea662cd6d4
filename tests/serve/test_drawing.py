"""What is drawn on the page becomes a region of the image's size, or a sentence."""

from __future__ import annotations

import numpy as np
import pytest

from model.errors import MedPLIBError
from model.serve.web.state import MAX_POINTS, read_mark

SIZE = (60, 80)  # height, width


def region(kind: str, *points: tuple[float, float]) -> np.ndarray:
    return read_mark({"kind": kind, "points": [list(point) for point in points]}, SIZE).region


def test_a_point_is_a_small_disc_around_it():
    inside = region("point", (30.4, 20.9))
    assert inside.shape == SIZE and inside[20, 30] and not inside[30, 30] and 1 < inside.sum() < 40


@pytest.mark.parametrize("corners", [((10, 5), (30, 25)), ((30, 25), (10, 5)), ((30, 5), (10, 25))])
def test_a_box_may_be_drawn_from_any_corner(corners):
    inside = region("box", *corners)
    assert inside.sum() == 20 * 20 and inside[5:25, 10:30].all()


def test_what_hangs_over_the_edge_is_cut_off():
    assert region("box", (70, 50), (200, 200)).sum() == 10 * 10
    assert region("free", (70, 50), (200, 50), (200, 200), (70, 200))[50:, 70:].all()


def test_an_outline_is_filled_and_closed():
    inside = region("free", (10, 10), (40, 10), (40, 40), (10, 40))
    assert inside[11:40, 11:40].all() and not inside[:9].any() and not inside[:, 43:].any()


def test_a_mere_stroke_is_a_region():
    assert region("free", (10, 10), (40, 12)).any()
    assert region("free", (10, 10)).any()


@pytest.mark.parametrize(
    ("drawn", "sentence"),
    [
        (None, "cannot be read"),
        ({}, "cannot be read"),
        ({"kind": "circle", "points": [[1, 1]]}, "cannot be read"),
        ({"kind": ["box"], "points": [[1, 1]]}, "cannot be read"),
        ({"kind": "point"}, "1 to 5000 points"),
        ({"kind": "point", "points": []}, "1 to 5000 points"),
        ({"kind": "point", "points": [[1, 2], [3, 4]]}, "a point was drawn with 2"),
        ({"kind": "box", "points": [[1, 2]]}, "a box was drawn with 1"),
        ({"kind": "box", "points": [[1, 2], ["a", 4]]}, "not x and y"),
        ({"kind": "box", "points": [[1, 2], [3]]}, "not x and y"),
        ({"kind": "box", "points": [[1, 2], [float("nan"), 3]]}, "not x and y"),
        ({"kind": "free", "points": [[1, 2, 3]]}, "not x and y"),
        ({"kind": "free", "points": "abc"}, "not x and y"),
        ({"kind": "free", "points": [[1, 1]] * (MAX_POINTS + 1)}, "1 to 5000 points"),
        ({"kind": "point", "points": [[80, 10]]}, "lies outside the image"),
        ({"kind": "point", "points": [[-1, 10]]}, "lies outside the image"),
        ({"kind": "box", "points": [[100, 10], [140, 20]]}, "lies outside the image"),
        ({"kind": "box", "points": [[10, 10], [10, 40]]}, "smaller than a pixel"),
        ({"kind": "free", "points": [[1e12, 1e12], [2e12, 1e12]]}, "lies outside the image"),
    ],
)
def test_what_is_no_mark_is_told(drawn, sentence):
    with pytest.raises(MedPLIBError, match=sentence):
        read_mark(drawn, SIZE)


def test_the_browser_gets_back_what_it_drew():
    mark = read_mark({"kind": "box", "points": [[30, 25], [10, 5]]}, SIZE)
    told = mark.describe(2, spent=True)
    assert told == {"kind": "box", "points": [[30, 25], [10, 5]], "number": 2, "spent": True}
