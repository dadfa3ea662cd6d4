"""The controller's protocol, over real sockets, with scripted workers behind it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading

import httpx
import pytest

from model.serve.client import AnswerFailed, ControllerClient
from model.serve.controller import ControllerSettings, make_app
from model.serve.heartbeat import Heart, Registration
from model.serve.limits import ServeLimits
from model.serve.protocol import Chunk, ErrorCode, GenerateRequest, WorkerStatus
from model.serve.registry import RegistrySettings
from tests.serve.fake_workers import ScriptedWorker
from tests.serve.scripted import say

ASKED = GenerateRequest(model="nano", prompt="USER: What is it? ASSISTANT:")
KEY = {"Authorization": "Bearer worker-key"}


@contextlib.contextmanager
def controller(serving, settings=None, port=None):
    """A running controller, as an HTTP client of it."""
    with (
        serving(make_app(settings or ControllerSettings()), port=port) as url,
        httpx.Client(base_url=url, timeout=20, trust_env=False) as client,
    ):
        yield client


def register(client, url, worker=None, headers=None, **fields):
    """Register a worker, by its own word where one is given."""
    if worker is not None:
        fields["worker_status"] = {"model_names": worker.models, "speed": worker.speed, "queue_length": 0}
    return client.post("/register_worker", json={"worker_name": url, **fields}, headers=headers)


def ask(client, **fields):
    """All chunks of an answer."""
    body = {"model": "nano", "prompt": "USER: What is it? ASSISTANT:"} | fields
    response = client.post("/worker_generate_stream", json=body)
    assert response.status_code == 200
    pieces = response.content.split(b"\0")
    assert pieces.pop() == b""
    return [Chunk.model_validate_json(one) for one in pieces]


def test_an_answer_comes_as_the_worker_sends_it(serving):
    worker = ScriptedWorker(say("The image is a CT.", ({"label": "disc"},)))
    with serving(worker.app) as url, controller(serving) as client:
        assert register(client, url, worker).status_code == 200
        chunks = ask(client, unknown_field=[1], images=["aGk="])
    assert [chunk.answer for chunk in chunks][:2] == ["The", "The image"]
    assert chunks[-1].masks == [{"label": "disc"}] and chunks[-1].error_code == 0
    assert worker.requests[0]["unknown_field"] == [1] and worker.requests[0]["images"] == ["aGk="]


def test_the_client_of_the_page_speaks_to_it(serving):
    worker = ScriptedWorker(say("A CT."))
    with serving(worker.app) as url, controller(serving) as client:
        register(client, url, worker)
        page = ControllerClient(str(client.base_url))
        page.refresh()
        assert page.models() == ["nano"]
        assert [chunk.answer for chunk in page.stream(ASKED)][-1] == "A CT."
        with pytest.raises(AnswerFailed, match="there is no model 'seven'; there is nano") as told:
            list(page.stream(ASKED.model_copy(update={"model": "seven"})))
        assert told.value.code is ErrorCode.BAD_INPUT


def test_a_worker_that_sends_no_status_is_asked_for_it(serving):
    worker = ScriptedWorker(models=["nano", "seven"], speed=3)
    with serving(worker.app) as url, controller(serving) as client:
        register(client, url + "/")
        (told,) = client.get("/workers").json()
    assert told["worker_name"] == url and told["model_names"] == ["nano", "seven"] and told["speed"] == 3
    assert worker.asked_status == 1


def test_a_worker_that_cannot_tell_its_status_is_refused(serving, port):
    with controller(serving) as client:
        answer = register(client, f"http://127.0.0.1:{port}")
        assert answer.status_code == 400 and "does not report its status" in answer.json()["error"]
        assert client.post("/list_models").json() == {"models": []}


def test_models_are_those_of_all_workers(serving):
    first, second = ScriptedWorker(models=["nano"]), ScriptedWorker(models=["seven", "nano"])
    with serving(first.app) as one, serving(second.app) as two, controller(serving) as client:
        register(client, one, first)
        register(client, two, second)
        assert client.post("/list_models").json() == {"models": ["nano", "seven"]}
        assert client.post("/get_worker_address", json={"model": "seven"}).json() == {"address": two}
        assert client.post("/get_worker_address", json={"model": "other"}).json() == {"address": ""}
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["nano", "seven"]


def test_refreshing_asks_every_worker_anew(serving):
    worker = ScriptedWorker()
    with serving(worker.app) as url, controller(serving) as client:
        register(client, url, worker)
        worker.models = ["seven"]
        assert client.post("/refresh_all_workers").json() == {"models": ["seven"]}
        assert client.post("/list_models").json() == {"models": ["seven"]}


def test_refreshing_gives_up_who_sends_no_heartbeats_and_does_not_answer(serving, port):
    with controller(serving) as client:
        worker = ScriptedWorker(models=["gone"])
        register(client, f"http://127.0.0.1:{port}", worker, check_heart_beat=False)
        other = ScriptedWorker(models=["silent"])
        register(client, "http://127.0.0.1:1", other)
        assert client.post("/refresh_all_workers").json() == {"models": ["silent"]}


def test_the_only_model_answers_a_request_that_names_none(serving):
    worker = ScriptedWorker(say("A CT."))
    with serving(worker.app) as url, controller(serving) as client:
        register(client, url, worker)
        assert ask(client, model="")[-1].answer == "A CT."


def test_without_workers_it_says_so(serving):
    with controller(serving) as client:
        (chunk,) = ask(client)
        assert chunk.error_code == ErrorCode.NO_WORKER and "no model is available" in chunk.text
        answer = client.get("/readyz")
        assert answer.status_code == 503 and "no worker is there" in answer.json()["error"]
        assert client.get("/livez").status_code == 200


def test_a_drained_worker_gets_nothing_until_it_is_let(serving):
    worker = ScriptedWorker()
    with serving(worker.app) as url, controller(serving) as client:
        register(client, url, worker)
        assert client.get("/readyz").json() == {"ready": True, "workers": 1}
        assert client.post("/drain_worker", json={"worker_name": url}).json()["draining"] is True
        assert ask(client)[0].error_code == ErrorCode.NO_WORKER and client.get("/readyz").status_code == 503
        assert client.post("/drain_worker", json={"worker_name": url, "drain": False}).status_code == 200
        assert ask(client)[-1].error_code == 0
        unknown = client.post("/drain_worker", json={"worker_name": "http://127.0.0.1:1"})
        assert unknown.status_code == 404 and "GET /workers" in unknown.json()["error"]


def test_a_controller_can_stand_behind_another(serving):
    fast, slow = ScriptedWorker(say("A CT."), speed=3), ScriptedWorker(models=["seven"])
    with (
        serving(fast.app) as one,
        serving(slow.app) as two,
        controller(serving) as behind,
        controller(serving) as front,
    ):
        register(behind, one, fast)
        register(behind, two, slow)
        status = WorkerStatus.model_validate(behind.post("/worker_get_status").json())
        assert status.model_names == ["nano", "seven"] and status.speed == 4 and status.queue_length == 0
        assert register(front, str(behind.base_url).rstrip("/"), check_heart_beat=False).status_code == 200
        assert front.post("/list_models").json() == {"models": ["nano", "seven"]}
        assert ask(front)[-1].answer == "A CT." and len(fast.requests) == 1


# --- keys -----------------------------------------------------------------------------------------------------------

WORKER_ROUTES = [
    ("/register_worker", {"worker_name": "http://127.0.0.1:1", "worker_status": {"model_names": ["nano"]}}),
    ("/receive_heart_beat", {"worker_name": "http://127.0.0.1:1", "queue_length": 0}),
    ("/drain_worker", {"worker_name": "http://127.0.0.1:1"}),
]
CLIENT_ROUTES = [
    ("/list_models", None),
    ("/refresh_all_workers", None),
    ("/get_worker_address", {"model": "nano"}),
    ("/worker_get_status", None),
    ("/worker_generate_stream", {"model": "nano", "prompt": "x"}),
    ("/v1/chat/completions", {"model": "nano", "messages": [{"role": "user", "content": "x"}]}),
]


@pytest.fixture(scope="module")
def locked(serving):
    """A controller with both keys."""
    with controller(serving, ControllerSettings(api_key="worker-key", client_key="client-key")) as client:
        yield client


@pytest.mark.parametrize(("path", "body"), WORKER_ROUTES)
@pytest.mark.parametrize("shown", [None, "", "Bearer client-key", "Bearer worker-kez", "Basic worker-key"])
def test_workers_show_their_key(locked, path, body, shown):
    answer = locked.post(path, json=body, headers={"Authorization": shown} if shown is not None else {})
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert "key" in answer.json()["error"] and answer.json()["error_code"] == ErrorCode.BAD_INPUT


@pytest.mark.parametrize(("path", "body"), CLIENT_ROUTES)
@pytest.mark.parametrize("shown", [None, "Bearer wrong"])
def test_clients_show_their_key(locked, path, body, shown):
    answer = locked.post(path, json=body, headers={"Authorization": shown} if shown else {})
    assert answer.status_code == 401
    told = answer.json()["error"]
    assert "client key" in (told["message"] if path.startswith("/v1/") else told)


@pytest.mark.parametrize("key", ["client-key", "worker-key"])
def test_who_shows_a_key_is_let_in(locked, key):
    shown = {"Authorization": f"Bearer {key}"}
    for path, body in CLIENT_ROUTES[:-1]:
        assert locked.post(path, json=body, headers=shown).status_code == 200
    assert locked.get("/v1/models", headers=shown).status_code == 200
    assert locked.get("/v1/models").status_code == 401


def test_workers_are_listed_for_those_with_their_key(locked):
    assert locked.get("/workers", headers={"Authorization": "Bearer client-key"}).status_code == 401
    assert locked.get("/workers", headers=KEY).status_code == 200


@pytest.mark.parametrize("path", ["/livez", "/metrics"])
def test_monitors_need_no_key(locked, path):
    assert locked.get(path).status_code == 200


def test_the_worker_is_shown_the_key(serving):
    worker = ScriptedWorker()
    settings = ControllerSettings(api_key="worker-key")
    with serving(worker.app) as url, controller(serving, settings) as client:
        assert register(client, url, worker, headers=KEY).status_code == 200
        ask(client)
    assert worker.headers[0]["authorization"] == "Bearer worker-key"
    assert worker.headers[0]["host"] == url.removeprefix("http://")


def test_a_page_in_a_browser_registers_no_worker(serving):
    with controller(serving) as client:
        answer = register(client, "http://127.0.0.1:1", ScriptedWorker(), headers={"Origin": "http://evil.example"})
        assert answer.status_code == 403 and "--api-key" in answer.json()["error"]
        body = json.dumps({"worker_name": "http://127.0.0.1:1", "worker_status": {"model_names": ["nano"]}})
        plain = client.post("/register_worker", content=body, headers={"Content-Type": "text/plain"})
        assert plain.status_code == 400
        assert client.get("/workers").json() == []


def test_without_a_key_no_other_machine_registers(serving):
    with controller(serving) as client:  # as a proxy of this machine tells where a request comes from
        answer = register(client, "http://192.0.2.5:1", ScriptedWorker(), headers={"X-Forwarded-For": "192.0.2.5"})
        assert answer.status_code == 403 and "--api-key" in answer.json()["error"]


@pytest.mark.parametrize(
    "name",
    [
        "http://169.254.169.254",
        "http://169.254.169.254/latest/meta-data",
        "http://example.org",
        "http://user:word@127.0.0.1:1",
        "http://127.0.0.1:1/path",
        "http://127.0.0.1:1?query",
        "http://0.0.0.0:1",
        "http://10.0.0.1:1",
        "gopher://127.0.0.1:1",
        "",
    ],
)
def test_a_worker_is_never_where_it_must_not_be(serving, locked, name):
    answer = register(locked, name, headers=KEY)
    assert answer.status_code == 400 and answer.json()["error"]
    assert locked.get("/workers", headers=KEY).json() == []


def test_a_redirect_is_not_followed(serving):
    elsewhere = ScriptedWorker()
    with serving(elsewhere.app) as target:
        moved = ScriptedWorker(refusal=(307, {}, {"Location": f"{target}/worker_generate_stream"}))
        with serving(moved.app) as url, controller(serving) as client:
            register(client, url, moved)
            (chunk,) = ask(client)
    assert chunk.error_code == ErrorCode.FAILED and "307" in chunk.text
    assert moved.requests and not elsewhere.requests


# --- malformed requests ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/register_worker", {}, "worker_name"),
        ("/register_worker", {"worker_name": 3}, "worker_name"),
        ("/register_worker", {"worker_name": "http://127.0.0.1:1", "worker_status": {"model_names": []}}, "models"),
        ("/register_worker", {"worker_name": "http://127.0.0.1:1", "worker_status": {"speed": -1}}, "worker_status"),
        ("/receive_heart_beat", {"worker_name": "x"}, "expected http://host:port"),
        ("/receive_heart_beat", {"worker_name": "http://a:1", "queue_length": -1}, "queue_length"),
        ("/get_worker_address", {}, "model"),
        ("/worker_generate_stream", [1], "no JSON object"),
        ("/worker_generate_stream", {"model": 3}, "no JSON object"),
    ],
)
def test_a_malformed_request_is_told_in_a_sentence(serving, locked, path, body, said):
    answer = locked.post(path, json=body, headers=KEY)
    assert answer.status_code == 400 and said in answer.json()["error"]
    assert answer.json()["error_code"] == ErrorCode.BAD_INPUT


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'"text"'])
@pytest.mark.parametrize("path", ["/register_worker", "/worker_generate_stream"])
def test_what_is_no_json_is_told_in_a_sentence(locked, path, content):
    answer = locked.post(path, content=content, headers=KEY | {"Content-Type": "application/json"})
    assert answer.status_code == 400 and isinstance(answer.json()["error"], str)


def test_routes_that_are_not_there_are_told_in_a_sentence(locked):
    assert "Not Found" in locked.post("/nowhere").json()["error"]
    assert "Not Allowed" in locked.get("/list_models").json()["error"]
    assert "Not Found" in locked.get("/v1/nowhere").json()["error"]["message"]
    assert locked.get("/docs").status_code == 404  # its page would be fetched from elsewhere


def test_a_long_body_is_refused(serving):
    with controller(serving, ControllerSettings(limits=ServeLimits(max_body_bytes=10_000))) as client:
        for path in ("/worker_generate_stream", "/v1/chat/completions"):
            answer = client.post(path, json={"model": "nano", "prompt": "x" * 20_000})
            assert answer.status_code == 413 and "MiB" in answer.text


def test_the_routes_are_described(locked):
    described = locked.get("/openapi.json").json()
    assert {"/worker_generate_stream", "/register_worker", "/v1/chat/completions"} <= set(described["paths"])
    stream = described["paths"]["/worker_generate_stream"]["post"]
    assert "prompt" in stream["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert "422" not in json.dumps(described["paths"])


def test_metrics_count_what_happened(serving):
    worker = ScriptedWorker()
    with serving(worker.app) as url, controller(serving) as client:
        register(client, url, worker)
        ask(client)
        ask(client, model="other")
        told = client.get("/metrics").text.splitlines()
    assert 'medplib_controller_requests_total{outcome="ok"} 1.0' in told
    assert 'medplib_controller_requests_total{outcome="bad_input"} 1.0' in told
    assert 'medplib_controller_tries_total{retry="false"} 1.0' in told
    assert "medplib_controller_workers 1.0" in told and "medplib_controller_running 0.0" in told
    assert "medplib_controller_first_chunk_seconds_count 1.0" in told


# --- coming and going -----------------------------------------------------------------------------------------------


class Beating:
    """A worker's heartbeats, in a thread of its own."""

    def __init__(self, controller_url, worker_url, models):
        registration = Registration(controller_url, worker_url, interval=0.1, retry=0.05)
        self.heart = Heart(registration, lambda: WorkerStatus(model_names=models, queue_length=2))
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self):
        self.task = self.loop.create_task(self.heart.run())
        with contextlib.suppress(asyncio.CancelledError):
            self.loop.run_until_complete(self.task)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.task.cancel)
        self.thread.join(10)
        self.loop.close()


def test_a_controller_that_comes_back_knows_its_workers_within_a_heartbeat(serving, port, wait_until):
    worker = ScriptedWorker(say("A CT."))
    with serving(worker.app) as url, Beating(f"http://127.0.0.1:{port}", url, ["nano"]):
        for _ in range(2):  # the second one knows nothing of the first
            with controller(serving, port=port) as client:
                wait_until(lambda client=client: client.post("/list_models").json()["models"] == ["nano"])
                assert ask(client)[-1].answer == "A CT."


def test_a_worker_that_falls_silent_is_forgotten_and_comes_back(serving, wait_until):
    settings = ControllerSettings(registry=RegistrySettings(expiry=0.3))
    worker = ScriptedWorker()
    with serving(worker.app) as url, controller(serving, settings) as client:
        register(client, url, worker)
        wait_until(lambda: client.post("/list_models").json() == {"models": []}, what="forgetting")
        beat = client.post("/receive_heart_beat", json={"worker_name": url, "queue_length": 0})
        assert beat.json() == {"exist": False}
        with Beating(str(client.base_url), url, ["nano"]):
            wait_until(lambda: client.get("/workers").json(), what="coming back")
            (told,) = client.get("/workers").json()
            assert told["queue_length"] == 2
