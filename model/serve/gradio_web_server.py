"""The web page: ``python -m model.serve.gradio_web_server --controller http://localhost:64000 --port 64001``.

Everything it shows comes from itself: no font, script or picture of another host, and a header that forbids them.
Uploads stay in memory and what a visitor saves is sent as data, so no file is written and none has an address.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model.errors import MedPLIBError, escape_unprintable
from model.serve.client import ControllerClient
from model.serve.limits import BodyLimit, ServeLimits
from model.serve.running import check_port, is_loopback, run_app

_log = logging.getLogger(__name__)
_GRACE_SECONDS = 5.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the page until it is stopped; returns the exit code."""
    escape_unprintable()
    options = build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for talkative in ("httpx", "highdicom"):
        logging.getLogger(talkative).setLevel(logging.WARNING)
    try:
        if options.share:
            raise MedPLIBError("the page opens no tunnels to other hosts; leave --share out, and use --host 0.0.0.0")
        check_port(options.host, options.port)
        if not is_loopback(options.host):
            _log.warning("whoever reaches this port can use the page; put a proxy that asks for a password before it")
        app = make_app(options)
        sys.stdout.write(f"The page is at http://{_reachable(options.host)}:{options.port}\n")
        sys.stdout.flush()
        run_app(app, options.host, options.port, grace=_GRACE_SECONDS)
    except MedPLIBError as error:
        sys.stderr.write(f"gradio_web_server: {error}\n")
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="gradio_web_server", description="A page to ask about medical images. Research use only."
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for other machines too")
    parser.add_argument("--port", type=int, default=64001)
    parser.add_argument(
        "--controller",
        "--controller-url",
        "--controller_url",
        "--controller-address",
        "--controller_address",
        dest="controller",
        default="http://localhost:64000",
        help="address of the controller",
    )
    parser.add_argument(
        "--model-list-mode",
        "--model_list_mode",
        choices=("once", "reload"),
        default="once",
        help="look for models when the page is opened, or only at the start and when asked",
    )
    parser.add_argument(
        "--add_region_feature",
        "--add-region-feature",
        action="store_true",
        help="let visitors mark regions; for models with a region adapter",
    )
    parser.add_argument(
        "--client-key",
        "--client_key",
        default=os.environ.get("MEDPLIB_CLIENT_KEY") or None,
        help="the controller's client key; better set MEDPLIB_CLIENT_KEY",
    )
    parser.add_argument(
        "--votes-file",
        "--votes_file",
        type=Path,
        default=Path("medplib_votes.jsonl"),
        help="where votes are appended to, without images and texts",
    )
    parser.add_argument(
        "--log-conversations",
        "--log_conversations",
        action="store_true",
        help="write questions and answers beside the votes",
    )
    parser.add_argument("--share", action="store_true", help=argparse.SUPPRESS)
    return parser


def make_app(options: argparse.Namespace, limits: ServeLimits | None = None) -> Any:
    """The page as an ASGI application.

    Raises:
        MedPLIBError: an option is wrong.
    """
    from fastapi import FastAPI
    from fastapi.responses import PlainTextResponse

    from model.serve.web.desk import Desk
    from model.serve.web.examples import find_examples
    from model.serve.web.gate import Gate, Tray
    from model.serve.web.page import Page, PageSettings, mounted
    from model.serve.web.votes import VoteLog

    limits = limits or ServeLimits()
    client = ControllerClient(options.controller, options.client_key)
    votes = VoteLog(options.votes_file, options.log_conversations)
    desk = Desk(client, votes, Tray(limits.max_image_bytes), limits, find_examples())
    with contextlib.suppress(MedPLIBError):  # the page tells it
        desk.models = client.models()
    page = Page(desk, PageSettings(options.add_region_feature, options.model_list_mode == "reload"))
    app = FastAPI(openapi_url=None)
    for route in ("/livez", "/readyz"):
        app.get(route)(lambda: PlainTextResponse("ok\n"))
    app.post("/open")(desk.tray.receive)
    mounted(page, app)
    return BodyLimit(Gate(app), limits.max_image_bytes)


def _reachable(host: str) -> str:
    return "localhost" if host in ("", "0.0.0.0", "::") else f"[{host}]" if ":" in host else host


if __name__ == "__main__":
    sys.exit(main())
