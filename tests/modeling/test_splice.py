"""Images and regions take their places in the text, whatever side the padding is on."""

from __future__ import annotations

import pytest
import torch

from model.modeling.configuration import IGNORE_INDEX, IMAGE_PLACEHOLDER, REGION_PLACEHOLDER
from model.modeling.splice import plan_splice, splice_embeddings, splice_labels

IMAGE, REGION = IMAGE_PLACEHOLDER, REGION_PLACEHOLDER


def embed(ids: torch.Tensor) -> torch.Tensor:
    """An embedding that shows its token: id in both channels."""
    return ids.clamp(min=0).float()[..., None].expand(*ids.shape, 2)


def grow(ids: torch.Tensor, mask: torch.Tensor, visual: list[torch.Tensor], regions: torch.Tensor) -> torch.Tensor:
    plan = plan_splice(ids, mask, [len(tokens) for tokens in visual])
    return splice_embeddings(plan, ids, embed(ids), visual, regions, torch.zeros(2))[..., 0]


def test_every_token_lands_in_reading_order() -> None:
    ids = torch.tensor([[1, IMAGE, 2, REGION, 3]])
    grown = grow(ids, torch.ones_like(ids), [torch.full((3, 2), 50.0)], torch.full((1, 2), 70.0))
    assert grown.tolist() == [[1, 50, 50, 50, 2, 70, 3]]


def test_images_of_different_length_and_rows_without_image() -> None:
    ids = torch.tensor([[1, IMAGE, 2, IMAGE], [4, 5, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    grown = grow(ids, mask, [torch.full((2, 2), 50.0), torch.full((1, 2), 60.0)], torch.zeros(0, 2))
    assert grown.tolist() == [[1, 50, 50, 2, 60], [4, 5, 0, 0, 0]]


def test_left_padding_stays_left() -> None:
    ids = torch.tensor([[0, 0, 7, 8], [1, IMAGE, 2, 3]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    plan = plan_splice(ids, mask, [3])
    grown = splice_embeddings(plan, ids, embed(ids), [torch.full((3, 2), 50.0)], torch.zeros(0, 2), torch.zeros(2))
    assert grown[..., 0].tolist() == [[0, 0, 0, 0, 7, 8], [1, 50, 50, 50, 2, 3]]
    assert plan.attention_mask.tolist() == [[False] * 4 + [True] * 2, [True] * 6]
    assert plan.position_ids[0].tolist() == [0, 0, 0, 0, 0, 1]


def test_labels_move_with_their_tokens() -> None:
    ids = torch.tensor([[1, IMAGE, 2, 3]])
    labels = torch.tensor([[IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX, 3]])
    plan = plan_splice(ids, torch.ones_like(ids), [3])
    assert splice_labels(plan, labels).tolist() == [[IGNORE_INDEX] * 5 + [3]]


def test_gradients_reach_every_source() -> None:
    ids = torch.tensor([[1, IMAGE, REGION]])
    text = embed(ids).clone().requires_grad_()
    image, region = torch.ones(2, 2, requires_grad=True), torch.ones(1, 2, requires_grad=True)
    plan = plan_splice(ids, torch.ones_like(ids), [2])
    splice_embeddings(plan, ids, text, [image], region, torch.zeros(2)).sum().backward()
    assert text.grad[0, 0].tolist() == [1, 1] and text.grad[0, 1].tolist() == [0, 0]
    assert image.grad.sum() == 4 and region.grad.sum() == 2


@pytest.mark.parametrize(("visual", "regions"), [([], 1), ([torch.ones(1, 2)], 0)])
def test_counts_that_do_not_match_are_refused(visual: list[torch.Tensor], regions: int) -> None:
    ids = torch.tensor([[IMAGE, REGION]])
    with pytest.raises(ValueError, match="placeholders"):
        grow(ids, torch.ones_like(ids), visual, torch.zeros(regions, 2))
