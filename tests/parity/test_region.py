"""Region features against the published mean adapter and geometric sampler."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from model.modeling.configuration import RegionConfig
from model.modeling.region import GeometricSampler, region_means

Arrays = dict[str, torch.Tensor]
ROWS = 3
DRAWS = ("full576_gt512_random", "invalid_placeholder336_random")


@pytest.fixture(scope="module")
def arrays(golden: Path) -> Arrays:
    with np.load(golden / "6_region" / "region.npz") as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored.files}


def set_cells(points: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A mask like ``mask`` whose set cells are the recorded points (row / h, column / w)."""
    rows, columns = (points * torch.tensor(mask.shape)).round().long().unbind(dim=1)
    drawn = torch.zeros_like(mask)
    drawn[rows, columns] = 1
    return drawn


@pytest.mark.parametrize("case", ["blobs", "two_masks_in_row", "empty_mask", *DRAWS])
def test_mean_of_samples_is_reproduced(arrays: Arrays, case: str) -> None:
    regions = 0
    for row in range(ROWS):
        masks = arrays[f"{case}/mask_{row}"]
        if case in DRAWS:  # more than 512 points: replay the ones that were drawn
            masks = torch.stack([set_cells(arrays[f"{case}/points_{regions + i}"], m) for i, m in enumerate(masks)])
        regions += len(masks)
        features = arrays["feature_map"][row].expand(len(masks), -1, -1)
        assert_close(region_means(features, masks), arrays[f"{case}/extract_{row}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pooler", ["max", "mean"])
@pytest.mark.parametrize("case", ["blobs", "two_masks_in_row"])
def test_geometric_sampler_is_reproduced(arrays: Arrays, pooler: str, case: str) -> None:
    config = RegionConfig(
        kind="geometric", num_init_points=64, num_sub_points=(32, 8), num_neighbors=(6, 6), pooler=pooler
    )
    sampler = GeometricSampler(config, input_dim=16, output_dim=12)
    prefix = f"geo_{pooler}/param/"
    sampler.load_state_dict({k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)})

    recorded = f"geo_{pooler}/{case}"
    wanted = [arrays[f"{recorded}/out_{row}"] for row in range(ROWS)]
    features = torch.cat([arrays["feature_map"][row].expand(len(want), -1, -1) for row, want in enumerate(wanted)])
    points = torch.stack([arrays[f"{recorded}/init_points_{region}"] for region in range(len(features))])
    centres = [arrays[f"{recorded}/fps_idx_stage{stage}"] for stage in range(2)]
    assert_close(sampler(features, points, centres), torch.cat(wanted), rtol=1e-4, atol=1e-5)
