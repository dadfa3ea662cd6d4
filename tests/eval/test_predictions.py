"""Prediction rows survive the disk, torn files resume, and what does not match is named."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from model.errors import MedPLIBError
from model.eval.metrics.scores import score_predictions
from model.eval.predictions import Prediction, PredictionWriter, json_text, match_references, read_predictions

PUBLISHED = {
    "question_id": 3,
    "image_path": "images/ct.png",
    "prompt": "What is it?",
    "gt": "CT",
    "text": "MR",
    "answer_id": "abc",
    "model_id": "nano",
    "answer_type": "open",
    "metadata": {},
}


def prediction(number: int, **values: object) -> Prediction:
    return Prediction(
        **{"question_id": f"q{number}", "image_path": "a.png", "prompt": "?", "gt": "é", "text": "ü", **values}
    )  # type: ignore[arg-type]


def record(number: int, *pairs: tuple[str, str]) -> dict[str, object]:
    turns = [{"from": who, "value": text} for pair in pairs for who, text in zip(("human", "gpt"), pair, strict=True)]
    return {"id": f"q{number}", "image": "a.png", "conversations": turns}


def write(path: Path, predictions: list[Prediction], **options: object) -> None:
    with PredictionWriter(path, **options) as writer:  # type: ignore[arg-type]
        for item in predictions:
            writer.write(item)


def test_published_rows_keep_their_keys_first():
    read = Prediction.from_row(PUBLISHED)
    assert (read.masks, read.gt_masks, read.finish, read.error, read.key) == ([], None, "end", None, ("3", 0))
    assert list(read.to_row())[:9] == list(PUBLISHED)
    assert {name: read.to_row()[name] for name in PUBLISHED} == PUBLISHED


def test_rows_survive_the_disk(tmp_path: Path):
    rle = {"size": [2, 2], "counts": "04"}
    rows = [
        prediction(
            0, masks=[{"label": "liver", "rle": rle}], gt_masks=[rle], spacing_mm=(0.5, 0.7), metadata={"turn": 2}
        ),
        prediction(1, finish="error", error="no such image", masks_at={"0.1": [rle]}, router=[[0.25, 0.75]]),
        prediction(2, text="line\u2028end \ud800 “quoted”"),
    ]
    write(tmp_path / "new" / "rows.jsonl", rows)
    assert list(read_predictions(tmp_path / "new" / "rows.jsonl")) == rows
    assert rows[0].key == ("q0", 2)
    assert rows[1].failed
    assert not rows[0].failed


def test_a_file_that_is_there_is_not_appended_to(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    write(path, [prediction(0)])
    with pytest.raises(MedPLIBError, match="is there already"):
        PredictionWriter(path)
    write(path, [prediction(5)], existing="overwrite")
    assert [row.question_id for row in read_predictions(path)] == ["q5"]


def test_a_file_has_one_writer(tmp_path: Path):
    with PredictionWriter(tmp_path / "rows.jsonl") as writer:
        writer.write(prediction(0))
        with pytest.raises(MedPLIBError, match="another process is writing"):
            PredictionWriter(tmp_path / "rows.jsonl", "overwrite")
    assert len(list(read_predictions(tmp_path / "rows.jsonl"))) == 1


@pytest.mark.parametrize("torn", [b'{"question_id": "q2", "te', b'{"complete": "but without its end"}', b"x" * 200_000])
def test_a_torn_last_line_is_cut(tmp_path: Path, torn: bytes):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(torn)  # of nothing else, it becomes empty
    with PredictionWriter(path, "resume") as writer:
        assert (writer.rows, path.read_bytes()) == (0, b"")
    write(path, [prediction(0), prediction(1)], existing="overwrite")
    path.write_bytes(path.read_bytes() + torn)
    with PredictionWriter(path, "resume") as writer:
        assert writer.rows == 2
        writer.write(prediction(2))
        assert writer.rows == 3
    assert [row.question_id for row in read_predictions(path)] == ["q0", "q1", "q2"]


def test_numbers_that_are_not_finite_are_null_with_their_names(tmp_path: Path):
    rle = {"size": [2, 2], "counts": "04"}
    lost = prediction(0, masks=[{"rle": rle, "score": math.nan}], timing={"total": math.inf}, router=[[math.nan, 1]])
    write(tmp_path / "rows.jsonl", [lost])
    assert "NaN" not in (tmp_path / "rows.jsonl").read_text()
    (read,) = read_predictions(tmp_path / "rows.jsonl")
    assert (read.masks[0]["score"], read.timing["total"], read.router) == (None, None, None)
    assert read.metadata["not_finite"] == ["masks.0.score", "timing.total", "router.0.0"]


def test_json_has_no_numbers_that_are_not_finite():
    text = json_text({"sets": [{"value": math.nan, "low": 0.5}], "high": -math.inf})
    assert json.loads(text) == {
        "sets": [{"value": None, "low": 0.5}],
        "high": None,
        "not_finite": ["sets.0.value", "high"],
    }


def test_run_lengths_may_lie_in_an_object_or_alone():
    rle = {"size": [2, 2], "counts": "04"}
    read = Prediction.from_row({**PUBLISHED, "masks": [rle, {"rle": rle}], "gt_masks": [rle, {"rle": rle}]})
    assert [mask["rle"] for mask in read.masks] == read.gt_masks == [rle, rle]


def test_a_row_need_not_say_what_was_asked(tmp_path: Path):
    """As the published evaluation of OmniMedVQA writes them."""
    path = tmp_path / "rows.jsonl"
    bare = [
        {name: value for name, value in {**PUBLISHED, "question_id": n}.items() if name != "prompt"} for n in (0, 1)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in bare))
    assert [row.prompt for row in read_predictions(path)] == ["", ""]
    assert score_predictions(read_predictions(path), samples=0).overall["error_rate"].count == 2
    path.write_text(json.dumps({**PUBLISHED, "prompt": None}))
    with pytest.raises(MedPLIBError, match="prompt is None, expected text"):
        list(read_predictions(path))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{broken}", "line 2: not valid JSON"),
        ("[1]", "expected an object|is an object"),
        (json.dumps({"question_id": 1}), "has no gt, text"),
        (json.dumps({**PUBLISHED, "text": 5}), "text is 5, expected text"),
        (json.dumps({**PUBLISHED, "question_id": True}), "question_id is True"),
        (json.dumps({**PUBLISHED, "finish": "bored"}), "finish is 'bored'"),
        (json.dumps({**PUBLISHED, "spacing_mm": [0, 1]}), "spacing_mm is"),
        (json.dumps({**PUBLISHED, "spacing_mm": [1, math.inf]}), "spacing_mm is"),
        (json.dumps({**PUBLISHED, "spacing_mm": "11"}), "spacing_mm is"),
        (json.dumps({**PUBLISHED, "masks": ["x"]}), "masks holds 'x'"),
        (json.dumps({**PUBLISHED, "masks": [{"label": "liver"}]}), "masks holds .*expected COCO's run lengths"),
        (json.dumps({**PUBLISHED, "gt_masks": [[[1, 2, 3, 4, 5, 6]]]}), "gt_masks holds a polygon"),
        (json.dumps({**PUBLISHED, "router": [1]}), "router is"),
        (json.dumps({**PUBLISHED, "image_path": None}), "image_path is None, expected text"),
        (json.dumps({**PUBLISHED, "metadata": {"turn": "one"}}), "the turn is 'one'"),
        (json.dumps({**PUBLISHED, "metadata": {"turn": -1}}), "the turn is -1"),
    ],
)
def test_a_malformed_row_is_named_with_its_line(tmp_path: Path, line: str, told: str):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(PUBLISHED) + "\n" + line + "\n")
    rows = read_predictions(path)
    next(rows)
    with pytest.raises(MedPLIBError, match=told) as caught:
        next(rows)
    assert "line 2" in str(caught.value)


def test_a_torn_file_says_how_to_finish_it(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question_id": ')
    with pytest.raises(MedPLIBError, match="torn; run vqa_infer again"):
        list(read_predictions(path))
    with pytest.raises(MedPLIBError, match="cannot read the predictions"):
        list(read_predictions(tmp_path / "absent.jsonl"))


RECORDS = [record(0, ("<image>\nWhat?", "CT")), record(1, ("One?", "1"), ("Two?", "<SEG><mask>m.png</mask>"))]
ANSWERED = [
    prediction(0, gt="CT"),
    prediction(1, gt="1", metadata={"turn": 0}),
    prediction(1, gt="<SEG>", metadata={"turn": 1}),
]


def test_predictions_meet_their_questions_in_any_order(caplog: pytest.LogCaptureFixture):
    for order, warning in (([0, 1, 2], ""), ([2, 0, 1], "3 predictions stand in another order than the data file")):
        caplog.clear()
        pairs = list(match_references([ANSWERED[place] for place in order], RECORDS))
        assert {(p.key, r.key, p.gt) for p, r in pairs} == {(a.key, a.key, a.gt) for a in ANSWERED}
        assert warning in caplog.text and bool(warning) == bool(caplog.text)
    assert next(match_references(ANSWERED, RECORDS))[1].prompt == "What?"
    assert len(list(match_references(ANSWERED[:2], RECORDS, turns="first"))) == 2
    bare = [{name: value for name, value in record.items() if name != "id"} for record in RECORDS[:1]]
    assert len(list(match_references([prediction(0, question_id=0, gt="CT")], bare))) == 1  # by number


@pytest.mark.parametrize(
    ("predictions", "told"),
    [
        (ANSWERED[:2], r"1 without a prediction \(q1 turn 1\)"),
        ([*ANSWERED, ANSWERED[0]], r"1 predicted but not asked, or twice \(q0\)"),
        ([*ANSWERED, prediction(9)], r"1 predicted but not asked, or twice \(q9\)"),
        (
            [prediction(0, gt="MR"), *ANSWERED[1:]],
            r"1 with another reference answer \(q0 has 'MR', the data file 'CT'\)",
        ),
        ([], r"3 without a prediction \(q0, q1, q1 turn 1\)"),
    ],
)
def test_what_does_not_match_one_to_one_is_refused(predictions: list[Prediction], told: str):
    with pytest.raises(MedPLIBError, match=told):
        list(match_references(predictions, RECORDS))


def test_only_the_first_mismatches_are_named():
    with pytest.raises(MedPLIBError, match=r"20 predicted but not asked, or twice \(q0, q1, q2, q3, q4, …\)"):
        list(match_references([prediction(number) for number in range(20)], []))
