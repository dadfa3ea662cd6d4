"""Pre-train the SAM branch and the CLIP tower on grounding records of phantoms and real images, with augmentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.data.augmentation import AugmentationConfig, augment_pictures, tells_places
from model.modeling.configuration import MedPLIBConfig
from model.modeling.sam_med2d import SamMed2D
from model.modeling.vision_tower import VisionTower
from model.train.pretrain.clicks import draw_boxes, draw_clicks
from model.train.pretrain.mask_pool import SIDE, MaskPool
from model.train.pretrain.sam import sam_pixels
from model.train.pretrain.steps import Losses, Resume, append_log, train_steps
from model.train.pretrain.vision import cell_places, clip_pixels

PROMPTS = ("box", "click", "correction")


@dataclass(frozen=True)
class TowerPlan:
    """How long and how hard a tower is trained.

    Attributes:
        steps, batch_size, lr: of pictures; two targets at most are drawn of each.
        shares: data set → share of the draws; of the others each (data set, modality) group gets draws in proportion to
            the square root of its size.
        prompts: share of the steps that ask for the same masks by each of ``PROMPTS`` too, at most one; SAM alone.
        absent: share of the draws that are of a picture without one of its targets, from data sets that have any.
        augmentation: preset of ``AugmentationConfig``.
    """

    steps: int = 6000
    batch_size: int = 12
    lr: float = 1e-3
    shares: Mapping[str, float] | None = None
    prompts: Sequence[float] = (0.15, 0.15, 0.2)
    absent: float = 0.2
    augmentation: str = "strong"
    precision: str = "bf16"


@dataclass(frozen=True)
class Drawn:
    """One batch of pictures with M named masks.

    Attributes:
        images: uint8 [N, 256, 256, 3].
        masks: uint8 [M, 256, 256] in {0, 1}; zeros where the target is absent.
        index, names: long [M], the picture and the name of each.
        modalities: long [N].
    """

    images: np.ndarray
    masks: np.ndarray
    index: Tensor
    names: Tensor
    modalities: Tensor

    def present(self) -> Drawn:
        """The same pictures without the absent targets."""
        shown = torch.from_numpy(self.masks.any((1, 2)))
        return replace(self, masks=self.masks[shown.numpy()], index=self.index[shown], names=self.names[shown])


class PoolSampler:
    """Draws augmented batches from the pictures of a pool."""

    def __init__(self, pool: MaskPool, plan: TowerPlan, seed: int) -> None:
        self.pool, self.plan = pool, plan
        self.rng = np.random.default_rng(seed)
        self.config = AugmentationConfig(preset=plan.augmentation)  # type: ignore[arg-type]
        self.kinds = sorted(set(pool.modalities))
        groups = pool.groups()
        given = dict(plan.shares or {})
        sizes = {key: len(images) ** 0.5 for key, images in groups.items()}
        rest = sum(size for (dataset, _), size in sizes.items() if dataset not in given)
        own = {name: sum(size for (dataset, _), size in sizes.items() if dataset == name) for name in given}
        left = 1 - sum(given.values())
        weights = [
            given[key[0]] * size / own[key[0]] if key[0] in given else left * size / rest for key, size in sizes.items()
        ]
        self.weights = np.array(weights) / sum(weights)
        self.showing, self.lacking = (
            [
                [image for image in images if any((row < 0) == absent for row, _ in pool.targets[image])]
                for images in groups.values()
            ]
            for absent in (False, True)
        )

    def draw(self) -> Drawn:
        """A batch: pictures with a present target and such as lack one (``TowerPlan.absent``)."""
        images: list[np.ndarray] = []
        masks: list[np.ndarray] = []
        index: list[int] = []
        names: list[int] = []
        modalities: list[int] = []
        while len(images) < self.plan.batch_size:
            group = self.rng.choice(len(self.weights), p=self.weights)
            lacks = bool(self.lacking[group]) and (self.rng.random() < self.plan.absent or not self.showing[group])
            places = self.lacking[group] if lacks else self.showing[group]
            place = places[self.rng.integers(len(places))]
            targets = [target for target in self.pool.targets[place] if lacks or target[0] >= 0]
            chosen = [targets[i] for i in self.rng.permutation(len(targets))[:2]]
            shown = [row for row, _ in chosen if row >= 0]
            (image,), moved = augment_pictures(
                [self.pool.images[place]],
                [self.pool.mask(row) for row in shown],
                self.rng,
                self.config,
                flip_allowed=not tells_places(self.pool.names[name] for _, name in chosen),
            )
            left = iter(moved)
            masks += [next(left) if row >= 0 else self.pool.mask(-1) for row, _ in chosen]
            index += [len(images)] * len(chosen)
            names += [name for _, name in chosen]
            images.append(image)
            modalities.append(self.kinds.index(self.pool.modalities[place]))
        return Drawn(np.stack(images), np.stack(masks), *map(torch.tensor, (index, names, modalities)))


class SamTrainer(nn.Module):
    """The SAM branch with what only its pre-training needs: a query of each name, and a dense classifier of cells."""

    def __init__(self, config: MedPLIBConfig, names: int) -> None:
        super().__init__()
        self.sam = SamMed2D(config.sam_config, config.mask)
        self.side = config.sam_config.vision_config.image_size
        self.names = nn.Embedding(names, config.mask_query_dim)
        self.dense = nn.Embedding(names, config.mask_query_dim)
        nn.init.trunc_normal_(self.sam.image_encoder.pos_embed, std=0.02)
        nn.init.normal_(self.dense.weight, std=0.05)

    def encode(self, images: np.ndarray) -> Tensor:
        """Embeddings of pool pictures uint8 [N, 256, 256, 3]."""
        pixels = sam_pixels(images)
        if self.side != SIDE:
            pixels = functional.interpolate(pixels, (self.side, self.side), mode="area")
        return self.sam.encode_image(pixels)

    def masks(self, embeddings: Tensor, drawn: Drawn, kind: str, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Logits [M, l, l] and IoU estimates [M] for prompts of one kind."""
        truth, scale = drawn.masks.astype(bool), self.side / SIDE
        queries = self.names(drawn.names) if kind == "name" else None
        if kind == "box":
            prompts: dict[str, Tensor] = {"boxes": draw_boxes(truth, rng) * scale}
        elif kind == "click":
            points, labels = draw_clicks(truth, np.zeros_like(truth), rng)
            prompts = {"points": points * scale, "point_labels": labels}
        elif kind == "correction":
            first = "name" if rng.random() < 0.5 else "click"
            with torch.no_grad():
                earlier, _ = self.masks(embeddings, drawn, first, rng)  # [M, l, l]
            found = functional.interpolate(earlier[:, None], (SIDE, SIDE), mode="bilinear")[:, 0] > 0
            points, labels = draw_clicks(truth, found.numpy(), rng)
            side = 4 * embeddings.shape[-1]
            logits = functional.interpolate(earlier[:, None], (side, side), mode="bilinear")
            prompts = {"points": points * scale, "point_labels": labels, "masks": logits}
            queries = self.names(drawn.names) if rng.random() < 0.5 else None
        else:
            prompts = {}
        low, iou = self.sam.decode(embeddings, queries, drawn.index, **prompts)  # type: ignore[arg-type]
        return low[:, 0].float(), iou[:, 0].float()


