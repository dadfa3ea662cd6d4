"""The presence classifier: it separates what can be separated, is calibrated, keeps its rate, and refuses bad data."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from model import MedPLIBError
from model.checkpoint import load
from model.cli import main as medplib
from model.inference.calibrate_presence import collect_rows, main
from model.inference.predictor import Predictor
from model.inference.presence import FEATURES, PRESENCE_FILE, PresenceClassifier, mask_features
from model.visualize import mask_line
from tests.tiny import tiny_checkpoint

SAMPLE = Path(__file__).resolve().parents[2] / "data" / "sample"
NANO = Path(__file__).resolve().parents[2] / "assets" / "medplib-nano"
WIDTH = len(FEATURES)


def overlapping(rows: int, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.float64]]:
    """Features, truth, and the true probability of presence that the truth was drawn with."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(rows, WIDTH)) * [0.2, 5, 0.1, 0.3] + [0.7, 10, 0.9, 0.2]
    odds = (features - [0.7, 10, 0.9, 0.2]) / [0.2, 5, 0.1, 0.3] @ [2.0, 0.0, 1.0, -0.5] + 0.5
    probability = 1 / (1 + np.exp(-odds))
    return features, rng.random(rows) < probability, probability


def test_probabilities_are_those_that_the_data_was_drawn_with() -> None:
    features, present, probability = overlapping(20000)
    fitted = PresenceClassifier.fit(features, present)
    assert np.abs(fitted.probability(features) - probability).max() < 0.05
    assert fitted.report.brier == pytest.approx((probability * (1 - probability)).mean(), abs=0.01)


def test_the_false_mask_rate_holds_on_new_data_at_the_least_loss() -> None:
    features, present, _ = overlapping(4000)
    fresh, truth, _ = overlapping(20000, seed=1)
    losses = []
    for rate in (0.02, 0.05, 0.2):
        fitted = PresenceClassifier.fit(features, present, false_mask_rate=rate)
        kept = fitted.probability(fresh) >= fitted.threshold
        assert kept[~truth].mean() == pytest.approx(rate, abs=0.01 + rate / 10)
        assert fitted.report.lost_masks == pytest.approx((~kept[truth]).mean(), abs=0.03)
        assert fitted.report.false_mask_bound <= rate
        losses.append(fitted.report.lost_masks)
    assert losses[0] > losses[1] > losses[2]


def test_a_rate_of_lost_masks_may_set_the_threshold() -> None:
    features, present, _ = overlapping(4000)
    fresh, truth, _ = overlapping(20000, seed=1)
    fitted = PresenceClassifier.fit(features, present, lost_mask_rate=0.03)
    kept = fitted.probability(fresh) >= fitted.threshold
    assert (~kept[truth]).mean() == pytest.approx(0.03, abs=0.01)
    assert fitted.report.lost_masks == pytest.approx(0.03, abs=0.001)
    assert kept[~truth].mean() == pytest.approx(fitted.report.false_mask_bound, abs=0.03)
    with pytest.raises(MedPLIBError, match=r"lost_mask_rate is 1\.5"):
        PresenceClassifier.fit(features, present, lost_mask_rate=1.5)


def test_separable_data_gives_finite_coefficients_and_loses_nothing() -> None:
    rng = np.random.default_rng(0)
    present = np.arange(100) % 2 == 0
    features = np.where(present[:, None], 1.0, -1.0) * rng.uniform(0.5, 1, (100, WIDTH))
    fitted = PresenceClassifier.fit(features, present)
    assert np.isfinite(fitted.coefficients).all()
    assert ((fitted.probability(features) >= fitted.threshold) == present).all()
    assert fitted.report.auroc == 1
    assert fitted.report.lost_masks == 0


def test_a_feature_that_never_changes_does_no_harm() -> None:
    features, present, _ = overlapping(500)
    features[:, 1] = 3.0
    fitted = PresenceClassifier.fit(features, present)
    assert fitted.coefficients[1] == pytest.approx(0)
    assert fitted.report.auroc > 0.75


