"""Splice text, image and region embeddings into one sequence.

``input_ids`` hold a placeholder for each image (it grows to that image's visual tokens) and each region (one
embedding). A ``SplicePlan`` says, for every token of every row, where it starts in the grown sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from model.modeling.configuration import IGNORE_INDEX, IMAGE_PLACEHOLDER, REGION_PLACEHOLDER

POSITION_KINDS = ("text", "image", "region", "seg")
"""What stands at a place of a grown sequence; ``seg`` is a place whose state a mask is made from, before ``<SEG>``."""


@dataclass(frozen=True)
class SplicePlan:
    """Places of the tokens of a batch in its grown sequences.

    Attributes:
        starts: long [B, T], first position of each token in the grown sequence (undefined for padding).
        valid: bool [B, T], False at padding.
        attention_mask: bool [B, L], True where the grown sequence holds something.
        length: L, the longest grown row.
    """

    starts: torch.Tensor
    valid: torch.Tensor
    attention_mask: torch.Tensor
    length: int

    @property
    def position_ids(self) -> torch.Tensor:
        """Long [B, L]: rotary positions, counted from each row's first real token (on through padding at its end)."""
        first = self.attention_mask.long().argmax(dim=1, keepdim=True)  # [B, 1]
        return (torch.arange(self.length, device=first.device) - first).clamp(min=0)


def plan_splice(input_ids: torch.Tensor, attention_mask: torch.Tensor, visual_lengths: list[int]) -> SplicePlan:
    """Lay out the grown sequences of a batch.

    Args:
        input_ids: long [B, T] with placeholders.
        attention_mask: [B, T], nonzero where a token is real; padding may stand on either side and stays there.
        visual_lengths: visual tokens of each image placeholder, in reading order over the whole batch.

    Raises:
        ValueError: the number of image placeholders differs from ``len(visual_lengths)``.
    """
    valid = attention_mask.bool()
    is_image = (input_ids == IMAGE_PLACEHOLDER) & valid
    if int(is_image.sum()) != len(visual_lengths):
        raise ValueError(f"the batch has {int(is_image.sum())} image placeholders for {len(visual_lengths)} images")
    lengths = valid.long()  # [B, T] places a token takes
    lengths[is_image] = torch.tensor(visual_lengths, dtype=torch.long, device=input_ids.device)

    ends = lengths.cumsum(dim=1)
    totals = ends[:, -1]
    length = int(totals.max())
    left_padded = bool((~valid[:, 0]).any())
    offsets = (length - totals) if left_padded else torch.zeros_like(totals)

    places = torch.arange(length, device=input_ids.device)
    grown_mask = (places >= offsets[:, None]) & (places < (offsets + totals)[:, None])
    return SplicePlan(ends - lengths + offsets[:, None], valid, grown_mask, length)


def splice_embeddings(
    plan: SplicePlan,
    input_ids: torch.Tensor,
    text: torch.Tensor,
    visual: list[torch.Tensor],
    regions: torch.Tensor,
    padding: torch.Tensor,
) -> torch.Tensor:
    """Put every embedding in its place.

    Args:
        plan: from ``plan_splice``.
        input_ids: long [B, T] with placeholders.
        text: [B, T, D] word embeddings (whatever stands at placeholders is not used).
        visual: per image placeholder, [P, D].
        regions: [R, D], one per region placeholder.
        padding: [D], the embedding at padding.

    Returns:
        [B, L, D].

    Raises:
        ValueError: the number of region placeholders differs from ``len(regions)``.
    """
    is_image = (input_ids == IMAGE_PLACEHOLDER) & plan.valid
    is_region = (input_ids == REGION_PLACEHOLDER) & plan.valid
    if int(is_region.sum()) != len(regions):
        raise ValueError(f"the batch has {int(is_region.sum())} region placeholders for {len(regions)} regions")
    is_text = plan.valid & ~is_image & ~is_region

    batch, _, width = text.shape
    flat = padding.to(text.dtype).expand(batch * plan.length, width)  # [B·L, D]
    flat_starts = plan.starts + torch.arange(batch, device=text.device)[:, None] * plan.length
    flat = flat.index_copy(0, flat_starts[is_text], text[is_text])
    flat = flat.index_copy(0, flat_starts[is_region], regions.to(text.dtype))
    if visual:
        spans = [
            start + torch.arange(len(tokens), device=text.device)
            for start, tokens in zip(flat_starts[is_image].tolist(), visual, strict=True)
        ]
        flat = flat.index_copy(0, torch.cat(spans), torch.cat(visual).to(text.dtype))
    return flat.view(batch, plan.length, width)


def splice_labels(plan: SplicePlan, labels: torch.Tensor) -> torch.Tensor:
    """Labels of the grown sequence, long [B, L]: images and padding carry no supervision."""
    grown = torch.full((labels.shape[0], plan.length), IGNORE_INDEX, dtype=torch.long, device=labels.device)
    rows, tokens = (plan.valid & (labels != IGNORE_INDEX)).nonzero(as_tuple=True)
    grown[rows, plan.starts[rows, tokens]] = labels[rows, tokens]
    return grown


def position_kinds(plan: SplicePlan, input_ids: torch.Tensor, labels: torch.Tensor, seg_token_id: int) -> torch.Tensor:
    """Number in ``POSITION_KINDS`` of each place of the grown sequence, long [B, L]; −1 at padding.

    Args:
        plan: where the tokens stand.
        input_ids: long [B, T] with placeholders.
        labels: long [B, T]; only a supervised ``<SEG>`` gets a mask.
        seg_token_id: of ``<SEG>``.
    """
    text, image, region, seg = range(len(POSITION_KINDS))
    kinds = torch.full_like(plan.attention_mask, -1, dtype=torch.long)
    kinds[plan.attention_mask] = image  # what is neither text nor region is what a placeholder grew to
    is_region = input_ids == REGION_PLACEHOLDER
    for kind, found in ((text, ~is_region & (input_ids != IMAGE_PLACEHOLDER)), (region, is_region)):
        rows, tokens = (plan.valid & found).nonzero(as_tuple=True)
        kinds[rows, plan.starts[rows, tokens]] = kind
    rows, tokens = (plan.valid & (labels == seg_token_id)).nonzero(as_tuple=True)
    kinds[rows, plan.starts[rows, tokens] - 1] = seg
    return kinds


def image_token_rows(
    plan: SplicePlan, input_ids: torch.Tensor, tokens: int, visual_kinds: list[str] | None = None
) -> torch.Tensor:
    """The row of each token that the projector makes of images, long [tokens].

    Args:
        plan: where the tokens stand.
        input_ids: long [B, T] with placeholders.
        tokens: of all images together, each of which gives as many as the others.
        visual_kinds: per image placeholder ``image`` or ``mask``, which no projector sees; all images when absent.
    """
    rows = ((input_ids == IMAGE_PLACEHOLDER) & plan.valid).nonzero(as_tuple=True)[0]
    if visual_kinds is not None:
        rows = rows[torch.tensor([kind == "image" for kind in visual_kinds], dtype=torch.bool, device=rows.device)]
    return rows.repeat_interleave(tokens // max(len(rows), 1))
