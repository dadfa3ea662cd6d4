"""Masks over images: overlays with a legend, outlines of predicted and reference masks, PNG files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from model.errors import MedPLIBError
from model.inference.answer import Answer, Mask
from model.inference.regions import Region, region_to_mask
from model.processing.masks import bounding_box, decode_rle

if TYPE_CHECKING:  # they import torch
    from model.eval.predictions import Prediction
    from model.inference.images import PreparedImage

# Distinct for most colour-blind readers (Okabe–Ito), bright enough on dark medical images.
PALETTE = ((86, 180, 233), (230, 159, 0), (0, 158, 115), (204, 121, 167), (240, 228, 66), (213, 94, 0), (0, 114, 178))
ALPHA = 0.4
PICTURE_SIDE = 384
"""Longer side of a picture in a report in pixels: twice what the page shows, so that it is sharp on fine screens."""
_LEGIBLE, _LARGEST = 256, 4096  # pixels: shorter side for a legend to be read, longer side that enlarging may reach


def draw_overlay(image: np.ndarray, masks: list[Mask], region: np.ndarray | None = None) -> np.ndarray:
    """Blend masks over an image.

    Args:
        image: uint8 [H, W, 3].
        masks: masks at image size, each in its own colour with its label and score.
        region: bool [H, W], the region that was asked about, drawn as a white contour.

    Returns:
        uint8 [H, W, 3], enlarged to 256 pixels on the shorter side so that the legend can be read, but to no more than
        4096 on the longer one.
    """
    height, width = image.shape[:2]
    scale = max(1.0, min(_LEGIBLE / min(height, width), _LARGEST / max(height, width)))
    size = (round(width * scale), round(height * scale))
    canvas = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC) if scale > 1 else image.copy()
    for index, mask in enumerate(masks):
        inside = _resize(mask.to_array(), size)
        blend(canvas, inside, PALETTE[index % len(PALETTE)], ALPHA)
        draw_contour(canvas, inside, PALETTE[index % len(PALETTE)])
    if region is not None:
        draw_contour(canvas, _resize(region, size), (255, 255, 255))
    return _legend(canvas, masks)


def _resize(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST).astype(bool)


def blend(canvas: np.ndarray, inside: np.ndarray, colour: tuple[int, int, int], alpha: float) -> None:
    """Tint the pixels of ``canvas`` [H, W, 3] that are ``inside`` [H, W], in place; ``alpha`` 1 covers them."""
    left, top, right, bottom = bounding_box(inside)
    if right == 0:
        return
    shades = (1 - alpha) * np.arange(256, dtype=np.float32)[:, None] + alpha * np.array(colour, dtype=np.float32)
    box = canvas[top:bottom, left:right]
    tinted = cv2.LUT(box, shades.astype(np.uint8)[:, None])
    cv2.copyTo(tinted, inside[top:bottom, left:right].astype(np.uint8), box)


def draw_contour(canvas: np.ndarray, inside: np.ndarray, colour: tuple[int, int, int]) -> None:
    """Outline ``inside`` [H, W] on ``canvas`` [H, W, 3], in place, as thick as its size asks for."""
    outlines, _ = cv2.findContours(inside.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    thickness = max(1, min(canvas.shape[:2]) // 200)
    cv2.drawContours(canvas, outlines, -1, colour, thickness, cv2.LINE_AA)


def _legend(canvas: np.ndarray, masks: list[Mask]) -> np.ndarray:
    if not masks:
        return canvas
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture, "RGBA")
    height = max(12, min(canvas.shape[:2]) // 22)
    font = ImageFont.load_default(size=height)
    for index, mask in enumerate(masks):
        text = f"{mask.label or f'mask {index + 1}'}  {mask.score:.2f}"
        top = 6 + index * round(height * 1.6)
        right = 6 + round(height * 1.6) + draw.textlength(text, font=font) + 6
        draw.rounded_rectangle((4, top - 2, right, top + round(height * 1.3)), radius=4, fill=(0, 0, 0, 150))
        draw.rectangle((8, top + 1, 8 + height, top + 1 + height), fill=PALETTE[index % len(PALETTE)])
        draw.text((8 + round(height * 1.4), top), text, fill=(255, 255, 255), font=font)
    return np.asarray(picture)


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
    if not mask.area_px:
        chance = "" if mask.presence is None else f", probability that it is in the image {mask.presence:.2f}"
        return f"{mask.label or 'mask'}: the mask is empty{chance}{warning}"
    return f"{mask.label or 'mask'}: score {mask.score:.2f}, {area}, box {list(mask.bbox)}{warning}"


# --- outlines of predicted and reference masks ----------------------------------------------------------------------

_DASH, _GAP = 7, 5  # pixels


def outlined(
    pixels: np.ndarray,
    predicted: Sequence[np.ndarray],
    reference: Sequence[np.ndarray] = (),
    regions: Sequence[np.ndarray] = (),
    side: int = PICTURE_SIDE,
) -> np.ndarray:
    """An image uint8 [H, W, 3] with outlines, its longer side as given: predicted masks tinted with a whole line,
    reference masks with a broken one, regions with a white one; bool [H, W] each, others are left out."""
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    canvas = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    kinds = [[mask for mask in masks if mask.shape == (height, width)] for masks in (predicted, reference, regions)]
    for mask in kinds[0]:
        blend(canvas, _resize(mask, size), PALETTE[0], 0.25)
    for masks, color, dashed in zip(kinds, (*PALETTE[:2], (255, 255, 255)), (False, True, False), strict=True):
        for mask in masks:
            soft = cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
            lines, _ = cv2.findContours((soft > 0.5).astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
            for line in lines:
                starts = range(0, len(line), _DASH + _GAP) if dashed else (0,)
                pieces = [line[start : start + _DASH] if dashed else line for start in starts]
                if not dashed:  # a dark rim for bright images; it would close the gaps of a broken line
                    cv2.polylines(canvas, pieces, True, (0, 0, 0), 4, cv2.LINE_AA)
                cv2.polylines(canvas, pieces, not dashed, color, 2, cv2.LINE_AA)
    return canvas


def decoded_masks(encodings: Iterable[Any]) -> list[np.ndarray]:
    """Masks bool [H, W] of run lengths; damaged ones, which scoring reports, are left out."""
    masks = []
    for encoding in encodings:
        try:
            masks.append(decode_rle(encoding))
        except (MedPLIBError, TypeError):
            continue
    return masks


def write_comparison(folder: Path, number: int, pixels: np.ndarray, prediction: Prediction) -> Path | None:
    """Write ``NUMBER_TURN_IMAGE.png`` of a row that has masks, or should have: image, reference and predicted outlines.

    ``number`` is that of the record in its file and orders the pictures; ``pixels`` are uint8 [H, W, 3].
    """
    if prediction.failed or not (prediction.masks or prediction.gt_masks):
        return None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{number:06d}_{prediction.key[1]}_{Path(prediction.image_path).stem}.png"
    predicted = decoded_masks(mask.get("rle") for mask in prediction.masks)
    reference = decoded_masks(prediction.gt_masks or ())
    side, none = max(PICTURE_SIDE, *pixels.shape[:2]), list[np.ndarray]()
    pairs = ((none, none), (none, reference), (predicted, none))
    panes = [outlined(pixels, ours, theirs, side=side) for ours, theirs in pairs]
    Image.fromarray(np.concatenate(panes, axis=1)).save(path)
    return path
