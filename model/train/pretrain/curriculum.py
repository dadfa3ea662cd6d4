"""Curriculum of the small language model: symbolic images, then CLIP features, then ``<SEG>``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from model.data.phantom.questions import SPOKEN_NAMES
from model.data.phantom.scenes import CLASS_NAMES, MODALITIES
from model.errors import MedPLIBError
from model.modeling.medplib import MedPLIBForCausalLM
from model.modeling.region import region_means
from model.processing.conversation import Turn
from model.processing.encoding import encode_conversation
from model.processing.masks import region_grid
from model.processing.special_tokens import IMAGE_TOKEN, SEG_TOKEN
from model.processing.tokens import tokenize
from model.train.pretrain.language import (
    KINDS,
    AttentionGuide,
    PackedBatch,
    PackedQuestion,
    Packer,
    SymbolicImages,
    draw_questions,
    run_packed,
)
from model.train.pretrain.pool import ScenePool, clip_pictures
from model.train.pretrain.sam import soft_labels
from model.train.pretrain.steps import Losses, append_log, train_steps
from model.train.pretrain.vision import cell_places, clip_pixels

View = Callable[[np.ndarray, PackedBatch, Tensor], tuple[Tensor, Tensor]]
"""(scenes, packed questions about them, region weights [R, P]) → image tokens [B, P, D], region tokens [R, D]."""


@dataclass(frozen=True)
class LanguagePlan:
    """How long and how hard the language model is trained."""

    steps: int = 3000
    batch_size: int = 4  # scenes
    questions: int = 10  # most questions per scene
    lr: float = 2e-3
    guide: float = 1.0  # weight of the attention guide
    noise: float = 0.5  # of symbolic images, in standard deviations of the word embeddings
    kinds: Sequence[str] = KINDS  # of questions that are asked


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


class Lessons:
    """A pool's questions, tokenised, with what is needed to show its images to the language model."""

    def __init__(self, pool: ScenePool, tokenizer: PreTrainedTokenizerFast, grid: int, clip_size: int) -> None:
        self.pool, self.grid, self.clip_size = pool, grid, clip_size

        def encode(question: str, answer: str) -> tuple[list[int], list[int]]:
            turns = [Turn("human", f"{IMAGE_TOKEN}\n{question}"), Turn("gpt", answer)]
            return encode_conversation(tokenizer, turns, "llava_v1")

        def plain(text: str) -> list[int]:
            return tokenize(tokenizer, text, add_bos=False).ids

        self.spellings: dict[int, list[list[int]]] = {}  # of class names, inside a sentence and at its start
        for class_id, name in list(enumerate(CLASS_NAMES))[1:]:
            forms = (tuple(plain(form)) for form in (name, name[0].upper() + name[1:]))
            self.spellings[class_id] = [list(ids) for ids in dict.fromkeys(forms)]
        spoken = (dict(SPOKEN_NAMES)[key] for key in MODALITIES)
        self.modality_words = [plain(word[0].upper() + word[1:]) for word in spoken]
        seg: Any = tokenizer.convert_tokens_to_ids(SEG_TOKEN)
        self.packer = Packer(encode, self.spellings, seg, grid * grid)
        self._prepared: dict[int, list[PackedQuestion]] = {}
        self.shares = torch.cat([soft_labels(pool.labels[i : i + 256], grid).half() for i in range(0, len(pool), 256)])
        self.modalities = torch.from_numpy(pool.modalities.astype(np.int64))

    def questions(self, row: int) -> list[PackedQuestion]:
        """Questions about one scene; tokenised when they are first asked for."""
        if row not in self._prepared:
            self._prepared[row] = [self.packer.prepare(question) for question in self.pool.questions[row]]
        return self._prepared[row]

    @cached_property
    def refusals(self) -> frozenset[int]:
        """First tokens of refusals to segment, as the first scenes show them."""
        absent = KINDS.index("grounding_absent")
        return frozenset(
            next(label for label in question.labels if label >= 0)
            for row in range(min(200, len(self.pool)))
            for question in self.questions(row)
            if question.kind == absent
        )

    def batch(
        self, rows: np.ndarray, kinds: frozenset[int], most: int, rng: np.random.Generator
    ) -> tuple[PackedBatch, Tensor]:
        """Packed questions about the scenes ``rows``, and region weights over patches [R, P]."""
        drawn = [draw_questions(self.questions(int(row)), kinds, most, rng) for row in rows]
        batch = self.packer.pack(drawn)
        grids = [
            region_grid(self.pool.labels[int(rows[row])] == class_id, self.clip_size, self.grid)
            for row, _, class_id in batch.regions
        ]
        cells = torch.from_numpy(np.stack(grids)) if grids else torch.zeros(0, self.grid, self.grid)
        eye = torch.eye(self.grid**2).expand(len(cells), -1, -1)
        return batch, region_means(eye, cells)

    def symbolic(self, model: MedPLIBForCausalLM) -> SymbolicImages:
        """Symbolic images in the words of ``model``."""
        names: list[list[int]] = [[], *(self.spellings[class_id][0] for class_id in sorted(self.spellings))]
        return SymbolicImages(model.get_input_embeddings(), names, self.modality_words, self.grid**2)  # type: ignore[arg-type]


