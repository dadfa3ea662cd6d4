"""Losses: next-token cross-entropy and four mask losses (reference §4).

Every loss is a float32 scalar; with nothing to supervise it is 0 and still attached to the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from model.modeling.configuration import IGNORE_INDEX

DICE_EPSILON = 1e-6
IOU_EPSILON = 1e-7
FOCAL_GAMMA = 2.0
FOCAL_ALPHA = 0.25


MASK_LOSSES = ("bce", "dice", "focal", "iou")


@dataclass(frozen=True)
class TokenLosses:
    """Cross-entropy of the n supervised tokens of a batch.

    Attributes:
        mean: scalar, over all of them.
        values: [n], detached.
        rows: long [n], the batch row of each.
    """

    mean: Tensor
    values: Tensor
    rows: Tensor

    def by_row(self, count: int) -> tuple[Tensor, Tensor]:
        """Sum of the values, and number of tokens, of each of ``count`` rows: float32 [B] each."""
        empty = self.values.new_zeros(count)
        return empty.index_add(0, self.rows, self.values), empty.index_add(0, self.rows, torch.ones_like(self.values))


def causal_ce(hidden: Tensor, labels: Tensor, lm_head: Callable[[Tensor], Tensor]) -> TokenLosses:
    """Cross-entropy of each supervised token, predicted from the position before it.

    Logits are computed at those positions alone: of a grounding sample's hundreds of tokens a dozen are supervised.

    Args:
        hidden: [B, L, D], the decoder's last hidden states.
        labels: long [B, L], ``IGNORE_INDEX`` where unsupervised.
        lm_head: maps [n, D] to logits [n, V], n = 0 included.
    """
    targets = labels[:, 1:]
    rows, places = (targets != IGNORE_INDEX).nonzero(as_tuple=True)  # [n] each
    logits = lm_head(hidden[rows, places]).float()  # [n, V]
    values = functional.cross_entropy(logits, targets[rows, places], reduction="none")  # [n]
    return TokenLosses(values.sum() / max(len(logits), 1), values.detach(), rows)


def mask_losses(logits: Sequence[Tensor], targets: Sequence[Tensor], iou_predictions: Tensor) -> dict[str, Tensor]:
    """All four mask losses, each averaged over the masks of the batch, unweighted; see ``each_mask_loss``."""
    return mean_mask_losses(each_mask_loss(logits, targets, iou_predictions), iou_predictions)


def mean_mask_losses(each: Mapping[str, Tensor], iou_predictions: Tensor) -> dict[str, Tensor]:
    """Means of what ``each_mask_loss`` gives; without a mask 0, attached to the empty ``iou_predictions``."""
    if not len(iou_predictions):
        return dict.fromkeys(MASK_LOSSES, iou_predictions.float().sum() * 0)
    return {name: values.mean() for name, values in each.items()}


def each_mask_loss(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    iou_predictions: Tensor,
    learnt: Container[str] = MASK_LOSSES,
) -> dict[str, Tensor]:
    """All four losses of each mask, unweighted, in one pass over its pixels.

    ``bce`` and ``focal`` (γ 2, α 0.25) are means over pixels, ``dice`` is 1 − soft Dice, ``iou`` the squared error of
    SAM's estimate against the soft IoU.

    Args:
        logits: M tensors [H, W], sizes may differ.
        targets: M tensors [H, W] in {0, 1}.
        iou_predictions: [M, 1], what SAM expects each mask's IoU to be.
        learnt: which have gradients; the others are looked at only.

    Returns:
        ``bce``, ``dice``, ``focal``, ``iou``, float32 [M] each.

    Raises:
        ValueError: logits and targets differ in number or shape.
    """
    if len(logits) != len(targets):
        raise ValueError(f"{len(logits)} predicted masks for {len(targets)} target masks")
    for index, (mask, target) in enumerate(zip(logits, targets, strict=True)):
        if mask.shape != target.shape:
            raise ValueError(f"mask {index} is {tuple(mask.shape)}, its target {tuple(target.shape)}")
    if not logits:
        return dict.fromkeys(MASK_LOSSES, iou_predictions.new_zeros(0, dtype=torch.float32))
    parts: dict[str, list[Tensor]] = {name: [] for name in MASK_LOSSES}
    for mask, target, estimate in zip(logits, targets, iou_predictions.float().flatten(), strict=True):
        x, y = mask.float().flatten(), target.float().flatten()
        p = x.sigmoid()
        entropy = functional.binary_cross_entropy_with_logits(x, y, reduction="none")
        overlap, predicted, real = p @ y, p.sum(), y.sum()
        parts["bce"].append(entropy.mean())
        parts["dice"].append(1 - (2 * overlap + DICE_EPSILON) / (predicted + real + DICE_EPSILON))
        with torch.set_grad_enabled("focal" in learnt and torch.is_grad_enabled()):
            wrongness = p + y - 2 * p * y  # 1 − p of the true class
            balance = (1 - FOCAL_ALPHA) + (2 * FOCAL_ALPHA - 1) * y
            parts["focal"].append((balance * wrongness**FOCAL_GAMMA * entropy).mean())
        with torch.set_grad_enabled("iou" in learnt and torch.is_grad_enabled()):
            soft = (overlap + IOU_EPSILON) / (predicted + real - overlap + IOU_EPSILON)
            parts["iou"].append((estimate - soft) ** 2)
    return {name: torch.stack(values) for name, values in parts.items()}
