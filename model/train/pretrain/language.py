"""Pre-train the small language model on packed questions: symbolic images, then CLIP features, then ``<SEG>``.

Many questions about one image lie in one sequence: ``prefix · image · <im_end> · question 1 · question 2 …``. Every
question continues at the position where the prefix ends and attends to the prefix and itself alone, so its loss is that
of a sequence of its own.

The first images are symbolic, what a perfect tower and projector would give: every patch is the mean of the word
embeddings of the structures in it, weighted by their shares, plus the modality's word and a place embedding. On them
the decoder learns to match a *named* structure to patches, the skill behind presence, side, regions and refusals.
Matching is also guided: in a few layers one head, at the last token of a structure's name, must attend to that
structure's patches, or to the first token if there are none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from model.data.phantom.questions import SPOKEN_NAMES, Question
from model.data.phantom.scenes import CLASS_IDS, CLASS_NAMES, MODALITIES
from model.errors import MedPLIBError
from model.modeling.configuration import IGNORE_INDEX, IMAGE_PLACEHOLDER, REGION_PLACEHOLDER
from model.modeling.decoder import MedPLIBDecoder
from model.modeling.medplib import MedPLIBForCausalLM
from model.modeling.region import region_means
from model.processing.conversation import Turn
from model.processing.encoding import encode_conversation
from model.processing.masks import region_grid
from model.processing.special_tokens import IMAGE_TOKEN, SEG_TOKEN
from model.processing.tokens import tokenize
from model.train.pretrain import Losses, append_log, train_steps
from model.train.pretrain.pools import ScenePool, clip_pictures
from model.train.pretrain.towers import Plan, cell_places, clip_pixels, soft_labels

Encode = Callable[[str, str], tuple[list[int], list[int]]]
"""(question, answer) → token ids with placeholders and labels of a one-round conversation about one image."""

KINDS = (
    *("modality", "presence", "side", "relation", "list", "place", "finding"),
    *("region_name", "region_check", "region_side", "grounding", "grounding_pair", "grounding_absent"),
)


class PackedQuestion(NamedTuple):
    """One question, ready to be packed."""

    ids: tuple[int, ...]  # tokens after the image
    labels: tuple[int, ...]  # theirs
    kind: int  # index into KINDS
    region: int  # class id whose mask the region placeholder stands for, 0 without one
    targets: tuple[int, ...]  # class ids of its <SEG>, in order
    names: tuple[tuple[int, int], ...]  # place of a structure name's last token and its class id, of every name


@dataclass
class PackedBatch:
    """Packed rows as tensors."""

    ids: Tensor  # long [B, T]; image and region slots hold 0
    image_start: int  # where the P image features go, the same in every row
    positions: Tensor  # long [B, T]
    mask: Tensor  # float [B, 1, T, T], 0 where attention is allowed
    labels: Tensor  # long [B, T]
    question: Tensor  # long [B, T], running number of each token's question, −1 in prefix and padding
    kinds: Tensor  # long [Q], kind of each question
    regions: list[tuple[int, int, int]] = field(default_factory=list)  # (row, place, class id)
    segs: list[tuple[int, int, int]] = field(default_factory=list)  # (row, place of <SEG>, class id)
    names: list[tuple[int, int, int]] = field(default_factory=list)  # (row, place, class id)


class Packer:
    """Turns scenes' questions into packed batches.

    Args:
        encode: tokenises one round about an image.
        name_ids: token ids of every class name inside a sentence, by class id (several spellings each).
        seg_token_id: id of ``<SEG>``.
        num_patches: image features P per image.
    """

    def __init__(
        self, encode: Encode, name_ids: dict[int, list[list[int]]], seg_token_id: int, num_patches: int
    ) -> None:
        self.encode, self.name_ids, self.seg, self.num_patches = encode, name_ids, seg_token_id, num_patches
        ids, _ = encode("Yes?", "Yes")
        self.image_start = ids.index(IMAGE_PLACEHOLDER)
        self.head = ids[: self.image_start + 2]  # up to and with <im_end>

    def prepare(self, question: Question) -> PackedQuestion:
        """Tokenise one question."""
        ids, labels = self.encode(question.question, question.answer)
        assert ids[: len(self.head)] == self.head
        ids, labels = ids[len(self.head) :], labels[len(self.head) :]
        names = [
            (start + len(name) - 1, class_id)
            for class_id, spellings in self.name_ids.items()
            for name in spellings
            for start in range(len(ids) - len(name) + 1)
            if ids[start : start + len(name)] == name
        ]
        region = CLASS_IDS[question.regions[0]] if question.regions else 0
        targets = tuple(CLASS_IDS[name] for name in question.targets)
        kind = KINDS.index(question.kind)
        return PackedQuestion(tuple(ids), tuple(labels), kind, region, targets, tuple(sorted(set(names))))

    def pack(self, rows: Sequence[Sequence[PackedQuestion]]) -> PackedBatch:
        """Pack one sequence of questions per image."""
        prefix = len(self.head) - 1 + self.num_patches
        length = max(prefix + sum(len(question.ids) for question in row) for row in rows)
        shape = (len(rows), length)
        ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        labels, owner = np.full(shape, IGNORE_INDEX, np.int64), np.full(shape, -2, np.int64)
        regions: list[tuple[int, int, int]] = []
        segs: list[tuple[int, int, int]] = []
        names: list[tuple[int, int, int]] = []
        kinds: list[int] = []
        for row, questions in enumerate(rows):
            ids[row, : self.image_start] = self.head[: self.image_start]
            ids[row, prefix - 1] = self.head[-1]
            positions[row, :prefix], owner[row, :prefix] = np.arange(prefix), -1
            place = prefix
            for question in questions:
                end = place + len(question.ids)
                ids[row, place:end] = np.maximum(question.ids, 0)
                labels[row, place:end] = question.labels
                positions[row, place:end] = np.arange(prefix, prefix + len(question.ids))
                owner[row, place:end] = len(kinds)
                slots = [i for i, token in enumerate(question.ids) if token == REGION_PLACEHOLDER]
                regions += [(row, place + i, question.region) for i in slots]
                answers = [i for i, label in enumerate(question.labels) if label == self.seg]
                segs += [(row, place + i, target) for i, target in zip(answers, question.targets, strict=True)]
                names += [(row, place + i, class_id) for i, class_id in question.names]
                kinds.append(question.kind)
                place = end
        number = torch.from_numpy(owner)
        # Causal; a token sees the prefix and its own question; padding sees itself.
        own = (number[:, None, :] == -1) | (number[:, :, None] == number[:, None, :])
        allowed = torch.ones(length, length, dtype=torch.bool).tril() & own
        mask = torch.zeros(allowed.shape).masked_fill_(~allowed, torch.finfo(torch.float32).min)[:, None]
        return PackedBatch(
            torch.from_numpy(ids),
            self.image_start,
            torch.from_numpy(positions),
            mask,
            torch.from_numpy(labels),
            number.clamp(min=-1),
            torch.tensor(kinds),
            regions,
            segs,
            names,
        )


class SymbolicImages(nn.Module):
    """Image tokens written in the language model's own words.

    Args:
        embed: the word embedding.
        name_ids: token ids of every class name, by class id.
        modality_ids: token ids of every modality's word, in the order of ``MODALITIES``.
        num_patches: patches P.
    """

    def __init__(
        self, embed: nn.Embedding, name_ids: Sequence[list[int]], modality_ids: Sequence[list[int]], num_patches: int
    ) -> None:
        super().__init__()
        self._embed = [embed]  # in a list: the embedding is the language model's, not a part of this module
        width, scale = embed.weight.shape[1], float(embed.weight.detach().std())
        self.name_ids, self.modality_ids = name_ids, modality_ids
        self.background = nn.Parameter(torch.randn(width) * scale)
        # One direction grows to the right, one downwards: they survive averaging over a region, unlike independent
        # embeddings of the cells.
        slopes = cell_places(math.isqrt(num_patches)) @ torch.randn(2, width)
        self.places = nn.Parameter((slopes + 0.2 * torch.randn(num_patches, width)) * scale)

    def words(self) -> Tensor:
        """Embedding of every class name [classes, D]; the background has its own."""
        weight = self._embed[0].weight
        names = [weight[ids].mean(0) * math.sqrt(len(ids)) for ids in self.name_ids[1:]]
        return torch.stack([self.background, *names])

    def forward(self, shares: Tensor, modalities: Tensor, noise: float = 0.0) -> Tensor:
        """Image tokens [B, P, D] of class shares [B, P, classes] and modality numbers [B]."""
        weight = self._embed[0].weight
        kinds = torch.stack([weight[ids].mean(0) for ids in self.modality_ids])
        tokens = shares @ self.words() + 0.5 * kinds[modalities][:, None] + self.places
        return tokens + torch.randn_like(tokens) * noise * weight.detach().std()


class AttentionGuide:
    """Reads queries and keys of chosen decoder layers while they run, and guides where one head looks."""

    def __init__(self, decoder: MedPLIBDecoder, layers: Sequence[int] = (1, 2, 3), head: int = 0) -> None:
        self.decoder, self.layers, self.head = decoder, layers, head
        self.seen: dict[tuple[int, str], Tensor] = {}
        self.hooks = [
            getattr(decoder.layers[layer].self_attn, name).register_forward_hook(
                lambda module, inputs, output, key=(layer, name): self.seen.__setitem__(key, output)
            )
            for layer in layers
            for name in ("q_proj", "k_proj")
        ]

    def remove(self) -> None:
        """Take the hooks out of the decoder."""
        for hook in self.hooks:
            hook.remove()

    def loss(self, batch: PackedBatch, shares: Tensor) -> Tensor:
        """Cross-entropy (above its floor) of the head's attention from names to patches; shares are [B, P, classes]."""
        if not batch.names:
            return shares.new_zeros(())
        rows, places, classes = torch.tensor(batch.names).T
        wanted = shares[rows, :, classes]  # [Q, P]
        total = wanted.sum(1, keepdim=True)
        sink = (total < 0.05).float()
        start, end = batch.image_start, batch.image_start + wanted.shape[1]
        target = wanted.new_zeros(len(rows), end)
        target[:, start:] = (1 - sink) * wanted / total.clamp(min=1e-6)
        target[:, :1] = sink
        floor = -torch.xlogy(target, target).sum(1).mean()
        attention: Any = self.decoder.layers[self.layers[0]].self_attn
        like = self.seen[self.layers[0], "q_proj"]
        cos, sin = self.decoder.rotary_emb(like, batch.positions)
        losses = []
        for layer in self.layers:
            heads = slice(self.head * attention.head_dim, (self.head + 1) * attention.head_dim)
            query = self.seen[layer, "q_proj"][:, None, :, heads]
            key = self.seen[layer, "k_proj"][:, None, :, heads]
            query, key = apply_rotary_pos_emb(query, key, cos, sin)
            scores = torch.einsum("qd,qkd->qk", query[rows, 0, places], key[rows, 0, :end]) * attention.scaling
            losses.append(-(target * scores.log_softmax(-1)).sum(1).mean() - floor)
        return torch.stack(losses).mean()


