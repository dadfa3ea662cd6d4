"""Phantom scenes: stylised pictures of eight modalities with the exact visible mask of every named structure.

Everything is drawn from one random generator, so a seed fixes a picture. Which structures appear, where, how large and
how turned is left to chance: neither the modality nor the place gives a structure away.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from model.data.phantom.canvas import Canvas
from model.data.phantom.painters import (
    draw_ct,
    draw_dermoscopy,
    draw_endoscopy,
    draw_fundus,
    draw_mr,
    draw_pet,
    draw_ultrasound,
    draw_x_ray,
)


@dataclass(frozen=True)
class ModalityPlan:
    """One modality: ``always`` structures are in every image, each ``optional`` one in about half of them."""

    key: str
    spoken: str
    article: str
    always: tuple[str, ...]
    optional: tuple[str, ...]

    @property
    def structures(self) -> tuple[str, ...]:
        """All names that this modality can show."""
        return self.always + self.optional


_PLANS = (
    ModalityPlan("ct", "CT", "a", ("vertebra",), ("liver", "kidney", "stomach", "tumor")),
    ModalityPlan("mr", "MR", "an", (), ("ventricle", "cerebellum", "edema", "tumor")),
    ModalityPlan("x_ray", "X-ray", "an", ("lungs",), ("heart", "lung nodule", "pleural effusion", "pacemaker")),
    ModalityPlan("pet", "PET", "a", (), ("brain", "heart", "bladder", "tumor")),
    ModalityPlan("fundus", "fundus", "a", (), ("optic disc", "macula", "hemorrhage", "exudate")),
    ModalityPlan("dermoscopy", "dermoscopy", "a", (), ("melanoma", "nevus", "angioma", "keratosis")),
    ModalityPlan("endoscopy", "endoscopy", "an", (), ("polyp", "ulcer", "bleeding", "instrument")),
    ModalityPlan("ultrasound", "ultrasound", "an", (), ("cyst", "solid mass", "gallstone", "fetal head")),
)

PLANS: Mapping[str, ModalityPlan] = MappingProxyType({plan.key: plan for plan in _PLANS})
"""Modality key (as in SA-Med2D-20M file names) → plan."""

MODALITIES: tuple[str, ...] = tuple(PLANS)

CLASS_NAMES: tuple[str, ...] = ("background", *dict.fromkeys(name for plan in _PLANS for name in plan.structures))
"""Class id → name; id 0 is background. A name shared by several modalities has one id."""

CLASS_IDS: Mapping[str, int] = MappingProxyType({name: index for index, name in enumerate(CLASS_NAMES)})

LESIONS: frozenset[str] = frozenset(
    (
        *("tumor", "edema", "lung nodule", "pleural effusion", "hemorrhage", "exudate", "melanoma", "nevus"),
        *("angioma", "keratosis", "polyp", "ulcer", "bleeding", "cyst", "solid mass", "gallstone"),
    )
)


def structures_of(modality: str) -> tuple[str, ...]:
    """Names of the structures that a modality can show."""
    return PLANS[modality].structures


SMALLEST_SHARE = 0.010
"""Least visible area of a structure, as a share of the picture; scenes with less are drawn again."""

_ATTEMPTS = 8
_DRAWERS: Mapping[str, tuple[int, Callable[[Canvas, Collection[str]], None]]] = MappingProxyType(
    {
        "ct": (1, draw_ct),
        "mr": (1, draw_mr),
        "x_ray": (1, draw_x_ray),
        "pet": (1, draw_pet),
        "fundus": (3, draw_fundus),
        "dermoscopy": (3, draw_dermoscopy),
        "endoscopy": (3, draw_endoscopy),
        "ultrasound": (1, draw_ultrasound),
    }
)


@dataclass(frozen=True)
class Structure:
    """One named structure of a scene; ``mask`` is bool [H, W] and holds its visible pixels, all instances together."""

    name: str
    class_id: int
    mask: NDArray[np.bool_]

    @cached_property
    def centre(self) -> tuple[float, float]:
        """Centre of mass (x, y) as shares of the picture's width and height, 0..1."""
        rows, columns = np.nonzero(self.mask)
        height, width = self.mask.shape
        return float((columns.mean() + 0.5) / width), float((rows.mean() + 0.5) / height)

    @cached_property
    def area(self) -> int:
        """Visible pixels."""
        return int(self.mask.sum())

    @cached_property
    def compact(self) -> bool:
        """Whether the structure is one piece rather than several scattered ones."""
        rows, columns = np.nonzero(self.mask)
        spread = float(rows.var() + columns.var())
        return spread < 0.3 * self.area

    def share(self, half: str) -> float:
        """Share 0..1 of the structure's pixels in the ``left``, ``right``, ``upper`` or ``lower`` half."""
        height, width = self.mask.shape
        halves = {
            "left": self.mask[:, : width // 2],
            "right": self.mask[:, (width + 1) // 2 :],
            "upper": self.mask[: height // 2],
            "lower": self.mask[(height + 1) // 2 :],
        }
        return float(halves[half].sum()) / max(self.area, 1)


@dataclass(frozen=True)
class Scene:
    """A picture, uint8 RGB [H, W, 3], with its modality and the structures that can be seen; masks do not overlap."""

    image: NDArray[np.uint8]
    modality: str
    structures: tuple[Structure, ...]

    @property
    def plan(self) -> ModalityPlan:
        """The modality's plan: how it is called and what it can show."""
        return PLANS[self.modality]

    @property
    def present(self) -> tuple[str, ...]:
        """Names of the structures in the picture."""
        return tuple(structure.name for structure in self.structures)

    @property
    def absent(self) -> tuple[str, ...]:
        """Names of this modality's structures that are not in the picture."""
        return tuple(name for name in self.plan.structures if name not in self.present)

    def structure(self, name: str) -> Structure:
        """The structure of that name; ``KeyError`` if it is absent."""
        for structure in self.structures:
            if structure.name == name:
                return structure
        raise KeyError(name)

    def label_map(self) -> NDArray[np.uint8]:
        """Class id of every pixel, uint8 [H, W]; 0 is background (see ``CLASS_NAMES``)."""
        labels = np.zeros(self.image.shape[:2], np.uint8)
        for structure in self.structures:
            labels[structure.mask] = structure.class_id
        return labels


def render_scene(rng: np.random.Generator, modality: str | None = None, size: int | tuple[int, int] = 256) -> Scene:
    """Draw one scene.

    ``modality`` is a key of ``MODALITIES`` or None for any; ``size`` is the side of a square picture or (height,
    width), in pixels. The scene holds 1 to 5 structures; each optional one of the modality with a chance of about ½.
    """
    key = modality if modality is not None else MODALITIES[int(rng.integers(len(MODALITIES)))]
    height, width = (size, size) if isinstance(size, int) else size
    names = _cast(rng, PLANS[key])
    for _ in range(_ATTEMPTS):
        canvas = _drawn(rng, key, names, height, width)
        areas = {name: int(stencil.sum()) for name, stencil in canvas.stencils.items()}
        if all(areas.get(name, 0) >= SMALLEST_SHARE * height * width for name in names):
            break
    return _finished(canvas, key)


def _cast(rng: np.random.Generator, plan: ModalityPlan) -> tuple[str, ...]:
    while True:
        chosen = tuple(name for name in plan.optional if rng.random() < 0.5)
        if plan.always or chosen:
            return plan.always + chosen


def _drawn(rng: np.random.Generator, key: str, names: Collection[str], height: int, width: int) -> Canvas:
    channels, draw = _DRAWERS[key]
    canvas = Canvas(rng, height, width, channels)
    draw(canvas, names)
    return canvas


def _finished(canvas: Canvas, modality: str) -> Scene:
    picture = np.clip(canvas.picture, 0, 255).astype(np.uint8)
    if picture.ndim == 2:
        picture = np.repeat(picture[..., None], 3, 2)
    structures = tuple(
        Structure(name, CLASS_IDS[name], stencil.astype(bool))
        for name, stencil in sorted(canvas.stencils.items(), key=lambda item: CLASS_IDS[item[0]])
        if stencil.any()
    )
    return Scene(picture, modality, structures)
