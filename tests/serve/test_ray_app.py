"""The Ray Serve application, on a Ray of this machine."""

from __future__ import annotations

import base64
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from model.errors import MedPLIBError
from model.processing.conversation import Turn, render
from model.processing.masks import decode_rle
from model.serve.protocol import Chunk, ChunkReader, GenerateRequest
from model.serve.ray_app import build_app, read_settings
from tests.conftest import ROOT, free_port

NANO = ROOT / "assets" / "medplib-nano"

pytestmark = pytest.mark.slow  # servers of several programs start
FUNDUS = ROOT / "data" / "sample" / "images" / "fundus_00--Phantom--seed505case000004--0000.png"
KEY = "for clients"


@pytest.mark.parametrize(
    "arguments",
    [{"modle": "x"}, {"slots": 0}, {"min_replicas": 5}, {"model": "missing"}, {"dtype": "fp8"}, {"max_replicas": "x"}],
)
def test_wrong_arguments_are_one_sentence(arguments: dict[str, object]) -> None:
    with pytest.raises(MedPLIBError) as error:
        read_settings(arguments)
    assert "\n" not in str(error.value)


def test_arguments_come_as_texts() -> None:
    settings = read_settings({"model": str(NANO), "slots": "3", "num_gpus": "0.5"})
    assert (settings.slots, settings.num_gpus, settings.model) == (3, 0.5, NANO)


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    """Base URL of the nano under Ray."""
    port = free_port()
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_LOG_TO_STDERR": "0", "MEDPLIB_CLIENT_KEY": KEY}
    own_token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # else Ray leaves one in the home
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**quiet, **own_token}.items():
            patch.setenv(name, value)
        ray = pytest.importorskip("ray", reason="Ray is not installed")
        from ray import serve

        patch.setenv("PYTHONPATH", f"{ROOT}:{os.environ.get('PYTHONPATH', '')}")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            app = build_app({"num_cpus": 0.5, "slots": 2, "waiting": 4, "max_replicas": 2})
            serve.run(app, name="medplib", route_prefix="/")
            yield f"http://127.0.0.1:{port}"
        finally:
            serve.shutdown()
            ray.shutdown()


def headers(key: str = KEY) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def picture(path: Path = FUNDUS) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def test_status_and_readiness(served: str) -> None:
    with httpx.Client(base_url=served, trust_env=False, headers=headers(), timeout=30) as client:
        status = client.post("/worker_get_status").json()
        assert status["model_names"] == ["medplib-nano"] and status["capacity"] == 6
        assert client.get("/readyz").status_code == 200
        assert client.get("/v1/models").json()["data"][0]["id"] == "medplib-nano"


def test_an_answer_streams_with_its_mask(served: str) -> None:
    prompt = render([Turn("human", "<image>\nPlease segment the optic disc.")])
    request = GenerateRequest(prompt=prompt, images=[picture()], max_new_tokens=32)
    reader, chunks = ChunkReader(), list[Chunk]()
    with httpx.stream(
        "POST",
        f"{served}/worker_generate_stream",
        content=request.model_dump_json(),
        headers=headers(),
        timeout=60,
        trust_env=False,
    ) as response:
        for data in response.iter_raw():
            chunks += reader.feed(data)
    assert len(chunks) > 2 and [len(chunk.answer) for chunk in chunks] == sorted(len(chunk.answer) for chunk in chunks)
    assert chunks[-1].finish == "end" and chunks[-1].text.startswith(prompt)
    assert decode_rle(chunks[-1].masks[0]["rle"]).sum() == chunks[-1].masks[0]["area_px"] > 0


def test_the_openai_api_answers_and_refuses(served: str) -> None:
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture()}"}}
    content = [{"type": "text", "text": "What kind of medical image is this?"}, image]
    body = {"model": "medplib-nano", "messages": [{"role": "user", "content": content}], "max_tokens": 16}
    with httpx.Client(base_url=served, trust_env=False, timeout=60) as client:
        answer = client.post("/v1/chat/completions", json=body, headers=headers()).json()
        assert answer["choices"][0]["message"]["content"] == "Fundus"
        refused = client.post("/v1/chat/completions", json=body, headers=headers("wrong"))
        assert refused.status_code == 401 and "key" in json.dumps(refused.json())
        nothing = client.post("/worker_generate_stream", json={"prompt": "<image> x"}, headers=headers())
        assert nothing.status_code == 400 and "image" in nothing.json()["error"]


def test_it_scales_between_its_bounds(served: str) -> None:
    from ray import serve

    status = serve.status().applications["medplib"].deployments["medplib"]
    assert status.status.value == "HEALTHY" and sum(status.replica_states.values()) >= 1
    config = build_app({"min_replicas": 0, "max_replicas": 7, "slots": 5})._bound_deployment._deployment_config
    assert (config.autoscaling_config.min_replicas, config.autoscaling_config.max_replicas) == (0, 7)
    assert config.autoscaling_config.target_ongoing_requests == 5
