"""Run lmms-eval with MedPLIB and its tasks in reach: ``python -m model.eval.lmms --tasks medplib_phantoms …``."""

from __future__ import annotations

import argparse
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
    """Exit status: 0, 2 for wrong input, in one sentence, 1 if lmms-eval failed otherwise."""
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

    evaluate, failed = harness.cli_evaluate_single, False

    def evaluate_loudly(*values: Any, **options: Any) -> Any:
        """The harness's evaluation, whose failures it would otherwise print and end in success."""
        nonlocal failed
        try:
            return evaluate(*values, **options)
        except Exception as error:
            cause: BaseException | None = error  # ours may be wrapped: the harness tries tasks again
            while cause is not None and not isinstance(cause, MedPLIBError):
                cause = cause.__cause__
            if cause is not None:
                raise SystemExit(_refuse(cause)) from error
            failed = True
            raise

    MODEL_REGISTRY_V2.register_manifest(registered, overwrite=True)
    harness.cli_evaluate_single = evaluate_loudly
    sys.argv = ["lmms-eval", *command]
    try:
        harness.cli_evaluate()
    finally:
        harness.cli_evaluate_single = evaluate
    return 1 if failed else 0


def lmms_eval_arguments(given: Sequence[str]) -> tuple[list[str], str | None]:
    """The harness's arguments, ours taken out, model and task folder put in; and the folder of ``--data``.

    Raises:
        MedPLIBError: ``--data`` is no folder, or ``--include_path`` is given.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--data")
    try:
        options, rest = parser.parse_known_args(given)
    except argparse.ArgumentError as error:
        raise MedPLIBError("--data has no value; give a folder behind it") from error
    if options.data is not None and not Path(options.data).is_dir():
        raise MedPLIBError(f"the folder {options.data} is not there; give one of medplib data build phantom")
    names = {argument.split("=")[0] for argument in rest}
    if "--include_path" in names:
        raise MedPLIBError("--include_path is MedPLIB's own task folder here; call lmms-eval itself to use another")
    named = [] if "--model" in names else ["--model", MODEL_NAME]
    return [*rest, *named, "--include_path", str(TASKS)], options.data


def _refuse(error: MedPLIBError) -> int:
    sys.stderr.write(f"error: {error}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
