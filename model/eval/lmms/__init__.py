"""lmms-eval integration: MedPLIB as one of its models, phantoms as tasks for any model."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from model.errors import MedPLIBError

MODEL_NAME = "medplib"
"""What ``--model`` calls it, and the key of its own settings in the tasks."""
TASKS = Path(__file__).resolve().parent / "tasks"
"""Folder of the task files, for ``--include_path``."""
SERIES = "0.7"
"""Of lmms-eval. What its numbers mean and which types it takes changes between series."""


def manifest() -> Any:
    """What the harness needs to know to load the model; the entry point ``lmms_eval.models`` names this function.

    Raises:
        MedPLIBError: lmms-eval is not installed, or is of another series.
    """
    require_lmms_eval()
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(MODEL_NAME, simple_class_path="model.eval.lmms.adapter.MedPLIB")


def require_lmms_eval() -> None:
    """Check that the harness can be imported and is of the series that the adapter speaks.

    Raises:
        MedPLIBError: it is not.
    """
    remedy = f'pip install -e ".[lmms]" and pip install --no-deps "lmms-eval=={SERIES}.*" (see docs/evaluation.md)'
    if find_spec("lmms_eval") is None:
        raise MedPLIBError(f"lmms-eval is not installed; use {remedy}")
    try:
        found = version("lmms_eval")
    except PackageNotFoundError:  # run from its sources
        return
    if not f"{found}.".startswith(f"{SERIES}."):
        raise MedPLIBError(f"lmms-eval is version {found}, MedPLIB speaks {SERIES}; use {remedy}")
