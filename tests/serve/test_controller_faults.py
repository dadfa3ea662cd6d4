"""Whatever workers and clients do, a request ends in an answer or in a sentence, and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from model.serve.controller import ControllerSettings, make_app
from model.serve.forwarding import ForwardSettings
from model.serve.protocol import Chunk, ErrorCode, GenerateRequest, error_chunk
from model.serve.registry import RegistrySettings
from tests.serve.fake_workers import STREAM_HEAD, ScriptedWorker, piece, raw_worker
from tests.serve.scripted import fail, say, say_for_ever, say_nothing

FIRST = Chunk(text="A", answer="A").encode()
BODY = {"model": "nano", "prompt": "USER: What is it? ASSISTANT:"}


class Running:
    """A controller behind a socket."""

    def __init__(self, url, app):
        self.url, self.inside = url, app.state.controller
        self.http = httpx.Client(base_url=url, timeout=20, trust_env=False)

    def register(self, *urls, speed=1.0):
        for url in urls:
            status = {"model_names": ["nano"], "speed": speed, "queue_length": 0}
            answer = self.http.post("/register_worker", json={"worker_name": url, "worker_status": status})
            assert answer.status_code == 200, answer.text

    def ask(self, **fields):
        """All chunks of an answer; the last one may be an error."""
        response = self.http.post("/worker_generate_stream", json=BODY | fields)
        pieces = response.content.split(b"\0")
        assert response.status_code == 200 and pieces.pop() == b"" and pieces
        return [Chunk.model_validate_json(one) for one in pieces]

    def worker(self, url):
        return next(one for one in self.http.get("/workers").json() if one["worker_name"] == url)

    def counted(self, line):
        """The value of a metric's line."""
        told = self.http.get("/metrics").text.splitlines()
        return next((float(one.rsplit(" ", 1)[1]) for one in told if one.startswith(line + " ")), 0.0)


@contextlib.contextmanager
def controller(serving, **settings):
    app = make_app(ControllerSettings(**settings))
    with serving(app) as url:
        running = Running(url, app)
        try:
            yield running
        finally:
            running.http.close()


def first_choice(running, faulty, healthy):
    """Register a faulty worker that is preferred to a healthy one."""
    running.register(faulty, speed=1000)
    running.register(healthy, speed=0.001)
    for name in (faulty, healthy):  # what is busy is measured by speed
        running.http.post("/receive_heart_beat", json={"worker_name": name, "queue_length": 1})


# --- before the first chunk: somebody else answers ------------------------------------------------------------------

