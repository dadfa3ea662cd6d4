"""docs/tutorial.md: its commands run in order, on a few of its patients and a tiny network."""

from __future__ import annotations

import csv
import io
import os
import re
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import httpx
import pytest

from model.cli import main
from tests.conftest import free_port
from tests.serve.conftest import until
from tests.tiny import tiny_checkpoint

ROOT = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get("MEDPLIB_REAL", ROOT.parent / "shared" / "real")) / "volumes.tar"
FOLDER = "volumes/hippocampus/"
PATIENTS = ("hippocampus_001", "hippocampus_003", "hippocampus_004", "hippocampus_124", "hippocampus_125")
QUICK = ["schedule.max_steps=2", "schedule.batch_size=2", "validation.samples=12", "validation.max_new_tokens=4"]
QUICK += ["saving.every=1", "data.max_length=512", "logging.tensorboard=false"]


def commands() -> list[list[str]]:
    """What the page's console blocks type."""
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [shlex.split(line) for block in blocks for line in re.findall(r"^\$ (.*)", block, re.MULTILINE)]


def small_archive(target: Path) -> Path:
    """The set's archive with ``PATIENTS`` alone."""
    with tarfile.open(REAL) as full, tarfile.open(target, "w") as part:
        table = full.extractfile(f"{FOLDER}meta.csv")
        assert table is not None
        rows = list(csv.DictReader(io.TextIOWrapper(table, encoding="utf-8")))
        kept = [row for row in rows if row["patient"] in PATIENTS]
        assert {row["split"] for row in kept} == {"train", "test"}
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0])
        writer.writeheader()
        writer.writerows(kept)
        member = tarfile.TarInfo(f"{FOLDER}meta.csv")
        member.size = len(text.getvalue().encode())
        part.addfile(member, io.BytesIO(text.getvalue().encode()))
        for row in kept:
            for file in (row["image"], row["mask"]):
                part.addfile(full.getmember(FOLDER + file), full.extractfile(FOLDER + file))
    return target


def test_it_takes_six_commands_at_most() -> None:
    assert [command[:2] for command in commands()] == [
        ["tar", "-xf"],
        *(["medplib", verb] for verb in ("data", "finetune", "eval", "ask", "serve")),
    ]


def test_every_picture_it_shows_is_there() -> None:
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[[^]]*]\(([^)]+)\)", text)
    assert shown
    assert all((ROOT / "docs" / path).is_file() for path in shown)


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_file(), reason=f"{REAL} is absent; MEDPLIB_REAL names the folder of the real sets")
def test_its_commands_lead_from_the_archive_to_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unpack, build, finetune, evaluate, ask, serve = commands()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEDPLIB_MODEL", str(tiny_checkpoint(tmp_path / "tiny")))
    subprocess.run([*unpack[:2], small_archive(tmp_path / "volumes.tar"), *unpack[3:]], check=True)
    assert main(build[1:]) == 0
    listed = capsys.readouterr().out
    assert "5 MR volumes" in listed
    assert main([*finetune[1:], "--no-rehearse", *QUICK]) == 0
    assert main([*evaluate[1:], "--limit", "4"]) == 0
    capsys.readouterr()
    assert main([*ask[1:], "--max-new-tokens", "4"]) == 0
    assert "Traceback" not in capsys.readouterr().err
    port = str(free_port())
    flags = ["--no-web", "--api-port", port, "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-m", "model.cli", *serve[1:], *flags], env=environment) as server:
        try:
            address = f"http://127.0.0.1:{port}/v1/models"
            models = until(lambda: httpx.get(address).json().get("data"), 60, "the served model")
            assert [model["id"] for model in models] == ["hippocampus-model"]
        finally:
            server.terminate()