ALL_KINDS = frozenset(range(len(KINDS)))


def symbolic_view(symbols: SymbolicImages, lessons: Lessons, noise: float = 0.0) -> View:
    """Scenes as symbolic images show them."""

    def view(rows: np.ndarray, batch: PackedBatch, weights: Tensor) -> tuple[Tensor, Tensor]:
        tokens = symbols(lessons.shares[rows].float(), lessons.modalities[rows], noise)
        return tokens, pool_regions(batch, weights, tokens)

    return view


def seen_view(model: MedPLIBForCausalLM, features: Tensor) -> View:
    """Scenes as projector and region adapter show them, from CLIP features [N, P, Dv] of ``clip_features``."""

    def view(rows: np.ndarray, batch: PackedBatch, weights: Tensor) -> tuple[Tensor, Tensor]:
        seen = features[rows].float()
        regions = pool_regions(batch, weights, seen)
        return model.model.projector(seen).features, model.model.region_adapter.proj(regions)

    return view


@torch.no_grad()
def score(model: MedPLIBForCausalLM, lessons: Lessons, view: View, scenes: int) -> dict[str, float]:
    """Teacher-forced shares of right answers by kind of question on the first scenes of a held-out pool.

    A grounding question is right whose first word is that of a refusal where it should be, and of an acceptance where
    not (their wordings are drawn at random); another one, whose tokens are all right.
    """
    right, total = np.zeros(len(KINDS)), np.zeros(len(KINDS))
    grounding = torch.tensor([kind.startswith("grounding") for kind in KINDS])
    rng = np.random.default_rng(0)
    for start in range(0, min(scenes, len(lessons.pool)), 8):
        rows = np.arange(start, min(start + 8, len(lessons.pool)))
        batch, weights = lessons.batch(rows, ALL_KINDS, 99, rng)
        done = run_packed(model, batch, *view(rows, batch, weights))
        refuses = torch.tensor([int(token) in lessons.refusals for token in done.first])
        kinds = batch.kinds
        fits = refuses == (kinds == KINDS.index("grounding_absent"))
        np.add.at(right, kinds.numpy(), torch.where(grounding[kinds], fits, done.exact).numpy())
        np.add.at(total, kinds.numpy(), 1)
    return {kind: round(float(right[i] / total[i]), 3) for i, kind in enumerate(KINDS) if total[i]}


def pretrain_language(
    model: MedPLIBForCausalLM, lessons: Lessons, held_out: Lessons, plan: LanguagePlan, seed: int, log: Path | None
) -> SymbolicImages:
    """Train the decoder from nothing on questions about symbolic images; returns what made those."""
    torch.manual_seed(seed)
    decoder = model.model.decoder
    with torch.no_grad():
        decoder.embed_tokens.weight.normal_(std=0.05)
        model.lm_head.weight.copy_(decoder.embed_tokens.weight)
    symbols = lessons.symbolic(model)
    view = symbolic_view(symbols, lessons, plan.noise)
    parts = (decoder, model.lm_head, symbols)
    _train("language", model, lessons, view, parts, plan, (held_out, symbolic_view(symbols, held_out), 64), seed, log)
    return symbols


def train_seen(
    model: MedPLIBForCausalLM,
    lessons: Lessons,
    features: Tensor,
    plan: SeenPlan,
    seed: int,
    log: Path | None,
    held_out: tuple[Lessons, Tensor],
) -> None:
    """Train decoder, language head, projector and region adapter on packed questions about real images.

    Args:
        features: [N, P, Dv] of the lessons' scenes.
        held_out: lessons and features that are scored every 200 steps.
    """
    torch.manual_seed(seed)
    parts = (model.model.decoder, model.lm_head, model.model.projector, model.model.region_adapter)
    scored = held_out[0], seen_view(model, held_out[1]), 96
    _train("seen", model, lessons, seen_view(model, features), parts, plan, scored, seed, log)


