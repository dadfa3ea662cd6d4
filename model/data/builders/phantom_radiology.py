"""Phantom CT, MR and X-ray: grey pictures of a body slice, a head slice and a chest."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from model.data.builders.phantom_canvas import Canvas, Stencil

# ---- CT: an axial slice of an abdomen ------------------------------------------------------------------------------


def draw_ct(canvas: Canvas, names: Collection[str]) -> None:
    """Body wall, fat, ribs and spine with the named organs strewn over the abdomen."""
    cavity = _abdomen(canvas)
    painters = {"liver": _liver, "stomach": _stomach, "kidney": _kidneys, "vertebra": _vertebra, "tumor": _ct_tumor}
    for name, paint in painters.items():
        if name in names:
            paint(canvas, cavity)
    _ct_finish(canvas)


def _abdomen(canvas: Canvas) -> Stencil:
    tilt = canvas.between(-0.35, 0.35)
    middle = canvas.width / 2 + canvas.between(-10, 10), canvas.height / 2 + canvas.between(-8, 8)
    radii = canvas.between(104, 122), canvas.between(82, 104)
    canvas.picture += 4
    body = canvas.blob(middle, radii, tilt, 0.012)
    canvas.lay(body, 62 + 5 * canvas.noise(9))
    canvas.lay(canvas.rim(body, 2), 96.0, 0.6)
    wall = canvas.shrunk(body, canvas.between(7, 12))
    canvas.lay(wall, 118 + 6 * canvas.noise(4))
    cavity = canvas.shrunk(wall, 7)
    canvas.lay(cavity, 76 + 7 * canvas.noise(16) + 4 * canvas.noise(5), 1.5)
    _bowel(canvas, cavity)
    _ribs(canvas, middle, (radii[0] - 15, radii[1] - 15), tilt)
    return cavity


def _bowel(canvas: Canvas, cavity: Stencil) -> None:
    """Faint soft-tissue loops, never named: they fill the fat between the organs."""
    field = canvas.noise(15)
    loops = ((np.abs(field) < 0.32) & (cavity > 0)).astype(np.uint8)
    canvas.lay(loops, 99 + 4 * canvas.noise(4), 1.5, 0.7)


def _ribs(canvas: Canvas, middle: tuple[float, float], radii: tuple[float, float], tilt: float) -> None:
    for theta in np.arange(0.2, 6.2, canvas.between(0.55, 0.75)) + canvas.between(0, 0.5):
        local = np.array([[radii[0] * np.cos(theta), radii[1] * np.sin(theta)]])
        x, y = canvas.turned(local, middle, tilt)[0]
        along = np.arctan2(radii[1] * np.cos(theta), -radii[0] * np.sin(theta)) + tilt
        bone = canvas.blob((x, y), (canvas.between(6, 9), 2.6), along, 0.04)
        canvas.lay(bone, 205.0, 0.7)


def _liver(canvas: Canvas, cavity: Stencil) -> None:
    radius = canvas.between(36, 48)
    spot = canvas.place(cavity, radius * 0.85)
    angle = canvas.between(0, 6.28)
    shape = canvas.blob(spot, (radius * 1.15, radius * 0.85), angle, 0.13) & cavity
    canvas.lay(shape, 146 + 4 * canvas.noise(2) + 3 * canvas.noise(12))
    vessels = [canvas.wiggle(spot, angle + turn, radius * 0.95, 0.9) for turn in (0.3, 1.9, 3.4, 5.0)]
    canvas.lay(canvas.strokes(vessels, 2.4) & shape, 171.0, 0.9, 0.8)
    canvas.claim("liver", shape)


def _stomach(canvas: Canvas, cavity: Stencil) -> None:
    radius = canvas.between(26, 34)
    spot = canvas.place(cavity, radius)
    shape = canvas.blob(spot, (radius * 1.25, radius * 0.85), canvas.between(0, 6.28), 0.07, 3) & cavity
    inside = canvas.shrunk(shape, 4)
    canvas.lay(shape, 138 + 4 * canvas.noise(3))
    level = spot[1] + canvas.between(-0.3, 0.2) * radius * canvas.unit
    rows = np.arange(canvas.height)[:, None] < level
    canvas.lay(inside & rows.astype(np.uint8), 8.0, 0.8)
    canvas.lay(inside & (1 - rows.astype(np.uint8)), 104 + 8 * canvas.noise(3), 0.8)
    canvas.claim("stomach", shape)


def _kidneys(canvas: Canvas, cavity: Stencil) -> None:
    for _ in range(2 if canvas.chance(0.4) else 1):
        length = canvas.between(23, 30)
        spot = canvas.place(cavity, length * 0.9)
        theta = np.linspace(0, 2 * np.pi, 72, endpoint=False)
        notch = 1 - 0.55 * np.exp(-(((theta - np.pi / 2) / 0.55) ** 2))
        local = np.stack([length * np.cos(theta), 0.72 * length * notch * np.sin(theta)], 1)
        angle = canvas.between(0, 6.28)
        shape = canvas.fill(canvas.turned(local, spot, angle)) & cavity
        canvas.lay(shape, 205 + 6 * canvas.noise(3))
        pelvis = np.stack([0.55 * length * np.cos(theta), 0.26 * length * np.sin(theta) + 0.08 * length], 1)
        canvas.lay(canvas.fill(canvas.turned(pelvis, spot, angle)) & shape, 112 + 8 * canvas.noise(5), 1.6)
        canvas.claim("kidney", shape)


def _vertebra(canvas: Canvas, cavity: Stencil) -> None:
    size = canvas.between(19, 24)
    spot = canvas.place(cavity, size * 1.6)
    angle = canvas.between(-0.5, 0.5) + (np.pi if canvas.chance(0.25) else 0.0)
    body = canvas.blob(spot, (size * 1.05, size * 0.85), angle, 0.03, 3)
    back = canvas.turned(np.array([[0.0, size * 1.05]]), spot, angle)[0]
    arch = canvas.blob((back[0], back[1]), (size * 0.8, size * 0.55), angle, 0.03, 3)
    spines = [
        np.array([[0.0, size], [0.0, size * 2.05]]),
        np.array([[-size * 0.4, size], [-size * 1.5, size * 1.3]]),
        np.array([[size * 0.4, size], [size * 1.5, size * 1.3]]),
    ]
    limbs = canvas.strokes([canvas.turned(line, spot, angle) for line in spines], 7)
    shape = body | arch | limbs
    canvas.lay(shape, 242.0, 0.8)
    canvas.lay(canvas.shrunk(body, 3), 196 + 14 * canvas.noise(1.8), 0.9)
    canvas.lay(canvas.blob((back[0], back[1]), (size * 0.42, size * 0.32), angle, 0.03), 108.0, 0.8)
    canvas.claim("vertebra", shape)


def _ct_tumor(canvas: Canvas, cavity: Stencil) -> None:
    radius = canvas.between(17, 27)
    spot = canvas.place(cavity, radius)
    shape = canvas.blob(spot, (radius, radius * canvas.between(0.8, 1.0)), canvas.between(0, 6.28), 0.14, 7)
    canvas.lay(shape, 172 + 10 * canvas.noise(4), 1.6)
    canvas.lay(canvas.shrunk(shape, radius * 0.27), 48 + 14 * canvas.noise(5), 1.8)
    canvas.claim("tumor", shape)


def _ct_finish(canvas: Canvas) -> None:
    canvas.picture = canvas.soften(canvas.picture, canvas.between(0.4, 0.8))
    canvas.picture += canvas.between(3, 8) * canvas.noise(1.4)
    gain, shift = canvas.between(0.85, 1.12), canvas.between(-10, 8)
    canvas.picture = np.maximum(canvas.picture * gain + shift, 0)


# ---- MR: an axial slice of a head ----------------------------------------------------------------------------------


def draw_mr(canvas: Canvas, names: Collection[str]) -> None:
    """Scalp, skull and folded brain with the named structures."""
    brain, tilt = _head(canvas)
    painters = {"ventricle": _ventricle, "cerebellum": _cerebellum, "edema": _edema, "tumor": _mr_tumor}
    for name, paint in painters.items():
        if name in names:
            paint(canvas, brain, tilt)
    _mr_finish(canvas)


def _head(canvas: Canvas) -> tuple[Stencil, float]:
    tilt = canvas.between(-0.6, 0.6)
    middle = canvas.width / 2 + canvas.between(-10, 10), canvas.height / 2 + canvas.between(-8, 8)
    radii = canvas.between(82, 98), canvas.between(102, 116)
    canvas.picture += 6
    scalp = canvas.blob(middle, radii, tilt, 0.01)
    canvas.lay(scalp, 168 + 12 * canvas.noise(5))
    skull = canvas.shrunk(scalp, 4)
    canvas.lay(skull, 26.0, 0.8)
    brain = canvas.shrunk(skull, canvas.between(5, 8))
    folds = canvas.noise(9) + 0.4 * canvas.noise(5)
    grey = np.exp(-((folds / 0.55) ** 2))
    deep = np.clip((canvas.depth(brain) - 0.25) / 0.45, 0, 1)
    canvas.lay(brain, 136 - 46 * grey * (1 - 0.75 * deep) + 3 * canvas.noise(2), 0.9)
    sulci = (np.abs(folds) < 0.09) & (canvas.depth(brain) < 0.35) & (brain > 0)
    canvas.lay(sulci.astype(np.uint8), 42.0, 0.7, 0.8)
    falx = canvas.turned(np.array([[0.0, -radii[1]], [canvas.between(-3, 3), 0], [0.0, radii[1]]]), middle, tilt)
    canvas.lay(canvas.strokes([falx], 1.6) & brain, 50.0, 0.7, 0.8)
    return brain, tilt


def _ventricle(canvas: Canvas, brain: Stencil, tilt: float) -> None:
    size = canvas.between(25, 34)
    spot = canvas.place(brain, size * 0.9)
    angle = tilt + canvas.between(-0.4, 0.4)
    shape = np.zeros_like(brain)
    t = np.linspace(-1, 1, 24)
    for side in (-1, 1):
        spine = side * size * (0.14 + 0.42 * t**2)
        width = size * (0.10 + 0.14 * np.sqrt(np.clip(1 - t**2, 0, 1)))
        local = np.concatenate([np.stack([spine - width, size * t], 1), np.stack([spine + width, size * t], 1)[::-1]])
        shape |= canvas.fill(canvas.turned(local, spot, angle))
    shape &= brain
    canvas.lay(shape, 16 + 3 * canvas.noise(4), 0.9)
    canvas.claim("ventricle", shape)


def _cerebellum(canvas: Canvas, brain: Stencil, tilt: float) -> None:
    size = canvas.between(28, 38)
    spot = canvas.place(brain, size * 0.8)
    angle = tilt + canvas.between(-0.5, 0.5) + (np.pi if canvas.chance(0.3) else 0.0)
    shape = np.zeros_like(brain)
    for side in (-1, 1):
        lobe = canvas.turned(np.array([[side * size * 0.52, 0.0]]), spot, angle)[0]
        shape |= canvas.blob((lobe[0], lobe[1]), (size * 0.66, size * 0.62), angle, 0.04)
    shape &= brain
    x, y = canvas.grid()
    across = y * np.cos(angle) - x * np.sin(angle) + 2.0 * canvas.noise(14)
    canvas.lay(canvas.rim(shape, 2), 40.0, 0.8)
    canvas.lay(canvas.shrunk(shape, 2), 118 + 52 * np.sin(across * 1.05), 0.7)
    canvas.claim("cerebellum", shape)


def _edema(canvas: Canvas, brain: Stencil, tilt: float) -> None:
    radius = canvas.between(22, 32)
    spot = canvas.place(brain, radius)
    shape = canvas.blob(spot, (radius, radius * canvas.between(0.65, 0.9)), canvas.between(0, 6.28), 0.24, 8) & brain
    canvas.lay(shape, 205 + 7 * canvas.noise(7), 3.0)
    canvas.claim("edema", shape)


def _mr_tumor(canvas: Canvas, brain: Stencil, tilt: float) -> None:
    radius = canvas.between(17, 27)
    spot = canvas.place(brain, radius)
    shape = canvas.blob(spot, (radius, radius * canvas.between(0.8, 1.0)), canvas.between(0, 6.28), 0.13, 7) & brain
    canvas.lay(shape, 232 + 12 * canvas.noise(4), 1.2)
    canvas.lay(canvas.shrunk(shape, radius * 0.27), 62 + 18 * canvas.noise(4), 1.8)
    canvas.claim("tumor", shape)


def _mr_finish(canvas: Canvas) -> None:
    bias = 1 + 0.10 * canvas.noise(150)
    sharp = canvas.soften(canvas.picture, canvas.between(0.5, 0.9)) * np.clip(bias, 0.75, 1.25)
    grain = canvas.between(3, 8)
    real, imaginary = sharp + grain * canvas.noise(1.2), grain * canvas.noise(1)
    canvas.picture = np.asarray(np.hypot(real, imaginary) * canvas.between(0.9, 1.08), np.float32)


# ---- X-ray: a chest from the front ---------------------------------------------------------------------------------


def draw_x_ray(canvas: Canvas, names: Collection[str]) -> None:
    """Shoulders, spine, ribs and lungs with the named structures."""
    lungs, parts, middle, tilt = _chest(canvas)
    if "pleural effusion" in names:
        _effusion(canvas, parts[int(canvas.rng.integers(2))])
    if "heart" in names:
        _heart_shadow(canvas, middle, tilt)
    _rib_shadows(canvas, tilt)
    if "lung nodule" in names:
        _nodule(canvas, lungs)
    if "pacemaker" in names:
        _pacemaker(canvas, lungs)
    canvas.picture = canvas.soften(canvas.picture, canvas.between(0.5, 1.0))
    canvas.picture += canvas.between(2, 6) * canvas.noise(1.2)
    canvas.picture = np.maximum(canvas.picture * canvas.between(0.85, 1.1) + canvas.between(-10, 8), 0)


def _chest(canvas: Canvas) -> tuple[Stencil, tuple[Stencil, Stencil], tuple[float, float], float]:
    tilt = canvas.between(-0.3, 0.3)
    scale = canvas.between(0.82, 1.12)
    middle = canvas.width / 2 + canvas.between(-18, 18), canvas.height / 2 + canvas.between(-16, 16)
    canvas.picture += 20
    trunk = np.array(
        [[-30, -150], [-34, -112], [-112, -84], [-128, 150], [128, 150], [112, -84], [34, -112], [30, -150]]
    )
    body = canvas.fill(canvas.turned(trunk * scale, middle, tilt))
    canvas.lay(body, 150 + 6 * canvas.noise(40), 7)
    t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    parts = []
    for side in (-1, 1):
        width, height = canvas.between(37, 45) * scale, canvas.between(74, 88) * scale
        shape = np.stack([width * np.sign(np.cos(t)) * np.abs(np.cos(t)) ** 0.85, height * np.sin(t)], 1)
        shape[:, 0] *= 1 + 0.30 * shape[:, 1] / height
        shape[:, 0] += side * (22 * scale + width)
        shape[:, 1] = np.minimum(shape[:, 1], height * (0.72 + 0.12 * np.cos(shape[:, 0] / 14)))
        shape += canvas.rng.normal(0, 0.8, shape.shape)
        parts.append(canvas.fill(canvas.turned(shape, middle, tilt)))
    lungs = parts[0] | parts[1]
    canvas.lay(lungs, 62 + 5 * canvas.noise(20) + 5 * canvas.noise(5), 2.2)
    _lung_vessels(canvas, middle, parts, tilt)
    spine = canvas.turned(np.array([[0.0, -140 * scale], [0.0, 140 * scale]]), middle, tilt)
    x, y = canvas.grid()
    steps = 6 * np.sin((y * np.cos(tilt) - x * np.sin(tilt)) * 0.42)
    canvas.lay(canvas.strokes([spine], 22 * scale), 176 + steps + 3 * canvas.noise(5), 3.5, 0.75)
    for side in (-1, 1):
        bone = np.array([[side * 12, -76], [side * 50, -88], [side * 98, -84]]) * scale
        canvas.lay(canvas.strokes([canvas.turned(bone, middle, tilt)], 8), 190.0, 1.6, 0.7)
    canvas.claim("lungs", lungs)
    return lungs, (parts[0], parts[1]), middle, tilt


def _lung_vessels(canvas: Canvas, middle: tuple[float, float], parts: list[Stencil], tilt: float) -> None:
    for side, part in zip((-1, 1), parts, strict=True):
        root = canvas.turned(np.array([[side * 24.0, 4.0]]), middle, tilt)[0]
        outward = tilt + (0 if side > 0 else np.pi)
        lines = [
            canvas.wiggle((root[0], root[1]), outward + turn, canvas.between(35, 70), 0.7)
            for turn in np.linspace(-1.3, 1.3, 7)
        ]
        canvas.lay(canvas.strokes(lines, 2.2) & part, 104.0, 1.6, 0.6)


def _rib_shadows(canvas: Canvas, tilt: float) -> None:
    height = canvas.between(20, 25)
    x, y = canvas.grid()
    along, across = x * np.cos(tilt) + y * np.sin(tilt), y * np.cos(tilt) - x * np.sin(tilt)
    phase = (across - 0.0034 * along**2 + canvas.between(0, 25)) / height * 2 * np.pi
    bands = np.clip(np.cos(phase) - 0.35, 0, 0.4) * np.clip(np.abs(along) / 30, 0, 1)
    within = np.clip((115 - np.abs(along)) / 15, 0, 1) * np.clip(canvas.picture / 45 - 0.6, 0, 1)
    canvas.picture += 42 * bands * within


def _heart_shadow(canvas: Canvas, middle: tuple[float, float], tilt: float) -> None:
    radius = canvas.between(31, 41)
    side = 1 if canvas.chance(0.5) else -1
    offset = np.array([[side * canvas.between(16, 44), canvas.between(-44, 38)]])
    x, y = canvas.keep(canvas.turned(offset, middle, tilt)[0], radius * 0.8)
    shape = canvas.blob((x, y), (radius * 1.15, radius * 0.85), tilt + side * canvas.between(0.4, 1.1), 0.05, 3)
    canvas.lay(shape, 202 + 4 * canvas.noise(14), 2.2)
    canvas.claim("heart", shape)


def _effusion(canvas: Canvas, lung: Stencil) -> None:
    rows, columns = np.nonzero(lung)
    bottom, height = float(rows.max()), float(np.ptp(rows))
    x = (np.arange(canvas.width) - columns.mean()) / max(float(np.ptp(columns)) / 2, 1)
    level = bottom - height * (canvas.between(0.3, 0.5) + 0.14 * x * x)
    below = (np.arange(canvas.height)[:, None] > level[None, :]).astype(np.uint8)
    shape = lung & below
    canvas.lay(shape, 230 + 4 * canvas.noise(20), 1.8)
    rows, columns = np.nonzero(shape)
    canvas.keep(np.array([columns.mean(), rows.mean()]), 30)
    canvas.claim("pleural effusion", shape)


def _nodule(canvas: Canvas, lungs: Stencil) -> None:
    radius = canvas.between(18, 25)
    spot = canvas.place(lungs, radius * 0.9)
    shape = canvas.blob(spot, (radius, radius * canvas.between(0.85, 1)), canvas.between(0, 6.28), 0.07, 7)
    canvas.lay(shape, 150 + 22 * canvas.depth(shape) + 7 * canvas.noise(3), 1.5, 0.95)
    canvas.claim("lung nodule", shape)


def _pacemaker(canvas: Canvas, lungs: Stencil) -> None:
    size = canvas.between(18, 24)
    spot = canvas.place(lungs, size)
    angle = canvas.between(-0.7, 0.7)
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    power = 0.45
    local = np.stack(
        [
            np.sign(np.cos(t)) * np.abs(np.cos(t)) ** power * size,
            np.sign(np.sin(t)) * np.abs(np.sin(t)) ** power * size * 0.82,
        ],
        1,
    )
    case = canvas.fill(canvas.turned(local, spot, angle))
    start = canvas.turned(np.array([[0.0, -size * 0.7]]), spot, angle)[0]
    wire = canvas.wiggle((start[0], start[1]), canvas.between(0, 6.28), canvas.between(60, 100), 1.6)
    canvas.lay(canvas.strokes([wire], 2.2), 246.0, 0.6)
    canvas.lay(case, 252.0, 0.6)
    canvas.lay(canvas.shrunk(case, 5), 206.0, 0.8)
    coil = canvas.turned(np.array([[-0.5, 0.35], [0.5, 0.35], [0.5, -0.1], [-0.5, -0.1]]) * size, spot, angle)
    canvas.lay(canvas.fill(coil), 240.0, 0.7)
    canvas.claim("pacemaker", case)
