"""Pixel values to 8-bit shades: range scaling, display windows and look-up tables (DICOM PS3.3 C.11.1, C.11.2)."""

from __future__ import annotations

import numpy as np

from model.errors import MedPLIBError

_TABLE_PAYS = 1 << 20  # pixels


def scale_to_uint8(values: np.ndarray, ignore: np.ndarray | None = None) -> np.ndarray:
    """Linear map of the actual smallest … largest value to 0 … 255; 8-bit values are kept, booleans become 0 and 255.

    Args:
        values: array of any shape and real type; values that are not finite become the smallest one.
        ignore: bool array of the same shape; these values do not count for the range.

    Raises:
        MedPLIBError: the values are no real numbers, or none of them is finite.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind not in "iuf":
        raise MedPLIBError(f"expected image values that are numbers, got {values.dtype}")
    if values.dtype in (np.int16, np.uint16) and values.size > _TABLE_PAYS:
        return _scale_by_table(values, ignore)
    exact = values.astype(np.float64)
    finite = np.isfinite(exact)
    if values.size and not finite.any():
        raise MedPLIBError("every pixel is NaN or infinite; give an image of finite values")
    counted = finite if ignore is None else finite & ~ignore
    if not counted.any():
        return np.zeros(values.shape, dtype=np.uint8)
    low, high = float(exact[counted].min()), float(exact[counted].max())
    if high <= low:
        return np.zeros(values.shape, dtype=np.uint8)
    exact = np.where(finite, exact, low)
    return (np.clip((exact - low) / (high - low), 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def _scale_by_table(values: np.ndarray, ignore: np.ndarray | None) -> np.ndarray:
    """The same for 16-bit values, whose few levels are scaled once: without the memory and time of exact pixels."""
    counted = values if ignore is None else values[~ignore]
    levels = np.arange(np.iinfo(values.dtype).min, np.iinfo(values.dtype).max + 1)
    if not counted.size:
        return np.zeros(values.shape, dtype=np.uint8)
    outside = (levels < counted.min()) | (levels > counted.max())
    shades = scale_to_uint8(np.clip(levels, counted.min(), counted.max()).astype(np.float64), ignore=outside)
    scaled = np.empty(values.shape, dtype=np.uint8)
    for target, row in zip(scaled, values, strict=True):
        target[...] = shades[row.astype(np.intp) - levels[0]]
    return scaled


def apply_window(values: np.ndarray, window: tuple[float, float], function: str = "LINEAR_EXACT") -> np.ndarray:
    """uint8 shades of values through a display window (DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3).

    Args:
        values: of any real type; NaN becomes black.
        window: (centre, width) in the values' unit, width above 0.
        function: ``LINEAR``, ``LINEAR_EXACT`` or ``SIGMOID``. The standard gives ``LINEAR`` widths from 1 (a step); a
            smaller one, as files of small units have, is taken as ``LINEAR_EXACT``.
    """
    exact, (centre, width) = values.astype(np.float64), window
    if function == "SIGMOID":
        share = 1.0 / (1.0 + np.exp(np.clip(-4.0 * (exact - centre) / width, -700.0, 700.0)))
    elif function == "LINEAR_EXACT" or width < 1.0:
        share = (exact - centre) / width + 0.5
    elif width == 1.0:
        share = (exact > centre - 0.5).astype(np.float64)
    else:
        share = (exact - (centre - 0.5)) / (width - 1.0) + 0.5
    return (np.clip(np.nan_to_num(share, nan=0.0), 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def apply_table(values: np.ndarray, entries: np.ndarray, first: int) -> np.ndarray:
    """Entries [N] of a look-up table for values, of which ``first`` and all below it have the first entry."""
    index = np.clip(np.rint(np.nan_to_num(values.astype(np.float64))) - first, 0, len(entries) - 1)
    return entries[index.astype(np.intp)]
