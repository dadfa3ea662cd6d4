"""The web page: ``python -m model.serve.gradio_web_server --controller http://localhost:64000 --port 64001``.

Everything it shows comes from itself: no font, script or picture of another host, and a header that forbids them.
Uploads stay in memory and what a visitor saves is sent as data, so no file is written and none has an address.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from model.errors import MedPLIBError, escape_unprintable
from model.serve.client import ControllerClient
from model.serve.commands import PAGE_LIMITS, add_limit_flags, add_network_flags
from model.serve.limits import BodyLimit, limits_from
from model.serve.server import check_port, is_loopback, parse_flags, run_app, set_up_logging

_log = logging.getLogger("model.serve.gradio_web_server")  # also where it is run as a program
_GRACE_SECONDS = 5.0
_SWEEP_SECONDS = 30.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the page until it is stopped; returns the exit code."""
    escape_unprintable()
    options = parse_flags(build_parser(), arguments)
    set_up_logging()
    try:
        if options.share:
            raise MedPLIBError("the page opens no tunnels to other hosts; leave --share out, and use --host 0.0.0.0")
        check_port(options.host, options.port)
        if not is_loopback(options.host):
            _log.warning("everyone who reaches this port can use the page; put a proxy with passwords before it")
        hosts, root_path = options.allow_host, options.root_path
        run_app(
            make_app(options), options.host, options.port, grace=_GRACE_SECONDS, allow_hosts=hosts, root_path=root_path
        )
    except MedPLIBError as error:
        sys.stderr.write(f"gradio_web_server: {error}\n")
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="gradio_web_server", description="A page to ask about medical images. Research use only."
    )
    add, key = parser.add_argument, os.environ.get("MEDPLIB_CLIENT_KEY") or None
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for other machines too")
    add("--port", type=int, default=64001)
    addresses = ("--controller", "--controller-url", "--controller-address")
    add(*addresses, dest="controller", default="http://localhost:64000", help="address of the controller")
    modes = "look for models when the page is opened, or only at the start and when asked"
    add("--model-list-mode", choices=("once", "reload"), default="once", help=modes)
    regions = "let visitors mark regions; for models with a region adapter"
    add("--add-region-feature", action="store_true", help=regions)
    add("--client-key", default=key, help="the controller's client key; better set MEDPLIB_CLIENT_KEY")
    votes = "where votes are appended to, without images and texts"
    add("--votes-file", type=Path, default=Path("medplib_votes.jsonl"), help=votes)
    add("--log-conversations", action="store_true", help="write questions and answers beside the votes")
    add_network_flags(parser)
    add_limit_flags(parser, *PAGE_LIMITS)
    add("--share", action="store_true", help=argparse.SUPPRESS)
    return parser


def make_app(options: argparse.Namespace) -> Any:
    """The page as an ASGI application.

    Raises:
        MedPLIBError: an option is wrong.
    """
    from fastapi import FastAPI
    from fastapi.responses import PlainTextResponse

    from model.serve.web.gate import Gate, Tray
    from model.serve.web.handlers import Handlers, VoteLog
    from model.serve.web.view import find_examples

    for name in ("all_proxy", "http_proxy", "https_proxy"):  # gradio's clients would use them, or fail on SOCKS ones
        for spelling in (name, name.upper()):
            os.environ.pop(spelling, None)
    from model.serve.web.page import Page, mounted

    limits = limits_from(options)
    client = ControllerClient(options.controller, options.client_key)
    votes = VoteLog(options.votes_file, options.log_conversations)
    tray = Tray(limits.max_upload_bytes, max(limits.max_upload_bytes, 3 * limits.max_image_bytes))
    handlers = Handlers(client, votes, tray, limits, find_examples())
    with contextlib.suppress(MedPLIBError):  # the page shows it
        handlers.models = client.models()
    page = Page(handlers, options.add_region_feature, options.model_list_mode == "reload")

    async def sweep() -> None:
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            tray.sweep()
            page.sessions.sweep()

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        sweeping = asyncio.create_task(sweep())
        yield
        sweeping.cancel()

    app = FastAPI(openapi_url=None, lifespan=lifespan)
    for route in ("/livez", "/readyz"):
        app.get(route)(lambda: PlainTextResponse("ok\n"))
    app.post("/open")(tray.receive)
    mounted(page, app, options.root_path)
    return BodyLimit(Gate(app), limits.max_upload_bytes, max_total_bytes=tray.max_held)


if __name__ == "__main__":
    sys.exit(main())
