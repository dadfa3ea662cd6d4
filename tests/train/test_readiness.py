"""``--check`` of a recipe whose records do not fit it: everything in one message, before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model.train import recipe_from, save_recipe
from model.train.__main__ import main


@pytest.fixture
def check(values: Any, phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> Any:
    """The exit code of ``--check`` with these values over a sound recipe for two files, and what it wrote."""
    files = [str(phantoms / name) for name in ("vqa.json", "grounding.json")]
    recipe = recipe_from(values(1, data={**values(1)["data"], "train": files}))
    given = str(save_recipe(recipe, tmp_path / "given"))

    def run(*words: str) -> tuple[int, str]:
        return main([given, "--check", *words]), capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("share", "told"),
    [
        ("data.task_shares={region: 1, other: 1}", "data.task_shares names region, but no training record is so"),
        ("data.task_shares={vqa: 1}", "data.task_shares leaves out grounding"),
        ("data.modality_shares={nothing: 1, other: 1}", "data.modality_shares names nothing"),
        ("data.task_shares={vqa: 1, grounding: 0}", ""),
    ],
)
def test_a_share_that_the_records_cannot_give_is_told(check: Any, share: str, told: str) -> None:
    code, written = check(share)
    assert (code, written) == (0, "") if not told else (code == 2 and told in written)


def test_shares_that_no_weights_keep_are_told(check: Any) -> None:
    code, written = check("data.shares=[1, 0]", "data.task_shares={grounding: 1, other: 1}")
    assert code == 2 and "1 problem: data.task_shares and data.shares contradict each other" in written


def test_all_that_is_wrong_is_one_message(check: Any, phantoms: Path, tmp_path: Path) -> None:
    broken, held_out = tmp_path / "broken.json", tmp_path / "held_out.json"
    broken.write_text((phantoms / "vqa.json").read_text().replace("images/", "pictures/", 1))
    held_out.write_text(json.dumps(json.loads((phantoms / "region.json").read_text())[:3]))
    faults = {
        "optimiser.betas=[0.9]": "optimiser.betas has 1 numbers",
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


def test_a_record_too_long_for_the_recipe_is_told(check: Any) -> None:
    code, written = check("data.max_length=40")
    assert code == 2 and "record 0 (" in written and "too_long: the conversation has" in written