def pretrain_sam(
    pool: MaskPool,
    config: MedPLIBConfig,
    plan: TowerPlan,
    seed: int,
    log: Path | None,
    held_out: MaskPool | None = None,
    start: Mapping[str, Tensor] | None = None,
) -> SamTrainer:
    """Train image encoder, prompt encoder and mask decoder: masks from names, boxes and clicks.

    Args:
        held_out: scored by name every 500 steps; its names must be the pool's.
        start: weights of a SAM branch to go on from (``widen``); those that do not fit are left out.
    """
    torch.manual_seed(seed)
    trainer, sampler = SamTrainer(config, len(pool.names)), PoolSampler(pool, plan, seed)
    own = trainer.sam.state_dict()
    grown = widen(start or {}, own, torch.Generator().manual_seed(seed))
    trainer.sam.load_state_dict(own | grown)
    trainer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a tenth faster on a CPU
    rng = np.random.default_rng(seed + 1)
    kinds, shares = ("name", *PROMPTS), np.array([1 - sum(plan.prompts), *plan.prompts])

    def step(number: int) -> Losses:
        drawn = sampler.draw()
        asked = {"name", kinds[rng.choice(len(kinds), p=shares)]}
        with torch.autocast("cpu", torch.bfloat16, enabled=plan.precision == "bf16"):
            embeddings = trainer.encode(drawn.images)
            wanted = [drawn if kind == "name" else drawn.present() for kind in sorted(asked)]
            found = [
                trainer.masks(embeddings, some, kind, rng) for kind, some in zip(sorted(asked), wanted, strict=True)
            ]
        losses: dict[str, Tensor] = {}
        for (low, iou), some in zip(found, wanted, strict=True):
            for name, value in soft_mask_losses(low, torch.from_numpy(some.masks).float(), iou).items():
                losses[name] = losses.get(name, 0) + value / len(found) ** 0.5
        truth = torch.from_numpy(drawn.masks).float()
        cells = embeddings[drawn.index, : config.mask_query_dim].float()  # [M, C, h, w]
        dense = torch.einsum("mc,mchw->mhw", trainer.dense(drawn.names), cells)
        return {**losses, "dense": 0.5 * cell_loss(dense, truth)}

    def report(number: int) -> None:
        if held_out is not None and number % 500 == 0:
            append_log(log, {"name": "sam scores", "step": number, **score_names(trainer, held_out)})

    resume = Resume(log.with_name("sam.resume"), trainer, (sampler.rng, rng)) if log else None
    train_steps(
        "sam", trainer.parameters(), step, plan.steps, plan.lr, log, weight_decay=0.02, on_log=report, resume=resume
    )
    return trainer.eval()


