"""From a request to what the decoder reads: token ids, region grids, and which part other questions share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.errors import MedPLIBError
from model.inference.images import PreparedImage
from model.inference.regions import place_region, region_to_mask
from model.inference.requests import Request
from model.modeling.configuration import IMAGE_PLACEHOLDER
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.conversation import Turn
from model.processing.processor import MedPLIBProcessor
from model.processing.special_tokens import IMAGE_TOKEN, REGION_MARKER


@dataclass(frozen=True, eq=False)
class Prompt:
    """A request's prompt, not yet embedded.

    Attributes:
        image: the image it asks about.
        input_ids: long [1, T] with placeholders.
        region_masks: float [R, g, g]; ``region_image`` long [R], all zero.
        length: tokens L once the image has taken its places.
        prefix_length: leading tokens, the image's included, that any question with the same opening shares.
        prefix_key: names that opening.
    """

    image: PreparedImage
    input_ids: Tensor
    region_masks: Tensor
    region_image: Tensor
    length: int
    prefix_length: int
    prefix_key: object


def build_prompt(
    model: MedPLIBForCausalLM, processor: MedPLIBProcessor, image: PreparedImage, request: Request
) -> Prompt:
    """Word and tokenise a request.

    Raises:
        MedPLIBError: a region is malformed, or the checkpoint cannot look at regions.
    """
    regions = [region_to_mask(region, image.size) for region in request.regions]
    if regions and not model.config.region.enabled:
        raise MedPLIBError("this checkpoint has no region adapter; ask it about the whole image")
    told = sum(earlier.count(REGION_MARKER) for earlier, _ in request.history)  # their regions come first
    asked = place_region(request.question, len(regions) - told) if len(regions) > told else request.question
    turns = []
    for earlier, answer in request.history:
        turns += [Turn("human", earlier), Turn("gpt", answer)]
    turns.append(Turn("human", asked))
    turns[0] = Turn("human", f"{IMAGE_TOKEN}\n{turns[0].text}")
    encoded = processor.encode_prompt(turns, [image.data.pixels], regions=regions, pixels=False)
    ids = encoded.input_ids
    opening = int((ids == IMAGE_PLACEHOLDER).nonzero()[0])
    patches = visual_tokens(model)
    return Prompt(
        image,
        ids[None],
        encoded.region_masks,
        encoded.region_image,
        length=len(ids) - 1 + patches,
        prefix_length=opening + patches,
        prefix_key=(image.key, tuple(ids[:opening].tolist())),
    )


def visual_tokens(model: MedPLIBForCausalLM) -> int:
    """Tokens that one image takes in a prompt."""
    return model.config.visual_tokens


def embed_prompt(model: MedPLIBForCausalLM, prompt: Prompt, opened: bool = False) -> Tensor:
    """Embeddings [1, L, D] of a prompt, or of what follows its opening; encodes its image if nobody has."""
    image = prompt.image
    if image.image_features is None:
        image.image_features = model.encode_images(image.clip_input.to(model.device, model.dtype))
    ids, tokens = prompt.input_ids, None
    if opened:
        ids = ids[:, ids.shape[1] - (prompt.length - prompt.prefix_length) :]
        tokens = image.image_features.new_zeros(0, 1, model.config.text_config.hidden_size)
    return model.splice(
        ids.to(model.device),
        None,
        image.image_features,
        prompt.region_masks.to(model.device, model.dtype),
        prompt.region_image.to(model.device),
        image_tokens=tokens,
    ).embeds


def to_device(values: list[int], device: torch.device) -> Tensor:
    """A list of whole numbers as long [n] on a device, without waiting for it."""
    tensor = torch.tensor(values, dtype=torch.long)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
