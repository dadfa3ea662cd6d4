"""Recipes: the published settings, overrides, and every problem told at once."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from model.errors import MedPLIBError
from model.train import load_recipe, recipe_from, save_recipe
from model.train.__main__ import main
from model.train.engine import deepspeed_config
from model.train.recipe import Optimizer

ROOT = Path(__file__).resolve().parents[2]
PATHS = {
    name: f"/{name.lower()}"
    for name in ("MEDPLIB_LLAMA", "MEDPLIB_LLAVA", "MEDPLIB_CLIP", "MEDPLIB_SAM", "MEDPLIB_DATA", "MEDPLIB_IMAGES")
}
# Reference §6, column by column.
PUBLISHED = {
    1: ((1, 32, 1), 1e-3, 2048, (0, 16.0, ()), {"projector"}, (1.0, 0.0, 0.0, 0.0, 0.0)),
    2: (
        (3, 16, 2),
        1e-4,
        2048,
        (16, 16.0, ("q", "k", "v", "o", "gate", "up", "down")),
        {"lm_head", "embed_tokens", "layer_norms", "projector", "region_adapter"},
        (1.0, 5.0, 1.0, 0.0, 0.0),
    ),
    3: (
        (10, 32, 1),
        3e-4,
        2048,
        (8, 16.0, ("gate", "up", "down")),
        {"mask_decoder", "mask_head"},
        (1.0, 5.0, 1.0, 1.0, 0.0),
    ),
    4: (
        (3, 4, 8),
        3e-4,
        1024,
        (8, 16.0, ("gate", "up", "down", "q", "v")),
        {"router", "lm_head", "embed_tokens", "mask_decoder", "mask_head", "region_adapter"},
        (1.0, 0.5, 2.0, 0.0, 0.0),
    ),
}


def config(name: str) -> Path:
    return ROOT / "configs" / "stages" / f"{name}.yaml"


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_7b_recipes_hold_the_published_settings(stage: int) -> None:
    recipe = load_recipe(config(f"stage{stage}_7b"), environment=PATHS)
    schedule, losses, lora = recipe.schedule, recipe.losses, recipe.lora
    lengths, lr, max_length, adapters, trainable, weights = PUBLISHED[stage]
    assert (schedule.epochs, schedule.batch_size, schedule.accumulation) == lengths
    assert (recipe.optimizer.lr, recipe.data.max_length) == (lr, max_length)
    assert (lora.rank, lora.alpha, lora.targets) == adapters
    assert set(recipe.trainable) == trainable
    assert (losses.ce, losses.dice, losses.bce, losses.focal, losses.iou) == weights
    settings = recipe.optimizer
    assert (settings.betas, settings.weight_decay, settings.clip, settings.warmup) == ((0.9, 0.95), 0.0, 1.0, 0.01)
    assert (settings.decay, recipe.engine.precision, recipe.engine.zero_stage) == ("linear", "bf16", 2)
    assert recipe.data.template == ("plain" if stage == 1 else "llava_v1")


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_published_settings_are_the_defaults_too(stage: int) -> None:
    """A file that leaves everything out means the same as the 7B file that writes everything down."""
    written = load_recipe(config(f"stage{stage}_7b"), environment=PATHS)
    plain = recipe_from({"stage": stage, "output": "runs", "data": {"train": ["a.json"]}})
    for section in ("schedule", "optimizer", "lora", "trainable", "losses", "mixture"):
        assert getattr(plain, section) == getattr(written, section), section


def test_stage_4_up_cycles_as_published() -> None:
    mixture = load_recipe(config("stage4_7b"), environment=PATHS).mixture
    assert (mixture.mode, mixture.num_experts, mixture.top_k) == ("dense", (2,), 1)
    assert (mixture.capacity_factor, mixture.eval_capacity_factor) == (1.5, 2.0)
    assert (mixture.router_aux_loss_coef, mixture.use_residual) == (0.0, False)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "stages").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_key_of_every_recipe_has_a_comment(path: Path) -> None:
    recipe = load_recipe(path, environment=PATHS)
    assert recipe.stage == int(path.stem[5])
    bare = [line for line in path.read_text().splitlines() if not line.startswith("#") and "#" not in line]
    sections = [line for line in bare if not line.startswith(" ") and line.endswith(":")]
    assert bare == sections


def test_overrides_are_yaml_values() -> None:
    recipe = load_recipe(
        config("stage2_7b"),
        ["optimizer.lr=2e-5", "data.train=[a.json,b.json]", "lora.rank=0", "output=x", "saving.published=true"],
        environment=PATHS,
    )
    assert recipe.optimizer.lr == 2e-5
    assert recipe.data.train == ("a.json", "b.json")
    assert (recipe.lora.rank, recipe.output, recipe.saving.published) == (0, "x", True)


def test_all_problems_come_at_once_with_the_nearest_name() -> None:
    overrides = [
        "optimzer.lr=1",
        "optimizer.learning=1",
        "schedule.epochs=many",
        "trainable=[projectr]",
        "model=7",
        "nonsense",
    ]
    with pytest.raises(MedPLIBError) as caught:
        load_recipe(config("stage2_7b"), overrides, environment={})
    text = str(caught.value)
    expected = [
        "optimzer is not a key (nearest: optimizer)",
        "optimizer.learning is not a key",
        "schedule.epochs is 'many', expected a whole number",
        "model is a section",
        "'nonsense' is not of the form key=value",
        "MEDPLIB_DATA, which is not set",
    ]
    for part in expected:
        assert part in text, part
    with pytest.raises(MedPLIBError, match=r"projectr .*nearest: trainable part projector"):
        load_recipe(config("stage2_7b"), ["trainable=[projectr]"], environment=PATHS)


def test_ten_faults_of_all_kinds_are_ten_problems_in_one_message(tmp_path: Path, capsys, monkeypatch) -> None:
    for name in PATHS:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "clash.json").write_text('{"gradient_clipping": 5}')
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("stage: 2")
    faults = {
        "optimzer.lr=1": "nearest: optimizer",
        "schedule.epochs=many": "schedule.epochs is 'many'",
        "engine.precision=fp8": "one of bf16, fp32",
        "optimizer.warmup=-1": "optimizer.warmup is -1, expected at least 0",
        "trainable=[projectr]": "nearest: trainable part projector",
        "mixture.top_k=2": "only stage 4 reads it",
        "nonsense": "'nonsense' is not of the form key=value",
        "model.base=nowhere": "model.base is nowhere, which does not exist",
        f"engine.deepspeed={tmp_path / 'clash.json'}": "sets gradient_clipping",
        f"output={tmp_path / 'run'}": "holds a run already",
        "data.images=.": "MEDPLIB_DATA, which is not set",
    }
    assert main([str(config("stage2_7b")), "--check", *faults]) == 2
    written = capsys.readouterr().err
    for told in faults.values():
        assert told in written, told
    assert len(written.splitlines()) == 1 and "is empty" not in written


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("schedule.batch_size=0", "at least 1"),
        ("engine.zero_stage=4", "one of 0, 1, 2, 3"),
        ("engine.precision=fp8", "one of bf16, fp32"),
        ("lora.targets=[w1]", "lora target w1"),
        ("data.shares=[1,2,3]", "3 numbers for 2"),
        ("optimizer.betas=[0.9]", "expected 2"),
        ("optimizer.betas=[0.9,1]", "expected less"),
        ("engine.gradient_checkpointing=yes please", "true or false"),
        ("schedule.epochs=.inf", "finite"),
        ("optimizer.lr=.nan", "finite"),
        ("seed=-1", "at least 0"),
        ("saving.every=-5", "at least 0"),
        ("data.shares=[0,0]", "all 0"),
        ("lora.dropout=2", "at most 1"),
        ("trainable=['re:(']", "no regular expression"),
        ("mixture.top_k=2", "only stage 4 reads it"),
        ("model.grounding=runs/stage3", "only stage 4 reads it"),
        ("augmentation.preset=much", "one of none, light, strong"),
        ("augmentation.rotation=[2, 10]", r"rotation is \[2.0, 10.0\], expected \[probability, strength\]"),
        ("augmentation.horizontal_flip=[0.5, 1]", r"expected \[probability\], the probability at most 1"),
    ],
)
def test_values_no_run_can_use_are_refused(override: str, told: str) -> None:
    with pytest.raises(MedPLIBError, match=told):
        load_recipe(config("stage2_7b"), [override], environment=PATHS)


CONTRADICTIONS = {
    "mixture.top_k=3": "expected one of 1, 2",
    "mixture.num_experts=[2,1] mixture.top_k=2": r"\[2, 1\], expected at least",
    "mixture.projector_experts=2": "trainable lacks projector",
    "model.sizes=configs/model/7b.yaml": "takes it from model.base",
    "engine.zero_stage=3 engine.expert_parallel=2": "needs engine.zero_stage 1 or 2",
    "engine.kind=torch engine.expert_parallel=2": "engine.kind is torch",
    "engine.expert_parallel=3": "expected a divisor of mixture.num_experts",
    "engine.expert_parallel=0": "expected at least 1",
    "lora.quantize=nf4 lora.rank=0": "lora.rank is 0",
    "lora.quantize=nf4 trainable=[attention]": "trainable names attention",
    "lora.quantize=nf4 engine.zero_stage=3": "which ZeRO-3 cannot share out",
    "lora.quantize=nf4 engine.expert_parallel=2": "do not go together",
    "validation.patience=2": "validation.patience is set, but saving.best names no score",
    "saving.best=dice": "saving.best is dice, expected mDice, false_masks, seg_said, closed, ",
    "saving.best=mDice validation.samples=0": "which needs data.validation and",
    "data.images=[a,b,c]": "data.images has 3 folders for 2 files",
}


@pytest.mark.parametrize("overrides", CONTRADICTIONS)
def test_contradictions_are_refused(overrides: str) -> None:
    files = ["data.train=[a.json,b.json]", "data.validation=[c.json]", "data.validation_images=d"]
    with pytest.raises(MedPLIBError, match=CONTRADICTIONS[overrides]):
        load_recipe(config("stage4_7b"), [*files, *overrides.split()], environment=PATHS)


def test_old_spellings_are_read_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "old.yaml").write_text("stage: 2\noutput: x\ndata: {train: a.json}\noptimiser: {lr: 3e-3}\n")
    old = ["lora.quantise=int8", "engine.offload=optimiser", "optimiser.eps=1e-6", "output=${oc.env:NOWHERE,runs}"]
    recipe = load_recipe(tmp_path / "old.yaml", old, environment={})
    assert (recipe.optimizer.lr, recipe.optimizer.eps, recipe.lora.quantize) == (3e-3, 1e-6, "int8")
    assert (recipe.engine.offload, recipe.output) == ("optimizer", "runs")
    assert caplog.text.count("is the old spelling of") == 4


def test_augmentation_and_feature_caches_exclude_each_other() -> None:
    both = ["augmentation.preset=light", "data.feature_cache=cache"]
    with pytest.raises(MedPLIBError, match="augmentation changes pictures at every step"):
        load_recipe(config("stage3_7b"), both, environment=PATHS)
    light = load_recipe(config("stage3_7b"), [*both[:1], "augmentation.hue=[0, 0]"], environment=PATHS).augmentation
    assert light.active and light.settings()["hue"] == (0, 0)
    assert not load_recipe(config("stage3_7b"), both[1:], environment=PATHS).augmentation.active


def test_a_saved_recipe_reads_back_the_same(tmp_path: Path) -> None:
    recipe = load_recipe(config("stage4_7b"), ["optimizer.eps=3e-7", "augmentation.hue=[1,2]"], environment=PATHS)
    assert load_recipe(save_recipe(recipe, tmp_path), environment={}) == recipe


def test_deepspeed_gets_the_recipe_s_settings(tmp_path: Path) -> None:
    recipe = load_recipe(config("stage2_7b"), environment=PATHS)
    settings = deepspeed_config(
        replace(recipe, engine=replace(recipe.engine, deepspeed=str(ROOT / "configs/deepspeed/7b.json")))
    )
    assert settings["zero_optimization"]["stage"] == 2
    assert settings["zero_optimization"]["overlap_comm"] is True
    assert (settings["gradient_accumulation_steps"], settings["gradient_clipping"]) == (2, 1.0)
    clash = tmp_path / "clash.json"
    clash.write_text('{"gradient_clipping": 5}')
    with pytest.raises(MedPLIBError, match="gradient_clipping"):
        deepspeed_config(replace(recipe, engine=replace(recipe.engine, deepspeed=str(clash))))
    clash.write_text("[1]")
    with pytest.raises(MedPLIBError, match="no DeepSpeed settings"):
        deepspeed_config(replace(recipe, engine=replace(recipe.engine, deepspeed=str(clash))))


def test_learning_rate_warms_up_and_decays_to_last_step() -> None:
    factor = Optimizer(warmup=0.01).rate_factor(steps_per_epoch=400, total_steps=1200)
    assert [factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    steps = [factor(step) for step in range(3, 1200)]
    assert all(earlier > later for earlier, later in itertools.pairwise(steps))
    assert steps[-1] == pytest.approx(1 / 1197)
    constant = Optimizer(warmup=0.0, decay="constant").rate_factor(10, 10)
    assert [constant(0), constant(9)] == [1.0, 1.0]
