"""Pre-train SAM branch and CLIP tower: on phantom scenes from nothing, and on grounding records of built folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.data.augmentation import AugmentationConfig, augment_pictures, tells_places
from model.data.phantom.scenes import CLASS_NAMES, MODALITIES
from model.modeling.configuration import MedPLIBConfig
from model.modeling.sam_med2d import SamMed2D
from model.modeling.vision_tower import VisionTower
from model.processing.images import CLIP_MEAN, CLIP_STD, SAM_MEAN, SAM_STD
from model.train.pretrain import Losses, Resume, append_log, train_steps
from model.train.pretrain.pools import SIDE, MaskPool, ScenePool, clip_pictures, draw_boxes, draw_clicks

PROMPTS = ("box", "click", "correction")
_BOX_SHARE = 0.25  # of the masks of scenes that are prompted by a box


@dataclass(frozen=True)
class Plan:
    """How long and how hard a part is trained."""

    steps: int
    batch_size: int  # scenes or pictures
    lr: float
    masks: int = 2  # of each scene; SAM alone
    questions: int = 10  # most questions per scene; language model alone
    guide: float = 1.0  # weight of the attention guide
    noise: float = 0.5  # of symbolic images, in standard deviations of the word embeddings
    kinds: Sequence[str] = ()  # of questions; all where empty


def sam_pixels(images: np.ndarray) -> Tensor:
    """Pool pictures uint8 [N, 256, 256, 3] as SAM inputs float [N, 3, 256, 256]."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
    return (pixels - torch.tensor(SAM_MEAN)[:, None, None]) / torch.tensor(SAM_STD)[:, None, None]


def clip_pixels(pictures: np.ndarray) -> Tensor:
    """Pictures uint8 [N, s, s, 3] as CLIP inputs float [N, 3, s, s]."""
    pixels = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


def cell_places(grid: int) -> Tensor:
    """Places of a square grid's cells as (right, down) in [−1, 1], float [grid², 2]."""
    ramp = torch.linspace(-1, 1, grid)
    down, right = torch.meshgrid(ramp, ramp, indexing="ij")
    return torch.stack([right.flatten(), down.flatten()], 1)


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


class SamTrainer(nn.Module):
    """The SAM branch with what only its pre-training needs.

    Attributes:
        names: query of every name, [names, C], in the space of text prompts.
        dense: classifier of the image embedding's cells.
    """

    def __init__(self, config: MedPLIBConfig, names: int, dense: Callable[[int], nn.Module] | None = None) -> None:
        super().__init__()
        self.sam = SamMed2D(config.sam_config, config.mask)
        self.side = config.sam_config.vision_config.image_size
        self.names = nn.Embedding(names, config.mask_query_dim)
        self.dense = dense(config.mask_query_dim) if dense else nn.Embedding(names, config.mask_query_dim)
        nn.init.trunc_normal_(self.sam.image_encoder.pos_embed, std=0.02)
        drawn: Any = self.names if dense else self.dense
        nn.init.normal_(drawn.weight, std=1.0 if dense else 0.05)

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


class VisionTrainer(nn.Module):
    """The CLIP tower with the classifiers that only its pre-training needs.

    Supervision sits on the hidden state that the projector reads, so that a linear map can separate the structures.
    """

    cells: Tensor

    def __init__(self, config: MedPLIBConfig, targets: Callable[[int], nn.Module], modalities: int) -> None:
        super().__init__()
        width = config.vision_config.hidden_size
        self.grid, self.side = config.vision_grid, config.vision_config.image_size
        self.tower = VisionTower(config.vision_config, config.vision_select_layer, "patch")
        self.targets = targets(width)
        self.modality, self.places = nn.Linear(width, modalities), nn.Linear(width, 2)
        self.register_buffer("cells", cell_places(self.grid), persistent=False)

    def losses(self, features: Tensor, normed: Tensor, modalities: Tensor) -> Losses:
        """Errors of places and modality from the tower's features [N, P, D]."""
        return {
            "place": 0.5 * functional.mse_loss(self.places(features), self.cells.expand(len(features), -1, -1)),
            "modality": 0.1 * functional.cross_entropy(self.modality(normed.mean(1)), modalities),
        }


# --- phantom scenes, from nothing -------------------------------------------------------------------------------------


