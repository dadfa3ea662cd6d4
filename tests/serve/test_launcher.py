"""``medplib serve``: its checks, its children, and the whole of it."""

from __future__ import annotations

import base64
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from model.cli import main
from model.errors import MedPLIBError
from model.processing.conversation import Turn, render
from model.serve import checks
from model.serve.checks import Stored, check_checkpoint, check_memory
from model.serve.client import ControllerClient
from model.serve.commands import worker_devices
from model.serve.launcher import API_KEY, CLIENT_KEY, LaunchSettings, Program, make_programs
from model.serve.protocol import GenerateRequest
from tests.conftest import ROOT, free_port

NANO = ROOT / "assets" / "medplib-nano"
FUNDUS = ROOT / "data" / "sample" / "images" / "fundus_00--Phantom--seed505case000004--0000.png"
Wait = Callable[..., Any]

SERVER = """
import http.server, os, sys
print("listening", sys.argv[1:], os.environ.get("GIVEN"), os.environ.get("HIDDEN"), flush=True)
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/readyz" else 404)
        self.end_headers()
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Ready).serve_forever()
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Write a module that children can run."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")

    def write(content: str) -> str:
        name = f"child_{len(list(tmp_path.glob('child_*')))}"
        (tmp_path / f"{name}.py").write_text(content)
        return name

    return write


# --- children -----------------------------------------------------------------------------------------------------


def test_a_child_serves_and_ends(module: Any, port: int, wait_until: Wait, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIDDEN", "secret")
    environment = {"GIVEN": "a value"}
    address = f"http://127.0.0.1:{port}"
    child = Program("server", module(SERVER), (str(port), "--flag"), address, environment, ("HIDDEN",))
    child.start()
    wait_until(lambda: child.ready() and child.lines)
    assert child.lines[0] == f"listening ['{port}', '--flag'] a value None"
    child.signal(signal.SIGTERM)
    wait_until(lambda: not child.running())
    assert "SIGTERM" in child.last_words()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("import sys; print('noise'); sys.exit('medplib: the port is in use')", "noise"),  # exit code 1: its last lines
        ("import sys; print('noise'); print('medplib: no such port'); sys.exit(2)", "exit code 2: no such port"),
        ("raise RuntimeError('out of something')", "RuntimeError: out of something"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL and said nothing"),
        ("print('\\x00\\xff' * 9000); raise SystemExit(3)", "exit code 3"),
    ],
)
def test_last_words(module: Any, wait_until: Wait, content: str, told: str) -> None:
    child = Program("worker 1", module(content), (), "http://127.0.0.1:9")
    child.start()
    wait_until(lambda: not child.running())
    said = child.crash()
    assert said.startswith("worker 1 ") and told in said


def test_a_folder_of_the_same_name_is_not_taken_for_the_package(
    module: Any, wait_until: Wait, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere" / "model").mkdir(parents=True)
    (tmp_path / "elsewhere" / "model" / "__init__.py").write_text("raise SystemExit('another one')")
    monkeypatch.chdir(tmp_path / "elsewhere")
    child = Program("server", module("import model.errors; print(model.errors.__file__)"), (), "http://x")
    child.start()
    wait_until(lambda: not child.running())
    child.last_words()
    assert list(child.lines) == [str(ROOT / "model" / "errors.py")]


def test_crashes_in_a_row_are_followed_by_longer_waits(module: Any, wait_until: Wait, tmp_path: Path) -> None:
    code = module("print('no'); raise SystemExit(1)")
    child = Program("worker 1", code, (), "http://x", logs=tmp_path / "logs")
    delays = []
    for _ in range(3):
        child.start()
        wait_until(lambda: not child.running())
        child.crash()
        delays.append(round(child.restart_at - time.monotonic()))
    assert delays == [1, 2, 4]
    assert (tmp_path / "logs" / "worker-1.log").read_text().count("no\n") == 3


def test_children_end_with_whoever_started_them(module: Any, port: int, wait_until: Wait) -> None:
    script = (
        "import time; from model.serve.launcher import *\n"
        f"child = Program('server', {module(SERVER)!r}, ('{port}',), 'http://127.0.0.1:{port}')\n"
        "child.start(); print(child.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    wait_until(lambda: httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False).status_code == 200)
    parent.kill()
    parent.wait()
    wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    parent.stdout.close()


# --- what is told before anything starts ------------------------------------------------------------------------------


def test_a_checkpoint_is_looked_at_without_being_read(tmp_path: Path) -> None:
    weights = check_checkpoint(NANO)
    assert weights.half and weights.regions and weights.size == (NANO / "model.safetensors").stat().st_size
    for name, content in (("config.json", "no JSON"), ("config.json", "{}"), ("model.safetensors", "")):
        (tmp_path / name).write_text(content)
        with pytest.raises(MedPLIBError, match=str(tmp_path)):
            check_checkpoint(tmp_path)
    with pytest.raises(MedPLIBError, match="no directory"):
        check_checkpoint(tmp_path / "missing")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(MedPLIBError, match="--model-base"):
        check_checkpoint(tmp_path)
    assert check_checkpoint(tmp_path, NANO) == weights


def test_workers_have_to_fit_the_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    weights = Stored(10 * 2**30, half=True)
    monkeypatch.setattr(checks, "free_memory", lambda: 25 * 2**30)
    check_memory(weights, ["cpu"])
    check_memory(weights, ["cpu", "cpu"], dtype="bf16")
    with pytest.raises(MedPLIBError, match=r"2 workers need about 41\.2 GiB of memory and cpu has 25\.0 GiB free"):
        check_memory(weights, ["cpu", "cpu"])
    smi = tmp_path / "nvidia-smi"  # tells 6000 MiB of card 0 and 12000 MiB of card 1
    smi.write_text('#!/bin/sh\ncase "$*" in *--id=0*) echo 6000 ;; *--id=1*) echo 12000 ;; *) exit 1 ;; esac\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    check_memory(weights, ["cuda:1", "cuda:7"])  # of card 7 nothing is known
    check_memory(weights, ["cuda"], bits=8)
    with pytest.raises(MedPLIBError, match=r"cuda:0 has 5\.9 GiB free"):
        check_memory(weights, ["cuda:1", "cuda:0"])


def test_free_memory_is_that_of_the_machine_or_of_its_container(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(checks, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1\n")
    whole = checks.free_memory()
    assert whole is not None and 1000 < whole <= psutil.virtual_memory().total
    (tmp_path / "memory.max").write_text("1001\n")
    assert checks.free_memory() == 1000


@pytest.mark.parametrize(
    "flags",
    [
        ["--model", "missing"],
        ["--model", "EMPTY"],
        ["--port", "70000"],
        ["--api-port", "BUSY"],
        ["--port", "BUSY"],
        ["--host", "no.such.host.invalid"],
        ["--host", "192.0.2.1"],
        ["--device", ","],
        ["--device", "cuda:99"],
        ["--device", "gpu"],
        ["--workers", "100000"],
        ["--load-8bit", "--load-4bit"],
        ["--no-web", "--logs", "/dev/null/logs"],
    ],
)
def test_what_cannot_start_is_one_sentence_and_exit_2(
    flags: list[str], tmp_path: Path, serving: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastapi import FastAPI

    with serving(FastAPI()) as busy:
        names = {"EMPTY": str(tmp_path), "BUSY": busy.rpartition(":")[2]}
        assert main(["serve", *(names.get(flag, flag) for flag in flags)]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "everyone who reaches" not in line]
    assert len(said) == 1 and said[0].startswith("medplib: ")
    assert flags[0] not in ("--port", "--api-port") or said[0].endswith(f"with {flags[0]}")


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--workers", "0"), ("--slots", "0"), ("--max-waiting", "x"), ("--grace", "0"), ("--bogus", "1")],
)
def test_wrong_flags_are_named_with_the_usage_of_serve(
    flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["serve", flag, value])
    said = capsys.readouterr().err
    assert said.startswith("usage: medplib serve") and flag in said.splitlines()[-1]


# --- what is started --------------------------------------------------------------------------------------------------


def test_secrets_go_by_the_environment_and_only_where_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CLIENT_KEY, "for clients")
    monkeypatch.delenv(API_KEY, raising=False)
    settings = LaunchSettings(NANO, devices=["cpu", "cpu"])
    first, second = make_programs(settings), make_programs(settings)
    keys = {program.environment.get(API_KEY) for program in first}
    assert keys == {first[0].environment[API_KEY], None} and len(first[0].environment[API_KEY]) > 30
    assert second[0].environment[API_KEY] != first[0].environment[API_KEY]  # one for each run
    by_name = {program.name: program for program in first}
    assert API_KEY not in by_name["web page"].environment and API_KEY in by_name["web page"].without
    assert CLIENT_KEY in by_name["worker 1"].without and CLIENT_KEY not in by_name["controller"].without
    assert not [word for program in first for word in program.flags if word in (*keys, "for clients")]
    assert len({program.address for program in first}) == 4
    monkeypatch.setenv(API_KEY, "of the group")  # for workers on other hosts
    assert make_programs(settings)[1].environment[API_KEY] == "of the group"


def test_workers_listen_on_loopback_whatever_the_page_does() -> None:
    programs = make_programs(LaunchSettings(NANO, host="0.0.0.0", port=1234, api_port=1235))
    flags = {program.name: " ".join(program.flags) for program in programs}
    assert "--host 127.0.0.1 " in flags["worker 1"] and "--controller http://127.0.0.1:1235 " in flags["worker 1"]
    assert flags["web page"].startswith("--host 0.0.0.0 --port 1234 --controller http://127.0.0.1:1235")


def test_a_lora_goes_with_its_base(tmp_path: Path) -> None:
    worker = make_programs(LaunchSettings(tmp_path, base=NANO))[1]
    flags = " ".join(worker.flags)
    assert f"--model-path {tmp_path} --model-base {NANO} " in flags


def test_devices_are_taken_in_turn() -> None:
    assert worker_devices("cpu", None) == ["cpu"]
    assert worker_devices("cuda:0, cuda:1", None) == ["cuda:0", "cuda:1"]
    assert worker_devices("cuda:0,cuda:1", 3) == ["cuda:0", "cuda:1", "cuda:0"]


# --- the whole of it --------------------------------------------------------------------------------------------------


class Serving:
    """``medplib serve`` in a process of its own, and what it says."""

    def __init__(self, *flags: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "model.cli", "serve", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env={**os.environ, "ALL_PROXY": "socks://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"},
            start_new_session=True,
        )
        self.said: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.said += iter(self.process.stdout.readline, "")

    def says(self, words: str) -> str | None:
        """The first line with these words, once it was said."""
        assert self.process.poll() is None or any(words in line for line in self.said), self.said
        return next((line for line in self.said if words in line), None)

    def children(self) -> list[psutil.Process]:
        """Its programs."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def program(self, module: str) -> psutil.Process:
        """One of them."""
        return next(child for child in self.children() if module in child.cmdline())

    def stop(self, number: int = signal.SIGINT) -> int:
        """Its exit code after a signal; none of its programs outlives it."""
        children = self.children()
        self.process.send_signal(number)
        code = self.process.wait(timeout=60)
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive
        return code


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Serving]]:
    started: list[Serving] = []

    def start(*flags: str) -> Serving:
        web, api = free_port(), free_port()
        started.append(Serving("--port", str(web), "--api-port", str(api), "--device", "cpu", *flags))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            for child in one.children():
                child.kill()
            one.process.kill()
        one.process.wait()
        assert one.process.stdout is not None
        one._reader.join(timeout=10)
        one.process.stdout.close()


