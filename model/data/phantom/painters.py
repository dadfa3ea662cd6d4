"""Painters of the eight phantom modalities: CT, MR, X-ray, PET, ultrasound, fundus, dermoscopy, endoscopy."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from model.data.phantom.canvas import Canvas, Field, Stencil

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
