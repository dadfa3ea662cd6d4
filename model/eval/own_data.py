"""A user's own data as a suite of one set: a record file, a built folder, or a source that is built first."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from model.data.records import open_records
from model.data.schema import CONVERSATION_KEYS
from model.errors import MedPLIBError
from model.eval.asking import fingerprint, run_folder
from model.eval.processes import read_journal
from model.eval.suite import DataSet, Suite, available_suites

logger = logging.getLogger(__name__)

DATASET_FILE = "dataset.json"
THRESHOLD = 0.5
"""At which own data's masks are cut, as everywhere that nobody names another."""
HEADLINES = (
    *(f"{name}@{THRESHOLD:g}" for name in ("mDice", "mIoU", "false_mask_rate")),
    *("refused_rate", "closed_accuracy", "open_exact_match"),
    *(f"{name}_{unit}@{THRESHOLD:g}" for unit in ("mm", "px") for name in ("HD95", "NSD")),
)
_RECORD_SUFFIXES = (".json", ".jsonl", ".parquet")


def own_suite(data: Path, *, split: str, images: Path | None, cache: Path, may_build: bool = True) -> Suite:
    """What ``medplib eval MODEL DATA`` asks of a user's own data.

    Args:
        data: a record file of the project's format, a folder of ``medplib data build``, or a source of any layout.
        split: of a built folder; a record file is asked whole.
        images: folder that the paths of a record file start from; the file's own where None.
        cache: folder that a source is built into.
        may_build: False refuses a source, as one of several processes must.

    Raises:
        MedPLIBError: there is nothing, the source has no known layout, or the folder has no such split.
    """
    if not data.exists():
        raise MedPLIBError(
            f"there is no suite or data {data}; give one of: {', '.join(available_suites())}, a suite's YAML file, "
            "a record file, a folder of medplib data build, or a source that it can build"
        )
    if is_record_file(data):
        about = {"source": str(data.resolve()), "version": f"{datetime.fromtimestamp(data.stat().st_mtime, UTC):%F}"}
        return _suite(data_name(data), [data], images or data.parent, "all records", (), **about)
    found = find_dataset(data) if data.is_dir() else None
    if found is None:
        if not may_build:
            raise MedPLIBError(
                f"{data} is not built yet, which several processes cannot do together; run "
                f"medplib data build {data} --out DIR first and evaluate DIR"
            )
        found, data = find_dataset(build_source(data, cache)), cache
        if found is None:
            raise MedPLIBError(f"{cache} holds no finished {DATASET_FILE}; remove the folder and try again")
    files = {name: [data / file for file in listed] for name, listed in found["splits"].items()}
    if not files.get(split):
        known = ", ".join(name for name, listed in files.items() if listed) or "none"
        raise MedPLIBError(f"{data} has no split {split} (it has: {known}); name one with --split")
    train = files.get("train", []) if split != "train" else []
    about = {
        "about": str(found.get("summary") or ""),
        "source": str(found.get("source") or data),
        "version": str(found.get("fingerprint") or "")[:12] or "not stated",
        "licence": " ".join(str(found.get("terms") or "").split())[:300] or "not stated",
    }
    images = data / str(found.get("images_root") or ".")
    return _suite(str(found.get("name") or data_name(data)), files[split], images, split, train, **about)


def build_source(source: Path, out: Path) -> Path:
    """Build a source of any layout into a folder with ``dataset.json``; goes on where an earlier build stopped.

    Raises:
        MedPLIBError: the layout is not known.
    """
    from model.data.builders.build import build_dataset  # heavy

    build_dataset(source, out, report=logger.info)
    return out


def data_name(data: Path) -> str:
    """What own data is called in tables and folders: its file's or folder's name, as far as a name may hold it."""
    path = data.resolve()
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", path.name if path.is_dir() else path.stem).strip("-.") or "data"


def own_run_folder(model: Path, name: str, *, overwrite: bool = False) -> Path:
    """``runs/eval/MODEL/NAME-DATE``; the newest unfinished one of the same checkpoint where a run was stopped."""
    folder, digest = run_folder("eval", model), fingerprint(model)
    for earlier in sorted(folder.glob(f"{name}-[0-9]*"), reverse=True) if not overwrite else ():
        found = (earlier / "predictions").glob("*.run.json")
        journals = [read_journal(path.with_name(path.name.replace(".run.json", ".jsonl"))) for path in found]
        mine = any(journal and dict(journal.settings.get("model", {})).get("digest") == digest for journal in journals)
        if mine and not (earlier / "report.html").is_file():
            return earlier
    return folder / f"{name}-{datetime.now(UTC):%Y-%m-%d}"


def is_record_file(path: Path) -> bool:
    """Whether a file's first record has a conversation; COCO files and tables of questions are sources."""
    if not path.is_file() or path.suffix.lower() not in _RECORD_SUFFIXES:
        return False
    with suppress(MedPLIBError):
        first = open_records(path)[0]
        return isinstance(first, dict) and any(isinstance(first.get(key), list) for key in CONVERSATION_KEYS)
    return False


def find_dataset(folder: Path) -> dict[str, Any] | None:
    """A built folder's ``dataset.json``; None where there is none, or another program's (nnU-Net has one too)."""
    try:
        found = json.loads((folder / DATASET_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise MedPLIBError(f"{folder / DATASET_FILE} cannot be read ({error}); build the folder again") from error
    return found if isinstance(found, dict) and isinstance(found.get("splits"), dict) else None


def _suite(name: str, files: Iterable[Path], images: Path, split: str, train: Iterable[Path], **about: str) -> Suite:
    item = DataSet(
        name=re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "data",
        title=name,
        records=tuple(files),
        images=images,
        split=split,
        task="mixed",
        headlines=HEADLINES,
        thresholds=(THRESHOLD,),
        surface=True,
        detailed=True,
        blind=tuple(train),
        obtain="build it again with medplib data build",
        **{"licence": "not stated", **about},  # type: ignore[arg-type]
    )
    return Suite(item.name, (item,), name, about.get("about", ""))
