"""Region adapter: one embedding of a region of an image (reference §1, §3).

A region is a 0/1 mask over the image's patches; its set cells are points. The published adapter averages projected
features at those points; the geometric sampler relates the points to their neighbours first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.modeling.configuration import RegionConfig


class RegionAdapter(nn.Module):
    """Turns regions into embeddings.

    Args:
        region: kind of adapter, limits, sizes of the geometric sampler.
        vision_dim: width Dv of the patch features.
        text_dim: width D of the embeddings.
        grid: patches along one side of the image.
    """

    def __init__(self, region: RegionConfig, vision_dim: int, text_dim: int, grid: int) -> None:
        super().__init__()
        self.config = region
        self.grid = grid
        if region.kind == "mean":
            self.proj = nn.Linear(vision_dim, text_dim)
        else:
            self.sampler = GeometricSampler(region, vision_dim, text_dim)

    def forward(self, patch_features: Tensor, masks: Tensor) -> Tensor:
        """Embeddings [R, D] of R regions; R may be 0.

        In training a region of too many points is thinned at random, in evaluation evenly.

        Args:
            patch_features: [R, P, Dv], features of the image that each region lies on.
            masks: [R, h, w], nonzero inside the region; any resolution. An empty region gives zeros.
        """
        features = patch_features[:, -(self.grid**2) :]  # [R, g·g, Dv], a class token in front is left out
        occupied = (masks.flatten(1) > 0).any(dim=1, keepdim=True).to(features.dtype)  # [R, 1]
        if self.config.kind == "mean":
            points = limit_points(masks, self.config.max_points, at_random=self.training)
            embedding = self.proj(region_means(features, points))
        else:
            coordinates = sample_region_points(masks, self.config.num_init_points, at_random=self.training)
            embedding = self.sampler(features, coordinates)
        return embedding * occupied


def region_means(features: Tensor, masks: Tensor) -> Tensor:
    """Mean of bilinear samples at every set cell of each region.

    The cell (row, column) of an h × w mask is sampled at (row / h, column / w) of the feature grid, corners aligned.
    Sampling and averaging are linear, so all points of a region fold into one weight per patch: no loop over points.

    Args:
        features: [R, g·g, C].
        masks: [R, h, w], nonzero inside the region.

    Returns:
        [R, C]; zeros for an empty region.
    """
    grid = _side(features)
    inside = (masks > 0).float()
    inside = inside / inside.sum(dim=(1, 2), keepdim=True).clamp(min=1)
    height, width = masks.shape[1:]
    rows = _hat(torch.arange(height, device=masks.device) / height, grid)  # [h, g]
    columns = _hat(torch.arange(width, device=masks.device) / width, grid)  # [w, g]
    weights = rows.t() @ inside @ columns  # [R, g, g]
    return (weights.flatten(1)[:, None].to(features.dtype) @ features)[:, 0]


def limit_points(masks: Tensor, maximum: int, *, at_random: bool) -> Tensor:
    """Thin regions [R, h, w] to at most ``maximum`` set cells, as bool: a random subset, or an evenly strided one."""
    inside = masks.flatten(1) > 0  # [R, h·w]
    if at_random:
        rank = torch.rand(inside.shape, device=masks.device).masked_fill(~inside, -1).argsort(dim=1, descending=True)
        kept = inside & (rank.argsort(dim=1) < maximum)
    else:
        place = inside.cumsum(dim=1) - 1
        count = inside.sum(dim=1, keepdim=True).clamp(min=maximum)
        kept = inside & ((place + 1) * maximum // count > place * maximum // count)
    return kept.view_as(masks)


def sample_region_points(masks: Tensor, number: int, *, at_random: bool) -> Tensor:
    """Draw exactly ``number`` points from each region, repeating points of regions that have fewer.

    Args:
        masks: [R, h, w], nonzero inside the region.
        number: N, points per region.
        at_random: a random draw, or an evenly strided one.

    Returns:
        float32 [R, N, 2], (row / h, column / w) in [0, 1). Points of an empty region mean nothing.
    """
    inside = masks.flatten(1) > 0  # [R, h·w]
    score = (
        torch.rand(inside.shape, device=masks.device) if at_random else torch.zeros_like(inside, dtype=torch.float32)
    )
    order = score.masked_fill(~inside, -1).argsort(dim=1, descending=True, stable=True)  # set cells first
    count = inside.sum(dim=1, keepdim=True).clamp(min=1)
    slots = torch.arange(number, device=masks.device)[None]
    cells = order.gather(1, slots % count if at_random else slots * count // number)  # [R, N]
    height, width = masks.shape[1:]
    return torch.stack([cells // width / height, cells % width / width], dim=-1)


def sample_features(features: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples [R, N, C] of feature grids [R, g·g, C] at points [R, N, 2] in [0, 1], corners aligned."""
    grid = _side(features)
    rows, columns = _hat(points[..., 0], grid), _hat(points[..., 1], grid)  # [R, N, g]
    weights = (rows[..., :, None] * columns[..., None, :]).flatten(2)  # [R, N, g·g]
    return weights.to(features.dtype) @ features


