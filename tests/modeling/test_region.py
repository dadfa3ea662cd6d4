"""Regions: the point set decides the feature, in evaluation always the same way."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from model.modeling.configuration import RegionConfig
from model.modeling.region import (
    RegionAdapter,
    farthest_points,
    limit_points,
    nearest_points,
    region_means,
    sample_features,
    sample_region_points,
)

GRID, VISION, TEXT = 6, 5, 7
GEOMETRIC = RegionConfig(kind="geometric", num_init_points=16, num_sub_points=(8, 4), num_neighbors=(3, 3))
KINDS = [RegionConfig(max_points=10), GEOMETRIC]


def adapter(config: RegionConfig) -> RegionAdapter:
    torch.manual_seed(0)
    return RegionAdapter(config, VISION, TEXT, GRID)


def features(regions: int) -> torch.Tensor:
    return torch.randn(regions, GRID * GRID, VISION, generator=torch.Generator().manual_seed(1))


def masks(*boxes: tuple[int, int, int, int]) -> torch.Tensor:
    drawn = torch.zeros(len(boxes), GRID, GRID)
    for mask, (top, left, bottom, right) in zip(drawn, boxes, strict=True):
        mask[top:bottom, left:right] = 1
    return drawn


def test_mean_equals_grid_sample_point_by_point() -> None:
    mask = masks((1, 2, 5, 4))
    points = mask[0].nonzero() / GRID  # (row, column)
    grid = points.flip(dims=(1,))[None, None] * 2 - 1
    image = features(1).transpose(1, 2).view(1, VISION, GRID, GRID)
    want = torch.nn.functional.grid_sample(image, grid, align_corners=True).mean(dim=(2, 3))
    assert_close(region_means(features(1), mask), want)


def test_points_of_a_sampled_feature_agree_with_the_mean() -> None:
    mask = masks((0, 0, 3, 4))
    points = (mask[0].nonzero() / GRID)[None]
    assert_close(sample_features(features(1), points).mean(dim=1), region_means(features(1), mask))


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.kind)
def test_several_regions_are_independent_of_one_another(config: RegionConfig) -> None:
    model = adapter(config).eval()
    regions = masks((0, 0, 2, 2), (1, 1, 6, 6), (5, 5, 6, 6))
    together = model(features(3), regions)
    assert together.shape == (3, TEXT)
    for index in range(3):
        alone = model(features(3)[index : index + 1], regions[index : index + 1])
        assert_close(alone[0], together[index])


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.kind)
def test_evaluation_repeats_itself_and_training_draws(config: RegionConfig) -> None:
    model, region = adapter(config), masks((0, 0, 6, 6))
    assert torch.equal(model.eval()(features(1), region), model(features(1), region))
    model.train()
    assert not torch.equal(model(features(1), region), model(features(1), region))


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.kind)
def test_an_empty_region_is_zero_and_no_region_is_fine(config: RegionConfig) -> None:
    model = adapter(config)
    assert not model(features(1), torch.zeros(1, GRID, GRID)).any()
    nothing = model(features(0), torch.zeros(0, GRID, GRID))
    assert nothing.shape == (0, TEXT)
    nothing.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.kind)
def test_a_single_point_is_enough(config: RegionConfig) -> None:
    assert adapter(config).eval()(features(1), masks((2, 2, 3, 3))).isfinite().all()


def test_a_class_token_in_front_is_ignored() -> None:
    model, region = adapter(KINDS[0]).eval(), masks((1, 1, 3, 3))
    with_class = torch.cat([torch.full((1, 1, VISION), 99.0), features(1)], dim=1)
    assert_close(model(with_class, region), model(features(1), region))


@pytest.mark.parametrize("at_random", [True, False])
def test_thinning_keeps_exactly_the_maximum_inside_the_region(at_random: bool) -> None:
    regions = masks((0, 0, 6, 6), (0, 0, 5, 5), (2, 2, 4, 4))
    kept = limit_points(regions, 10, at_random=at_random)
    assert kept.flatten(1).sum(dim=1).tolist() == [10, 10, 4]
    assert not (kept & (regions == 0)).any()


def test_even_thinning_spreads_over_the_region() -> None:
    kept = limit_points(masks((0, 0, 6, 6)), 6, at_random=False)[0]
    assert kept.any(dim=1).all()  # one of each row


@pytest.mark.parametrize("at_random", [True, False])
def test_sampled_points_lie_in_the_region_and_cover_small_ones(at_random: bool) -> None:
    regions = masks((1, 1, 3, 3), (0, 0, 6, 6))
    points = sample_region_points(regions, 8, at_random=at_random)
    assert points.shape == (2, 8, 2)
    cells = (points * GRID).round().long()
    assert all(regions[i, row, column] == 1 for i in range(2) for row, column in cells[i].tolist())
    assert len(cells[0].unique(dim=0)) == 4  # all four cells, twice each
    assert len(cells[1].unique(dim=0)) == 8


def test_farthest_and_nearest_points() -> None:
    line = torch.tensor([[[0.0, 0.0], [0.1, 0.0], [0.5, 0.0], [1.0, 0.0]]])
    assert sorted(farthest_points(line, 3)[0].tolist()) == [0, 2, 3]
    assert sorted(nearest_points(line, line[:, :1], 2)[0, 0].tolist()) == [0, 1]
