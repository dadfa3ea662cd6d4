"""The shell scripts, with a pretended Python in place of the real one."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Says what it was asked to do; FAILING names the call that fails.
PYTHON = """#!/bin/sh
echo "python $*" >> "$CALLS"
case "$*" in
  *"-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
  *device_count*) echo "${GPUS:-0}" ;;
  *"import torch") [ -z "${NO_TORCH:-}" ] || exit 1 ;;
esac
if [ -n "${FAILING:-}" ]; then
  case "$*" in *"$FAILING"*) exit 1 ;; esac
fi
case "$*" in *"pip install"*--editable*) touch .venv/bin/medplib; chmod +x .venv/bin/medplib ;; esac
exit 0
"""


@pytest.fixture()
def project(tmp_path: Path) -> Path:
    """A project of scripts alone, and a folder ``bin`` with the pretended Python."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for name in ("requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bin").mkdir()
    for name in ("python", "python3"):
        (tmp_path / "bin" / name).write_text(PYTHON)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def call(
    project: Path, shell: str, script: str, **variables: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run a script; also the calls of Python that it made."""
    calls = project / "calls"
    calls.write_text("")
    environment = {"PATH": f"{project / 'bin'}:/usr/bin:/bin", "CALLS": str(calls), **variables}
    command = [shell, "-c", script]
    ended = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=60)
    return ended, calls.read_text().splitlines()


def prepare(project: Path, **variables: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    script = "set -euo pipefail; source scripts/environment.sh; prepare_environment dev; echo ready"
    return call(project, "bash", script, PYTHON=str(project / "bin" / "python3"), **variables)


def test_the_environment_is_made_once(project: Path) -> None:
    first, calls = prepare(project)
    assert (first.returncode, "ready" in first.stdout) == (0, True), first.stderr
    assert any("-m venv .venv" in one for one in calls) and any("--editable .[dev]" in one for one in calls)
    second, calls = prepare(project)
    assert second.returncode == 0 and not any("pip" in one or "venv" in one for one in calls)
    (project / "requirements.txt").write_text("torch==9.9\n")
    _, calls = prepare(project)
    assert any("--editable .[dev]" in one for one in calls)


@pytest.mark.parametrize("failing", ["-m venv", "disable-pip-version-check torch", "--editable"])
def test_a_failed_installation_stops_the_script_and_is_not_remembered(project: Path, failing: str) -> None:
    ended, _ = prepare(project, FAILING=failing, NO_TORCH="yes")
    assert ended.returncode == 2 and "ready" not in ended.stdout
    assert not (project / ".venv" / ".installed-dev").exists()
    assert "installation failed" in ended.stderr or "python3-venv" in ended.stderr


def test_half_an_environment_is_completed(project: Path) -> None:
    """Without Debian's python3-venv, a first attempt leaves a ``.venv`` without pip."""
    (project / ".venv" / "bin").mkdir(parents=True)
    broken = project / ".venv" / "bin" / "python"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    ended, calls = prepare(project)
    assert ended.returncode == 0, ended.stderr
    assert any("-m venv .venv" in one for one in calls)


def test_tests_use_every_core_and_arguments_go_to_pytest(project: Path) -> None:
    python = str(project / "bin" / "python3")
    ended, calls = call(project, "bash", 'bash scripts/test.sh tests/data -k "a or b" -n 0', PYTHON=python)
    assert ended.returncode == 0, ended.stderr
    workers = f"-n {os.sysconf('SC_NPROCESSORS_ONLN')} --maxprocesses 8 --dist loadfile --no-loadscope-reorder"
    assert calls[-1] == f"python -m pytest {workers} tests/data -k a or b -n 0"


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_a_stage_uses_every_visible_gpu_through_one_launcher(project: Path, shell: str) -> None:
    script = f"{shell} scripts/train_stage2.sh optimizer.lr=1e-5"
    ended, calls = call(project, shell, script, GPUS="4", CUDA_VISIBLE_DEVICES="4,5,6,7")
    assert ended.returncode == 0, ended.stderr
    recipe = "configs/stages/stage2_7b.yaml optimizer.lr=1e-5"
    assert calls[1:] == [
        f"python -m model.train {recipe} --check --quiet --processes 4",
        f"python -m torch.distributed.run --standalone --nproc_per_node 4 -m model.train {recipe}",
    ]
    _, calls = call(project, shell, script, GPUS="4", NUM_GPUS="1")
    assert calls[1:] == [f"python -m model.train {recipe}"]
    _, calls = call(project, shell, f"{script} --check", GPUS="4")
    assert calls[1:] == [f"python -m model.train {recipe} --check --processes 4"]
    _, calls = call(project, shell, f"{shell} scripts/train_stage4.sh my.yaml --resume", NPROC="2")
    assert calls[1:] == [
        "python -m model.train my.yaml --resume --check --quiet --processes 2",
        "python -m torch.distributed.run --standalone --nproc_per_node 2 -m model.train my.yaml --resume",
    ]


def test_a_stage_takes_its_place_among_machines(project: Path) -> None:
    script = "sh scripts/train_stage2.sh my.yaml"
    there = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "gpu-01"}
    ended, calls = call(project, "sh", script, GPUS="1", **there)
    assert ended.returncode == 0, ended.stderr
    place = "--nnodes 2 --node_rank 1 --master_addr gpu-01 --master_port 29500"
    assert calls[-1] == f"python -m torch.distributed.run {place} --nproc_per_node 1 -m model.train my.yaml"
    _, calls = call(project, "sh", f"{script} --check", GPUS="4", **there)
    assert calls[1:] == ["python -m model.train my.yaml --check --processes 8"]
    ended, calls = call(project, "sh", script, GPUS="4", NNODES="2")
    assert ended.returncode == 2 and "set NODE_RANK (0 to 1) and MASTER_ADDR" in ended.stderr
    assert not any("model.train" in one for one in calls)


def test_a_stage_stops_where_the_check_fails_or_pytorch_is_absent(project: Path) -> None:
    ended, calls = call(project, "sh", "sh scripts/train_stage1.sh", NPROC="2", FAILING="--check")
    assert ended.returncode != 0 and not any("distributed" in one for one in calls)
    ended, _ = call(project, "sh", "sh scripts/train_stage1.sh", FAILING="import torch")
    assert ended.returncode == 2 and "PyTorch" in ended.stderr


def test_a_termination_signal_reaches_the_run(project: Path) -> None:
    """The shell has become the run: nothing is left that would wait in its place."""
    (project / "bin" / "python").write_text(
        '#!/bin/sh\ncase "$*" in *device_count*) echo 0 ;; *) echo "run $$" ;; esac\n'
    )
    ended, _ = call(project, "sh", 'echo "shell $$"; exec sh scripts/train_stage1.sh')
    assert [line.split()[1] for line in ended.stdout.splitlines()] == [ended.stdout.split()[1]] * 2, ended.stdout


def test_benchmarks_import_only_modules_that_are_there() -> None:
    folder = ROOT / "scripts" / "bench"
    for path in folder.glob("*.py"):
        for module in re.findall(r"^from (\w+)", path.read_text(), re.MULTILINE):
            assert (folder / f"{module}.py").is_file() or importlib.util.find_spec(module), f"{path.name}: {module}"
