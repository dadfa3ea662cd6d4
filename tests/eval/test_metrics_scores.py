"""Scores of whole runs: conventions, groups, intervals and comparisons, against values worked out by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from model.errors import MedPLIBError
from model.eval.metrics.comparing import compare
from model.eval.metrics.scores import Scores, score_predictions
from model.eval.predictions import Prediction
from model.processing.masks import encode_rle

SIZE = (4, 10)


def rle(*pixels: int) -> dict[str, Any]:
    """A mask of 4×10 whose pixels of these numbers, in reading order, are set."""
    mask = np.zeros(SIZE, dtype=bool)
    mask.reshape(-1)[list(pixels)] = True
    return encode_rle(mask)


def asked(number: int, gt: str, text: str, kind: str = "open", **others: Any) -> Prediction:
    others = {"image_path": f"images/ct_00--S--{number}--0.png", "metadata": {"task": "vqa"}, **others}
    return Prediction(number, prompt="?", gt=gt, text=text, answer_type=kind, **others)


def grounded(
    number: int, wanted: list[dict[str, Any]] | None, painted: list[dict[str, Any]], text: str = "<SEG>", **others: Any
) -> Prediction:
    others = {"image_path": f"images/ct_00--S--{number}--0.png", "metadata": {"task": "grounding"}, **others}
    masks = [{"rle": mask} for mask in painted]
    return Prediction(number, prompt="?", gt="<SEG>", text=text, masks=masks, gt_masks=wanted, **others)


def failed(prediction: Prediction) -> Prediction:
    return replace(prediction, text="", masks=[], finish="error", error="the image is missing")


def values(scores: Scores) -> dict[str, float]:
    return {name: measure.value for name, measure in scores.overall.items()}


def counts(scores: Scores) -> dict[str, int]:
    return {name: measure.count for name, measure in scores.overall.items()}


# --- text -----------------------------------------------------------------------------------------------------------


def test_text_scores() -> None:
    rows = [
        asked(0, "yes", "Yes.", "closed"),
        asked(1, "no", "Yes", "CLOSED"),
        asked(2, "no", "No", "yes/no"),
        asked(3, "left lung", "the left lung"),
        asked(4, "liver and spleen", "spleen"),
    ]
    found = score_predictions(rows)
    assert values(found)["closed_accuracy"] == pytest.approx(2 / 3)
    assert values(found)["open_exact_match"] == 0.5
    assert values(found)["token_recall"] == pytest.approx((1 + 1 / 3) / 2)
    assert values(found)["token_F1"] == pytest.approx((1 + 2 / 4) / 2)
    assert values(found)["ROUGE-L"] == pytest.approx((4 / 5 + 2 / 4) / 2)
    # 4 words said, 3 of them right; 5 wanted
    penalty = math.exp(1 - 5 / 4)
    assert values(found)["BLEU-1"] == pytest.approx(3 / 4 * penalty)
    assert values(found)["BLEU-2"] == pytest.approx(math.sqrt(3 / 4 * 1 / 2) * penalty)
    assert values(found)["BLEU-3"] == 0  # of the one reference with three words, no two were said
    assert counts(found)["closed_accuracy"] == 3
    assert [counts(found)[f"BLEU-{order}"] for order in (1, 2, 3, 4)] == [2, 2, 1, 0]
    assert "mDice" not in found.overall


def test_bleu_is_of_references_that_are_long_enough() -> None:
    """A right answer in two words has no four words in a row, and says nothing about answers that have."""
    short = [asked(0, "left lung", "left lung"), asked(1, "CT", "CT"), asked(2, "liver and spleen", "liver and spleen")]
    found = score_predictions(short)
    assert [values(found)[f"BLEU-{order}"] for order in (1, 2, 3)] == pytest.approx([1, 1, 1])
    assert [counts(found)[f"BLEU-{order}"] for order in (1, 2, 3)] == [3, 2, 1]
    assert math.isnan(values(found)["BLEU-4"])
    assert math.isnan(found.overall["BLEU-4"].low)
    assert found.overall["BLEU-4"].to_dict() == {"value": None, "low": None, "high": None, "count": 0}
    (line,) = (line for line in found.table().splitlines() if line.startswith("BLEU-4"))
    assert line.split()[:3] == ["BLEU-4", "–", "0"]
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["overall"]["BLEU-4"]["value"] is None
    long = asked(3, "a b c d", "a b c d e f g h")  # no penalty for a long answer
    both, alone = score_predictions([*short, long]), score_predictions([long])
    assert values(both)["BLEU-4"] == values(alone)["BLEU-4"] == pytest.approx((4 / 8 * 3 / 7 * 2 / 6 * 1 / 5) ** 0.25)
    assert values(alone)["BLEU-1"] == pytest.approx(4 / 8)
    assert counts(both)["BLEU-4"] == 1
    closed = [asked(0, "Yes", "Yes", "closed"), grounded(1, [rle(0)], [rle(0)])]
    assert not [name for name in score_predictions(closed).overall if name.startswith("BLEU")]


def test_a_row_without_an_answer_is_wrong() -> None:
    rows = [failed(asked(0, "", "")), failed(asked(1, "yes", "Yes", "closed")), asked(2, "liver", "liver")]
    found = score_predictions(rows)
    assert values(found)["open_exact_match"] == 0.5
    assert values(found)["ROUGE-L"] == 0.5
    assert values(found)["closed_accuracy"] == 0
    assert values(found)["error_rate"] == pytest.approx(2 / 3)
    assert found.to_dict()["errors"] == 2


def test_masks_nobody_asked_for() -> None:
    rows = [
        asked(0, "yes", "yes", masks=[{"rle": rle(1)}]),
        asked(1, "yes", "yes", masks=[{"rle": rle()}]),
        asked(2, "yes", "yes"),
    ]
    assert values(score_predictions(rows))["unasked_mask_rate"] == pytest.approx(1 / 3)


# --- masks ----------------------------------------------------------------------------------------------------------


def test_macro_and_micro() -> None:
    # IoU 2/4 and 1/9, Dice 4/6 and 2/10
    rows = [grounded(0, [rle(0, 1, 2)], [rle(1, 2, 3)]), grounded(1, [rle(*range(9))], [rle(0)])]
    found = score_predictions(rows)
    assert "open_exact_match" not in found.overall  # texts of grounding rows are not scored as answers
    assert values(found)["mIoU"] == pytest.approx((2 / 4 + 1 / 9) / 2)
    assert values(found)["mDice"] == pytest.approx((4 / 6 + 2 / 10) / 2)
    assert values(found)["micro_IoU"] == pytest.approx(3 / 13)
    assert values(found)["micro_Dice"] == pytest.approx(6 / 16)
    assert values(found)["gIoU"] == pytest.approx((2 / 4 + 1 / 9) / 2)
    assert values(found)["cIoU"] == pytest.approx(3 / 13)
    assert counts(found)["mDice"] == counts(found)["gIoU"] == 2


def test_masks_are_paired_in_order_and_by_best_matching() -> None:
    left, right = rle(0, 1), rle(8, 9)
    swapped = score_predictions([grounded(0, [left, right], [right, left])])
    assert values(swapped)["mIoU"] == values(swapped)["micro_IoU"] == 0
    assert values(swapped)["mIoU_matched"] == values(swapped)["mDice_matched"] == 1
    assert values(swapped)["gIoU"] == values(swapped)["cIoU"] == 1  # unions of a row do not know an order
    assert counts(swapped)["mIoU"] == 2


def test_missing_and_extra_masks() -> None:
    left, right = rle(0, 1), rle(8, 9)
    found = score_predictions([grounded(0, [left, right], [right])])
    assert values(found)["mIoU"] == 0  # mask 0 is compared with reference 0
    assert values(found)["mIoU_matched"] == 0.5
    assert values(found)["gIoU"] == pytest.approx(2 / 4)
    assert values(found)["extra_mask_rate"] == 0
    found = score_predictions([grounded(0, [left], [left, right])])
    assert values(found)["mIoU"] == values(found)["mIoU_matched"] == 1
    assert values(found)["gIoU"] == pytest.approx(2 / 4)
    assert values(found)["extra_mask_rate"] == 1


def test_absent_targets() -> None:
    rows = [
        grounded(0, [], [], "There is none."),
        grounded(1, [], [rle(0, 1, 2)]),
        grounded(2, [], [rle()]),  # says <SEG>, but paints nothing
        grounded(3, [rle(0)], [rle(0)]),
    ]
    found = score_predictions(rows)
    assert values(found)["false_mask_rate"] == pytest.approx(1 / 3)
    assert values(found)["false_SEG_rate"] == pytest.approx(2 / 3)
    assert values(found)["gIoU"] == pytest.approx(3 / 4)
    assert values(found)["cIoU"] == pytest.approx(1 / 4)
    assert values(found)["mDice"] == 1
    assert counts(found)["mDice"] == counts(found)["SEG_emission_rate"] == 1
    assert counts(found)["false_mask_rate"] == 3


def test_empty_references() -> None:
    only_empty = score_predictions([grounded(0, [rle()], [rle(0)]), grounded(1, [rle()], [])])
    assert values(only_empty)["false_mask_rate"] == 0.5  # an absent target, not a mask to find
    assert "mDice" not in only_empty.overall
    beside = score_predictions([grounded(0, [rle(0), rle()], [rle(0)])])
    assert values(beside)["mDice"] == values(beside)["mIoU"] == values(beside)["mIoU_matched"] == 1
    painted = score_predictions([grounded(0, [rle(0), rle()], [rle(0), rle(5)])])
    assert values(painted)["mDice"] == 0.5


def test_refused_targets_and_errors() -> None:
    rows = [
        grounded(0, [rle(0)], [], "I cannot."),
        grounded(1, [rle(0)], [], "<SEG>"),
        grounded(2, [rle(0)], [rle(0)]),
        failed(grounded(3, [rle(0)], [])),
        failed(grounded(4, [], [])),
        failed(grounded(5, [rle(0), rle()], [])),
    ]
    found = score_predictions(rows)
    assert values(found)["SEG_emission_rate"] == pytest.approx(2 / 5)
    assert values(found)["mDice"] == pytest.approx(1 / 6)  # an error is not an empty mask that agrees
    assert values(found)["gIoU"] == pytest.approx(1 / 6)
    assert "false_mask_rate" not in found.overall
    assert values(found)["error_rate"] == 0.5


def test_grounding_without_reference_masks_is_not_scored() -> None:
    found = score_predictions([grounded(0, None, [rle(1)]), grounded(1, [rle(1)], [rle(1)])])
    assert found.to_dict()["grounding_rows_without_reference_masks"] == 1
    assert counts(found)["mDice"] == counts(found)["gIoU"] == 1


def test_each_threshold_is_a_column_of_its_own() -> None:
    generous, strict = rle(0, 1, 2, 3), rle(0, 1)
    row = grounded(0, [rle(0, 1)], [generous], masks_at={"0.1": [generous], "0.5": [strict]})
    rows = [row, grounded(1, [], [rle(9)], masks_at={"0.1": [rle(9)], "0.5": [rle()]}), grounded(2, [rle(0)], [], "no")]
    found = score_predictions(rows, thresholds=(0.1, 0.5))
    assert values(found)["mIoU@0.1"] == pytest.approx(0.25)
    assert values(found)["mIoU@0.5"] == pytest.approx(0.5)
    assert values(found)["false_mask_rate@0.1"] == 1
    assert values(found)["false_mask_rate@0.5"] == 0
    assert "mIoU" not in found.overall
    assert {at: masks.miou for at, masks in found.published_masks.items()} == {0.1: 0.25, 0.5: 0.5}


def test_masks_that_cannot_be_scored_are_refused() -> None:
    row = grounded(7, [rle(0, 1)], [rle(0)], masks_at={"0.1": [rle(0)]})
    with pytest.raises(MedPLIBError, match=r"question 7: .* at threshold 0.5 \(given: 0.1\)"):
        score_predictions([row], thresholds=(0.1, 0.5))
    for masks_at in ({"x": []}, {"2": []}, {"0.5": 3}, {"0.5": None}, {"0.5": {}}):
        with pytest.raises(MedPLIBError, match="question 7: masks_at holds"):
            score_predictions([replace(row, masks_at=masks_at)], thresholds=(0.5,))
    with pytest.raises(MedPLIBError, match="question 3: masks of one question are 4×10 and 5×5"):
        score_predictions([grounded(3, [rle(0)], [encode_rle(np.ones((5, 5), dtype=bool))])])
    with pytest.raises(MedPLIBError, match=r"question 4: .* damaged"):
        score_predictions([grounded(4, [rle(0)], [{"size": [4, 10], "counts": "1"}])])


def test_distances_in_mm_and_in_pixels_are_kept_apart() -> None:
    # a single pixel, four columns off
    rows = [
        grounded(0, [rle(0)], [rle(4)], spacing_mm=(2.0, 0.5)),
        grounded(1, [rle(0)], [rle(4)]),
        grounded(2, [rle(0)], []),
        grounded(3, [], [rle(4)]),
    ]
    found = score_predictions(rows, surface=True)
    assert values(found)["HD95_mm"] == pytest.approx(2.0)
    assert values(found)["NSD_mm"] == 1
    assert values(found)["HD95_px"] == pytest.approx((4 + math.hypot(*SIZE)) / 2)
    assert values(found)["NSD_px"] == 0
    assert counts(found)["HD95_mm"] == 1
    assert counts(found)["HD95_px"] == 2
    near = score_predictions(rows, surface=True, tolerance_mm=1.9, tolerance_px=4)
    assert (values(near)["NSD_mm"], values(near)["NSD_px"]) == (0, 0.5)


# --- groups and intervals -------------------------------------------------------------------------------------------


def grouped_rows() -> list[Prediction]:
    """Modality mr right in 1 of 4, ct in 3 of 4 — and one more ct whose modality only the file's name tells."""
    rows = []
    for number, right in enumerate((1, 0, 0, 0, 1, 1, 1, 0)):
        modality = "mr" if number < 4 else "ct"
        known = {"task": "vqa", "kind": "presence", "modality": modality, "structure": ["liver", "spleen"]}
        rows.append(
            asked(number, "yes", "yes" if right else "no", "closed", metadata=known, image_path=f"{number}.png")
        )
    return [*rows, asked(8, "yes", "yes", "closed", image_path="a/ct_00--x.png", metadata={"task": "region"})]


