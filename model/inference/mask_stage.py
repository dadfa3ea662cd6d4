"""Decode the masks of finished answers in batches: encode new images, decode, apply the threshold."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from model.inference.answer import Mask
from model.inference.images import PreparedImage
from model.inference.presence import PresenceClassifier, mask_features
from model.inference.requests import Request
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.masks import encode_rle, threshold_mask

MASKS_AT_ONCE = 32
PIXELS_AT_ONCE = 1 << 26
"""Masks decoded in one pass, and their pixels at image size; both bound memory whatever finishes together."""


@dataclass
class MaskJob:
    """The masks of one answer.

    Attributes:
        request: what was asked.
        image: the image they lie on.
        states: decoder states [D], one for each mask.
        labels: their names.
        spoken: whether the answer has a ``<SEG>`` for each.
        masks: decoded so far; ``masks_at`` for each further threshold their COCO run lengths.
    """

    request: Request
    image: PreparedImage
    states: Sequence[Tensor]
    labels: Sequence[str]
    spoken: bool = True
    masks: list[Mask] = field(default_factory=list)
    masks_at: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def encode_segmented(model: MedPLIBForCausalLM, images: Sequence[PreparedImage]) -> None:
    """Give every image its SAM embedding, computing those that are missing in one pass per input shape."""
    missing = list({id(image): image for image in images if image.sam_embedding is None}.values())
    for begin in range(0, len(missing), MASKS_AT_ONCE):
        some = missing[begin : begin + MASKS_AT_ONCE]
        pixels = torch.cat([image.sam_input for image in some]).to(model.device, model.dtype)
        for image, embedding in zip(some, model.encode_segmented_images(pixels).split(1), strict=True):
            image.sam_embedding = embedding.clone()  # a view would keep its neighbours' memory


def paint_masks(
    model: MedPLIBForCausalLM, jobs: Sequence[MaskJob], classifier: PresenceClassifier | None = None
) -> None:
    """Decode the masks of every job, in the order of its states; one whose numbers are not finite has the score NaN."""
    encode_segmented(model, [job.image for job in jobs if job.states])
    flat = [(job, place) for job in jobs for place in range(len(job.states))]
    for job in jobs:
        job.masks_at = {f"{one:g}": [] for one in job.request.thresholds}
    for some in _portions(flat):
        images = list({id(job.image): job.image for job, _ in some}.values())
        places = {id(image): place for place, image in enumerate(images)}
        decoded = model.decode_masks(
            torch.stack([job.states[place] for job, place in some]),
            torch.cat([image.sam_embedding for image in images]),  # type: ignore[misc]  # encoded above
            torch.tensor([places[id(job.image)] for job, _ in some], device=model.device),
            [job.image.sam_size for job, _ in some],
            [job.image.size for job, _ in some],
        )
        scores = decoded.iou_predictions.float().flatten().tolist()
        for (job, place), logits, score in zip(some, decoded.mask_logits, scores, strict=True):
            request = job.request
            if not logits.isfinite().all():
                score = math.nan  # the request fails
            presence = None
            if classifier is not None and math.isfinite(score):
                presence = float(classifier.probability(mask_features(logits, score)[None])[0])
                least = classifier.threshold if request.no_mask_below is None else request.no_mask_below
                logits = logits if presence >= least else torch.full_like(logits, -torch.inf)
            threshold = model.config.mask.threshold if request.threshold is None else request.threshold
            array, spacing = threshold_mask(logits, threshold), job.image.data.spacing_mm
            job.masks.append(Mask.from_array(array, job.labels[place], score, spacing, presence, job.spoken))
            for further in request.thresholds:
                job.masks_at[f"{further:g}"].append(encode_rle(threshold_mask(logits, further)))


def _portions(flat: Sequence[tuple[MaskJob, int]]) -> Iterator[list[tuple[MaskJob, int]]]:
    """Masks that are decoded together: so many, and of so many pixels; a single one may be larger."""
    some: list[tuple[MaskJob, int]] = []
    pixels = 0
    for job, place in flat:
        height, width = job.image.size
        if some and (len(some) == MASKS_AT_ONCE or pixels + height * width > PIXELS_AT_ONCE):
            yield some
            some, pixels = [], 0
        some.append((job, place))
        pixels += height * width
    if some:
        yield some
