"""Ranks that see a shared file system differently go by what rank 0 sees, and end in the same sentence."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from model.errors import MedPLIBError
from model.train import checkpoint, recipe_from, run
from model.train.checkpoint import find_whole_checkpoint, list_checkpoints
from model.train.distributed import Process

SECONDS = 60  # after which ranks are taken to hang


@pytest.fixture()
def folder(values: Any) -> Path:
    """A run with checkpoints of steps 1 and 2."""
    sections = {"schedule": {"batch_size": 1, "max_steps": 2}, "lora": {"rank": 2, "targets": ["q"]}}
    recipe = recipe_from(values(2, ("vqa",), saving={"every": 1, "keep": 2}, **sections))
    run(recipe)
    return recipe.folder


def both_ranks(work: Callable[[Process], Any], meeting: Path) -> list[Any]:
    """What two ranks return, or the sentence that each is refused with."""
    fork = multiprocessing.get_context("fork")
    told = fork.Queue()

    def take_part(rank: int) -> None:
        torch.set_num_threads(1)  # a fork would wait for OpenMP's helpers of an earlier test, which it lacks
        distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
        try:
            answer = work(Process(rank, 2, torch.device("cpu")))
        except (MedPLIBError, OSError) as error:
            answer = f"{type(error).__name__}: {error}"
        told.put((rank, answer))
        distributed.destroy_process_group()

    ranks = [fork.Process(target=take_part, args=(rank,)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    answers = sorted(told.get(timeout=SECONDS) for _ in ranks)
    for rank in ranks:
        rank.join()
    return [answer for _, answer in answers]


@pytest.fixture()
def look(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Any]]:
    """What both ranks find, where the folder of rank 1 lags behind: it lists the oldest checkpoint alone."""
    oldest = list_checkpoints(folder)[:1]
    meetings = (tmp_path / f"meeting{number}" for number in range(9))

    def find(process: Process) -> Any:
        if not process.is_first:
            monkeypatch.setattr(checkpoint, "list_checkpoints", lambda folder: oldest)
        return find_whole_checkpoint(folder, process)

    return lambda: both_ranks(find, next(meetings))


def test_rank_0_looks_for_the_newest_whole_checkpoint(folder: Path, look: Callable[[], list[Any]]) -> None:
    older, newer = list_checkpoints(folder)
    assert look() == [newer, newer]
    (newer / "torch.pt").write_bytes(b"short")
    assert look() == [older, older]
    assert newer.with_suffix(".damaged").is_dir()

    (older / "manifest.json").write_text(json.dumps(["no files"]))
    first, second = look()
    assert first == second and "no checkpoint in" in first and "is whole" in first
    shutil.rmtree(older)
    assert look() == [None, None]


def test_what_rank_0_is_refused_every_rank_is_refused(tmp_path: Path) -> None:
    def refuse(process: Process) -> None:
        process.on_first(lambda: (_ for _ in ()).throw(MedPLIBError("the data set changed")))

    def cannot_write(process: Process) -> None:
        process.on_first(lambda: (tmp_path / "absent" / "file").write_text("") and None)

    assert both_ranks(refuse, tmp_path / "one") == ["MedPLIBError: the data set changed"] * 2
    first, second = both_ranks(cannot_write, tmp_path / "two")
    assert first == second and first.startswith("FileNotFoundError: [Errno 2]") and str(tmp_path) in first
