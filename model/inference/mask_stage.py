"""Paint the masks of finished answers together: encode what was never segmented before, decode all, threshold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.inference.answer import Mask
from model.inference.images import PreparedImage
from model.inference.mask_gate import MaskGate, mask_features
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.masks import encode_rle, threshold_mask

MASKS_AT_ONCE = 32
PIXELS_AT_ONCE = 1 << 26
"""Masks decoded in one pass, and their pixels at image size; both bound memory whatever finishes together."""


@dataclass(frozen=True)
class MaskJob:
    """The masks of one answer.

    Attributes:
        image: the image they lie on.
        states: decoder states [D], one for each mask.
        labels: their names.
        threshold: probability above which a pixel is in the mask, in (0, 1).
        thresholds: further ones.
        no_mask_below: leave a mask empty whose probability of presence is lower.
        spoken: whether the answer has a ``<SEG>`` for each.
    """

    image: PreparedImage
    states: Sequence[Tensor]
    labels: Sequence[str]
    threshold: float
    thresholds: Sequence[float] = ()
    no_mask_below: float | None = None
    spoken: bool = True


@dataclass(frozen=True)
class PaintedMasks:
    """Masks of one answer, and for each further threshold their COCO run lengths."""

    masks: list[Mask]
    masks_at: dict[str, list[dict[str, Any]]]


def encode_segmented(model: MedPLIBForCausalLM, images: Sequence[PreparedImage]) -> None:
    """Give every image its SAM embedding, computing those that are missing in one pass per input shape."""
    missing = list({id(image): image for image in images if image.sam_embedding is None}.values())
    for begin in range(0, len(missing), MASKS_AT_ONCE):
        some = missing[begin : begin + MASKS_AT_ONCE]
        pixels = torch.cat([image.sam_input for image in some]).to(model.device, model.dtype)
        for image, embedding in zip(some, model.encode_segmented_images(pixels).split(1), strict=True):
            image.sam_embedding = embedding.clone()  # a view would keep its neighbours' memory


def paint_masks(model: MedPLIBForCausalLM, jobs: Sequence[MaskJob], gate: MaskGate | None = None) -> list[PaintedMasks]:
    """Masks of every job, in the order of its states."""
    encode_segmented(model, [job.image for job in jobs if job.states])
    flat = [(number, place) for number, job in enumerate(jobs) for place in range(len(job.states))]
    painted = [PaintedMasks([], {f"{one:g}": [] for one in job.thresholds}) for job in jobs]
    for some in _portions(flat, jobs):
        images = list({id(jobs[number].image): jobs[number].image for number, _ in some}.values())
        places = {id(image): place for place, image in enumerate(images)}
        decoded = model.decode_masks(
            torch.stack([jobs[number].states[place] for number, place in some]),
            torch.cat([_embedding(image) for image in images]),
            torch.tensor([places[id(jobs[number].image)] for number, _ in some], device=model.device),
            [jobs[number].image.sam_size for number, _ in some],
            [jobs[number].image.size for number, _ in some],
        )
        scores = decoded.iou_predictions.float().flatten().tolist()
        for (number, place), logits, score in zip(some, decoded.mask_logits, scores, strict=True):
            _add(painted[number], jobs[number], jobs[number].labels[place], logits, score, gate)
    return painted


def _portions(flat: Sequence[tuple[int, int]], jobs: Sequence[MaskJob]) -> Iterator[list[tuple[int, int]]]:
    """Masks that are decoded together: so many, and of so many pixels; a single one may be larger."""
    some: list[tuple[int, int]] = []
    pixels = 0
    for number, place in flat:
        height, width = jobs[number].image.size
        if some and (len(some) == MASKS_AT_ONCE or pixels + height * width > PIXELS_AT_ONCE):
            yield some
            some, pixels = [], 0
        some.append((number, place))
        pixels += height * width
    if some:
        yield some


def _add(painted: PaintedMasks, job: MaskJob, label: str, logits: Tensor, score: float, gate: MaskGate | None) -> None:
    presence = None if gate is None else float(gate.probability(mask_features(logits, score)[None])[0])
    if presence is not None and job.no_mask_below is not None and presence < job.no_mask_below:
        logits = torch.full_like(logits, -torch.inf)
    array = threshold_mask(logits, job.threshold)
    painted.masks.append(Mask.from_array(array, label, score, job.image.data.spacing_mm, presence, job.spoken))
    for threshold in job.thresholds:
        painted.masks_at[f"{threshold:g}"].append(encode_rle(threshold_mask(logits, threshold)))


def _embedding(image: PreparedImage) -> Tensor:
    assert image.sam_embedding is not None
    return image.sam_embedding
