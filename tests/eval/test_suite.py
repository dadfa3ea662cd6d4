"""Suites: what their files may say, what is told when data is missing, and a whole run from the command to the page."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from model.cli import main
from model.data.builders.questions import blind_baseline
from model.data.records import open_records
from model.errors import MedPLIBError
from model.eval import suite_run
from model.eval.metrics.definitions import metrics_for
from model.eval.metrics.scores import score_predictions
from model.eval.options import InferenceOptions
from model.eval.predictions import read_predictions
from model.eval.shards import Journal, Rank, fingerprint, run_folder
from model.eval.suite import DataSet, Suite, available_suites, load_suite, write_questions
from model.eval.suite_run import SuiteOptions, SuiteOutcome, run_suite
from model.inference.engine import Engine
from tests.eval.phantom_questions import NANO, RECORDS, SAMPLE

TASKS = ("vqa", "region", "grounding")
ASKED = [record for task in TASKS for record in [r for r in RECORDS if r["task"] == task][:4]]

SET: dict[str, Any] = {
    "name": "first",
    "records": ["questions.json"],
    "images": str(SAMPLE),
    "split": "test",
    "task": "mixed",
    "headlines": ["closed_accuracy", "mDice@0.5"],
    "thresholds": [0.5, 0.1],
    "max_new_tokens": 48,
    "licence": "none",
    "source": "drawn",
    "version": "1",
    "obtain": "draw it again",
}


def write_suite(folder: Path, sets: Sequence[dict[str, Any]] = (SET,), **values: Any) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"title": "Mine", "sets": list(sets), **values}))
    return path


def refusal(path: Path | str, **environment: str) -> str:
    with pytest.raises(MedPLIBError) as caught:
        load_suite(path, environment=environment)
    return str(caught.value)


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", available_suites())
def test_suites_of_the_project_say_everything(name: str):
    assert available_suites() == ["mecovqa", "omnimedvqa", "phantoms", "vqa_sets", "zero_shot_grounding"]
    suite = load_suite(name, environment={})
    assert suite.title
    for item in suite.sets:
        for told in ("split", "licence", "source", "version", "obtain", "title"):
            assert getattr(item, told).strip()
        assert {*item.headlines} <= {metric.name for metric in metrics_for(item.thresholds, item.surface)}
        assert all(0 < known.value < 1 for known in item.known)


@pytest.mark.parametrize("name", [name for name in available_suites() if name != "phantoms"])
def test_missing_data_is_one_sentence_that_says_where_to_get_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["eval", str(NANO), name, "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err.strip()
    assert "which is not there; get " in told
    assert str(tmp_path) in told
    assert "--data DIR" in told
    assert "\n" not in told
    assert not (tmp_path / "out").exists()


def test_a_folder_of_phantoms_of_ones_own_is_taken(tmp_path: Path):
    for name in ("vqa", "region", "grounding"):
        (tmp_path / f"{name}.json").write_text(json.dumps([r for r in RECORDS if r["task"] == name]))
    item = load_suite("phantoms", environment={"MEDPLIB_DATA": str(tmp_path)}).sets[0]
    assert [path.name for path in item.files()] == ["vqa.json", "region.json", "grounding.json"]
    (tmp_path / "grounding.json").unlink()
    with pytest.raises(MedPLIBError, match=r"held_out\.json, which is not there; make them with"):
        item.files()


def test_all_problems_are_told_at_once_with_the_nearest_key(tmp_path: Path):
    wrong = {**SET, "licens": "none", "task": "vqua", "surface": "yes", "max_new_tokens": 1.5}
    told = refusal(write_suite(tmp_path, [wrong], titel="x"))
    assert "has 5 problems" in told
    assert "titel is not a key (nearest: title)" in told
    assert "sets[0].licens is not a key (nearest: sets[0].licence)" in told
    assert "sets[0].task is 'vqua', expected one of vqa, region, grounding, mixed" in told
    assert "sets[0].surface is 'yes', expected true or false" in told
    assert "sets[0].max_new_tokens is 1.5, expected a whole number" in told


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"headlines": ["mdice@0.5"]}, r"mdice@0\.5 is not a metric of it \(nearest: mDice@0\.5\)"),
        ({"headlines": ["HD95_px@0.5"]}, "HD95_px@0.5 is not a metric of it"),  # not measured without surface
        ({"headlines": []}, "headlines is empty"),
        ({"thresholds": [0.5, 1.0]}, "expected numbers between 0 and 1"),
        ({"licence": " "}, "licence is empty; say it"),
        ({"name": "../out"}, "may hold letters"),
        ({"images": "${NOWHERE}/x"}, "needs the environment variable NOWHERE, which is not set"),
        ({"known": [{"metric": "mDice@0.5", "value": "high", "who": "x"}]}, "value is 'high', expected a number"),
        ({"known": [{"metric": "mDice@0.5"}]}, r"known\[0\] lacks value, who"),
        ({"records": [{"file": "x"}]}, "expected a path"),
    ],
)
def test_values_that_no_run_can_use_are_refused(tmp_path: Path, changes: dict[str, Any], told: str):
    with pytest.raises(MedPLIBError, match=told):
        load_suite(write_suite(tmp_path, [{**SET, **changes}]), environment={})


def test_what_is_no_suite_is_refused(tmp_path: Path):
    assert "give a YAML file or one of: mecovqa" in refusal("phantom")
    broken = tmp_path / "broken.yaml"
    broken.write_text("sets: [")
    assert "cannot be read as YAML" in refusal(broken)
    broken.write_text("- a\n")
    assert "holds list" in refusal(broken)
    assert "two sets have the name first" in refusal(write_suite(tmp_path, [SET, SET]))
    assert "sets is empty" in refusal(write_suite(tmp_path, []))


def test_paths_start_from_the_suite_and_variables_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    changes = {"records": ["${DATA:-sub}/${PART:-all}.json"], "images": "${IMAGES:-${DATA:-sub}/../pictures}"}
    path = write_suite(tmp_path, [{**SET, **changes}])
    item = load_suite(path, environment={}).sets[0]
    assert (item.records[0], item.images) == (tmp_path / "sub" / "all.json", tmp_path / "pictures")
    monkeypatch.chdir(tmp_path.parent)
    item = load_suite(path, environment={"DATA": "here", "PART": "some"}).sets[0]
    assert (item.records[0], item.images) == (tmp_path.parent / "here" / "some.json", tmp_path.parent / "pictures")
    assert load_suite(path, environment={"IMAGES": "/x"}).sets[0].images == Path("/x")


def test_sets_can_be_chosen(tmp_path: Path):
    suite = load_suite(write_suite(tmp_path, [SET, {**SET, "name": "second"}]), environment={})
    assert [item.name for item in suite.only(["second"]).sets] == ["second"]
    assert suite.only([]) == suite
    with pytest.raises(MedPLIBError, match=r"no set secnd \(nearest: second\)"):
        suite.only(["secnd"])


# --- layouts of public sets -----------------------------------------------------------------------------------------


def asked_of(folder: Path, layout: str, name: str, content: Any) -> list[dict[str, Any]]:
    (folder / name).write_text(json.dumps(content))
    suite = write_suite(folder, [{**SET, "layout": layout, "records": [name], "images": str(folder)}])
    path, images = write_questions(load_suite(suite, environment={}).sets[0], folder / "out")
    assert images == folder
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_layouts_of_public_sets_become_records(tmp_path: Path):
    row = {"qid": 7, "img_name": "xmlab1/source.jpg", "question": "Is it CT?", "answer": "Yes", "q_lang": "en"}
    row |= {"answer_type": "CLOSED", "content_type": "Modality", "modality": "MRI"}
    (record,) = asked_of(tmp_path, "slake", "test.json", [row, {**row, "q_lang": "zh", "qid": 8}])  # English alone
    assert record["conversations"][0]["value"] == "<image>\nIs it CT?"
    assert (record["id"], record["image"], record["answer_type"]) == ("slake-7", "xmlab1/source.jpg", "closed")
    assert (record["kind"], record["modality"]) == ("Modality", "mr")
    row = {"qid": 1, "image_name": "synpic1.jpg", "question": "Where?", "answer": 3, "answer_type": "OPEN "}
    row |= {"phrase_type": "test_freeform", "question_type": "POS"}
    (record,) = asked_of(tmp_path, "vqa_rad", "public.json", [row, {**row, "phrase_type": "freeform"}])  # the test half
    assert (record["conversations"][1]["value"], record["answer_type"], record["kind"]) == ("3", "open", "POS")
    row = {"question_id": "A_1", "question": "Which?", "gt_answer": "CT", "image_path": "Images/a.png"}
    row |= {"option_A": "CT", "option_B": "MR", "modality_type": "X-Ray", "dataset": "A", "question_type": "Modality"}
    (record,) = asked_of(tmp_path, "omnimedvqa", "A.json", [row])
    assert record["conversations"][0]["value"] == "<image>\nWhich? Answer with one of these: CT; MR."
    assert (record["answer_type"], record["modality"], record["dataset"]) == ("closed", "x_ray", "A")


def test_images_inside_parquet_become_files(tmp_path: Path):
    import pyarrow
    import pyarrow.parquet

    content = next((SAMPLE / "images").glob("*.png")).read_bytes()
    rows = [{"image": {"bytes": content, "path": None}, "question": f"q{n}?", "answer": a} for n, a in enumerate("xyz")]
    rows[2]["answer"] = "No"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "test-0.parquet")
    changes = {"layout": "parquet", "records": ["test-*.parquet"], "images": str(tmp_path)}
    item = load_suite(write_suite(tmp_path, [{**SET, **changes}]), environment={}).sets[0]
    path, images = write_questions(item, tmp_path / "out")
    records = list(open_records(path))
    assert [record["answer_type"] for record in records] == ["open", "open", "closed"]
    assert len({record["id"] for record in records}) == 3
    (picture,) = images.iterdir()  # the same image once
    assert (images / records[0]["image"]).read_bytes() == picture.read_bytes() == content


def test_a_file_of_another_layout_is_refused(tmp_path: Path):
    with pytest.raises(MedPLIBError, match=r"record 0, is not of the layout slake \(KeyError: 'q_lang'\)"):
        asked_of(tmp_path, "slake", "test.json", [{"question": "?"}])
    with pytest.raises(MedPLIBError, match="has no question in"):
        asked_of(tmp_path, "vqa_rad", "public.json", [{"phrase_type": "freeform"}])


def test_records_of_several_files_keep_apart(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps([{"image": "x.png"}, {"id": "own", "image": "y.png"}]))
    suite = write_suite(tmp_path, [{**SET, "records": ["a.json", "b.json"]}])
    path, _ = write_questions(load_suite(suite, environment={}).sets[0], tmp_path / "out")
    assert [record["id"] for record in open_records(path)] == ["a-0", "own", "b-0", "own"]


# --- a whole run ----------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[InferenceOptions]:
    """Runs take an engine that is there already; every time that one is opened is noted."""
    calls: list[InferenceOptions] = []

    def opener(options: InferenceOptions, device: torch.device) -> Engine:
        calls.append(options)
        return engine

    monkeypatch.setattr(suite_run, "open_engine", opener)
    return calls


@pytest.fixture
def suite_file(tmp_path: Path) -> Path:
    """Two sets: one of all tasks, one with an image that is not there."""
    (tmp_path / "questions.json").write_text(json.dumps(ASKED))
    gone = [{**RECORDS[0], "id": "gone", "image": "images/nowhere.png"}]
    (tmp_path / "broken.json").write_text(json.dumps([RECORDS[0], *gone, RECORDS[1]]))
    second = {**SET, "name": "second", "records": ["broken.json"], "headlines": ["closed_accuracy"]}
    blind = {"blind": [str(SAMPLE / f"{name}.json") for name in ("vqa", "region", "grounding")]}
    return write_suite(tmp_path, [{**SET, **blind}, second])


Run = Callable[..., SuiteOutcome]


@pytest.fixture
def run(suite_file: Path, opened: list[InferenceOptions], tmp_path: Path) -> Run:
    def start(**changes: Any) -> SuiteOutcome:
        suite = load_suite(suite_file, environment={})
        options = SuiteOptions(NANO, suite, str(suite_file), tmp_path / "out", device="cpu")
        return run_suite(replace(options, **changes), Rank(), suite_run.open_engine)

    return start


def test_a_suite_is_asked_scored_and_shown(run: Run, opened: list[InferenceOptions], tmp_path: Path):
    outcome = run()
    assert [path.name for path in outcome.files] == ["report.html", "report.json", "scores.csv", "rows.csv"]
    assert len(opened) == 1  # both sets share the engine
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    first, second = told["sets"]
    rows = list(read_predictions(tmp_path / "out" / "predictions" / "first.jsonl"))
    assert [str(row.question_id) for row in rows] == [record["id"] for record in ASKED]
    scores = score_predictions(rows, thresholds=(0.5, 0.1))
    for name in SET["headlines"]:
        assert first["scores"]["overall"][name]["value"] == pytest.approx(scores.overall[name].value)
    assert scores.overall["mDice@0.5"].value > 0.8  # the nano does draw
    assert (second["scores"]["rows"], second["scores"]["errors"]) == (3, 1)
    assert (outcome.errors, "nowhere.png" in str(outcome.first_error)) == (1, True)
    assert set(first["router"]) == set(TASKS)
    assert told["facts"]["Model"] == str(NANO)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "1 question could not be asked" in page
    assert len((tmp_path / "out" / "rows.csv").read_text().splitlines()) == len(ASKED) + 3 + 1


def test_blind_baselines_are_those_of_the_builder(run: Run, tmp_path: Path):
    result = run().result
    assert result is not None
    train = [r for name in TASKS for r in json.loads((SAMPLE / f"{name}.json").read_text())]
    guessed = blind_baseline(train, ASKED)
    closed = [guessed[record["kind"]] for record in ASKED if record["answer_type"] == "closed"]
    assert result.sets[0].blind["", "", "closed_accuracy"] == pytest.approx(sum(closed) / len(closed))
    assert 0 <= result.sets[0].blind["", "", "mDice@0.5"] < 0.8
    assert not result.sets[1].blind
    limited = run(limit=2, overwrite=True).result  # the baselines are of the questions that were asked
    assert limited is not None
    assert {by for by, _, _ in limited.sets[0].blind} == {"", "kind", "task"}
    assert {kind for by, kind, _ in limited.sets[0].blind if by == "kind"} == {record["kind"] for record in ASKED[:2]}


def test_a_set_may_be_asked_as_published(run: Run, opened: list[InferenceOptions], tmp_path: Path):
    (tmp_path / "questions.json").write_text(json.dumps(ASKED[:1]))
    second = {**SET, "name": "second", "prompt": "published", "always_mask": True}
    write_suite(tmp_path, [SET, second, {**SET, "name": "third"}])
    result = run().result
    assert result is not None
    assert [options.template for options in opened] == [None, "v1", None]  # an engine each time the prompt changes
    journal = json.loads((tmp_path / "out" / "predictions" / "second.run.json").read_text())
    assert (journal["settings"]["template"], journal["settings"]["always_mask"]) == ("v1", True)
    told = json.loads((tmp_path / "out" / "report.json").read_text())["sets"]
    assert [part["always_mask"] for part in told] == [False, True, False]


def test_a_stopped_suite_goes_on_and_a_finished_one_asks_nothing(
    run: Run, opened: list[InferenceOptions], tmp_path: Path
):
    run()
    answers = tmp_path / "out" / "predictions" / "first.jsonl"
    whole, lines = answers.read_bytes(), answers.read_bytes().splitlines(keepends=True)
    opened.clear()
    assert run().result is not None
    assert not opened
    answers.write_bytes(b"".join(lines[:5]) + lines[5][:40])  # as a killed process leaves it
    journal = answers.with_name("first.run.json")
    journal.write_text(journal.read_text().replace('"finished"', '"running"'))
    run()
    assert len(opened) == 1
    assert [_answer(line) for line in answers.read_bytes().splitlines()] == [_answer(line) for line in lines]
    assert answers.read_bytes()[:200] == whole[:200]


def _answer(line: bytes) -> tuple[Any, ...]:
    row = json.loads(line)
    return row["question_id"], row["text"], json.dumps(row["masks_at"])


def test_answers_of_other_settings_are_refused_or_overwritten(run: Run, tmp_path: Path):
    run(limit=2)
    assert len(list(read_predictions(tmp_path / "out" / "predictions" / "first.jsonl"))) == 2
    with pytest.raises(MedPLIBError, match="limit was 2, now None"):
        run()
    result = run(overwrite=True).result
    assert result is not None
    assert [part.questions for part in result.sets] == [len(ASKED), 3]


def test_a_missing_checkpoint_is_refused_before_any_answer(tmp_path: Path):
    item = DataSet(**{**SET, "records": (SAMPLE / "held_out.json",), "images": SAMPLE})
    options = SuiteOptions(tmp_path / "nowhere", Suite("s", (item,)), "s", tmp_path / "out", device="cpu")
    with pytest.raises(MedPLIBError, match="nowhere"):
        run_suite(options, Rank())
    assert not (tmp_path / "out").exists()


def test_the_command_runs_a_suite(
    suite_file: Path,
    opened: list[InferenceOptions],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(suite_run.run_suite, "__defaults__", (None, suite_run.open_engine))
    monkeypatch.chdir(tmp_path)
    arguments = ["eval", str(NANO), str(suite_file), "--device", "cpu", "--limit", "3"]
    assert main([*arguments, "--only", "first"]) == 0
    out = Path("runs/eval/medplib-nano") / load_suite(suite_file, environment={}).name
    told = capsys.readouterr().out
    assert "Closed accuracy" in told
    assert f"wrote {out / 'report.html'}" in told
    assert "only the first 3 records of each set" in (out / "report.html").read_text()
    again = shlex.split(json.loads((out / "report.json").read_text())["command"])
    assert again[-6:] == ["--limit", "3", "--device", "cpu", "--only", "first"] and again[4:6] == ["--out", str(out)]
    assert main(again[1:]) == 0 and len(opened) == 1  # finished already, so nothing is asked
    capsys.readouterr()
    assert main([*arguments, "--out", "other"]) == 3
    assert "1 question could not be asked: " in capsys.readouterr().out
    assert main(["eval", str(NANO), str(suite_file), "--data", str(tmp_path / "no")]) == 2
    assert "is not a directory here" in capsys.readouterr().err


def test_results_of_two_checkpoints_never_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/a", "runs/b", "elsewhere/a"):
        Path(name, "merged").mkdir(parents=True)
        Path(name, "merged/config.json").write_text(json.dumps({"from": name}))
    assert run_folder("eval", Path("runs/a/merged")) == run_folder("eval", Path("runs/a")) == Path("runs/eval/a")
    assert run_folder("infer", Path("runs/b/merged")) == Path("runs/infer/b")
    known = {"name": "a", "digest": fingerprint(Path("runs/a/merged"))}
    Journal({"model": known}).write(Path("runs/eval/a/phantoms/predictions/s.chunk-1-of-2.jsonl"))
    assert run_folder("eval", Path("runs/a")) == Path("runs/eval/a")
    assert run_folder("eval", Path("elsewhere/a")).name == f"a-{fingerprint(Path('elsewhere/a/merged'))[:8]}"
