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
        image_features: [I, P, Dv], what the CLIP tower made of the images before; ``pixel_values`` say nothing then.
        sam_embedding: [C, s, s], what SAM's encoder made of the segmented image before, likewise; zeros where no mask
            asks for it.
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
    image_features: torch.Tensor | None = None
    sam_embedding: torch.Tensor | None = None

    def __len__(self) -> int:
        """Tokens, an image counting as one."""
        return len(self.input_ids)


def collate(
    samples: Sequence[EncodedSample],
    pad_token_id: int,
    padding_side: Literal["right", "left"] = "right",
    *,
    share_images: bool = False,
) -> dict[str, Any]:
    """Pad and stack samples.

    Args:
        samples: at least one; all with labels or all without.
        pad_token_id: fills ``input_ids`` where ``attention_mask`` is 0.
        padding_side: ``right`` for training, ``left`` for generation.
        share_images: of equal images only one is kept, so that it is encoded once; for ``forward`` alone.

    Returns:
        ``input_ids``, ``attention_mask`` long [B, T]; ``labels`` long [B, T] and ``mask_targets`` (list of [n, H, W])
        unless the samples are prompts; ``pixel_values`` [I, 3, S, S], ``region_masks`` [R, g, g] and ``region_image``
        [R] over all rows; ``sam_pixel_values`` [B, 3, S', S']; ``sam_sizes``, ``image_sizes`` lists of (height, width);
        ``example_masks`` [K, 1, S, S] and ``visual_kinds`` only where a sample has them. Where images are shared,
        ``image_index`` [I] and ``sam_index`` [B] say which row each placeholder shows and each batch row segments.
        Features of samples that have them come instead of pixels: ``image_features``, ``sam_embeddings``.
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
        "region_masks": torch.cat([sample.region_masks for sample in samples]),
        "region_image": _offset_region_images(samples),
        "sam_sizes": [sample.sam_size for sample in samples],
        "image_sizes": [sample.image_size for sample in samples],
    }
    batch |= _clip_inputs(samples, share_images)
    batch |= _sam_inputs(samples, share_images)
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


def _clip_inputs(samples: Sequence[EncodedSample], share: bool) -> dict[str, torch.Tensor]:
    features = [sample.image_features for sample in samples if sample.image_features is not None]
    if features:
        _check_all(features, samples)
        return {"image_features": torch.cat(features)}
    pixels = torch.cat([sample.pixel_values for sample in samples])
    kept, index = _distinct(pixels) if share else (pixels, None)
    return {"pixel_values": kept} if index is None else {"pixel_values": kept, "image_index": index}


def _sam_inputs(samples: Sequence[EncodedSample], share: bool) -> dict[str, torch.Tensor]:
    embeddings = [sample.sam_embedding for sample in samples if sample.sam_embedding is not None]
    if embeddings:
        _check_all(embeddings, samples)
        return {"sam_embeddings": torch.stack(embeddings)}
    pixels = torch.stack([sample.sam_pixel_values for sample in samples])
    kept, index = _distinct(pixels) if share else (pixels, None)
    return {"sam_pixel_values": kept} if index is None else {"sam_pixel_values": kept, "sam_index": index}


def _check_all(given: Sequence[torch.Tensor], samples: Sequence[EncodedSample]) -> None:
    if len(given) != len(samples):
        raise ValueError("a batch mixes samples with and without image features; collate them apart")


def _distinct(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Images that differ, and for each image given the place of its equal; all of them and None where none repeats.

    Images of equal pixels are equal, whatever files they came from; sums are compared first, so few pixels are.
    """
    kept: list[int] = []
    index: list[int] = []
    sums = images.flatten(1).sum(dim=1).tolist()
    for number, image in enumerate(images):
        same = (place for place, other in enumerate(kept) if sums[other] == sums[number])
        found = next((place for place in same if torch.equal(images[kept[place]], image)), len(kept))
        if found == len(kept):
            kept.append(number)
        index.append(found)
    return (images, None) if len(kept) == len(images) else (images[kept], torch.tensor(index))


def _offset_region_images(samples: Sequence[EncodedSample]) -> torch.Tensor:
    shifted, images = [], 0
    for sample in samples:
        shifted.append(sample.region_image + images)
        images += len(sample.pixel_values)
    return torch.cat(shifted)


def _kinds(sample: EncodedSample) -> tuple[str, ...]:
    return sample.visual_kinds or ("image",) * len(sample.pixel_values)
