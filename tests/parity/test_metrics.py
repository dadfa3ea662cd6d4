"""The published scores, from answers and masks to tables, as recorded."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.checkpoint import load
from model.eval import cal_metric, cal_metric_omniMedVQA
from model.eval.metrics.published import PublishedMasks, PublishedText, published_row, published_words
from model.eval.metrics.scores import score_predictions
from model.eval.predictions import Prediction, read_predictions
from model.inference.predictor import Predictor
from model.processing.masks import encode_rle
from tests.parity.test_generate import picture, published_mask, target_mask, with_template


@pytest.fixture(scope="module")
def folder(golden: Path) -> Path:
    return golden / "7_metrics"


@pytest.fixture(scope="module")
def recorded(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def runs(recorded: dict[str, Any]) -> list[tuple[str, bool, dict[str, Any]]]:
    """Predictions file, whether with candidates, and what was recorded; one for each hash seed."""
    named = [(name.split("|"), run) for name, run in recorded.items() if "|" in name]
    return [(parts[0], parts[1] == "candidate=yes", run) for parts, run in named]


def test_words(recorded: dict[str, Any]) -> None:
    found = {text: " ".join(published_words(text)) for text in recorded["normalize_word"]}
    assert found == recorded["normalize_word"]


def test_every_number_of_every_answer_to_the_last_bit(recorded: dict[str, Any]) -> None:
    for item in recorded["per_item"]:
        assert " ".join(published_words(item["gt"])) == item["gt_norm"]
        assert " ".join(published_words(item["text"])) == item["text_norm"]
        f1, precision, recall = item["f1_p_r"]
        assert published_row(item["text"], item["gt"]) == {
            "exact": item["exact"],
            "f1": f1,
            "precision": precision,
            "recall": recall,
            "bleu": item["bleu4"],
            "bleu_1": item["bleu1"],
            "bleu_2": item["bleu2"],
            "bleu_3": item["bleu3"],
        }
    assert len(recorded["per_item"]) == 26


def test_tables(recorded: dict[str, Any], folder: Path) -> None:
    for name, with_candidates, run in runs(recorded):
        published = PublishedText(choose_candidates=with_candidates)
        for _ in published.watch(read_predictions(folder / f"{name}.jsonl")):
            pass
        assert {title: float(f"{value:g}") for title, value in published.table().items()} == run["table"]
    assert len(runs(recorded)) == 16


def test_what_the_command_prints(
    recorded: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder.parent)
    for name, with_candidates, run in runs(recorded):
        flags = ["--candidate_set", "7_metrics/candidate_set.json"] if with_candidates else []
        assert cal_metric.main([f"--pred=7_metrics/{name}.jsonl", *flags, "--samples=0"]) == 0
        published, _, rest = capsys.readouterr().out.partition("\n" + cal_metric.STANDARD_HEADING)
        assert published == run["stdout"]
        assert rest


def test_omnimedvqa(
    recorded: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder.parent)
    flags = ["--pred=7_metrics/pred_omni.jsonl", "--root=7_metrics/omni_QA", "--samples=0"]
    assert cal_metric_omniMedVQA.main(flags) == 0
    published, _, rest = capsys.readouterr().out.partition("\n" + cal_metric.STANDARD_HEADING)
    assert published == recorded["omni"]["stdout"]
    assert "closed_accuracy" in rest


def mask_rows(folder: Path) -> list[Prediction]:
    """The recorded logits and references as predictions, thresholded at 0.1; the number is the question's id."""
    rows = []
    with np.load(folder / "seg_masks.npz") as stored:
        for number in range(7):
            probability = 1 / (1 + np.exp(-stored[f"logits_{number}"][0].astype(np.float64)))
            masks = [{"rle": encode_rle(probability > 0.1)}]
            wanted = [encode_rle(stored[f"gt_{number}"] > 0)]
            rows.append(Prediction(number, "", "", "<SEG>", "<SEG>", masks=masks, gt_masks=wanted))
    return rows


def test_masks(recorded: dict[str, Any], folder: Path) -> None:
    items = recorded["seg"]["items"]
    named = [replace(row, image_path=item["name"]) for row, item in zip(mask_rows(folder), items, strict=True)]
    for row, item in zip(named, items, strict=True):
        published = score_predictions([row], samples=0).published_masks[None]
        if "exception" in item:  # both masks empty: the published code fails, the reference says 0
            assert (published.miou, published.mdice) == (0, 0)
            continue
        intersection, union = (int(item[key][1]) for key in ("I", "U"))
        assert published == one_pair(item["name"], intersection, union)
        assert (published.miou, published.mdice) == (item["iou"], item["dice"])
    answered = [row for row, item in zip(named, items, strict=True) if "exception" not in item]
    together = score_predictions(answered, samples=0).published_masks[None]
    assert together.miou == recorded["seg"]["miou"]
    assert together.mdice == recorded["seg"]["mDice"]
    assert together.by_modality() == recorded["seg"]["modality"]


def one_pair(name: str, intersection: int, union: int) -> PublishedMasks:
    masks = PublishedMasks()
    masks.add(name, intersection, union)
    return masks


def test_the_published_grounding_loop(golden: Path) -> None:
    source = golden / "4_generate"
    recorded = json.loads((source / "validate_and_margins.json").read_text())["validate_seg_patched"]
    modalities = ast.literal_eval(recorded["stdout"].splitlines()[1])
    cases = json.loads((source / "generate.json").read_text())["cases"]
    tower = golden / "models" / "clip-vit-tiny-patch14-336"
    asking = with_template(Predictor(*load(source / "hf_checkpoint", vision_tower=tower, dtype=torch.float32)), "v1")
    rows = []
    with np.load(source / "generate.npz") as arrays:
        for number, record in enumerate(json.loads((source / "validate_seg_input.json").read_text())):
            question, answer = (turn["value"] for turn in record["conversations"][:2])
            image = asking.set_image(picture(golden, record["image"]))
            mask = encode_rle(published_mask(asking, image, question.replace("<image>\n", "")))
            wanted = encode_rle(target_mask(golden, arrays, cases, record["image"], answer))
            rows.append(
                Prediction(
                    number, record["image"], question, "<SEG>", "<SEG>", masks=[{"rle": mask}], gt_masks=[wanted]
                )
            )
    found = score_predictions(rows, samples=0).published_masks[None]
    # the masks are ours, so a pixel at the threshold may differ; the formatting is exact
    assert found.miou == pytest.approx(recorded["miou"], abs=2e-4)
    assert found.mdice == pytest.approx(recorded["mDice"], abs=2e-4)
    assert list(found.by_modality()) == list(modalities)
    for name, values in modalities.items():
        assert found.by_modality()[name] == pytest.approx(values, abs=1e-3)
    lines = found.format().splitlines()
    assert lines[0] == f"miou: {found.miou:.6f}, mDice: {found.mdice:.6f}"
    assert lines[1] == str(found.by_modality())
