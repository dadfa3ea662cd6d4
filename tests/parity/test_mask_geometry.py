"""The read-out of masks reproduces the published arrays."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from model.modeling.mask_head import restore_masks

SIZES = ["301x97", "64x255", "257x255", "17x23", "200x150", "127x383", "1x300"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("geometry", ["exact", "legacy"])  # they agree where the mask is as large as SAM's input
def test_masks_at_input_size(golden: Path, size: str, geometry: str) -> None:
    arrays = np.load(golden / "1_preprocess" / "postprocess.npz")
    facts = json.loads((golden / "1_preprocess" / "meta.json").read_text())["postprocess"]
    assert sorted(facts) == sorted(SIZES)
    height, width = (int(number) for number in size.split("x"))
    (mask,) = restore_masks(
        torch.from_numpy(arrays["low_res"]), [tuple(facts[size]["resize"])], [(height, width)], 256, geometry
    )
    torch.testing.assert_close(mask, torch.from_numpy(arrays[f"out_{size}"])[0, 0], rtol=1e-5, atol=1e-5)
