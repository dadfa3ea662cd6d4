"""Boxes, points and masks become regions, or one clear sentence."""

from __future__ import annotations

import numpy as np
import pytest

from model.errors import MedPLIBError
from model.inference.regions import place_region, region_to_mask


def test_box_covers_its_pixels() -> None:
    mask = region_to_mask(("box", (2, 1, 5, 4)), (10, 20))
    assert mask.shape == (10, 20) and mask.sum() == 9 and mask[1:4, 2:5].all()


def test_point_is_a_small_disc_and_never_empty() -> None:
    assert region_to_mask(("point", (3, 3)), (7, 7))[3, 3]
    disc = region_to_mask(("point", (50, 60)), (100, 100))
    assert disc[60, 50] and 10 < disc.sum() < 60


@pytest.mark.parametrize(
    "region",
    [
        ("box", (5, 5, 5, 9)),
        ("box", (-1, 0, 5, 5)),
        ("box", (0, 0, 21, 5)),
        ("box", (0, 0, 5)),
        ("box", ("a", 0, 5, 5)),
        ("point", (20, 0)),
        ("point", (float("nan"), 0)),
        ("circle", (1, 1)),
        np.zeros((10, 20)),
        np.ones((20, 10)),
    ],
)
def test_bad_regions_are_one_sentence(region: object) -> None:
    with pytest.raises(MedPLIBError) as error:
        region_to_mask(region, (10, 20))  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("question", "placed"),
    [
        ("What is in the region <region></region>?", "What is in the region <region></region>?"),
        ("What is in this region?", "What is in this region <region></region>?"),
        ("What is this?", "What is this <region></region>?"),
        ("Describe it", "Describe it <region></region>"),
    ],
)
def test_marker_finds_its_place(question: str, placed: str) -> None:
    assert place_region(question) == placed


def test_wrong_number_of_markers_is_refused() -> None:
    with pytest.raises(MedPLIBError, match="2 times, and 1 region is marked"):
        place_region("<region></region> or <region></region>?", 1)
