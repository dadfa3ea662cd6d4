"""The scripts for several machines, with pretended launchers and a pretended Python."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT

PROGRAMS = {
    # Says what it was asked to do; a training process waits for a signal where WAITING is set.
    "python": """#!/bin/bash
case "$*" in
  *"model.train"*--check*) echo "check $*" >> calls; exit "${CHECK_FAILS:-0}" ;;
esac
echo "rank $RANK of $WORLD_SIZE on GPU $LOCAL_RANK at $MASTER_ADDR: $*" >> calls
[ -n "${WAITING:-}" ] || exit 0
trap 'echo "rank $RANK saved" >> calls; exit 0' USR1
touch "waiting$RANK"
sleep 60 & wait
""",
    # Two tasks on this machine; passes USR1 on to them.
    "srun": """#!/bin/bash
while [ "${1#--}" != "$1" ]; do echo "$1" >> flags; shift; done
for id in 0 1; do SLURM_PROCID=$id SLURM_LOCALID=$id SLURM_NTASKS=2 "$@" & tasks+=("$!"); done
trap 'kill -USR1 "${tasks[@]}"' USR1
for task in "${tasks[@]}"; do while kill -0 "$task" 2> /dev/null; do wait "$task" || true; done; done
""",
    "scontrol": """#!/bin/bash
case "$1" in hostnames) ;; show) printf 'gpu-01\\ngpu-02\\n' ;; *) echo "scontrol $*" >> calls ;; esac
""",
    "deepspeed": """#!/bin/bash
echo "deepspeed $*" >> calls
sort "$DS_ENV_FILE" >> calls
""",
}


@pytest.fixture()
def place(tmp_path: Path) -> Path:
    """A project of scripts alone, with the pretended programs in ``bin``."""
    shutil.copytree(ROOT / "scripts" / "cluster", tmp_path / "scripts" / "cluster")
    (tmp_path / "bin").mkdir()
    for name, content in PROGRAMS.items():
        (tmp_path / "bin" / name).write_text(content)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def begin(place: Path, *words: str, **variables: str) -> subprocess.Popen[str]:
    environment = {"PATH": f"{place / 'bin'}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "gpu-[01-02]"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(["bash", *words], cwd=place, env=environment | variables, text=True, **pipes)


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline, "nothing happened"
        os.sched_yield()


def calls(place: Path) -> list[str]:
    return (place / "calls").read_text().splitlines() if (place / "calls").exists() else []


def test_a_slurm_job_starts_a_process_per_task(place: Path) -> None:
    job = begin(place, "scripts/cluster/stage.sbatch", "my.yaml", "seed=3", SLURM_CPUS_PER_TASK="8")
    assert job.wait(20) == 0, job.communicate()[0]
    assert (place / "flags").read_text().split() == ["--kill-on-bad-exit=1", "--cpus-per-task=8"]
    check, *ranks = calls(place)
    assert check == "check -m model.train my.yaml seed=3 --resume --check"
    expected = "rank {0} of 2 on GPU {0} at gpu-01: -m model.train my.yaml seed=3 --resume"
    assert sorted(ranks) == [expected.format(0), expected.format(1)]


def test_slurm_job_saves_and_requeues_before_time_limit(place: Path) -> None:
    job = begin(place, "scripts/cluster/stage.sbatch", "my.yaml", WAITING="yes")
    wait_until(lambda: (place / "waiting0").exists() and (place / "waiting1").exists())
    job.send_signal(signal.SIGTERM)  # as in preemption: not this shell's to act on
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 0, job.communicate()[0]
    *_, first, second, last = calls(place)
    assert {first, second} == {"rank 0 saved", "rank 1 saved"} and last == "scontrol requeue 7"


def test_a_slurm_job_with_a_wrong_recipe_is_not_queued_again(place: Path) -> None:
    job = begin(place, "scripts/cluster/stage.sbatch", "my.yaml", CHECK_FAILS="2")
    assert job.wait(20) == 2
    assert len(calls(place)) == 1
    assert begin(place, "scripts/cluster/stage.sbatch").wait(20) == 2


def test_hostfile_and_paths_reach_deepspeed(place: Path) -> None:
    hosts = shutil.copy(place / "scripts/cluster/hostfile.example", place / "hosts")
    command = ("scripts/cluster/deepspeed.sh", "hosts", "my.yaml", "--resume")
    job = begin(place, *command, MEDPLIB_DATA="/data/a b")
    assert job.wait(20) == 0, job.communicate()[0]
    assert calls(place) == [
        "check -m model.train my.yaml --resume --check",
        f"deepspeed --hostfile {hosts} --module model.train my.yaml --resume",
        "MEDPLIB_DATA=/data/a b",
        "OMP_NUM_THREADS=1",
    ]
    job = begin(place, "scripts/cluster/deepspeed.sh", "absent", "my.yaml")
    assert job.wait(20) == 2 and "absent cannot be read" in job.communicate()[0]
