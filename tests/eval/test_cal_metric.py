"""The commands that print scores: their faces, files and refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.eval import cal_metric, cal_metric_omniMedVQA
from model.processing.masks import encode_rle

ROOT = Path(__file__).resolve().parents[2]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text_row(number: int, gt: str = "liver", text: str = "the liver", **others: Any) -> dict[str, Any]:
    image = f"images/ct_00--S--{number}--0.png"
    row = {"question_id": number, "image_path": image, "prompt": "What?", "gt": gt, "text": text}
    return {**row, "answer_type": "open", "metadata": {}, **others}


def mask_row(number: int) -> dict[str, Any]:
    wanted, painted = np.zeros((6, 6), dtype=bool), np.zeros((6, 6), dtype=bool)
    wanted[:2], painted[:4] = True, True
    masks = {"0.1": [encode_rle(painted)], "0.5": [encode_rle(wanted)]}
    known = {"masks": [{"rle": masks["0.1"][0]}], "gt_masks": [encode_rle(wanted)], "masks_at": masks}
    return text_row(number, "<SEG>", "<SEG>", **known)


@pytest.mark.parametrize("command", [["model/eval/cal_metric.py"], ["-m", "model.eval.cal_metric"]])
def test_the_published_command_runs_from_the_root(command: list[str], tmp_path: Path) -> None:
    pred = written(tmp_path / "p.jsonl", [text_row(0)])
    done = subprocess.run(
        [sys.executable, *command, f"--pred={pred}", "--samples=10"],
        cwd=ROOT, env={"PATH": ""}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"pred file {pred}\ncandidate_set None\nopen_cnt 1\n")
    assert done.stderr == ""


def test_both_kinds_of_scores_and_the_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [text_row(0), text_row(1, "yes", "No", answer_type="closed"), mask_row(2), mask_row(3)]
    rows.append(text_row(4, text="", finish="error", error="the image is missing"))
    pred, out = written(tmp_path / "p.jsonl", rows), tmp_path / "new" / "scores.json"
    assert cal_metric.main(["--pred", str(pred), "--json", str(out), "--surface", "--samples", "50"]) == 0
    printed = capsys.readouterr().out
    told = json.loads(out.read_text())
    standard = told["standard"]["overall"]
    assert standard["mIoU@0.1"]["value"] == 0.5  # the thresholds of the file are found
    assert standard["mIoU@0.5"]["value"] == 1
    assert standard["HD95_px@0.5"]["value"] == 0
    assert standard["open_exact_match"]["value"] == 0.5
    assert told["published"]["table"]["open accuracy"] == 1100
    assert told["published"]["open"] == 4  # as published, a grounding answer is an open one
    assert told["standard"]["published_grounding"]["0.1"] == {
        "masks": 2,
        "mIoU": 0.5,
        "mDice": pytest.approx(2 / 3),
        "modality": {"ct": {"iou": 0.5, "dice": 0.666667}},
    }
    assert "Grounding as published: 2 masks, threshold 0.1\nmiou: 0.500000, mDice: 0.666667\n" in printed
    assert "By task" in printed
    assert printed.endswith("5 rows, 1 of them without an answer, which counts as wrong\n")


def test_rows_of_other_writers_have_no_image_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"question_id": n, "gt": "yes", "text": text, "answer_type": "closed"} for n, text in enumerate(("Yes.", "no"))
    ]
    out = tmp_path / "scores.json"
    assert cal_metric.main(["--pred", str(written(tmp_path / "p.jsonl", rows)), "--json", str(out)]) == 0
    closed = json.loads(out.read_text())["standard"]["overall"]["closed_accuracy"]
    assert closed["value"] == 0.5 and closed["low"] == 0  # each row is an image of its own
    assert "2 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"size": [4, 6], "counts": [4, 4, 16]}, ""),
        ({"size": [4.0, 6.0], "counts": "44`0"}, ""),
        ({"size": [4, 6], "counts": "b'44`0'"}, ""),
        ({"size": [4, 6], "counts": [4.0, 4.0, 16.0]}, ""),
        ({"size": [6, 4], "counts": "44`0"}, "is size given as [width, height]? COCO's is [height, width]"),
        ({"size": [4.5, 6], "counts": "44`0"}, "4.5 is no whole number"),
        ({"size": [4, 6], "counts": [4, 4.5, 15.5]}, "4.5 is no whole number"),
        ({"size": ["4", "6"], "counts": "44`0"}, "'4' is no whole number"),
        ({"size": [4, 6]}, "a mask encoding is malformed ('counts')"),
        ({"size": [4, 6], "counts": None}, "a mask encoding is malformed"),
        ([[1, 0, 2, 0, 2, 4, 1, 4]], "a mask encoding is a polygon or another list; expected COCO's"),
        ("44`0", "a mask encoding is a text; expected COCO's"),
        (None, "a mask encoding is NoneType; expected COCO's"),
    ],
)
def test_forms_of_run_lengths_are_read_or_refused_by_name(
    form: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {"masks": [{"rle": form}], "gt_masks": [{"size": [4, 6], "counts": [4, 4, 16]}]}
    pred = written(tmp_path / "p.jsonl", [text_row(0, "<SEG>", "<SEG>", **known)])
    assert cal_metric.main(["--pred", str(pred), "--samples", "0"]) == (2 if said else 0)  # masks as written
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("\n") == bool(said)
    assert said or "mDice              1.0000" in printed.out


def test_predictions_must_match_the_references(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conversation = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "liver"}]
    records = [{"id": number, "image": "i.png", "conversations": conversation} for number in range(3)]
    references = tmp_path / "data.json"
    references.write_text(json.dumps(records))
    pred = written(tmp_path / "p.jsonl", [text_row(number) for number in range(3)])
    flags = ["--pred", str(pred), "--references", str(references), "--samples", "0"]
    assert cal_metric.main(flags) == 0
    capsys.readouterr()
    written(pred, [text_row(0), text_row(2), text_row(5)])
    assert cal_metric.main(flags) == 2
    printed = capsys.readouterr()
    assert printed.out == ""  # nothing that could be taken for a score
    assert "1 without a prediction (1)" in printed.err
    assert "(5)" in printed.err


def test_wrong_input_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pred = written(tmp_path / "p.jsonl", [text_row(0)])
    torn = tmp_path / "torn.jsonl"
    torn.write_text(pred.read_text() + '{"question_id": 1, "ima')
    bad = tmp_path / "bad.json"
    bad.write_text("[")
    damaged = written(
        tmp_path / "d.jsonl", [text_row(0), {**mask_row(1), "gt_masks": [{"size": [6, 6], "counts": "1"}]}]
    )
    for flags, said in [
        (["--pred", str(tmp_path / "none.jsonl")], "cannot read the predictions"),
        (["--pred", str(written(tmp_path / "empty.jsonl", []))], "holds no predictions"),
        (["--pred", str(torn)], "torn.jsonl, line 2: the last line is torn"),
        (["--pred", str(damaged)], "question 1: the runs of a mask encoding"),
        (["--pred", str(pred), "--candidate_set", str(tmp_path / "none.json")], "cannot read the candidate set"),
        (["--pred", str(pred), "--candidate_set", str(bad)], "is not JSON"),
        (["--pred", str(pred), "--json", str(pred / "x.json")], "p.jsonl"),
    ]:
        assert cal_metric.main([*flags, "--samples", "0"]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


@pytest.mark.parametrize("flag", ["--thresholds=2", "--thresholds=a", "--samples=-1", "--seed=x"])
def test_flags_that_make_no_sense(flag: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        cal_metric.main(["--pred=x", flag])
    assert stopped.value.code == 2


# --- OmniMedVQA -----------------------------------------------------------------------------------------------------


@pytest.fixture
def omni(tmp_path: Path) -> Path:
    """A data set folder with two question files in subfolders: a and b are CT, c is an MR."""
    folder = tmp_path / "OmniMedVQA" / "QA_information" / "Open-access"
    folder.mkdir(parents=True)
    for name, images, modality in (("one", "ab", "CT"), ("two", "c", "MR")):
        entries = [{"image_path": f"Images/{image}.png", "modality_type": modality} for image in images]
        (folder / f"{name}.json").write_text(json.dumps(entries))
    return tmp_path / "OmniMedVQA"


def omni_row(number: int, image: str, text: str) -> dict[str, Any]:
    return text_row(number, "liver", text, image_path=f"/somewhere/OmniMedVQA/Images/{image}.png", answer_type="closed")


def test_accuracy_by_modality(omni: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [omni_row(0, "a", "Liver"), omni_row(1, "b", "lung"), omni_row(2, "a", "the liver"), omni_row(3, "c", "no")]
    pred, out = written(tmp_path / "p.jsonl", rows), tmp_path / "scores.json"
    flags = ["--pred", str(pred), "--root", str(omni), "--json", str(out), "--samples", "0"]
    assert cal_metric_omniMedVQA.main(flags) == 0
    assert "{'CT': 66.67, 'MR': 0.0}\nmean acc 0.3333333333333333\nNone\n" in capsys.readouterr().out
    told = json.loads(out.read_text())
    assert told["standard"]["overall"]["closed_accuracy"]["value"] == 0.5
    assert told["standard"]["mean_over"]["modality"]["closed_accuracy"]["value"] == pytest.approx(1 / 3)


def test_what_omnimedvqa_refuses(omni: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pred = written(tmp_path / "p.jsonl", [omni_row(0, "a", "liver"), omni_row(1, "z", "liver")])
    (tmp_path / "nothing").mkdir()
    for flags, said in [
        (["--pred", str(pred), "--root", str(omni)], "no question file names the image of 1 predictions (/somewhere"),
        (["--pred", str(pred), "--root", str(tmp_path / "nothing")], "holds no question files"),
        (["--pred", str(tmp_path / "none"), "--root", str(omni)], "cannot read the predictions"),
        (["--pred", str(omni / "QA_information/Open-access/one.json"), "--root", str(omni)], "one.json, line 1"),
    ]:
        assert cal_metric_omniMedVQA.main(flags) == 2
        assert said in capsys.readouterr().err
    (omni / "QA_information" / "Open-access" / "one.json").write_text("{}")
    (omni / "QA_information" / "Open-access" / "two.json").write_text('["x"]')
    assert cal_metric_omniMedVQA.main(["--pred", str(pred), "--root", str(omni)]) == 2
    assert "two.json is no question file" in capsys.readouterr().err
