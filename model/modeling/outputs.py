"""Outputs of the network's passes and of its parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.utils import ModelOutput

from model.modeling.moe import RouterStats
from model.modeling.splice import SplicePlan


@dataclass(frozen=True)
class RowLosses:
    """Losses before they are averaged over a batch; detached, unweighted.

    Attributes:
        ce: float32 [B], sum of the cross-entropy over each row's supervised tokens.
        tokens: float32 [B], how many those are.
        masks: ``bce``, ``dice``, ``focal``, ``iou``, float32 [M] each, masks in the order of ``mask_rows``.
    """

    ce: torch.Tensor
    tokens: torch.Tensor
    masks: dict[str, torch.Tensor]


@dataclass
class MedPLIBOutput(ModelOutput):
    """What one forward pass gives.

    Attributes:
        loss: scalar, the weighted sum that training minimises; None without labels.
        losses: its parts before weighting (``ce``, ``router_aux``, ``bce``, ``dice``, ``focal``, ``iou``), scalars.
        logits: [B, L, V], or the kept last positions; None where training does not need them.
        last_hidden_state: [B, L, D] after the final norm.
        mask_logits: one [H, W] tensor per ``<SEG>``, rows in order, at the original image size.
        low_res_masks: [M, 1, l, l] mask logits as SAM gives them.
        iou_predictions: [M, 1], SAM's own estimate of each mask's IoU.
        mask_rows: long [M], the batch row of each mask.
        past_key_values: decoder cache.
        router_stats: per mixture layer, what its router did.
        projector_stats: what the projector's router did with the tokens of images; None for a dense projector.
        plan: where the tokens of ``input_ids`` stand in the grown sequence; None in a decoding step.
        row_losses: the losses of single rows and masks, for reports by kind; None without labels.
    """

    loss: torch.Tensor | None = None
    losses: dict[str, torch.Tensor] | None = None
    logits: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    mask_logits: list[torch.Tensor] | None = None
    low_res_masks: torch.Tensor | None = None
    iou_predictions: torch.Tensor | None = None
    mask_rows: torch.Tensor | None = None
    past_key_values: Any = None
    router_stats: tuple[RouterStats, ...] | None = None
    plan: SplicePlan | None = None
    row_losses: RowLosses | None = None
    projector_stats: RouterStats | None = None


@dataclass
class MaskOutput:
    """Masks of a batch of ``<SEG>`` states: see the fields of the same name in ``MedPLIBOutput``."""

    mask_logits: list[torch.Tensor]
    low_res_masks: torch.Tensor
    iou_predictions: torch.Tensor


@dataclass
class SplicedInputs:
    """A batch after its images and regions took their places.

    Attributes:
        embeds: [B, L, D].
        plan: where each token went.
        projector_aux_loss: scalar; zero for a dense projector.
        projector_stats: what its router did; None for a dense projector.
    """

    embeds: torch.Tensor
    plan: SplicePlan
    projector_aux_loss: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    projector_stats: RouterStats | None = None
