"""Mismatches are listed readably, by family, with what to do."""

from __future__ import annotations

import pytest

from model.checkpoint.report import compare
from model.errors import MedPLIBError

EXPECTED = {f"model.decoder.layers.{layer}.norm.weight": (4,) for layer in range(40)} | {"lm_head.weight": (9, 4)}


def test_a_fit_raises_nothing() -> None:
    report = compare("here", EXPECTED, EXPECTED, ignored=3)
    report.raise_unless_fits()
    assert report.fits
    assert str(report) == "here: 41 tensors fit, 3 buffers without content left out"


def test_every_kind_of_mismatch_is_counted_and_shown() -> None:
    found = {"lm_head.weight": (8, 4), "surprise": (1,)}
    report = compare("here", found, EXPECTED, unexpected=["stranger"], notes=["a choice"])
    with pytest.raises(MedPLIBError) as raised:
        report.raise_unless_fits()
    first, *listing = str(raised.value).splitlines()
    assert "40 missing, 2 unexpected, 1 of another shape" in first
    text = "\n".join(listing)
    assert "(and 39 more like it)" in text
    assert "stranger" in text
    assert "surprise" in text
    assert "lm_head.weight is [8, 4], expected [9, 4]" in text
    assert "a choice" in text
    assert len(listing) < 12


@pytest.mark.parametrize(
    ("key", "advice"), [("model.vision_tower.clip.a", "--vision_tower"), ("model.sam.a", "--vision_pretrained")]
)
def test_advice_fits_the_part(key: str, advice: str) -> None:
    with pytest.raises(MedPLIBError, match=advice):
        compare("here", {}, {key: (1,)}).raise_unless_fits()
