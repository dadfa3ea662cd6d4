"""Validation while training: scores of generated answers, the best checkpoint, the end without a better one."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoint import load
from model.cli import main as command
from model.errors import MedPLIBError
from model.eval.metrics.scores import score_predictions
from model.eval.options import InferenceOptions
from model.eval.predictions import read_predictions
from model.eval.run import run_inference
from model.inference.answer import Answer
from model.train import recipe_from, run
from model.train.checkpoint import checkpoint_of, list_checkpoints, network_of_run, step_of
from model.train.runs import read_record
from model.train.validation import HeldOutQuestion, Validator, even_shares

LEARNS = ["decoder", "lm_head", "projector", "region_adapter", "mask_decoder", "mask_head"]


def rows(folder: Path, name: str = "validation.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def evaluated(directory: Path, records: Path, images: Path, out: Path) -> dict[str, float]:
    """What ``medplib eval`` measures, under the names of the validation."""
    answers = out / f"{records.stem}.jsonl"
    run_inference(
        InferenceOptions(directory, records, images, answers, max_new_tokens=128, thresholds=(0.1, 0.5), device="cpu")
    )
    scores = score_predictions(read_predictions(answers), thresholds=(0.1, 0.5), samples=10).overall
    names = {
        "mDice@0.1": "mDice@0.1",
        "mDice@0.5": "mDice@0.5",
        "false_mask_rate@0.1": "false_masks",
        "closed_accuracy": "closed",
        "open_exact_match": "open",
    }
    return {new: scores[old].value for old, new in names.items() if old in scores}


@pytest.fixture(scope="module")
def short(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records with answers of a word or two, which a tiny network learns in seconds."""
    folder = tmp_path_factory.mktemp("short")
    made: dict[str, list[dict[str, Any]]] = {"masks": [], "words": []}
    for record in json.loads((phantoms / "grounding.json").read_text()):
        mask = (re.findall("<mask>(.*?)</mask>", record["conversations"][1]["value"]) or [""])[0]
        shared = {"image": record["image"], "modality": record["modality"]}
        target, answer = ("liver", f"<SEG><mask>{mask}</mask>") if mask else ("tumour", "no")
        made["masks"].append(shared | {"task": "grounding", **talk(f"Please segment the {target}.", answer)})
        if mask:
            made["words"] += [
                shared | {"answer_type": "closed", **talk("Is there a kidney?", "yes")},
                shared | {"answer_type": "open", **talk("What modality?", record["modality"])},
                shared | {"answer_type": "closed", **talk(f"Is <region>{mask}</region> left?", "no")},
            ]
    for name, records in made.items():
        (folder / f"{name}.json").write_text(json.dumps(records))
    return folder


def talk(question: str, answer: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"conversations": turns}


@pytest.fixture()
def learning(values: Any, short: Path) -> Any:
    """Recipes of a run that learns ``short``: ``learning(**sections)``."""

    def make(**sections: Any) -> Any:
        files = [str(short / "masks.json"), str(short / "words.json")]
        default: dict[str, Any] = {
            "data": {**values(3)["data"], "train": files, "validation": files},
            "trainable": LEARNS,
            "lora": {"rank": 4, "targets": ["q", "up"]},
            "schedule": {"batch_size": 8, "max_steps": 120},
            "optimizer": {"lr": 1e-2, "decay": "constant"},
            "validation": {"samples": 1000, "every": 120},
        }
        for name, value in sections.items():
            default[name] = {**default[name], **value} if isinstance(default.get(name), dict) else value
        return recipe_from(values(3, **default))

    return make


def test_scores_are_those_of_the_evaluation(learning: Any, short: Path, phantoms: Path, tmp_path: Path) -> None:
    recipe = learning()
    merged = run(recipe)
    (found,) = rows(recipe.folder)
    masks, words = (evaluated(merged, short / f"{name}.json", phantoms, tmp_path) for name in ("masks", "words"))
    assert set(masks) == {"mDice@0.1", "mDice@0.5", "false_masks"} and set(words) == {"closed", "open"}
    assert masks["mDice@0.5"] > 0 and words["closed"] > 0  # it learnt something to agree about
    for file, scores in (("masks.json", masks), ("words.json", words)):
        for name, value in scores.items():
            assert found[name] == found[f"{name}/{file}"] == pytest.approx(value, abs=1e-9), name


