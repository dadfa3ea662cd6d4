"""Pickles of other people's, read without running anything that is in them."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

from model.errors import MedPLIBError

_HARMLESS = {("collections", "OrderedDict"), ("collections", "defaultdict"), ("builtins", "set"), ("builtins", "list")}
_MAX_BYTES = 1 << 30


class _PlainUnpickler(pickle.Unpickler):
    """Builds lists, mappings, texts and numbers; a name of anything else is an error before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.replace("__builtin__", "builtins"), name) in _HARMLESS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_plain_pickle(path: Path) -> Any:
    """What a pickle of plain containers holds.

    Raises:
        MedPLIBError: it is no pickle, is larger than 1 GiB, or holds more than lists, mappings, texts and numbers.
    """
    if path.stat().st_size > _MAX_BYTES:
        raise MedPLIBError(f"{path} is larger than 1 GiB; the question files of a set are far smaller")
    try:
        return _PlainUnpickler(io.BytesIO(path.read_bytes()), encoding="utf-8").load()
    except Exception as error:  # a damaged pickle makes the reader raise nearly anything
        raise MedPLIBError(
            f"{path} is no pickle of plain lists and mappings ({str(error) or type(error).__name__}); "
            "get the file anew from its source"
        ) from error
