"""The OpenAI-compatible API on the controller: ``/v1/models`` and ``/v1/chat/completions``, streamed and not.

A conversation about one image goes in, text and masks come out: OpenAI's messages become one request of our own, any
worker answers it, its chunks become completions or events, and what went wrong comes back in the shape that OpenAI's
clients read. Nothing is kept between requests, nothing is fetched, and no path is opened. A client that leaves takes
its request with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Body, Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from pydantic import BaseModel

from model.errors import MedPLIBError
from model.inference.regions import place_region
from model.processing.conversation import Turn, render
from model.processing.special_tokens import IMAGE_TOKEN, REGION_MARKER, as_typed
from model.serve import openai_schema as schema
from model.serve.errors import MACHINE_FAULT, Refusal, client_sentence
from model.serve.limits import ServeLimits, turns_to_drop
from model.serve.openai_schema import AskMessage, ChatCompletion, ChatRequest, ImagePart, ModelCard, ModelList
from model.serve.protocol import Chunk, ErrorCode, GenerateRequest
from model.serve.server import TimedStream, until_left

if TYPE_CHECKING:
    from model.serve.controller import ControllerSettings
    from model.serve.forwarding import Forwarder
    from model.serve.ray_app import OwnAnswers
    from model.serve.registry import Registry

DONE = b"data: [DONE]\n\n"
_DEFAULT_MAX_TOKENS = 256
_MAX_ITEMS = 250_000
_NAME = re.compile(r"[a-z]\w*")
_TAGS = ("text", "image_url")
_log = logging.getLogger(__name__)


def openai_router(
    forwarder: Forwarder | OwnAnswers, registry: Registry | OwnAnswers, settings: ControllerSettings
) -> APIRouter:
    """The routes under ``/v1``.

    Args:
        forwarder: gives requests to workers.
        registry: knows the models.
        settings: of the controller, which guards the routes with its client key and ends over-long bodies.
    """
    api = _Api(forwarder, registry, settings)
    shown = [Depends(HTTPBearer(auto_error=False, scheme_name="client key"))] if settings.client_key else []
    router = APIRouter(prefix="/v1", tags=["OpenAI"], route_class=_Route, dependencies=shown)  # in the schema only
    refusals: dict[int | str, dict[str, Any]] = {**schema.ERRORS}
    router.add_api_route("/models", api.models, methods=["GET"], response_model=ModelList, responses=refusals)
    router.add_api_route(
        "/models/{model_id:path}", api.model, methods=["GET"], response_model=ModelCard, responses=refusals
    )
    router.add_api_route(
        "/chat/completions",
        api.chat,
        methods=["POST"],
        response_model=ChatCompletion,
        responses={200: schema.STREAMED, **refusals},
    )
    return router


class _Route(APIRoute):
    """Tells errors with the field that they are about."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_or_tell(request: Request) -> Response:
            try:
                body = await request.body()
                if len(body) > _MAX_ITEMS and body.count(b",") > _MAX_ITEMS:  # it would hold everybody up to read them
                    raise MedPLIBError(
                        f"the request has more than {_MAX_ITEMS} parts; send masks as PNG or compressed run lengths"
                    )
                return await handle(request)
            except RequestValidationError as error:
                param, sentence = _malformed(error)
                raise Refusal(ErrorCode.BAD_INPUT, sentence, param=param) from error
            except RefusedField as error:
                raise Refusal(ErrorCode.BAD_INPUT, client_sentence(error), param=error.param) from error

        return handle_or_tell