def widen(start: Mapping[str, Tensor], own: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Weights of a network whose convolutional stem may have half the channels, for one that computes the same.

    Every channel becomes two equal ones next to each other, and what reads a channel divides its weight between the two
    at random, so that they learn different things (Net2WiderNet, arXiv 1511.05641).

    Args:
        start: weights of the narrow network, or of one of the same width.
        own: weights of the wide network, for their shapes.

    Returns:
        The weights that fit, of the wide network's shapes.
    """
    grown: dict[str, Tensor] = {}
    for name, value in start.items():
        if name not in own or value.dim() != own[name].dim():
            continue
        reads = 0 if "upscale_conv" in name else 1  # the axis of the inputs; a transposed convolution has it first
        for axis, (before, after) in enumerate(zip(value.shape, own[name].shape, strict=True)):
            if after != 2 * before:
                continue
            if value.dim() > 1 and axis == reads:
                first = 0.3 + 0.4 * torch.rand(value.shape, generator=generator)
                twins = [value * first, value * (1 - first)]
            else:
                twins = [value / 2 if "fine_head" in name else value] * 2  # the mask is a sum over its channels
            value = torch.stack(twins, dim=axis + 1).flatten(axis, axis + 1)
        if value.shape == own[name].shape:
            grown[name] = value
    return grown


def soft_mask_losses(logits: Tensor, truth: Tensor, iou: Tensor) -> Losses:
    """Pixel, overlap and IoU-estimate losses of logits [M, l, l] against masks [M, S, S], empty where absent."""
    target = functional.adaptive_avg_pool2d(truth[:, None], logits.shape[-1])[:, 0]
    probability = logits.sigmoid()
    overlap, total = (probability * target).sum((1, 2)), probability.sum((1, 2)) + target.sum((1, 2))
    hard, wanted = logits.detach() > 0, target > 0.5
    true_iou = (hard & wanted).sum((1, 2)) / (hard | wanted).sum((1, 2)).clamp(min=1)
    return {
        "bce": 2 * functional.binary_cross_entropy_with_logits(logits, target),
        "dice": (1 - (2 * overlap + 1) / (total + 1)).mean(),
        "iou": functional.mse_loss(iou, true_iou),
    }


def cell_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross-entropy of logits [M, g, g] against the share of masks [M, S, S] in each cell."""
    cells = functional.adaptive_avg_pool2d(truth[:, None], logits.shape[-1])[:, 0]
    return functional.binary_cross_entropy_with_logits(logits, cells)


@torch.no_grad()
def score_names(trainer: SamTrainer, pool: MaskPool, most: int = 40) -> dict[str, float]:
    """Mean Dice by data set, modality and name of present targets, each prompted by its own name."""
    trainer.eval()
    found: dict[str, list[float]] = {}
    for (dataset, modality), images in pool.groups().items():
        chosen = np.random.default_rng(0).permutation(images)[:most]
        for start in range(0, len(chosen), 8):
            rows = [int(place) for place in chosen[start : start + 8]]
            embeddings = trainer.encode(np.stack([pool.images[place] for place in rows]))
            targets = [(i, row, name) for i, place in enumerate(rows) for row, name in pool.targets[place] if row >= 0]
            if not targets:
                continue
            index, names = torch.tensor([i for i, _, _ in targets]), torch.tensor([name for _, _, name in targets])
            low, _ = trainer.sam.decode(embeddings, trainer.names(names), index)
            masks = functional.interpolate(low, (SIDE, SIDE), mode="bilinear")[:, 0].numpy() > 0
            for mask, (_, row, name) in zip(masks, targets, strict=True):
                truth = pool.mask(row).astype(bool)
                both = int(mask.sum()) + int(truth.sum())
                key = f"{dataset}/{modality}/{pool.names[name]}"
                found.setdefault(key, []).append(2 * int((mask & truth).sum()) / max(both, 1))
    trainer.train()
    return {key: round(float(np.mean(values)), 4) for key, values in found.items()}


class VisionTrainer(nn.Module):
    """The CLIP tower with the classifiers that only its pre-training needs."""

    cells: Tensor

    def __init__(self, config: MedPLIBConfig, names: int, modalities: int) -> None:
        super().__init__()
        width = config.vision_config.hidden_size
        self.grid, self.side = config.vision_grid, config.vision_config.image_size
        self.tower = VisionTower(config.vision_config, config.vision_select_layer, "patch")
        self.names = nn.Embedding(names, width)
        self.modality = nn.Linear(width, modalities)
        self.places = nn.Linear(width, 2)
        self.register_buffer("cells", cell_places(self.grid), persistent=False)
        nn.init.normal_(self.names.weight, std=0.05)


def pretrain_vision(
    pool: MaskPool,
    config: MedPLIBConfig,
    plan: TowerPlan,
    seed: int,
    log: Path | None,
    start: Mapping[str, Tensor] | None = None,
) -> VisionTrainer:
    """Train the CLIP tower: where each named target lies or that it is absent, places, and the modality.

    Args:
        start: weights of the tower to go on from.
    """
    torch.manual_seed(seed)
    sampler = PoolSampler(pool, plan, seed)
    trainer = VisionTrainer(config, len(pool.names), len(sampler.kinds))
    if start is not None:
        trainer.tower.load_state_dict(start)

    def step(number: int) -> Losses:
        drawn = sampler.draw()
        small = [
            cv2.resize(image, (trainer.side, trainer.side), interpolation=cv2.INTER_AREA) for image in drawn.images
        ]
        with torch.autocast("cpu", torch.bfloat16, enabled=plan.precision == "bf16"):
            features = trainer.tower(clip_pixels(np.stack(small))).float()  # [N, P, D]
        normed = functional.layer_norm(features, features.shape[-1:])
        logits = torch.einsum("mc,mpc->mp", trainer.names(drawn.names), normed[drawn.index])
        truth = torch.from_numpy(drawn.masks).float()
        return {
            "patch": cell_loss(logits.unflatten(1, (trainer.grid, trainer.grid)), truth),
            "place": 0.5 * functional.mse_loss(trainer.places(features), trainer.cells.expand(len(features), -1, -1)),
            "modality": 0.1 * functional.cross_entropy(trainer.modality(normed.mean(1)), drawn.modalities),
        }

    resume = Resume(log.with_name("vision.resume"), trainer, (sampler.rng,)) if log else None
    train_steps("vision", trainer.parameters(), step, plan.steps, plan.lr, log, weight_decay=0.05, resume=resume)
    return trainer.eval()
