"""Servers as processes: their port, and how they stop."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from model.errors import MedPLIBError
from model.serve.server import check_port, is_loopback, listen

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import asyncio, resource, sys
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from model.serve.server import run_app

app = FastAPI()

async def words():
    for word in ["first", "last"] if LENGTH is None else ["on"] * LENGTH:
        yield word + " "
        await asyncio.sleep(1)

@app.get("/files")
async def files():
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]

@app.get("/")
async def answer():
    return StreamingResponse(words())

resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
async def stop():
    sys.stdout.write("stopping\\n")

run_app(app, "127.0.0.1", int(sys.argv[1]), grace=20, drain=stop)
"""


def start(port, length=None):
    program = PROGRAM.replace("LENGTH", repr(length))
    return subprocess.Popen(
        [sys.executable, "-c", program, str(port)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_lets_an_answer_end(port, wait_until, stop):
    process = start(port)
    try:
        url = f"http://127.0.0.1:{port}/"
        wait_until(lambda: httpx.get(f"{url}nowhere", trust_env=False), 60, "the server")
        with httpx.stream("GET", url, trust_env=False) as answer:
            pieces = answer.iter_text()
            assert next(pieces) == "first "
            process.send_signal(stop)
            assert list(pieces) == ["last "]
        said, warned = process.communicate(timeout=20)
        assert process.returncode == 0 and said == "stopping\n" and "Traceback" not in warned
    finally:
        process.kill()
        process.communicate()


def test_the_second_signal_stops_at_once(port, wait_until):
    process = start(port, length=1000)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: httpx.get(f"{url}/nowhere", trust_env=False), 60, "the server")
        with httpx.stream("GET", url, trust_env=False) as answer:
            next(answer.iter_text())
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: not _listens(port), what="the end of listening")
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=20)
            assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


def test_as_many_connections_as_this_user_may_have(port, wait_until):
    process = start(port)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: httpx.get(f"{url}/nowhere", trust_env=False), 60, "the server")
        assert httpx.get(f"{url}/files", trust_env=False).json() > 256
    finally:
        process.kill()
        process.communicate()


def _listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_free_port_is_left_free(port):
    check_port("127.0.0.1", port)
    check_port("localhost", port)
    with socket.create_server(("127.0.0.1", port)):
        for host in ("127.0.0.1", "localhost", "0.0.0.0"):
            with pytest.raises(MedPLIBError, match=f"port {port} of {host} is in use"):
                check_port(host, port)


def test_any_free_port_is_the_same_at_all_addresses():
    listeners = listen("localhost", 0)
    try:
        assert len({listener.getsockname()[1] for listener in listeners}) == 1
    finally:
        for listener in listeners:
            listener.close()


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_is_none_is_refused(port):
    with pytest.raises(MedPLIBError, match="--port"):
        check_port("127.0.0.1", port)


def test_another_machine_is_refused():
    with pytest.raises(MedPLIBError, match="no address of this machine"):
        check_port("192.0.2.1", 0)
    with pytest.raises(MedPLIBError, match="has no address"):
        check_port("a..b", 0)


@pytest.mark.parametrize(
    ("host", "alone"), [("localhost", True), ("127.0.0.1", True), ("::1", True), ("0.0.0.0", False)]
)
def test_loopback_is_this_machine_alone(host, alone):
    assert is_loopback(host) is alone
