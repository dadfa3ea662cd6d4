"""Two runs over the same questions: differences, answers that changed, and what is refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from model.cli import main
from model.errors import MedPLIBError
from model.eval.compare import (
    CHANGES_FILE,
    EXAMPLES,
    HTML_FILE,
    JSON_FILE,
    SetComparison,
    compare_runs,
    open_run,
    verdict_text,
    write_comparison,
)
from model.eval.predictions import Prediction
from tests.eval.drawn import EVIL, Outline, painted, rows, save

Change = Callable[[Prediction], Prediction]


def compared(folder: Path, first: list[Prediction], second: list[Prediction]) -> SetComparison:
    runs = [open_run(save(folder / f"{name}.jsonl", answers)) for name, answers in (("a", first), ("b", second))]
    (found,) = compare_runs(*runs, samples=200, permutations=200)
    return found


def changed(numbers: dict[int, Change]) -> list[Prediction]:
    return [numbers[place](answer) if place in numbers else answer for place, answer in enumerate(rows())]


def said(text: str) -> Change:
    return lambda answer: replace(answer, text=text)


def test_a_run_does_not_differ_from_itself(tmp_path: Path):
    found = compared(tmp_path, rows(), rows()[::-1])  # whatever the order
    assert not found.changes
    assert all(d.difference == 0 and (np.isnan(d.p_value) or d.p_value == 1) for d in found.found.overall.values())
    assert verdict_text([found]).endswith("None of the 22 answers scored differently.")


def test_fixed_and_broken_answers_are_found(tmp_path: Path):
    second = changed(
        {
            0: said("No"),  # broken
            4: said("Yes"),  # fixed
            8: said("Liver and kidney"),  # fixed
            11: lambda answer: painted(11, 12),  # a little worse, which does not count
            17: lambda answer: painted(17, 10),  # much better
            20: lambda answer: painted(20, None, absent=True),  # no false mask any more
        }
    )
    found = compared(tmp_path, rows(), second)
    assert {(c.place, c.what) for c in found.better()} == {(4, "right"), (8, "exact"), (17, "dice"), (20, "clean")}
    assert [(c.place, c.what) for c in found.worse()] == [(0, "right")]
    assert found.found.overall["closed_accuracy"].difference == 0
    assert found.found.overall["false_mask_rate@0.5"].difference == -0.5
    expected = (
        "Of 22 answers 4 scored better (1 closed, 1 open, 1 with masks, 1 about absent targets), 1 worse (1 closed)"
    )
    assert f"{expected}, and 17 as before." in verdict_text([found])


def test_examples_are_the_largest_changes_of_each_kind(tmp_path: Path):
    def answer(number: int, left: int) -> Prediction:
        return replace(painted(number, left), image_path=f"images/{number // 2}.png")

    found = compared(tmp_path, [answer(n, 11) for n in range(12)], [answer(n, 18 + n) for n in range(12)])
    assert len(found.worse()) == 12
    shown = sorted(found.examples)
    assert len(shown) == EXAMPLES
    assert shown == [7, 9, 11]  # the worst of three images, not both of the worst image
    assert all(first.question_id == second.question_id for first, second in found.examples.values())


def test_the_page_and_the_files_hold_the_same(tmp_path: Path):
    (tmp_path / "images").mkdir()
    for index in range(6):
        Image.fromarray(np.full((64, 64, 3), 90, dtype=np.uint8)).save(tmp_path / "images" / f"{index}.png")
    second = changed({1: said(EVIL), 17: lambda answer: painted(17, 10)})
    runs = [open_run(save(tmp_path / f"{name}.jsonl", part)) for name, part in (("a", rows()), ("b", second))]
    found = compare_runs(*runs, samples=100, permutations=100)
    found[0].first = replace(found[0].first, images=tmp_path)
    write_comparison(*runs, found, tmp_path / "out")
    page = Outline((tmp_path / "out" / HTML_FILE).read_text(encoding="utf-8"))
    assert not page.open
    assert '</dd><script>alert(1)</script><img src=x onerror="alert(2)">' in page.text
    assert "script" not in {tag for tag, _ in page.tags}
    assert sum(tag == "img" for tag, _ in page.tags) == 3  # both runs' masks, and the image of the other answer
    assert "Of 22 answers 1 scored better (1 with masks), 1 worse (1 closed), and 20 as before." in page.text
    content = json.loads((tmp_path / "out" / JSON_FILE).read_text())["sets"][0]
    assert [(change["question_id"], change["scored"]) for change in content["changes"]] == [
        ("q1", "right"),
        ("q17", "dice"),
    ]
    difference = content["differences"]["overall"]["closed_accuracy"]["difference"]
    assert difference == pytest.approx(found[0].found.overall["closed_accuracy"].difference)
    with (tmp_path / "out" / CHANGES_FILE).open(newline="") as stream:
        assert [(line["question_id"], line["gain"]) for line in csv.DictReader(stream)] == [
            ("q1", "-1.0000"),
            ("q17", "0.3500"),
        ]


def test_masks_as_written_are_compared_where_thresholds_differ(tmp_path: Path):
    plain = [replace(answer, masks_at=None) for answer in rows()]
    names = {metric.name for metric in compared(tmp_path, rows(), plain).found.metrics}
    assert "mDice" in names
    assert "mDice@0.5" not in names
    one = [replace(r, masks_at={"0.1": r.masks_at["0.1"]} if r.masks_at else None) for r in rows()]
    names = {metric.name for metric in compared(tmp_path, rows(), one).found.metrics}
    assert "mDice@0.1" in names
    assert "mDice@0.5" not in names


# --- folders of medplib eval, and the command -----------------------------------------------------------------------


def folder_of(path: Path, sets: dict[str, list[Prediction]], **known: Any) -> Path:
    for name, answers in sets.items():
        save(path / "predictions" / f"{name}.jsonl", answers)
    entries = [{"name": name, "thresholds": [0.5], "title": name.upper(), **known} for name in sets]
    (path / "report.json").write_text(json.dumps({"sets": entries}))
    return path


def test_folders_are_compared_set_by_set(tmp_path: Path):
    sets = {"one": rows()[:10], "two": rows()[10:]}
    first = open_run(folder_of(tmp_path / "a", sets, headlines=["closed_accuracy"], images=str(tmp_path)))
    second = open_run(folder_of(tmp_path / "b", {**sets, "one": changed({0: said("No")})[:10]}))
    found = compare_runs(first, second, samples=50, permutations=50)
    assert [part.title for part in found] == ["ONE", "TWO"]
    assert [len(part.changes) for part in found] == [1, 0]
    assert (found[0].headlines(), found[0].images) == (["closed_accuracy"], tmp_path)
    text = verdict_text(found)
    assert text.startswith("ONE\n")
    assert text.count("closed_accuracy") == 2
    other = open_run(folder_of(tmp_path / "c", {"one": rows()[:10], "three": rows()[10:]}))
    with pytest.raises(MedPLIBError, match=r"of different data sets: .* has one, two and .* has one, three"):
        compare_runs(first, other)


def test_what_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(MedPLIBError, match="is no run; give a prediction file or a folder"):
        open_run(tmp_path)
    folder_of(tmp_path, {"one": rows()})
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(MedPLIBError, match="is no report of medplib eval"):
        open_run(tmp_path)
    odd = save(tmp_path / "odd.jsonl", changed({0: lambda answer: replace(answer, masks_at={"strict": []})}))
    with pytest.raises(MedPLIBError, match=r"odd\.jsonl, question q0: masks_at holds 'strict'.*expected lists by"):
        open_run(odd)
    save(tmp_path / "empty.jsonl", [])
    with pytest.raises(MedPLIBError, match="a run without predictions"):
        compare_runs(open_run(tmp_path / "empty.jsonl"), open_run(tmp_path / "empty.jsonl"))


def test_the_command_prints_a_table_or_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    save(Path("nano/one.jsonl"), rows())
    save(Path("other/one.jsonl"), changed({0: said("No")}))
    assert main(["compare", "nano/one.jsonl", "other/one.jsonl"]) == 0
    printed = capsys.readouterr().out
    assert "1 worse (1 closed), and 21 as before." in printed
    assert Path("runs/compare/nano-one-and-other-one", HTML_FILE).is_file()
    save(Path("other/nano/one.jsonl"), rows())
    assert main(["compare", "nano/one.jsonl", "other/nano/one.jsonl"]) == 0
    page = Path(f"runs/compare/{tmp_path.name}-nano-one-and-other-nano-one", HTML_FILE).read_text()
    assert "<h1>nano/one.jsonl and other/nano/one.jsonl</h1>" in page  # two runs of one name
    capsys.readouterr()
    assert main(["compare", "nano/one.jsonl", "other/one.jsonl", "--json", "--out", "here"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(Path("here", JSON_FILE).read_text())
    assert main(["compare", "nano/one.jsonl", "nowhere.jsonl"]) == 2
    assert "nowhere.jsonl is no run" in capsys.readouterr().err
