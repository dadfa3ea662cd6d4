"""Pictures of answered questions: the image, the reference masks on it, and the predicted ones, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from model.eval.predictions import Prediction
from model.inference.answer import Mask
from model.inference.overlay import draw_overlay
from model.processing.masks import decode_rle

_GAP = 4  # pixels between the pictures


def draw_comparison(pixels: np.ndarray, prediction: Prediction) -> np.ndarray:
    """The image, its reference masks and its predicted masks side by side.

    Args:
        pixels: the image, uint8 [H, W, 3].
        prediction: whose masks are of the image's size.

    Returns:
        uint8 [H', 3 W' + gaps, 3], enlarged where the image is small.
    """
    reference = [Mask.from_array(decode_rle(rle), "reference", 1.0) for rle in prediction.gt_masks or []]
    predicted = [_mask(mask) for mask in prediction.masks]
    panes = [draw_overlay(pixels, masks) for masks in ([], reference, predicted)]
    gap = np.full((panes[0].shape[0], _GAP, 3), 255, dtype=np.uint8)
    return np.concatenate([panes[0], gap, panes[1], gap, panes[2]], axis=1)


def write_comparison(folder: Path, number: int, pixels: np.ndarray, prediction: Prediction) -> Path | None:
    """Write ``NUMBER_TURN_IMAGE.png`` for a row that has masks, or should have; None for any other.

    Args:
        folder: made if it is not there.
        number: of the record in its file; orders the pictures.
        pixels: uint8 [H, W, 3].
        prediction: the row.
    """
    if prediction.failed or not (prediction.masks or prediction.gt_masks):
        return None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{number:06d}_{prediction.key[1]}_{Path(prediction.image_path).stem}.png"
    Image.fromarray(draw_comparison(pixels, prediction)).save(path)
    return path


def _mask(found: Mapping[str, Any]) -> Mask:
    return Mask.from_array(decode_rle(found["rle"]), str(found.get("label", "")), float(found.get("score") or 0.0))
