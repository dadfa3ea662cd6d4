"""What the language model is taught, in order, and with which images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from model.data.builders.phantom_questions import SPOKEN_NAMES
from model.data.builders.phantom_scenes import CLASS_NAMES
from model.errors import MedPLIBError
from model.modeling.medplib import MedPLIBForCausalLM
from model.modeling.region import region_means
from model.processing.conversation import Turn
from model.processing.encoding import encode_conversation
from model.processing.masks import region_grid
from model.processing.special_tokens import IMAGE_TOKEN, SEG_TOKEN
from model.processing.tokens import tokenize
from model.train.pretrain.language import (
    AttentionGuide,
    KindScores,
    SymbolicImages,
    draw_questions,
    modality_words,
    name_spellings,
    run_packed,
)
from model.train.pretrain.packing import KINDS, PackedBatch, PackedQuestion, Packer
from model.train.pretrain.pool import ScenePool
from model.train.pretrain.sam import soft_labels
from model.train.pretrain.steps import Losses, append_log, train_steps
from model.train.pretrain.vision import cell_places


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


class Lessons:
    """A pool's questions, tokenised, with what is needed to show its images to the language model."""

    def __init__(self, pool: ScenePool, tokenizer: PreTrainedTokenizerFast, grid: int, clip_size: int) -> None:
        self.pool, self.grid, self.clip_size = pool, grid, clip_size

        def encode(question: str, answer: str) -> tuple[list[int], list[int]]:
            turns = [Turn("human", f"{IMAGE_TOKEN}\n{question}"), Turn("gpt", answer)]
            return encode_conversation(tokenizer, turns, "llava_v1")

        def plain(text: str) -> list[int]:
            return tokenize(tokenizer, text, add_bos=False).ids

        self.spellings = name_spellings(plain)
        self.modality_words = modality_words(plain, dict(SPOKEN_NAMES))
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


def numbers_of(kinds: Sequence[str]) -> frozenset[int]:
    """Places in ``KINDS`` of kinds of questions.

    Raises:
        MedPLIBError: there is no such kind.
    """
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise MedPLIBError(f"there are no questions of kind {', '.join(unknown)}; give some of {', '.join(KINDS)}")
    return frozenset(KINDS.index(kind) for kind in kinds)


def pretrain_language(
    model: MedPLIBForCausalLM, lessons: Lessons, held_out: Lessons, plan: LanguagePlan, seed: int, log: Path | None
) -> SymbolicImages:
    """Train the decoder from nothing on questions about symbolic images; returns what made those."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    decoder = model.model.decoder
    with torch.no_grad():
        decoder.embed_tokens.weight.normal_(std=0.05)
        model.lm_head.weight.copy_(decoder.embed_tokens.weight)
    symbols = lessons.symbolic(model)
    guide = AttentionGuide(decoder)
    reader = StateReader(model.config.text_config.hidden_size, lessons.grid)
    kinds = numbers_of(plan.kinds)

    def step(number: int) -> Losses:
        rows = rng.choice(len(lessons.pool), plan.batch_size, replace=False)
        batch, weights = lessons.batch(rows, kinds, plan.questions, rng)
        shares = lessons.shares[rows].float()
        tokens = symbols(shares, lessons.modalities[rows], plan.noise)
        done = run_packed(model, batch, tokens, pool_regions(batch, weights, tokens))
        guided = plan.guide * guide.loss(batch, shares)
        return {"ce": done.loss, "guide": guided, **reader.losses(batch, done.hidden, shares)}

    def report(number: int) -> None:
        if number % 200 == 0:
            scores = score_symbolic(model, symbols, held_out)
            append_log(log, {"name": "language scores", "step": number, **scores})

    parameters = [*decoder.parameters(), *model.lm_head.parameters(), *symbols.parameters(), *reader.parameters()]
    train_steps("language", parameters, step, plan.steps, plan.lr, log, on_log=report)
    guide.remove()
    return symbols


@torch.no_grad()
def score_symbolic(
    model: MedPLIBForCausalLM, symbols: SymbolicImages, lessons: Lessons, scenes: int = 64
) -> dict[str, float]:
    """Teacher-forced scores by kind of question on the first scenes of a held-out pool."""
    scores, rng = KindScores(), np.random.default_rng(0)
    for start in range(0, min(scenes, len(lessons.pool)), 8):
        rows = np.arange(start, start + 8)
        batch, weights = lessons.batch(rows, ALL_KINDS, 99, rng)
        tokens = symbols(lessons.shares[rows].float(), lessons.modalities[rows])
        scores.add(batch, run_packed(model, batch, tokens, pool_regions(batch, weights, tokens)), lessons.refusals)
    return scores.shares()


def pool_regions(batch: PackedBatch, weights: Tensor, tokens: Tensor) -> Tensor:
    """Mean [R, D] of tokens or features [B, P, D] over the batch's regions, whose weights over patches are [R, P]."""
    rows = torch.tensor([row for row, _, _ in batch.regions], dtype=torch.long)
    return (weights[:, None] @ tokens[rows])[:, 0]


class StateReader(nn.Module):
    """Linear readers of final hidden states that make them tell what later answers need; thrown away after training.

    A state that predicts ``<SEG>`` must tell the class to paint; the states of a structure's name and of a region's
    token must tell where that structure lies, as (right, down) in [−1, 1].
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
