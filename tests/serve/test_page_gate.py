"""The page as a browser reaches it: its few routes, its headers, its uploads, its flags."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image

from model.serve import gradio_web_server
from model.serve.server import parse_flags
from model.serve.web.gate import Tray
from tests.conftest import ROOT
from tests.serve.scripted import ScriptedController, say_for_ever

CROWD = 45  # more than the framework answers at once when left alone


def png() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (60, 40)).save(content, "PNG")
    return content.getvalue()


def test_uploads_wait_a_minute_for_who_knows_their_token():
    now = [0.0]
    tray = Tray(max_bytes=10, clock=lambda: now[0])
    token = tray.put(b"one")
    assert tray.take("guess") is None and tray.take(None) is None
    assert tray.take(token) == b"one" and tray.take(token) is None
    late, kept = tray.put(b"late"), [tray.put(b"x" * 10) for _ in range(4)]
    assert tray.take(late) is None and tray.take(kept[0]) is None and tray.take(kept[3]) is not None
    now[0] = 61
    assert tray.take(kept[1]) is None


@pytest.fixture(scope="module")
def site(serving: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """The whole page as its command makes it."""
    controller = ScriptedController()
    with serving(controller.app) as address:
        flags = ["--controller", address, "--votes-file", str(tmp_path_factory.mktemp("votes") / "votes.jsonl")]
        flags += ["--max-image-mib", "1", "--max-volume-mib", "3"]
        app = gradio_web_server.make_app(parse_flags(gradio_web_server.build_parser(), flags))
        with serving(app) as url, httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
            yield client


def test_the_page_names_no_other_host_to_the_browser(site):
    answer = site.get("/")
    assert answer.status_code == 200 and "MedPLIB" in answer.text
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "http" not in policy
    assert "fonts.googleapis" not in answer.text
    config = site.get("/config").json()
    assert config["footer_links"] == [] and config["analytics_enabled"] is False
    assert all(event["api_visibility"] == "private" for event in config["dependencies"])


@pytest.mark.parametrize(
    "route",
    [
        *("/gradio_api/file=/etc/passwd", "/gradio_api/file=http://127.0.0.1/", "/file=/etc/passwd", "/docs"),
        *("/gradio_api/proxy=http://127.0.0.1/", "/gradio_api/openapi.json", "/openapi.json", "/gradio_api/mcp"),
        *("/monitoring", "/gradio_api/call/ask", "/login", "/gradio_api/upload_progress?upload_id=1", "//etc/passwd"),
    ],
)
def test_routes_the_page_does_not_need_are_closed(route, site):
    assert site.get(route).status_code == 404


def test_an_open_tab_finds_a_page_that_was_started_anew(site):
    assert "app_id" in site.get("/gradio_api/app_id").json()  # what it asks for until the page is back


def test_gradio_takes_no_files(site, tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png())
    assert site.post("/gradio_api/upload", files={"files": b"x"}).status_code == 404
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.3)
        for path in (str(secret), f"http://127.0.0.1:{listener.getsockname()[1]}/a.png"):
            told = json.dumps(
                {
                    "data": [[{"path": path, "meta": {"_type": "gradio.FileData"}}]],
                    "fn_index": 3,
                    "session_hash": "visitor",
                }
            )
            for body in (told, told.replace("path", "\\u0070ath")):
                answer = site.post("/gradio_api/queue/join", content=body, headers={"content-type": "application/json"})
                assert answer.status_code == 400 and "no files" in answer.json()["error"]
        with pytest.raises(TimeoutError):
            listener.accept()
    assert secret.exists()


def test_uploads_need_the_pages_own_header_and_keep_the_limit(site):
    assert site.post("/open", content=png()).status_code == 403
    assert site.post("/open", content=png(), headers={"X-MedPLIB": "open"}).json()["token"]
    assert site.post("/open", content=b"\0" * (3 * 2**20 + 1), headers={"X-MedPLIB": "open"}).status_code == 413


def test_long_or_broken_words_are_refused(site):
    for body in (b"{" * 100, b"[" * 100_000, b"\xff", b'{"data": "' + b"x" * 2**21 + b'"}'):
        assert site.post("/gradio_api/queue/join", content=body).status_code == 400


@pytest.mark.slow
def test_many_answers_at_once_hold_up_nobody(serving, wait_until, tmp_path):
    controller = ScriptedController(say_for_ever)
    with serving(controller.app) as address:
        flags = ["--controller", address, "--votes-file", str(tmp_path / "votes.jsonl")]
        app = gradio_web_server.make_app(parse_flags(gradio_web_server.build_parser(), flags))
        with serving(app) as url, httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
            events = {event["targets"][0][1]: event["id"] for event in client.get("/config").json()["dependencies"]}

            def send(visitor: int, event: str, data: list[Any], told: Any = None) -> None:
                word = {"data": data, "fn_index": events[event], "session_hash": f"visitor{visitor}"}
                assert client.post("/gradio_api/queue/join", json=word | {"event_data": told}).status_code == 200

            for visitor in range(CROWD):
                token = client.post("/open", content=png(), headers={"X-MedPLIB": "open"}).json()["token"]
                send(visitor, "upload", [], {"name": "a.png", "size": 1, "token": token})
            for visitor in range(CROWD):
                send(visitor, "submit", ["What is it?", "nano", 0, 1, 64, 0, "", True])
            wait_until(lambda: len(controller.requests) == CROWD, seconds=60, what="every question")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--share"], "no tunnels"),
        (["--controller", "localhost:64000"], "no address"),
        (["--votes-file", "/nowhere/at/all.jsonl"], "--votes-file"),
        (["--port", "99999"], "port"),
    ],
)
def test_wrong_flags_are_one_sentence(flags, sentence, capsys):
    assert gradio_web_server.main(flags) == 2
    assert sentence in capsys.readouterr().err


def test_a_port_in_use_is_one_sentence_before_anything_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert gradio_web_server.main(["--port", str(taken.getsockname()[1])]) == 2
    assert "is in use" in capsys.readouterr().err


def test_the_command_serves_until_it_is_told_to_stop(port, wait_until, tmp_path):
    flags = ["--controller", "http://127.0.0.1:9", "--model-list-mode", "reload", "--add_region_feature"]
    command = [sys.executable, "-m", "model.serve.gradio_web_server", *flags, "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        address = f"http://127.0.0.1:{port}"
        wait_until(lambda: httpx.get(f"{address}/readyz", trust_env=False).status_code == 200, seconds=60)
        process.terminate()
        lines = process.stderr.read().splitlines()
        assert process.wait(30) == 0 and lines[-1].endswith(f" INFO model.serve.server: listening on {address}")
        assert all(re.match(r"\d{4}-\d\d-\d\d [\d:,]+ (INFO|WARNING) model\.serve", line) for line in lines)
