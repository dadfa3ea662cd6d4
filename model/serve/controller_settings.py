"""The controller's settings and flags."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from model.errors import MedPLIBError
from model.serve.access import checked_key
from model.serve.calling import CallSettings
from model.serve.commands import REQUEST_LIMITS, add_limit_flags, add_network_flags, seconds, whole
from model.serve.forwarding import ForwardSettings
from model.serve.limits import ServeLimits, limits_from
from model.serve.registry import DISPATCH_METHODS, RegistrySettings
from model.serve.running import GRACE_SECONDS

DEFAULT_PORT = 64000


@dataclass(frozen=True)
class ControllerSettings:
    """How a controller behaves.

    Attributes:
        api_key: secret of workers and administrators; without one only programs of this machine may be either.
        client_key: secret of those who ask; anyone may where there is none.
        allow_workers: hosts, addresses and networks at which workers may be.
        registry: how workers are chosen and given up.
        calls: bounds of what is said to workers.
        forwarding: how often a request is tried.
        limits: of one request.
        client_timeout: seconds a client may take to accept the next piece of its answer.
        grace: seconds that answers under way may take once the controller is asked to stop.
    """

    api_key: str | None = None
    client_key: str | None = None
    allow_workers: Sequence[str] = ()
    registry: RegistrySettings = field(default_factory=RegistrySettings)
    calls: CallSettings = field(default_factory=CallSettings)
    forwarding: ForwardSettings = field(default_factory=ForwardSettings)
    limits: ServeLimits = field(default_factory=ServeLimits)
    client_timeout: float = 60.0
    grace: float = GRACE_SECONDS

    def __post_init__(self) -> None:
        object.__setattr__(self, "api_key", checked_key(self.api_key, "--api-key"))
        object.__setattr__(self, "client_key", checked_key(self.client_key, "--client-key"))
        times = (self.client_timeout, self.grace, self.calls.silence_timeout, self.calls.connect_timeout)
        if min(*times, self.registry.expiry, self.registry.cool_down) <= 0:
            raise MedPLIBError("a time is zero or negative; give seconds above zero")
        if min(self.forwarding.tries, self.registry.max_failures) < 1:
            raise MedPLIBError("--tries and --max-failures are at least 1")


def make_parser() -> argparse.ArgumentParser:
    """The flags of ``python -m model.serve.controller``."""
    parser = argparse.ArgumentParser(
        prog="python -m model.serve.controller",
        description="Takes questions from pages and programs and gives them to the workers that register with it.",
        epilog="Flags may be spelled with underscores too. Keys are better kept in the environment, where other users "
        "of the machine do not see them.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="port to listen on (default: %(default)s)")
    parser.add_argument(
        "--dispatch-method",
        choices=DISPATCH_METHODS,
        default="shortest_queue",
        help="how a worker is chosen: by lot, fast ones more often, or the shortest queue (default: %(default)s)",
    )
    parser.add_argument(
        "--api-key",
        default=os.environ.get("MEDPLIB_API_KEY"),
        metavar="KEY",
        help="secret that workers show and are shown (default: $MEDPLIB_API_KEY); without one only workers of this "
        "machine are taken",
    )
    parser.add_argument(
        "--client-key",
        default=os.environ.get("MEDPLIB_CLIENT_KEY"),
        metavar="KEY",
        help="secret that pages and programs show (default: $MEDPLIB_CLIENT_KEY); without one everyone may ask",
    )
    parser.add_argument(
        "--allow-worker",
        action="append",
        default=[],
        metavar="HOST",
        help="host, address or network (10.0.0.0/8) at which workers may be; may be given again (default: where their "
        "registration comes from)",
    )
    _add_numbers(parser)
    return parser


def _add_numbers(parser: argparse.ArgumentParser) -> None:
    registry, calls, forwarding = RegistrySettings(), CallSettings(), ForwardSettings()
    times = parser.add_argument_group("faults and times, in seconds")
    for name, default, what in (
        ("expiry", registry.expiry, "silence after which a worker is forgotten"),
        ("cool-down", registry.cool_down, "how long a worker is left alone that failed"),
        ("connect-timeout", calls.connect_timeout, "until a worker takes a connection"),
        ("silence-timeout", calls.silence_timeout, "how long a worker may say nothing"),
        ("restart-wait", forwarding.restart_wait, "how long a request waits for a worker that is being restarted"),
        ("client-timeout", 60.0, "until a client takes the next piece of its answer"),
        ("grace", GRACE_SECONDS, "how long answers may go on once the controller is stopped"),
    ):
        times.add_argument(
            f"--{name}", type=seconds, default=default, metavar="S", help=f"{what} (default: {default:g})"
        )
    for name, number, what in (
        ("max-failures", registry.max_failures, "failures in a row after which a worker is left alone"),
        ("tries", forwarding.tries, "workers that a request is sent to, one after another"),
        ("max-running", calls.max_connections, "answers under way at once"),
    ):
        times.add_argument(f"--{name}", type=whole, default=number, metavar="N", help=f"{what} (default: {number})")
    add_network_flags(parser)
    add_limit_flags(parser, *REQUEST_LIMITS)


def settings_from(options: argparse.Namespace) -> ControllerSettings:
    """The settings that parsed flags mean.

    Raises:
        MedPLIBError: they do not fit.
    """
    return ControllerSettings(
        api_key=options.api_key,
        client_key=options.client_key,
        allow_workers=tuple(options.allow_worker),
        registry=RegistrySettings(
            options.dispatch_method, options.expiry, options.max_failures, cool_down=options.cool_down
        ),
        calls=CallSettings(options.connect_timeout, options.silence_timeout, max_connections=options.max_running),
        forwarding=ForwardSettings(options.tries, options.restart_wait),
        limits=limits_from(options),
        client_timeout=options.client_timeout,
        grace=options.grace,
    )
