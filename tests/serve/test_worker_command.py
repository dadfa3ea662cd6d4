"""The worker's command: the published line as it is, what is refused before anything is loaded, and how it stops."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import LoraConfig, get_peft_model

from model.checkpoint.pretrained import open_checkpoint
from model.inference.engine import Engine, EngineSettings
from model.inference.quantise import quantisation_of, weight_bytes
from model.serve import worker_loading
from model.serve.controller import ControllerSettings, make_app
from model.serve.model_worker import main, make_parser
from model.serve.protocol import ErrorCode
from model.serve.server import parse_flags
from model.serve.worker_loading import ModelChoice, describe_engine, load_engine, needed_bytes
from tests.conftest import ROOT, free_port
from tests.serve.asking import ask, message, read_chunks
from tests.tiny import tiny_checkpoint

NANO = ROOT / "assets" / "medplib-nano"
STARTING = 120.0  # seconds, on a machine that is busy otherwise


@contextlib.contextmanager
def command(*flags: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "model.serve.model_worker", *flags],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


# --- as it is typed ---------------------------------------------------------------------------------------------------


def published_line(port: int, controller: str, device: str) -> list[str]:
    return (
        f"--host localhost --controller {controller} --port {port} --worker http://localhost:{port} "
        f"--model-path {NANO} --add_region_feature --device_map {device} --vision_pretrained sam-med2d_b.pth"
    ).split()


@pytest.mark.slow
def test_the_published_line_answers_and_ends_what_it_has(serving: Any, wait_until: Any) -> None:
    port = free_port()
    url = f"http://localhost:{port}"
    with (
        serving(make_app(ControllerSettings())) as controller,
        command(*published_line(port, controller, "cpu"), "--grace", "120", CUDA_VISIBLE_DEVICES="0") as process,
    ):
        wait_until(
            lambda: process.poll() is not None or httpx.post(f"{controller}/list_models").json()["models"],
            STARTING,
            "the worker",
        )
        body = {**message(), "model": "medplib-nano"}
        last = ask(controller, body)[-1]
        assert (last.finish, last.answer != "") == ("end", True)
        details = httpx.post(f"{url}/worker_get_status").json()["details"]
        assert (details["device"], details["dtype"], details["quantisation"]) == ("cpu", "float32", None)
        assert details["regions"] is True
        assert details["answered"] == 1
        long = {**body, "temperature": 20.0, "seed": 0, "max_new_tokens": 150}
        with httpx.stream("POST", f"{controller}/worker_generate_stream", json=long, timeout=60) as response:
            chunks = read_chunks(response)
            assert next(chunks).error_code == 0
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 503)
            refused = httpx.post(f"{url}/worker_generate_stream", json=body)
            assert (refused.status_code, refused.json()["error_code"]) == (503, ErrorCode.DRAINING)
            wait_until(lambda: httpx.post(f"{controller}/list_models").json()["models"] == [])
            last = list(chunks)[-1]
        assert (last.error_code, last.finish, last.usage["completion_tokens"]) == (0, "length", 150)  # type: ignore[index]
        assert process.wait(30) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_the_published_line_without_a_gpu_is_one_sentence(capsys: Any) -> None:
    assert main(published_line(free_port(), "http://localhost:1", "cuda")) == 2
    assert "the device 'cuda' cannot be used here" in _sentence(capsys)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["a second signal", "the end of the grace"])
def test_what_would_take_long_is_given_up(wait_until: Any, how: str) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    grace = 60 if how == "a second signal" else 0.3
    flags = f"--host 127.0.0.1 --port {port} --no-register --model-names nano --grace {grace}".split()
    with command(*flags) as process:
        wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 200, STARTING, "the worker")
        body = message(temperature=20.0, seed=0, max_new_tokens=1000)
        with httpx.stream("POST", f"{url}/worker_generate_stream", json=body, timeout=60) as response:
            chunks = read_chunks(response)
            assert next(chunks).error_code == 0
            process.send_signal(signal.SIGINT)
            if how == "a second signal":
                wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 503)
                process.send_signal(signal.SIGINT)
            else:
                last = list(chunks)[-1]
                assert (last.error_code, last.answer) == (ErrorCode.DRAINING, "")
                assert "stopped" in last.text
            assert process.wait(30) == 0


# --- what is refused --------------------------------------------------------------------------------------------------


def _sentence(capsys: Any) -> str:
    """The one line on standard error."""
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1, told
    assert told[0].startswith("model_worker: ")
    return told[0]


def test_what_cannot_work_is_told_before_anything_is_loaded(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(worker_loading, "load_for_inference", lambda *_, **__: pytest.fail("weights were read"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    whole = tmp_path / "headless"
    shutil.copytree(NANO, whole, ignore=shutil.ignore_patterns("*.safetensors"))
    nowhere = "http://localhost:1"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        cases = {
            f"--port {taken.getsockname()[1]} --host 127.0.0.1": "is in use",
            "--port 70000": "the port is 70000",
            "--host 192.0.2.1": "no address of this machine",
            f"--model-path {tmp_path}/nothing": "there is no checkpoint directory",
            f"--model-path {tmp_path}/empty": "config.json",
            f"--model-path {whole}": "holds no weights",
            f"--model-base {NANO}": "is no LoRA",
            f"--model-path {tmp_path}/lora": "is a LoRA of",
            "--device tpu": "the device 'tpu' cannot be used",
            "--device cpu --device_map cuda": "differ; give one",
            "--controller ftp://localhost": "--controller 'ftp://localhost' is no address",
            "--worker http://localhost:1/path": "a worker's name has no",
            "--host 0.0.0.0 --controller http://192.0.2.1:64000": "--worker http://HOST:",
            "--model-names ,": "printable",
            "--max-length 100000000": "kept prompts, and cpu has",
        }
        for flags, expected in cases.items():
            port = () if "--port" in flags else ("--port", "0")
            assert main(["--controller", nowhere, *port, *flags.split()]) == 2, flags
            assert expected in _sentence(capsys), flags
    for flag, value in (("--heartbeat", "0"), ("--slots", "0"), ("--max-waiting", "0"), ("--load-8bit", "--load-4bit")):
        with pytest.raises(SystemExit, match="2"):
            main([flag, value])
        assert f"argument {flag}: " in capsys.readouterr().err.replace(
            f"argument {value}: not", f"argument {flag}: not"
        )


def test_a_checkpoint_without_regions_is_refused_where_they_are_wanted(
    capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tiny_checkpoint(tmp_path, region={"enabled": False})
    flags = ["--port", "0", "--model-path", str(plain), "--no-register"]
    assert main([*flags, "--add_region_feature"]) == 2
    assert "has no region adapter" in _sentence(capsys)


def test_too_little_memory_is_told_with_figures(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_loading, "free_memory", lambda: 30_000_000)
    assert main(["--port", "0", "--no-register", "--device", "cpu", "--slots", "100"]) == 2
    assert (
        "needs 0.0 GiB for its weights and 1.1 GiB for 100 slots and kept prompts, and cpu has 0.0 GiB free"
        in _sentence(capsys)
    )


# --- the model --------------------------------------------------------------------------------------------------------


def test_memory_is_foretold() -> None:
    opened, settings = open_checkpoint(NANO), EngineSettings(slots=3, max_length=500, prefix_cache_mb=2)
    engine = load_engine(ModelChoice(NANO, device="cpu"), settings)
    weights, cache = needed_bytes(opened, torch.float32, None, settings)
    assert cache == engine.cache_bytes + engine.prefixes.max_bytes
    assert weights == pytest.approx(weight_bytes(engine.model), rel=0.01)
    half, half_cache = needed_bytes(opened, torch.bfloat16, None, settings)
    assert (half, half_cache) == (weights // 2, engine.cache_bytes // 2 + engine.prefixes.max_bytes)
    for scheme in ("int8", "int4"):
        small, _ = needed_bytes(opened, torch.float32, scheme, EngineSettings(slots=1, max_length=1, prefix_cache_mb=0))
        assert weight_bytes(engine.model) * 0.3 < small <= weights


@pytest.mark.parametrize(("flag", "scheme"), [("--load_8bit", "int8"), ("--load-4bit", "int4")])
def test_fewer_bits(flag: str, scheme: str) -> None:
    options = parse_flags(make_parser(), [flag])
    assert (options.load_8bit, options.load_4bit) == (scheme == "int8", scheme == "int4")
    engine = load_engine(ModelChoice(NANO, quantisation=scheme), EngineSettings(slots=1))  # type: ignore[arg-type]
    assert quantisation_of(engine.model) == scheme
    assert isinstance(engine, Engine)


def test_a_lora_and_its_base(tmp_path: Path) -> None:
    targets = r".*decoder\.layers\.\d+\.self_attn\.[qv]_proj"
    plain = load_engine(ModelChoice(NANO), EngineSettings(slots=1)).model
    weight = plain.model.decoder.layers[0].self_attn.q_proj.weight.detach().clone()
    lora = get_peft_model(plain, LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False))
    lora.save_pretrained(str(tmp_path / "tuned"))
    choice = ModelChoice(tmp_path / "tuned", NANO)
    engine = load_engine(choice, EngineSettings(slots=1))
    merged = engine.model.model.decoder.layers[0].self_attn.q_proj.weight
    assert merged.shape == weight.shape
    assert not torch.allclose(merged, weight)
    assert describe_engine(engine, choice)["checkpoint"] == "tuned"


def test_spellings_and_names() -> None:
    for spelling in ("--controller", "--controller-address", "--controller_url"):
        assert parse_flags(make_parser(), [spelling, "http://a:1"]).controller == "http://a:1"
    for spelling in ("--worker", "--worker_address", "--worker-url"):
        assert parse_flags(make_parser(), [spelling, "http://a:1"]).worker == "http://a:1"
    assert parse_flags(make_parser(), ["--device_map=cuda"]).device_map == "cuda"
