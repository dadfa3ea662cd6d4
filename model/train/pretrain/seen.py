"""From symbolic to real images: fit projector and region adapter, then packed training on what the towers see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from model.modeling.medplib import MedPLIBForCausalLM
from model.train.pretrain.curriculum import ALL_KINDS, Lessons, StateReader, numbers_of, pool_regions
from model.train.pretrain.language import AttentionGuide, KindScores, SymbolicImages, run_packed
from model.train.pretrain.packing import KINDS, PackedBatch
from model.train.pretrain.pool import ScenePool, clip_pictures
from model.train.pretrain.steps import Losses, append_log, train_steps
from model.train.pretrain.vision import clip_pixels


@dataclass(frozen=True)
class AlignPlan:
    """How long and how hard projector and region adapter are fitted."""

    steps: int = 1500
    batch_size: int = 32
    lr: float = 2e-3


@dataclass(frozen=True)
class SeenPlan:
    """How long and how hard the language model is trained on what the CLIP tower sees."""

    steps: int = 1500
    batch_size: int = 4  # scenes
    questions: int = 10  # most questions per scene
    lr: float = 1e-3
    guide: float = 0.5  # weight of the attention guide
    kinds: Sequence[str] = KINDS  # of questions that are asked


@dataclass(frozen=True)
class MaskHeadPlan:
    """How long and how hard the mask head is fitted to the SAM branch's class queries."""

    steps: int = 300
    batch_size: int = 4
    lr: float = 2e-3


def clip_features(model: MedPLIBForCausalLM, pool: ScenePool) -> Tensor:
    """CLIP patch features of all scenes of a pool, half precision [N, P, Dv]; the tower is frozen from here on."""
    side, features = model.config.vision_config.image_size, []
    with torch.no_grad():
        for start in range(0, len(pool), 64):
            pictures = clip_pictures(pool.images[start : start + 64], side)
            features.append(model.encode_images(clip_pixels(pictures)).half())
    return torch.cat(features)


def align(
    model: MedPLIBForCausalLM,
    symbols: SymbolicImages,
    lessons: Lessons,
    features: Tensor,
    plan: AlignPlan,
    seed: int,
    log: Path | None,
) -> None:
    """Fit projector and region adapter to the symbolic embedding of every patch and of every structure's region.

    Args:
        features: [N, P, Dv] of the lessons' scenes, from ``clip_features``.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    projector, adapter = model.model.projector, model.model.region_adapter.proj
    scale = float(model.get_input_embeddings().weight.detach().var())  # type: ignore[operator]
    naming = frozenset({KINDS.index("region_name")})

    def step(number: int) -> Losses:
        rows = rng.choice(len(lessons.pool), plan.batch_size, replace=False)
        seen = features[rows].float()
        with torch.no_grad():
            wanted = symbols(lessons.shares[rows].float(), lessons.modalities[rows])
        batch, weights = lessons.batch(rows, naming, 4, rng)
        pooled, pooled_wanted = pool_regions(batch, weights, seen), pool_regions(batch, weights, wanted)
        return {
            "patch": functional.mse_loss(projector(seen).features, wanted) / scale,
            "region": functional.mse_loss(adapter(pooled), pooled_wanted) / scale,
        }

    parameters = [*projector.parameters(), *adapter.parameters()]
    train_steps("align", parameters, step, plan.steps, plan.lr, log, weight_decay=0.0)


def train_seen(
    model: MedPLIBForCausalLM,
    lessons: Lessons,
    features: Tensor,
    plan: SeenPlan,
    seed: int,
    log: Path | None,
    held_out: tuple[Lessons, Tensor] | None = None,
) -> None:
    """Train decoder, language head, projector and region adapter on packed questions about real images.

    Args:
        features: [N, P, Dv] of the lessons' scenes.
        held_out: lessons and features that are scored every 200 steps.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    guide = AttentionGuide(model.model.decoder)
    reader = StateReader(model.config.text_config.hidden_size, lessons.grid)
    kinds = numbers_of(plan.kinds)

    def step(number: int) -> Losses:
        rows = rng.choice(len(lessons.pool), plan.batch_size, replace=False)
        batch, weights = lessons.batch(rows, kinds, plan.questions, rng)
        done = run_packed(model, batch, *_seen(model, batch, weights, features[rows].float()))
        shares = lessons.shares[rows].float()
        guided = plan.guide * guide.loss(batch, shares)
        return {"ce": done.loss, "guide": guided, **reader.losses(batch, done.hidden, shares)}

    def report(number: int) -> None:
        if held_out is not None and number % 200 == 0:
            append_log(log, {"name": "seen scores", "step": number, **score_seen(model, *held_out)})

    parts = (model.model.decoder, model.lm_head, model.model.projector, model.model.region_adapter, reader)
    trained = [parameter for part in parts for parameter in part.parameters()]
    train_steps("seen", trained, step, plan.steps, plan.lr, log, on_log=report)
    guide.remove()


def fit_mask_head(
    model: MedPLIBForCausalLM,
    lessons: Lessons,
    features: Tensor,
    class_queries: Tensor,
    plan: MaskHeadPlan,
    seed: int,
    log: Path | None,
) -> None:
    """Fit the mask head, so that a ``<SEG>`` state gives the query of the class that it names.

    Args:
        features: [N, P, Dv] of the lessons' scenes.
        class_queries: [classes, C], what the SAM branch was pre-trained with.
    """
    rng = np.random.default_rng(seed)
    asking = frozenset({KINDS.index("grounding"), KINDS.index("grounding_pair")})

    def step(number: int) -> Losses:
        rows = rng.choice(len(lessons.pool), plan.batch_size, replace=False)
        batch, weights = lessons.batch(rows, asking, 8, rng)
        with torch.no_grad():
            done = run_packed(model, batch, *_seen(model, batch, weights, features[rows].float()))
        which, places, classes = torch.tensor(batch.segs).T
        queries = model.model.mask_head(done.hidden[which, places - 1])
        return {"query": functional.mse_loss(queries, class_queries[classes])}

    parameters = model.model.mask_head.parameters()
    train_steps("mask head", parameters, step, plan.steps, plan.lr, log, weight_decay=0.0)


@torch.no_grad()
def score_seen(model: MedPLIBForCausalLM, lessons: Lessons, features: Tensor, scenes: int = 96) -> dict[str, float]:
    """Teacher-forced scores by kind of question on a held-out pool's first scenes."""
    scores, rng = KindScores(), np.random.default_rng(0)
    for start in range(0, min(scenes, len(lessons.pool)), 8):
        rows = np.arange(start, min(start + 8, len(lessons.pool)))
        batch, weights = lessons.batch(rows, ALL_KINDS, 99, rng)
        done = run_packed(model, batch, *_seen(model, batch, weights, features[rows].float()))
        scores.add(batch, done, lessons.refusals)
    return scores.shares()


def _seen(model: MedPLIBForCausalLM, batch: PackedBatch, weights: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Image tokens [B, P, D] and region tokens [R, D] of CLIP features [B, P, Dv]."""
    pooled = pool_regions(batch, weights, features)
    return model.model.projector(features).features, model.model.region_adapter.proj(pooled)