class PackedPass(NamedTuple):
    """What one packed pass gives."""

    hidden: Tensor  # states [B, T, D]
    loss: Tensor  # mean over questions of their mean token loss
    exact: Tensor  # bool [Q], every supervised token was the likeliest one
    first: Tensor  # long [Q], the likeliest first token


def run_packed(
    model: MedPLIBForCausalLM, batch: PackedBatch, tokens: Tensor, region_tokens: Tensor | None
) -> PackedPass:
    """Run the decoder on a packed batch with image tokens [B, P, D] and an embedding per region [R, D]."""
    text = model.model.decoder.embed_tokens(batch.ids)
    end = batch.image_start + tokens.shape[1]
    embeds = torch.cat([text[:, : batch.image_start], tokens, text[:, end:]], 1)
    if batch.regions and region_tokens is not None:
        rows, places, _ = torch.tensor(batch.regions).T
        embeds = embeds.index_put((rows, places), region_tokens)
    decoder = model.model.decoder
    hidden = decoder(embeds, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False).last_hidden_state
    targets = batch.labels[:, 1:]
    chosen = targets != IGNORE_INDEX
    logits = model.lm_head(hidden[:, :-1][chosen])
    token_loss = functional.cross_entropy(logits, targets[chosen], reduction="none")
    owner = batch.question[:, 1:][chosen]
    count = torch.zeros(len(batch.kinds)).index_add_(0, owner, torch.ones_like(token_loss))
    per_question = torch.zeros(len(batch.kinds)).index_add(0, owner, token_loss) / count
    likeliest = logits.detach().argmax(-1)
    exact = torch.zeros(len(batch.kinds)).index_add_(0, owner, (likeliest != targets[chosen]).float()) == 0
    starts = torch.cat([torch.ones(1, dtype=torch.bool), owner[1:] != owner[:-1]])
    return PackedPass(hidden, per_question.mean(), exact, likeliest[starts])


