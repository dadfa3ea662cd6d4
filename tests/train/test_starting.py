"""What a stage starts from: refused by the check where it is none; told where its own settings stay."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from model.checkpoint import save
from model.train import recipe_from, save_recipe
from model.train.__main__ import main
from model.train.starting import starting_network


@pytest.fixture()
def check(values: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """What ``--check`` says of a sound recipe with some values changed."""
    given = str(save_recipe(recipe_from(values(2)), tmp_path / "given"))

    def run(*overrides: str) -> str:
        code = main([given, "--check", *overrides])
        told = capsys.readouterr().err
        assert code == (2 if told else 0)
        return told

    return run


def test_a_folder_without_a_checkpoint_is_told_by_the_check(check: Any, base: Path, phantoms: Path) -> None:
    assert check() == ""
    assert f"model.base is no checkpoint: {phantoms} holds no config.json" in check(f"model.base={phantoms}")
    told = check("stage=4", f"model.grounding={phantoms / 'vqa.json'}")
    assert f"model.grounding is no checkpoint: {phantoms / 'vqa.json'} is no directory" in told


def test_parts_that_the_network_lacks_are_told_by_the_check_with_all_else(check: Any) -> None:
    told = check("trainable=[lm_head, token_compressor]", "data.images=nowhere")
    assert "has 2 problems" in told
    assert "trainable names token_compressor, which this network does not have" in told
    told = check("stage=4", "mixture.num_experts=[2, 2, 2]")
    assert "mixture.num_experts has 3 numbers for 4 layers" in told


def test_a_mixture_that_goes_on_tells_which_settings_it_does_not_take_up(
    values: Any, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = recipe_from(values(4, model={"base": str(base), "grounding": str(base)}, lora={"rank": 0}))
    save(*starting_network(first), tmp_path / "mixture")
    caplog.set_level(logging.INFO, "model.train.starting")
    model = {"base": str(tmp_path / "mixture")}
    starting_network(recipe_from(values(4, model=model, lora={"rank": 0})))
    assert "stays" not in caplog.text
    changed = {"mixture": {"capacity_factor": 1.0, "num_experts": [4], "mode": "sparse"}}
    network, _ = starting_network(recipe_from(values(4, model=model, lora={"rank": 0}, **changed)))
    told = (
        "mixture.layers stays (0, 1, 2, 3), mixture.num_experts stays (2, 2, 2, 2), mixture.capacity_factor stays 1.5"
    )
    assert caplog.text.strip().endswith(f"whose settings are kept: {told}")
    assert network.config.moe.capacity_factor == 1.5
