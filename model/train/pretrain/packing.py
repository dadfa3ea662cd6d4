"""Many questions about one image in one sequence: the image and the system text are read once, questions do not see
each other.

A packed row is ``prefix · image · <im_end> · question 1 · question 2 …``. Every question continues at the position
where the prefix ends and attends to the prefix and itself alone, so its loss is that of a sequence of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from model.data.builders.phantom_questions import Question
from model.data.builders.phantom_scenes import CLASS_IDS
from model.modeling.configuration import IGNORE_INDEX, IMAGE_PLACEHOLDER, REGION_PLACEHOLDER

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
