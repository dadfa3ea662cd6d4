"""``python -m model.serve.controller`` as users type it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from operator import attrgetter

import httpx
import pytest

from model.serve.controller import main, make_parser, settings_from
from model.serve.server import parse_flags
from tests.conftest import ROOT
from tests.serve.fake_workers import ScriptedWorker


@contextlib.contextmanager
def command(*flags, **environment):
    """The command as users type it, as a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "model.serve.controller", *flags],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_the_command_serves_until_it_is_stopped(port, wait_until):
    with command("--port", str(port), "--allow-host", "lab.example", "--root-path", "lab") as process:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: httpx.get(f"{url}/livez", trust_env=False).status_code == 200, seconds=90, what="it")
        names = {"127.0.0.1": 200, "lab.example": 200, "evil.example": 403}
        for name, status in names.items():  # a name that is made to point here is none of ours
            answer = httpx.post(f"{url}/lab/list_models", headers={"Host": f"{name}:{port}"}, trust_env=False)
            assert answer.status_code == status
        assert httpx.get(f"{url}/openapi.json", trust_env=False).json()["servers"] == [{"url": "/lab"}]
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "host 'evil.example:" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--port", "99999"], "port is 99999"),
        (["--host", "192.0.2.1"], "no address of this machine"),
        (["--port", "0", "--allow_worker", "http://x"], "--allow-worker 'http://x'"),
        (["--port", "0", "--api-key", "a b "], "--api-key"),
    ],
)
def test_wrong_flags_are_told_in_a_sentence(capsys, flags, said):
    assert main(flags) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("--max-turns", "0"), ("--tries", "0"), ("--max-running", "-1"), ("--max-pixels", "1.5")),
        *(("--cool-down", "0"), ("--grace", "nan"), ("--expiry", "inf")),
        *(("--allow-host", "http://x"), ("--allow-host", "x:80"), ("--root-path", "https://x/y")),
    ],
)
def test_values_out_of_range_name_their_flag(capsys, flag, value):
    with pytest.raises(SystemExit, match="2"):
        main([flag, value])
    assert f"argument {flag}: {value!r} is no" in capsys.readouterr().err


def test_a_port_in_use_is_told_in_a_sentence(serving, capsys):
    with serving(ScriptedWorker().app) as url:
        assert main(["--port", url.rsplit(":", 1)[1]]) == 2
    assert "is in use" in capsys.readouterr().err


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    told = capsys.readouterr().out
    assert all(flag in told for flag in ("--dispatch-method", "--api-key", "--client-key", "--allow-worker"))


@pytest.mark.parametrize(
    ("flags", "read", "value"),
    [
        (["--dispatch-method", "lottery"], "registry.dispatch_method", "lottery"),
        (["--dispatch_method=shortest_queue"], "registry.dispatch_method", "shortest_queue"),
        (["--expiry", "7"], "registry.expiry", 7),
        (["--cool-down", "7"], "registry.cool_down", 7),
        (["--max_failures", "7"], "registry.max_failures", 7),
        (["--tries", "7"], "forwarding.tries", 7),
        (["--connect-timeout", "7"], "forwarding.connect_timeout", 7),
        (["--silence-timeout", "7"], "forwarding.silence_timeout", 7),
        (["--max-running", "7"], "forwarding.max_connections", 7),
        (["--client-timeout", "7"], "client_timeout", 7),
        (["--grace", "7"], "grace", 7),
        (["--api-key", "a_key-1"], "api_key", "a_key-1"),
        (["--client_key=a_key-1"], "client_key", "a_key-1"),
        (["--allow-worker", "10.0.0.0/8", "--allow_worker", "gpu-3"], "allow_workers", ("10.0.0.0/8", "gpu-3")),
        (["--max-body-mib", "7"], "limits.max_body_bytes", 7 * 2**20),
        (["--max-image-mib", "7"], "limits.max_image_bytes", 7 * 2**20),
        (["--max-pixels", "7"], "limits.max_pixels", 7),
        (["--max-regions", "7"], "limits.max_regions", 7),
        (["--max-turns", "7"], "limits.max_turns", 7),
        (["--max-prompt-chars", "7"], "limits.max_prompt_chars", 7),
        (["--max-new-tokens", "7"], "limits.max_new_tokens", 7),
    ],
)
def test_every_flag_does_something(flags, read, value):
    settings = settings_from(parse_flags(make_parser(), flags))
    assert attrgetter(read)(settings) == value


def test_keys_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("MEDPLIB_API_KEY", "worker-key")
    monkeypatch.setenv("MEDPLIB_CLIENT_KEY", "")
    settings = settings_from(parse_flags(make_parser(), []))
    assert settings.api_key == "worker-key" and settings.client_key is None
