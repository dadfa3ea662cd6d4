"""The U-Net benchmark runs from end to end with a tiny network in place of MONAI's; what it scores is not judged."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from torch import nn

from model.cli import main
from tests.bench_scripts import bench_script


def drawn_source(folder: Path) -> Path:
    """Twelve pictures of a bright square, and their masks."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks/square"):
        (folder / name).mkdir(parents=True)
    for number in range(12):
        top, left = rng.integers(4, 30, 2)
        mask = np.zeros((64, 64), np.uint8)
        mask[top : top + 24, left : left + 24] = 255
        Image.fromarray(mask // 2 + rng.integers(0, 90, mask.shape, np.uint8)).save(folder / f"images/p{number}.png")
        Image.fromarray(mask).save(folder / f"masks/square/p{number}.png")
    return folder


def test_every_set_gets_a_network_and_a_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def small(spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
        return nn.Conv2d(in_channels, out_channels, 3, padding=1)

    for name in ("monai", "monai.networks", "monai.networks.nets"):
        stand_in = SimpleNamespace(BasicUNet=small, __spec__=SimpleNamespace())
        monkeypatch.setitem(sys.modules, name, stand_in)  # type: ignore[arg-type]
    source, built, out = drawn_source(tmp_path / "source"), tmp_path / "data" / "squares", tmp_path / "unet"
    assert main(["data", "build", str(source), "--out", str(built), "--modality", "ultrasound"]) == 0
    monkeypatch.setattr("sys.argv", ["unet.py", "--data", str(built.parent), "--out", str(out), "--minutes", "0.01"])
    with bench_script("unet") as script:
        assert script.main() == 0
        assert script.main() == 0  # what is measured is not measured again
    (found,) = json.loads((out / "unet.json").read_text()).items()
    key, scores = found
    assert key == "squares/ultrasound"
    assert scores["steps"] >= 50 and 0 <= scores["validation"] <= 1
    assert 0 <= scores["test"]["square"] <= 1
