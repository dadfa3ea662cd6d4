"""Write an answer's masks and overlay as PNG files."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from model.errors import MedPLIBError
from model.inference.answer import Answer, Mask
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
        with tempfile.TemporaryDirectory(dir=out, prefix=".pictures-") as name:
            staged = {Path(name) / path.name: path for path in pictures}
            for temporary, path in staged.items():
                Image.fromarray(pictures[path]).save(temporary)
            for temporary, path in staged.items():  # all are whole before the first is seen
                temporary.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise MedPLIBError(f"cannot write pictures to {out}: {reason}; name a writable folder") from error
    return list(pictures)


def mask_line(mask: Mask) -> str:
    """A mask in one line for people."""
    area = f"{mask.area_px} px" if mask.area_mm2 is None else f"{mask.area_px} px ({mask.area_mm2:.1f} mm²)"
    warning = f" (warning: {mask.warning})" if mask.warning else ""
    return f"{mask.label or 'mask'}: score {mask.score:.2f}, {area}, box {list(mask.bbox)}{warning}"
