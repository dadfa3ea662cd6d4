"""QLoRA: frozen decoder weights in 8 or 4 bits while LoRA learns, and plain weights again at the end."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoint import load
from model.errors import MedPLIBError
from model.train import recipe_from, run, save_recipe
from model.train.checkpoints import list_checkpoints, network_of_run
from model.train.loop import Trainer
from model.train.starting import check_paths, starting_network
from model.train.trainable import is_quantised
from tests.train.launching import launch
from tests.train.same_steps import read_rows

installed = pytest.mark.skipif(not find_spec("bitsandbytes"), reason="the gpu extra (bitsandbytes) is not installed")
LORA = {"rank": 2, "dropout": 0.0, "targets": ["q", "v", "gate", "up", "down"]}
SCHEMES = pytest.mark.parametrize("scheme", ["int8", "nf4"])


def quantised(values: Any, scheme: str, stage: int = 4, **sections: Any) -> dict[str, Any]:
    chosen = values(stage, lora={**LORA, "quantise": scheme}, **sections)
    if stage == 4:
        chosen["model"]["grounding"] = chosen["model"]["base"]
        chosen["mixture"] = {"random_token_priority": False, **chosen.get("mixture", {})}
    return chosen


@installed
@SCHEMES
def test_what_is_handed_on_computes_what_was_trained(values: Any, scheme: str) -> None:
    trainer = Trainer(recipe_from(quantised(values, scheme, optimiser={"lr": 1e-2}, mixture={"use_residual": True})))
    trainer.set_up()
    try:
        trainer.train_step()
        trainer.train_step()
        batch = trainer.next_batch()
        with torch.no_grad():
            expected = trainer.engine.forward(batch, return_logits=True).logits
        weights = dict(trainer.engine.network.named_parameters())
        learnt = weights["model.decoder.layers.0.mlp.experts.0.up_proj.lora_B.default.weight"]  # from zero
        assert learnt.abs().max() > 0
        integers = [name for name, value in weights.items() if not value.is_floating_point()]
        merged, _ = load(trainer.hand_over())
    finally:
        trainer.close()
    assert len(integers) == 4 * (4 + 3 * 3)  # layers × (attention, two experts and the residual one)
    with torch.no_grad():
        found = merged.train()(**batch, return_logits=True).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@installed
def test_eight_bits_lose_little(values: Any, tmp_path: Path) -> None:
    schedule = {"schedule": {"batch_size": 2, "accumulation": 1, "max_steps": 3}}
    whole, rounded = (
        recipe_from(quantised(values, scheme, output=str(tmp_path / scheme), **schedule)) for scheme in ("none", "int8")
    )
    run(whole)
    run(rounded)
    for row, same in zip(read_rows(whole), read_rows(rounded), strict=True):
        assert same["loss"] == pytest.approx(row["loss"], rel=1e-2)
    checkpoint, _ = network_of_run(list_checkpoints(rounded.folder)[-1])
    assert not is_quantised(checkpoint)
    for name, value in load(rounded.merged)[0].state_dict().items():
        assert value.equal(checkpoint.state_dict()[name]), name


@installed
def test_two_ranks_train_and_resume(values: Any, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="the train extra (deepspeed) is not installed")
    recipes, arguments = [], []
    for scheme in ("int8", "nf4"):
        chosen = quantised(values, scheme, output=str(tmp_path / scheme), saving={"every": 2})
        chosen["schedule"] = {"batch_size": 1, "accumulation": 1, "max_steps": 3}
        chosen["engine"] |= {"kind": "deepspeed", "zero_stage": 2, "gradient_checkpointing": True}
        recipes.append(recipe_from(chosen))
        given = save_recipe(recipes[-1], tmp_path / "given" / scheme)
        arguments += [str(given), f"+{given}"]
    ended = launch(["tests/train/rank_runs.py", *arguments], processes=2)
    assert ended.returncode == 0, ended.stderr
    for recipe in recipes:
        first = [json.loads(line)["loss"] for line in (recipe.folder / "first.jsonl").read_text().splitlines()]
        assert [row["loss"] for row in read_rows(recipe)] == first
        merged = load(recipe.folder / "first")[0].state_dict()
        for name, value in load(recipe.merged)[0].state_dict().items():
            assert value.equal(merged[name]), name


@installed
def test_integers_do_not_learn(values: Any) -> None:
    chosen = quantised(values, "int8", stage=2, trainable=["re:.*self_attn.*"])
    with pytest.raises(MedPLIBError, match=r"keeps model.decoder.layers.0.self_attn.q_proj.weight as integers"):
        starting_network(recipe_from(chosen))


@pytest.mark.skipif(bool(find_spec("bitsandbytes")), reason="bitsandbytes is installed")
def test_without_the_library_nothing_is_loaded(values: Any) -> None:
    with pytest.raises(MedPLIBError, match="needs bitsandbytes, and that is not installed; install the gpu extra"):
        check_paths(recipe_from(quantised(values, "nf4")))


WRONG = {
    "lora.rank is 0": {"lora": {"rank": 0, "quantise": "nf4"}},
    "trainable names attention": {"trainable": ["attention"]},
    "which ZeRO-3 cannot share out": {"engine": {"kind": "deepspeed", "zero_stage": 3}},
    "do not go together": {"engine": {"kind": "deepspeed", "zero_stage": 2, "expert_parallel": 2}},
}


@pytest.mark.parametrize("said", WRONG)
def test_contradictions_are_refused(values: Any, said: str) -> None:
    chosen = quantised(values, "nf4")
    for name, value in WRONG[said].items():
        chosen[name] = {**chosen[name], **value} if isinstance(value, dict) else value
    with pytest.raises(MedPLIBError, match=said):
        recipe_from(chosen)
