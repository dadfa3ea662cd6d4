"""Drawing tools of the phantom scenes: a canvas, organic shapes, noise fields and soft painting."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]
Stencil = NDArray[np.uint8]
Colour = tuple[float, float, float]


class Canvas:
    """A float32 picture under construction, with the visible stencil of every named structure.

    ``picture`` is [H, W] (grey) or [H, W, 3] (RGB) in 0..255. Lengths given to the methods are in pixels of a 256-pixel
    picture and are scaled by ``unit``, so that a scene looks the same at every size.
    """

    def __init__(self, rng: np.random.Generator, height: int, width: int, channels: int) -> None:
        self.rng = rng
        self.height, self.width = height, width
        self.unit = min(height, width) / 256.0
        shape = (height, width) if channels == 1 else (height, width, channels)
        self.picture: Field = np.zeros(shape, np.float32)
        self.stencils: dict[str, Stencil] = {}
        self._taken: list[tuple[float, float, float]] = []

    # ---- random numbers -------------------------------------------------------------------------------------------

    def between(self, low: float, high: float) -> float:
        """One uniform number in [low, high)."""
        return float(self.rng.uniform(low, high))

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return bool(self.rng.random() < probability)

    # ---- fields ---------------------------------------------------------------------------------------------------

    def grid(self) -> tuple[Field, Field]:
        """Pixel coordinates (x, y) relative to the centre, in 256-pixel units, broadcastable to [H, W]."""
        x = (np.arange(self.width, dtype=np.float32) - (self.width - 1) / 2) / self.unit
        y = (np.arange(self.height, dtype=np.float32) - (self.height - 1) / 2) / self.unit
        return x[None, :], y[:, None]

    def noise(self, cell: float) -> Field:
        """Smooth noise [H, W], about N(0, 1), whose features are about ``cell`` pixels wide."""
        step = max(cell * self.unit, 1.0)
        rows, columns = int(self.height / step) + 2, int(self.width / step) + 2
        coarse = self.rng.standard_normal((rows, columns), dtype=np.float32)
        if step <= 1.0:
            return coarse[: self.height, : self.width]
        return np.asarray(cv2.resize(coarse, (self.width, self.height), interpolation=cv2.INTER_CUBIC), np.float32)

    def soften(self, field: NDArray[Any], radius: float) -> Field:
        """Gaussian blur; ``radius`` is the standard deviation."""
        sigma = radius * self.unit
        return np.asarray(cv2.GaussianBlur(field, (0, 0), sigma) if sigma > 0.2 else field, np.float32)

    # ---- shapes ---------------------------------------------------------------------------------------------------

    def fill(self, points: NDArray[Any]) -> Stencil:
        """Stencil of the closed polygon with corners ``points`` [N, 2] in picture pixels."""
        stencil = np.zeros((self.height, self.width), np.uint8)
        cv2.fillPoly(stencil, [np.round(points * 16).astype(np.int32)], 1, lineType=cv2.LINE_8, shift=4)
        return stencil

    def blob(
        self, centre: tuple[float, float], radii: tuple[float, float], angle: float, rough: float = 0.08, waves: int = 5
    ) -> Stencil:
        """An ellipse whose outline waves at random; ``angle`` in radians, ``rough`` the relative size of the waves."""
        theta = np.linspace(0, 2 * np.pi, 72, endpoint=False)
        ripple = np.ones_like(theta)
        for wave in range(2, 2 + waves):
            ripple += rough * self.rng.normal() / (wave - 1) ** 0.7 * np.cos(wave * theta + self.between(0, 6.28))
        ripple = np.clip(ripple, 0.5, 1.6)
        local = np.stack([radii[0] * ripple * np.cos(theta), radii[1] * ripple * np.sin(theta)], 1)
        return self.fill(self.turned(local, centre, angle))

    def turned(self, local: NDArray[Any], centre: tuple[float, float], angle: float) -> NDArray[Any]:
        """Points in a shape's own frame (256-pixel units) → picture pixels, turned by ``angle`` about ``centre``."""
        cos, sin = np.cos(angle), np.sin(angle)
        x = local[:, 0] * cos - local[:, 1] * sin
        y = local[:, 0] * sin + local[:, 1] * cos
        return np.stack([x, y], 1) * self.unit + np.asarray(centre)

    def strokes(self, lines: list[NDArray[Any]], thickness: float) -> Stencil:
        """Stencil of open poly-lines, each [N, 2] in picture pixels."""
        stencil = np.zeros((self.height, self.width), np.uint8)
        width = max(1, round(thickness * self.unit))
        cv2.polylines(stencil, [np.round(line * 16).astype(np.int32) for line in lines], False, 1, width, shift=4)
        return stencil

    def wiggle(
        self, start: tuple[float, float], angle: float, length: float, bend: float = 0.5, steps: int = 14
    ) -> NDArray[Any]:
        """A wandering line [steps, 2] in picture pixels that leaves ``start`` in direction ``angle``."""
        drift = np.cumsum(self.rng.normal(0, bend / np.sqrt(steps), steps))
        heading = angle + drift
        stride = length * self.unit / steps
        return np.cumsum(np.stack([np.cos(heading), np.sin(heading)], 1) * stride, 0) + np.asarray(start)

    # ---- painting -------------------------------------------------------------------------------------------------

    def lay(
        self, stencil: Stencil, value: float | Colour | NDArray[Any], softness: float = 1.0, opacity: float = 1.0
    ) -> None:
        """Cover the stencil with a value, a colour or a texture, with an edge blurred by ``softness`` pixels."""
        top, bottom, left, right = self._window(stencil, 3 * softness * self.unit + 1)
        if bottom <= top:
            return
        part = stencil[top:bottom, left:right].astype(np.float32)
        cover = self.soften(part, softness) * opacity if softness > 0 else part * opacity
        under = self.picture[top:bottom, left:right]
        if self.picture.ndim == 3:
            cover = cover[..., None]
        colour: Any = np.asarray(value, np.float32)
        if colour.ndim >= 2:
            colour = colour[top:bottom, left:right]
            if self.picture.ndim == 3 and colour.ndim == 2:
                colour = colour[..., None]
        self.picture[top:bottom, left:right] = under + (colour - under) * cover

    def tinted(self, colour: Colour, shade: NDArray[Any]) -> Field:
        """An RGB texture [H, W, 3]: ``colour`` multiplied by ``1 + shade``."""
        return np.asarray(colour, np.float32) * (1.0 + np.asarray(shade, np.float32)[..., None])

    def rim(self, stencil: Stencil, width: float) -> Stencil:
        """The inner border of a stencil, ``width`` pixels wide."""
        return stencil - self.shrunk(stencil, width)

    def shrunk(self, stencil: Stencil, width: float) -> Stencil:
        """The stencil without its outer ``width`` pixels."""
        size = 2 * max(1, round(width * self.unit)) + 1
        return np.asarray(cv2.erode(stencil, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))), np.uint8)

    def depth(self, stencil: Stencil) -> Field:
        """How deep each pixel lies inside the stencil: 0 at the border … 1 at the deepest point."""
        distance = np.asarray(cv2.distanceTransform(stencil, cv2.DIST_L2, 3), np.float32)
        return distance / max(float(distance.max()), 1e-6)

    # ---- naming and placing ---------------------------------------------------------------------------------------

    def claim(self, name: str, stencil: Stencil) -> None:
        """Give the visible pixels of ``stencil`` to ``name``; whatever lay there before is hidden now."""
        for other in self.stencils:
            if other != name:
                self.stencils[other] = self.stencils[other] & (1 - stencil)
        before = self.stencils.get(name)
        self.stencils[name] = stencil.copy() if before is None else before | stencil

    def place(self, field: Stencil, radius: float, *, tries: int = 40) -> tuple[float, float]:
        """A random free spot of ``field`` for something of ``radius``; the least crowded one if none is free.

        Remembers the spot, so that later calls keep away from it. Returns (x, y) in picture pixels.
        """
        reach = radius * self.unit
        framed = cv2.copyMakeBorder(field, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
        room = cv2.distanceTransform(framed, cv2.DIST_L2, 3)[1:-1, 1:-1]
        rows, columns = np.nonzero(room > min(0.8 * reach, 0.95 * float(room.max())))
        chosen = self.rng.integers(0, len(rows), tries)
        x, y = columns[chosen].astype(np.float64), rows[chosen].astype(np.float64)
        slack = np.zeros(tries)
        for other_x, other_y, other_reach in self._taken:
            gap = np.hypot(x - other_x, y - other_y) - 0.92 * (reach + other_reach)
            slack = np.minimum(slack, gap)
        best = int(np.argmax(slack))
        self._taken.append((x[best], y[best], reach))
        return float(x[best]), float(y[best])

    def keep(self, spot: NDArray[Any], radius: float) -> tuple[float, float]:
        """Remember a spot chosen without ``place``, so that later structures keep away from it; returns (x, y)."""
        x, y = float(spot[0]), float(spot[1])
        self._taken.append((x, y, radius * self.unit))
        return x, y

    def _window(self, stencil: Stencil, margin: float) -> tuple[int, int, int, int]:
        x, y, width, height = cv2.boundingRect(stencil)
        if width == 0 or height == 0:
            return 0, 0, 0, 0
        extra = int(np.ceil(margin))
        top, left = max(0, y - extra), max(0, x - extra)
        return top, min(self.height, y + height + extra), left, min(self.width, x + width + extra)
