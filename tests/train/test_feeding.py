"""Batches on their way to the network: like lengths together, and what a run tells of it."""

from __future__ import annotations

import json
import logging
import multiprocessing
import re
import time
from pathlib import Path
from typing import Any

import pytest

from model.errors import MedPLIBError
from model.train import recipe_from, run
from model.train.trainer import Trainer


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_tells_its_padding_and_its_waiting(values: Any, tmp_path: Path) -> None:
    told = {}
    for grouped in (False, True):
        data = {**values(2)["data"], "group_by_length": grouped}
        schedule = {"batch_size": 4, "accumulation": 2, "max_steps": 6}
        recipe = recipe_from(values(2, data=data, schedule=schedule, output=str(tmp_path / str(grouped))))
        run(recipe)
        told[grouped] = rows(recipe.folder)
    for row in (*told[False], *told[True]):
        assert 0 <= row["padding"] < 1
        assert 0 < row["data_seconds"] < row["seconds"]
        assert row["tokens_per_s"] > row["samples_per_s"]
    means = {grouped: sum(row["padding"] for row in told[grouped]) / 6 for grouped in told}
    assert means[True] < means[False] / 2


@pytest.mark.parametrize("stop", [False, True])
def test_loader_processes_change_nothing(values: Any, tmp_path: Path, stop: bool) -> None:
    """Over three epochs, whose regions are drawn anew each time, and where a run goes on in the midst of one."""
    losses = {}
    for workers in (0, 2):
        data = {**values(2, ("region",))["data"], "group_by_length": True, "workers": workers}
        schedule = {"batch_size": 4, "accumulation": 1, "epochs": 3, "max_steps": 0}
        recipe = recipe_from(values(2, data=data, schedule=schedule, output=str(tmp_path / f"{workers}")))
        if stop and workers:
            trainer = Trainer(recipe)
            trainer.set_up()
            for _ in range(4):
                trainer.train_step()
            trainer.save()
            trainer.close()
        run(recipe, resume=stop)
        losses[workers] = [row["loss"] for row in rows(recipe.folder)]
    assert losses[0] == losses[2]
    assert len(losses[0]) > 6


def test_full_shared_memory_ends_in_a_sentence(values: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(value: Any) -> None:
        raise RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)")

    monkeypatch.setattr("model.train.datasets._share", fails)  # loader processes are forks of this one
    begun = time.monotonic()
    with pytest.raises(MedPLIBError, match=r"shared memory is full: .* data\.workers=0"):
        run(recipe_from(values(1, data={"workers": 2})))
    assert not multiprocessing.active_children() and time.monotonic() - begun < 60


def test_a_log_gets_a_line_every_so_many_steps(values: Any, caplog: pytest.LogCaptureFixture, capsys: Any) -> None:
    shown = {"logging": {"progress": True, "every": 2}, "schedule": {"batch_size": 2, "max_steps": 5}}
    with caplog.at_level(logging.INFO, logger="model"):
        run(recipe_from(values(1, **shown)))
    lines = re.findall(r"step (\d)/5 \(\d+%\): loss [\d.]+, lr \S+, [\d.]+ s a step, 0:00:\d\d left", caplog.text)
    assert lines == ["2", "4", "5"]
    assert "\r" not in capsys.readouterr().err, "no bar where nobody looks"
