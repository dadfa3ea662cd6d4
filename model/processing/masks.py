"""Masks: regions on the patch grid, run-length encoding, boxes, thresholds, sizes."""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco

from model.errors import MedPLIBError
from model.processing.images import Size, centre_offset, resized_size

CocoRle = dict[str, Any]

SUB_REGION_AREA = (0.2, 1.0)
"""Share of its largest component that a training sub-region takes."""
MAX_MASK_PIXELS = 1 << 28
"""A few characters can encode a mask that fills the memory, so larger ones are not decoded."""


def check_mask(mask: np.ndarray, what: str = "a mask") -> np.ndarray:
    """The mask as bool [H, W].

    Raises:
        MedPLIBError: it is no array of two dimensions.
    """
    if not isinstance(mask, np.ndarray) or mask.ndim != 2 or 0 in mask.shape:
        got = "×".join(map(str, mask.shape)) if isinstance(mask, np.ndarray) else type(mask).__name__
        raise MedPLIBError(f"{what} is {got}; give an array H×W whose non-zero pixels are inside")
    return mask.astype(bool)


# --- regions on the patch grid --------------------------------------------------------------------------------------


def sampled_region_grid(mask: np.ndarray, clip_size: int = 336, grid: int = 24) -> np.ndarray:
    """A region as the published model samples it: resized, centred, then every n-th pixel (reference §3).

    A region that lies between the sampled pixels comes out empty; ``region_grid`` mends that.

    Args:
        mask: bool [H, W].
        clip_size: side of the CLIP input in pixels.
        grid: patches g along that side.

    Returns:
        float32 [g, g] in {0, 1}.
    """
    resized = _nearest(check_mask(mask, "a region"), resized_size(mask.shape, clip_size))  # type: ignore[arg-type]
    height, width = resized.shape
    top, left = centre_offset((height, width), clip_size)
    square = np.zeros((clip_size, clip_size), dtype=np.float32)
    square[top : top + height, left : left + width] = resized
    picked = np.arange(grid) * clip_size // grid
    return square[np.ix_(picked, picked)]


def region_grid(mask: np.ndarray, clip_size: int = 336, grid: int = 24) -> np.ndarray:
    """A region on the patch grid; one too small for the sampling marks the patches that hold it, so none is lost.

    Args:
        mask: bool [H, W], the size of its image.
        clip_size: side of the CLIP input in pixels.
        grid: patches g along that side.

    Returns:
        float32 [g, g] in {0, 1}, at least one cell set.

    Raises:
        MedPLIBError: the region is empty.
    """
    mask = check_mask(mask, "a region")
    if not mask.any():
        raise MedPLIBError("a region is empty; mark at least one pixel")
    cells = sampled_region_grid(mask, clip_size, grid)
    return cells if cells.any() else _covering_cells(mask, clip_size, grid)


def _covering_cells(mask: np.ndarray, clip_size: int, grid: int) -> np.ndarray:
    size: Size = mask.shape  # type: ignore[assignment]
    target = resized_size(size, clip_size)
    offset = centre_offset(target, clip_size)
    places = []
    for axis, coordinates in enumerate(np.nonzero(mask)):
        in_square = (coordinates + 0.5) * target[axis] / size[axis] + offset[axis]
        places.append(np.clip((in_square * grid / clip_size).astype(int), 0, grid - 1))
    cells = np.zeros((grid, grid), dtype=np.float32)
    cells[places[0], places[1]] = 1
    return cells


def largest_component(mask: np.ndarray) -> np.ndarray:
    """The biggest 8-connected part of a mask, bool [H, W]; the first in reading order among equals."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    if count == 1:
        return np.zeros(mask.shape, dtype=bool)
    return labels == 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())


def random_sub_region(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random connected part of a mask's largest component, as training sees regions (reference §3).

    The part grows cell by cell from a random one until it has a random 20–100 % of the component's area. Meant for
    masks of patch-grid size.

    Args:
        mask: [H, W], non-zero inside.
        rng: source of the randomness.

    Returns:
        An array of the mask's dtype in {0, 1}; empty if the mask is.
    """
    component = largest_component(mask)
    cells = np.argwhere(component)
    if not len(cells):
        return np.zeros_like(mask)
    wanted = max(1, round(len(cells) * rng.uniform(*SUB_REGION_AREA)))
    height, width = mask.shape
    chosen = np.zeros(mask.shape, dtype=bool)
    reached = np.zeros(mask.shape, dtype=bool)
    row, column = (int(value) for value in cells[rng.integers(len(cells))])
    frontier = [(row, column)]
    reached[row, column] = True
    for _ in range(wanted):
        index = int(rng.integers(len(frontier)))
        frontier[index], frontier[-1] = frontier[-1], frontier[index]
        row, column = frontier.pop()
        chosen[row, column] = True
        for y in range(max(row - 1, 0), min(row + 2, height)):
            for x in range(max(column - 1, 0), min(column + 2, width)):
                if component[y, x] and not reached[y, x]:
                    reached[y, x] = True
                    frontier.append((y, x))
    return chosen.astype(mask.dtype)


# --- masks at image size --------------------------------------------------------------------------------------------


