"""Encoded samples → one batch of exactly the arguments of ``MedPLIBForCausalLM.forward``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from model.modeling.configuration import IGNORE_INDEX
from model.processing.images import Size


@dataclass(frozen=True)
class EncodedSample:
    """One sample as tensors, without padding.

    Attributes:
        input_ids: long [T] with image and region placeholders.
        labels: long [T], ``IGNORE_INDEX`` where unsupervised; None for a prompt.
        pixel_values: float32 [I, 3, S, S], CLIP inputs of the images in placeholder order.
        region_masks: float32 [R, g, g] in {0, 1}, in placeholder order.
        region_image: long [R], index into ``pixel_values`` of each region's image.
        sam_pixel_values: float32 [3, S', S'], SAM input of the segmented image; zeros for a text alone.
        sam_size: (height, width) of the image in that input, before padding.
        image_size: (height, width) of the segmented image's file.
        mask_targets: float32 [n, H, W] in {0, 1}, one per ``<SEG>`` of the answers; None for a prompt.
        example_masks: float32 [K, 1, S, S], masks that enter as visual tokens (in-context); None without.
        visual_kinds: per image placeholder ``image`` or ``mask``; None where all are images.
        truncated: the end of the last answer was cut off to fit ``max_length``.
        approximated_regions: regions too small for the patch grid, marked by the patches that hold them.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor | None
    pixel_values: torch.Tensor
    region_masks: torch.Tensor
    region_image: torch.Tensor
    sam_pixel_values: torch.Tensor
    sam_size: Size
    image_size: Size
    mask_targets: torch.Tensor | None = None
    example_masks: torch.Tensor | None = None
    visual_kinds: tuple[str, ...] | None = None
    truncated: bool = False
    approximated_regions: tuple[int, ...] = ()

    def __len__(self) -> int:
        """Tokens, an image counting as one."""
        return len(self.input_ids)


def collate(
    samples: Sequence[EncodedSample], pad_token_id: int, padding_side: Literal["right", "left"] = "right"
) -> dict[str, Any]:
    """Pad and stack samples.

    Args:
        samples: at least one; all with labels or all without.
        pad_token_id: fills ``input_ids`` where ``attention_mask`` is 0.
        padding_side: ``right`` for training, ``left`` for generation.

    Returns:
        ``input_ids``, ``attention_mask`` long [B, T]; ``labels`` long [B, T] and ``mask_targets`` (list of [n, H, W])
        unless the samples are prompts; ``pixel_values`` [I, 3, S, S], ``region_masks`` [R, g, g] and ``region_image``
        [R] over all rows; ``sam_pixel_values`` [B, 3, S', S']; ``sam_sizes``, ``image_sizes`` lists of (height, width);
        ``example_masks`` [K, 1, S, S] and ``visual_kinds`` only where a sample has them.
    """
    if not samples:
        raise ValueError("a batch needs at least one sample")
    if padding_side not in ("right", "left"):
        raise ValueError(f"padding_side is {padding_side!r}; expected right or left")
    labelled = [sample.labels is not None for sample in samples]
    if any(labelled) != all(labelled):
        raise ValueError("a batch mixes training samples and prompts; collate them apart")

    batch: dict[str, Any] = {
        "input_ids": _pad([sample.input_ids for sample in samples], pad_token_id, padding_side),
        "attention_mask": _pad([torch.ones_like(sample.input_ids) for sample in samples], 0, padding_side),
        "pixel_values": torch.cat([sample.pixel_values for sample in samples]),
        "region_masks": torch.cat([sample.region_masks for sample in samples]),
        "region_image": _offset_region_images(samples),
        "sam_pixel_values": torch.stack([sample.sam_pixel_values for sample in samples]),
        "sam_sizes": [sample.sam_size for sample in samples],
        "image_sizes": [sample.image_size for sample in samples],
    }
    if all(labelled):
        batch["labels"] = _pad([s.labels for s in samples if s.labels is not None], IGNORE_INDEX, padding_side)
        batch["mask_targets"] = [
            sample.mask_targets if sample.mask_targets is not None else torch.zeros(0, *sample.image_size)
            for sample in samples
        ]
    example_masks = [sample.example_masks for sample in samples if sample.example_masks is not None]
    if example_masks:
        batch["example_masks"] = torch.cat(example_masks)
        batch["visual_kinds"] = [kind for sample in samples for kind in _kinds(sample)]
    return batch


def _pad(rows: list[torch.Tensor], value: int, side: str) -> torch.Tensor:
    length = max(len(row) for row in rows)
    padded = torch.full((len(rows), length), value, dtype=torch.long)
    for target, row in zip(padded, rows, strict=True):
        start = length - len(row) if side == "left" else 0
        target[start : start + len(row)] = row
    return padded


def _offset_region_images(samples: Sequence[EncodedSample]) -> torch.Tensor:
    shifted, images = [], 0
    for sample in samples:
        shifted.append(sample.region_image + images)
        images += len(sample.pixel_values)
    return torch.cat(shifted)


def _kinds(sample: EncodedSample) -> tuple[str, ...]:
    return sample.visual_kinds or ("image",) * len(sample.pixel_values)