BEFORE = {
    "closes at once": (b"", "close"),
    "resets": (b"", "reset"),
    "sends no HTTP": (b"\x00\xff garbage\r\n\r\n", "close"),
    "ends before it began": (STREAM_HEAD + b"0\r\n\r\n", "close"),
    "dies after the head": (STREAM_HEAD, "reset"),
    "dies in the first chunk": (STREAM_HEAD + piece(b'{"text": "A'), "close"),
    "sends no JSON": (STREAM_HEAD + piece(b"<html>\0") + b"0\r\n\r\n", "close"),
    "sends JSON of another kind": (STREAM_HEAD + piece(b'{"detail": 1}\0') + b"0\r\n\r\n", "close"),
    "answers with 500": (b'HTTP/1.1 500 No\r\nContent-Length: 13\r\n\r\n{"error":"x"}', "close"),
    "is no worker": (b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n", "close"),
    "is locked": (b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n", "close"),
}


@pytest.mark.parametrize("fault", BEFORE, ids=[name.replace(" ", "-") for name in BEFORE])
def test_a_worker_that_fails_before_the_first_chunk_is_replaced(serving, fault):
    healthy = ScriptedWorker(say("A CT."))
    with (
        serving(healthy.app) as good,
        raw_worker(*BEFORE[fault]) as (bad, seen),
        controller(serving) as running,
    ):
        first_choice(running, bad, good)
        assert running.ask()[-1].answer == "A CT." and len(seen) == 1
        assert running.worker(bad)["failures"] == 1 and running.worker(good)["failures"] == 0
        assert running.counted('medplib_controller_tries_total{retry="true"}') == 1


@pytest.mark.parametrize("fault", BEFORE, ids=[name.replace(" ", "-") for name in BEFORE])
def test_alone_it_is_told_in_a_sentence(serving, fault):
    with raw_worker(*BEFORE[fault]) as (bad, _), controller(serving) as running:
        running.register(bad)
        (chunk,) = running.ask()
        assert chunk.error_code == ErrorCode.FAILED and chunk.text
        assert running.inside.registry.get(bad).running == 0


def test_a_worker_that_is_not_there_is_replaced(serving, port):
    healthy = ScriptedWorker(say("A CT."))
    with serving(healthy.app) as good, controller(serving) as running:
        first_choice(running, f"http://127.0.0.1:{port}", good)
        assert running.ask()[-1].answer == "A CT."


@pytest.mark.parametrize(
    ("status", "headers", "code"),
    [(429, {"Retry-After": "7"}, ErrorCode.BUSY), (503, {"Retry-After": "7"}, ErrorCode.DRAINING)],
)
def test_a_worker_that_takes_nothing_is_replaced_and_not_blamed(serving, status, headers, code):
    busy = ScriptedWorker(refusal=(status, {"error": "not now"}, headers))
    healthy = ScriptedWorker(say("A CT."))
    with serving(busy.app) as bad, serving(healthy.app) as good, controller(serving) as running:
        first_choice(running, bad, good)
        assert running.ask()[-1].answer == "A CT." and len(busy.requests) == 1
        assert running.worker(bad)["failures"] == 0
        running.http.post("/drain_worker", json={"worker_name": good})
        running.register(bad)  # anew, as a rested one is not asked
        assert running.ask()[-1].error_code == code
        running.register(bad)
        question = {"role": "user", "content": [_picture(), {"type": "text", "text": "What is it?"}]}
        answer = running.http.post("/v1/chat/completions", json={"model": "nano", "messages": [question]})
        assert answer.status_code == status and answer.headers["retry-after"] == "7"
        assert answer.json()["error"]["message"] == "not now"


def _picture():
    data = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="  # 1×1
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def test_a_draining_worker_rests(serving):
    draining = ScriptedWorker(refusal=(503, {"error": "not now"}, {}))
    with serving(draining.app) as url, controller(serving) as running:
        running.register(url)
        for _ in range(3):
            running.ask()
        assert len(draining.requests) == 1 and running.worker(url)["resting"]


def test_what_the_client_did_wrong_is_not_tried_elsewhere(serving):
    first = ScriptedWorker(refusal=(400, {"error": "the image is damaged"}, {}))
    second = ScriptedWorker(refusal=(400, {"error": "the image is damaged"}, {}))
    with serving(first.app) as one, serving(second.app) as two, controller(serving) as running:
        running.register(one, two)
        (chunk,) = running.ask()
        assert chunk.error_code == ErrorCode.BAD_INPUT and chunk.text == "the image is damaged"
        assert len(first.requests) + len(second.requests) == 1
        assert running.worker(one)["failures"] == running.worker(two)["failures"] == 0


def test_an_error_in_the_first_chunk_is_an_error_before_it(serving):
    broken = ScriptedWorker(fail(error_chunk(ErrorCode.FAILED, "out of memory")))
    healthy = ScriptedWorker(say("A CT."))
    with serving(broken.app) as bad, serving(healthy.app) as good, controller(serving) as running:
        first_choice(running, bad, good)
        assert [chunk.error_code for chunk in running.ask()] == [0] * 3
        running.http.post("/drain_worker", json={"worker_name": good})
        (chunk,) = running.ask()
        assert chunk.error_code == ErrorCode.FAILED and chunk.text == "out of memory"


def test_so_many_workers_are_tried_and_no_more(serving):
    workers = [ScriptedWorker(refusal=(500, {}, {})) for _ in range(4)]
    with contextlib.ExitStack() as stack:
        urls = [stack.enter_context(serving(worker.app)) for worker in workers]
        running = stack.enter_context(controller(serving, forwarding=ForwardSettings(tries=2)))
        running.register(*urls)
        assert running.ask()[0].error_code == ErrorCode.FAILED
    assert sum(len(worker.requests) for worker in workers) == 2


def test_a_failing_worker_is_left_alone_and_tried_again(serving, wait_until):
    worker = ScriptedWorker(say("A CT."), refusal=(500, {"error": "no memory"}, {}))
    settings = RegistrySettings(max_failures=2, cool_down=0.5)
    with serving(worker.app) as url, controller(serving, registry=settings) as running:
        running.register(url)
        codes = [running.ask()[-1].error_code for _ in range(4)]
        assert codes == [ErrorCode.FAILED, ErrorCode.FAILED, ErrorCode.NO_WORKER, ErrorCode.NO_WORKER]
        assert len(worker.requests) == 2 and running.http.get("/readyz").status_code == 503
        assert running.http.post("/list_models").json() == {"models": ["nano"]}
        worker.refusal = None
        wait_until(lambda: running.ask()[-1].error_code == 0, what="the trial")
        assert len(worker.requests) == 3 and not running.worker(url)["resting"]


# --- after the first chunk: the client is told ----------------------------------------------------------------------

AFTER = {
    "closes": (STREAM_HEAD + piece(FIRST), "close"),
    "resets": (STREAM_HEAD + piece(FIRST), "reset"),
    "dies in a chunk": (STREAM_HEAD + piece(FIRST + FIRST[:10]), "close"),
    "ends in a chunk": (STREAM_HEAD + piece(FIRST + FIRST[:10]) + b"0\r\n\r\n", "close"),
    "sends garbage": (STREAM_HEAD + piece(FIRST) + piece(b"\xff\xfe\0") + b"0\r\n\r\n", "close"),
    "breaks HTTP": (STREAM_HEAD + piece(FIRST) + b"zz\r\n", "close"),
}


@pytest.mark.parametrize("fault", AFTER, ids=[name.replace(" ", "-") for name in AFTER])
def test_a_worker_that_fails_later_is_told_in_the_last_chunk(serving, fault):
    other = ScriptedWorker()
    with serving(other.app) as good, raw_worker(*AFTER[fault]) as (bad, _), controller(serving) as running:
        first_choice(running, bad, good)
        chunks = running.ask()
        assert [chunk.error_code for chunk in chunks][-1] == ErrorCode.FAILED and chunks[-1].text
        assert not other.requests  # a client never reads two beginnings
        assert running.worker(bad)["failures"] == 1


def test_a_worker_that_always_dies_on_the_way_is_left_alone(serving):
    with (
        raw_worker(*AFTER["resets"]) as (bad, seen),
        controller(
            serving, registry=RegistrySettings(max_failures=2), forwarding=ForwardSettings(restart_wait=0.1)
        ) as running,
    ):
        running.register(bad)
        assert [running.ask()[-1].error_code for _ in range(3)][-1] == ErrorCode.NO_WORKER
        assert len(seen) == 2


def test_a_workers_own_late_error_comes_through(serving):
    worker = ScriptedWorker(fail(Chunk(text="A", answer="A"), error_chunk(ErrorCode.TIMEOUT, "it took too long")))
    with serving(worker.app) as url, controller(serving) as running:
        running.register(url)
        assert [chunk.error_code for chunk in running.ask()] == [0, ErrorCode.TIMEOUT]


def test_a_chunk_without_end_fills_no_memory(serving):
    with (
        raw_worker(STREAM_HEAD + piece(FIRST) + piece(b'{"text": "' + b"x" * 300_000), "hold") as (bad, _),
        controller(serving, forwarding=ForwardSettings(max_chunk_bytes=200_000)) as running,
    ):
        running.register(bad)
        assert running.ask()[-1].error_code == ErrorCode.FAILED


# --- silence --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", STREAM_HEAD, STREAM_HEAD + piece(FIRST)])
def test_a_worker_that_says_nothing_is_given_up(serving, data):
    with (
        raw_worker(data, "hold") as (bad, _),
        controller(serving, forwarding=ForwardSettings(silence_timeout=0.3)) as running,
    ):
        running.register(bad)
        last = running.ask()[-1]
        assert last.error_code == ErrorCode.TIMEOUT and "0.3 s" in last.text


def test_nobody_waits_for_a_silent_worker_to_come_back(serving):
    with (
        raw_worker(b"", "hold") as (bad, _),
        controller(
            serving, forwarding=ForwardSettings(silence_timeout=0.3), registry=RegistrySettings(max_failures=1)
        ) as running,
    ):
        running.register(bad)
        assert running.ask()[-1].error_code == ErrorCode.TIMEOUT
        begun = time.monotonic()
        assert running.ask()[-1].error_code == ErrorCode.NO_WORKER and time.monotonic() - begun < 5


@pytest.mark.parametrize("data", [b"", STREAM_HEAD + piece(FIRST)])
def test_a_worker_whose_heart_stops_is_given_up(serving, data):
    with (
        raw_worker(data, "hold") as (bad, _),
        controller(serving, registry=RegistrySettings(expiry=0.4)) as running,
    ):
        running.register(bad)
        last = running.ask()[-1]
        assert last.error_code == ErrorCode.FAILED and "silent" in last.text


def test_a_status_that_does_not_come_is_not_waited_for(serving):
    with (
        raw_worker(b"", "hold") as (bad, _),
        controller(serving, forwarding=ForwardSettings(status_timeout=0.2)) as running,
    ):
        answer = running.http.post("/register_worker", json={"worker_name": bad})
        assert answer.status_code == 504 and "within 0.2 s" in answer.json()["error"]


# --- clients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [say_for_ever, say_nothing])
def test_a_client_that_leaves_takes_its_request_with_it(serving, wait_until, script):
    worker = ScriptedWorker(script)
    with serving(worker.app) as url, controller(serving) as running:
        running.register(url)
        body = json.dumps(BODY).encode()
        with socket.create_connection(("127.0.0.1", int(running.url.rsplit(":", 1)[1]))) as client:
            head = f"POST /worker_generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            wait_until(lambda: worker.requests, what="the request")
        wait_until(lambda: worker.left == 1, what="the worker's notice")
        wait_until(lambda: running.inside.registry.get(url).running == 0, what="the release")
        assert running.counted('medplib_controller_requests_total{outcome="left"}') == 1
        assert running.worker(url)["failures"] == 0


def say_much(pieces, size):
    async def script(_: GenerateRequest):
        for count in range(pieces):
            await asyncio.sleep(0)  # a server drops what it sends to nobody without ever waiting
            yield Chunk(text="x" * size, answer=str(count))

    return script


def test_a_slow_client_slows_the_worker_down(serving, wait_until):
    worker = ScriptedWorker(say_much(2000, 100_000))  # 200 MB
    with serving(worker.app) as url, controller(serving) as running:
        running.register(url)
        with running.http.stream("POST", "/worker_generate_stream", json=BODY) as response:
            raw = response.iter_raw()
            next(raw)

            def settled():
                before = worker.sent
                time.sleep(0.2)
                return worker.sent == before

            wait_until(settled, what="a full way")
            assert worker.sent < 60_000_000
            assert running.http.get("/livez").status_code == 200
        wait_until(lambda: worker.left == 1, what="the worker's notice")


def test_a_client_that_takes_nothing_is_dropped(serving, wait_until):
    worker = ScriptedWorker(say_much(2000, 100_000))
    with serving(worker.app) as url, controller(serving, client_timeout=0.5) as running:
        running.register(url)
        body = json.dumps(BODY).encode()
        with socket.create_connection(("127.0.0.1", int(running.url.rsplit(":", 1)[1]))) as client:
            head = f"POST /worker_generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            wait_until(lambda: worker.left == 1, what="the worker's notice")
            assert running.inside.registry.get(url).running == 0


def test_many_at_once_are_all_answered(serving):
    steady = ScriptedWorker(say("A CT of a chest.", pause=0.01))
    broken = ScriptedWorker(refusal=(500, {}, {}))
    with (
        serving(steady.app) as good,
        serving(broken.app) as bad,
        raw_worker(*AFTER["resets"]) as (dying, _),
        controller(serving, registry=RegistrySettings(max_failures=3, cool_down=60)) as running,
    ):
        running.register(good, bad, dying)
        with ThreadPoolExecutor(32) as pool:
            answers = list(pool.map(lambda _: running.ask(), range(128)))
        failed = [chunks for chunks in answers if chunks[-1].error_code]
        assert all(chunks[-1].answer == "A CT of a chest." for chunks in answers if not chunks[-1].error_code)
        assert len(failed) <= 64 and all(chunks[-1].text for chunks in failed)
        assert running.worker(bad)["resting"] and running.worker(dying)["resting"]
        assert all(worker.running == 0 for worker in running.inside.registry.workers())
        assert running.counted("medplib_controller_running") == 0


# --- stopping -------------------------------------------------------------------------------------------------------


def test_a_stopping_controller_ends_answers_with_a_sentence(serving):
    worker = ScriptedWorker(say_for_ever)
    app = make_app(ControllerSettings(grace=1.2))
    loops = []

    @app.post("/loop")
    async def loop():
        loops.append(asyncio.get_running_loop())

    with serving(worker.app) as url, serving(app) as address:
        running = Running(address, app)
        running.register(url)
        running.http.post("/loop")
        stop = app.state.controller.stop
        threading.Timer(0.3, lambda: asyncio.run_coroutine_threadsafe(stop(), loops[0])).start()
        last = running.ask()[-1]
        assert last.error_code == ErrorCode.FAILED and "being stopped" in last.text
        assert running.http.get("/readyz").status_code == 503
        assert running.worker(url)["failures"] == 0
        running.http.close()


# --- a worker that is started again -----------------------------------------------------------------------------------


def test_a_request_waits_for_a_worker_that_is_started_again(serving, port):
    with controller(serving, registry=RegistrySettings(cool_down=60)) as running, ThreadPoolExecutor(4) as pool:
        with serving(ScriptedWorker(say("Before.")).app, port) as url:
            running.register(url)
        asking = [pool.submit(running.ask) for _ in range(4)]  # it was killed, and takes no connections
        time.sleep(0.5)
        assert not any(one.done() for one in asking) and running.counted("medplib_controller_workers_fit") == 0
        with serving(ScriptedWorker(say("After.")).app, port) as url:
            running.register(url)
            assert [one.result(10)[-1].answer for one in asking] == ["After."] * 4


def test_nobody_waits_for_ever_or_for_a_model_that_was_never_there(serving, port):
    with controller(serving, forwarding=ForwardSettings(restart_wait=0.3)) as running:
        begun = time.monotonic()
        assert "no model is available" in running.ask()[-1].text and time.monotonic() - begun < 0.3
        running.register(f"http://127.0.0.1:{port}")
        assert running.ask()[-1].error_code == ErrorCode.NO_WORKER and time.monotonic() - begun > 0.3
