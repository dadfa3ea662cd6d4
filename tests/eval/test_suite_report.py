"""The page of a suite's results: whole by itself, true to the scores, harmless whatever a model says, bounded."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from model.eval.pages import LONGEST_TEXT, calibration, element, histogram, interval, number, quoted
from model.eval.predictions import Prediction
from model.eval.report import (
    HTML_FILE,
    JSON_FILE,
    MOST_BYTES,
    MOST_MEGABYTES,
    MOST_PICTURES,
    SCORES_FILE,
    Pictures,
    data_uri,
    write_csv,
    write_report,
)
from model.eval.results import ROW_COLUMNS, FailureCounter, RowScore, SetResult, SuiteResult, measure
from model.eval.suite import DataSet, Known
from model.visualize import PALETTE, outlined
from tests.eval.drawn import SIDE, Outline, painted, row, rows, save


def data_set(folder: Path, **changes: Any) -> DataSet:
    told = {"split": "test", "licence": "none", "source": "drawn", "version": "1", "obtain": "draw it"}
    records = (folder / "questions.jsonl",)
    headlines = ("closed_accuracy", "open_exact_match", "mDice@0.5", "false_mask_rate@0.5")
    plain = {"name": "drawn", "records": records, "images": folder, "task": "mixed", "headlines": headlines}
    return DataSet(**{**plain, **told, "title": "Drawn <set>", "thresholds": (0.5, 0.1), "surface": True, **changes})


def measured(folder: Path, answers: Iterable[Prediction], **changes: Any) -> tuple[SetResult, list[list[object]]]:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for index in range(6):
        pixels = np.full((SIDE, SIDE, 3), 40 + 30 * index, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
    answers = list(answers)
    with (folder / "questions.jsonl").open("w") as stream:
        for answer in answers:
            turns = [{"from": "human", "value": f"<image>\n{answer.prompt}"}, {"from": "gpt", "value": answer.gt}]
            record = {"id": answer.question_id, "image": answer.image_path, "conversations": turns}
            stream.write(json.dumps(record) + "\n")
    item = data_set(folder, **changes)
    part, lines = measure(
        item, save(folder / "answers.jsonl", answers), folder / "questions.jsonl", folder, samples=200
    )
    return part, list(lines)


def report(folder: Path, *parts: SetResult) -> str:
    facts = {"Model": "assets/nano", "Empty": ""}
    write_report(SuiteResult("Suite <1>", "About it.", "nano", facts, parts, "medplib eval nano drawn"), folder)
    return (folder / HTML_FILE).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, SetResult, Path]:
    folder = tmp_path_factory.mktemp("report")
    part, _ = measured(folder, rows())
    return report(folder, part), part, folder


def test_the_page_is_well_formed_and_needs_nothing_else(made: tuple[str, SetResult, Path]):
    page = Outline(made[0])
    assert not page.open
    assert made[0].startswith("<!doctype html>")
    addresses = [value for _, known in page.tags for name, value in known.items() if name in ("src", "href")]
    assert addresses
    assert all(str(address).startswith(("data:image/jpeg;base64,", "#")) for address in addresses)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert not [name for _, known in page.tags for name in known if name.startswith("on")]
    places = {known["id"] for _, known in page.tags if "id" in known}
    assert {str(known["href"])[1:] for tag, known in page.tags if tag == "a"} <= places
    style = re.search(r"<style>(.*?)</style>", made[0], re.DOTALL)
    assert style is not None
    assert not re.search(r"url\(|@import|https?:", style[1])


def test_what_a_model_says_is_only_text(made: tuple[str, SetResult, Path]):
    text = Outline(made[0]).text
    assert '</dd><script>alert(1)</script><img src=x onerror="alert(2)">⟨U+202E⟩dessert⟨U+0000⟩' in text
    assert "\u202e" not in made[0]
    assert "\x00" not in made[0]
    assert "the image is <gone>" in text
    assert "Drawn <set>" in text


def test_numbers_of_the_page_are_those_of_the_scores(made: tuple[str, SetResult, Path]):
    text, scores = Outline(made[0]).text, made[1].scores
    closed = scores.overall["closed_accuracy"]
    assert closed.value == pytest.approx(4 / 7)
    assert f"Closed accuracy 0.571 {interval(closed.low, closed.high)} 7" in text
    dice = [2 * (20 - shift) / 40 for shift in range(8)] + [0.0]
    assert f"mDice at 0.5 {np.mean(dice):.3f}" in text
    assert "False mask rate at 0.5 lower is better 0.500" in text
    assert "1 question could not be asked, and is counted as wrong." in text
    assert "Phantoms" not in text


def test_what_is_not_there_is_a_dash_and_not_a_nought(tmp_path: Path):
    first, *others = rows()
    alone = replace(first, metadata={**first.metadata, "modality": "pet"})  # of it only a closed question was asked
    part, _ = measured(tmp_path, [alone, *others], always_mask=True)
    page = report(tmp_path, part)
    text = Outline(page).text
    assert page.count('<span class="absent">–</span>') == 3
    assert "BLEU-4 – – 0" in text
    assert "Masks decoded for every request, said or not" in text
    assert "NaN" not in text


def test_failures_are_counted_by_kind(made: tuple[str, SetResult, Path]):
    found = {item.name: (item.count, item.asked) for item in made[1].failures}
    assert found == {
        "errors": (1, 22),
        "wrong_closed": (2, 6),
        "unrelated_open": (2, 4),
        "refused": (1, 9),
        "far_off": (0, 8),
        "false_masks": (1, 2),
        "empty": (1, 21),
        "cut_off": (0, 21),
    }
    text = Outline(made[0]).text
    assert "Wrong closed answers 2 of 6, 33.3 %" in text
    assert "no masks that lie elsewhere (of 8)" in text


def test_router_shares_are_means_by_task(made: tuple[str, SetResult, Path]):
    assert list(made[1].router) == ["vqa"]
    assert made[1].router["vqa"] == pytest.approx(np.full((2, 2), 0.5))
    assert "expert 0 50.0 %, expert 1 50.0 %" in made[0]


def test_files_for_machines_hold_the_same(made: tuple[str, SetResult, Path]):
    told = json.loads((made[2] / JSON_FILE).read_text())["sets"][0]
    assert told["scores"]["overall"]["closed_accuracy"]["value"] == pytest.approx(4 / 7)
    assert (told["scores"]["rows"], told["scores"]["errors"], told["failures"]["refused"]["count"]) == (22, 1, 1)
    assert told["licence"] == "none"
    with (made[2] / SCORES_FILE).open(newline="") as stream:
        lines = {(line["by"], line["group"], line["metric"]): line for line in csv.DictReader(stream)}
    scores = made[1].scores
    for (by, group, metric), line in lines.items():
        measure_ = scores.by(by)[group][metric] if by else scores.overall[metric]
        assert float(line["value"] or "nan") == pytest.approx(measure_.value, abs=1e-6, nan_ok=True)
        assert int(line["count"]) == measure_.count
    assert ("modality", "ct", "mDice@0.5") in lines
    assert (lines["", "", "BLEU-4"]["value"], lines["", "", "BLEU-4"]["count"]) == ("", "0")  # no reference is so long


def test_rows_have_a_line_each(tmp_path: Path):
    answers = rows()
    answers[0] = replace(answers[0], question_id="=cmd|")  # what a spreadsheet would run
    _, lines = measured(tmp_path, answers)
    write_csv(tmp_path / "rows.csv", list(ROW_COLUMNS), lines)
    with (tmp_path / "rows.csv").open(newline="") as stream:
        found = list(csv.DictReader(stream))
    assert (len(found), found[0]["question_id"]) == (22, "'=cmd|")
    assert [line["closed_right"] for line in found[:6]] == ["1.0000"] * 4 + ["0.0000"] * 2
    assert (found[11]["dice"], found[11]["predicted_iou"], found[18]["dice"]) == ("0.9500", "0.9000", "0.0000")
    assert (found[21]["finish"], found[19]["reference_masks"], found[0]["reference_masks"]) == ("error", "0", "")


def test_best_middle_and_worst_are_pictured_once_an_image(made: tuple[str, SetResult, Path], tmp_path: Path):
    few = made[1].pictured
    assert list(few) == ["best"]  # eight painted answers are too few to tell best from worst
    assert [place for place, _, _ in few["best"]] == list(range(10, 18))
    many = [replace(painted(n, 10 + n % 20), image_path=f"images/{n // 4}.png") for n in range(20)]
    pictured = measured(tmp_path, many)[0].pictured
    assert list(pictured) == ["best", "middle", "worst"]
    for shown in pictured.values():
        assert len({item.image_path for _, item, _ in shown}) == len(shown) == 4
    assert pictured["best"][0][2].dice == 1.0
    assert pictured["worst"][-1][2].dice == pytest.approx(0.05)


def test_a_set_without_masks_or_without_answers_still_has_a_page(tmp_path: Path):
    text = Outline(report(tmp_path, measured(tmp_path, rows()[:6])[0])).text
    assert "Masks on images" not in text
    failed = [row(n, gt="Yes", text="", finish="error", error="gone", answer_type="closed") for n in range(3)]
    text = Outline(report(tmp_path / "none", measured(tmp_path, failed)[0])).text
    assert "3 questions could not be asked" in text
    assert "Closed accuracy 0.000" in text


def test_blind_and_known_scores_stand_beside_ours(tmp_path: Path):
    part, _ = measured(tmp_path, rows(), known=(Known("mDice@0.5", 0.442, "paper"),))
    part.blind = {("", "", "closed_accuracy"): 0.5}
    text = Outline(report(tmp_path, part)).text
    assert "0.442 paper" in text and "Blind" in text
    assert '"value": 0.5' in (tmp_path / JSON_FILE).read_text()


def test_size_is_bounded(tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 255, (384, 384, 3), dtype=np.uint8)
    assert len(data_uri(noise)) <= 4 / 3 * MOST_BYTES + 100
    long = [replace(item, text="word " * 50_000, prompt="why " * 50_000) for item in rows()]
    part, _ = measured(tmp_path, long)
    for index in range(6):
        Image.fromarray(np.roll(noise, index, axis=0)).save(tmp_path / "images" / f"{index}.png")
    parts = [replace(part, item=replace(part.item, name=f"set{n}")) for n in range(20)]
    page = report(tmp_path, *parts)
    pictures = re.findall(r'src="(data:[^"]*)"', page)
    assert 20 <= len(pictures) <= MOST_PICTURES
    assert sum(map(len, pictures)) <= MOST_MEGABYTES * 1e6
    assert len(page) - sum(map(len, pictures)) < len(parts) * 300_000
    assert "more pictures were left out" in page


def test_pictures_stop_at_their_number(tmp_path: Path):
    measured(tmp_path, rows()[:1])
    pictures = Pictures(tmp_path, most=2)
    assert [pictures.of(painted(n, 10)) is not None for n in range(4)] == [True, True, False, False]
    assert (pictures.made, pictures.left_out) == (2, 2)
    assert Pictures(tmp_path).of(replace(painted(0, 10), image_path="images/nowhere.png")) is None


def test_outlines_lie_where_the_masks_are():
    inside = np.zeros((100, 200), dtype=bool)
    inside[30:70, 50:90] = True
    other = np.roll(inside, 60, axis=1)
    pixels = np.zeros((100, 200, 3), dtype=np.uint8)
    drawn = outlined(pixels, [inside], [other], side=400).astype(int)
    assert drawn.shape == (200, 400, 3)
    near = {name: np.abs(drawn - np.array(colour)).sum(-1) < 40 for name, colour in zip("pr", PALETTE, strict=False)}
    assert near["p"][60:140, 96:104].any(axis=1).all()  # a whole line along the left edge
    broken = near["r"][60:140, 216:224].any(axis=1)
    assert broken.any()
    assert not broken.all()
    assert not near["r"][:, :200].any()
    tint = drawn[100, 140]
    assert 0 < tint.sum() < sum(PALETTE[0])
    damaged = outlined(pixels, [np.ones((3, 3), dtype=bool)])
    assert not damaged.any()  # a mask of another size is not drawn


def test_calibration_error_is_the_mean_gap():
    def error(predicted: list[float], actual: list[float]) -> float:
        return calibration(np.array(predicted), np.array(actual))[1]

    assert error([0.25, 0.25, 0.95, 0.95], [0.5, 0.0, 0.75, 0.75]) == pytest.approx(0.1)
    assert error([0.8] * 4, [0.8] * 4) == pytest.approx(0)
    assert np.isnan(error([], []))
    assert calibration(np.array([0.25, 0.95]), np.array([0.5, 0.75]))[0].count("<circle") == 2


def test_histogram_has_a_bar_for_each_step_that_occurs():
    chart = histogram([0.0, 0.02, 0.5, 1.0, float("nan")], "Dice")
    assert re.findall(r"<title>([^<]*)</title>", chart) == ["0.00 to 0.05: 2", "0.50 to 0.55: 1", "0.95 to 1.00: 1"]
    assert "median 0.26" in chart
    assert "over 0 answers" in histogram([], "Dice")


def test_failures_keep_a_fair_and_repeatable_draw():
    def drawn() -> list[int]:
        counter = FailureCounter(examples=4)
        for place in range(1000):
            counter.add(place, row(place, gt="Yes", text="No", answer_type="closed"), RowScore(right=False))
        (found,) = [item for item in counter.found() if item.name == "wrong_closed"]
        assert (found.count, found.asked) == (1000, 1000)
        return [place for place, _, _ in found.examples]

    assert drawn() == drawn() == sorted(drawn())
    assert max(drawn()) > 100  # not merely the first ones


def test_small_pieces_of_a_page():
    assert element("p", "a<b", None, "", class_="x", hidden=True, title=None) == '<p class="x" hidden>a&lt;b</p>'
    assert (number(-0.5), number(float("nan")), number(-0.0001), number(0.25, signed=True)) == (
        "−0.500",
        "–",
        "0.000",
        "+0.250",
    )
    assert interval(float("nan"), 1.0) == "–"
    assert "nothing" in quoted(" \n ")
    assert f"{10} more characters" in quoted("a" * (LONGEST_TEXT + 10))
