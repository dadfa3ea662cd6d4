"""Masks: regions on the patch grid, run-length encoding, boxes, thresholds, sizes."""

from __future__ import annotations

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


def mask_to_image_size(mask: np.ndarray, size: Size) -> np.ndarray:
    """A mask at another size, bool (height, width), by nearest neighbour."""
    return _nearest(check_mask(mask), size)


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


def mask_area(mask: np.ndarray) -> int:
    """Foreground pixels of a mask."""
    return int(np.count_nonzero(mask))


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """COCO run-length encoding of a mask [H, W]: ``{"size": [h, w], "counts": str}``, compressed."""
    encoded = coco.encode(np.asfortranarray(check_mask(mask).astype(np.uint8)))
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


def decode_rle(rle: Mapping[str, Any]) -> np.ndarray:
    """Mask of a COCO run-length encoding, bool [H, W].

    Args:
        rle: ``{"size": [h, w], "counts": …}``, counts compressed (str or bytes) or a list of run lengths.

    Raises:
        MedPLIBError: it is malformed or its runs do not fill its size. (The COCO library would write past the mask.)
    """
    try:
        height, width = (int(side) for side in rle["size"])
        counts = rle["counts"]
        runs = [int(run) for run in counts] if isinstance(counts, list) else _run_lengths(counts)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise MedPLIBError(
            f"a mask encoding is malformed ({error}); expected COCO's {{'size': [h, w], 'counts': …}}"
        ) from error
    if height < 1 or width < 1 or any(run < 0 for run in runs) or sum(runs) != height * width:
        raise MedPLIBError(
            f"a mask encoding has runs of {sum(runs)} pixels for a mask of {height}×{width}; it is damaged"
        )
    if height * width > MAX_MASK_PIXELS:
        raise MedPLIBError(f"a mask encoding is of {height}×{width}; at most {MAX_MASK_PIXELS} pixels are read")
    inside = np.arange(len(runs)) % 2 == 1
    return np.repeat(inside, runs).reshape(width, height).T.copy()  # runs go down the columns


def _run_lengths(counts: str | bytes) -> list[int]:
    """Run lengths of COCO's compressed string: 5 bits a character, bit 5 continues; from the 4th on, differences."""
    data = counts.encode("ascii") if isinstance(counts, str) else bytes(counts)
    runs: list[int] = []
    value = shift = 0
    for byte in data:
        bits = byte - 48
        if not 0 <= bits < 64 or shift > 30:
            raise ValueError(f"no COCO counts character at run {len(runs)}")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("the counts end in the middle of a run")
    return runs


def _nearest(mask: np.ndarray, size: Size) -> np.ndarray:
    resized = Image.fromarray(mask.astype(np.uint8)).resize((size[1], size[0]), Image.Resampling.NEAREST)
    return np.asarray(resized).astype(bool)
