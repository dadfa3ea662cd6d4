"""Pixel values to 8-bit shades: range scaling and display windows (DICOM PS3.3 C.11.2)."""

from __future__ import annotations

import numpy as np

from model.errors import MedPLIBError

_TABLE_PAYS = 1 << 20  # pixels


def scale_to_uint8(values: np.ndarray, ignore: np.ndarray | None = None) -> np.ndarray:
    """Linear map of the actual smallest … largest value to 0 … 255; 8-bit values are kept, booleans become 0 and 255.

    Args:
        values: array of any shape and real type; values that are not finite become the smallest one.
        ignore: bool array of the same shape; these values do not count for the range.
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
    counted = np.isfinite(exact) if ignore is None else np.isfinite(exact) & ~ignore
    if not counted.any():
        return np.zeros(values.shape, dtype=np.uint8)
    low, high = float(exact[counted].min()), float(exact[counted].max())
    if high <= low:
        return np.zeros(values.shape, dtype=np.uint8)
    exact = np.where(np.isfinite(exact), exact, low)
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


def shade(values: np.ndarray, window: tuple[float, float], function: str = "LINEAR_EXACT") -> np.ndarray:
    """uint8 shades of values through a window (DICOM PS3.3 C.11.2.1.2).

    Args:
        values: of any real type; those that are not numbers become black.
        window: (centre, width), in the values' unit.
        function: ``LINEAR``, ``LINEAR_EXACT`` or ``SIGMOID``.
    """
    exact, (centre, width) = values.astype(np.float64), window
    if function == "SIGMOID":
        share = 1.0 / (1.0 + np.exp(np.clip(-4.0 * (exact - centre) / width, -700.0, 700.0)))
    elif function == "LINEAR_EXACT":
        share = (exact - centre) / width + 0.5
    else:
        share = (exact - (centre - 0.5)) / max(width - 1.0, 1e-6) + 0.5
    return (np.clip(np.nan_to_num(share, nan=0.0), 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
