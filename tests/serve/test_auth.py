"""Who may speak to a server, and which addresses a worker may have."""

from __future__ import annotations

import asyncio
import socket

import httpx
import pytest
from starlette.responses import JSONResponse

from model.errors import MedPLIBError
from model.serve.auth import (
    CheckedAddress,
    WorkerAllowList,
    checked_key,
    from_loopback,
    normal_name,
    shows_key,
)
from model.serve.forwarding import WorkerCaller
from model.serve.server import Entrance
from tests.serve.fake_workers import ScriptedWorker

METADATA = "169.254.169.254"


def check(name, peer="127.0.0.1", entries=()):
    return asyncio.run(WorkerAllowList(entries).check(name, peer))


@pytest.fixture
def names(monkeypatch):
    """Host names of a test: name → addresses, looked up anew each time."""
    table: dict[str, list[str]] = {}
    real = socket.getaddrinfo

    def look_up(host, port, *args, **kwargs):
        if host not in table:
            return real(host, port, *args, **kwargs)
        if not table[host]:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        kinds = {4: socket.AF_INET, 6: socket.AF_INET6}
        return [(kinds[6 if ":" in address else 4], socket.SOCK_STREAM, 6, "", (address, 0)) for address in table[host]]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return table


@pytest.mark.parametrize(
    ("name", "normal"),
    [
        ("http://localhost:64002", "http://localhost:64002"),
        ("HTTP://LocalHost:64002/", "http://localhost:64002"),
        ("http://127.0.0.1", "http://127.0.0.1:80"),
        ("https://gpu-3.ward.example", "https://gpu-3.ward.example:443"),
        ("http://[::1]:64002", "http://[::1]:64002"),
    ],
)
def test_names_have_one_spelling(name, normal):
    assert normal_name(name) == normal


@pytest.mark.parametrize(
    "name",
    [
        "",
        "localhost:64002",
        "ftp://localhost:64002",
        "file:///etc/passwd",
        "http://",
        "http://:64002",
        "http://localhost:99999",
        "http://localhost:0",
        "http://localhost:port",
        "http://user@localhost:64002",
        "http://user:word@localhost:64002",
        "http://localhost:64002/admin",
        "http://localhost:64002?x=1",
        "http://localhost:64002#x",
        "http://localhost:64002\\@example.org",
        "http://localhost:64002\r\nX: y",
        "http://local host:64002",
        "http://löcalhost:64002",
        "http://[::1:64002",
        "http://" + "a" * 400,
    ],
)
def test_what_is_no_name_is_refused(name):
    with pytest.raises(MedPLIBError, match="expected http://host:port"):
        normal_name(name)


@pytest.mark.parametrize("name", ["http://localhost:64002", "http://127.0.0.1:64002", "http://[::1]:64002"])
def test_a_worker_of_this_machine_is_taken(name):
    address = check(name)
    assert address.name == name
    assert all(from_loopback(end.split("//")[1].rsplit(":", 1)[0].strip("[]")) for end in address.endpoints)


@pytest.mark.parametrize(
    "host",
    [
        METADATA,
        f"[::ffff:{METADATA}]",
        "2852039166",  # the same as one number
        "0.0.0.0",
        "[::]",
        "224.0.0.1",
        "10.0.0.7",
        "[fe80::1]",
        "[::ffff:10.0.0.7]",
        "93.184.216.34",
    ],
)
@pytest.mark.parametrize("peer", ["127.0.0.1", "192.0.2.5"])
def test_other_addresses_are_refused(host, peer):
    with pytest.raises(MedPLIBError):
        check(f"http://{host}:80", peer)


def test_a_clouds_own_service_is_refused_even_where_its_network_is_listed():
    with pytest.raises(MedPLIBError, match="no worker is at"):
        check(f"http://{METADATA}", entries=["0.0.0.0/0"])


def test_a_worker_elsewhere_registers_from_where_it_is():
    assert check("http://192.0.2.5:64002", peer="192.0.2.5").endpoints == ("http://192.0.2.5:64002",)
    assert check("http://192.0.2.5:64002", peer="::ffff:192.0.2.5").endpoints == ("http://192.0.2.5:64002",)
    with pytest.raises(MedPLIBError, match=r"--allow-worker 192\.0\.2\.6"):
        check("http://192.0.2.6:64002", peer="192.0.2.5")
    with pytest.raises(MedPLIBError, match="not allowed"):
        check("http://localhost:64002", peer="192.0.2.5")


def test_a_list_says_where_workers_may_be(names):
    names["gpu-3"] = ["10.1.0.3"]
    listed = ["10.1.0.0/16", "192.0.2.9"]
    assert check("http://gpu-3:64002", entries=listed).endpoints == ("http://10.1.0.3:64002",)
    assert check("http://192.0.2.9:64002", entries=listed).endpoints == ("http://192.0.2.9:64002",)
    assert check("http://10.1.0.3:64002", entries=["GPU-3"]).endpoints == ("http://10.1.0.3:64002",)
    for elsewhere in ("http://10.2.0.3:64002", "http://127.0.0.1:64002", "http://192.0.2.10:64002"):
        with pytest.raises(MedPLIBError, match="not allowed"):
            check(elsewhere, peer="192.0.2.10", entries=listed)


