"""Pre-train the SAM branch on phantoms: masks from class names or boxes, with a dense auxiliary loss."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.data.phantom.scenes import CLASS_NAMES
from model.modeling.configuration import MedPLIBConfig
from model.modeling.sam_med2d import SamMed2D
from model.processing.images import SAM_MEAN, SAM_STD
from model.train.pretrain.pool import SIDE, ScenePool
from model.train.pretrain.steps import Losses, train_steps

_BOX_SHARE = 0.25


@dataclass(frozen=True)
class SamPlan:
    """How long and how hard the SAM branch is trained."""

    steps: int = 5000
    batch_size: int = 8  # scenes; each gives ``masks`` masks
    masks: int = 2
    lr: float = 1e-3


class SamTeacher(nn.Module):
    """The SAM branch with what only its pre-training needs.

    Attributes:
        names: query of every class, [classes, C], in the space of text prompts.
        dense: classifier of the image embedding's cells.
    """

    def __init__(self, config: MedPLIBConfig) -> None:
        super().__init__()
        self.sam = SamMed2D(config.sam_config, config.mask)
        self.names = nn.Embedding(len(CLASS_NAMES), config.mask_query_dim)
        self.dense = nn.Linear(config.mask_query_dim, len(CLASS_NAMES))


def pretrain_sam(pool: ScenePool, config: MedPLIBConfig, plan: SamPlan, seed: int, log: Path | None) -> SamTeacher:
    """Train image encoder, prompt encoder and mask decoder from nothing."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    teacher = SamTeacher(config)
    nn.init.trunc_normal_(teacher.sam.image_encoder.pos_embed, std=0.02)
    nn.init.normal_(teacher.names.weight, std=1.0)

    def step(number: int) -> Losses:
        rows = rng.choice(len(pool), plan.batch_size, replace=False)
        return _losses(teacher, pool, rows, plan.masks, rng)

    train_steps("sam", teacher.parameters(), step, plan.steps, plan.lr, log)
    return teacher.eval()


def sam_pixels(images: np.ndarray) -> Tensor:
    """Pool pictures uint8 [N, 256, 256, 3] as SAM inputs float [N, 3, 256, 256]."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
    return (pixels - torch.tensor(SAM_MEAN)[:, None, None]) / torch.tensor(SAM_STD)[:, None, None]


def mask_loss(logits: Tensor, masks: np.ndarray, iou: Tensor) -> Losses:
    """Pixel, overlap and IoU-estimate losses of low-resolution logits [M, l, l] against masks [M, S, S]."""
    full = torch.from_numpy(np.ascontiguousarray(masks)).float()[:, None]
    targets = functional.adaptive_avg_pool2d(full, logits.shape[-1])[:, 0]
    probabilities = logits.sigmoid()
    overlap = (probabilities * targets).sum((1, 2))
    dice = 1 - (2 * overlap + 1) / (probabilities.sum((1, 2)) + targets.sum((1, 2)) + 1)
    with torch.no_grad():
        hard, truth = (logits > 0).float(), (targets > 0.5).float()
        union = ((hard + truth) > 0).float().sum((1, 2)).clamp(min=1)
        true_iou = (hard * truth).sum((1, 2)) / union
    return {
        "bce": 2 * functional.binary_cross_entropy_with_logits(logits, targets),
        "dice": dice.mean(),
        "iou": functional.mse_loss(iou[:, 0], true_iou),
    }


def _losses(teacher: SamTeacher, pool: ScenePool, rows: np.ndarray, masks: int, rng: np.random.Generator) -> Losses:
    images, labels = pool.images[rows], pool.labels[rows]
    flipped = rng.random(len(rows)) < 0.5
    images = np.where(flipped[:, None, None, None], images[:, :, ::-1], images)
    labels = np.where(flipped[:, None, None], labels[:, :, ::-1], labels)
    embeddings = teacher.sam.encode_image(sam_pixels(images))  # [N, C, h, w]
    index, classes = _drawn_masks(labels, masks, rng)
    truth = labels[index] == classes[:, None, None]
    boxes = torch.from_numpy(_boxes(truth, rng))
    use_box = torch.from_numpy(rng.random(len(index)) < _BOX_SHARE)
    losses: dict[str, list[Tensor]] = {}
    for chosen, with_box in ((use_box, True), (~use_box, False)):
        if not chosen.any():
            continue
        prompts = {"boxes": boxes[chosen]} if with_box else {}
        queries = None if with_box else teacher.names(torch.from_numpy(classes)[chosen])
        low, iou = teacher.sam.decode(embeddings, queries, torch.from_numpy(index)[chosen], **prompts)
        for key, value in mask_loss(low[:, 0], truth[chosen.numpy()], iou).items():
            losses.setdefault(key, []).append(value * chosen.float().mean())
    result = {key: torch.stack(values).sum() for key, values in losses.items()}
    soft = soft_labels(labels, embeddings.shape[-1])  # [N, h·w, classes]
    logits = teacher.dense(embeddings.flatten(2).transpose(1, 2))
    return {**result, "dense": 0.5 * functional.cross_entropy(logits.flatten(0, 1), soft.flatten(0, 1))}


def soft_labels(labels: np.ndarray, grid: int) -> Tensor:
    """Share of every class in every cell: label maps uint8 [N, S, S] → float [N, grid², classes]."""
    count, side = labels.shape[0], labels.shape[1]
    sample = 2 * grid if side % (2 * grid) == 0 else grid * 6
    places = ((np.arange(sample) + 0.5) * side / sample).astype(np.int64)
    coarse = torch.from_numpy(labels[:, places][:, :, places].astype(np.int64))
    cell = sample // grid
    cells = coarse.view(count, grid, cell, grid, cell).permute(0, 1, 3, 2, 4).reshape(count, grid * grid, -1)
    shares = torch.zeros(count, grid * grid, len(CLASS_NAMES))
    return shares.scatter_add_(2, cells, torch.full(cells.shape, 1 / cells.shape[2]))


def _drawn_masks(labels: np.ndarray, masks: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Image index and class id of up to ``masks`` structures of each label map, absent ones left out."""
    index: list[int] = []
    classes: list[int] = []
    for row, label in enumerate(labels):
        present = [int(found) for found in np.unique(label[::2, ::2]) if found]
        chosen = rng.permutation(present)[:masks]
        index += [row] * len(chosen)
        classes += [int(found) for found in chosen]
    return np.array(index, np.int64), np.array(classes, np.int64)


def _boxes(masks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Jittered bounding boxes float32 [M, 4] of masks [M, S, S]."""
    boxes = np.zeros((len(masks), 4), np.float32)
    for box, mask in zip(boxes, masks, strict=True):
        columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
        corners = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        reach = np.array([np.ptp(columns), np.ptp(rows)] * 2) + 1
        box[:] = np.clip(corners + rng.normal(0, 0.05, 4) * reach, 0, SIDE)
    return boxes
