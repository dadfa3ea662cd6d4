"""A worker: ``python -m model.serve.model_worker --model-path DIR``; its flags, and how it starts and stops.

A user's error is one sentence and exit code 2, as far as possible before anything heavy is imported or loaded.
The application itself is in ``worker_app.py``.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from model.checkpoint.directories import checkpoint_name, default_model, resolve
from model.errors import MedPLIBError, escape_unprintable
from model.serve.auth import checked_key, normal_name
from model.serve.commands import REQUEST_LIMITS, add_limit_flags, add_network_flags, seconds, whole
from model.serve.limits import limits_from
from model.serve.protocol import HEARTBEAT_SECONDS
from model.serve.server import GRACE_SECONDS, check_port, is_loopback, listen, parse_flags, run_app, set_up_logging

if TYPE_CHECKING:
    from model.serve.heartbeat import Registration

DEFAULT_PORT, DEFAULT_CONTROLLER = 64002, "http://localhost:64000"
_ANYWHERE = ("", "0.0.0.0", "::")
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_SERVER_GRACE = 2.0  # once the worker has finished, only idle connections are left

_log = logging.getLogger("model.serve.model_worker")


def make_parser() -> argparse.ArgumentParser:
    """The flags of ``python -m model.serve.model_worker``."""
    parser = argparse.ArgumentParser(
        prog="python -m model.serve.model_worker",
        description="Answers questions about images with one model, for a controller. Research use only.",
        epilog="Flags may be spelled with underscores too. Keys are better kept in the environment, where other users "
        "of the machine do not see them.",
    )
    parser.add_argument("--host", default="localhost", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="port to listen on (default: %(default)s)")
    parser.add_argument(
        *("--controller", "--controller-address", "--controller-url"),
        default=DEFAULT_CONTROLLER,
        metavar="URL",
        help="controller to register with (default: %(default)s); it may be started later",
    )
    parser.add_argument(
        *("--worker", "--worker-address", "--worker-url"),
        metavar="URL",
        help="address at which the controller reaches this worker (default: http://HOST:PORT)",
    )
    parser.add_argument("--no-register", action="store_true", help="answer without a controller")
    parser.add_argument(
        "--heartbeat", type=seconds, default=HEARTBEAT_SECONDS, metavar="S", help="seconds between two (default: 15)"
    )
    parser.add_argument(
        "--api-key",
        default=os.environ.get("MEDPLIB_API_KEY"),
        metavar="KEY",
        help="secret shared with the controller (default: $MEDPLIB_API_KEY); without one only programs of this machine "
        "are answered",
    )
    model = parser.add_argument_group("model")
    model.add_argument("--model-path", type=Path, metavar="DIR", help="checkpoint; the shipped one when absent")
    model.add_argument("--model-base", type=Path, metavar="DIR", help="what a LoRA in --model-path was trained on")
    model.add_argument(
        *("--model-names", "--model-name"), metavar="A[,B…]", help="what it answers for (default: the directory's name)"
    )
    model.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1 …, or auto (default): the GPU if there is one")
    model.add_argument("--device-map", metavar="D", help="the same")
    model.add_argument("--dtype", choices=tuple(_DTYPES), help="of the weights; as stored when absent, fp32 on a CPU")
    bits = model.add_mutually_exclusive_group()
    bits.add_argument("--load-8bit", action="store_true", help="language model in 8 bits")
    bits.add_argument("--load-4bit", action="store_true", help="language model in 4 bits")
    model.add_argument("--vision-tower", type=Path, metavar="DIR", help="CLIP, for published checkpoints")
    model.add_argument(
        *("--vision-pretrained", "--sam"), type=Path, metavar="FILE", help="SAM-Med2D, for published checkpoints"
    )
    model.add_argument("--add-region-feature", action="store_true", help="refuse a checkpoint that knows no regions")
    service = parser.add_argument_group("service")
    service.add_argument("--slots", type=whole, default=8, metavar="N", help="answers written at once (default: 8)")
    service.add_argument("--max-length", type=whole, metavar="N", help="tokens of a conversation with its image")
    service.add_argument(
        "--max-waiting", type=whole, default=64, metavar="N", help="requests that wait; then it says 429 (default: 64)"
    )
    for name, default, what in (
        ("request-timeout", 240.0, "an answer may take"),
        ("client-timeout", 60.0, "a client may take for the next piece of its answer"),
        ("grace", GRACE_SECONDS, "answers under way may take once the worker is stopped"),
    ):
        service.add_argument(
            f"--{name}", type=seconds, default=default, metavar="S", help=f"seconds {what} (default: {default:g})"
        )
    service.add_argument("--log-conversations", action="store_true", help="log questions and answers")
    add_network_flags(parser, root_path=False)
    add_limit_flags(parser, *REQUEST_LIMITS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""

    def stop_loading(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop_loading)
    escape_unprintable()
    options = parse_flags(make_parser(), arguments)
    set_up_logging()
    try:
        _run(options)
    except MedPLIBError as error:
        sys.stderr.write(f"model_worker: {error}\n")
        return 2
    except KeyboardInterrupt:  # before the server was up
        pass
    return 0


def _run(options: argparse.Namespace) -> None:
    registration = _registration(options)
    directory, device = _check_model(options)
    limits = limits_from(options)
    import torch  # this and what follows takes a while

    from model.inference.engine import EngineSettings
    from model.serve.registry import check_models
    from model.serve.worker_app import WorkerSettings, make_worker_app
    from model.serve.worker_loading import ModelChoice, describe_engine, load_engine

    names = [name.strip() for name in (options.model_names or checkpoint_name(directory)).split(",")]
    check_models(names)
    choice = ModelChoice(
        directory,
        options.model_base,
        device,
        dtype=getattr(torch, _DTYPES[options.dtype]) if options.dtype else None,
        quantisation="int8" if options.load_8bit else "int4" if options.load_4bit else None,
        vision_tower=options.vision_tower,
        sam=options.vision_pretrained,
        needs_regions=options.add_region_feature,
    )
    bounds = EngineSettings(slots=options.slots, max_length=options.max_length, waiting=options.max_waiting)
    engine = load_engine(choice, bounds)
    settings = WorkerSettings(
        tuple(names),
        capacity=options.slots + options.max_waiting,
        limits=limits,
        request_timeout=options.request_timeout,
        client_timeout=options.client_timeout,
        key=options.api_key,
        registration=registration,
        grace=options.grace,
        log_conversations=options.log_conversations,
        conversation_turns=engine.model.config.conversation_turns,
        details=describe_engine(engine, choice),
    )
    app = make_worker_app(engine, settings)
    hosts = options.allow_host
    if registration and (hosts or is_loopback(options.host)):  # else any name is served
        hosts = [*hosts, urlsplit(registration.worker).hostname or ""]
    with engine:
        drain = app.state.worker.finish
        run_app(app, options.host, options.port, grace=_SERVER_GRACE, allow_hosts=hosts, drain=drain)


def _registration(options: argparse.Namespace) -> Registration | None:
    """With whom the worker registers; the port is looked at, and a free one chosen where it is 0.

    Raises:
        MedPLIBError: an address or the key is malformed, or the port is in use.
    """
    options.api_key = checked_key(options.api_key, "--api-key")
    check_port(options.host, options.port)
    if not options.port:
        listeners = listen(options.host, 0)
        options.port = listeners[0].getsockname()[1]
        for listener in listeners:
            listener.close()
    if not options.api_key and not is_loopback(options.host):
        _log.warning("reachable from other machines without --api-key: only programs of this machine are answered")
    if options.no_register:
        return None
    from model.serve.heartbeat import Registration

    try:
        controller = normal_name(options.controller)
    except MedPLIBError as error:
        raise MedPLIBError(f"--controller {options.controller!r:.80} is no address; give http://HOST:PORT") from error
    return Registration(controller, _own_address(options, controller), options.api_key, options.heartbeat)


def _own_address(options: argparse.Namespace, controller: str) -> str:
    if options.worker:
        return normal_name(options.worker)
    if options.host not in _ANYWHERE:
        host = f"[{options.host}]" if ":" in options.host else options.host
        return normal_name(f"http://{host}:{options.port}")
    if not is_loopback(urlsplit(controller).hostname or ""):
        raise MedPLIBError(
            f"--host {options.host} gives the controller no address; give the one at which it reaches this worker with "
            f"--worker http://HOST:{options.port}"
        )
    return f"http://localhost:{options.port}"


def _check_model(options: argparse.Namespace) -> tuple[Path, str]:
    """Where the model is and where it goes, as far as that can be checked at once.

    Raises:
        MedPLIBError: flags contradict each other, or there is nothing at a path.
    """
    directory = resolve(options.model_path) if options.model_path else default_model()
    if not directory.is_dir():
        raise MedPLIBError(f"there is no checkpoint directory {directory}; give one with --model-path")
    if options.model_base is not None and not resolve(options.model_base).is_dir():
        raise MedPLIBError(f"there is no directory {options.model_base}; give --model-base another or leave it out")
    if options.device and options.device_map and options.device != options.device_map:
        raise MedPLIBError(f"--device {options.device} and --device_map {options.device_map} differ; give one of them")
    return directory, options.device or options.device_map or "auto"


if __name__ == "__main__":
    sys.exit(main())