def test_rows_of_an_image_are_not_scored_with_each_others_help() -> None:
    """Pure noise, each row four times over: without groups its copies would give the answer away."""
    rng = np.random.default_rng(3)
    features = np.repeat(rng.normal(size=(12, WIDTH)), 4, axis=0)
    present = np.repeat(np.arange(12) % 2 == 0, 4)
    alone = PresenceClassifier.fit(features, present, penalty=1e-3).report
    grouped = PresenceClassifier.fit(features, present, penalty=1e-3, groups=[row // 4 for row in range(48)]).report
    assert grouped.cross_validated
    assert grouped.auroc < alone.auroc - 0.05


def test_too_few_absent_targets_promise_less_and_say_so() -> None:
    features, present, _ = overlapping(400)
    few = np.flatnonzero(~present)[:6]
    rows = np.concatenate([np.flatnonzero(present), few])
    fitted = PresenceClassifier.fit(features[rows], present[rows], false_mask_rate=0.05)
    assert fitted.report.false_mask_bound == pytest.approx(1 / 7)
    assert fitted.report.false_masks == 0


def test_two_masks_are_enough_to_fit_but_not_to_hold_any_out() -> None:
    fitted = PresenceClassifier.fit([[0.9, 9, 0.9, 0.3], [0.2, -1, 0.3, 0.0]], [True, False])
    assert not fitted.report.cross_validated
    present, absent = fitted.probability([[0.9, 9, 0.9, 0.3], [0.2, -1, 0.3, 0.0]])
    assert present >= fitted.threshold > absent


@pytest.mark.parametrize(
    ("features", "present", "options", "says"),
    [
        (np.zeros((0, WIDTH)), [], {}, "no masks"),
        (np.zeros((3, WIDTH)), [True] * 3, {}, "all 3 masks are of present targets"),
        (np.zeros((3, WIDTH)), [False] * 3, {}, "all 3 masks are of absent targets"),
        (np.zeros((3, WIDTH)), [True, False], {}, "3 rows of features for 2 masks"),
        (np.zeros((2, WIDTH + 1)), [True, False], {}, "shape"),
        (np.full((2, WIDTH), np.nan), [True, False], {}, "not finite"),
        (np.zeros((2, WIDTH)), [True, False], {"false_mask_rate": 0.0}, "false_mask_rate"),
        (np.zeros((2, WIDTH)), [True, False], {"penalty": 0.0}, "penalty"),
        (np.zeros((2, WIDTH)), [True, False], {"groups": ["a"]}, "groups"),
    ],
)
def test_data_it_cannot_learn_from_is_refused(features: object, present: list[bool], options: dict, says: str) -> None:
    with pytest.raises(MedPLIBError, match=says):
        PresenceClassifier.fit(features, present, **options)  # type: ignore[arg-type]


def test_a_classifier_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    features, present, _ = overlapping(300)
    fitted = PresenceClassifier.fit(features, present)
    assert fitted.save(tmp_path) == tmp_path / PRESENCE_FILE
    for path in (tmp_path, tmp_path / PRESENCE_FILE):
        again = PresenceClassifier.load(path)
        assert (again.probability(features) == fitted.probability(features)).all()
        assert (again.threshold, again.report) == (fitted.threshold, fitted.report)
    assert [path.name for path in tmp_path.iterdir()] == [PRESENCE_FILE]


def test_the_threshold_of_a_checkpoint_is_the_default(tmp_path: Path) -> None:
    source, exported = tmp_path / "nano", tmp_path / "exported"
    shutil.copytree(NANO, source)
    features, truth, _ = overlapping(200)
    replace(PresenceClassifier.fit(features, truth), threshold=1.0).save(source)  # no mask is as sure as that
    assert medplib(["export", str(source), str(exported)]) == 0
    (record,) = sample_records(("grounding",), 1)
    question = record["conversations"][0]["value"].replace("<image>\n", "")
    predictor = Predictor.from_pretrained(exported)
    for least, kept in ((None, False), (0.0, True)):
        answer = predictor.ask(SAMPLE / record["image"], question, no_mask_below=least)
        assert [bool(mask.area_px) for mask in answer.masks] == [kept]
        assert ("the mask is empty, probability that it is in the image 0." in mask_line(answer.masks[0])) is not kept


def test_a_file_that_is_no_classifier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MedPLIBError, match="cannot read"):
        PresenceClassifier.load(tmp_path)
    features, present, _ = overlapping(50)
    file = PresenceClassifier.fit(features, present).save(tmp_path)
    good = json.loads(file.read_text())
    changes = (
        {"features": ["predicted_iou"]},
        {"format": 99},
        {"coefficients": [1.0]},
        {"intercept": None},
        {"threshold": "high"},
        {"report": {"present": 1}},
    )
    for change in changes:
        file.write_text(json.dumps({**good, **change}))
        with pytest.raises(MedPLIBError, match="not a usable presence classifier"):
            PresenceClassifier.load(file)
    for text in ("{", "[]", json.dumps({"format": 1})):
        file.write_text(text)
        with pytest.raises(MedPLIBError, match="not a usable presence classifier"):
            PresenceClassifier.load(file)


def test_features_tell_a_clear_mask_from_a_vague_one_at_any_size() -> None:
    clear = torch.full((20, 40), -6.0)
    clear[5:15, 10:30] = 6.0
    vague = torch.full((20, 40), -3.0)
    vague[5:15, 10:30] = -0.5
    found = dict(zip(FEATURES, mask_features(clear, 0.9), strict=True))
    assert found["predicted_iou"] == pytest.approx(0.9)
    assert found["peak"] == pytest.approx(6)
    assert found["foreground"] == pytest.approx(1 / (1 + np.exp(-6)), abs=1e-5)
    assert found["area"] == pytest.approx(0.5)
    larger = clear.repeat_interleave(3, 0).repeat_interleave(3, 1)
    assert mask_features(larger, 0.9) == pytest.approx(mask_features(clear, 0.9))
    assert (mask_features(vague, 0.2) < mask_features(clear, 0.9)).all()
    assert mask_features(vague, 0.2)[-1] == 0
    assert np.isfinite(mask_features(torch.full((4, 4), -torch.inf), 0.0)).all()
    assert np.isfinite(mask_features(torch.full((4, 4), torch.inf), 1.0)).all()


def sample_records(kinds: tuple[str, ...], count: int) -> list[dict]:
    records = json.loads((SAMPLE / "grounding.json").read_text())
    return [record for kind in kinds for record in [r for r in records if r["kind"] == kind][:count]]


def test_masks_of_present_and_absent_targets_are_forced(tmp_path: Path) -> None:
    model, processor = load(tiny_checkpoint(tmp_path), dtype=torch.float32)
    pair, absent = sample_records(("grounding_pair", "grounding_absent"), 1)
    vqa = json.loads((SAMPLE / "vqa.json").read_text())[0]
    missing = {**pair, "image": "images/ct_none.png"}
    rows = collect_rows(model, processor, [pair, vqa, absent, missing], SAMPLE)
    assert rows.present.tolist() == [True, True, False]
    assert rows.features.shape == (3, WIDTH)
    assert np.isfinite(rows.features).all()
    assert rows.names[2] == absent["about"]
    assert len(set(rows.names[:2])) == 2
    assert len(rows.left_out) == 1
    with pytest.raises(MedPLIBError, match="none of the 1 records"):
        collect_rows(model, processor, [vqa], SAMPLE)


def test_the_forced_state_is_that_of_an_answer_that_says_so(tmp_path: Path) -> None:
    """The mask is the one that the training pass paints for the same words."""
    model, processor = load(tiny_checkpoint(tmp_path), dtype=torch.float32)
    (record,) = sample_records(("grounding",), 1)
    rows = collect_rows(model, processor, [record], SAMPLE)

    from model.data.image_io import read_image, read_mask
    from model.processing.conversation import Turn

    pixels = read_image(SAMPLE / record["image"]).pixels
    file = record["conversations"][1]["value"].split("<mask>")[1].split("</mask>")[0]
    turns = [
        Turn("human", record["conversations"][0]["value"]),
        Turn("gpt", f"The {rows.names[0]} is <SEG>."),
    ]
    batch = processor.collate([processor.encode(turns, [pixels], masks=[read_mask(SAMPLE / file)])])
    with torch.inference_mode():
        output = model(**batch)
    expected = mask_features(output.mask_logits[0], float(output.iou_predictions))
    assert rows.features[0] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_command_fits_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = tiny_checkpoint(tmp_path)
    data = tmp_path / "asked.json"
    data.write_text(json.dumps(sample_records(("grounding", "grounding_absent"), 4)))
    command = [str(checkpoint), "--data", str(data), "--images", str(SAMPLE)]
    assert main(command) == 0
    told = capsys.readouterr()
    assert "true masks lost" in told.out
    assert "no rate below" in told.err  # four absent structures promise little
    fitted = PresenceClassifier.load(checkpoint)
    assert (fitted.report.present, fitted.report.absent) == (4, 4)

    present_only = tmp_path / "present.json"
    present_only.write_text(json.dumps(sample_records(("grounding",), 2)))
    for options, says in (
        ([str(checkpoint), "--data", str(present_only), "--images", str(SAMPLE)], "all 2 masks are of present"),
        ([*command, "--false-mask-rate", "2"], "between 0 and 1"),
        ([*command, "--max-records", "0"], "at least 1"),
        ([*command, "--out", str(tmp_path / "nowhere" / "fitted.json")], "there is no folder"),
        ([str(tmp_path / "none"), "--data", str(data), "--images", str(SAMPLE)], "none"),
    ):
        assert main(options) == 2
        error = capsys.readouterr().err
        assert says in error
        assert "Traceback" not in error