class _Api:
    """The handlers.

    Args:
        forwarder: gives requests to workers.
        registry: knows the models.
        settings: of the controller.
    """

    def __init__(
        self, forwarder: Forwarder | OwnAnswers, registry: Registry | OwnAnswers, settings: ControllerSettings
    ) -> None:
        self.forwarder, self.registry, self.settings = forwarder, registry, settings
        self.started = int(time.time())

    async def models(self) -> ModelList:
        """Models that can be asked now."""
        return ModelList(data=[self._card(name) for name in self.registry.models()])

    async def model(self, model_id: str) -> ModelCard:
        """One model, if it can be asked now."""
        self._check_known(model_id, self.registry.models())
        return self._card(model_id)

    def _check_known(self, model: str, known: list[str]) -> None:
        if model not in known:
            sentence = f"there is no model {model[:100]!r} here; known: {', '.join(known) or 'none'}"
            raise Refusal(ErrorCode.BAD_INPUT, sentence, status=404, param="model", name="model_not_found")

    def _card(self, name: str) -> ModelCard:
        turns = self.registry.conversation_turns(name)
        return ModelCard(id=name, created=self.started, medplib=schema.ModelExtension(conversation_turns=turns))

    async def chat(
        self, body: Annotated[ChatRequest, Body(openapi_examples=schema.ASKING)], request: Request
    ) -> Response:
        """Answer a question about an image, with masks where the answer points at something.

        With `stream`, events `data: {…}` of `object` `chat.completion.chunk`, ended by `data: [DONE]`; the one that has
        a `finish_reason` carries `medplib` in its `delta`.
        """
        if known := self.registry.models():  # where there is none, the forwarder says when to come again
            self._check_known(body.model, known)
        asked = generate_request(body, self.settings.limits)
        chunks = newest(self.forwarder.generate(asked))
        reply = Reply(body.model, asked.prompt)
        streaming = False
        try:
            first = await until_left(anext(chunks, None), request.receive)
            if first is None:
                raise Refusal(ErrorCode.FAILED, "the worker ended its answer before it began; ask again")
            if not body.stream:
                completion = reply.completion(await until_left(_last(first, chunks), request.receive))
                return Response(completion.model_dump_json(), media_type="application/json")
            streaming = True
        finally:
            if not streaming:
                await chunks.aclose()
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        events = _events(first, chunks, reply, with_usage)
        return TimedStream(
            events, self.settings.client_timeout, reply.opening(), media_type="text/event-stream", headers=headers
        )


# --- asking: OpenAI's messages become one prompt, its image and its regions -------------------------------------------


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
    for name, (harmless, refusal) in schema.REFUSED.items():  # not implemented, and would change the answer
        value = getattr(body, name)
        if value is not None and value not in harmless:
            raise RefusedField(name, refusal)
    if body.stream_options is not None and not body.stream:
        raise RefusedField("stream_options", "stream_options goes with stream; set stream to true or leave it out")
    said = _conversation(body.messages, limits)
    extension = body.medplib or schema.AskExtension()
    texts, regions = _place_regions(said, [region_value(region) for region in extension.regions])
    lengths = [sum(map(len, texts[place : place + 2])) for place in range(0, len(texts), 2)]
    dropped = turns_to_drop(lengths, [len(own) for own in regions[::2]], limits)
    marked = [region for own in regions[2 * dropped :] for region in own]
    if len(marked) > limits.max_regions:
        raise RefusedField("medplib.regions", f"{len(marked)} regions are marked, at most {limits.max_regions} may be")
    images = list(dict.fromkeys(image for one in said for image in one.images))  # clients may send it each time
    if len(images) > 1:
        sentence = f"a conversation is about one image, these messages hold {len(images)}; send one"
        raise RefusedField("messages", sentence)
    turns = [Turn("gpt" if place % 2 else "human", as_typed(text)) for place, text in enumerate(texts[2 * dropped :])]
    if images:
        turns[0] = Turn("human", f"{IMAGE_TOKEN}\n{turns[0].text}")
    wanted = body.max_completion_tokens or body.max_tokens
    return GenerateRequest(
        model=body.model,
        prompt=render(turns),
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
        every_target=True,
        dropped_turns=dropped,
    )


def region_value(region: schema.Region) -> Any:
    """A region as workers read it: ``{"box": …}``, ``{"point": …}``, run lengths, or a data URI."""
    if region.mask is not None:
        return _data_uri(region.mask, "medplib.regions")
    if region.rle is not None:
        return region.rle.model_dump()
    return {"box": region.box} if region.box is not None else {"point": region.point}


