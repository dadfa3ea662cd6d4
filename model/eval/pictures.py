"""Pictures of answered questions with predicted and reference outlines: for reports, and whole ones as files."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from model.data.image_io import read_image, read_mask
from model.data.schema import inspect_record
from model.drawing.pages import Markup, element
from model.errors import MedPLIBError
from model.eval.predictions import Key, Prediction
from model.eval.questions import question_id_of
from model.inference.overlay import PALETTE
from model.processing.masks import decode_rle

PICTURE_SIDE = 384
"""Longer side of a picture in pixels: twice what the page shows, so that it is sharp on fine screens."""
MOST_PICTURES = 150
"""In one report; further ones are left out and the report says so."""
MOST_BYTES = 40_000
"""Of one picture as JPEG."""

_PREDICTED, _REFERENCE, _REGION = PALETTE[0], PALETTE[1], (255, 255, 255)
_TINT = 0.25
_DASH, _GAP = 7, 5  # pixels


class Pictures:
    """Makes the pictures of one report and counts them.

    Args:
        images: folder that image paths start from.
        regions: mask files of the regions that a question points at, by its key.
        most: pictures before no more are made.

    Attributes:
        made: pictures so far.
        left_out: pictures that were asked for after that.
    """

    def __init__(self, images: Path, regions: Mapping[Key, Sequence[Path]] | None = None, most: int = MOST_PICTURES):
        self.images = images
        self.regions = regions or {}
        self.most = most
        self.made = 0
        self.left_out = 0

    def of(self, row: Prediction) -> Markup | None:
        """The image of an answer with its outlines; None where it cannot be read or the report is full."""
        if self.made >= self.most:
            self.left_out += 1
            return None
        pixels = self._pixels(row.image_path)
        if pixels is None:
            return None
        self.made += 1
        regions = []
        for path in self.regions.get(row.key, ()):
            with suppress(MedPLIBError):
                regions.append(read_mask(path))
        picture = outlined(pixels, _masks(m.get("rle") for m in row.masks), _masks(row.gt_masks or ()), regions)
        drawn = f"{len(row.masks)} predicted" + (
            f" and {len(row.gt_masks)} reference" if row.gt_masks is not None else ""
        )
        description = f"The image of question {row.question_id} with {drawn} outlines"
        return element("img", src=data_uri(picture), alt=description, loading="lazy", decoding="async")

    def _pixels(self, path: str) -> np.ndarray | None:
        for name in (path, f"{path}.png"):  # some published records lack the suffix
            try:
                return read_image(self.images / name).pixels
            except MedPLIBError:
                continue
        return None


def outlined(
    pixels: np.ndarray,
    predicted: Sequence[np.ndarray],
    reference: Sequence[np.ndarray] = (),
    regions: Sequence[np.ndarray] = (),
    side: int = PICTURE_SIDE,
) -> np.ndarray:
    """An image with outlines: predicted masks tinted with a whole line, reference masks with a broken one, regions with
    a white one.

    Args:
        pixels: uint8 [H, W, 3].
        predicted: bool [H, W] each; masks of another size are left out.
        reference: as ``predicted``.
        regions: as ``predicted``.
        side: longer side of the result.

    Returns:
        uint8 [h, w, 3].
    """
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    canvas = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    for mask in _fitting(predicted, (height, width)):
        inside = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
        tinted = (1 - _TINT) * canvas[inside] + _TINT * np.asarray(_PREDICTED, dtype=np.float32)
        canvas[inside] = tinted.astype(np.uint8)
    for masks, colour, dashed in (
        (predicted, _PREDICTED, False),
        (reference, _REFERENCE, True),
        (regions, _REGION, False),
    ):
        for mask in _fitting(masks, (height, width)):
            for line in _outlines(mask, size):
                _draw(canvas, line, colour, dashed)
    return canvas


def data_uri(picture: np.ndarray, most_bytes: int = MOST_BYTES) -> str:
    """A picture uint8 [H, W, 3] as JPEG in a ``data:`` address, its quality lowered until it is small enough."""
    content = b""
    for quality in (82, 70, 55, 40, 25):
        stream = io.BytesIO()
        Image.fromarray(picture).save(stream, format="JPEG", quality=quality, optimize=True)
        content = stream.getvalue()
        if len(content) <= most_bytes:
            break
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode('ascii')}"


def regions_of(records: Sequence[Mapping[str, Any]], images: Path, keys: set[Key]) -> dict[Key, tuple[Path, ...]]:
    """Mask files of the regions that the questions of ``keys`` point at; records are gone through once."""
    wanted = {question for question, _ in keys}
    found: dict[Key, tuple[Path, ...]] = {}
    for number, record in enumerate(records):
        name = str(question_id_of(record, number))
        if name not in wanted:
            continue
        sample, _ = inspect_record(record, images)
        if sample is None or not sample.regions:
            continue
        regions = iter(sample.regions)
        for turn, asked in enumerate(sample.turns[::2]):
            here = tuple(path for _, path in zip(range(asked.text.count("<region>")), regions, strict=False))
            if (name, turn) in keys and here:
                found[(name, turn)] = here
    return found


def _outlines(mask: np.ndarray, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Contours [n, 2] of a mask in pixels of the picture, smoothed at its scale; holes have theirs too."""
    soft = cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
    lines, _ = cv2.findContours((soft > 0.5).astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    for line in lines:
        yield line[:, 0]


def _draw(canvas: np.ndarray, line: np.ndarray, colour: tuple[int, int, int], dashed: bool) -> None:
    """A whole line gets a dark rim, so that it is seen on a bright image; a broken one would close its gaps."""
    pieces = [line[start : start + _DASH] for start in range(0, len(line), _DASH + _GAP)] if dashed else [line]
    for thickness, shade in ((2, colour),) if dashed else ((4, (0, 0, 0)), (2, colour)):
        points = [piece[:, None].astype(np.int32) for piece in pieces]
        cv2.polylines(canvas, points, not dashed, shade, thickness, cv2.LINE_AA)


def _fitting(masks: Sequence[np.ndarray], size: tuple[int, int]) -> list[np.ndarray]:
    return [mask for mask in masks if mask.shape == size]


def _masks(encodings: Any) -> list[np.ndarray]:
    masks = []
    for encoding in encodings:
        try:
            masks.append(decode_rle(encoding))
        except (MedPLIBError, TypeError):  # a damaged mask is scored and reported elsewhere; here it is not drawn
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
    predicted, reference = _masks(mask.get("rle") for mask in prediction.masks), _masks(prediction.gt_masks or ())
    side, none = max(PICTURE_SIDE, *pixels.shape[:2]), list[np.ndarray]()
    panes = [outlined(pixels, *masks, side=side) for masks in ((none, none), (none, reference), (predicted, none))]
    Image.fromarray(np.concatenate(panes, axis=1)).save(path)
    return path
