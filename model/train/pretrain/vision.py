"""Pre-train the CLIP tower on phantoms: what is in every patch, where the patch is, and the modality of the picture.

Supervision sits on the hidden state that the projector reads, so that a linear map can separate the structures there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.data.phantom.scenes import CLASS_NAMES, MODALITIES
from model.modeling.configuration import MedPLIBConfig
from model.modeling.vision_tower import VisionTower
from model.processing.images import CLIP_MEAN, CLIP_STD
from model.train.pretrain.pool import ScenePool, clip_pictures
from model.train.pretrain.sam import soft_labels
from model.train.pretrain.steps import Losses, train_steps


@dataclass(frozen=True)
class VisionPlan:
    """How long and how hard the CLIP tower is trained."""

    steps: int = 6000
    batch_size: int = 32
    lr: float = 1e-3


class VisionTeacher(nn.Module):
    """The CLIP tower with the classifiers that only its pre-training needs."""

    cells: Tensor

    def __init__(self, config: MedPLIBConfig) -> None:
        super().__init__()
        self.grid, self.side = config.vision_grid, config.vision_config.image_size
        self.tower = VisionTower(config.vision_config, config.vision_select_layer, "patch")
        self.patches = nn.Linear(config.vision_config.hidden_size, len(CLASS_NAMES))
        self.modality = nn.Linear(config.vision_config.hidden_size, len(MODALITIES))
        self.places = nn.Linear(config.vision_config.hidden_size, 2)
        self.register_buffer("cells", cell_places(self.grid), persistent=False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Class logits of the patches [N, P, classes], their places [N, P, 2], modality logits [N, modalities]."""
        features = self.tower(pixels)
        normed = functional.layer_norm(features, features.shape[-1:])
        return self.patches(normed), self.places(features), self.modality(normed.mean(1))


def pretrain_vision(
    pool: ScenePool, config: MedPLIBConfig, plan: VisionPlan, seed: int, log: Path | None
) -> VisionTeacher:
    """Train the tower from nothing."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    teacher = VisionTeacher(config).train()
    pictures = clip_pictures(pool.images, teacher.side)
    targets = torch.cat([soft_labels(pool.labels[i : i + 256], teacher.grid).half() for i in range(0, len(pool), 256)])
    modalities = torch.from_numpy(pool.modalities.astype(np.int64))

    def step(number: int) -> Losses:
        rows = rng.choice(len(pool), plan.batch_size, replace=False)
        pixels, soft = clip_pixels(pictures[rows]), targets[rows].float()
        flip = torch.from_numpy(rng.random(len(rows)) < 0.5)
        pixels = torch.where(flip[:, None, None, None], pixels.flip(-1), pixels)
        soft = torch.where(flip[:, None, None], _mirrored(soft, teacher.grid), soft)
        patches, places, modality = teacher(pixels)
        return {
            "patch": functional.cross_entropy(patches.flatten(0, 1), soft.flatten(0, 1)),
            "place": 0.5 * functional.mse_loss(places, teacher.cells.expand_as(places)),
            "modality": 0.1 * functional.cross_entropy(modality, modalities[rows]),
        }

    train_steps("vision", teacher.parameters(), step, plan.steps, plan.lr, log, weight_decay=0.05)
    return teacher.eval()


def cell_places(grid: int) -> Tensor:
    """Places of a square grid's cells as (right, down) in [−1, 1], float [grid², 2]."""
    ramp = torch.linspace(-1, 1, grid)
    down, right = torch.meshgrid(ramp, ramp, indexing="ij")
    return torch.stack([right.flatten(), down.flatten()], 1)


def clip_pixels(pictures: np.ndarray) -> Tensor:
    """Pictures uint8 [N, s, s, 3] as CLIP inputs float [N, 3, s, s]."""
    pixels = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


def _mirrored(patches: Tensor, grid: int) -> Tensor:
    return patches.unflatten(1, (grid, grid)).flip(2).flatten(1, 2)
