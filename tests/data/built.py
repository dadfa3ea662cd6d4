"""What the tests of builders share: run the command as typed, and show that its files train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model.cli import main
from model.data.dataset import MedPLIBDataset
from model.data.validate import check_file


class Echo:
    """Stands for the processor: gives back what it was given."""

    def encode(self, turns: Any, images: Any, *args: Any, **options: Any) -> dict[str, Any]:
        return {"turns": turns, "images": images, **options}


def build(*words: object) -> int:
    """``medplib data build …``, in this process."""
    return main(["data", "build", *map(str, words), *([] if "--workers" in words else ["--workers", "1"])])


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one sentence with which a command refuses."""
    assert build(*words) == 2
    told = capsys.readouterr().err
    assert told.startswith("medplib: ") and told.count("\n") == 1
    return told


def trains(file: Path, images: Path, **checked: Any) -> list[dict[str, Any]]:
    """The records of a file that passes ``medplib data check`` and that a data set reads whole."""
    report = check_file(file, images, **checked)
    assert report.ok, report.format()
    dataset = MedPLIBDataset(file, images, Echo(), training=True)
    assert [dataset[index]["turns"] for index in range(len(dataset))]
    return [dict(record) for record in dataset.records]


def findings(out: Path, name: str) -> list[dict[str, Any]]:
    """What a build listed."""
    return [json.loads(line) for line in (out / f"findings_{name}.jsonl").read_text().splitlines()]


def said(record: dict[str, Any]) -> tuple[str, str]:
    """Question and answer of a record of one round."""
    question, answer = (turn["value"] for turn in record["conversations"])
    return question, answer
