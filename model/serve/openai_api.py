"""The OpenAI-compatible API on the controller: ``/v1/models`` and ``/v1/chat/completions``, streamed and not.

A conversation about one image goes in, text and masks come out; ``openai_messages`` makes it one request of our own,
any worker answers it, and what went wrong comes back in the shape that OpenAI's clients read. Nothing is kept between
requests, nothing is fetched, and no path is opened. A client that leaves takes its request with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import anyio
from fastapi import APIRouter, Body, Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Message, Send

from model.errors import MedPLIBError
from model.serve.openai_examples import ASKING, ERRORS, STREAMED
from model.serve.openai_messages import RefusedField, generate_request
from model.serve.openai_replies import DONE, Listener, Reply
from model.serve.openai_schema import ChatCompletion, ChatRequest, ModelCard, ModelExtension, ModelList
from model.serve.protocol import Chunk, ErrorCode
from model.serve.refusals import MACHINE_FAULT, Refusal, client_sentence, error_body

if TYPE_CHECKING:
    from model.serve.controller_settings import ControllerSettings
    from model.serve.forwarding import Forwarder
    from model.serve.ray_app import OwnAnswers
    from model.serve.registry import Registry

Result = TypeVar("Result")
_CLIENT_LEFT = 499  # nobody reads it; it is what logs call it
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
    refusals: dict[int | str, dict[str, Any]] = {**ERRORS}
    router.add_api_route("/models", api.models, methods=["GET"], response_model=ModelList, responses=refusals)
    router.add_api_route(
        "/models/{model_id:path}", api.model, methods=["GET"], response_model=ModelCard, responses=refusals
    )
    router.add_api_route(
        "/chat/completions",
        api.chat,
        methods=["POST"],
        response_model=ChatCompletion,
        responses={200: STREAMED, **refusals},
    )
    return router


class _Route(APIRoute):
    """Tells errors with the field that they are about."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_or_tell(request: Request) -> Response:
            try:
                _check_items(await request.body())
                return await handle(request)
            except ClientDisconnect:
                return Response(status_code=_CLIENT_LEFT)
            except RequestValidationError as error:
                param, sentence = _malformed(error)
                return _tell(Refusal(ErrorCode.BAD_INPUT, sentence), param)
            except MedPLIBError as error:
                param = error.param if isinstance(error, RefusedField) else None
                return _tell(Refusal(ErrorCode.BAD_INPUT, client_sentence(error)), param)
            except UnknownModel as refusal:
                return _tell(refusal, "model", "model_not_found")
            except Refusal as refusal:
                return _tell(refusal)

        return handle_or_tell


def _check_items(body: bytes) -> None:
    """Refuse JSON of very many parts, which would hold up everybody while it is read; one long text does not.

    Raises:
        MedPLIBError: the request is such a one.
    """
    if len(body) > _MAX_ITEMS and body.count(b",") > _MAX_ITEMS:
        raise MedPLIBError(f"the request has more than {_MAX_ITEMS} parts; send masks as PNG or compressed run lengths")


class UnknownModel(Refusal):
    """There are models, and this is none of them."""

    def __init__(self, model: str, known: list[str]) -> None:
        sentence = f"there is no model {model[:100]!r} here; known: {', '.join(known) or 'none'}"
        super().__init__(ErrorCode.BAD_INPUT, sentence, status=404)


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
        if model_id not in (known := self.registry.models()):
            raise UnknownModel(model_id, known)
        return self._card(model_id)

    def _card(self, name: str) -> ModelCard:
        turns = self.registry.conversation_turns(name)
        return ModelCard(id=name, created=self.started, medplib=ModelExtension(conversation_turns=turns))

    async def chat(self, body: Annotated[ChatRequest, Body(openapi_examples=ASKING)], request: Request) -> Response:
        """Answer a question about an image, with masks where the answer points at something.

        With `stream`, events `data: {…}` of `object` `chat.completion.chunk`, ended by `data: [DONE]`; the one that has
        a `finish_reason` carries `medplib` in its `delta`.
        """
        known = self.registry.models()
        if known and body.model not in known:  # where there is none, the forwarder says when to come again
            raise UnknownModel(body.model, known)
        asked = generate_request(body, self.settings.limits)
        listener = Listener(self.forwarder.generate(asked))
        reply = Reply(body.model, asked.prompt)
        streaming = False
        try:
            if not body.stream:
                completion = reply.completion(await _unless_gone(request, listener.last()))
                return Response(completion.model_dump_json(), media_type="application/json")
            first = await _unless_gone(request, _first(listener))
            streaming = True
        except _ClientLeft:
            return Response(status_code=_CLIENT_LEFT)
        finally:
            if not streaming:
                await listener.close()
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        events = _events(listener, reply, first, with_usage)
        return _EventStream(events, listener, self.settings.client_timeout)


# --- streams --------------------------------------------------------------------------------------------------------


async def _first(listener: Listener) -> Chunk:
    chunk = await listener.next()
    if chunk is None:
        raise Refusal(ErrorCode.FAILED, "the worker ended its answer before it began; ask again")
    return chunk


async def _events(listener: Listener, reply: Reply, first: Chunk, with_usage: bool) -> AsyncIterator[bytes]:
    """The answer's events; what goes wrong after the first one becomes an event too."""
    yield reply.opening()
    chunk: Chunk | None = first
    last = first
    try:
        while chunk is not None:
            last = chunk
            if news := reply.news(chunk):
                yield news
            chunk = await listener.next()
        yield reply.ending(last, with_usage)
    except Refusal as refusal:
        yield _error_event(refusal)
    except Exception:  # noqa: BLE001 - whatever it is, the client must not wait for a word that never comes
        _log.exception("an answer's stream broke")
        yield _error_event(Refusal(ErrorCode.FAILED, MACHINE_FAULT))


def _error_event(refusal: Refusal) -> bytes:
    return b"data: " + json.dumps(_error(refusal)).encode() + b"\n\n" + DONE


class _EventStream(StreamingResponse):
    """Server-sent events; whoever leaves, or takes nothing for too long, ends what they listen to."""

    def __init__(self, events: AsyncIterator[bytes], listener: Listener, client_timeout: float) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._listener, self._client_timeout = listener, client_timeout

    async def stream_response(self, send: Send) -> None:
        """Send all events."""

        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(self._client_timeout):
                await send(message)

        try:
            with contextlib.suppress(TimeoutError):  # the server then closes the connection
                await super().stream_response(send_in_time)
        finally:
            with anyio.CancelScope(shield=True):
                await self._listener.close()


class _ClientLeft(Exception):
    """Nobody waits for the answer any more."""


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The work's result.

    Raises:
        _ClientLeft: the client left before; the work was given up.
    """
    result = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({result, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            raise _ClientLeft
        return result.result()
    finally:
        gone.cancel()
        result.cancel()
        await asyncio.wait({result, gone})


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# --- errors ---------------------------------------------------------------------------------------------------------


def _error(refusal: Refusal, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    body = error_body("/v1/", refusal.sentence, refusal.code, refusal.status)
    body["error"]["param"] = param
    body["error"]["code"] = code or body["error"]["code"]
    return body


def _tell(refusal: Refusal, param: str | None = None, code: str | None = None) -> JSONResponse:
    return JSONResponse(_error(refusal, param, code), refusal.status, refusal.headers)


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