class GeometricSampler(nn.Module):
    """Summarises a region by the shape of its points: stages of farthest points, each pooling its nearest neighbours.

    Args:
        region: numbers of points and neighbours per stage, and the pooling over neighbours.
        input_dim: width C of the patch features.
        output_dim: width D of the embedding.
    """

    def __init__(self, region: RegionConfig, input_dim: int, output_dim: int) -> None:
        super().__init__()
        self.config = region
        placed = input_dim + 2  # a feature and its point
        stages = region.num_sub_points
        self.diff_projector_list = nn.ModuleList(nn.Linear(placed, placed) for _ in stages)
        self.agg_projector_list = nn.ModuleList(PointwiseBlock(2 * placed, input_dim) for _ in stages)
        self.flatten_projector = nn.Linear(input_dim * stages[-1], input_dim)
        self.dim_projector = nn.Linear(input_dim, output_dim)

    def forward(
        self, features: Tensor, points: Tensor, centre_indices: Sequence[Tensor | None] | None = None
    ) -> Tensor:
        """Embeddings [R, D].

        Args:
            features: [R, g·g, C].
            points: [R, N, 2], from ``sample_region_points``.
            centre_indices: per stage, long [R, n] that replaces the farthest points found. For replaying a pass.
        """
        values = sample_features(features, points)  # [R, N, C]
        for stage, number in enumerate(self.config.num_sub_points):
            centres = centre_indices[stage] if centre_indices is not None else None
            if centres is None:
                centres = farthest_points(points, number)  # [R, n]
            points, values = self._pool_neighbours(stage, points, values, centres)
        return self.dim_projector(self.flatten_projector(values.flatten(1)))

    def _pool_neighbours(self, stage: int, points: Tensor, values: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
        """Points [R, n, 2] and features [R, n, C] of the centres, from those of all N points."""
        placed = torch.cat([values, points.to(values.dtype)], dim=-1)  # [R, N, C + 2]
        anchors = _take(placed, centres)[:, :, None]  # [R, n, 1, C + 2]
        chosen = _take(points, centres)  # [R, n, 2]
        neighbours = nearest_points(points, chosen, self.config.num_neighbors[stage])  # [R, n, k]
        offsets = self.diff_projector_list[stage](_take(placed, neighbours) - anchors)  # [R, n, k, C + 2]
        pairs = torch.cat([offsets, anchors.expand_as(offsets)], dim=-1)
        related = self.agg_projector_list[stage](pairs)  # [R, n, k, C]
        pooled = related.amax(dim=2) if self.config.pooler == "max" else related.mean(dim=2)
        return chosen, pooled


class PointwiseBlock(nn.Module):
    """A kernel-1 convolution, ReLU and LayerNorm; kept as a convolution because checkpoints hold one."""

    def __init__(self, input_dim: int, output_dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(input_dim, output_dim, kernel_size=1), nn.ReLU())
        self.norm = nn.LayerNorm(output_dim)

    def forward(self, values: Tensor) -> Tensor:
        """Map [..., k, C] to [..., k, C']."""
        mapped = self.net(values.flatten(0, -3).transpose(1, 2)).transpose(1, 2)  # [·, k, C']
        return self.norm(mapped).view(*values.shape[:-1], mapped.shape[-1])


def farthest_points(points: Tensor, number: int) -> Tensor:
    """Indices, long [R, n], of points [R, N, 2] that lie far apart: each next one is farthest from those before.

    The first is the point farthest from the centre of mass, so the choice depends on the region alone.
    """
    distance = (points - points.mean(dim=1, keepdim=True)).square().sum(dim=-1)  # [R, N]
    chosen = [distance.argmax(dim=1)]
    distance = torch.full_like(distance, torch.inf)
    for _ in range(number - 1):
        latest = _take(points, chosen[-1][:, None])  # [R, 1, 2]
        distance = torch.minimum(distance, (points - latest).square().sum(dim=-1))
        chosen.append(distance.argmax(dim=1))
    return torch.stack(chosen, dim=1)


def nearest_points(points: Tensor, centres: Tensor, number: int) -> Tensor:
    """Indices, long [R, n, k], of the k points [R, N, 2] nearest to each centre [R, n, 2]."""
    return torch.cdist(centres, points).topk(number, dim=-1, largest=False).indices


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Rows of [R, N, C] by an index [R, ...] within each R, as [R, ..., C]."""
    flat = index.flatten(1)[..., None].expand(-1, -1, values.shape[-1])
    return values.gather(1, flat).view(*index.shape, values.shape[-1])


def _hat(position: Tensor, grid: int) -> Tensor:
    """Bilinear weights [..., g] of grid lines for positions [...] in [0, 1] between the first and the last."""
    lines = torch.arange(grid, device=position.device, dtype=torch.float32)
    return (1 - (position.float()[..., None] * (grid - 1) - lines).abs()).clamp(min=0)


def _side(features: Tensor) -> int:
    return round(features.shape[1] ** 0.5)