_SPATIAL = frozenset(KINDS.index(kind) for kind in ("side", "relation", "place", "finding", "region_side"))
_SPATIAL_WEIGHT = 5.0  # they are learnt last and are few


def draw_questions(
    questions: Sequence[PackedQuestion], kinds: frozenset[int], most: int, rng: np.random.Generator
) -> list[PackedQuestion]:
    """Up to ``most`` questions of the wanted kinds, at random; those about places are likelier to be drawn."""
    wanted = [question for question in questions if question.kind in kinds]
    weights = np.array([_SPATIAL_WEIGHT if question.kind in _SPATIAL else 1.0 for question in wanted])
    order = np.argsort(-np.log(weights) - rng.gumbel(size=len(wanted)))
    return [wanted[int(index)] for index in order[:most]]


# --- curriculum -------------------------------------------------------------------------------------------------------

View = Callable[[np.ndarray, PackedBatch, Tensor], tuple[Tensor, Tensor]]
"""(scenes, packed questions about them, region weights [R, P]) → image tokens [B, P, D], region tokens [R, D]."""


ALL_KINDS = frozenset(range(len(KINDS)))


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
        """Questions about one scene; tokenised when they are first needed."""
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
    model: MedPLIBForCausalLM, lessons: Lessons, held_out: Lessons, plan: Plan, seed: int, log: Path | None
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
    plan: Plan,
    seed: int,
    log: Path | None,
    held_out: tuple[Lessons, Tensor],
) -> None:
    """Train decoder, language head, projector and region adapter on packed questions about real images.

    ``features`` [N, P, Dv] are of the lessons' scenes; ``held_out`` lessons and features are scored every 200 steps.
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
    plan: Plan,
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
    kinds = frozenset(KINDS.index(kind) for kind in plan.kinds or KINDS)

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
    plan: Plan,
    seed: int,
    log: Path | None,
) -> None:
    """Fit projector and region adapter to the symbolic embedding of every patch and of every structure's region."""
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
    plan: Plan,
    seed: int,
    log: Path | None,
) -> None:
    """Fit the mask head, so that a ``<SEG>`` state gives its class's query of ``class_queries`` [classes, C]."""
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
