"""Losses: what they measure, and that an empty batch stays finite and attached."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

from model.modeling.configuration import IGNORE_INDEX
from model.modeling.losses import causal_ce, each_mask_loss, mask_losses

SQUARE = torch.zeros(8, 8)
SQUARE[2:6, 2:6] = 1


def test_ce_equals_the_plain_shifted_cross_entropy() -> None:
    torch.manual_seed(0)
    head, hidden = nn.Linear(4, 11, bias=False), torch.randn(3, 6, 4)
    labels = torch.randint(0, 11, (3, 6))
    labels[0] = IGNORE_INDEX  # a whole row without supervision is left out
    labels[1, :3] = IGNORE_INDEX
    want = functional.cross_entropy(
        head(hidden)[:, :-1].reshape(-1, 11), labels[:, 1:].reshape(-1), ignore_index=IGNORE_INDEX
    )
    assert_close(causal_ce(hidden, labels, head).mean, want)


def test_ce_computes_logits_at_supervised_positions_alone() -> None:
    rows = []

    def head(hidden: torch.Tensor) -> torch.Tensor:
        rows.append(len(hidden))
        return hidden

    labels = torch.full((2, 9), IGNORE_INDEX)
    labels[0, 4:7] = 1
    causal_ce(torch.randn(2, 9, 4), labels, head)
    assert rows == [3]


def test_ce_without_supervision_is_zero_and_attached() -> None:
    head, hidden = nn.Linear(4, 11), torch.randn(2, 5, 4, requires_grad=True)
    loss = causal_ce(hidden, torch.full((2, 5), IGNORE_INDEX), head).mean
    loss.backward()
    assert float(loss.detach()) == 0
    assert hidden.grad is not None and not hidden.grad.any()
    assert head.weight.grad is not None and not head.weight.grad.any()


def test_perfect_masks_cost_nothing_and_wrong_ones_much() -> None:
    good, bad = (SQUARE * 2 - 1) * 30, (1 - SQUARE * 2) * 30
    perfect = mask_losses([good], [SQUARE], torch.ones(1, 1))
    assert all(float(loss) < 1e-4 for loss in perfect.values())
    wrong = mask_losses([bad], [SQUARE], torch.ones(1, 1))
    assert float(wrong["bce"]) == pytest.approx(30, rel=1e-3)
    assert all(float(wrong[name]) > 0.9 for name in ("dice", "focal", "iou"))


def test_masks_of_different_sizes_count_equally() -> None:
    small, large = torch.zeros(4, 4), torch.zeros(40, 40)
    losses = mask_losses([small + 3, large - 3], [small, large], torch.zeros(2, 1))
    want = (functional.softplus(torch.tensor(3.0)) + functional.softplus(torch.tensor(-3.0))) / 2
    assert_close(losses["bce"], want)


def test_dice_of_half_an_overlap() -> None:
    half = SQUARE.clone()
    half[2:4] = 0
    dice = mask_losses([(half * 2 - 1) * 50], [SQUARE], torch.zeros(1, 1))["dice"]
    assert float(dice) == pytest.approx(1 - 2 * 8 / 24, abs=1e-4)


def test_focal_weighs_background_three_times_foreground() -> None:
    logits = torch.zeros(2, 2)
    background, foreground = each_mask_loss([logits] * 2, [logits, torch.ones(2, 2)], torch.zeros(2, 1))["focal"]
    assert_close(background, 3 * foreground)
    assert_close(foreground, 0.25 * 0.25 * torch.tensor(2.0).log())


def test_iou_loss_is_the_squared_error_of_the_estimate() -> None:
    half = SQUARE.clone()
    half[2:4] = 0
    logits = (half * 2 - 1) * 50
    iou = mask_losses([logits], [SQUARE], torch.full((1, 1), 0.8))["iou"]
    assert float(iou) == pytest.approx(0.3**2, abs=1e-4)


def test_losses_that_are_not_learnt_have_no_gradient() -> None:
    logits, iou = torch.randn(8, 8, requires_grad=True), torch.zeros(1, 1, requires_grad=True)
    every = each_mask_loss([logits], [SQUARE], iou)
    some = each_mask_loss([logits], [SQUARE], iou, ["bce", "dice"])
    assert {name: value.requires_grad for name, value in some.items()} == {
        "bce": True,
        "dice": True,
        "focal": False,
        "iou": False,
    }
    assert_close(some, every)


def test_no_masks_cost_nothing_and_stay_attached() -> None:
    ious = torch.zeros(0, 1, requires_grad=True)
    losses = mask_losses([], [], ious)
    sum(losses.values()).backward()
    assert ious.grad is not None
    assert all(float(loss.detach()) == 0 for loss in losses.values())


def test_an_empty_target_stays_finite() -> None:
    logits = torch.full((4, 4), -100.0, requires_grad=True)
    losses = mask_losses([logits], [torch.zeros(4, 4)], torch.zeros(1, 1))
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert logits.grad.isfinite().all()


def test_mismatches_are_refused() -> None:
    with pytest.raises(ValueError, match="2 predicted masks for 1"):
        mask_losses([SQUARE, SQUARE], [SQUARE], torch.zeros(2, 1))
    with pytest.raises(ValueError, match="mask 0"):
        mask_losses([SQUARE], [SQUARE[:4]], torch.zeros(1, 1))
