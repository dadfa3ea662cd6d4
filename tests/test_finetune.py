"""``medplib finetune``: own data to a fine-tuned model, its page, and its adapter alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from model.checkpoint import load
from model.cli import main
from model.data.phantom import TASKS, build_phantoms
from model.errors import MedPLIBError
from model.finetune import _open_data, _with_validation, verdicts_of
from model.inference.predictor import Predictor
from model.train.recipe import load_recipe
from model.train.runs import read_record
from tests.tiny import tiny_checkpoint

QUICK = ["schedule.max_steps=2", "schedule.batch_size=2", "validation.samples=2", "logging.tensorboard=false"]
QUICK += ["validation.max_new_tokens=4", "saving.every=1", "data.max_length=512"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mixture that was trained on conversations."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("base"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "conversation_turns": 6}))
    return folder


def built(folder: Path, seed: int, split: str = "train", **more: Any) -> Path:
    """Two phantoms as a built folder; the same as its test split."""
    build_phantoms(folder, 2, seed, size=64)
    for task in TASKS:
        rows = json.loads((folder / f"{task}.json").read_text())
        (folder / f"{task}.json").write_text(json.dumps(rows[:3]))
    files = [f"{task}.json" for task in TASKS]
    splits = {"train": files, "validation": files[-1:], "test": files}
    (folder / "dataset.json").write_text(json.dumps({"name": folder.name, "splits": splits, **more}))
    return folder


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run through LoRA: own data, rehearsal records without a held-out split, base."""
    folder = tmp_path_factory.mktemp("finetune")
    own, old = built(folder / "own", 1, terms="CC BY 4.0"), built(folder / "old", 2)
    command = ["finetune", str(own), "--model", str(base), "--rehearse", str(old), "--method", "lora"]
    assert main([*command, "--out", str(folder / "run"), *QUICK]) == 0
    return {"own": own, "old": old, "run": folder / "run", "base": base}


def test_finetune_ends_with_page_card_and_model(run: dict[str, Path]) -> None:
    page = (run["run"] / "index.html").read_text()
    card = (run["run"] / "merged" / "README.md").read_text()
    for text in ("own: before and after", "Worst cases", "medplib serve --model", "lora training", "40% of the draws"):
        assert text in page
    assert "own; terms: CC BY 4.0" in card and "old; terms: not stated" in card and "→" in card
    recipe = load_recipe(run["run"] / "recipe.yaml")
    assert recipe.data.images == (str(run["own"]),) * 3 + (str(run["old"]),) * 3
    assert recipe.data.validation_images == (str(run["own"]), str(run["old"]))
    assert sum(recipe.data.shares) == pytest.approx(1, abs=0.01) and sum(recipe.data.shares[:3]) == pytest.approx(0.6)
    Predictor.from_pretrained(run["run"])


