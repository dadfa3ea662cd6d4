"""What routers did, by groups of tokens; and which place of a sequence is what."""

from __future__ import annotations

import math

import torch
from torch.testing import assert_close

from model.modeling.configuration import IGNORE_INDEX, IMAGE_PLACEHOLDER, REGION_PLACEHOLDER
from model.modeling.moe import MoEFeedForward, RouterStats
from model.modeling.router_tally import RouterSummary, RouterTally
from model.modeling.splice import POSITION_KINDS, image_token_rows, plan_splice, position_kinds
from tests.tiny import tiny_model

SEG = 9


def stats_of(first: list[int], kept: list[bool], probabilities: list[list[float]]) -> RouterStats:
    experts = len(probabilities[0])
    choices = torch.nn.functional.one_hot(torch.tensor(first), experts).bool()
    taken = choices & torch.tensor(kept)[:, None]
    shares = torch.tensor(probabilities)
    return RouterStats(shares * taken, taken, choices[None], torch.tensor(2.0), shares)


def test_shares_are_those_of_each_group_over_several_passes() -> None:
    tally = RouterTally(groups=3)
    one = stats_of([0, 1, 1, 1], [True, True, False, True], [[0.9, 0.1], [0.2, 0.8], [0.5, 0.5], [0.0, 1.0]])
    tally.add([one], torch.tensor([0, 1, 1, -1]))
    tally.add([one], torch.tensor([1, 1, -1, -1]))
    assert tally.sums is not None
    found = RouterSummary.of(tally.sums)
    assert found.tokens.tolist() == [[1, 4, 0]]
    assert_close(found.load[0, :2], torch.tensor([[1.0, 0.0], [0.25, 0.75]], dtype=torch.float64))
    assert found.load[0, 2].isnan().all()  # a group without a token has no shares
    assert_close(found.dropped[0, :2], torch.tensor([0.0, 0.25], dtype=torch.float64))
    assert_close(float(found.mean_probability[0, 1, 1]), (0.8 + 0.5 + 0.1 + 0.8) / 4, rtol=1e-6, atol=0)
    sure = [-(p * math.log(p) + (1 - p) * math.log(1 - p)) for p in (0.2, 0.5, 0.9, 0.2)]
    assert_close(float(found.mean_entropy[0, 1]), sum(sure) / 4, rtol=1e-6, atol=0)
    both = found.merged([(0, 1)])
    assert_close(both.load, torch.tensor([[[0.4, 0.6]]], dtype=torch.float64))
    tally.clear()
    assert not tally.sums.any()


def test_layers_may_have_other_numbers_of_experts() -> None:
    tally = RouterTally(groups=1)
    three = stats_of([2, 0], [True, True], [[0.1, 0.2, 0.7], [0.6, 0.2, 0.2]])
    two = stats_of([1, 1], [True, True], [[0.1, 0.9], [0.4, 0.6]])
    tally.add([three, two], torch.tensor([0, 0]))
    assert tally.sums is not None
    assert RouterSummary.of(tally.sums).load[:, 0].tolist() == [[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]]


def test_both_choices_of_a_token_count() -> None:
    torch.manual_seed(0)
    layer = MoEFeedForward([torch.nn.Linear(4, 4) for _ in range(3)], 4, top_k=2).eval()
    stats = layer(torch.randn(6, 4)).router
    tally = RouterTally(groups=1)
    tally.add([stats], torch.zeros(6, dtype=torch.long))
    assert tally.sums is not None
    found = RouterSummary.of(tally.sums)
    assert float(found.choices.sum()) == 12 and float(found.tokens) == 6
    assert_close(float(found.mean_probability.sum()), 1.0, rtol=1e-6, atol=0)


def test_millions_of_tokens_are_summed_as_exactly_as_few() -> None:
    count = 500_000
    one = stats_of([0] * count, [True] * count, [[0.98, 0.02]] * count)
    tally = RouterTally(groups=1)
    for _ in range(4):
        tally.add([one], torch.zeros(count, dtype=torch.long))
    assert tally.sums is not None
    found = RouterSummary.of(tally.sums)
    tally.clear()
    assert float(found.tokens) == 4 * count
    assert_close(found.mean_probability[0, 0], torch.tensor([0.98, 0.02], dtype=torch.float64), rtol=1e-6, atol=0)