def test_groups() -> None:
    found = score_predictions(grouped_rows())
    accuracy = {group: measures["closed_accuracy"] for group, measures in found.by("modality").items()}
    assert {group: measure.value for group, measure in accuracy.items()} == {"ct": 0.8, "mr": 0.25}
    assert {group: measure.count for group, measure in accuracy.items()} == {"ct": 5, "mr": 4}
    assert found.mean_over("modality")["closed_accuracy"].value == pytest.approx((0.8 + 0.25) / 2)
    assert found.mean_over("modality")["closed_accuracy"].count == 2
    assert list(found.by("structure")) == ["(unnamed)", "liver, spleen"]
    assert list(found.by("task")) == ["region", "vqa"]
    assert found.dimensions == ("task", "kind", "modality", "structure")
    with pytest.raises(MedPLIBError, match="choose of task, kind"):
        found.by("colour")


def test_tables_and_json() -> None:
    found = score_predictions([*grouped_rows(), grounded(9, [rle(0)], [rle(0)])])
    shown = {line.split()[0]: line.split()[1] for line in found.table().splitlines()[2:]}
    assert (shown["closed_accuracy"], shown["mDice"]) == ("0.5556", "1.0000")
    lines = found.table("modality").splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["ct", "mr", "mean"]
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told["overall"]["closed_accuracy"]["value"] == pytest.approx(5 / 9)
    assert told["by"]["modality"]["ct"]["closed_accuracy"]["count"] == 5
    assert told["overall"]["mDice"] == {"value": 1, "low": None, "high": None, "count": 1}
    assert told["by"]["kind"].keys() == {"(unnamed)", "presence"}
    assert told["metrics"]["error_rate"]["higher_is_better"] is False
    assert told["published_grounding"]["as written"]["mIoU"] == 1


