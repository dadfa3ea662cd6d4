"""Run lmms-eval with MedPLIB and its tasks in reach: ``python -m model.eval.lmms --tasks medplib_phantoms …``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model.errors import MedPLIBError, escape_unprintable
from model.eval.lmms import MODEL_NAME, TASKS, manifest

_USAGE = """\
usage: python -m model.eval.lmms [--data DIR] --tasks TASKS --model_args pretrained=DIR[,slots=8,…] …

Runs lmms-eval with the model medplib and the tasks of MedPLIB (medplib_phantoms and its parts).
  --data DIR    folder of `medplib data build phantom`; the sample's held-out pictures without
Everything else goes to lmms-eval; --model is medplib unless another is named. See lmms-eval --help.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 2 for wrong input told in one sentence, 1 if lmms-eval failed otherwise."""
    escape_unprintable()
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        sys.stdout.write(_USAGE)
        return 0
    try:
        command, data = lmms_eval_arguments(given)
        registered = manifest()
    except MedPLIBError as error:
        return _refuse(error)
    if data is not None:
        os.environ["MEDPLIB_DATA"] = data  # where the suite looks, in whatever process
    import lmms_eval.__main__ as harness
    from lmms_eval.models import MODEL_REGISTRY_V2

    MODEL_REGISTRY_V2.register_manifest(registered, overwrite=True)
    run = _Loud(harness.cli_evaluate_single)
    harness.cli_evaluate_single = run
    sys.argv = ["lmms-eval", *command]
    try:
        harness.cli_evaluate()
    finally:
        harness.cli_evaluate_single = run.evaluate
    return 1 if run.failed else 0


def lmms_eval_arguments(given: Sequence[str]) -> tuple[list[str], str | None]:
    """The harness's arguments: ours are taken out, model and task folder put in.

    Returns:
        The arguments, and the folder of ``--data``.

    Raises:
        MedPLIBError: ``--data`` is no folder, or ``--include_path`` is given.
    """
    rest = list(given)
    data = _take(rest, "--data")
    if data is not None and not Path(data).is_dir():
        raise MedPLIBError(f"the folder {data} is not there; give one of medplib data build phantom")
    if any(argument.split("=")[0] == "--include_path" for argument in rest):
        raise MedPLIBError("--include_path is MedPLIB's own task folder here; call lmms-eval itself to use another")
    if not any(argument.split("=")[0] == "--model" for argument in rest):
        rest += ["--model", MODEL_NAME]
    return [*rest, "--include_path", str(TASKS)], data


def _take(arguments: list[str], name: str) -> str | None:
    """Remove an option and its value from ``arguments``; None where it is not there."""
    for place, argument in enumerate(arguments):
        if argument.startswith(f"{name}="):
            del arguments[place]
            return argument.split("=", 1)[1]
        if argument == name:
            if place + 1 == len(arguments):
                raise MedPLIBError(f"{name} has no value; give one behind it")
            value = arguments[place + 1]
            del arguments[place : place + 2]
            return value
    return None


class _Loud:
    """The harness's evaluation, whose failures it would otherwise print and end in success."""

    def __init__(self, evaluate: Any) -> None:
        self.evaluate, self.failed = evaluate, False

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        try:
            return self.evaluate(*arguments, **options)
        except Exception as error:
            sentence = _own_error(error)
            if sentence is not None:
                raise SystemExit(_refuse(sentence)) from error
            self.failed = True
            raise


def _own_error(error: BaseException | None) -> MedPLIBError | None:
    """The error of ours that an error is or comes from; the harness wraps those of tasks after trying them again."""
    while error is not None and not isinstance(error, MedPLIBError):
        error = error.__cause__
    return error


def _refuse(error: MedPLIBError) -> int:
    sys.stderr.write(f"error: {error}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
