"""What a run will need, told beforehand: exact where it can be, sane at real sizes, and ready to act upon."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.checkpoint import load
from model.cli import main
from model.data.sampling import ResumableSampler
from model.errors import MedPLIBError
from model.train import recipe_from, save_recipe
from model.train.engine import make_engine
from model.train.plan import Assumptions, Plan, Planner, make_plan
from model.train.plan_advice import advise
from model.train.plan_data import DataSummary
from model.train.plan_memory import GIB, Machine, States
from model.train.plan_network import open_environment
from model.train.plan_tally import TensorTally, meta_tensor, storage_bytes
from model.train.process import Process
from model.train.recipe import Recipe
from model.train.recipe_io import load_recipe
from model.train.starting import starting_network

STAGES = Path(__file__).resolve().parents[2] / "configs" / "stages"
SHORT = Assumptions(tokens=256)


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LLAMA", "LLAVA", "CLIP", "SAM", "DATA", "IMAGES", "RUNS", "PROJECTOR"):
        monkeypatch.delenv(f"MEDPLIB_{name}", raising=False)


@lru_cache(maxsize=2)
def planner_7b(stage: int) -> Planner:
    return make_plan(STAGES / f"stage{stage}_7b.yaml", [], Machine(4), SHORT).planner


def plan_7b(stage: int, gigabytes: float, *overrides: str, gpus: int = 4) -> Plan:
    """A plan of a 7B recipe; its network is looked at once."""
    path, planner = STAGES / f"stage{stage}_7b.yaml", planner_7b(stage)
    recipe = load_recipe(path, overrides, open_environment(path, overrides, {}))
    machine = Machine(gpus, gpu_memory=gigabytes * GIB)
    return Plan(recipe, machine, planner, planner.memory(recipe, machine), None, ())


def part(plan: Plan, name: str) -> float:
    return next(one.backward for one in plan.memory.parts if one.name == name)


def trained(plan: Plan) -> int:
    return sum(weight.numel for weight in plan.planner.weights if weight.trained)


def test_tensors_are_counted_until_they_are_freed() -> None:
    tally = TensorTally("cpu")
    with tally:
        first = torch.zeros(1000)
        view = first[:10]
        second = first + 1
        del second
    assert (tally.now, tally.peak) == (4000, 8000)
    del first
    assert tally.now == 4000
    del view
    assert tally.now == 0
    assert storage_bytes([held := meta_tensor(5), held[:2]]) == 20


@pytest.mark.parametrize(("stage", "lora"), [(2, {}), (4, {"rank": 2, "targets": ["q", "up"]})])
def test_weights_gradients_and_optimiser_are_those_of_a_real_step(
    values: Any, tmp_path: Path, stage: int, lora: dict[str, Any]
) -> None:
    given = values(stage, lora=lora, optimiser={"weight_decay": 0.1})
    given["model"] |= {"grounding": given["model"]["base"]} if stage == 4 else {}
    recipe = recipe_from(given)
    plan = make_plan(save_recipe(recipe, tmp_path / "given"), [], Machine(1), SHORT)
    network, _ = starting_network(recipe)
    engine: Any = make_engine(network.train(), recipe, Process(0, 1, torch.device("cpu")), lambda step: 1.0)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    gradients = storage_bytes(parameter.grad for parameter in parameters if parameter.grad is not None)
    engine.optimiser.step()
    moments = [value for state in engine.optimiser.state.values() for value in state.values()]
    moments = [value for value in moments if isinstance(value, Tensor) and value.dim()]

    states = States(plan.recipe, plan.planner.weights, plan.machine)
    assert states.frozen_bytes() + states.trained_bytes() == storage_bytes(network.parameters())
    assert states.optimiser_bytes() == storage_bytes(moments)
    assert states.late_gradient_bytes() == gradients


def test_activations_grow_as_those_of_a_real_step(values: Any, base: Path, tmp_path: Path) -> None:
    recipe = recipe_from(values(2))
    plan = make_plan(save_recipe(recipe, tmp_path / "given"), [], Machine(1), Assumptions(60, image_size=64))
    network, _ = load(base)
    network.train()
    tally = TensorTally("cpu")
    tally.count(network.parameters())
    ids = torch.randint(10, 100, (2, 60))
    ids[:, 1], ids[:, 2] = -200, -300
    mask = torch.ones_like(ids)
    mask[1, -1] = 0
    labels = ids.masked_fill(torch.arange(60) < 30, -100)
    with tally:
        start = tally.now
        output = network(
            input_ids=ids,
            attention_mask=mask,
            labels=labels,
            pixel_values=torch.rand(2, 3, 28, 28),
            region_masks=torch.ones(2, 4, 4),
            region_image=torch.arange(2),
            sam_pixel_values=torch.rand(2, 3, 64, 64),
        )
        forward = tally.now - start
    assert output.loss is not None
    trained_all = replace(recipe, trainable=("re:.*",), lora=replace(recipe.lora, rank=0))
    given = save_recipe(trained_all, tmp_path / "all")
    whole = make_plan(given, [], Machine(1), Assumptions(60, image_size=64))
    planned = whole.planner.activations.measure(2, False, "sdpa", torch.float32).peak
    assert planned >= 0.85 * forward
    assert planned <= 1.6 * forward  # the backward pass adds to it
    assert plan.memory.peak > 0


def test_adamw_keeps_twelve_bytes_of_a_trained_weight_under_deepspeed() -> None:
    alone = plan_7b(2, 80, gpus=1)
    assert part(alone, "optimiser") == 12 * trained(alone)
    assert part(alone, "weights, trained") == 2 * trained(alone)
    assert part(plan_7b(2, 80), "optimiser") == 3 * trained(alone)
    shared = plan_7b(2, 80, "engine.zero_stage=3")
    whole = sum(weight.numel for weight in shared.planner.weights)
    assert part(shared, "weights, trained") + part(shared, "weights, frozen") == pytest.approx(2 * whole / 4)


def test_real_sizes_lead_to_sane_conclusions() -> None:
    plan = plan_7b(2, 80, "schedule.batch_size=4", "schedule.accumulation=8")
    assert 7.2e9 < sum(weight.numel for weight in plan.planner.weights) < 7.6e9
    assert plan.fits
    assert not plan_7b(2, 12).fits
    mixture = plan_7b(4, 24)
    assert 11e9 < sum(weight.numel for weight in mixture.planner.weights) < 12.5e9
    assert not mixture.fits
    assert plan_7b(4, 80).fits
    quarters = plan_7b(2, 24, "lora.quantise=nf4")
    assert part(quarters, "weights, frozen") < 0.4 * part(plan, "weights, frozen")
    halves = plan_7b(4, 24, "engine.expert_parallel=2")
    assert part(halves, "weights, frozen") < 0.7 * part(mixture, "weights, frozen")


@pytest.mark.parametrize(("records", "ranks", "accumulation"), [(10, 1, 1), (10, 2, 3), (64, 2, 2), (3, 2, 1)])
def test_steps_are_those_that_training_takes(records: int, ranks: int, accumulation: int) -> None:
    recipe = load_recipe(STAGES / "stage2_nano.yaml")
    schedule = replace(recipe.schedule, epochs=3, batch_size=4, accumulation=accumulation, max_steps=0)
    sampler = ResumableSampler([1] * records, seed=0, batch_size=4, world_size=ranks)
    steps = DataSummary(records, 9.0, 9, 4, True).steps(replace(recipe, schedule=schedule), ranks)
    assert steps == math.ceil(3 * len(sampler) / accumulation)


def test_advice_is_what_makes_it_fit() -> None:
    plan = plan_7b(4, 24)
    changes = advise(plan)
    assert changes
    assert [change.slower for change in changes] == sorted(change.slower for change in changes)
    again = plan_7b(4, 24, *changes[0].overrides)
    assert again.fits
    assert again.memory.peak == pytest.approx(changes[0].memory.peak)
    assert again.global_batch == plan.global_batch


def test_command_tells_on_one_screen_and_by_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(STAGES / "stage2_nano.yaml"), "--gpus", "1", "--length", "64"]
    assert main([*arguments, "--gpu-mem", "4"]) == 0
    told = capsys.readouterr().out
    assert "FITS" in told and "activations" in told and "steps an epoch" in told
    assert len(told.splitlines()) < 40
    assert main([*arguments, "--gpu-mem", "1.05", "--json"]) == 1
    plan = json.loads(capsys.readouterr().out)
    assert not plan["fits"] and plan["sizes"] == "configs/model/nano.yaml"
    assert plan["peak"] > plan["gpu_memory"]


def test_wrong_input_is_told_in_a_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
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
    with pytest.raises(SystemExit) as ended:
        main(["plan", recipe, "--gpus", "0"])
    assert ended.value.code == 2


def test_sizes_of_a_checkpoint_are_taken_without_its_weights(values: Any, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "without"
    folder.mkdir()
    (folder / "config.json").write_text((base / "config.json").read_text())
    recipe: Recipe = recipe_from(values(2, model={"base": str(folder)}))
    plan = make_plan(save_recipe(recipe, tmp_path / "given"), [], Machine(1), SHORT)
    assert plan.planner.sizes.config.text_config.hidden_size == 32
    assert plan.data is not None and plan.data.records > 0
    (folder / "config.json").write_text("[]")
    with pytest.raises(MedPLIBError, match=r"config\.json"):
        make_plan(tmp_path / "given" / "recipe.yaml", [], Machine(1), SHORT)
