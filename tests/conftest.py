"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


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
