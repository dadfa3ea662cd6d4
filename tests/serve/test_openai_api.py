"""The API as the official client sees it, over real sockets; behind it workers that say what a test tells them to."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI

from model.serve.errors import Refusal, answer_errors
from model.serve.limits import BodyLimit, ServeLimits
from model.serve.openai_api import Reply, openai_router
from model.serve.openai_schema import ChatRequest
from model.serve.protocol import Chunk, ErrorCode, GenerateRequest, error_chunk

Serving = Callable[..., AbstractContextManager[str]]
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
QUESTION: Any = [{"role": "user", "content": [IMAGE, {"type": "text", "text": "What is this?"}]}]
MASK = {
    "label": "disc",
    "rle": {"size": [2, 3], "counts": "13"},
    "score": 0.5,
    "bbox": [0, 0, 2, 2],
    "area_px": 3,
    "area_mm2": 0.75,
    "png": "data:image/png;base64,AAAA",
}
FOREVER, PAUSE = "a worker that says nothing more", "one that lets others work first"


def said(answer: str, finish: str | None = None, **more: Any) -> Chunk:
    return Chunk(text=f"the prompt {answer}", answer=answer, finish=finish, **more)


WHOLE = said(
    "the disc is <SEG>",
    "end",
    masks=[MASK],
    height="2",
    width="3",
    usage={"prompt_tokens": 40, "completion_tokens": 5},
)


class Workers:
    """Stands for all workers: says the steps of its script to everyone who asks.

    Attributes:
        scripts: one for each of the first requests.
        script: for all others: chunks to say, errors to raise, events to wait for, ``PAUSE`` or ``FOREVER``.
        asked: requests as they came.
        ended: set when an answer is over or was given up.
    """

    def __init__(self) -> None:
        self.scripts: list[list[Any]] = []
        self.script: list[Any] = [WHOLE]
        self.names = ["nano", "org/other"]
        self.asked: list[GenerateRequest] = []
        self.began, self.ended = threading.Event(), threading.Event()

    def models(self) -> list[str]:
        return self.names

    def conversation_turns(self, model: str) -> int:
        return 3

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk]:
        self.asked.append(request)
        self.began.set()
        try:
            for step in self.scripts.pop(0) if self.scripts else self.script:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, threading.Event):
                    assert await asyncio.to_thread(step.wait, 10), "nobody let the script go on"
                elif step is FOREVER:
                    await asyncio.Event().wait()
                elif step is PAUSE:
                    for _ in range(10):
                        await asyncio.sleep(0)
                else:
                    yield step
        finally:
            self.ended.set()


@pytest.fixture
def workers() -> Workers:
    return Workers()


@pytest.fixture
def app(workers: Workers) -> FastAPI:
    app = FastAPI()
    answer_errors(app)
    limits = ServeLimits(max_body_bytes=1_000_000)
    app.add_middleware(BodyLimit, max_bytes=limits.max_body_bytes)
    app.include_router(
        openai_router(workers, workers, SimpleNamespace(limits=limits, client_key=None, client_timeout=1.0))
    )
    return app


@pytest.fixture
def url(app: FastAPI, serving: Serving) -> Iterator[str]:
    with serving(app) as address:
        yield f"{address}/v1"


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=20) as client:
        yield client


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(**{"model": "nano", "messages": QUESTION, **fields})


# --- models ---------------------------------------------------------------------------------------------------------


def test_models_are_those_of_the_workers(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["nano", "org/other"]
    found = client.models.retrieve("org/other")
    assert (found.id, found.object, found.owned_by) == ("org/other", "model", "medplib")
    assert 0 <= time.time() - found.created < 600
    assert found.medplib == {"conversation_turns": 3}
    with pytest.raises(openai.NotFoundError, match="known: nano, org/other"):
        client.models.retrieve("gpt")


# --- answers --------------------------------------------------------------------------------------------------------


def test_a_whole_answer(client: openai.OpenAI, workers: Workers) -> None:
    completion = ask(client, max_tokens=9, extra_body={"medplib": {"regions": [{"box": [0, 0, 1, 1]}]}})
    (choice,) = completion.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "the disc is <SEG>")
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    assert choice.message.medplib == {"masks": [MASK], "height": 2, "width": 3}
    usage = completion.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (40, 5, 45)
    assert completion.object == "chat.completion" and completion.model == "nano"
    assert completion.id.startswith("chatcmpl-") and completion.id != ask(client).id
    assert workers.asked[0].max_new_tokens == 9
    assert workers.asked[0].region_masks == [{"box": [0.0, 0.0, 1.0, 1.0]}]


def test_a_mask_has_no_more_than_the_worker_told(client: openai.OpenAI, workers: Workers) -> None:
    plain = {name: value for name, value in MASK.items() if name not in ("png", "area_mm2")}
    workers.script = [said("<SEG>", "end", masks=[plain], height="2", width="3")]
    assert ask(client).choices[0].message.medplib["masks"] == [{**plain, "area_mm2": None}]
    workers.script = [said("yes", "end")]
    assert ask(client).choices[0].message.medplib == {"masks": [], "height": None, "width": None}


def test_text_streams_while_it_grows(client: openai.OpenAI, workers: Workers) -> None:
    more = threading.Event()
    workers.script = [said("the"), more, WHOLE]
    chunks = iter(ask(client, stream=True, stream_options={"include_usage": True}))
    first = [next(chunks), next(chunks)]
    assert first[0].choices[0].delta.role == "assistant"
    assert first[1].choices[0].delta.content == "the"
    more.set()
    *news, ending, counts = chunks
    assert "".join(chunk.choices[0].delta.content for chunk in news) == " disc is <SEG>"
    assert ending.choices[0].finish_reason == "stop"
    assert ending.choices[0].delta.medplib == {"masks": [MASK], "height": 2, "width": 3}
    assert (counts.choices, counts.usage.total_tokens) == ([], 45)
    assert len({chunk.id for chunk in [*first, *news, ending, counts]}) == 1
    assert all(chunk.usage is None for chunk in [*first, *news, ending])


def test_tokens_are_counted_in_a_stream_only_when_asked(client: openai.OpenAI) -> None:
    chunks = list(ask(client, stream=True))
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in chunks)


def test_the_events_end_as_published(url: str) -> None:
    answer = httpx.post(f"{url}/chat/completions", json={"model": "nano", "messages": QUESTION, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: ")) for event in events[:-2])


def test_a_text_that_is_read_anew_is_not_told_twice() -> None:
    """Bytes of a rare character may take back what was read of them."""
    reply = Reply("nano", "the prompt")
    events = [reply.news(said(text)).decode() for text in ("a?", "a", "a\u00e9", "a? b")]
    events.append(reply.news(said("a\u00e9 b", "end")).decode())
    told = [
        json.loads(event.removeprefix("data: "))["choices"][0]["delta"]["content"] if event else "" for event in events
    ]
    assert told == ["a?", "", "", " b", "\u00e9 b"]  # the last one mends what nobody can take back


@pytest.mark.parametrize(("finish", "told"), [("end", "stop"), ("stop", "stop"), ("length", "length"), (None, "stop")])
def test_what_ended_the_answer(client: openai.OpenAI, workers: Workers, finish: str | None, told: str) -> None:
    workers.script = [said("yes", finish)]
    assert ask(client).choices[0].finish_reason == told


def test_published_workers_are_understood(client: openai.OpenAI, workers: Workers) -> None:
    """They know neither ``answer`` nor ``finish``: their text is the prompt and the answer behind it."""
    ask(client)
    prompt = workers.asked[0].prompt
    workers.script = [Chunk(text=f"{prompt} A"), Chunk(text=f"{prompt} A fundus.")]
    assert ask(client).choices[0].message.content == "A fundus."


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("refusal", "status", "kind"),
    [
        (Refusal(ErrorCode.BAD_INPUT, "no image"), 400, "invalid_request_error"),
        (Refusal(ErrorCode.BAD_INPUT, "too large", status=413), 413, "invalid_request_error"),
        (Refusal(ErrorCode.BUSY, "busy", 7.0), 429, "rate_limit_error"),
        (Refusal(ErrorCode.NO_WORKER, "nobody"), 503, "server_error"),
        (Refusal(ErrorCode.TIMEOUT, "late"), 504, "server_error"),
        (Refusal(ErrorCode.FAILED, "broken"), 500, "server_error"),
    ],
)
def test_a_refusal_keeps_its_sentence_and_gets_its_status(
    client: openai.OpenAI, workers: Workers, refusal: Refusal, status: int, kind: str, stream: bool
) -> None:
    workers.script = [refusal]
    with pytest.raises(openai.APIStatusError) as error:
        ask(client, stream=stream)
    code = refusal.code.name.lower()
    assert error.value.status_code == status
    assert error.value.body == {"message": refusal.sentence, "type": kind, "param": None, "code": code}
    assert error.value.response.headers.get("Retry-After") == ("7" if status == 429 else None)


def test_the_client_comes_again_when_it_was_too_busy(client: openai.OpenAI, workers: Workers) -> None:
    workers.scripts = [[Refusal(ErrorCode.BUSY, "busy", retry_after=1)]]
    assert ask(client.with_options(max_retries=1)).choices[0].message.content == "the disc is <SEG>"
    assert len(workers.asked) == 2


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("number", "status", "kind"), [(2, 400, "invalid_request_error"), (3, 429, "rate_limit_error"), (77, 500, "server")]
)
def test_an_error_chunk_in_place_of_an_answer(
    client: openai.OpenAI, workers: Workers, number: int, status: int, kind: str, stream: bool
) -> None:
    workers.script = [Chunk(text="this is why", error_code=number)]
    with pytest.raises(openai.APIStatusError, match="this is why") as error:
        ask(client, stream=stream)
    assert error.value.status_code == status
    assert str(error.value.type).startswith(kind)
    assert ("Retry-After" in error.value.response.headers) == (status == 429)


@pytest.mark.parametrize("late", [Refusal(ErrorCode.FAILED, "it broke"), error_chunk(ErrorCode.TIMEOUT, "it broke")])
def test_an_error_on_the_way_is_told_in_the_stream(client: openai.OpenAI, workers: Workers, late: Any) -> None:
    more = threading.Event()
    workers.script = [said("the"), more, late]
    chunks = iter(ask(client, stream=True))
    assert [next(chunks).choices[0].delta.content for _ in range(2)] == ["", "the"]
    more.set()
    with pytest.raises(openai.APIError, match="it broke"):
        list(chunks)
    workers.script = [said("the"), late]
    with pytest.raises(openai.APIStatusError, match="it broke"):  # a whole answer still has a status to tell it with
        ask(client)


def test_a_programmer_error_ends_the_stream_too(client: openai.OpenAI, workers: Workers) -> None:
    more = threading.Event()
    workers.script = [said("the"), more, RuntimeError("a secret")]
    chunks = iter(ask(client, stream=True))
    next(chunks)
    more.set()
    with pytest.raises(openai.APIError, match="failed on the request; ask again"):
        list(chunks)


def test_an_answer_that_never_begins_is_an_error(client: openai.OpenAI, workers: Workers) -> None:
    workers.script = []
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError, match="before it began"):
            ask(client, stream=stream)


def test_unknown_models_are_told_from_absent_workers(client: openai.OpenAI, workers: Workers) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        ask(client, model="gpt")
    assert (unknown.value.param, unknown.value.code) == ("model", "model_not_found")
    assert not workers.asked
    workers.names, workers.script = [], [Refusal(ErrorCode.NO_WORKER, "no worker is there", 5)]
    with pytest.raises(openai.InternalServerError, match="no worker is there") as absent:
        ask(client)
    assert (absent.value.status_code, absent.value.response.headers["Retry-After"]) == (503, "5")


@pytest.mark.parametrize(
    ("fields", "param", "sentence"),
    [
        ({"n": 2}, "n", "one answer is given"),
        ({"response_format": {"type": "json_object"}}, "response_format", "plain text and masks"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", "required"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "'user'"),
        ({"extra_body": {"medplib": {"regions": [{}]}}}, "medplib.regions[0]", "one of box, point, rle and mask"),
        ({"extra_body": {"medplib": {"regions": [{"box": [1]}]}}}, "medplib.regions[0].box", "at least 4 items"),
        ({"extra_body": {"medplib": {"threshold": 1}}}, "medplib.threshold", "less than 1"),
        ({"extra_body": {"medplib": {"treshold": 0.5}}}, "medplib.treshold", "there is no such field"),
        ({"extra_body": {"medplib": {"regions": [{"bx": [1]}]}}}, "medplib.regions[0].bx", "there is no such field"),
    ],
)
def test_malformed_requests_name_their_field(
    client: openai.OpenAI, workers: Workers, fields: dict[str, Any], param: str, sentence: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=sentence) as error:
        ask(client, **fields)
    assert (error.value.param, error.value.type) == (param, "invalid_request_error")
    assert not workers.asked


@pytest.mark.parametrize("route", ["/v1/responses", "/v1/completions", "/v1/messages", "/v1/embeddings"])
def test_apis_that_are_not_here_point_to_the_one_that_is(url: str, route: str) -> None:
    answer = httpx.post(f"{url}{route}", json={}, trust_env=False)
    assert answer.status_code == 404 and "POST /v1/chat/completions" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"[" * 50_000, 400),
        (b'{"model": "nano", "messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        (b'{"model": "\\ud800", "messages": [{"role": "user", "content": [{"type": "\\udfff"}]}]}', 400),
        (b'{"model": "nano", "temperature": NaN, "messages": []}', 400),
        (b"\xff\xfe{}", 400),
        (b'{"messages": [' + b"{}," * 250_001 + b"{}]}", 400),
        (b" " * 1_000_001, 413),
    ],
)
@pytest.mark.parametrize("length_told", [True, False])
def test_bodies_that_are_no_request(url: str, content: bytes, status: int, length_told: bool) -> None:
    body: Any = content if length_told else iter([content[:50], content[50:]])
    answer = httpx.post(f"{url}/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert ("250000 parts" in answer.text) == (len(content) in range(500_000, 1_000_000))


# --- clients that leave ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def connection(url: str, length: int = 0, **fields: Any) -> Iterator[socket.socket]:
    """A connection on which a question was sent, said to be at least so long; closed at the end."""
    body = json.dumps({"model": "nano", "messages": QUESTION, **fields}).encode()
    address = httpx.URL(url)
    assert address.port is not None
    with socket.create_connection((address.host, address.port), timeout=10) as sock:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        sock.sendall(f"{head}Content-Length: {max(length, len(body))}\r\n\r\n".encode() + body)
        yield sock


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("script", [[FOREVER], [said("the"), FOREVER]])
def test_who_leaves_takes_the_request_along(url: str, workers: Workers, script: list[Any], stream: bool) -> None:
    workers.script = script
    with connection(url, stream=stream) as sock:
        assert workers.began.wait(10)
        if stream and len(script) > 1:
            assert b"assistant" in sock.recv(4096)
        assert not workers.ended.is_set()
    assert workers.ended.wait(10)


def test_who_leaves_while_asking_is_no_fault(url: str, caplog: pytest.LogCaptureFixture) -> None:
    with connection(url, length=10_000) as sock:
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(100) == b""  # the server has noticed
    assert httpx.get(f"{url}/models").status_code == 200
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_closing_a_stream_of_the_client_ends_it(client: openai.OpenAI, workers: Workers) -> None:
    workers.script = [said("the"), FOREVER]
    with ask(client, stream=True) as chunks:
        next(iter(chunks))
    assert workers.ended.wait(10)


def test_a_slow_client_delays_no_worker_but_gets_everything(url: str, workers: Workers) -> None:
    words = "word " * 2000
    workers.script = [said(words[:end]) for end in range(0, len(words), 10)] + [said(words, "end")]
    with connection(url, stream=True) as sock:
        assert workers.ended.wait(10)  # nothing was read by the client yet
        received = b""
        while not received.endswith(b"[DONE]\n\n\r\n0\r\n\r\n"):
            received += sock.recv(65536)
    events = [json.loads(line[6:]) for line in received.decode().splitlines() if line.startswith("data: {")]
    told = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert told == words


def test_a_client_that_takes_nothing_is_given_up(url: str, workers: Workers) -> None:
    """More than the socket's buffers hold, to a client that does not read: its answer ends, and the connection."""
    flood = [said("word " * count * 400_000) for count in range(1, 6)]
    workers.script = [part for chunk in flood for part in (chunk, PAUSE)] + [FOREVER]
    with connection(url, stream=True) as sock:
        assert workers.ended.wait(20)
        sock.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            while sock.recv(1 << 20):
                pass


# --- what is documented ---------------------------------------------------------------------------------------------


def test_every_route_is_documented(app: FastAPI) -> None:
    schema = app.openapi()
    routes = {(path, method): route for path, methods in schema["paths"].items() for method, route in methods.items()}
    assert set(routes) == {
        ("/v1/models", "get"),
        ("/v1/models/{model_id}", "get"),
        ("/v1/chat/completions", "post"),
    }
    for route in routes.values():
        assert route["summary"] and route["description"]
        assert {"200", "400", "401", "404", "default"} == set(route["responses"])
        for response in route["responses"].values():
            assert response["content"]["application/json"]["schema"]
    examples = routes["/v1/chat/completions", "post"]["requestBody"]["content"]["application/json"]["examples"]
    assert len(examples) == 3
    for example in examples.values():
        ChatRequest.model_validate(example["value"])