def _conversation(messages: Sequence[AskMessage], limits: ServeLimits) -> list[_Said]:
    """Both sides by turns, from the first question on; messages in a row of one side are one."""
    for message in messages:
        if message.role != "user" and any(isinstance(part, ImagePart) for part in _parts(message)):
            raise RefusedField("messages", f"a message of the {message.role} holds an image; put it into the user's")
    conversation = [message for message in messages if message.role in ("user", "assistant")]
    said = [
        _merge(role == "user", list(several)) for role, several in groupby(conversation, lambda message: message.role)
    ]
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


def _parts(message: AskMessage) -> list[schema.TextPart | ImagePart]:
    if isinstance(message.content, str):
        return [schema.TextPart(type="text", text=message.content)]
    return message.content or []


def _merge(asked: bool, messages: Sequence[AskMessage]) -> _Said:
    """One turn of several messages."""
    texts: list[str] = []
    images: list[str] = []
    regions: list[str] = []
    for part in (part for message in messages for part in _parts(message)):
        if isinstance(part, ImagePart):
            is_region = part.medplib is not None and part.medplib.role == "region"
            (regions if is_region else images).append(_data_uri(part.image_url.url, "messages"))
        else:
            texts += [part.text] if part.text else []
    return _Said(asked, "\n".join(texts), tuple(images), tuple(regions))


def _data_uri(url: str, param: str) -> str:
    if url[:5].lower() == "data:":
        return url
    sentence = "images are not fetched from addresses or paths; send a data URI (data:image/png;base64,…)"
    raise RefusedField(param, sentence)


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


# --- answering: a worker's chunks become a completion or events -------------------------------------------------------


async def newest(stream: AsyncGenerator[Chunk]) -> AsyncGenerator[Chunk]:
    """An answer's newest chunk, each time that there is one; each holds the whole text so far.

    A task of its own reads the stream, so that a slow client delays no worker and nothing piles up.

    Raises:
        Refusal: the request failed.
    """
    waiting: list[Chunk] = []
    news = asyncio.Event()

    async def read() -> None:
        async with contextlib.aclosing(stream):
            async for chunk in stream:
                if chunk.error_code:
                    code = ErrorCode(chunk.error_code)
                    raise Refusal(code, chunk.text, retry_after=1.0 if code is ErrorCode.BUSY else None)
                waiting[:] = [chunk]
                news.set()

    reading = asyncio.create_task(read())
    reading.add_done_callback(lambda _: news.set())
    try:
        while await news.wait():
            if not reading.done():
                news.clear()
            if waiting:
                yield waiting.pop()
            elif reading.done():
                await reading
                break
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)  # the reader of the next chunk has the error


async def _last(first: Chunk, chunks: AsyncGenerator[Chunk]) -> Chunk:
    async for chunk in chunks:
        first = chunk
    return first


class Reply:
    """One answer on its way to a client, whole or in events.

    Args:
        model: who answers.
        prompt: what was asked, as programs that send no ``answer`` put it before theirs.
    """

    def __init__(self, model: str, prompt: str) -> None:
        self.model, self.prompt = model, prompt
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self._said = ""

    def completion(self, last: Chunk) -> ChatCompletion:
        """The whole answer, of its last chunk."""
        message = schema.AnswerMessage(content=self._answer(last), medplib=_extension(last))
        return ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=[schema.Choice(message=message, finish_reason=_finish(last))],
            usage=_usage(last),
        )

    def opening(self) -> bytes:
        """The first event."""
        return self._event(schema.Delta(role="assistant", content=""))

    def news(self, chunk: Chunk) -> bytes:
        """What the chunk says that earlier ones did not; empty where that is nothing."""
        answer = self._answer(chunk)
        known = len(self._said)
        if not answer.startswith(self._said):
            pairs = zip_longest(self._said, answer)
            known = next(place for place, (before, now) in enumerate(pairs) if before != now)
        if known < len(self._said) and chunk.finish is None:  # a text cannot be taken back: wait for its end
            return b""
        self._said = answer
        return self._event(schema.Delta(content=answer[known:])) if answer[known:] else b""

    def ending(self, last: Chunk, with_usage: bool) -> bytes:
        """The last events: why it ended, the masks, the count of tokens where asked for, and the end of the stream."""
        events = self._event(schema.Delta(medplib=_extension(last)), _finish(last))
        if with_usage:
            events += _data(self._chunk([], _usage(last)))
        return events + DONE

    def _answer(self, chunk: Chunk) -> str:
        return chunk.answer or chunk.text.removeprefix(self.prompt).strip()

    def _event(self, delta: schema.Delta, finish: schema.Finish | None = None) -> bytes:
        return _data(self._chunk([schema.ChunkChoice(delta=delta, finish_reason=finish)]))

    def _chunk(self, choices: list[schema.ChunkChoice], usage: schema.Usage | None = None) -> schema.ChatChunk:
        return schema.ChatChunk(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)


