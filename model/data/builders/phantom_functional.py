"""Phantom PET (a coronal body in a hot colour scale) and ultrasound (a speckled sector)."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from model.data.builders.phantom_canvas import Canvas, Field, Stencil

# ---- PET -----------------------------------------------------------------------------------------------------------


def draw_pet(canvas: Canvas, names: Collection[str]) -> None:
    """A faint body with the named hot structures, blurred and counted like photons."""
    head, trunk, spot = _silhouette(canvas)
    if "brain" in names:
        _brain(canvas, head, spot)
    painters = {"heart": _myocardium, "bladder": _bladder, "tumor": _hot_tumor}
    for name, paint in painters.items():
        if name in names:
            paint(canvas, trunk)
    uptake = canvas.soften(canvas.picture, canvas.between(1.4, 2.2))
    uptake += np.sqrt(np.maximum(uptake, 1)) * canvas.between(0.5, 1.0) * canvas.noise(2.2)
    canvas.picture = _hot(np.clip(uptake * canvas.between(0.9, 1.08), 0, 255))


def _silhouette(canvas: Canvas) -> tuple[Stencil, Stencil, tuple[float, float, float]]:
    tilt = canvas.between(-0.35, 0.35) + (np.pi if canvas.chance(0.5) else 0.0)
    scale = canvas.between(0.88, 1.06)
    middle = canvas.width / 2 + canvas.between(-16, 16), canvas.height / 2 + canvas.between(-8, 8)

    def part(x: float, y: float, width: float, height: float, lean: float = 0.0) -> Stencil:
        centre = canvas.turned(np.array([[x, y]]) * scale, middle, tilt)[0]
        return canvas.blob((centre[0], centre[1]), (width * scale, height * scale), tilt + lean, 0.02, 3)

    head_centre = canvas.turned(np.array([[0.0, -82.0]]) * scale, middle, tilt)[0]
    head = part(0, -82, 31, 37)
    trunk = part(0, 42, 62, 92) | part(0, -12, 68, 34)
    limbs = part(-80, 40, 15, 72, 0.12) | part(80, 40, 15, 72, -0.12) | part(0, -44, 17, 24)
    canvas.picture += 3
    canvas.lay(head | trunk | limbs, 34 + 5 * canvas.noise(10), 2.5)
    lungs = part(-28, -2, 19, 36) | part(28, -2, 19, 36)
    canvas.lay(lungs, 20.0, 4, 0.8)
    spine = canvas.turned(np.array([[0.0, -36.0], [0.0, 122.0]]) * scale, middle, tilt)
    canvas.lay(canvas.strokes([spine], 9), 50 + 8 * canvas.noise(4), 2, 0.8)
    return head, trunk, (head_centre[0], head_centre[1], tilt)


def _brain(canvas: Canvas, head: Stencil, spot: tuple[float, float, float]) -> None:
    shape = canvas.shrunk(head, canvas.between(3, 6))
    folds = 1 - np.exp(-((canvas.noise(7) / 0.45) ** 2))
    canvas.lay(shape, 150 + 85 * folds, 1.0)
    shift = np.array([[0.0, -40.0], [0.0, 40.0]])
    midline = canvas.strokes([canvas.turned(shift, (spot[0], spot[1]), spot[2])], 4)
    canvas.lay(midline & shape, 96.0, 1.2, 0.8)
    canvas.claim("brain", shape)


def _myocardium(canvas: Canvas, trunk: Stencil) -> None:
    radius = canvas.between(20, 27)
    spot = canvas.place(trunk, radius)
    angle = canvas.between(0, 6.28)
    ring = canvas.blob(spot, (radius, radius * 0.85), angle, 0.03, 3)
    hollow = canvas.shrunk(ring, radius * 0.42)
    opening = np.array([[0, 0], [1.6, -0.42], [1.6, 0.42]]) * radius
    shape = ring & (1 - hollow) & (1 - canvas.fill(canvas.turned(opening, spot, angle)))
    canvas.lay(shape, 196 + 10 * canvas.noise(6), 0.8)
    canvas.claim("heart", ring)


def _bladder(canvas: Canvas, trunk: Stencil) -> None:
    radius = canvas.between(19, 27)
    spot = canvas.place(trunk, radius)
    shape = canvas.blob(spot, (radius * 1.15, radius * 0.85), canvas.between(-0.5, 0.5), 0.03, 3)
    canvas.lay(shape, 252.0, 0.8)
    canvas.claim("bladder", shape)


def _hot_tumor(canvas: Canvas, trunk: Stencil) -> None:
    radius = canvas.between(19, 27)
    spot = canvas.place(trunk, radius)
    shape = canvas.blob(spot, (radius, radius * canvas.between(0.75, 1)), canvas.between(0, 6.28), 0.2, 8)
    canvas.lay(shape, 168 + 8 * canvas.noise(5), 1.2)
    canvas.lay(canvas.shrunk(shape, radius * 0.3), 70 + 10 * canvas.noise(5), 1.6)
    canvas.claim("tumor", shape)


def _hot(uptake: Field) -> Field:
    """Black → red → yellow → white, as reading stations show PET."""
    share = np.asarray(uptake, np.float32) / 255.0
    channels = [share * 2.7, share * 2.7 - 1.0, share * 3.6 - 2.5]
    return np.asarray(np.clip(np.stack(channels, -1), 0, 1) * 255, np.float32)


# ---- ultrasound ----------------------------------------------------------------------------------------------------


def draw_ultrasound(canvas: Canvas, names: Collection[str]) -> None:
    """Layered tissue in a sector with the named structures, then speckle, shadows and depth loss."""
    sector, apex = _sector(canvas)
    shade = np.ones((canvas.height, canvas.width), np.float32)
    depth = _layers(canvas, apex)
    canvas.picture[:] = 78 + 15 * np.sin(depth / canvas.between(9, 16) + 0.7 * canvas.noise(30)) + 10 * canvas.noise(22)
    for reach in canvas.rng.uniform(90, 330, int(canvas.rng.integers(2, 6))):
        band = np.exp(-(((depth - reach + 5 * canvas.noise(45)) / 2.2) ** 2))
        canvas.picture += 75 * band * np.clip(0.6 + 0.6 * canvas.noise(50), 0, 1)
    painters = {"fetal head": _fetal_head, "solid mass": _solid_mass, "cyst": _cyst, "gallstone": _gallstone}
    for name, paint in painters.items():
        if name in names:
            paint(canvas, sector, shade, apex)
    for name in canvas.stencils:
        canvas.stencils[name] &= sector
    speckle = np.hypot(canvas.noise(1.9), canvas.noise(1.9)) * 0.42 + 0.5
    fade = np.clip(1.1 - depth / 900, 0.6, 1.1)
    canvas.picture *= np.clip(speckle, 0.15, 2.1) * canvas.soften(shade, 1.2) * fade * canvas.between(0.9, 1.2)
    canvas.picture *= canvas.soften(sector * np.float32(1), 0.7)
    canvas.picture += 5


def _sector(canvas: Canvas) -> tuple[Stencil, tuple[float, float]]:
    apex = canvas.width / 2 + canvas.between(-14, 14) * canvas.unit, canvas.between(-70, -20) * canvas.unit
    spread = canvas.between(0.62, 0.8)
    lean = canvas.between(-0.1, 0.1)
    theta = np.linspace(-spread, spread, 40) + lean + np.pi / 2
    near = (canvas.between(14, 26) * canvas.unit - apex[1]) / 1.0
    far = canvas.height - canvas.between(4, 14) * canvas.unit - apex[1]
    arc = np.stack([np.cos(theta), np.sin(theta)], 1)
    outline = np.concatenate([arc * near, arc[::-1] * far]) + np.asarray(apex)
    return canvas.fill(outline), apex


def _layers(canvas: Canvas, apex: tuple[float, float]) -> Field:
    x, y = np.arange(canvas.width, dtype=np.float32)[None], np.arange(canvas.height, dtype=np.float32)[:, None]
    return np.asarray(np.hypot(x - apex[0], y - apex[1]) / canvas.unit, np.float32)


def _behind(canvas: Canvas, shape: Stencil, apex: tuple[float, float], reach: float) -> Stencil:
    """The strip beyond a shape as seen from the probe: where its shadow or its enhancement falls."""
    rows, columns = np.nonzero(shape)
    if not len(rows):
        return shape
    bearing = np.arctan2(rows - apex[1], columns - apex[0])
    distance = float(np.hypot(rows - apex[1], columns - apex[0]).mean())
    low, high = np.quantile(bearing, 0.03), np.quantile(bearing, 0.97)
    arc = np.array([[np.cos(low), np.sin(low)], [np.cos(high), np.sin(high)]])
    far = distance + reach * canvas.unit
    return canvas.fill(np.concatenate([arc * distance, arc[::-1] * far]) + np.asarray(apex)) & (1 - shape)


def _cyst(canvas: Canvas, sector: Stencil, shade: Field, apex: tuple[float, float]) -> None:
    radius = canvas.between(18, 30)
    spot = canvas.place(sector, radius)
    shape = canvas.blob(spot, (radius * 1.1, radius * 0.9), canvas.between(0, 3.14), 0.03, 3)
    shade += 0.55 * canvas.soften(_behind(canvas, shape, apex, 60) * np.float32(1), 4)
    canvas.lay(shape, 190.0, 1.2)
    canvas.lay(canvas.shrunk(shape, 2.5), 3.0, 0.8)
    canvas.claim("cyst", shape)


def _solid_mass(canvas: Canvas, sector: Stencil, shade: Field, apex: tuple[float, float]) -> None:
    radius = canvas.between(22, 32)
    spot = canvas.place(sector, radius)
    shape = canvas.blob(spot, (radius, radius * 0.75), canvas.between(-0.6, 0.6), 0.2, 9)
    canvas.lay(shape, 30 + 7 * canvas.noise(6), 1.6)
    canvas.claim("solid mass", shape)


def _gallstone(canvas: Canvas, sector: Stencil, shade: Field, apex: tuple[float, float]) -> None:
    for _ in range(2 if canvas.chance(0.35) else 1):
        radius = canvas.between(17, 23)
        spot = canvas.place(sector, radius)
        shape = canvas.blob(spot, (radius * 1.15, radius * 0.8), canvas.between(-0.5, 0.5), 0.07)
        shade *= 1 - 0.82 * canvas.soften(_behind(canvas, shape, apex, 400) * np.float32(1), 2)
        canvas.lay(shape, 175 + 80 * (1 - canvas.depth(shape)), 1.0)
        canvas.claim("gallstone", shape)


def _fetal_head(canvas: Canvas, sector: Stencil, shade: Field, apex: tuple[float, float]) -> None:
    radius = canvas.between(33, 44)
    spot = canvas.place(sector, radius)
    angle = canvas.between(0, 3.14)
    shape = canvas.blob(spot, (radius * 1.15, radius * 0.88), angle, 0.015, 3)
    canvas.lay(shape, 225.0, 1.3)
    canvas.lay(canvas.shrunk(shape, 4.5), 62 + 8 * canvas.noise(9), 1.3)
    midline = canvas.turned(np.array([[-0.85 * radius, 0.0], [0.85 * radius, 0.0]]), spot, angle)
    canvas.lay(canvas.strokes([midline], 2.5), 205.0, 0.9, 0.9)
    plexus = canvas.turned(np.array([[-0.3, 0.35], [0.3, 0.35], [-0.3, -0.35], [0.3, -0.35]]) * radius, spot, angle)
    for x, y in plexus[: int(canvas.rng.integers(1, 5))]:
        canvas.lay(canvas.blob((x, y), (radius * 0.2, radius * 0.1), angle), 130.0, 1.5)
    canvas.claim("fetal head", shape)
