"""``--check`` of a recipe whose records do not fit it: everything in one message, before anything is loaded."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from model.checkpoint import save
from model.train import recipe_from, run, save_recipe
from model.train.__main__ import main
from model.train.init_weights import starting_network
from model.train.preflight import schedule_notes


@pytest.fixture
def check(values: Any, phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> Any:
    """The exit code of ``--check`` with these values over a sound recipe for two files, and what it wrote."""
    files = [str(phantoms / name) for name in ("vqa.json", "grounding.json")]
    recipe = recipe_from(values(1, data={**values(1)["data"], "train": files}))
    given = str(save_recipe(recipe, tmp_path / "given"))

    def run(*words: str) -> tuple[int, str]:
        return main([given, "--check", "--quiet", *words]), capsys.readouterr().err

    return run


def test_the_check_prints_the_plan(values: Any, phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    held_out = {"validation": [str(phantoms / "grounding.json")], "validation_images": [str(phantoms)]}
    data = {**values(3)["data"], **held_out}
    recipe = recipe_from(values(3, data=data, schedule={"batch_size": 4, "max_steps": 7}, validation={"samples": 5}))
    assert main([str(save_recipe(recipe, tmp_path / "given")), "--check", "--processes", "2"]) == 0
    printed = capsys.readouterr().out
    counts = Counter()
    for name in ("vqa", "region", "grounding"):
        counts[name] = len(json.loads((phantoms / f"{name}.json").read_text()))
    assert ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) in printed
    epoch = -(-sum(counts.values()) // 8)
    assert f"7 of 2 x 4 x 1 = 8 records; {epoch} steps are an epoch" in printed
    assert f"max_steps=7 is {7 / epoch:.3g} epochs" in printed
    assert "published for stage 3: 128; schedule.accumulation=16 gives that" in printed
    assert f"5 of {phantoms / 'grounding.json'}, once an epoch" in printed
    assert re.search(r"trainable +lora [\d,]+, .*total [\d,]+ parameters", printed)
    assert re.search(r"time +about \d+:\d\d:\d\d, an estimate from one forward and backward pass of 4 records", printed)
    assert not recipe.folder.exists()


def test_another_number_of_processes_is_refused_in_a_sentence(
    values: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    recipe = recipe_from(values(1, engine={"kind": "auto"}))
    run(recipe)
    given = str(save_recipe(recipe, tmp_path / "given"))
    assert main([given, "--resume", "--check", "--quiet"]) == 0
    capsys.readouterr()
    assert main([given, "--resume", "--check", "--processes", "2"]) == 2
    printed = capsys.readouterr().err
    assert f"{recipe.folder} was begun with 1 process, now 2; resume with 1" in printed and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("sizes", "stage", "advice"),
    [
        ((8, 16, 2), 2, "schedule.accumulation=1"),
        ((8, 32, 1), 1, "batch_size=16 schedule.accumulation=1"),
        ((8, 4, 8), 4, "accumulation=4"),
        ((3, 4, 8), 4, "no batch size"),
    ],
)
def test_a_batch_unlike_the_published_is_noted(
    values: Any, sizes: tuple[int, int, int], stage: int, advice: str
) -> None:
    processes, batch, accumulation = sizes
    recipe = recipe_from(values(stage, schedule={"batch_size": batch, "accumulation": accumulation, "max_steps": 0}))
    (note,) = schedule_notes(recipe, processes, 10)
    assert advice in note and f"published for stage {stage}: 128" in note
    assert not schedule_notes(recipe, 4, 10)


@pytest.mark.parametrize(
    ("share", "told"),
    [
        ("data.task_shares={region: 1, other: 1}", "data.task_shares names region, but no training record is so"),
        ("data.task_shares={vqa: 1}", "data.task_shares leaves out grounding"),
        ("data.modality_shares={nothing: 1, other: 1}", "data.modality_shares names nothing"),
        ("data.task_shares={vqa: 1, grounding: 0}", ""),
    ],
)
def test_share_that_records_cannot_give_is_refused(check: Any, share: str, told: str) -> None:
    code, written = check(share)
    assert (code, written) == (0, "") if not told else (code == 2 and told in written)


def test_contradicting_shares_are_refused(check: Any) -> None:
    code, written = check("data.shares=[1, 0]", "data.task_shares={grounding: 1, other: 1}")
    assert code == 2 and "1 problem: data.task_shares and data.shares contradict each other" in written


def test_all_that_is_wrong_is_one_message(check: Any, phantoms: Path, tmp_path: Path) -> None:
    broken, held_out = tmp_path / "broken.json", tmp_path / "held_out.json"
    broken.write_text((phantoms / "vqa.json").read_text().replace("images/", "pictures/", 1))
    held_out.write_text(json.dumps(json.loads((phantoms / "region.json").read_text())[:3]))
    faults = {
        "optimizer.betas=[0.9]": "optimizer.betas has 1 numbers",
        "model.base=nowhere": "model.base is nowhere, which does not exist",
        f"data.train=[{broken}, {phantoms / 'grounding.json'}]": f"{broken}: 1 of",
        f"data.validation={held_out}": f"{held_out}: 3 of 3 records are unusable",
        "data.template=plain": "the template plain writes no questions",
        "validation.samples=4": "",
        "data.shares=[1]": "data.shares has 1 numbers for 2 train files",
        "data.task_shares={caption: 1, other: 1}": "data.task_shares names caption",
        "data.modality_shares={nothing: 1}": "data.modality_shares names nothing",
    }
    code, written = check(*faults)
    assert code == 2 and "has 7 problems" in written and len(written.splitlines()) == 1
    for told in faults.values():
        assert told in written, told


def test_a_wrong_share_is_blamed_once(check: Any) -> None:
    code, written = check("data.task_shares={captoin: 1, other: 1}", "data.modality_shares={ct: -1, other: 2}")
    assert code == 2 and "has 2 problems" in written and "nearest" in written and "at least 0" in written


def test_shares_are_not_tried_while_a_file_is_missing(check: Any, phantoms: Path) -> None:
    code, written = check(f"data.train=[{phantoms / 'vqa.json'}, nowhere.json]", "data.task_shares={grounding: 1}")
    assert code == 2 and "has 1 problem: data.train[1] is nowhere.json" in written


def test_record_too_long_for_recipe_is_refused(check: Any) -> None:
    code, written = check("data.max_length=40")
    assert code == 2 and "record 0 (" in written and "too_long: the conversation has" in written


def test_check_refuses_folder_without_checkpoint(check: Any, phantoms: Path) -> None:
    assert check() == (0, "")
    assert f"model.base is no checkpoint: {phantoms} holds no config.json" in check(f"model.base={phantoms}")[1]
    _, told = check("stage=4", f"model.grounding={phantoms / 'vqa.json'}")
    assert f"model.grounding is no checkpoint: {phantoms / 'vqa.json'} is no directory" in told


def test_check_refuses_parts_that_network_lacks(check: Any) -> None:
    _, told = check("trainable=[lm_head, token_compressor]", "data.images=nowhere")
    assert "has 2 problems" in told
    assert "trainable names token_compressor, which this network does not have" in told
    _, told = check("stage=4", "mixture.num_experts=[2, 2, 2]")
    assert "mixture.num_experts has 3 numbers for 4 layers" in told


def test_resumed_mixture_logs_settings_it_keeps(
    values: Any, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = recipe_from(values(4, model={"base": str(base), "grounding": str(base)}, lora={"rank": 0}))
    save(*starting_network(first), tmp_path / "mixture")
    caplog.set_level(logging.INFO, "model.train.init_weights")
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
