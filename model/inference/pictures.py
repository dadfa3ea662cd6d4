"""Write an answer's masks and overlay as PNG files."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from model.errors import MedPLIBError
from model.inference.answer import Answer
from model.inference.overlay import draw_overlay
from model.inference.predictor import PreparedImage
from model.inference.regions import Region, region_to_mask


def write_pictures(
    out: Path, stem: str, image: PreparedImage, answer: Answer, region: Region | None = None
) -> list[Path]:
    """Write ``STEM_mask_1.png`` … (0 and 255, at image size) and ``STEM_overlay.png``.

    Nothing is written for an answer without masks about no region.

    Returns:
        The files, masks first.

    Raises:
        MedPLIBError: the folder cannot be written.
    """
    marked = region_to_mask(region, image.size) if region is not None else None
    if not answer.masks and marked is None:
        return []
    pictures = {
        out / f"{stem}_mask_{number}.png": mask.to_array().astype(np.uint8) * 255
        for number, mask in enumerate(answer.masks, start=1)
    }
    pictures[out / f"{stem}_overlay.png"] = draw_overlay(image.data.pixels, answer.masks, marked)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path, pixels in pictures.items():
            _write_png(path, pixels)
    except OSError as error:
        raise MedPLIBError(f"cannot write pictures to {out}: {error.strerror}; name a writable folder") from error
    return list(pictures)


def _write_png(path: Path, pixels: np.ndarray) -> None:
    """Write to a temporary name and rename, so that no half-written picture is ever seen."""
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".png", delete=False) as file:
        Image.fromarray(pixels).save(file, format="PNG")
    umask = os.umask(0)
    os.umask(umask)
    Path(file.name).chmod(0o666 & ~umask)
    Path(file.name).replace(path)