def threshold_mask(logits: torch.Tensor, threshold: float) -> np.ndarray:
    """Foreground of mask logits [H, W]: bool [H, W], True where the probability is above ``threshold`` in (0, 1)."""
    return (logits.detach().float() > math.log(threshold / (1 - threshold))).cpu().numpy()


def example_mask_input(mask: np.ndarray, clip_size: int = 336) -> torch.Tensor:
    """A solved example's mask for the mask encoder (reference §8): float32 [1, S, S], centred like its image."""
    resized = _nearest(check_mask(mask, "an example mask"), resized_size(mask.shape, clip_size))  # type: ignore[arg-type]
    top, left = centre_offset(resized.shape, clip_size)  # type: ignore[arg-type]
    square = torch.zeros(1, clip_size, clip_size)
    square[0, top : top + resized.shape[0], left : left + resized.shape[1]] = torch.from_numpy(resized)
    return square


def bounding_box(mask: np.ndarray) -> list[int]:
    """``[x1, y1, x2, y2]`` of a mask [H, W] in pixels, right and bottom exclusive; zeros for an empty mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return [0, 0, 0, 0]
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """COCO run-length encoding of a mask [H, W]: ``{"size": [h, w], "counts": str}``, compressed."""
    encoded = coco.encode(np.asfortranarray(check_mask(mask).astype(np.uint8)))
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


def decode_rle(rle: Mapping[str, Any]) -> np.ndarray:
    """Mask of a COCO run-length encoding, bool [H, W]; see ``checked_rle`` for its forms and errors."""
    return np.ascontiguousarray(coco.decode(checked_rle(rle)), dtype=bool)


def checked_rle(rle: Mapping[str, Any]) -> CocoRle:
    """A mask as the COCO library takes it: ``{"size": [h, w], "counts": bytes}``, compressed.

    The library trusts what it is given: runs that do not fill the size make it hang or leave its memory.

    Args:
        rle: ``{"size": [h, w], "counts": …}``, counts compressed (str, bytes or the text of Python bytes) or a list of
            run lengths down the columns.

    Raises:
        MedPLIBError: it is of another form (a polygon, a text …), malformed, or its runs do not fill its size.
    """
    expected = "expected COCO's {'size': [h, w], 'counts': …}"
    if not isinstance(rle, Mapping):
        kind = {list: "a polygon or another list", str: "a text"}.get(type(rle), type(rle).__name__)
        raise MedPLIBError(f"a mask encoding is {kind}; {expected}")
    try:
        height, width = map(_whole, rle["size"])
        counts = rle["counts"]
        if isinstance(counts, str) and counts[:2] in ("b'", 'b"'):  # str() of bytes; no counts hold a quote
            counts = ast.literal_eval(counts)
        listed = isinstance(counts, list | tuple)
        counts = counts.encode("ascii") if isinstance(counts, str) else counts
        runs = (
            np.array(list(map(_whole, counts)), dtype=np.int64) if listed else _run_lengths(bytes(memoryview(counts)))
        )
    except (KeyError, TypeError, ValueError, OverflowError, SyntaxError) as error:
        raise MedPLIBError(f"a mask encoding is malformed ({error}); {expected}") from error
    if height < 1 or width < 1 or height * width > MAX_MASK_PIXELS:
        raise MedPLIBError(f"a mask encoding is of {height}×{width}; expected 1 to {MAX_MASK_PIXELS} pixels")
    if not runs.size or runs.min() < 0 or runs.sum() != height * width:
        raise MedPLIBError(
            f"the runs of a mask encoding hold {runs.sum()} pixels for a mask of {height}×{width}; it is damaged"
        )
    if listed:
        return coco.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)
    return {"size": [height, width], "counts": bytes(counts)}


def _whole(number: Any) -> int:
    if not isinstance(number, int | float | np.integer) or number != int(number):
        raise ValueError(f"{number!r:.20} is no whole number")
    return int(number)


def _run_lengths(data: bytes) -> np.ndarray:
    """Run lengths of COCO's compressed counts, int64: 5 bits a character, bit 5 continues, then differences."""
    if not data or data.translate(None, _LAST + _CONTINUED) or data[-1] not in _LAST:
        raise ValueError("the counts are no COCO counts")
    bits = np.frombuffer(data, dtype=np.uint8).astype(np.int64)
    bits -= 48
    ends = np.flatnonzero(bits < 32)
    lengths = ends.copy()
    lengths[1:] -= ends[:-1]
    lengths[0] += 1
    if lengths.max() > 7:
        raise ValueError("the counts hold a run beyond every size")
    starts = ends - lengths + 1
    shifts = 5 * (np.arange(bits.size) - np.repeat(starts, lengths))
    runs = np.add.reduceat((bits & 31) << shifts, starts)
    runs -= (bits[ends] & 16) << (5 * lengths - 4)  # the highest bit is the sign
    for first in (1, 2):  # from the fourth on, each is the difference to the one before the last
        runs[first::2].cumsum(out=runs[first::2])
    return runs


_LAST, _CONTINUED = bytes(range(48, 80)), bytes(range(80, 112))


def _nearest(mask: np.ndarray, size: Size) -> np.ndarray:
    resized = Image.fromarray(mask.astype(np.uint8)).resize((size[1], size[0]), Image.Resampling.NEAREST)
    return np.asarray(resized).astype(bool)