def coins(seed: int, right: list[bool], images: list[int]) -> Scores:
    rows = [
        asked(index, "yes", "yes" if hit else "no", "closed", image_path=f"{image}.png")
        for index, (hit, image) in enumerate(zip(right, images, strict=True))
    ]
    return score_predictions(rows, seed=seed)


def test_intervals_have_the_width_of_the_binomial() -> None:
    rng = np.random.default_rng(0)
    right = (rng.random(400) < 0.3).tolist()
    measure = coins(0, right, list(range(400))).overall["closed_accuracy"]
    half = 1.96 * math.sqrt(measure.value * (1 - measure.value) / 400)
    assert measure.low == pytest.approx(measure.value - half, abs=0.01)
    assert measure.high == pytest.approx(measure.value + half, abs=0.01)
    assert coins(0, right, list(range(400))).overall["closed_accuracy"] == measure
    assert coins(1, right, list(range(400))).overall["closed_accuracy"] != measure


def test_questions_about_one_image_are_drawn_together() -> None:
    """Ten equal answers on each of 40 images tell no more than one: the interval is that of 40 answers."""
    rng = np.random.default_rng(0)
    right = [bool(hit) for hit in rng.random(40) < 0.5 for _ in range(10)]
    together = coins(0, right, [index // 10 for index in range(400)]).overall["closed_accuracy"]
    apart = coins(0, right, list(range(400))).overall["closed_accuracy"]
    assert (together.high - together.low) / (apart.high - apart.low) == pytest.approx(math.sqrt(10), rel=0.2)


def test_a_mean_over_groups_resamples_each_group_alone() -> None:
    """The variance of a mean of two independent groups is a quarter of the sum of theirs."""
    rows = []
    for number in range(400):
        known = {"modality": "ct" if number % 2 else "mr"}
        hit = "yes" if number % 4 < 2 else "no"
        rows.append(asked(number, "yes", hit, "closed", metadata=known, image_path=f"{number}.png"))
    found = score_predictions(rows, samples=2000)
    widths = [found.by("modality")[name]["closed_accuracy"] for name in ("ct", "mr")]
    mean = found.mean_over("modality")["closed_accuracy"]
    expected = math.hypot(*(measure.high - measure.low for measure in widths)) / 2
    assert mean.high - mean.low == pytest.approx(expected, rel=0.1)


def test_one_image_has_no_interval() -> None:
    rows = [asked(number, "yes", "yes", "closed", image_path="one.png") for number in range(5)]
    measure = score_predictions(rows).overall["closed_accuracy"]
    assert (measure.value, measure.to_dict()["low"]) == (1, None)
    assert math.isnan(score_predictions(grouped_rows(), samples=0).overall["closed_accuracy"].low)
    # neither has the one image with a target among others
    found = score_predictions([grounded(0, [rle(0, 1)], [rle(0)]), grounded(1, [], []), grounded(2, [], [rle(0)])])
    assert math.isnan(found.overall["mDice"].low)
    assert found.overall["gIoU"].low < found.overall["gIoU"].high
    assert math.isnan(compare(found, found).overall["mDice"].p_value)
    assert compare(found, found).overall["gIoU"].p_value == 1


def test_a_question_given_twice_is_refused() -> None:
    row = asked(3, "yes", "yes")
    assert (score_predictions([]).overall, score_predictions([]).to_dict()["rows"]) == ({}, 0)
    with pytest.raises(MedPLIBError, match=r"2 predictions are of .* already: 3 \(row 2\), 3 \(row 3\); give each"):
        score_predictions([row, row, replace(row, text="no")])
    other = replace(row, image_path="other.png")
    assert score_predictions([row, other]).keys == [("3", 0, 0), ("3", 0, 1)]
    assert score_predictions([row, replace(row, metadata={"turn": 1})]).keys[1] == ("3", 1, 0)


def test_published_modality_is_the_records_own() -> None:
    rows = [
        replace(grounded(number, [rle(0)], [rle(0)]), image_path=name, metadata={"task": "grounding", **known})
        for number, (name, known) in enumerate(
            [
                ("liver_001.png", {"modality": "ct"}),
                ("x_ray_00--S--1.png", {"modality": "x_ray"}),  # as published: up to the first _
                ("mr_00--S--2.png", {}),
                ("ct_00--S--3.png", {"modality": "mr"}),
                ("", {"modality": "pet"}),
            ]
        )
    ]
    found = score_predictions(rows, samples=0)
    assert list(found.published_masks[None].by_modality()) == ["ct", "x", "mr", "pet"]
    assert list(found.by("modality")) == ["ct", "mr", "pet", "x_ray"]


# --- comparing ------------------------------------------------------------------------------------------------------


def answers(hits: list[bool], images: list[int] | None = None) -> Scores:
    rows = [
        asked(n, "yes", "yes" if hit else "no", "closed", image_path=f"{image}.png", metadata={"kind": "ab"[n % 2]})
        for n, (hit, image) in enumerate(zip(hits, images or range(len(hits)), strict=True))
    ]
    return score_predictions(rows)


def test_a_run_equals_itself_whatever_the_order_of_its_rows() -> None:
    rows = [asked(number, "yes", "yes" if number < 3 else "no", "closed") for number in range(5)]
    found = compare(score_predictions(rows), score_predictions(rows[::-1])).overall["closed_accuracy"]
    assert (found.difference, found.low, found.high, found.p_value) == (0, 0, 0, 1)


def test_pairing_sees_a_small_steady_gain() -> None:
    """20 of 200 answers get better and none worse: far apart from chance, though the two intervals overlap."""
    rng = np.random.default_rng(0)
    before = rng.random(200) < 0.5
    after = before.copy()
    after[np.flatnonzero(~before)[:20]] = True
    found = compare(answers(before.tolist()), answers(after.tolist())).overall["closed_accuracy"]
    assert found.difference == pytest.approx(0.1)
    assert 0.05 < found.low < 0.1 < found.high < 0.15
    assert found.p_value == pytest.approx(1 / 2001)


def test_p_value_of_an_exact_case() -> None:
    """Six images, each better: of the 64 ways to exchange them two are as extreme."""
    found = compare(answers([False] * 6), answers([True] * 6), permutations=20_000).overall["closed_accuracy"]
    assert found.p_value == pytest.approx(2 / 64, abs=0.004)
    pairs = [0, 0, 1, 1, 2, 2]  # three images with two questions each: two of 8
    found = compare(answers([False] * 6, pairs), answers([True] * 6, pairs), permutations=20_000).overall[
        "closed_accuracy"
    ]
    assert found.p_value == pytest.approx(2 / 8, abs=0.01)


def test_p_values_of_runs_that_differ_by_chance_are_even() -> None:
    rng = np.random.default_rng(1)
    found = [
        compare(*(answers((rng.random(60) < 0.5).tolist()) for _ in range(2)), permutations=200)
        .overall["closed_accuracy"]
        .p_value
        for _ in range(60)
    ]
    assert 0.35 < np.mean(found) < 0.7
    assert np.mean(np.array(found) < 0.05) < 0.15


def test_groups_of_a_comparison_and_its_table() -> None:
    comparison = compare(answers([True, False] * 5), answers([True, True] * 5))
    assert comparison.by("kind")["a"]["closed_accuracy"].difference == 0
    assert comparison.by("kind")["b"]["closed_accuracy"].difference == 1
    assert "+0.5000" in comparison.table()
    assert "b" in comparison.table("kind")
    told = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert told["by"]["kind"]["b"]["closed_accuracy"]["difference"] == 1


def test_runs_are_compared_at_shared_thresholds() -> None:
    row = grounded(0, [rle(0, 1)], [rle(0)], masks_at={"0.1": [rle(0)], "0.5": [rle(0)]})
    rows = [row, replace(row, question_id=1, image_path="other.png")]
    both, one = (score_predictions(rows, thresholds=at) for at in ((0.1, 0.5), (0.5,)))
    assert "mIoU@0.5" in compare(both, one).overall
    assert "mIoU@0.1" not in compare(both, one).overall
    with pytest.raises(MedPLIBError, match="different thresholds"):
        compare(one, score_predictions(rows))


def test_runs_over_different_questions_or_references_are_refused() -> None:
    rows = [asked(number, "yes", "yes") for number in range(8)]
    with pytest.raises(MedPLIBError, match=r"6 only in the first \(2, 3, 4, 5, 6, …\); 1 only in the second \(9\)"):
        compare(score_predictions(rows), score_predictions([*rows[:2], asked(9, "yes", "yes")]))
    changed = [*rows[:3], asked(3, "no", "yes"), *rows[4:]]
    with pytest.raises(MedPLIBError, match=r"different reference answers for 1 questions \(3\)"):
        compare(score_predictions(rows), score_predictions(changed))
    with pytest.raises(MedPLIBError, match="without predictions"):
        compare(score_predictions([]), score_predictions([]))
    masks = [score_predictions([grounded(0, [rle(pixel)], [])]) for pixel in (0, 1)]
    with pytest.raises(MedPLIBError, match="different reference answers"):
        compare(*masks)
