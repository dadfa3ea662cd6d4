"""Train the language model on packed questions: first about symbolic images, then about what the CLIP tower sees.

A symbolic image is what a perfect tower and projector would give: every patch is the mean of the word embeddings of the
structures in it, weighted by their shares, plus the modality's word and a place embedding. On them the decoder learns
to match a *named* structure to patches, the skill behind presence, side, regions and refusals. Matching is also guided:
in a few layers one head, at the last token of a structure's name, must attend to that structure's patches, or to the
first token if there are none. The projector is then fitted to the symbolic embeddings, and the skill carries over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from model.data.builders.phantom_scenes import CLASS_NAMES, MODALITIES
from model.modeling.configuration import IGNORE_INDEX
from model.modeling.decoder import MedPLIBDecoder
from model.modeling.medplib import MedPLIBForCausalLM
from model.train.pretrain.packing import KINDS, PackedBatch, PackedQuestion


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
        self.places = nn.Parameter(_place_embeddings(num_patches, width) * scale)

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


def _place_embeddings(num_patches: int, width: int) -> Tensor:
    """Embeddings [P, D] of the cells of a square grid: one direction grows to the right, one downwards, a little noise.

    Directions survive averaging over a region, which independent embeddings would not.
    """
    side = math.isqrt(num_patches)
    ramp = torch.linspace(-1, 1, side)
    down, right = torch.meshgrid(ramp, ramp, indexing="ij")
    directions = torch.randn(2, width)
    slopes = torch.stack([right.flatten(), down.flatten()], 1) @ directions
    return slopes + 0.2 * torch.randn(num_patches, width)


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
    """What one packed pass gives: hidden states [B, T, D], the mean over questions of their mean token loss, the
    router's loss, and per question whether every supervised token was the likeliest one and which first token was."""

    hidden: Tensor
    loss: Tensor
    aux: Tensor
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
    decoded = model.model.decoder(embeds, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False)
    hidden = decoded.last_hidden_state
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
    return PackedPass(hidden, per_question.mean(), decoded.aux_loss, exact, likeliest[starts])


class KindScores:
    """Running scores by kind of question, teacher forced.

    The score of a grounding question is whether the answer's first word is that of a refusal where it should be, and of
    an acceptance where not (their wordings are drawn at random); of other questions, whether all tokens are right.
    """

    def __init__(self) -> None:
        self.right, self.total = np.zeros(len(KINDS)), np.zeros(len(KINDS))

    def add(self, batch: PackedBatch, done: PackedPass, refusals: frozenset[int]) -> None:
        """Count one batch; ``refusals`` are the ids of refusals' first tokens."""
        refuses = torch.tensor([int(token) in refusals for token in done.first])
        grounding = torch.tensor([KINDS[int(kind)].startswith("grounding") for kind in batch.kinds])
        absent = batch.kinds == KINDS.index("grounding_absent")
        right = torch.where(grounding, refuses == absent, done.exact)
        kinds = batch.kinds.numpy()
        np.add.at(self.right, kinds, right.numpy())
        np.add.at(self.total, kinds, 1)

    def shares(self) -> dict[str, float]:
        """Share of right answers by kind."""
        return {
            kind: round(float(right / total), 3)
            for kind, right, total in zip(KINDS, self.right, self.total, strict=True)
            if total
        }


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


def name_spellings(encode_text: Callable[[str], list[int]]) -> dict[int, list[list[int]]]:
    """Token ids of every class name as it stands inside a sentence and at its start, by class id."""
    spellings = {}
    for class_id, name in enumerate(CLASS_NAMES):
        if class_id:
            forms = (name, name[0].upper() + name[1:])
            spellings[class_id] = [list(ids) for ids in dict.fromkeys(tuple(encode_text(form)) for form in forms)]
    return spellings


def modality_words(encode_text: Callable[[str], list[int]], spoken: dict[str, str]) -> list[list[int]]:
    """Token ids of every modality's word, in the order of ``MODALITIES``."""
    return [encode_text(spoken[key][0].upper() + spoken[key][1:]) for key in MODALITIES]
