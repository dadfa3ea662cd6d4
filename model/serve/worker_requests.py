"""Conversion of a worker's requests and replies: HTTP messages to engine requests, answers to chunks.

Everything here may take long (pictures are decoded, masks are encoded) and is run outside the event loop. Nothing here
computes with torch: the engine's thread alone does.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from fastapi.exceptions import RequestValidationError
from PIL import Image
from pydantic import ValidationError

from model.errors import MedPLIBError
from model.inference.answer import Answer, Mask
from model.inference.generation import GenerationSettings
from model.inference.requests import Request
from model.processing.conversation import parse_prompt
from model.processing.special_tokens import EOS_TOKEN, IMAGE_TOKEN
from model.serve.errors import validation_sentence
from model.serve.limits import ServeLimits, decode_base64, open_image, open_region
from model.serve.protocol import Chunk, GenerateRequest

MAX_LISTED_PIXELS = 2_000_000
"""Of all masks of an answer, where they are asked for as a list: some 25 MB of text."""
_MAX_TOP_K = 2**31 - 1  # what a tensor's index holds anywhere
_MAX_STOPS, _MAX_STOP_CHARS = 16, 200


@dataclass(frozen=True, eq=False)
class Asked:
    """A request that was read.

    Attributes:
        request: for the engine.
        message: as it came, without what was decoded of it.
        num_bytes: that its picture and regions hold.
    """

    request: Request
    message: GenerateRequest
    num_bytes: int


def read_request(body: bytes, model_names: Sequence[str], limits: ServeLimits) -> Asked:
    """What a request's body asks for; its picture is decoded.

    Args:
        body: JSON of a ``GenerateRequest``.
        model_names: what is answered for.
        limits: of the request, checked before anything is decoded.

    Raises:
        MedPLIBError: something in it is malformed, too large or not there.
    """
    try:
        message = GenerateRequest.model_validate_json(body)
    except ValidationError as error:  # its content is not repeated
        raise MedPLIBError(validation_sentence(RequestValidationError(error.errors(include_input=False)))) from None
    if message.model and message.model not in model_names:
        raise MedPLIBError(f"there is no model {message.model!a:.60} here; there is {', '.join(model_names)}")
    texts = _read_texts(message, limits)
    settings = _read_settings(message, limits)
    content = _only_image(message, limits)
    image = open_image(content, limits) if content is not None else None
    regions = [open_region(region, image.size, limits) for region in message.region_masks] if image is not None else []
    request = Request(
        image,
        texts[-1],
        regions,
        list(zip(texts[:-1:2], texts[1::2], strict=True)),
        settings,
        message.threshold,
        no_mask_below=message.no_mask_below,
        every_target=message.every_target,
    )
    num_bytes = sum(array.nbytes for array in (*regions, *([] if image is None else [image.pixels])))
    return Asked(request, message.model_copy(update={"images": [], "region_masks": []}), num_bytes)


def _read_texts(message: GenerateRequest, limits: ServeLimits) -> list[str]:
    """What both sides said by turns, without its image, which the engine puts to the front."""
    if len(message.prompt) > limits.max_prompt_chars:
        raise MedPLIBError(
            f"the prompt has {len(message.prompt):,} characters, and {limits.max_prompt_chars:,} are read; "
            "leave earlier questions out, or ask something shorter"
        )
    turns = parse_prompt(message.prompt)
    asked = len(turns) // 2 + 1
    if asked > limits.max_turns:
        raise MedPLIBError(f"the conversation has {asked} turns, and {limits.max_turns} are taken; start a new one")
    if sum(turn.text.count(IMAGE_TOKEN) for turn in turns) > 1:
        raise MedPLIBError(f"the conversation holds {IMAGE_TOKEN} more than once; ask about one image at a time")
    texts = [turn.text for turn in turns]
    return [text.replace(IMAGE_TOKEN, "").strip() if IMAGE_TOKEN in text else text for text in texts]


def _read_settings(message: GenerateRequest, limits: ServeLimits) -> GenerationSettings:
    stops = [message.stop] if isinstance(message.stop, str) else message.stop or []
    stops = [stop for stop in stops if stop and stop != EOS_TOKEN]  # the end of an answer, which is no text here
    if len(stops) > _MAX_STOPS or any(len(stop) > _MAX_STOP_CHARS for stop in stops):
        raise MedPLIBError(f"at most {_MAX_STOPS} stop texts of {_MAX_STOP_CHARS} characters are taken; give fewer")
    return GenerationSettings(
        max_new_tokens=min(message.max_new_tokens, limits.max_new_tokens),
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=min(message.top_k, _MAX_TOP_K),
        seed=message.seed,
        stop=tuple(stops),
    )


def _only_image(message: GenerateRequest, limits: ServeLimits) -> bytes | None:
    if len(message.images) > 1:
        raise MedPLIBError(f"the request holds {len(message.images)} images; send one, in base64")
    if not message.images and (message.region_masks or IMAGE_TOKEN in message.prompt):
        raise MedPLIBError("the request is about an image and holds none; send it in base64")
    if len(message.region_masks) > limits.max_regions:
        raise MedPLIBError(
            f"the request holds {len(message.region_masks)} regions, and {limits.max_regions} are taken; mark fewer"
        )
    return decode_base64(message.images[0], limits) if message.images else None


# --- answers ----------------------------------------------------------------------------------------------------------


def last_chunk(asked: Asked, answer: Answer) -> bytes:
    """The whole answer with its masks, encoded.

    Raises:
        MedPLIBError: the masks were asked for as pixels and have too many.
    """
    masks = []
    for mask in answer.masks:
        masks.append(mask.to_dict())
        if asked.message.mask_png:
            stream = io.BytesIO()
            Image.fromarray(mask.to_array()).save(stream, "PNG")  # one bit a pixel
            masks[-1]["png"] = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
    height, width = answer.masks[0].rle["size"] if answer.masks else ("", "")
    return Chunk(
        text=asked.message.prompt + answer.text,
        answer=answer.text,
        mask=_listed_pixels(answer.masks) if asked.message.mask_format == "pixels" else [],
        height=str(height),
        width=str(width),
        masks=masks,
        finish=answer.finish,
        usage={"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.new_tokens},
        timing={part: round(seconds, 4) for part, seconds in answer.timing.items()},
        dropped_turns=asked.message.dropped_turns + answer.dropped_turns,
        notes=list(answer.notes),
    ).encode()


def _listed_pixels(masks: Sequence[Mask]) -> list[tuple[int, int]]:
    """[row, column] of every pixel that is in some mask."""
    if not masks:
        return []
    total = sum(mask.area_px for mask in masks)
    if total > MAX_LISTED_PIXELS:
        raise MedPLIBError(
            f"the masks have {total:,} pixels, and at most {MAX_LISTED_PIXELS:,} are listed; leave mask_format out and "
            "read the masks' run lengths"
        )
    union = masks[0].to_array()
    for mask in masks[1:]:
        union |= mask.to_array()
    return [(row, column) for row, column in np.argwhere(union).tolist()]
