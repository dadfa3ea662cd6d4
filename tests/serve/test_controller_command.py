"""``python -m model.serve.controller`` as users type it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import httpx
import pytest

from model.serve.controller import main
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
    with command("--host", "0.0.0.0", "--port", str(port)) as process:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: httpx.get(f"{url}/livez", trust_env=False).status_code == 200, seconds=90, what="it")
        assert httpx.post(f"{url}/list_models", trust_env=False).json() == {"models": []}
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "without --api-key" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--port", "99999"], "port is 99999"),
        (["--host", "192.0.2.1"], "no address of this machine"),
        (["--port", "0", "--allow_worker", "http://x"], "--allow-worker 'http://x'"),
        (["--port", "0", "--api-key", "a b "], "--api-key"),
        (["--port", "0", "--max-turns", "0"], "max_turns is 0"),
        (["--port", "0", "--cool_down=0"], "above zero"),
        (["--port", "0", "--tries", "0"], "at least 1"),
    ],
)
def test_wrong_flags_are_told_in_a_sentence(capsys, flags, said):
    assert main(flags) == 2
    assert said in capsys.readouterr().err


def test_a_port_in_use_is_told_in_a_sentence(serving, capsys):
    with serving(ScriptedWorker().app) as url:
        assert main(["--port", url.rsplit(":", 1)[1]]) == 2
    assert "is in use" in capsys.readouterr().err


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    told = capsys.readouterr().out
    assert all(flag in told for flag in ("--dispatch-method", "--api-key", "--client-key", "--allow-worker"))