def test_each_place_has_one_kind() -> None:
    ids = torch.tensor([[1, IMAGE_PLACEHOLDER, 5, REGION_PLACEHOLDER, 6, SEG, 2], [1, 5, SEG, 7, 2, 0, 0]])
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[0, 4:] = ids[0, 4:]
    labels[1, 3:5] = ids[1, 3:5]  # the <SEG> of this row stands in the question
    mask = torch.tensor([[1] * 7, [1, 1, 1, 1, 1, 0, 0]])
    kinds = position_kinds(plan_splice(ids, mask, [3]), ids, labels, SEG)
    named = [[POSITION_KINDS[kind] if kind >= 0 else "" for kind in row] for row in kinds.tolist()]
    assert named == [
        ["text", "image", "image", "image", "text", "region", "seg", "text", "text"],
        ["text"] * 5 + [""] * 4,
    ]


def test_each_token_of_the_projector_belongs_to_the_row_that_shows_its_image() -> None:
    ids = torch.tensor([[1, IMAGE_PLACEHOLDER, 5, IMAGE_PLACEHOLDER], [1, 5, 7, 2], [IMAGE_PLACEHOLDER, 5, 6, 0]])
    mask = torch.tensor([[1] * 4, [1] * 4, [1, 1, 1, 0]])
    plan = plan_splice(ids, mask, [2, 2, 2])
    assert image_token_rows(plan, ids, 9).tolist() == [0] * 6 + [2] * 3  # three tokens an image, made fewer behind it
    assert image_token_rows(plan, ids, 6, ["image", "mask", "image"]).tolist() == [0] * 3 + [2] * 3
    words = ids[1:2]
    assert image_token_rows(plan_splice(words, mask[1:2], []), words, 0).tolist() == []


def test_a_mixture_in_the_projector_tells_what_its_router_did_also_without_an_image() -> None:
    model = tiny_model(projector={"type": "moe_mlp2x_gelu", "num_experts": 3, "top_k": 2})
    ids = torch.tensor([[1, IMAGE_PLACEHOLDER, 5], [1, 5, 6]])
    stats = model(input_ids=ids, pixel_values=torch.randn(1, 3, 28, 28)).projector_stats
    assert stats.kept.shape == (16, 3) and int(stats.choices.sum()) == 32
    assert len(model(input_ids=ids[1:]).projector_stats.kept) == 0
    assert tiny_model()(input_ids=ids[1:]).projector_stats is None


def test_row_losses_add_up_to_the_loss() -> None:
    model = tiny_model(seg_token_id=SEG)
    torch.manual_seed(1)
    ids = torch.randint(10, 300, (3, 12))
    ids[1, 8] = SEG
    labels = ids.clone()
    labels[:, :5] = IGNORE_INDEX
    target = torch.zeros(1, 40, 40)
    target[:, 10:20, 10:20] = 1
    output = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        labels=labels,
        sam_pixel_values=torch.randn(3, 3, 64, 64),
        sam_sizes=[(64, 64)] * 3,
        image_sizes=[(40, 40)] * 3,
        mask_targets=[target[:0], target, target[:0]],
    )
    rows = output.row_losses
    assert rows.tokens.tolist() == [7, 7, 7]
    assert_close(rows.ce.sum() / rows.tokens.sum(), output.losses["ce"].detach())
    assert not rows.ce.requires_grad
    for name in ("bce", "dice", "focal", "iou"):
        assert_close(rows.masks[name].mean(), output.losses[name].detach())
    sizes = {"sam_sizes": [(64, 64)], "image_sizes": [(40, 40)], "mask_targets": [target]}
    alone = model(input_ids=ids[1:2], labels=labels[1:2], sam_pixel_values=torch.zeros(1, 3, 64, 64), **sizes)
    assert_close(alone.row_losses.ce[0], rows.ce[1], rtol=1e-4, atol=1e-4)