def _data(event: BaseModel) -> bytes:
    return b"data: " + event.model_dump_json().encode() + b"\n\n"


def _finish(last: Chunk) -> schema.Finish:
    return "length" if last.finish in ("length", "cancelled") else "stop"


def _usage(last: Chunk) -> schema.Usage:
    counts = last.usage or {}
    read, said = counts.get("prompt_tokens", 0), counts.get("completion_tokens", 0)
    return schema.Usage(prompt_tokens=read, completion_tokens=said, total_tokens=read + said)


def _extension(last: Chunk) -> schema.AnswerExtension:
    masks: list[dict[str, Any]] = last.masks
    size = {name: int(side) for name, side in (("height", last.height), ("width", last.width)) if side.isdigit()}
    known = {"dropped_turns": last.dropped_turns, "notes": last.notes}
    return schema.AnswerExtension.model_validate({"masks": masks, **size, **known})


async def _events(first: Chunk, chunks: AsyncGenerator[Chunk], reply: Reply, with_usage: bool) -> AsyncGenerator[bytes]:
    """The answer's events; what goes wrong after the first one becomes an event too."""
    async with contextlib.aclosing(chunks):
        last = first
        try:
            if news := reply.news(first):
                yield news
            async for chunk in chunks:
                last = chunk
                if news := reply.news(chunk):
                    yield news
            yield reply.ending(last, with_usage)
        except Refusal as refusal:
            yield _error_event(refusal)
        except Exception:  # noqa: BLE001 - whatever it is, the client must not wait for a word that never comes
            _log.exception("an answer's stream broke")
            yield _error_event(Refusal(ErrorCode.FAILED, MACHINE_FAULT))


def _error_event(refusal: Refusal) -> bytes:
    return b"data: " + json.dumps(refusal.body("/v1/")).encode() + b"\n\n" + DONE


# --- errors -----------------------------------------------------------------------------------------------------------


def _malformed(error: RequestValidationError) -> tuple[str | None, str]:
    """Field and sentence of what is wrong with a request; of a choice of forms, those of the one that fits best."""
    found = max(error.errors(), key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))
    if found["type"] == "json_invalid":
        return None, "the request is no valid JSON; send an object with Content-Type application/json"
    param = _field(found["loc"])
    reason = str(found["ctx"]["error"]) if found["type"] == "value_error" else found["msg"]
    if found["type"] == "extra_forbidden":
        reason = "there is no such field; docs/api.md lists them"
    sentence = f"{param}: {reason}" if param else f"{reason}; send a JSON object with Content-Type application/json"
    return param, sentence.encode("utf-8", "replace").decode()[:500]


def _field(location: tuple[int | str, ...]) -> str | None:
    """``messages[0].content`` of a place in the request."""
    path = ""
    for before, name, after in zip(("", *location), location, (*location[1:], None), strict=False):
        if isinstance(name, int):
            path += f"[{name}]"
        elif not (name == "body" or not _NAME.fullmatch(name) or name == "str" or (name in _TAGS and after == name)):
            is_tag = isinstance(before, int) and name in _TAGS and after is not None
            path += "" if is_tag else f".{name}"
    return path.lstrip(".") or None