@pytest.mark.parametrize(("text", "right"), [("MR", 1.0), ("B. MR", 1.0), ("CT", 0.0)])
def test_options_of_the_question_count_as_in_the_evaluation(text: str, right: float) -> None:
    question = HeldOutQuestion("Which is it? A. CT B. MR", "B", (), 0, range(0), "vqa", closed=True)
    scores: Any = Validator._scores
    assert dict(scores(None, question, [], Answer(text, [], {}, "end", 0))) == {"closed": right}


def test_validation_leaves_the_training_as_it_was(learning: Any, tmp_path: Path) -> None:
    losses = []
    for samples in (0, 8):
        recipe = learning(
            output=str(tmp_path / f"{samples}"),
            lora={"dropout": 0.5},
            schedule={"batch_size": 2, "max_steps": 4},
            validation={"samples": samples, "every": 1, "max_new_tokens": 4},
            engine={"gradient_checkpointing": True},
        )
        run(recipe)
        losses.append([row["loss"] for row in rows(recipe.folder, "metrics.jsonl")])
    assert losses[0] == losses[1] and len(rows(recipe.folder)) == 4


def test_the_best_checkpoint_is_kept_and_merged(
    learning: Any, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    sections: dict[str, Any] = {
        "schedule": {"batch_size": 2, "max_steps": 30},
        "optimizer": {"lr": 0.1},  # far too much after a while
        "validation": {"samples": 6, "every": 1, "max_new_tokens": 1, "patience": 3},
        "saving": {"best": "teacher_forced/ce/masks.json", "every": 2, "keep": 1},
    }
    recipe = learning(**sections)
    with caplog.at_level(logging.INFO, logger="model"):
        run(recipe)
    scores = {row["step"]: row["teacher_forced/ce/masks.json"] for row in rows(recipe.folder)}
    best = min(scores, key=scores.__getitem__)
    assert max(scores) == best + 3 < 30, "three validations without a better one end the run"
    assert "with the best teacher_forced/ce/masks.json" in caplog.text and "3 validations without" in caplog.text
    kept = [step_of(path) for path in list_checkpoints(recipe.folder)]
    assert best in kept and len(kept) == 2
    record = read_record(recipe.folder)
    assert record["status"] == "finished" and record["merged"]["step"] == best
    expected = network_of_run(checkpoint_of(recipe.folder, best))[0].state_dict()
    merged = load(recipe.merged)[0].state_dict()
    assert all(torch.equal(value, merged[name]) for name, value in expected.items())
    assert command(["runs", str(recipe.folder)]) == 0
    assert f"step {best}: mDice" in capsys.readouterr().out

    more = learning(**sections | {"validation": {**sections["validation"], "patience": 4}})
    run(more, resume=True)  # goes on counting where it was
    assert max(row["step"] for row in rows(recipe.folder)) == best + 4
    message = "saving.best is region/masks.json, which the records of data.validation do not give; they give "
    sections["saving"]["best"] = "region/masks.json"
    with pytest.raises(MedPLIBError, match=message):
        run(learning(output=f"{recipe.folder}-2", **sections))


def test_a_finished_run_is_extended(learning: Any, caplog: pytest.LogCaptureFixture) -> None:
    schedule = {"batch_size": 4, "max_steps": 2}
    recipe = learning(schedule=schedule, optimizer={"decay": "linear", "warmup": 0.0}, validation={"samples": 0})
    run(recipe)
    longer = replace(recipe, schedule=replace(recipe.schedule, max_steps=4))
    with caplog.at_level(logging.INFO, logger="model"):
        run(longer, resume=True)
    assert "the schedule has 4 steps now, it had 2" in caplog.text
    assert "max_steps=4 is" in caplog.text and "published for stage 3: 128; schedule.accumulation=32" in caplog.text
    rates = [row["lr"] for row in rows(recipe.folder, "metrics.jsonl")]
    assert rates == pytest.approx([1e-2, 5e-3, 5e-3, 2.5e-3])


def test_files_share_the_draw_evenly() -> None:
    assert even_shares([3, 100, 100], 63) == [3, 30, 30]
    assert even_shares([5], 200) == [5] and even_shares([10, 10], 5) == [2, 3]
