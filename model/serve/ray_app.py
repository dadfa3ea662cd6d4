"""The engine as a Ray Serve application, for clusters that scale replicas with the load.

    RAY_USAGE_STATS_ENABLED=0 serve run model.serve.ray_app:build_app model=DIR num_gpus=1 max_replicas=8

Each replica is a worker without a controller: Ray's proxy takes the place of that. It has a worker's routes, and
OpenAI's under ``/v1``. Ray is an extra: ``pip install -e '.[serve,cluster]'``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import Depends, FastAPI
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model.checkpoint.directories import checkpoint_name, default_model, resolve
from model.errors import MedPLIBError
from model.serve.auth import WorkerGuard, checked_key
from model.serve.protocol import Chunk, GenerateRequest

if TYPE_CHECKING:
    from ray.serve import Application

    from model.inference.engine import Engine
    from model.serve.worker_app import Worker

_DRAIN_SECONDS = 60.0


class RaySettings(BaseModel):
    """What ``serve run`` may be given as ``name=value``.

    Attributes:
        model: checkpoint directory, the same on every node.
        name: what the model is called; its run's or directory's name when empty (``checkpoint_name``).
        device: ``auto`` is a GPU where replicas have one.
        dtype: ``fp32`` or ``bf16``; as stored when absent, fp32 on a CPU.
        slots, waiting: answers a replica writes at once, and requests that wait at it beside.
        queued: requests that wait at Ray's proxy beyond that; further ones are refused with 503.
        min_replicas, max_replicas: bounds of autoscaling; 0 at least lets the last one go.
        target: requests per replica that autoscaling aims at; as many as there are slots when absent.
        num_cpus, num_gpus: of a replica.
        request_timeout: seconds an answer may take.
        client_key: secret that clients show; $MEDPLIB_CLIENT_KEY when absent. Without one only the machine that Ray's
            proxy runs on is answered.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: Path = Field(default_factory=default_model)
    name: str = ""
    device: str = "auto"
    dtype: str | None = Field(None, pattern="^(fp32|bf16)$")
    slots: int = Field(8, ge=1)
    waiting: int = Field(32, ge=1)
    queued: int = Field(64, ge=0)
    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(4, ge=1)
    target: float | None = Field(None, gt=0)
    num_cpus: float = Field(1.0, gt=0)
    num_gpus: float = Field(0.0, ge=0)
    request_timeout: float = Field(240.0, gt=0)
    client_key: str | None = Field(default_factory=lambda: os.environ.get("MEDPLIB_CLIENT_KEY"))


class Replica:
    """One engine behind the routes of a worker and of OpenAI's API.

    Args:
        settings: of the application.
    """

    def __init__(self, settings: RaySettings) -> None:
        import torch

        from model.inference.engine import EngineSettings
        from model.serve.worker_loading import ModelChoice, load_engine

        device = settings.device if settings.device != "auto" else "cuda" if settings.num_gpus else "cpu"
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, None: None}[settings.dtype]
        bounds = EngineSettings(slots=settings.slots, waiting=settings.waiting)
        self.engine = load_engine(ModelChoice(settings.model, device=device, dtype=dtype), bounds)
        self.engine.start()
        self.routes = make_replica_app(self.engine, settings)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self.routes

    async def check_health(self) -> None:
        """Asked by Ray every few seconds; a replica that raises is replaced.

        Raises:
            RuntimeError: the engine cannot go on.
        """
        if trouble := self.routes.state.worker.loop.trouble():
            raise RuntimeError(trouble)


def build_app(arguments: Mapping[str, Any]) -> Application:
    """The application, for ``serve run`` and for ``serve`` configuration files.

    Args:
        arguments: fields of ``RaySettings``.

    Raises:
        MedPLIBError: Ray is not installed, or an argument is unknown or malformed.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise MedPLIBError("Ray is not installed; install with pip install -e '.[serve,cluster]'") from error
    settings = read_settings(arguments)
    deployment = serve.deployment(
        name="medplib",
        max_ongoing_requests=settings.slots + settings.waiting,
        max_queued_requests=settings.queued or -1,
        graceful_shutdown_timeout_s=_DRAIN_SECONDS,
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": settings.target or settings.slots,
        },
        ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus},
    )
    return deployment(serve.ingress()(Replica)).bind(settings)


def read_settings(arguments: Mapping[str, Any]) -> RaySettings:
    """The settings that arguments mean.

    Raises:
        MedPLIBError: one is unknown or malformed, or there is no checkpoint.
    """
    try:
        settings = RaySettings.model_validate(dict(arguments))
    except ValidationError as error:
        first = error.errors()[0]
        known = ", ".join(RaySettings.model_fields)
        raise MedPLIBError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}; known are {known}") from error
    if settings.min_replicas > settings.max_replicas:
        raise MedPLIBError(
            f"min_replicas is {settings.min_replicas} and max_replicas {settings.max_replicas}; give no more than that"
        )
    if not (resolve(settings.model) / "config.json").is_file():
        raise MedPLIBError(f"no checkpoint at {settings.model}; give model=DIR, which every node has")
    return settings


def make_replica_app(engine: Engine, settings: RaySettings) -> FastAPI:
    """A worker's application that registers nowhere, with OpenAI's routes beside.

    Args:
        engine: started.
        settings: of the application.
    """
    from model.serve.controller import ControllerSettings
    from model.serve.openai_api import openai_router
    from model.serve.worker_app import WorkerSettings, make_worker_app

    key = checked_key(settings.client_key, "client_key")
    worker_settings = WorkerSettings(
        model_names=(settings.name or checkpoint_name(settings.model),),
        capacity=settings.slots + settings.waiting,
        request_timeout=settings.request_timeout,
        key=key,
        conversation_turns=engine.model.config.conversation_turns,
    )
    app = make_worker_app(engine, worker_settings)
    own = OwnAnswers(app.state.worker)
    guard = WorkerGuard(key, name="client key")
    api_settings = ControllerSettings(client_key=key, limits=worker_settings.limits)
    app.include_router(openai_router(own, own, api_settings), dependencies=[Depends(guard)])
    return app


class OwnAnswers:
    """What OpenAI's routes need of a controller, of one worker in the same process."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def models(self) -> list[str]:
        """What is answered for."""
        return list(self.worker.settings.model_names)

    def conversation_turns(self, _: str) -> int:
        """Questions of a conversation that the model was trained on."""
        return self.worker.settings.conversation_turns

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk]:
        """The answer as it grows.

        Raises:
            Refusal: there is none.
        """
        body = request.model_dump_json(exclude_unset=True).encode()
        async with contextlib.aclosing(self.worker.answer(body)) as pieces:
            async for piece in pieces:
                yield Chunk.model_validate_json(piece[:-1])
