"""Shares of the draws by task and modality, and the losses that a run notes for each."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from model.data.sampling import ResumableSampler
from model.errors import MedPLIBError
from model.train import load_recipe, recipe_from, run
from model.train.recipe import Data
from model.train.sample_weights import draw_table, draw_weights
from model.train.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
FILES = {"a.json": ["vqa ct"] * 60 + ["vqa mr"] * 20, "b.json": ["region ct"] * 15 + ["grounding mr"] * 5}


def records(files: dict[str, list[str]] | None = None) -> Any:
    parts = {name: [text.split() for text in texts] for name, texts in (files or FILES).items()}
    flat = [pair for part in parts.values() for pair in part]

    class File(list):
        def __init__(self, path: str, items: list[Any]) -> None:
            super().__init__(items)
            self.path = path

    return SimpleNamespace(
        datasets=[File(name, part) for name, part in parts.items()],
        tasks=[task for task, _ in flat],
        modalities=[None if modality == "-" else modality for _, modality in flat],
        weights=None,
    )


def shares(dataset: Any, **data: Any) -> dict[str, float]:
    weights = draw_weights(dataset, Data(train=tuple(FILES), **data))
    return {row.label: row.share for row in draw_table(dataset, weights, draws=100)}


def test_without_shares_every_record_is_seen_once_an_epoch() -> None:
    assert draw_weights(records(), Data()) is None
    rows = {row.label: row for row in draw_table(records(), None, draws=300)}
    assert (rows["vqa"].records, rows["vqa"].share, rows["vqa"].passes) == pytest.approx((80, 0.8, 3.0))


def test_tasks_get_their_shares_whatever_their_sizes() -> None:
    found = shares(records(), task_shares={"vqa": 1, "region": 1, "grounding": 2})
    assert [found[task] for task in ("vqa", "region", "grounding")] == pytest.approx([0.25, 0.25, 0.5])


def test_unnamed_labels_divide_other_share_by_size() -> None:
    found = shares(records(), task_shares={"grounding": 0.5, "other": 0.5})
    assert [found[task] for task in ("grounding", "vqa", "region")] == pytest.approx(
        [0.5, 0.5 * 80 / 95, 0.5 * 15 / 95]
    )


def test_shares_of_files_tasks_and_modalities_hold_together() -> None:
    found = shares(
        records(),
        shares=(0.7, 0.3),
        task_shares={"vqa": 0.7, "region": 0.2, "grounding": 0.1},
        modality_shares={"ct": 0.5, "mr": 0.5},
    )
    wanted = {"a.json": 0.7, "vqa": 0.7, "region": 0.2, "grounding": 0.1, "ct": 0.5, "mr": 0.5}
    assert {label: found[label] for label in wanted} == pytest.approx(wanted, abs=1e-5)


def test_draws_do_not_depend_on_number_of_ranks() -> None:
    dataset = records()
    data = Data(train=tuple(FILES), task_shares={"grounding": 1, "other": 1}, modality_shares={"mr": 3, "ct": 1})
    weights = draw_weights(dataset, data)

    def epoch(world_size: int) -> list[list[int]]:
        ranks = [
            ResumableSampler(
                np.ones(100), seed=3, batch_size=20 // world_size, rank=rank, world_size=world_size, weights=weights
            )
            for rank in range(world_size)
        ]
        return [sorted(index for batch in batches for index in batch) for batches in zip(*ranks, strict=True)]

    assert epoch(1) == epoch(4)
    drawn = Counter(dataset.tasks[index] for batch in epoch(1) for index in batch)
    assert drawn["grounding"] == 50


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"task_shares": {"vqa": 1, "region": 1}}, "leaves out grounding; give a share, or other"),
        ({"task_shares": {"caption": 1, "other": 1}}, "names caption, but no training record is so; the labels are"),
        ({"modality_shares": {"pet": 1, "other": 1}}, "the labels are ct, mr"),
        ({"task_shares": {"grounding": 1, "other": 1}, "modality_shares": {"ct": 9, "mr": 1}}, "contradict each other"),
        ({"shares": (1, 0), "task_shares": {"grounding": 1, "other": 1}}, "grounding is to have 50.0%.* get 0.0%"),
    ],
)
def test_shares_that_cannot_be_had_are_refused_in_a_sentence(data: dict[str, Any], told: str) -> None:
    with pytest.raises(MedPLIBError, match=told):
        draw_weights(records(), Data(train=tuple(FILES), **data))


def test_records_of_unknown_modality_have_a_label_too() -> None:
    dataset = records({"a.json": ["vqa ct", "vqa -", "vqa -"]})
    assert shares(dataset, modality_shares={"ct": 1, "unknown": 3})["unknown"] == pytest.approx(0.75)


def test_recipes_read_shares_and_name_what_is_wrong_with_them(values: Any) -> None:
    given = recipe_from(values(1, data={"task_shares": {"vqa": "1e-1", "other": 2}}))
    assert given.data.task_shares == {"vqa": 0.1, "other": 2.0}
    with pytest.raises(MedPLIBError) as caught:
        recipe_from(
            values(1, data={"task_shares": {"grouding": 1}, "modality_shares": {"ct": 0}}, logging={"router_every": -1})
        )
    for told in ("nearest: data.task_shares.grounding", "data.modality_shares are all 0", "logging.router_every is -1"):
        assert told in str(caught.value)
    with pytest.raises(MedPLIBError, match=r"data.task_shares is \[1, 2\], expected labels with numbers"):
        recipe_from(values(1, data={"task_shares": [1, 2]}))
    nano = ROOT / "configs" / "stages" / "stage4_nano.yaml"
    overrides = ["data.task_shares={vqa: 1, other: 1}", "data.modality_shares.ct=2", "data.modality_shares.other=1"]
    assert load_recipe(nano, overrides).data.modality_shares == {"ct": 2.0, "other": 1.0}


def metrics(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_step_logs_loss_of_each_task_over_micro_batches(values: Any) -> None:
    recipe = recipe_from(values(1, schedule={"batch_size": 3, "accumulation": 3, "max_steps": 1}))
    trainer = Trainer(recipe)
    trainer.set_up()
    rows = [row for _, row in zip(range(3), trainer.sampler, strict=False)]
    network = trainer.engine.network
    sums: dict[str, list[float]] = {}
    with torch.no_grad():
        for index in (index for row in rows for index in row):
            output = network(**trainer.processor.collate([trainer.dataset[index]]))
            task = trainer.dataset.tasks[index]
            losses = output.row_losses
            for name, value, count in (
                ("ce", losses.ce.sum(), losses.tokens.sum()),
                ("dice", losses.masks["dice"].sum(), len(losses.masks["dice"])),
            ):
                both = sums.setdefault(f"{name}/{task}", [0.0, 0.0])
                both[0], both[1] = both[0] + float(value), both[1] + float(count)
    trainer.train()
    trainer.close()
    (row,) = metrics(recipe.folder)
    wanted = {name: total / count for name, (total, count) in sums.items() if count}
    assert {name: row[name] for name in wanted} == pytest.approx(wanted, rel=1e-3)
    seen = Counter(trainer.dataset.tasks[index] for row in rows for index in row)
    assert {name: row[f"rows/{name}"] for name in seen} == seen
    assert "dice/vqa" not in row


def test_metrics_ignore_recomputation_and_validation(values: Any, phantoms: Path) -> None:
    base = values(4)["model"]["base"]
    found = {}
    for checkpointing in (False, True):
        recipe = recipe_from(
            values(
                4,
                output=values(4)["output"] + str(checkpointing),
                model={"base": base, "grounding": base},
                data={"validation": [str(phantoms / "grounding.json")]},
                schedule={"batch_size": 4, "max_steps": 3},
                validation={"samples": 2, "every": 1, "max_new_tokens": 4},
                mixture={"projector_experts": 2},
                trainable=["router", "projector"],
                engine={"gradient_checkpointing": checkpointing},
                logging={"router_every": 2, "tensorboard": True},
            )
        )
        run(recipe)
        found[checkpointing] = metrics(recipe.folder, "router.jsonl")
        assert list((recipe.folder / "tensorboard").iterdir())
    first, last = found[False]
    assert (first["step"], first["steps"], last["step"], last["steps"]) == (2, 2, 3, 1)
    assert first["layers"] == [0, 1, 2, 3]
    for rows in found.values():
        for kind, shares in rows[0]["kinds"].items():
            assert np.sum(shares["load"], axis=1) == pytest.approx(np.ones(4), abs=2e-4), kind
            assert np.shape(shares["entropy"]) == (4,)
    assert [row["kinds"]["image"]["tokens"] for row in found[True]] == [8 * 16, 4 * 16]
    assert found[True][0]["kinds"]["text"] == found[False][0]["kinds"]["text"]
    assert sum(task["tokens"] for task in first["tasks"].values()) == sum(k["tokens"] for k in first["kinds"].values())
    assert [row["projector"] for row in found[True]] == [row["projector"] for row in found[False]]
    for row in found[True]:  # here an image has as many tokens for the projector as places in the sequence
        projector = row["projector"]
        assert projector["tokens"] == row["kinds"]["image"]["tokens"]
        assert projector["tokens"] == sum(task["tokens"] for task in projector["tasks"].values())
        assert projector["load"] == pytest.approx(
            np.average(
                [task["load"] for task in projector["tasks"].values()],
                axis=0,
                weights=[task["tokens"] for task in projector["tasks"].values()],
            ),
            abs=2e-4,
        )
        assert sum(projector["probability"]) == pytest.approx(1, abs=2e-4)
        assert 0 < projector["entropy"] <= math.log(2) + 1e-4 and projector["dropped"] == 0
    scores = metrics(recipe.folder, "validation.jsonl")[0]
    assert scores["teacher_forced/ce/grounding"] == pytest.approx(scores["teacher_forced/ce"], rel=1e-4)
    by_modality = [name for name in scores if name.startswith("mDice/")]
    assert by_modality and all(0 <= scores[name] <= 1 for name in by_modality)
    assert {f"ce/{task}" for task in ("vqa", "grounding")} & set(metrics(recipe.folder)[0])
