"""The experiment about the paper's claim: its order of work, and what its table says."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture()
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import reproduce_nano

    yield reproduce_nano
    for name in ("reproduce_nano", "nano_report"):
        sys.modules.pop(name, None)


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_jobs_follow_what_they_read_and_are_not_done_twice(scripts: Any, tmp_path: Path) -> None:
    logs, first, second = tmp_path / "logs", tmp_path / "first", tmp_path / "second"
    append = "import pathlib; p = pathlib.Path({!r}); p.write_text(p.read_text() + 'x' if p.exists() else 'x')"
    jobs = [
        scripts.Job("second", python(f"open({str(first)!r}); open({str(second)!r}, 'w')"), second, ("first",)),
        scripts.Job("first", python(append.format(str(first))), first),
    ]
    assert scripts.run_all(jobs, 2, logs) == []
    assert second.exists()
    assert scripts.run_all(jobs, 2, logs) == []
    assert first.read_text() == "x"


def test_what_reads_a_failed_job_is_not_run(scripts: Any, tmp_path: Path) -> None:
    jobs = [
        scripts.Job("broken", python("raise SystemExit(3)"), tmp_path / "a"),
        scripts.Job("silent", python("pass"), tmp_path / "b"),  # ends well and makes nothing
        scripts.Job("reader", python(f"open({str(tmp_path / 'c')!r}, 'w')"), tmp_path / "c", ("broken",)),
        scripts.Job("other", python(f"open({str(tmp_path / 'd')!r}, 'w')"), tmp_path / "d"),
    ]
    assert sorted(scripts.run_all(jobs, 1, tmp_path / "logs")) == ["broken", "reader", "silent"]
    assert not (tmp_path / "c").exists() and (tmp_path / "d").exists()


def test_every_arm_takes_the_same_number_of_steps(scripts: Any, tmp_path: Path) -> None:
    jobs = {job.name: job for job in scripts.Plan(tmp_path / "nano", tmp_path / "claim", 7, 10).jobs(2)}

    def steps(name: str) -> int:
        (own,) = (int(v.split("=")[1]) for v in jobs[f"{name}_2"].command if v.startswith("schedule.max_steps="))
        return own

    mixture = steps("vqa") + steps("grounding")
    taken = {name: steps(name) + mixture for name in ("mixture", "mixture_projector", *scripts.ABLATIONS)}
    taken |= {"vqa_expert": steps("vqa_expert"), "dense": steps("dense")}
    taken["grounding_expert"] = steps("vqa") + steps("grounding_expert")
    assert set(taken) == {*scripts.ARMS, *scripts.ABLATIONS}
    assert set(taken.values()) == {21}
    assert all(f"measure_{name}_2" in jobs for name in taken)


def test_the_recipes_of_all_arms_are_valid(scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from model.train import load_recipe

    monkeypatch.setenv("MEDPLIB_DATA", "data/sample")
    commands = [job.command for job in scripts.Plan(tmp_path, tmp_path, 5, 10).jobs(0) if "model.train" in job.command]
    recipes = [load_recipe(ROOT / command[3], [v for v in command[4:] if "=" in v]) for command in commands]
    assert {recipe.stage for recipe in recipes} == {1, 2, 3, 4}
    dense = next(recipe for recipe in recipes if recipe.output.endswith("dense"))
    assert dense.data.train == ("data/sample/vqa.json", "data/sample/region.json", "data/sample/grounding.json")


def scores(vqa: float, region: float, mdice: float) -> dict[str, float]:
    return {"VQA": vqa, "region": region, "closed": vqa, "mDice": mdice, "false masks": 0.1}


def test_the_verdict_is_what_the_scores_say(scripts: Any) -> None:
    found = {name: [scores(0.5, 0.5, 0.5)] * 2 for name in scripts.ROWS}
    found["vqa_expert"] = [scores(0.90, 0.80, 0.20), scores(0.92, 0.82, 0.30)]
    found["grounding_expert"] = [scores(0.40, 0.30, 0.90), scores(0.40, 0.30, 0.92)]
    found["mixture"] = [scores(0.89, 0.80, 0.89), scores(0.92, 0.81, 0.91)]
    kept, than_dense, _ = scripts.verdict(found)
    assert "both skills? yes" in kept and "mDice -0.010 (-0.010 to -0.010)" in kept
    assert "VQA +0.405" in than_dense
    found["mixture"] = [scores(0.89, 0.80, 0.70), scores(0.92, 0.81, 0.80)]
    assert "both skills? no: it loses more than 0.02 in mDice (" in scripts.verdict(found)[0]
    text = scripts.markdown(found, scores(0.1, 0.1, 0.1), 7)
    assert "| d: two experts (top-1, capacity 1.5, aux 0.01) | 0.905 ± 0.021 |" in text and "21 steps" in text
