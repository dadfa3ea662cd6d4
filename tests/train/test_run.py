"""Whole runs of a tiny network, on one process."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model.checkpoint import load
from model.errors import MedPLIBError
from model.train import recipe_from, run, save_recipe
from model.train.__main__ import main
from model.train.checkpoint import network_of_run
from model.train.trainer import Trainer
from tests.train.launching import begin, wait_until


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_four_stages_follow_each_other(values: Any, tmp_path: Path, phantoms: Path, capsys: Any) -> None:
    held_out = {"data": {**values(1)["data"], "validation": [str(phantoms / "grounding.json")]}}
    results = {}
    for stage in (1, 2, 3, 4):
        before = {1: {}, 2: {"base": str(tmp_path / "stage1")}, 3: {"base": str(tmp_path / "stage2")}}
        source = before.get(stage, {"base": str(tmp_path / "stage2"), "grounding": str(tmp_path / "stage3")})
        files = ("grounding",) if stage == 3 else ("vqa", "region", "grounding")
        sections: dict[str, Any] = {"model": {**values(stage)["model"], **source}}
        if stage == 3:
            sections |= held_out | {"validation": {"samples": 4, "every": 2}}
            sections["data"] = {**sections["data"], "train": [str(phantoms / "grounding.json")]}
        results[stage] = run(recipe_from(values(stage, files, **sections)))

    vqa, grounding = load(results[2])[0], load(results[3])[0]
    mixture, _ = load(results[4])
    assert mixture.config.moe.layers == (0, 1, 2, 3)
    assert not any("lora" in name or "base_layer" in name for name in mixture.state_dict())
    # What a stage does not train comes through unchanged; what it trains moves.
    assert torch.equal(
        vqa.model.decoder.layers[0].self_attn.q_proj.weight, grounding.model.decoder.layers[0].self_attn.q_proj.weight
    )
    assert not torch.equal(
        vqa.model.decoder.layers[0].mlp.up_proj.weight, grounding.model.decoder.layers[0].mlp.up_proj.weight
    )
    assert torch.equal(vqa.model.projector.layers[0].weight, mixture.model.projector.layers[0].weight)
    rows = metrics(tmp_path / "stage4")
    assert [row["step"] for row in rows] == [1, 2]
    assert {"loss", "ce", "dice", "bce", "lr", "samples_per_s"} <= set(rows[0])
    scores = json.loads((tmp_path / "stage3" / "validation.jsonl").read_text())
    assert {"mDice", "mDice@0.1", "mDice@0.5", "seg_said", "teacher_forced/ce", "teacher_forced/dice@0.5"} <= set(
        scores
    )
    assert (tmp_path / "stage4" / "recipe.yaml").is_file()
    again = values(4, output=str(tmp_path / "again"), model={"base": str(results[4]), "grounding": str(results[3])})
    assert main([str(save_recipe(recipe_from(again), tmp_path / "given")), "--check"]) == 2
    assert "a mixture already" in capsys.readouterr().err


RESUMED: dict[str, tuple[int, dict[str, Any]]] = {
    "mixture": (4, {"schedule": {"accumulation": 2}}),
    "weights": (1, {"data": {"task_shares": {"grounding": 1, "vqa": 1, "other": 0}}}),
    "conversations": (
        3,
        {"data": {"conversation_turns": 3, "shares": [3, 1, 1]}, "augmentation": {"preset": "strong"}},
    ),
}
_TIMES = ("seconds", "samples_per_s", "data_seconds", "tokens_per_s")


@pytest.mark.parametrize("kind", RESUMED)
def test_resuming_continues_the_run_exactly(values: Any, kind: str) -> None:
    stage, sections = RESUMED[kind]
    schedule = {"batch_size": 2, "max_steps": 4, **sections.get("schedule", {})}
    model = _pair(values) if stage == 4 else {}
    given = values(stage, model=model, saving={"every": 2, "keep": 2}, **sections | {"schedule": schedule})
    recipe = recipe_from(given)
    run(recipe)
    whole = metrics(recipe.folder)
    trained = load(recipe.merged)[0].state_dict()
    assert kind != "weights" or not any("ce/region" in row for row in whole)
    if kind == "conversations":
        assert json.loads((recipe.merged / "config.json").read_text())["conversation_turns"] == 3

    shutil.rmtree(recipe.merged)
    shutil.rmtree(recipe.folder / "checkpoints" / "step_0000004")
    run(recipe, resume=True)
    for row, expected in zip(metrics(recipe.folder), whole, strict=True):
        assert {k: v for k, v in row.items() if k not in _TIMES} == {
            k: v for k, v in expected.items() if k not in _TIMES
        }
    assert all(torch.equal(value, trained[name]) for name, value in load(recipe.merged)[0].state_dict().items())


def _pair(values: Any) -> dict[str, str]:
    base = values(4)["model"]["base"]
    return {"base": base, "grounding": base}


def test_loss_falls(values: Any) -> None:
    recipe = recipe_from(
        values(2, ("vqa",), schedule={"batch_size": 4, "max_steps": 12}, optimizer={"lr": 1e-2}, lora={"rank": 4})
    )
    run(recipe)
    losses = [row["ce"] for row in metrics(recipe.folder)]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_a_checkpoint_can_be_merged_without_its_run(values: Any, phantoms: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(phantoms, data)
    sections = {**values(2)["data"], "train": [str(data / "vqa.json")], "images": str(data)}
    recipe = recipe_from(values(2, data=sections, saving={"every": 5}))
    (recipe.folder / "checkpoints" / "step_0000001.partial").mkdir(parents=True)  # of a run that was killed
    run(recipe)
    assert [path.name for path in (recipe.folder / "checkpoints").iterdir()] == ["step_0000002"]
    shutil.rmtree(data)  # the data are gone, too
    file = recipe.folder / "recipe.yaml"  # a run on a GPU machine, merged on one that has none
    file.write_text(file.read_text().replace("attention: sdpa", "attention: flash_attention_2"))
    exported, _ = network_of_run(recipe.folder)
    merged = load(recipe.merged)[0].state_dict()
    for name, value in exported.state_dict().items():
        assert torch.equal(value, merged[name]), name


def test_a_run_folder_is_not_overwritten(values: Any) -> None:
    recipe = recipe_from(values(1))
    run(recipe)
    with pytest.raises(MedPLIBError, match="--resume"):
        run(recipe)
    other = recipe_from(values(1, optimizer={"lr": 0.5}))
    with pytest.raises(MedPLIBError, match=r"optimizer\.lr"):
        run(other, resume=True)
    shutil.rmtree(recipe.folder / "checkpoints")  # as after a first step that did not fit into memory
    assert run(other, resume=True) == recipe.merged
    assert [row["lr"] for row in metrics(recipe.folder)] == [0.5, 0.25]


def test_the_check_tells_what_every_rank_would(values: Any, phantoms: Path, tmp_path: Path, capsys: Any) -> None:
    sections = {**values(1)["data"], "train": [str(phantoms / "vqa.json")]}
    given = str(save_recipe(recipe_from(values(1, data=sections)), tmp_path / "given"))
    assert main([given, "--check"]) == 0
    broken = tmp_path / "broken.json"
    broken.write_text((phantoms / "vqa.json").read_text().replace("images/", "pictures/", 1))
    assert main([given, "--check", f"data.train={broken}"]) == 2
    assert "1 of" in capsys.readouterr().err
    assert main([given, "--check", f"data.train={broken}", "--on-bad-record", "skip"]) == 0
    validation = [f"data.validation={phantoms / 'region.json'}", "validation.samples=4"]
    assert main([given, "--check", "data.template=plain"]) == 0
    assert main([given, "--check", "data.template=plain", *validation]) == 2
    assert "region_not_asked" in capsys.readouterr().err  # not at the first validation, after hours
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1" / "recipe.yaml").write_text("stage: 1")
    assert main([given, "--check"]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert main([given, "--check", "--resume"]) == 0


def test_an_epoch_ends_with_the_step_that_uses_its_last_batch(values: Any) -> None:
    recipe = recipe_from(values(1, schedule={"accumulation": 3}))
    due = [
        step
        for step in range(1, 50)
        if Trainer.is_due(SimpleNamespace(step_number=step, total_steps=49, sampler=range(7), recipe=recipe), 0)  # type: ignore[arg-type]
    ]
    assert due == [math.ceil(7 * epoch / 3) for epoch in range(1, 22)]


def test_unwritable_folder_is_refused_before_loading(values: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(MedPLIBError, match="cannot be written"):
        Trainer(recipe_from(values(1, output=str(tmp_path / "file" / "run")))).set_up()


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT]], ids=["SIGTERM", "Ctrl-C"])
def test_termination_saves_and_the_run_goes_on(values: Any, signals: list[int]) -> None:
    """Also where a launcher passes on the Ctrl-C that the terminal gave to its processes already."""
    recipe = recipe_from(values(1, schedule={"batch_size": 2, "max_steps": 3}))
    trainer = Trainer(recipe)
    trainer.set_up()
    for number in signals:
        signal.raise_signal(number)
    with pytest.raises(SystemExit) as ended:
        trainer.train()
    trainer.close()
    assert ended.value.code == (0 if signals[0] == signal.SIGTERM else 130)
    assert not recipe.merged.exists()
    assert run(recipe, resume=True) == recipe.merged
    assert [row["step"] for row in metrics(recipe.folder)] == [1, 2, 3]


@pytest.mark.parametrize("workers", [0, 1])
def test_file_damaged_after_check_is_refused_or_skipped(
    values: Any, phantoms: Path, tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "data"
    shutil.copytree(phantoms, data)
    for path in sorted((data / "images").iterdir())[:2]:
        path.write_bytes(path.read_bytes()[:80])
    sections = {**values(1)["data"], "train": [str(data / "vqa.json")], "images": str(data), "workers": workers}
    schedule = {"batch_size": 8, "max_steps": 4}
    with pytest.raises(MedPLIBError) as caught:
        run(recipe_from(values(1, data=sections, schedule=schedule, output=str(tmp_path / "refusing"))))
    assert "vqa.json, record" in str(caught.value) and "Traceback" not in str(caught.value)
    skipping = {**sections, "on_bad_record": "skip"}
    with caplog.at_level(logging.INFO, logger="model"):
        assert run(recipe_from(values(1, data=skipping, schedule=schedule))).is_dir()
    (told,) = re.findall(r"(\d+) records were skipped, 0 answers cut off", caplog.text)
    assert int(told) > 0


def test_script_names_its_missing_paths(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    ended = subprocess.run(["sh", "scripts/train_stage2.sh"], cwd=root, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "MEDPLIB_LLAVA" in ended.stderr and "MEDPLIB_IMAGES" in ended.stderr and "Traceback" not in ended.stderr


def test_sigterm_while_libraries_are_imported_ends_with_0(tmp_path: Path) -> None:
    running = begin(["-m", "model.train", str(tmp_path / "recipe.yaml")])
    status = Path(f"/proc/{running.pid}/status")

    def catches() -> bool:
        caught = re.search(r"SigCgt:\s*(\w+)", status.read_text())
        return caught is not None and bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)

    if not status.is_file():
        pytest.skip("only Linux says which signals a process catches")
    wait_until(catches, running)
    running.terminate()
    assert "stopped before the first step" in running.communicate(timeout=60)[0]
    assert running.returncode == 0
