"""``medplib plan``: weights counted exactly, sane at real sizes, and advice that can be followed."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.cli import main
from model.data.sampling import ResumableSampler
from model.train import plan as planning
from model.train import recipe_from, save_recipe
from model.train.distributed import Process
from model.train.engine import make_engine
from model.train.init_weights import starting_network
from model.train.plan import GIB, Machine, Memory, Planner, advise, find_sizes, more_gpus, records_of
from model.train.recipe import Recipe, load_recipe

STAGES = Path(__file__).resolve().parents[2] / "configs" / "stages"


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MEDPLIB_")]:
        monkeypatch.delenv(name)


def recipe_7b(stage: int, *overrides: str) -> Recipe:
    path = STAGES / f"stage{stage}_7b.yaml"
    names = re.findall(r"\$\{(\w+)\}", path.read_text())
    return load_recipe(path, overrides, dict.fromkeys(names, "absent"))


@lru_cache(maxsize=2)
def planner_7b(stage: int) -> Planner:
    recipe = recipe_7b(stage)
    return Planner(recipe, find_sizes(recipe, STAGES / f"stage{stage}_7b.yaml")[0], records_of(recipe, 256))


def memory_7b(stage: int, *overrides: str, gpus: int = 4) -> Memory:
    return planner_7b(stage).memory(recipe_7b(stage, *overrides), Machine(gpus))


def peak(memory: Memory) -> float:
    return max(memory.moments) / GIB


@pytest.mark.parametrize(("stage", "lora"), [(2, {}), (4, {"rank": 2, "targets": ["q", "up"]})])
def test_standing_memory_is_that_of_a_real_step(values: Any, stage: int, lora: dict[str, Any]) -> None:
    given = values(stage, lora=lora, optimizer={"weight_decay": 0.1})
    given["model"] |= {"grounding": given["model"]["base"]} if stage == 4 else {}
    recipe = recipe_from(given)
    planner = Planner(recipe, find_sizes(recipe, Path("x.yaml"))[0], records_of(recipe, 60))
    network, _ = starting_network(recipe)
    engine: Any = make_engine(network.train(), recipe, Process(0, 1, torch.device("cpu")), lambda step: 1.0)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    engine.optimizer.step()
    moments = [value for state in engine.optimizer.state.values() for value in state.values()]
    parts = planner.memory(recipe, Machine(1, device="cpu")).parts
    whole = parts.get("weights, frozen", (0, 0))[0] + parts["weights, trained"][0]
    assert whole == sum(parameter.nbytes for parameter in network.parameters())
    assert parts["optimiser"][0] == sum(value.nbytes for value in moments if isinstance(value, Tensor) and value.dim())


def test_real_sizes_lead_to_sane_conclusions() -> None:
    planner, mixture = planner_7b(2), planner_7b(4)
    trained = sum(weight.numel for weight in planner.weights if weight.trained)
    assert sum(weight.numel for weight in planner.weights) == pytest.approx(7.398e9, rel=1e-3)
    assert trained == pytest.approx(329.7e6, rel=1e-3)
    assert 11e9 < sum(weight.numel for weight in mixture.weights) < 12.5e9
    alone, four = memory_7b(2, gpus=1), memory_7b(2)
    assert alone.parts["optimiser"][0] == 12 * trained and four.parts["optimiser"][0] == 3 * trained
    assert alone.parts["weights, trained"][0] == 2 * trained
    shared = memory_7b(2, "engine.zero_stage=3").parts
    held = shared["weights, trained"][0] + shared["weights, frozen"][0]
    assert held == pytest.approx(2 * sum(weight.numel for weight in planner.weights) / 4)
    assert 18 < peak(four) < 28 and peak(memory_7b(4)) > 24
    assert memory_7b(2, "lora.quantize=nf4").parts["weights, frozen"][0] < 0.4 * four.parts["weights, frozen"][0]
    frozen = memory_7b(4).parts["weights, frozen"][0]
    assert memory_7b(4, "engine.expert_parallel=2").parts["weights, frozen"][0] < 0.7 * frozen
    assert peak(memory_7b(2, "engine.gradient_checkpointing=false")) > 3 * peak(four)
    offloaded = memory_7b(2, "engine.offload=optimizer")
    assert "optimiser" not in offloaded.parts and offloaded.host["optimiser and gradients"] > 0


def test_activations_are_those_that_were_measured() -> None:
    """Peaks of whole steps in MiB, from docs/benchmarks: within 15 %."""
    path = STAGES / "stage2_nano.yaml"
    recipe = load_recipe(path, ["engine.kind=torch", "engine.device=cpu"])
    planner = Planner(recipe, find_sizes(recipe, path)[0], records_of(recipe, 64, 0.5, 256))
    for batch, again, measured in ((1, False, 87), (4, False, 154), (4, True, 96), (8, False, 243), (8, True, 120)):
        schedule, engine = (
            replace(recipe.schedule, batch_size=batch),
            replace(recipe.engine, gradient_checkpointing=again),
        )
        memory = planner.memory(replace(recipe, schedule=schedule, engine=engine), Machine(1, device="cpu"))
        assert max(memory.moments) / 2**20 == pytest.approx(measured, rel=0.15)


def test_advice_makes_it_fit_at_the_same_global_batch() -> None:
    recipe, machine = recipe_7b(4), Machine(4, gpu_memory=22 * GIB)
    assert not planner_7b(4).memory(recipe, machine).fits(machine)
    changes = advise(planner_7b(4), recipe, machine)
    assert changes and [one.slower for one in changes] == sorted(one.slower for one in changes)
    again = recipe_7b(4, *changes[0].overrides)
    assert planner_7b(4).memory(again, machine).moments == changes[0].memory.moments
    assert again.schedule.batch_size * again.schedule.accumulation == 32
    assert not advise(planner_7b(4), recipe, Machine(1, gpu_memory=4 * GIB))
    assert more_gpus(planner_7b(4), recipe, Machine(1, gpu_memory=4 * GIB)) is None
    found = more_gpus(planner_7b(4), recipe, Machine(1, gpu_memory=12 * GIB))
    assert found is not None and found[0].ranks == 2 and found[1] is not None and found[1].memory.fits(found[0])
    assert more_gpus(planner_7b(4), recipe, Machine(2, gpu_memory=40 * GIB)) == (Machine(4, gpu_memory=40 * GIB), None)


@pytest.mark.parametrize(("records", "ranks", "accumulation"), [(10, 1, 1), (10, 2, 3), (64, 2, 2), (3, 2, 1)])
def test_steps_are_those_that_training_takes(records: int, ranks: int, accumulation: int, tmp_path: Path) -> None:
    (tmp_path / "records.json").write_text(json.dumps([{"id": str(n), "conversations": []} for n in range(records)]))
    recipe = load_recipe(STAGES / "stage2_nano.yaml", [f"data.train=[{tmp_path / 'records.json'}]"])
    schedule = replace(recipe.schedule, epochs=3, batch_size=4, accumulation=accumulation, max_steps=0)
    sampler = ResumableSampler([1] * records, seed=0, batch_size=4, world_size=ranks)
    for longest, steps in ((0, math.ceil(3 * len(sampler) / accumulation)), (1000, 1000)):
        planned = replace(recipe, schedule=replace(schedule, max_steps=longest))
        assert planning._steps(planned, Machine(ranks)) == steps


def test_command_prints_one_screen_and_exits_by_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(STAGES / "stage2_nano.yaml"), "--gpus", "1", "--length", "64"]
    assert main([*arguments, "--gpu-mem", "4"]) == 0
    shown = capsys.readouterr().out
    assert "FITS" in shown and "activations" in shown and "69 steps" in shown and len(shown.splitlines()) < 30
    assert main([*arguments, "--gpu-mem", "1.05", "--json"]) == 1
    plan = json.loads(capsys.readouterr().out)
    assert not plan["fits"] and plan["sizes"] == "configs/model/nano.yaml" and plan["peak"] > plan["gpu_memory"]
    assert main([*arguments, "--gpu-mem", "1.2"]) == 1
    assert "It fits with" in capsys.readouterr().out


def test_wrong_input_is_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = str(STAGES / "stage2_7b.yaml")
    for arguments, what in (
        ([recipe, "engine.zero_stagee=3"], "nearest: engine.zero_stage"),
        ([recipe, "trainable=[lm_heat]"], "lm_heat"),
        ([str(tmp_path / "no.yaml")], "there is no recipe"),
        ([recipe, "--sizes", "13b"], "7b, nano"),
        ([recipe, "engine.kind=torch"], "one process"),
    ):
        assert main(["plan", *arguments, "--gpus", "4"]) == 2
        assert what in capsys.readouterr().err
    for wrong in (["--gpus", "0"], ["--gpus", "x"], ["--gpus", "1", "--supervised", "2"]):
        with pytest.raises(SystemExit) as ended:
            main(["plan", recipe, *wrong])
        assert ended.value.code == 2


def test_sizes_of_a_checkpoint_are_read_without_its_weights(
    values: Any, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "without"
    folder.mkdir()
    (folder / "config.json").write_text((base / "config.json").read_text())
    given = str(save_recipe(recipe_from(values(2, model={"base": str(folder)})), tmp_path / "given"))
    assert main(["plan", given, "--gpus", "1", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["sizes"] == str(folder / "config.json") and plan["weights"] < 1e6 and plan["steps"]
    (folder / "config.json").write_text("[]")
    assert main(["plan", given, "--gpus", "1"]) == 2
    assert "config.json" in capsys.readouterr().err
