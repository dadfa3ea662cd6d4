"""``medplib serve``: flags and settings."""

from __future__ import annotations

import argparse
import functools
import math
import os
import re
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from model.errors import MedPLIBError

LIMITS = ("image-mib", "pixels", "regions", "turns", "prompt-chars", "new-tokens")
REQUEST_LIMITS, PAGE_LIMITS = ("body-mib",), ("volume-mib", "frames")
"""``--max-…`` of every server, of controller and workers, and of the page; see ``limits.ServeLimits``."""


_WORKER_FLAGS = ("dtype", "slots", "max-waiting", "request-timeout")


def whole(text: str) -> int:
    """A flag's whole number from 1 on, for argparse."""
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def seconds(text: str) -> float:
    """A flag's time above 0, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return value


def _host_name(text: str) -> str:
    if not text.isascii() or not text or set(text) & set("/:@*?#[] "):
        raise argparse.ArgumentTypeError(f"{text!r} is no host name; give one without scheme, port and path")
    return text


def _root_path(text: str) -> str:
    path = "/" + text.strip("/") if text.strip("/") else ""
    if not text.isascii() or not text.isprintable() or set(text) & set(":?#\\ ") or "//" in path:
        raise argparse.ArgumentTypeError(f"{text!r} is no path such as /medplib")
    return path


def add_network_flags(parser: argparse.ArgumentParser, root_path: bool = True) -> None:
    """``--allow-host`` and ``--root-path``, for ``running.run_app``."""
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        type=_host_name,
        metavar="NAME",
        help="serve requests for this host name; may be given again (docs/security.md#host-names)",
    )
    if root_path:
        help_text = "sub-path at which a reverse proxy shows it, such as /medplib"
        parser.add_argument("--root-path", type=_root_path, default="", metavar="PATH", help=help_text)


def add_limit_flags(parser: argparse.ArgumentParser, *more: str) -> None:
    """``--max-pixels N`` and its like, for ``limits.limits_from``."""
    group = parser.add_argument_group("limits of one request (defaults: docs/security.md#limits)")
    for flag in (*LIMITS, *more):
        group.add_argument(f"--max-{flag}", type=whole, metavar="N")


def add_serve_command(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """``medplib serve``; the caller sets what runs it."""
    serve = commands.add_parser("serve", help="start controller, workers and web page, until Ctrl-C")
    serve.add_argument("--model", type=Path, metavar="DIR", help="checkpoint; the shipped one when absent")
    serve.add_argument("--model-base", "--model_base", type=Path, metavar="DIR", help="what a LoRA was trained on")
    serve.add_argument("--host", default="127.0.0.1", help="of page and API; 127.0.0.1 (default) is this machine alone")
    serve.add_argument("--port", type=int, default=0, metavar="N", help="of the page; 64001 or a free one when absent")
    serve.add_argument(
        "--api-port", type=int, default=0, metavar="N", help="of the API; 64000 or a free one when absent"
    )
    serve.add_argument("--no-web", action="store_true", help="the API alone")
    serve.add_argument("--workers", type=whole, metavar="N", help="as many as there are devices when absent")
    serve.add_argument(
        "--device",
        default="auto",
        metavar="A[,B…]",
        help="auto (default), cpu, cuda, or several for workers in turn",
    )
    serve.add_argument("--dtype", choices=("fp32", "bf16"), help="of the weights; as stored when absent, fp32 on a CPU")
    serve.add_argument("--load-8bit", "--load_8bit", action="store_true", help="language model in 8 bits")
    serve.add_argument("--load-4bit", "--load_4bit", action="store_true", help="language model in 4 bits")
    serve.add_argument("--vision-tower", "--vision_tower", metavar="DIR", help="CLIP, for published checkpoints")
    serve.add_argument(
        "--sam", "--vision_pretrained", metavar="FILE", help="SAM-Med2D, for published checkpoints without it"
    )
    serve.add_argument("--slots", type=whole, metavar="N", help="answers that a worker writes at once")
    serve.add_argument(
        "--max-waiting", type=whole, metavar="N", help="requests that wait at a worker; then it says 429"
    )
    serve.add_argument("--request-timeout", type=seconds, metavar="S", help="seconds an answer may take")
    serve.add_argument("--dispatch-method", choices=("lottery", "shortest_queue"), default="shortest_queue")
    serve.add_argument("--votes-file", type=Path, metavar="FILE", help="where the page's votes are appended")
    serve.add_argument("--log-conversations", action="store_true", help="log questions and answers")
    serve.add_argument("--logs", type=Path, metavar="DIR", help="log files of the programs, 20 MB each at most")
    serve.add_argument("--start-timeout", type=seconds, default=900.0, metavar="S", help="seconds a start may take")
    serve.add_argument("--grace", type=seconds, default=30.0, metavar="S", help="seconds answers may take at a stop")
    add_network_flags(serve)
    add_limit_flags(serve, *REQUEST_LIMITS, *PAGE_LIMITS)
    return serve


def run_serve(options: argparse.Namespace, model: Path) -> int:
    """``medplib serve`` of a checkpoint.

    Raises:
        MedPLIBError: something is wrong with what is to be served, or a program could not be started.
    """
    packages = ["fastapi", "uvicorn", "httpx", "prometheus_client", *([] if options.no_web else ["gradio"])]
    if missing := [name for name in packages if find_spec(name) is None]:
        raise MedPLIBError(f"{', '.join(missing)} cannot be imported; install with pip install -e '.[serve]'")
    from model.serve.launcher import CLIENT_KEY, Launcher, LaunchSettings
    from model.serve.server import is_loopback

    if options.load_8bit and options.load_4bit:
        raise MedPLIBError("--load-8bit and --load-4bit exclude each other; give one")
    values: dict[str, Any] = {f"--{name}": getattr(options, name.replace("-", "_")) for name in _WORKER_FLAGS}
    values |= {"--vision_tower": options.vision_tower, "--vision_pretrained": options.sam}
    bits = next((bits for bits in (8, 4) if getattr(options, f"load_{bits}bit")), 16)
    quantized = [f"--load-{bits}bit"] if bits < 16 else []
    hosts = [word for name in options.allow_host for word in ("--allow-host", name)]
    root_path = ["--root-path", options.root_path] if options.root_path else []
    conversations = ["--log-conversations"] if options.log_conversations else []
    shared = _words({"--grace": f"{options.grace:g}", **_limits(options, *LIMITS, *REQUEST_LIMITS)})
    page = _words({"--votes-file": options.votes_file, **_limits(options, *LIMITS, *PAGE_LIMITS)})
    settings = LaunchSettings(
        model=model,
        base=options.model_base,
        host=options.host,
        port=options.port,
        api_port=options.api_port,
        devices=worker_devices(options.device, options.workers),
        web=not options.no_web,
        worker_flags=[*_words(values), *quantized, *shared, *conversations],
        web_flags=[*hosts, *root_path, *page, *conversations],
        controller_flags=[*hosts, *root_path, *shared, "--dispatch-method", options.dispatch_method],
        dtype=options.dtype,
        bits=bits,
        logs=options.logs,
        start_seconds=options.start_timeout,
        grace=options.grace,
    )
    if not is_loopback(settings.host) and not os.environ.get(CLIENT_KEY):
        sys.stderr.write(
            f"medplib: everyone who reaches {settings.host} may ask, as {CLIENT_KEY} is not set; "
            "set it, or let a proxy with passwords stand before page and API\n"
        )
    Launcher(settings, functools.partial(print, flush=True)).run()
    return 0


def _limits(options: argparse.Namespace, *flags: str) -> dict[str, int | None]:
    return {f"--max-{flag}": getattr(options, f"max_{flag.replace('-', '_')}") for flag in flags}


def _words(values: Mapping[str, Any]) -> list[str]:
    """Flags and values of a command line, without those that were not given."""
    return [word for name, value in values.items() if value is not None for word in (name, str(value))]


def worker_devices(names: str, workers: int | None) -> list[str]:
    """A device for each worker, in turn.

    Raises:
        MedPLIBError: there is no device or no worker.
    """
    devices = [name.strip() for name in names.split(",") if name.strip()]
    if not devices:
        raise MedPLIBError("--device names no device; give auto, cpu or cuda")
    for device in devices:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
            raise MedPLIBError(f"--device {device} is no device; give auto, cpu, cuda, cuda:1 …")
    count = len(devices) if workers is None else workers
    if count < 1:
        raise MedPLIBError(f"--workers is {count}; give at least 1")
    return [devices[number % len(devices)] for number in range(count)]
