"""Generated requests at every route of a controller: none breaks it, and its answers are as its schema says."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from PIL import Image
from schemathesis.checks import load_all_checks

from model.inference.engine import Engine, EngineSettings
from model.serve.controller import ControllerSettings, make_app
from model.serve.limits import ServeLimits
from model.serve.worker_app import WorkerSettings, make_worker_app
from tests.conftest import ROOT

Serving = Callable[..., AbstractContextManager[str]]
load_all_checks()
_CHECKS = {check.__name__: check for check in schemathesis.checks.CHECKS.get_all()}
KEY = "fuzz"
SETTINGS = ControllerSettings(client_key=KEY)
LOOSER = ("positive_data_acceptance",)  # a schema cannot say that a conversation ends in a question, and the like
STREAMED = "/worker_generate_stream"  # tells errors in a stream that begins with 200, as published clients read it


def picture() -> str:
    content = io.BytesIO()
    Image.new("L", (24, 16), 80).save(content, "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


PICTURE = picture()


@pytest.fixture(scope="module")
def controller(serving: Serving) -> Iterator[str]:
    """A controller with a key for clients, and a worker with the nano, whose answers are kept short."""
    app = make_app(SETTINGS)
    engine = Engine.from_pretrained(ROOT / "assets" / "medplib-nano", EngineSettings(slots=4, waiting=16))
    worker = WorkerSettings(("nano",), limits=ServeLimits(max_new_tokens=3))
    with engine, serving(make_worker_app(engine, worker)) as there, serving(app) as url:
        answer = httpx.post(f"{url}/register_worker", json={"worker_name": there, "check_heart_beat": False})
        assert answer.status_code == 200, answer.text
        yield url


schema = schemathesis.openapi.from_dict(make_app(SETTINGS).openapi())


@schema.parametrize()
@settings(max_examples=20, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None)
def test_generated_requests(case: schemathesis.Case, controller: str) -> None:
    excluded = {*LOOSER, *(["negative_data_rejection"] if case.operation.path == STREAMED else [])}
    checks = [check for name, check in _CHECKS.items() if name not in excluded]
    sent: dict[str, Any] = {"base_url": controller, "headers": {"Authorization": f"Bearer {KEY}"}}
    case.call_and_validate(checks=checks, **sent)
    if case.operation.path == "/v1/chat/completions" and isinstance(case.body, dict):
        case.body = _nearly_proper(case.body)
        checks.remove(_CHECKS["negative_data_rejection"])
        case.call_and_validate(checks=checks, **sent)


def _nearly_proper(body: dict[str, Any]) -> dict[str, Any]:
    """The same request with an image, a model and a question that there are, so that more of it is looked at."""
    messages = body.get("messages")
    question = {"role": "user", "content": [{"type": "text", "text": "What?"}, _image(PICTURE)]}
    asked = [_with_picture(message) for message in messages] if isinstance(messages, list) else []
    return {**body, "model": "nano", "messages": [*asked, question], "stream": len(asked) % 2 == 1}


def _with_picture(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_picture(one) for one in value]
    if isinstance(value, dict):
        return {name: PICTURE if name == "url" else _with_picture(one) for name, one in value.items()}
    return value


def _image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}
