"""The built wheel works on its own: default model, suites and sample images are inside."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import model
from tests.conftest import ROOT

IMAGE = ROOT / "data/sample/images/fundus_00--Phantom--seed505case000004--0000.png"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the contents of the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("model", "assets/medplib-mini", "configs", "data/sample"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "-w", folder]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *flags, source], check=True)
    (wheel,) = folder.glob("*.whl")
    assert model.__version__ in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def python(installed: Path, *arguments: str) -> str:
    """What Python prints in a folder apart from the project, with the wheel's package."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    environment.pop("MEDPLIB_MODEL", None)
    command = [sys.executable, "-P", *arguments]
    ended = subprocess.run(command, cwd=installed.parent, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_wheel_asks_its_own_model(installed: Path) -> None:
    out = python(installed, "-m", "model.cli", "ask", str(IMAGE), "What modality was used to take this image?")
    assert "Fundus" in out
    assert python(installed, "-m", "model.cli", "--version") == f"medplib {model.__version__}\n"


def test_the_wheel_has_suites_sizes_and_samples(installed: Path) -> None:
    code = (
        "import model; print(model.__file__); from model.eval.suite import available_suites; print(available_suites());"
    )
    code += (
        "from model import shipped; print(shipped('configs/model/7b.yaml').is_file(), shipped('data/sample').is_dir())"
    )
    where, suites, found = python(installed, "-c", code).splitlines()
    assert Path(where).is_relative_to(installed)
    assert "phantoms" in suites and found == "True True"