def test_print_recipe_is_the_recipe_that_ran(
    run: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["finetune", str(run["own"]), "--model", str(run["base"]), "--rehearse", str(run["old"])]
    assert main([*command, "--method", "lora", "--out", str(run["run"]), "--print-recipe", *QUICK]) == 0
    text = capsys.readouterr().out
    (tmp_path / "recipe.yaml").write_text(text)
    printed = load_recipe(tmp_path / "recipe.yaml")
    assert printed == load_recipe(run["run"] / "recipe.yaml") and printed.schedule.max_steps == 2
    assert yaml.safe_load(text)["model"]["base"] == str(run["base"])


def test_a_model_of_single_questions_claims_no_conversations(run: dict[str, Path]) -> None:
    config = json.loads((run["run"] / "merged" / "config.json").read_text())
    assert config.get("conversation_turns", 1) == 1


def test_masks_get_two_thirds_of_the_own_draws(run: dict[str, Path]) -> None:
    data = load_recipe(run["run"] / "recipe.yaml").data
    own = {Path(file).stem: share for file, share in zip(data.train, data.shares, strict=True) if "/own/" in str(file)}
    assert {task: round(share / sum(own.values()), 2) for task, share in own.items()} == {
        "vqa": 0.17,
        "region": 0.17,
        "grounding": 0.67,
    }


def test_finished_run_is_not_trained_again(run: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["finetune", str(run["own"]), "--model", str(run["base"]), "--rehearse", str(run["old"])]
    command += ["--method", "lora", "--out", str(run["run"])]
    assert main([*command, *QUICK]) == 2 and "--resume" in capsys.readouterr().err
    attempts = len(read_record(run["run"])["attempts"])
    (run["run"] / "index.html").unlink()
    assert main([*command, "--resume", *QUICK]) == 0
    assert len(read_record(run["run"])["attempts"]) == attempts and (run["run"] / "index.html").is_file()
    assert main([*command, "--resume", *QUICK, "schedule.max_steps=3"]) == 0
    assert read_record(run["run"])["step"] == 3


def test_adapter_loads_by_peft_and_alone(run: dict[str, Path], tmp_path: Path) -> None:
    from peft import PeftModel

    adapter = tmp_path / "adapter"
    assert main(["export", str(run["run"]), str(adapter), "--layout", "adapter"]) == 0
    merged, _ = load(run["run"])
    alone, _ = load(adapter)
    difference = [(a - b).abs().max() for a, b in zip(merged.parameters(), alone.parameters(), strict=True)]
    assert max(difference) < 1e-6
    plain, _ = load(run["base"])
    assert any(not torch.equal(a, b) for a, b in zip(merged.parameters(), plain.parameters(), strict=True))
    wrapped = PeftModel.from_pretrained(plain, adapter).eval()
    ids = {"input_ids": torch.tensor([[1, 40, 41, 42]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    with torch.no_grad():
        found, wanted = (network(**ids).logits for network in (wrapped.base_model.model, merged))
    assert torch.allclose(found, wanted, atol=1e-5)


def test_adapter_finds_its_base_or_says_how(
    run: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "adapter"
    assert main(["export", str(run["run"]), str(adapter), "--layout", "adapter"]) == 0
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(run["base"])
    settings["base_model_name_or_path"] = "gone"
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(MedPLIBError, match="'gone', which is not here; name that with --base"):
        Predictor.from_pretrained(adapter)
    Predictor.from_pretrained(adapter, base=run["base"])
    assert main(["export", str(adapter), str(tmp_path / "whole"), "--base", str(run["base"])]) == 0
    assert main(["describe", str(adapter), "--base", str(run["base"])]) == 0
    assert "a LoRA of the checkpoint below" in capsys.readouterr().out
    with pytest.raises(MedPLIBError, match="is no LoRA"):
        load(run["base"], base=run["base"])


def test_records_without_held_out_give_a_tenth(tmp_path: Path) -> None:
    rows = [
        {"id": str(n), "patient": f"p{n // 2}", "image": "a.png", "conversations": [{"from": "human", "value": "x"}]}
        for n in range(200)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = _with_validation(_open_data(tmp_path / "rows.json", tmp_path / "x"), tmp_path / "split")
    parts = {split: json.loads(files[0].read_text()) for split, files in data.splits.items()}
    assert len(parts["train"]) + len(parts["validation"]) == 200 and 4 <= len(parts["validation"]) <= 40
    assert not {row["patient"] for row in parts["train"]} & {row["patient"] for row in parts["validation"]}
    assert data.images == tmp_path and data.held_out == "validation"


@pytest.mark.parametrize(("cases", "held_out"), [(1, 0), (2, 1), (3, 1), (25, 3)])
def test_a_tenth_of_few_patients_is_one_at_least(tmp_path: Path, cases: int, held_out: int) -> None:
    rows = [{"id": str(n), "image": f"{n}.png", "patient": f"p{n % cases}", "conversations": []} for n in range(50)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = _with_validation(_open_data(tmp_path / "rows.json", tmp_path / "x"), tmp_path / "split")
    found = [row["patient"] for file in data.splits.get("validation", ()) for row in json.loads(file.read_text())]
    assert len(set(found)) == held_out


@pytest.mark.parametrize(
    ("after", "low", "high", "own", "word"),
    [
        (0.45, -0.52, -0.44, False, "FORGOTTEN"),
        (0.45, -0.52, -0.44, True, "WORSE"),
        (0.91, -0.03, -0.01, False, "slightly worse"),
        (0.91, -0.05, 0.01, False, "no change beyond chance"),
        (0.97, 0.02, 0.06, False, "better"),
    ],
)
def test_forgetting_is_called_by_its_name(after: float, low: float, high: float, own: bool, word: str) -> None:
    found = SimpleNamespace(first=0.93, second=after, difference=after - 0.93, low=low, high=high, count=40)
    metric = SimpleNamespace(name="mDice@0.5", higher_is_better=True)
    part = SimpleNamespace(title="phantoms", found=SimpleNamespace(overall={"mDice@0.5": found}, metrics=(metric,)))
    (line,) = verdicts_of(part, own=own)  # type: ignore[arg-type]
    assert line.startswith(f"phantoms mDice@0.5 0.93 → {after:.2f}: {word} (")


def test_false_masks_that_rise_are_forgetting() -> None:
    found = SimpleNamespace(first=0.01, second=0.9, difference=0.89, low=math.nan, high=math.nan, count=40)
    metric = SimpleNamespace(name="false_mask_rate@0.5", higher_is_better=False)
    part = SimpleNamespace(
        title="phantoms", found=SimpleNamespace(overall={"false_mask_rate@0.5": found}, metrics=(metric,))
    )
    assert "FORGOTTEN (+0.89)" in verdicts_of(part, own=False)[0]  # type: ignore[arg-type]


def test_nothing_at_the_data_is_a_sentence(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", str(tmp_path / "no"), "--model", str(base), "--out", str(tmp_path / "run")]) == 2
    assert "there is nothing at" in capsys.readouterr().err


def test_source_is_built_first(base: Path, run: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("model.data.builders.build", reason="the builder of any layout is not there")
    source = tmp_path / "source"
    for place in ("images", "bright"):
        (source / place).mkdir(parents=True)
    for number in range(10):
        pixels = np.full((64, 64, 3), 9 * number, dtype=np.uint8)
        pixels[8 + number : 40, 20:50] = 200
        Image.fromarray(pixels).save(source / "images" / f"{number}.png")
        Image.fromarray(((pixels[..., 0] == 200) * 255).astype(np.uint8)).save(source / "bright" / f"{number}.png")
    command = ["finetune", str(source), "--model", str(base), "--rehearse", str(run["old"])]
    assert main([*command, "--out", str(tmp_path / "run"), *QUICK, "schedule.max_steps=1"]) == 0
    assert (tmp_path / "run" / "data" / "dataset.json").is_file() and (tmp_path / "run" / "index.html").is_file()
