"""Benchmark scripts as modules, for their tests."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

BENCH = Path(__file__).resolve().parents[1] / "scripts" / "bench"


@contextmanager
def bench_script(name: str) -> Iterator[ModuleType]:
    """A script, with its neighbours to import from as when it is run; their plain names are gone afterwards."""
    before = set(sys.modules)
    sys.path.insert(0, str(BENCH))
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCH))
        for other in set(sys.modules) - before:
            if Path(getattr(sys.modules[other], "__file__", None) or "/").parent == BENCH:
                del sys.modules[other]
