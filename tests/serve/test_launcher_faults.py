"""What may happen to servers happens to real ones: nothing hangs, and every request ends in an answer or a sentence.

One stack of two workers with the nano serves all tests of this file, each of which leaves it calm.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from PIL import Image

from model.processing.conversation import Turn, render
from model.serve.auth import bearer
from model.serve.launcher import API_KEY, Launcher, LaunchSettings, Program
from model.serve.protocol import Chunk, ChunkReader, ErrorCode, GenerateRequest
from tests.conftest import ROOT

pytestmark = pytest.mark.slow  # servers of several programs start
NANO = ROOT / "assets" / "medplib-nano"
IMAGES = sorted((ROOT / "data" / "sample" / "images").glob("fundus*.png"))
STREAM = "/worker_generate_stream"
DEADLINE = 60.0  # seconds within which every request has to have ended, on a machine that has other things to do
WELL_TOLD = {ErrorCode.FAILED, ErrorCode.BUSY, ErrorCode.NO_WORKER, ErrorCode.TIMEOUT, ErrorCode.DRAINING}
Wait = Callable[..., Any]


@pytest.fixture(scope="module")
def stack() -> Iterator[Launcher]:
    settings = LaunchSettings(
        NANO,
        web=False,
        devices=["cpu", "cpu"],
        worker_flags=["--heartbeat", "0.5", "--slots", "4", "--max-waiting", "40"],
        controller_flags=["--cool-down", "0.5"],
        grace=5,
    )
    with Launcher(settings, lambda line: None) as running:
        yield running


@pytest.fixture(autouse=True)
def calm(stack: Launcher, wait_until: Wait) -> Iterator[None]:
    """Afterwards no program has anything left to do; those that were killed are on their way back."""
    yield
    wait_until(lambda: fit_workers(stack) >= 1 and not queued(stack), DEADLINE, "calm")


@pytest.fixture
def both(stack: Launcher, wait_until: Wait) -> None:
    """Both workers are there."""
    wait_until(lambda: fit_workers(stack) == 2, DEADLINE, "two workers")


def fit_workers(stack: Launcher) -> int:
    """Workers that answer, where the controller knows as many; what crashed is started again meanwhile."""
    stack.restart_dead()
    answering = 0
    for worker in stack.programs[1:]:
        with contextlib.suppress(httpx.TransportError):
            answering += httpx.get(f"{worker.address}/readyz", trust_env=False).status_code == 200
    answer = httpx.get(f"{address(stack)}/readyz", trust_env=False)
    return min(answering, answer.json()["workers"]) if answer.status_code == 200 else 0


def queued(stack: Launcher) -> int:
    """Requests that workers have."""
    count = 0
    for worker in stack.programs[1:]:
        with contextlib.suppress(httpx.TransportError):  # it is on its way back
            key = bearer(worker.environment[API_KEY])
            answer = httpx.post(f"{worker.address}/worker_get_status", headers=key, trust_env=False)
            count += answer.json()["queue_length"]
    return count


def address(stack: Launcher) -> str:
    return stack["controller"].address


def body(question: str = "Please segment the optic disc.", image: bytes | None = None, number: int = 0) -> bytes:
    picture = base64.b64encode(image or IMAGES[number % len(IMAGES)].read_bytes()).decode()
    prompt = render([Turn("human", f"<image>\n{question}")])
    asked = GenerateRequest(model="medplib-nano", prompt=prompt, images=[picture], max_new_tokens=32)
    return asked.model_dump_json().encode()


async def ask(client: httpx.AsyncClient, url: str, content: bytes, heard: list[Chunk] | None = None) -> Chunk | str:
    """The last chunk of an answer, or what became of the connection."""
    chunks, reader = heard if heard is not None else [], ChunkReader()
    try:
        async with asyncio.timeout(DEADLINE), client.stream("POST", url + STREAM, content=content) as response:
            async for data in response.aiter_raw():
                chunks += reader.feed(data)
    except httpx.TransportError as error:
        return type(error).__name__
    return chunks[-1]


async def ask_together(stack: Launcher, count: int, meanwhile: Callable[[], None] | None = None) -> list[Chunk | str]:
    """Many requests at once; ``meanwhile`` is done as soon as the first of them is being answered."""
    limits = httpx.Limits(max_connections=None)
    heard: list[Chunk] = []
    async with httpx.AsyncClient(timeout=DEADLINE, limits=limits, trust_env=False) as client:
        first = asyncio.create_task(ask(client, address(stack), body(number=0), heard))
        others = [asyncio.create_task(ask(client, address(stack), body(number=number))) for number in range(1, count)]
        if meanwhile is not None:
            while not heard and not first.done():
                await asyncio.sleep(0.001)
            meanwhile()
        return list(await asyncio.gather(first, *others))


def answered(outcome: Chunk | str) -> bool:
    return isinstance(outcome, Chunk) and outcome.error_code == 0 and outcome.finish == "end" and bool(outcome.answer)


def told(outcome: Chunk | str) -> bool:
    """An error that says what happened."""
    return isinstance(outcome, Chunk) and outcome.error_code in WELL_TOLD and len(outcome.text) > 20


def send_signal(child: Program, number: signal.Signals) -> None:
    assert child.pid is not None
    os.kill(child.pid, number)


def test_a_worker_that_dies_before_the_first_word_is_replaced_by_another(stack: Launcher) -> None:
    """It takes connections and says nothing, then is gone: its requests are answered all the same."""
    stopped = stack["worker 1"]
    send_signal(stopped, signal.SIGSTOP)

    async def scenario() -> list[Chunk | str]:
        asking = asyncio.create_task(ask_together(stack, 6))
        await asyncio.sleep(0.5)  # for some to be waiting at the one that does not answer
        send_signal(stopped, signal.SIGKILL)
        return await asking

    outcomes = asyncio.run(scenario())
    assert all(answered(outcome) for outcome in outcomes), outcomes


@contextlib.contextmanager
def connections(stack: Launcher, count: int) -> Iterator[list[socket.socket]]:
    """Bare connections to the controller."""
    place = urlsplit(address(stack))
    assert place.hostname and place.port
    opened = [socket.create_connection((place.hostname, place.port), timeout=DEADLINE) for _ in range(count)]
    try:
        yield opened
    finally:
        for one in opened:
            one.close()


def request_text(content: bytes, length: int | None = None) -> bytes:
    head = f"POST {STREAM} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {length or len(content)}\r\n\r\n".encode() + content


def test_sockets_that_say_nothing_or_half_of_it_hold_nobody_up(stack: Launcher) -> None:
    with connections(stack, 90) as opened:
        for one in opened[30:60]:
            one.sendall(b"POST " + STREAM.encode() + b" HTTP/1.1\r\nHost: he")
        for one in opened[60:]:
            one.sendall(request_text(b'{"model": "medplib-nano", "prompt": "', 5000))
        assert all(answered(outcome) for outcome in asyncio.run(ask_together(stack, 4)))
        for one in opened:  # gone without a goodbye
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_clients_that_read_nothing_or_leave_hold_nobody_up(stack: Launcher) -> None:
    with connections(stack, 30) as opened:
        for number, one in enumerate(opened):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            one.sendall(request_text(body(number=number)))
        for one in opened[:15]:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            one.close()
        assert all(answered(outcome) for outcome in asyncio.run(ask_together(stack, 4)))
    # that their requests come to an end too, ``calm`` looks at


def test_a_client_that_reads_slowly_gets_its_whole_answer(stack: Launcher) -> None:
    with connections(stack, 1) as (one,):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        one.sendall(request_text(body()).replace(b"Host: localhost", b"Host: localhost\r\nConnection: close"))
        received = b""
        while piece := one.recv(64):
            received += piece
            time.sleep(0.0005)
    assert b" 200 OK" in received and b'"finish":"end"' in received and b'"masks":[{' in received


@pytest.fixture(scope="module")
def huge() -> bytes:
    """A PNG of 10,000 × 10,000 pixels in a few kilobytes."""
    stream = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.usefixtures("both")
def test_a_huge_picture_is_refused_before_it_is_decoded(stack: Launcher, huge: bytes) -> None:
    before = [psutil.Process(worker.pid).memory_info().rss for worker in stack.programs[1:]]

    async def scenario() -> list[Chunk | str]:
        async with httpx.AsyncClient(timeout=DEADLINE, trust_env=False) as client:
            return [await ask(client, address(stack), body(image=huge)) for _ in range(4)]

    for outcome in asyncio.run(scenario()):
        assert isinstance(outcome, Chunk) and outcome.error_code == ErrorCode.BAD_INPUT and "pixels" in outcome.text
    url = f"data:image/png;base64,{base64.b64encode(huge).decode()}"
    content = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": url}}]
    message = {"model": "medplib-nano", "messages": [{"role": "user", "content": content}]}
    answer = httpx.post(f"{address(stack)}/v1/chat/completions", json=message, timeout=DEADLINE, trust_env=False)
    assert answer.status_code == 400 and "pixels" in json.dumps(answer.json())
    after = [psutil.Process(worker.pid).memory_info().rss for worker in stack.programs[1:]]
    assert all(late - early < 100 * 2**20 for early, late in zip(before, after, strict=True))  # decoded it takes 300 MB


@pytest.mark.usefixtures("both")
def test_a_worker_killed_in_the_middle_of_its_answers(stack: Launcher) -> None:
    outcomes = asyncio.run(ask_together(stack, 24, lambda: send_signal(stack["worker 2"], signal.SIGKILL)))
    assert all(answered(outcome) or told(outcome) for outcome in outcomes), outcomes
    assert sum(map(answered, outcomes)) >= 12  # the other worker's, at least


def test_a_controller_killed_comes_back_with_its_workers(stack: Launcher, wait_until: Wait) -> None:
    outcomes = asyncio.run(ask_together(stack, 8, lambda: send_signal(stack["controller"], signal.SIGKILL)))
    assert all(isinstance(outcome, str) or answered(outcome) for outcome in outcomes), outcomes

    wait_until(lambda: fit_workers(stack) >= 1, DEADLINE, "the controller with its workers")
    assert all(answered(outcome) for outcome in asyncio.run(ask_together(stack, 4)))


@pytest.mark.usefixtures("both")
def test_two_hundred_requests_at_once_all_end(stack: Launcher) -> None:
    outcomes = asyncio.run(ask_together(stack, 200))
    assert all(answered(outcome) or told(outcome) for outcome in outcomes), outcomes
    refused = [outcome for outcome in outcomes if isinstance(outcome, Chunk) and outcome.error_code]
    assert all(outcome.error_code == ErrorCode.BUSY for outcome in refused)
    assert len(outcomes) - len(refused) >= 80  # what two queues of 44 hold, less a few that came at a bad moment
