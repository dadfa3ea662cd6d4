"""A worker's chunks → OpenAI's completions and events."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator
from itertools import zip_longest
from typing import Any

from pydantic import BaseModel

from model.serve.openai_schema import (
    AnswerExtension,
    AnswerMessage,
    ChatChunk,
    ChatCompletion,
    Choice,
    ChunkChoice,
    Delta,
    Finish,
    Usage,
)
from model.serve.protocol import Chunk, ErrorCode
from model.serve.refusals import Refusal

DONE = b"data: [DONE]\n\n"


class Listener:
    """Reads an answer's stream in a task of its own and keeps its newest chunk, as each holds the whole text so far.

    So a slow client delays no worker and nothing piles up, and the stream is left by the task that entered it.

    Args:
        stream: chunks; closed at its end or by ``close``.
    """

    def __init__(self, stream: AsyncIterator[Chunk]) -> None:
        self._newest: Chunk | None = None
        self._news = asyncio.Event()
        self._task = asyncio.create_task(self._read(stream))

    async def _read(self, stream: AsyncIterator[Chunk]) -> None:
        try:
            async for chunk in stream:
                self._newest = chunk
                self._news.set()
        finally:
            with contextlib.suppress(AttributeError):  # an iterator that is no generator has nothing to close
                await stream.aclose()  # type: ignore[attr-defined]

    async def next(self) -> Chunk | None:
        """The newest chunk that was not given yet, once there is one; None at the end.

        Raises:
            Refusal: the request failed.
        """
        if self._newest is None and not self._task.done():
            news = asyncio.ensure_future(self._news.wait())
            try:
                await asyncio.wait({news, self._task}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                news.cancel()
        self._news.clear()
        chunk, self._newest = self._newest, None
        if chunk is None:
            await self._task
        elif chunk.error_code:
            raise refusal_of(chunk)
        return chunk

    async def last(self) -> Chunk:
        """The last chunk.

        Raises:
            Refusal: the request failed, or ended without an answer.
        """
        found: Chunk | None = None
        while (chunk := await self.next()) is not None:
            found = chunk
        if found is None:
            raise Refusal(ErrorCode.FAILED, "the worker ended its answer before it began; ask again")
        return found

    async def close(self) -> None:
        """Give the request up, if it is not over."""
        self._task.cancel()
        await asyncio.wait({self._task})
        if not self._task.cancelled():
            self._task.exception()  # whoever asked for the next chunk was told


def refusal_of(chunk: Chunk) -> Refusal:
    """The error that a chunk tells."""
    known = chunk.error_code in set(ErrorCode)
    code = ErrorCode(chunk.error_code) if known else ErrorCode.FAILED
    return Refusal(code, chunk.text, retry_after=1.0 if code is ErrorCode.BUSY else None)


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
        message = AnswerMessage(content=self._answer(last), medplib=_extension(last))
        return ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=[Choice(message=message, finish_reason=_finish(last))],
            usage=_usage(last),
        )

    def opening(self) -> bytes:
        """The first event."""
        return self._event(Delta(role="assistant", content=""))

    def news(self, chunk: Chunk) -> bytes:
        """What the chunk says that earlier ones did not; empty where that is nothing."""
        answer = self._answer(chunk)
        known = _common(self._said, answer)
        if known < len(self._said) and chunk.finish is None:  # a text cannot be taken back: wait for its end
            return b""
        self._said = answer
        return self._event(Delta(content=answer[known:])) if answer[known:] else b""

    def ending(self, last: Chunk, with_usage: bool) -> bytes:
        """The last events: why it ended, the masks, the count of tokens where asked for, and the end of the stream."""
        events = self._event(Delta(medplib=_extension(last)), _finish(last))
        if with_usage:
            events += _data(self._chunk([], _usage(last)))
        return events + DONE

    def _answer(self, chunk: Chunk) -> str:
        return chunk.answer or chunk.text.removeprefix(self.prompt).strip()

    def _event(self, delta: Delta, finish: Finish | None = None) -> bytes:
        return _data(self._chunk([ChunkChoice(delta=delta, finish_reason=finish)]))

    def _chunk(self, choices: list[ChunkChoice], usage: Usage | None = None) -> ChatChunk:
        return ChatChunk(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)


def _data(event: BaseModel) -> bytes:
    return b"data: " + event.model_dump_json().encode() + b"\n\n"


def _common(one: str, other: str) -> int:
    """Characters that both begin with."""
    if other.startswith(one):
        return len(one)
    return next(place for place, pair in enumerate(zip_longest(one, other)) if pair[0] != pair[1])


def _finish(last: Chunk) -> Finish:
    return "length" if last.finish in ("length", "cancelled") else "stop"


def _usage(last: Chunk) -> Usage:
    counts = last.usage or {}
    read, said = counts.get("prompt_tokens", 0), counts.get("completion_tokens", 0)
    return Usage(prompt_tokens=read, completion_tokens=said, total_tokens=read + said)


def _extension(last: Chunk) -> AnswerExtension:
    masks: list[dict[str, Any]] = last.masks
    size = {name: int(side) for name, side in (("height", last.height), ("width", last.width)) if side.isdigit()}
    known = {"dropped_turns": last.dropped_turns, "notes": last.notes}
    return AnswerExtension.model_validate({"masks": masks, **size, **known})