def address(line: str) -> str:
    return next(word for word in line.split() if word.startswith("http"))


def models(api: str) -> list[str]:
    return [model["id"] for model in httpx.get(f"{api}/models", trust_env=False).json()["data"]]


def ask(controller: str, begun: threading.Event) -> str | None:
    """What ended an answer."""
    prompt = render([Turn("human", "<image>\nWhich structures are in this image?")])
    images = [base64.b64encode(FUNDUS.read_bytes()).decode()]
    with ControllerClient(controller).stream(GenerateRequest(prompt=prompt, images=images)) as answer:
        finishes = [begun.set() or chunk.finish for chunk in answer]
    return finishes[-1]


@pytest.mark.slow
def test_page_and_api_come_up_outlive_a_crash_and_go(serve: Any, wait_until: Wait, tmp_path: Path) -> None:
    stack = serve("--logs", str(tmp_path / "logs"), "--votes-file", str(tmp_path / "votes.jsonl"))
    wait_until(lambda: stack.says("Ctrl-C stops it"), 150)
    page, api = address(stack.says("  page ")), address(stack.says("  API "))
    assert "MedPLIB" in httpx.get(page, trust_env=False, timeout=30).text
    assert models(api) == ["medplib-nano"]
    flags = " ".join(word for child in stack.children() for word in child.cmdline())
    secret = stack.program("model.serve.model_worker").environ()[API_KEY]
    assert secret not in flags and API_KEY not in stack.program("model.serve.gradio_web_server").environ()
    stack.program("model.serve.model_worker").kill()
    wait_until(lambda: stack.says("worker 1 was ended by SIGKILL"), 30)
    wait_until(lambda: stack.says("worker 1 is ready again"), 90)
    wait_until(lambda: models(api) == ["medplib-nano"], 30)
    with ThreadPoolExecutor(6) as pool:
        begun = [threading.Event() for _ in range(6)]
        answers = [pool.submit(ask, api.removesuffix("/v1"), one) for one in begun]
        assert all(one.wait(60) for one in begun)
        assert stack.stop(signal.SIGINT) == 0
        assert [answer.result() for answer in answers] == ["end"] * 6  # what had begun was ended first
    logs = {path.name: path.read_text().splitlines() for path in (tmp_path / "logs").iterdir()}
    assert set(logs) == {"controller.log", "worker-1.log", "web-page.log"}
    one_format = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ [\w.]+: .*")
    assert not [line for lines in logs.values() for line in lines if not one_format.fullmatch(line)]


@pytest.mark.slow
def test_a_program_that_cannot_start_is_told_and_all_end(serve: Any, wait_until: Wait, tmp_path: Path) -> None:
    """The checkpoint looks whole from outside; the worker finds that it is not."""
    shutil.copytree(NANO, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    stack = serve("--no-web", "--model", str(tmp_path / "broken"))
    assert stack.process.wait(timeout=120) == 2
    stack._reader.join(timeout=10)
    assert stack.said[0].startswith("medplib: worker 1 ended with exit code 2: ")
    assert str(tmp_path / "broken") in stack.said[0] and "Traceback" not in "".join(stack.said)


def test_a_second_signal_does_not_wait(serve: Any, wait_until: Wait) -> None:
    stack = serve("--no-web")
    wait_until(lambda: len(stack.children()) == 2, 60)  # in the middle of the start
    stack.process.send_signal(signal.SIGTERM)
    assert stack.stop(signal.SIGTERM) == 0
