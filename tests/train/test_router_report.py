"""Which expert serves what: the numbers and the sentences, and what TensorBoard gets of routers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.checkpoint import load, save
from model.cli import main
from model.modeling.router_tally import RouterSummary
from model.modeling.splice import POSITION_KINDS
from model.train import recipe_from, run, save_recipe
from model.train.router_report import Examination, by_task, findings, specialisation
from tests.tiny import tiny_checkpoint


def test_specialisation_is_0_for_like_and_1_for_apart_groups() -> None:
    nan = float("nan")
    load = np.array([[[0.5, 0.5], [0.5, 0.5]], [[1.0, 0.0], [0.0, 1.0]], [[0.7, 0.3], [0.7, 0.3]]])
    assert specialisation(load) == pytest.approx([0, 1, 0], abs=1e-9)
    missing = np.array([[[1.0, 0.0], [0.0, 1.0], [nan, nan]], [[1.0, 0.0], [nan, nan], [nan, nan]]])
    assert specialisation(missing)[0] == pytest.approx(1) and np.isnan(specialisation(missing)[1])


def examined(
    summary: RouterSummary, layers: tuple[int, ...], experts: tuple[int, ...], projector: RouterSummary | None = None
) -> Examination:
    return Examination(
        "x", layers, experts, {"vqa": 1, "region": 1}, ("vqa", "region"), ("ct",), summary, projector=projector
    )


def test_findings_name_expert_and_positions() -> None:
    choices = torch.full((3, 8, 2), 50.0, dtype=torch.float64)  # three layers, two tasks × four kinds
    choices[1:, [3, 7]] = torch.tensor([93.0, 7.0], dtype=torch.float64)  # <SEG> in the last two layers
    tokens = torch.full((3, 8), 100.0, dtype=torch.float64)
    summary = RouterSummary(choices, choices, choices, tokens * 0, tokens)
    told = findings(examined(summary, (0, 2, 4), (2, 2, 2)))
    assert "Expert 0 takes 93 % of the <SEG> positions in layers 2 to 4." in told
    assert any("decides more about the expert than which task" in sentence for sentence in told)
    assert len(POSITION_KINDS) == 4


def counted(choices: list[list[float]], tokens: float) -> RouterSummary:
    """One layer, of whose groups each has as many tokens."""
    chosen = torch.tensor([choices], dtype=torch.float64)
    count = torch.full(chosen.shape[:2], tokens, dtype=torch.float64)
    return RouterSummary(chosen, chosen, chosen, count * 0, count)


def test_findings_count_positions_not_choices() -> None:
    of_four = counted([[90, 50, 40, 20]] * 8, 100)
    told = findings(examined(of_four, (0,), (4,)))
    assert "Expert 0 takes 90 % of the text positions in layer 0." in told
    of_two = counted([[100, 100]] * 8, 100)
    (told,) = findings(examined(of_two, (0,), (2,)))
    assert told == "Every position goes to all experts of its layer, so that their shares mean nothing."


def test_findings_cover_projector_mixture() -> None:
    layers = counted([[50, 50]] * 8, 100)
    told = findings(examined(layers, (0,), (2,), counted([[10, 80, 10], [0, 100, 0]], 100)))
    assert told[-1].startswith("In the projector expert 1 takes 90 % of the image tokens, the most; ")
    everywhere = counted([[100, 100], [100, 100]], 100)
    assert findings(examined(layers, (0,), (2,), everywhere))[-1].startswith("Every image token goes to all experts")
    nothing = counted([[0, 0], [0, 0]], 0)
    assert findings(examined(layers, (0,), (2,), nothing))[-1].startswith("The projector's router gave no figures")


def test_layers_may_differ_in_number_of_experts() -> None:
    choices = torch.tensor([[[100.0, 0, 0, 0]] * 4 + [[0, 100.0, 0, 0]] * 4] * 2, dtype=torch.float64)
    summary = RouterSummary(choices, choices, choices, choices[..., 0] * 0, torch.full((2, 8), 100.0).double())
    both = examined(summary, (0, 1), (2, 4))
    assert [layer.shape for layer in by_task(both)] == [(2, 2), (2, 4)]
    assert specialisation(by_task(both)) == pytest.approx([1, 1])
    one = examined(counted([[100, 0]] * 8, 100), (0,), (1,))
    assert np.isnan(specialisation(by_task(one))).all()
    assert len(findings(one)) == 1  # where there is one expert, there is nothing to tell


def test_router_report_writes_its_numbers(phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = tiny_checkpoint(tmp_path)
    files = [str(phantoms / f"{name}.json") for name in ("vqa", "region", "grounding")]
    out = tmp_path / "new" / "report.json"
    given = ["router-report", str(checkpoint), "--data", *files, "--images", str(phantoms), "--out", str(out)]
    assert main([*given, "--samples", "3"]) == 0
    numbers = json.loads(out.read_text())
    assert numbers["layers"] == [0, 1] and numbers["records"] == {"vqa": 3, "region": 3, "grounding": 3}
    assert all(sentence in capsys.readouterr().out for sentence in numbers["findings"][:1])
    whole = next(row for row in numbers["groups"] if not (row["task"] or row["modality"] or row["positions"]))
    parts = [row for row in numbers["groups"] if row["task"] and row["positions"]]
    assert sum(row["tokens"] for row in parts) == whole["tokens"]
    assert np.sum(whole["load"], axis=1) == pytest.approx([1, 1], abs=1e-4)
    assert "projector" not in numbers


@pytest.mark.parametrize("moe", [{}, {"layers": (0, 1), "num_experts": (2, 4), "top_k": 2}])
def test_projector_mixture_is_reported_apart_from_the_layers(
    moe: dict[str, Any], phantoms: Path, tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint(tmp_path, moe=moe, projector={"type": "moe_mlp2x_gelu", "num_experts": 3})
    files = [str(phantoms / f"{name}.json") for name in ("vqa", "grounding")]
    out = tmp_path / "report.json"
    given = ["router-report", str(checkpoint), "--data", *files, "--images", str(phantoms), "--out", str(out)]
    assert main([*given, "--samples", "2"]) == 0
    numbers = json.loads(out.read_text())
    whole, *parts = numbers["projector"]["groups"]
    assert (whole["task"], whole["modality"], whole["tokens"]) == (None, None, 4 * 16)
    tasks = [part for part in parts if part["task"]]
    assert [(part["task"], part["tokens"]) for part in tasks] == [("vqa", 2 * 16), ("grounding", 2 * 16)]
    assert whole["load"] == pytest.approx(np.mean([part["load"] for part in tasks], axis=0), abs=1e-4)
    assert sum(part["tokens"] for part in parts if part["modality"]) == whole["tokens"]
    assert sum(whole["probability"]) == pytest.approx(1, abs=1e-4) and whole["dropped"] == 0
    assert numbers["layers"] == list(moe.get("layers", ()))
    if moe:
        image = next(row for row in numbers["groups"] if row["positions"] == "image")
        assert [len(load) for load in image["load"]] == [2, 4] and image["tokens"] == whole["tokens"]
    else:
        assert "groups" not in numbers


def test_unmeasured_values_are_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = tiny_checkpoint(tmp_path, projector={"type": "moe_mlp2x_gelu"})
    network, processor = load(checkpoint)
    network.model.decoder.layers[1].self_attn.q_proj.weight.data.fill_(3e38)  # overflows
    save(network, processor, tmp_path / "broken")
    turns = [{"from": "human", "value": "Is the liver an organ?"}, {"from": "gpt", "value": "yes"}]
    (tmp_path / "text.json").write_text(json.dumps([{"id": "a", "conversations": turns}]))
    out = tmp_path / "broken.json"
    given = ["--data", str(tmp_path / "text.json"), "--images", str(tmp_path), "--out", str(out)]
    assert main(["router-report", str(tmp_path / "broken"), *given]) == 0
    told = capsys.readouterr().out
    assert "no finite probabilities: 1." in told and "projector's router gave no figures" in told
    assert "specialisation" not in told  # one task, one kind of position
    numbers = json.loads(out.read_text())
    assert numbers["specialisation"]["by_task_mean"] is None and numbers["projector"]["groups"][0]["tokens"] == 0
    assert "NaN" not in out.read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["router-report", "{base}", "--data", "{data}", "--images", "{images}", "--out", "x.json"], "dense model"),
        (["router-report", "{base}", "--out", "x.json"], "give --data"),
        (["router-report", "{base}", "--data", "{data}", "--out", "x.json"], "--images is missing"),
    ],
)
def test_wrong_report_input_is_refused(
    base: Path, phantoms: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"base": base, "data": phantoms / "vqa.json", "images": phantoms}
    assert main([text.format(**names) for text in arguments]) == 2
    assert told in capsys.readouterr().err


def test_absent_records_of_run_are_refused(values: Any, tmp_path: Path, capsys: Any) -> None:
    recipe = recipe_from(values(1, data={"validation": ["elsewhere/held_out.json"]}))
    save_recipe(recipe, tmp_path)
    assert main(["router-report", str(tmp_path), "--out", "x.json"]) == 2
    assert "elsewhere/held_out.json, which is not here" in capsys.readouterr().err


def test_tensorboard_gets_losses_by_task_and_routers(values: Any, phantoms: Path, tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    base = values(4)["model"]["base"]
    recipe = recipe_from(
        values(
            4,
            ("grounding",),
            model={"base": base, "grounding": base},
            data={"validation": [str(phantoms / "grounding.json")], "validation_images": str(phantoms)},
            schedule={"max_steps": 2},
            validation={"samples": 2, "every": 2},
            mixture={"projector_experts": 2},
            trainable=["router", "projector"],
            logging={"router_every": 1, "tensorboard": True},
        )
    )
    run(recipe)
    board = event_accumulator.EventAccumulator(str(recipe.folder / "tensorboard"))
    board.Reload()
    tags = set(board.Tags()["scalars"])
    rows = [json.loads(line) for line in (recipe.folder / "router.jsonl").read_text().splitlines()]
    for measure in ("load", "probability", "entropy", "dropped"):
        expert = "" if measure in ("entropy", "dropped") else "/expert 1"
        for place in ("text/layer 3", "grounding/layer 0", "projector"):
            assert f"router_{measure}/{place}{expert}" in tags
    shown = [event.value for event in board.Scalars("router_load/text/layer 3/expert 1")]
    assert shown == pytest.approx([row["kinds"]["text"]["load"][3][1] for row in rows])
    assert {"train/loss", "train/ce/grounding", "train/dice/grounding", "validation/mDice@0.5"} <= tags
    assert main(["router-report", str(recipe.folder), "--out", str(tmp_path / "r.html"), "--samples", "2"]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["layers"] == rows[0]["layers"]
