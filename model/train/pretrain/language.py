"""Packed questions about images, and the language model's pass over them.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from model.data.phantom.questions import Question
from model.data.phantom.scenes import CLASS_IDS
from model.modeling.configuration import IGNORE_INDEX, IMAGE_PLACEHOLDER, REGION_PLACEHOLDER
from model.modeling.decoder import MedPLIBDecoder
from model.modeling.medplib import MedPLIBForCausalLM
from model.train.pretrain.vision import cell_places

Encode = Callable[[str, str], tuple[list[int], list[int]]]
"""(question, answer) → token ids with placeholders and labels of a one-round conversation about one image."""

KINDS = (
    *("modality", "presence", "side", "relation", "list", "place", "finding"),
    *("region_name", "region_check", "region_side", "grounding", "grounding_pair", "grounding_absent"),
)


@dataclass(frozen=True)
class PackedQuestion:
    """One question, ready to be packed.

    Attributes:
        ids, labels: tokens after the image, and their labels.
        kind: index into ``KINDS``.
        region: class id whose mask the region placeholder stands for, 0 without one.
        targets: class ids of its ``<SEG>``, in order.
        names: (place of a structure name's last token, its class id) for every name in question and answer.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    kind: int
    region: int
    targets: tuple[int, ...]
    names: tuple[tuple[int, int], ...]


@dataclass
class PackedBatch:
    """Packed rows as tensors.

    Attributes:
        ids: long [B, T]; image and region slots hold 0.
        image_start: where the P image features go, the same in every row.
        positions: long [B, T].
        mask: float [B, 1, T, T], 0 where attention is allowed.
        labels: long [B, T].
        question: long [B, T], running number of each token's question in the batch, −1 in prefix and padding.
        kinds: long [Q], kind of each question.
        regions: (row, place, class id); segs: (row, place of ``<SEG>``, class id); names: (row, place, class id).
    """

    ids: Tensor
    image_start: int
    positions: Tensor
    mask: Tensor
    labels: Tensor
    question: Tensor
    kinds: Tensor
    regions: list[tuple[int, int, int]] = field(default_factory=list)
    segs: list[tuple[int, int, int]] = field(default_factory=list)
    names: list[tuple[int, int, int]] = field(default_factory=list)


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
        batch_lists: tuple[list, list, list] = ([], [], [])
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
                self._note(batch_lists, row, place, question)
                kinds.append(question.kind)
                place = end
        number = torch.from_numpy(owner)
        return PackedBatch(
            torch.from_numpy(ids),
            self.image_start,
            torch.from_numpy(positions),
            _attention(number),
            torch.from_numpy(labels),
            number.clamp(min=-1),
            torch.tensor(kinds),
            *batch_lists,
        )

    def _note(self, lists: tuple[list, list, list], row: int, place: int, question: PackedQuestion) -> None:
        regions, segs, names = lists
        regions += [(row, place + i, question.region) for i, t in enumerate(question.ids) if t == REGION_PLACEHOLDER]
        places = [i for i, label in enumerate(question.labels) if label == self.seg]
        segs += [(row, place + i, target) for i, target in zip(places, question.targets, strict=True)]
        names += [(row, place + i, class_id) for i, class_id in question.names]


def _attention(owner: Tensor) -> Tensor:
    """Additive mask [B, 1, T, T]: causal; to the prefix and the own question; padding sees itself."""
    length = owner.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    allowed = causal & ((owner[:, None, :] == -1) | (owner[:, :, None] == owner[:, None, :]))
    return torch.zeros(allowed.shape).masked_fill_(~allowed, torch.finfo(torch.float32).min)[:, None]


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
    """Reads queries and keys of chosen decoder layers while they run, and says where one head should look."""

    def __init__(self, decoder: MedPLIBDecoder, layers: Sequence[int] = (1, 2, 3), head: int = 0) -> None:
        self.decoder, self.layers, self.head = decoder, layers, head
        self.seen: dict[tuple[int, str], Tensor] = {}
        self.hooks = [
            getattr(decoder.layers[layer].self_attn, name).register_forward_hook(self._keep(layer, name))
            for layer in layers
            for name in ("q_proj", "k_proj")
        ]

    def _keep(self, layer: int, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            self.seen[layer, name] = output

        return hook

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


@dataclass
class PackedPass:
    """What one packed pass gives: hidden states [B, T, D], the mean over questions of their mean token loss, and per
    question whether every supervised token was the likeliest one and which first token was."""

    hidden: Tensor
    loss: Tensor
    exact: Tensor
    first: Tensor


def run_packed(
    model: MedPLIBForCausalLM, batch: PackedBatch, tokens: Tensor, region_tokens: Tensor | None
) -> PackedPass:
    """Run the decoder on a packed batch.

    Args:
        tokens: image tokens [B, P, D].
        region_tokens: one embedding per region of the batch [R, D].
    """
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