@pytest.mark.parametrize("entry", ["", "http://gpu-3", "gpu-3:64002", "10.0.0.0/99", "a b"])
def test_a_malformed_list_is_told(entry):
    with pytest.raises(MedPLIBError, match="--allow-worker"):
        WorkerAllowList([entry])


def test_a_name_needs_all_its_addresses_allowed(names):
    names["two-faced"] = ["127.0.0.1", "10.0.0.7"]
    with pytest.raises(MedPLIBError, match="not allowed"):
        check("http://two-faced:64002")
    names["nobody"] = []
    with pytest.raises(MedPLIBError, match="has no address"):
        check("http://nobody:64002")


def test_a_name_that_points_elsewhere_later_leads_nowhere(names, serving):
    worker = ScriptedWorker()
    with serving(worker.app) as url:
        port = url.rsplit(":", 1)[1]
        names["worker.test"] = ["127.0.0.1"]
        address = check(f"http://worker.test:{port}")
        names["worker.test"] = [METADATA]

        async def ask():
            caller = WorkerCaller()
            try:
                return await caller.status(address)
            finally:
                await caller.aclose()

        assert asyncio.run(ask()).model_names == ["nano"] and worker.asked_status == 1


def test_the_second_address_is_tried_where_nothing_listens_at_the_first(serving, port):
    worker = ScriptedWorker()
    with serving(worker.app) as url:
        address = CheckedAddress("http://localhost:1", (f"http://127.0.0.1:{port}", url))

        async def ask():
            caller = WorkerCaller("a-key")
            try:
                response = await caller.post(address, "/worker_generate_stream", b'{"prompt": "x"}')
                await response.aread()
            finally:
                await caller.aclose()

        asyncio.run(ask())
    assert worker.headers[0]["host"] == "localhost:1"
    assert worker.headers[0]["authorization"] == "Bearer a-key"


@pytest.mark.parametrize(
    ("header", "shown"),
    [
        ("Bearer a-key", True),
        ("bearer a-key", True),
        ("Bearer a-ke", False),
        ("Bearer a-key2", False),
        ("Basic a-key", False),
        ("Bearer", False),
        ("a-key", False),
        ("Bearer å-key", False),
        ("", False),
        (None, False),
    ],
)
def test_a_key_is_shown_whole(header, shown):
    assert shows_key(header, "a-key") is shown


@pytest.mark.parametrize("key", [" a", "a\n", "schlüssel"])
def test_a_key_that_no_header_carries_is_refused(key):
    with pytest.raises(MedPLIBError, match="--api-key"):
        checked_key(key, "--api-key")
    assert checked_key("", "--api-key") is None and checked_key("a-key", "--api-key") == "a-key"


# --- host names and sub-paths ---------------------------------------------------------------------------------------


async def path_of(scope, receive, send):
    await JSONResponse(scope["path"])(scope, receive, send)


def visit(host, path="/v1/models", **entrance):
    async def get():
        transport = httpx.ASGITransport(Entrance(path_of, **entrance))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.get(path, headers={"Host": host})

    return asyncio.run(get())


@pytest.mark.parametrize(
    ("host", "local", "elsewhere"),  # served by a loopback server, by one on all addresses that has --allow-host
    [
        ("localhost:65101", True, True),
        ("LOCALHOST.", True, True),
        ("127.0.0.1:1", True, True),
        ("[::1]:64000", True, True),
        ("lab.example.org:443", True, True),  # named by --allow-host
        ("evil.example:65101", False, False),
        ("localhost.evil.example", False, False),
        ("127.0.0.1.evil.example", False, False),
        ("evil.example:80@localhost", False, False),
        ("[::1]evil.example", False, False),
        ("10.0.0.7:64000", False, True),
        ("", True, True),
    ],
)
def test_only_names_of_this_server_are_served(host, local, elsewhere, caplog):
    for served, addresses in ((local, False), (elsewhere, True)):
        answer = visit(host, names=["lab.example.org"], addresses=addresses)
        assert answer.status_code == (200 if served else 403)
        if not served:
            assert "not reached under the name" in answer.json()["error"]["message"] and "--" not in answer.text
            assert "--allow-host NAME" in caplog.text  # for the operator


def test_a_sub_path_is_taken_off_where_a_proxy_leaves_it():
    seen = [
        visit("x", path, names=None, root_path="/lab/medplib").json() for path in ("/lab/medplib/v1", "/v1", "/lab")
    ]
    assert seen == ["/v1", "/v1", "/lab"]
    refused = visit("evil.example", "/lab/medplib/v1/models", names=[], root_path="/lab/medplib")
    assert "not reached" in refused.json()["error"]["message"]  # as OpenAI's clients read errors
