"""Asking a worker as a controller does, and engines that do what a test wants."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from model.inference.answer import Answer
from model.inference.requests import OnText, Request, Ticket
from model.processing.conversation import Turn, render
from model.serve.protocol import Chunk, ChunkReader
from tests.conftest import ROOT

SAMPLE = ROOT / "data" / "sample"
CT = SAMPLE / "images" / "ct_00--Phantom--seed505case000000--0000.png"
MASK = SAMPLE / "masks" / "ct_00--Phantom--seed505case000000--0000--0001_000.png"


def in_base64(source: Path | bytes) -> str:
    return base64.b64encode(source if isinstance(source, bytes) else source.read_bytes()).decode()


def prompt(question: str, *history: tuple[str, str]) -> str:
    """The conversation as clients render it, its image in the first turn."""
    turns = [Turn(role, text) for pair in history for role, text in zip(("human", "gpt"), pair, strict=True)]
    turns.append(Turn("human", question))
    return render([Turn("human", f"<image>\n{turns[0].text}"), *turns[1:]])


def message(question: str = "What does this image show?", **fields: Any) -> dict[str, Any]:
    """A request's body."""
    return {"model": "nano", "prompt": prompt(question), "images": [in_base64(CT)], **fields}


def read_chunks(response: httpx.Response) -> Iterator[Chunk]:
    reader = ChunkReader()
    for data in response.iter_raw():
        yield from reader.feed(data)


def ask(url: str, body: dict[str, Any], **options: Any) -> list[Chunk]:
    """All chunks of an answer."""
    with httpx.stream("POST", f"{url}/worker_generate_stream", json=body, timeout=30, **options) as response:
        assert response.status_code == 200, response.read()
        return list(read_chunks(response))


def refused(url: str, body: Any, **options: Any) -> tuple[int, str, httpx.Headers]:
    """Status, sentence and headers of a request that has no answer."""
    content = {"content": body} if isinstance(body, bytes) else {"json": body}
    response = httpx.post(f"{url}/worker_generate_stream", timeout=30, **content, **options)
    assert response.status_code != 200, response.text
    sentence = response.json()["error"]
    assert sentence
    assert "\n" not in sentence
    assert "Traceback" not in sentence
    return response.status_code, sentence, response.headers


class ScriptedEngine:
    """An engine whose requests do what the test says.

    Args:
        script: called in a thread of its own for each request, with its ticket and ``on_text``; whatever it returns
            or raises settles the ticket. By default a short answer.
        refuse: raised by ``submit`` where given.
    """

    def __init__(
        self, script: Callable[[Ticket, OnText], Answer] | None = None, refuse: Exception | None = None
    ) -> None:
        self.script, self.refuse = script or (lambda ticket, tell: Answer("A CT.")), refuse
        self.tickets: list[Ticket] = []
        self.closed = False

    def submit(self, request: Request, on_text: OnText | None = None) -> Ticket:
        if self.refuse is not None:
            raise self.refuse
        ticket = Ticket(request)
        self.tickets.append(ticket)
        threading.Thread(target=self._run, args=(ticket, on_text), daemon=True).start()
        return ticket

    def _run(self, ticket: Ticket, on_text: OnText) -> None:
        try:
            ticket.settle(self.script(ticket, on_text))
        except Exception as error:  # noqa: BLE001 - as an engine settles a request that fails
            ticket.settle(error)

    def status(self) -> dict[str, int]:
        running = sum(not ticket.done() for ticket in self.tickets)
        return {"waiting": 0, "running": running, "slots": 4}

    def close(self) -> None:
        self.closed = True


def talk_until_cancelled(ticket: Ticket, tell: OnText) -> Answer:
    """A script that says ever more, until nobody listens."""
    count, pause = 0, threading.Event()
    while not ticket.cancelled:
        count += 1
        tell("on and " * count)
        pause.wait(0.002)
    return Answer("on and " * count, finish="cancelled")


def hold_until_cancelled(ticket: Ticket, tell: OnText) -> Answer:
    """A script that says nothing, until nobody listens."""
    pause = threading.Event()
    while not ticket.cancelled:
        pause.wait(0.002)
    return Answer("", finish="cancelled")