def _train(
    name: str,
    model: MedPLIBForCausalLM,
    lessons: Lessons,
    view: View,
    parts: Iterable[nn.Module],
    plan: LanguagePlan | SeenPlan,
    scored: tuple[Lessons, View, int],
    seed: int,
    log: Path | None,
) -> None:
    """Train ``parts`` on packed questions about scenes as ``view`` shows them."""
    rng = np.random.default_rng(seed)
    guide = AttentionGuide(model.model.decoder)
    reader = StateReader(model.config.text_config.hidden_size, lessons.grid)
    if unknown := [kind for kind in plan.kinds if kind not in KINDS]:
        raise MedPLIBError(f"there are no questions of kind {', '.join(unknown)}; give some of {', '.join(KINDS)}")
    kinds = frozenset(KINDS.index(kind) for kind in plan.kinds)

    def step(number: int) -> Losses:
        rows = rng.choice(len(lessons.pool), plan.batch_size, replace=False)
        batch, weights = lessons.batch(rows, kinds, plan.questions, rng)
        done = run_packed(model, batch, *view(rows, batch, weights))
        shares = lessons.shares[rows].float()
        guided = plan.guide * guide.loss(batch, shares)
        return {"ce": done.loss, "guide": guided, **reader.losses(batch, done.hidden, shares)}

    def report(number: int) -> None:
        if number % 200 == 0:
            append_log(log, {"name": f"{name} scores", "step": number, **score(model, *scored)})

    trained = [parameter for part in (*parts, reader) for parameter in part.parameters()]
    train_steps(name, trained, step, plan.steps, plan.lr, log, on_log=report)
    guide.remove()


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
    view = seen_view(model, features)
    asking = frozenset({KINDS.index("grounding"), KINDS.index("grounding_pair")})

    def step(number: int) -> Losses:
        rows = rng.choice(len(lessons.pool), plan.batch_size, replace=False)
        batch, weights = lessons.batch(rows, asking, 8, rng)
        with torch.no_grad():
            done = run_packed(model, batch, *view(rows, batch, weights))
        which, places, classes = torch.tensor(batch.segs).T
        queries = model.model.mask_head(done.hidden[which, places - 1])
        return {"query": functional.mse_loss(queries, class_queries[classes])}

    parameters = model.model.mask_head.parameters()
    train_steps("mask head", parameters, step, plan.steps, plan.lr, log, weight_decay=0.0)


def pool_regions(batch: PackedBatch, weights: Tensor, tokens: Tensor) -> Tensor:
    """Mean [R, D] of tokens or features [B, P, D] over the batch's regions, whose weights over patches are [R, P]."""
    rows = torch.tensor([row for row, _, _ in batch.regions], dtype=torch.long)
    return (weights[:, None] @ tokens[rows])[:, 0]


class StateReader(nn.Module):
    """Linear readers of final hidden states that make them hold what later answers need; thrown away after training.

    A state that predicts ``<SEG>`` must hold the class of the mask; the states of a structure's name and of a region's
    token must hold where that structure lies, as (right, down) in [−1, 1].
    """

    def __init__(self, width: int, grid: int) -> None:
        super().__init__()
        self.classes, self.places = nn.Linear(width, len(CLASS_NAMES)), nn.Linear(width, 2)
        self.cells = cell_places(grid)  # [P, 2]

    def losses(self, batch: PackedBatch, hidden: Tensor, shares: Tensor) -> Losses:
        """Cross-entropy of classes and mean squared error of places; shares are [B, P, classes]."""
        named = placed = hidden.new_zeros(())
        if batch.segs:
            rows, places, classes = torch.tensor(batch.segs).T
            named = functional.cross_entropy(self.classes(hidden[rows, places - 1]), classes)
        if batch.names or batch.regions:
            rows, places, classes = torch.tensor(batch.names + batch.regions).T
            share = shares[rows, :, classes]  # [Q, P]
            total = share.sum(1, keepdim=True)
            error = (self.places(hidden[rows, places]) - share @ self.cells / total.clamp(min=1e-6)).square().mean(1)
            there = (total[:, 0] > 0.05).float()
            placed = (error * there).sum() / there.sum().clamp(min=1)
        return {"named": 0.3 * named, "placed": placed}
