"""Fixtures shared by all tests."""

from __future__ import annotations

import contextlib
import os
import socket
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("MEDPLIB_MODEL", str(ROOT / "assets" / "medplib-nano"))  # in the programs that tests start, too

_FIRST = 15000 + 1000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) + os.getpid() % 500
_PORTS = iter(range(_FIRST, _FIRST + 500))
"""Of each worker alone, and below those that the kernel gives to clients, which could take one before it is bound."""


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    for port in _PORTS:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with most slow tests first, so that no worker is left with a long file at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the reference arrays; tests that need it are skipped where it is absent, never in CI."""
    folder = Path(os.environ.get("MEDPLIB_GOLDEN", ROOT.parent / "shared" / "golden"))
    if not (folder / "README.md").is_file():
        reason = f"no reference arrays at {folder}; set MEDPLIB_GOLDEN to their folder"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


@pytest.fixture(scope="session")
def examples(golden: Path) -> Path:
    """Folder of real example images that the reference arrays refer to."""
    return golden.parent / "examples"
