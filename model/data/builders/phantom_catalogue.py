"""What the phantom world holds: its modalities, its structures and how they are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


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

CLASS_NAMES: tuple[str, ...] = (
    "background",
    *dict.fromkeys(name for plan in _PLANS for name in plan.structures),
)
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
