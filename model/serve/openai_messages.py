"""OpenAI's messages → the request that workers answer: one prompt, its image, its regions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from model.errors import MedPLIBError
from model.inference.regions import place_region
from model.processing.conversation import Turn, render
from model.processing.special_tokens import IMAGE_TOKEN, REGION_MARKER, as_typed
from model.serve.limits import ServeLimits, turns_to_drop
from model.serve.openai_schema import (
    REFUSED,
    AskExtension,
    AskMessage,
    ChatRequest,
    ImagePart,
    Region,
    TextPart,
)
from model.serve.protocol import GenerateRequest

_DEFAULT_MAX_TOKENS = 256


class RefusedField(MedPLIBError):
    """A field of the request asks for something that there is not.

    Attributes:
        param: the field.
    """

    def __init__(self, param: str, sentence: str) -> None:
        super().__init__(sentence)
        self.param = param


@dataclass(frozen=True)
class _Said:
    """What one side says at a time.

    Attributes:
        asked: whether it is the user.
        text: of all its messages.
        images, regions: data URIs.
    """

    asked: bool
    text: str
    images: tuple[str, ...] = ()
    regions: tuple[str, ...] = ()


def generate_request(body: ChatRequest, limits: ServeLimits) -> GenerateRequest:
    """What a worker is to answer.

    Raises:
        MedPLIBError: a field is not supported, the conversation is malformed, its question is too long, it has several
            images, or does not say which region is where.
    """
    check_fields(body)
    said = _conversation(body.messages, limits)
    extension = body.medplib or AskExtension()
    texts, regions = _place_regions(said, [region_value(region) for region in extension.regions])
    lengths = [sum(map(len, texts[place : place + 2])) for place in range(0, len(texts), 2)]
    dropped = turns_to_drop(lengths, [len(own) for own in regions[::2]], limits)
    marked = [region for own in regions[2 * dropped :] for region in own]
    if len(marked) > limits.max_regions:
        raise RefusedField("medplib.regions", f"{len(marked)} regions are marked, at most {limits.max_regions} may be")
    images = _images(said)
    wanted = body.max_completion_tokens or body.max_tokens
    return GenerateRequest(
        model=body.model,
        prompt=_prompt(texts[2 * dropped :], bool(images)),
        images=images,
        region_masks=marked,
        temperature=body.temperature or 0.0,
        top_p=1.0 if body.top_p is None else body.top_p,
        max_new_tokens=wanted or min(_DEFAULT_MAX_TOKENS, limits.max_new_tokens),
        stop=body.stop or None,
        seed=body.seed,
        mask_png=extension.mask_png,
        threshold=extension.threshold,
        no_mask_below=extension.no_mask_below,
        top_k=0,
        timeout=None,
        every_target=True,
        dropped_turns=dropped,
    )


def check_fields(body: ChatRequest) -> None:
    """Refuse what is not implemented and would change the answer.

    Raises:
        RefusedField: the request asks for such a thing.
    """
    for name, (harmless, sentence) in REFUSED.items():
        value = getattr(body, name)
        if value is not None and value not in harmless:
            raise RefusedField(name, sentence)
    if body.stream_options is not None and not body.stream:
        raise RefusedField("stream_options", "stream_options goes with stream; set stream to true or leave it out")


def region_value(region: Region) -> Any:
    """A region as workers read it: ``{"box": …}``, ``{"point": …}``, run lengths, or a data URI."""
    if region.mask is not None:
        return _data_uri(region.mask, "medplib.regions")
    if region.rle is not None:
        return region.rle.model_dump()
    return {"box": region.box} if region.box is not None else {"point": region.point}


def _conversation(messages: Sequence[AskMessage], limits: ServeLimits) -> list[_Said]:
    """Both sides by turns, from the first question on; messages in a row of one side are one."""
    spoken = [message for message in messages if message.role in ("user", "assistant")]
    _check_images(messages)
    said = [_merge(role == "user", list(several)) for role, several in groupby(spoken, lambda message: message.role)]
    if said and not said[0].asked:  # a greeting
        del said[0]
    if not said or not said[-1].asked:
        raise RefusedField("messages", "the last message is not the user's; end the messages with a question")
    if not said[-1].text.strip():
        raise RefusedField("messages", "the question is empty; put a text part into the last message")
    if (length := len(said[-1].text)) > limits.max_prompt_chars:
        raise RefusedField(
            "messages",
            f"the question has {length:,} characters, {limits.max_prompt_chars:,} are read; ask something shorter",
        )
    return said


def _check_images(messages: Sequence[AskMessage]) -> None:
    for message in messages:
        if message.role != "user" and any(isinstance(part, ImagePart) for part in _parts(message)):
            raise RefusedField("messages", f"a message of the {message.role} holds an image; put it into the user's")


def _parts(message: AskMessage) -> list[TextPart | ImagePart]:
    return message.content if isinstance(message.content, list) else []


def _texts(message: AskMessage) -> Iterator[str]:
    if isinstance(message.content, str):
        yield message.content
    yield from (part.text for part in _parts(message) if isinstance(part, TextPart))


def _merge(asked: bool, messages: Sequence[AskMessage]) -> _Said:
    """One turn of several messages."""
    text = "\n".join(text for message in messages for text in _texts(message) if text)
    images: list[str] = []
    regions: list[str] = []
    for part in (part for message in messages for part in _parts(message) if isinstance(part, ImagePart)):
        is_region = part.medplib is not None and part.medplib.role == "region"
        (regions if is_region else images).append(_data_uri(part.image_url.url, "messages"))
    return _Said(asked, text, tuple(images), tuple(regions))


def _data_uri(url: str, param: str) -> str:
    if not url[:5].lower() == "data:":
        raise RefusedField(
            param, "images are not fetched from addresses or paths; send a data URI (data:image/png;base64,…)"
        )
    return url


def _images(said: Sequence[_Said]) -> list[str]:
    """The conversation's image, if there is one; clients may send the same one with every question."""
    images = list(dict.fromkeys(image for one in said for image in one.images))
    if len(images) > 1:
        raise RefusedField(
            "messages", f"a conversation is about one image, these messages hold {len(images)}; send one"
        )
    return images


def _place_regions(said: Sequence[_Said], listed: list[Any]) -> tuple[list[str], list[list[Any]]]:
    """Texts with a marker for each region, and the regions of each in the order of their markers."""
    texts, regions = [], []
    for one in said:
        own: list[Any] = list(one.regions)
        if one is said[-1]:
            own, listed = own + listed, []
        elif one.asked and not own:
            marked = one.text.count(REGION_MARKER)
            own, listed = listed[:marked], listed[marked:]
        texts.append(_with_markers(one, len(own)))
        regions.append(own)
    return texts, regions


def _with_markers(one: _Said, count: int) -> str:
    if not one.asked:
        return one.text.replace(REGION_MARKER, "< region></region>")
    if count:
        return place_region(one.text, count)
    if REGION_MARKER in one.text:
        raise RefusedField(
            "medplib.regions", f"a message holds {REGION_MARKER} and no region was sent for it; add one to the request"
        )
    return one.text


def _prompt(texts: Sequence[str], with_image: bool) -> str:
    """The conversation, with what could pose as an image or end a turn taken apart."""
    turns = [Turn("gpt" if place % 2 else "human", as_typed(text)) for place, text in enumerate(texts)]
    if with_image:
        turns[0] = Turn("human", f"{IMAGE_TOKEN}\n{turns[0].text}")
    return render(turns)
