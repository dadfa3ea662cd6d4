"""Phantom fundus, dermoscopy and endoscopy: colour pictures taken with light."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from model.data.builders.phantom_canvas import Canvas, Stencil

# ---- fundus --------------------------------------------------------------------------------------------------------


def draw_fundus(canvas: Canvas, names: Collection[str]) -> None:
    """A round view of the retina with its vessel tree and the named structures."""
    middle = canvas.width / 2 + canvas.between(-6, 6), canvas.height / 2 + canvas.between(-6, 6)
    view = canvas.blob(middle, (canvas.between(112, 122),) * 2, 0, 0.0)
    hue = canvas.between(-14, 14)
    base = canvas.tinted((204 + hue, 96 + hue, 38.0), 0.07 * canvas.noise(40) + 0.03 * canvas.noise(6))
    canvas.lay(view, base * (0.72 + 0.33 * np.sqrt(canvas.depth(view)))[..., None], 0.8)
    disc = canvas.place(view, 24) if "optic disc" in names else _outside(canvas, middle)
    if "macula" in names:
        _macula(canvas, view)
    _vessels(canvas, view, disc)
    if "optic disc" in names:
        _optic_disc(canvas, disc)
    if "hemorrhage" in names:
        _hemorrhage(canvas, view)
    if "exudate" in names:
        _exudate(canvas, view)
    for name in canvas.stencils:
        canvas.stencils[name] &= view
    canvas.picture *= (view * np.float32(0.97) + np.float32(0.03))[..., None]
    _camera(canvas, 2.5)


def _outside(canvas: Canvas, middle: tuple[float, float]) -> tuple[float, float]:
    angle = canvas.between(0, 6.28)
    reach = 118 * canvas.unit
    return middle[0] + reach * np.cos(angle), middle[1] + reach * np.sin(angle)


def _vessels(canvas: Canvas, view: Stencil, root: tuple[float, float]) -> None:
    centre = canvas.width / 2, canvas.height / 2
    toward = np.arctan2(centre[1] - root[1], centre[0] - root[0])
    thick, thin = [], []
    for turn in (-2.4, -1.5, -0.85, -0.3, 0.35, 0.9, 1.5, 2.3):
        trunk = canvas.wiggle(root, toward + turn + canvas.between(-0.2, 0.2), canvas.between(110, 190), 0.9, 24)
        thick.append(trunk)
        for at in canvas.rng.integers(5, 22, 3):
            fork = trunk[at] - trunk[at - 1]
            heading = np.arctan2(fork[1], fork[0]) + canvas.between(0.4, 0.9) * (1 if canvas.chance(0.5) else -1)
            thin.append(canvas.wiggle((trunk[at][0], trunk[at][1]), heading, canvas.between(25, 70), 0.8))
    canvas.lay(canvas.strokes(thin, 1.2) & view, (150.0, 46.0, 26.0), 0.7, 0.75)
    canvas.lay(canvas.strokes(thick, 3.0) & view, (142.0, 36.0, 24.0), 0.8, 0.85)
    canvas.lay(canvas.strokes(thick[::2], 1.0) & view, (196.0, 84.0, 48.0), 0.6, 0.5)


def _optic_disc(canvas: Canvas, spot: tuple[float, float]) -> None:
    radius = canvas.between(19, 26)
    shape = canvas.blob(spot, (radius, radius * canvas.between(0.88, 1)), canvas.between(0, 3.14), 0.02, 3)
    canvas.lay(shape, canvas.tinted((250, 205, 118), 0.03 * canvas.noise(4)), 1.6)
    cup = canvas.blob(spot, (radius * canvas.between(0.4, 0.55),) * 2, 0, 0.04)
    canvas.lay(cup, (255.0, 242.0, 190.0), 2.5)
    lines = [canvas.wiggle(spot, angle, radius * 1.5, 0.5) for angle in canvas.rng.uniform(0, 6.28, 5)]
    canvas.lay(canvas.strokes(lines, 2.0) & shape, (168.0, 60.0, 40.0), 0.8, 0.75)
    canvas.claim("optic disc", shape)


def _macula(canvas: Canvas, view: Stencil) -> None:
    radius = canvas.between(22, 30)
    spot = canvas.place(view, radius)
    shape = canvas.blob(spot, (radius, radius * 0.95), canvas.between(0, 3.14), 0.02, 3)
    canvas.lay(shape, canvas.tinted((112, 40, 18), 0.04 * canvas.noise(6)), 5.0, 0.9)
    canvas.lay(canvas.blob(spot, (3, 3), 0), (214.0, 130.0, 70.0), 1.5, 0.7)
    canvas.claim("macula", shape)


def _hemorrhage(canvas: Canvas, view: Stencil) -> None:
    for _ in range(int(canvas.rng.integers(1, 4))):
        radius = canvas.between(16, 24)
        spot = canvas.place(view, radius)
        shape = canvas.blob(spot, (radius * 1.2, radius * 0.7), canvas.between(0, 6.28), 0.26, 9)
        canvas.lay(shape, canvas.tinted((92, 6, 12), 0.16 * canvas.noise(4)), 1.1)
        canvas.claim("hemorrhage", shape)


def _exudate(canvas: Canvas, view: Stencil) -> None:
    for _ in range(int(canvas.rng.integers(1, 3))):
        radius = canvas.between(19, 28)
        spot = canvas.place(view, radius)
        shape = canvas.blob(spot, (radius * 1.15, radius * 0.8), canvas.between(0, 6.28), 0.16, 7)
        canvas.lay(shape, (228.0, 152.0, 60.0), 2.2, 0.65)
        flecks = (canvas.noise(3.2) > 0.25).astype(np.uint8) & shape
        canvas.lay(flecks, (255.0, 236.0, 128.0), 0.7, 0.95)
        canvas.claim("exudate", shape)


# ---- dermoscopy ----------------------------------------------------------------------------------------------------


def draw_dermoscopy(canvas: Canvas, names: Collection[str]) -> None:
    """Skin under a dermatoscope with the named lesions and a few hairs."""
    tone = canvas.between(-22, 14)
    everywhere = np.ones((canvas.height, canvas.width), np.uint8)
    texture = 0.025 * canvas.noise(50) + 0.022 * canvas.noise(5) + 0.015 * canvas.noise(2)
    canvas.picture[:] = canvas.tinted((226 + tone, 178 + tone, 152 + tone), texture)
    painters = {"nevus": _nevus, "keratosis": _keratosis, "angioma": _angioma, "melanoma": _melanoma}
    for name, paint in painters.items():
        if name in names:
            paint(canvas, everywhere)
    if canvas.chance(0.6):
        hairs = []
        for _ in range(int(canvas.rng.integers(3, 12))):
            start = canvas.between(0, canvas.width), canvas.between(0, canvas.height)
            hairs.append(canvas.wiggle(start, canvas.between(0, 6.28), canvas.between(50, 130), 0.7, 20))
        canvas.lay(canvas.strokes(hairs, 1.3), (62.0, 44.0, 36.0), 0.6, 0.7)
    x, y = canvas.grid()
    canvas.picture *= np.clip(1.12 - np.hypot(x, y) / 150 * canvas.between(0.1, 0.4), 0.35, 1.05)[..., None]
    _camera(canvas, 2.0)


def _melanoma(canvas: Canvas, skin: Stencil) -> None:
    radius = canvas.between(28, 42)
    spot = canvas.place(skin, radius)
    shape = canvas.blob(spot, (radius, radius * canvas.between(0.7, 0.9)), canvas.between(0, 6.28), 0.24, 9)
    canvas.lay(shape, canvas.tinted((74, 44, 34), 0.22 * canvas.noise(5)), 1.8)
    patches = canvas.noise(13)
    canvas.lay(shape & (patches > 0.55), canvas.tinted((26, 18, 22), 0.2 * canvas.noise(3)), 2.0)
    canvas.lay(canvas.shrunk(shape, 4) & (patches < -0.75), (104.0, 112.0, 140.0), 2.5, 0.85)
    canvas.claim("melanoma", shape)


def _nevus(canvas: Canvas, skin: Stencil) -> None:
    radius = canvas.between(24, 35)
    spot = canvas.place(skin, radius)
    shape = canvas.blob(spot, (radius, radius * canvas.between(0.88, 1)), canvas.between(0, 6.28), 0.025, 3)
    x, y = canvas.grid()
    warp_x, warp_y = x + 2 * canvas.noise(18), y + 2 * canvas.noise(18)
    net = np.sin(warp_x * 0.85) * np.sin(warp_y * 0.85)
    canvas.lay(shape, canvas.tinted((166, 104, 64), -0.2 * (np.abs(net) < 0.28)), 2.4)
    canvas.claim("nevus", shape)


def _angioma(canvas: Canvas, skin: Stencil) -> None:
    radius = canvas.between(22, 34)
    spot = canvas.place(skin, radius)
    shape = canvas.blob(spot, (radius, radius * canvas.between(0.8, 1)), canvas.between(0, 6.28), 0.07, 6)
    canvas.lay(shape, (208.0, 92.0, 104.0), 1.6)
    pools = (canvas.noise(8) > -0.35).astype(np.uint8) & canvas.shrunk(shape, 1.5)
    canvas.lay(pools, canvas.tinted((164, 18, 44), 0.14 * canvas.noise(6)), 1.1)
    canvas.claim("angioma", shape)


def _keratosis(canvas: Canvas, skin: Stencil) -> None:
    radius = canvas.between(26, 38)
    spot = canvas.place(skin, radius)
    shape = canvas.blob(spot, (radius, radius * canvas.between(0.75, 0.95)), canvas.between(0, 6.28), 0.1, 8)
    ridges = np.cos(canvas.noise(10) * 4)
    canvas.lay(shape, canvas.tinted((206, 164, 84), 0.09 * ridges), 0.9)
    canvas.lay(canvas.rim(shape, 1.5), (150.0, 108.0, 56.0), 0.8, 0.8)
    for count, colour, size in ((9, (88.0, 58.0, 34.0), 2.6), (8, (255.0, 246.0, 218.0), 2.2)):
        rows, columns = np.nonzero(canvas.shrunk(shape, 4))
        if len(rows):
            chosen = canvas.rng.integers(0, len(rows), count)
            dots = np.zeros_like(shape)
            for x, y in zip(columns[chosen], rows[chosen], strict=True):
                dots |= canvas.blob((float(x), float(y)), (size, size), 0, 0)
            canvas.lay(dots, colour, 0.7, 0.9)
    canvas.claim("keratosis", shape)


# ---- endoscopy -----------------------------------------------------------------------------------------------------


def draw_endoscopy(canvas: Canvas, names: Collection[str]) -> None:
    """Moist folded mucosa under a headlight with the named structures."""
    view = _mucosa(canvas)
    field = canvas.shrunk(view, 3)
    painters = {"bleeding": _bleeding, "ulcer": _ulcer, "polyp": _polyp, "instrument": _instrument}
    for name, paint in painters.items():
        if name in names:
            paint(canvas, field)
    for name in canvas.stencils:
        canvas.stencils[name] &= view
    _glints(canvas, view)
    canvas.picture *= canvas.soften(view * np.float32(0.97) + np.float32(0.03), 0.8)[..., None]
    _camera(canvas, 2.5)


def _mucosa(canvas: Canvas) -> Stencil:
    cut = canvas.between(18, 48)
    half_w, half_h = canvas.width / 2 / canvas.unit - canvas.between(3, 9), canvas.height / 2 / canvas.unit - 5
    corners = np.array(
        [[-half_w + cut, -half_h], [half_w - cut, -half_h], [half_w, -half_h + cut], [half_w, half_h - cut],
         [half_w - cut, half_h], [-half_w + cut, half_h], [-half_w, half_h - cut], [-half_w, -half_h + cut]]
    )  # fmt: skip
    view = canvas.fill(canvas.turned(corners, (canvas.width / 2, canvas.height / 2), 0))
    x, y = canvas.grid()
    lumen_x, lumen_y = canvas.between(-70, 70), canvas.between(-70, 70)
    away = np.hypot(x - lumen_x, y - lumen_y) + 7 * canvas.noise(35)
    folds = np.sin(away / canvas.between(8, 12)) ** 3
    shade = 0.10 * folds + 0.05 * canvas.noise(24) + 0.025 * canvas.noise(4)
    light = np.clip(0.45 + away / 130, 0.4, 1.0) * np.clip(1.15 - np.hypot(x, y) / 420, 0.6, 1.1)
    warm = canvas.between(-14, 14)
    canvas.lay(view, canvas.tinted((216, 118 + warm, 102 + warm), shade) * light[..., None], 0.8)
    start = canvas.width / 2 + lumen_x, canvas.height / 2 + lumen_y
    lines = [canvas.wiggle(start, angle, 150, 1.2, 20) for angle in canvas.rng.uniform(0, 6.28, 9)]
    canvas.lay(canvas.strokes(lines, 1.2) & view, (176.0, 62.0, 62.0), 0.9, 0.35)
    return view


def _polyp(canvas: Canvas, field: Stencil) -> None:
    radius = canvas.between(25, 37)
    spot = canvas.place(field, radius)
    shape = canvas.blob(spot, (radius, radius * canvas.between(0.82, 1)), canvas.between(0, 6.28), 0.06, 5) & field
    shadow = np.roll(shape, (round(5 * canvas.unit), round(4 * canvas.unit)), (0, 1)) & field
    canvas.lay(shadow, (92.0, 26.0, 30.0), 4.0, 0.75)
    x, y = canvas.grid()
    centre_x = (spot[0] - (canvas.width - 1) / 2) / canvas.unit
    centre_y = (spot[1] - (canvas.height - 1) / 2) / canvas.unit
    lit = np.exp(-(((x - centre_x + radius * 0.3) ** 2 + (y - centre_y + radius * 0.35) ** 2) / (radius * 0.85) ** 2))
    pits = 0.05 * np.cos(canvas.noise(4) * 3)
    canvas.lay(shape, canvas.tinted((196, 108, 112), 0.34 * lit - 0.08 + pits), 1.2)
    glint = (spot[0] - radius * 0.35 * canvas.unit, spot[1] - radius * 0.4 * canvas.unit)
    canvas.lay(canvas.blob(glint, (radius * 0.17, radius * 0.1), -0.6, 0.1), (255.0, 250.0, 245.0), 1.0, 0.95)
    canvas.claim("polyp", shape)


def _ulcer(canvas: Canvas, field: Stencil) -> None:
    radius = canvas.between(22, 33)
    spot = canvas.place(field, radius)
    shape = canvas.blob(spot, (radius, radius * canvas.between(0.65, 0.85)), canvas.between(0, 6.28), 0.13, 7) & field
    canvas.lay(shape, (170.0, 34.0, 34.0), 2.4, 0.95)
    canvas.lay(canvas.shrunk(shape, 4), canvas.tinted((240, 224, 166), 0.07 * canvas.noise(4)), 1.4)
    canvas.claim("ulcer", shape)


def _bleeding(canvas: Canvas, field: Stencil) -> None:
    radius = canvas.between(20, 30)
    spot = canvas.place(field, radius)
    shape = canvas.blob(spot, (radius, radius * 0.8), canvas.between(0, 6.28), 0.25, 9)
    down = canvas.between(0, 6.28)
    streams = [canvas.wiggle(spot, down + turn, canvas.between(36, 60), 0.5) for turn in (-0.35, 0.3)]
    shape = (shape | canvas.strokes(streams, 9)) & field
    canvas.lay(shape, canvas.tinted((122, 4, 10), 0.2 * canvas.noise(6)), 1.2)
    gloss = (canvas.noise(6) > 1.7).astype(np.uint8) & canvas.shrunk(shape, 3)
    canvas.lay(gloss, (255.0, 170.0, 165.0), 0.8, 0.8)
    canvas.claim("bleeding", shape)


def _instrument(canvas: Canvas, field: Stencil) -> None:
    tip = canvas.place(field, 20)
    angle = canvas.between(0, 6.28)
    half = canvas.between(8, 11)
    reach = canvas.between(230, 260)
    shaft = canvas.fill(canvas.turned(np.array([[0, -half], [reach, -half], [reach, half], [0, half]]), tip, angle))
    jaws = np.array(
        [[4, -half], [-24, -half * 1.7], [-24, -half * 1.0], [-4, 0], [-24, half], [-24, half * 1.7], [4, half]]
    )
    shape = (shaft | canvas.fill(canvas.turned(jaws, tip, angle))) & field
    x, y = canvas.grid()
    x = x - (tip[0] - (canvas.width - 1) / 2) / canvas.unit
    y = y - (tip[1] - (canvas.height - 1) / 2) / canvas.unit
    across = (y * np.cos(angle) - x * np.sin(angle)) / half
    along = x * np.cos(angle) + y * np.sin(angle)
    metal = 158 + 78 * np.cos(np.clip(across + 0.25, -1.6, 1.6) * 1.7) + 16 * np.sin(along * 0.9) * (along > 6)
    canvas.lay(shape, np.stack([metal * 0.94, metal * 0.98, metal * 1.04], -1).astype(np.float32), 0.9)
    canvas.claim("instrument", shape)


def _glints(canvas: Canvas, view: Stencil) -> None:
    spots = (canvas.noise(7) > 2.35).astype(np.uint8) & view
    canvas.lay(spots, (255.0, 244.0, 240.0), 0.8, 0.85)


def _camera(canvas: Canvas, grain: float) -> None:
    """Sensor: a little blur, exposure and grain."""
    picture = canvas.soften(canvas.picture, canvas.between(0.3, 0.7)) * np.float32(canvas.between(0.88, 1.06))
    picture += (canvas.between(0.5, 1.0) * grain * canvas.noise(1.2))[..., None]
    canvas.picture = picture