def pretrain_sam_on_scenes(
    pool: ScenePool, config: MedPLIBConfig, plan: Plan, seed: int, log: Path | None
) -> SamTrainer:
    """Train image encoder, prompt encoder and mask decoder from class names or boxes, with a dense auxiliary loss."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    trainer = SamTrainer(config, len(CLASS_NAMES), lambda width: nn.Linear(width, len(CLASS_NAMES)))

    def step(number: int) -> Losses:
        rows = rng.choice(len(pool), plan.batch_size, replace=False)
        images, labels = pool.images[rows], pool.labels[rows]
        flipped = rng.random(len(rows)) < 0.5
        images = np.where(flipped[:, None, None, None], images[:, :, ::-1], images)
        labels = np.where(flipped[:, None, None], labels[:, :, ::-1], labels)
        embeddings = trainer.sam.encode_image(sam_pixels(images))  # [N, C, h, w]
        drawn: list[tuple[int, int]] = []  # image and class of up to ``plan.masks`` structures of each label map
        for row, label in enumerate(labels):
            present = [int(found) for found in np.unique(label[::2, ::2]) if found]
            drawn += [(row, int(found)) for found in rng.permutation(present)[: plan.masks]]
        index, classes = np.array(drawn, np.int64).reshape(-1, 2).T
        truth = labels[index] == classes[:, None, None]
        boxes = draw_boxes(truth, rng, jitter=0.05)
        use_box = torch.from_numpy(rng.random(len(index)) < _BOX_SHARE)
        losses: dict[str, list[Tensor]] = {}
        for chosen, with_box in ((use_box, True), (~use_box, False)):
            if not chosen.any():
                continue
            prompts = {"boxes": boxes[chosen]} if with_box else {}
            queries = None if with_box else trainer.names(torch.from_numpy(classes)[chosen])
            low, iou = trainer.sam.decode(embeddings, queries, torch.from_numpy(index)[chosen], **prompts)
            wanted = torch.from_numpy(truth[chosen.numpy()]).float()
            for key, value in soft_mask_losses(low[:, 0], wanted, iou[:, 0]).items():
                losses.setdefault(key, []).append(value * chosen.float().mean())
        result = {key: torch.stack(values).sum() for key, values in losses.items()}
        soft = soft_labels(labels, embeddings.shape[-1])  # [N, h·w, classes]
        logits = trainer.dense(embeddings.flatten(2).transpose(1, 2))
        return {**result, "dense": 0.5 * functional.cross_entropy(logits.flatten(0, 1), soft.flatten(0, 1))}

    train_steps("sam", trainer.parameters(), step, plan.steps, plan.lr, log)
    return trainer.eval()


def pretrain_vision_on_scenes(
    pool: ScenePool, config: MedPLIBConfig, plan: Plan, seed: int, log: Path | None
) -> VisionTrainer:
    """Train the tower from nothing: what is in every patch, where the patch is, and the modality of the picture."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    trainer = VisionTrainer(config, lambda width: nn.Linear(width, len(CLASS_NAMES)), len(MODALITIES)).train()
    grid = trainer.grid
    pictures = clip_pictures(pool.images, trainer.side)
    targets = torch.cat([soft_labels(pool.labels[i : i + 256], grid).half() for i in range(0, len(pool), 256)])
    modalities = torch.from_numpy(pool.modalities.astype(np.int64))

    def step(number: int) -> Losses:
        rows = rng.choice(len(pool), plan.batch_size, replace=False)
        pixels, soft = clip_pixels(pictures[rows]), targets[rows].float()
        flip = torch.from_numpy(rng.random(len(rows)) < 0.5)
        pixels = torch.where(flip[:, None, None, None], pixels.flip(-1), pixels)
        mirrored = soft.unflatten(1, (grid, grid)).flip(2).flatten(1, 2)
        soft = torch.where(flip[:, None, None], mirrored, soft)
        features = trainer.tower(pixels)
        normed = functional.layer_norm(features, features.shape[-1:])
        patches = functional.cross_entropy(trainer.targets(normed).flatten(0, 1), soft.flatten(0, 1))
        return {"patch": patches, **trainer.losses(features, normed, modalities[rows])}

    train_steps("vision", trainer.parameters(), step, plan.steps, plan.lr, log, weight_decay=0.05)
    return trainer.eval()


# --- records of built folders -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TowerPlan:
    """How long and how hard a tower is trained."""

    steps: int = 6000
    batch_size: int = 12  # pictures; two targets at most are drawn of each
    lr: float = 1e-3
    # By data set, of the draws; each other group (data set, modality) gets draws by the square root of its size.
    shares: Mapping[str, float] | None = None
    # Share of the steps that ask for the same masks by each of PROMPTS too, at most one; SAM alone.
    prompts: Sequence[float] = (0.15, 0.15, 0.2)
    absent: float = 0.2  # share of the draws that are of a picture without one of its targets, where there are any
    augmentation: str = "strong"  # preset of AugmentationConfig
    precision: str = "bf16"


@dataclass(frozen=True)
class Drawn:
    """One batch of pictures with M named masks."""

    images: np.ndarray  # uint8 [N, 256, 256, 3]
    masks: np.ndarray  # uint8 [M, 256, 256] in {0, 1}; zeros where the target is absent
    index: Tensor  # long [M], the picture of each
    names: Tensor  # long [M]
    modalities: Tensor  # long [N]

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
        prompted = {"name", kinds[rng.choice(len(kinds), p=shares)]}
        with torch.autocast("cpu", torch.bfloat16, enabled=plan.precision == "bf16"):
            embeddings = trainer.encode(drawn.images)
            wanted = [drawn if kind == "name" else drawn.present() for kind in sorted(prompted)]
            found = [
                trainer.masks(embeddings, some, kind, rng) for kind, some in zip(sorted(prompted), wanted, strict=True)
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
    at random, so that they learn different things (Net2WiderNet, arXiv 1511.05641). Shapes are those of ``own``, the
    wide network's; what does not fit is left out.
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
    trainer = VisionTrainer(config, lambda width: nn.Embedding(len(pool.names), width), len(sampler.kinds))
    names: Any = trainer.targets
    nn.init.normal_(names.weight, std=0.05)
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
        logits = torch.einsum("mc,mpc->mp", trainer.targets(drawn.names), normed[drawn.index])
        truth = torch.from_numpy(drawn.masks).float()
        patches = cell_loss(logits.unflatten(1, (trainer.grid, trainer.grid)), truth)
        return {"patch": patches, **trainer.losses(features, normed, drawn.modalities)}

    resume = Resume(log.with_name("vision.resume"), trainer, (sampler.rng,)) if log else None
    train_steps("vision", trainer.parameters(), step, plan.steps, plan.lr, log, weight_decay=0.05, resume=resume)
    return trainer.eval()
