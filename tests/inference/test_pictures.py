"""Pictures of an answer: written whole or not at all, and of a size that fits in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.data.image_io import ImageData
from model.errors import MedPLIBError
from model.inference.answer import Answer, Mask
from model.inference.predictor import PreparedImage
from model.visualize import draw_overlay, write_pictures


def prepared(height: int = 40, width: int = 30) -> PreparedImage:
    pixels = np.full((height, width, 3), 90, dtype=np.uint8)
    return PreparedImage("a key", ImageData(pixels, None, "array"), torch.zeros(0), torch.zeros(0), (1, 1))


def answer(height: int = 40, width: int = 30, count: int = 2) -> Answer:
    square = np.zeros((height, width), dtype=bool)
    square[5:20, 5:20] = True
    return Answer("<SEG>", [Mask.from_array(square, "liver", 0.5)] * count)


def test_masks_come_first_and_everybody_may_read_them(tmp_path: Path) -> None:
    files = write_pictures(tmp_path / "new" / "out", "scan", prepared(), answer())
    assert [file.name for file in files] == ["scan_mask_1.png", "scan_mask_2.png", "scan_overlay.png"]
    assert sorted(files) == sorted((tmp_path / "new" / "out").iterdir())
    assert all(file.stat().st_mode & 0o444 == 0o444 for file in files)
    assert (np.asarray(Image.open(files[0])) > 0).sum() == 15 * 15


def test_an_answer_without_pictures_writes_nothing(tmp_path: Path) -> None:
    assert write_pictures(tmp_path / "out", "scan", prepared(), answer(count=0)) == []
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_the_earlier_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {file: file.read_bytes() for file in write_pictures(tmp_path, "scan", prepared(), answer())}
    real, saved = Image.Image.save, []

    def save(image: Image.Image, path: Path, *rest: object, **options: object) -> None:
        saved.append(path)
        if len(saved) == 2:
            raise OSError(28, "No space left on device")
        real(image, path, *rest, **options)

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(MedPLIBError, match="No space left") as raised:
        write_pictures(tmp_path, "scan", prepared(), answer(count=3))
    assert "\n" not in str(raised.value)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("image", "overlay"),
    [((64, 128), (256, 512)), ((300, 500), (300, 500)), ((2, 3000), (3, 4096)), ((1, 9000), (1, 9000))],
)
def test_small_images_are_enlarged_within_reason(image: tuple[int, int], overlay: tuple[int, int]) -> None:
    mask = Mask.from_array(np.ones(image, dtype=bool), "liver", 0.5)
    drawn = draw_overlay(np.zeros((*image, 3), dtype=np.uint8), [mask], np.ones(image, dtype=bool))
    assert drawn.shape == (*overlay, 3)
    assert drawn.any()
