"""Run by every rank of ``test_faults.py``: three optimizer steps, in the second of which one rank's batch is bad.

Arguments: a recipe file, an output folder, ``STAGE:PRECISION:FAULT`` triples. ``loss`` spoils an image of the last
rank, ``gradient`` one gradient of it. One process (``steps_of``) takes the batches of both ranks in turn.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from model.data.dataset import MedPLIBDataset
from model.train import Recipe, load_recipe
from model.train.distributed import Process, join, leave
from model.train.engine import TrainingEngine, make_engine
from model.train.init_weights import starting_network


def main() -> None:
    recipe, out = load_recipe(sys.argv[1]), Path(sys.argv[2])
    process = join(recipe.engine)
    for case in sys.argv[3:]:
        stage, precision, fault = case.split(":")
        engine = replace(recipe.engine, zero_stage=int(stage), precision=precision)
        rows = steps_of(replace(recipe, engine=engine), process, fault)
        (out / f"{recipe.engine.kind}_{case.replace(':', '_')}_{process.rank}.json").write_text(json.dumps(rows))
    leave()


def steps_of(recipe: Recipe, process: Process, fault: str) -> list[dict[str, Any]]:
    network, processor = starting_network(recipe)
    engine = make_engine(network.train(), recipe, process, lambda step: 1.0 / (step + 1))
    data = MedPLIBDataset(recipe.data.train[0], recipe.data.images[0], processor, training=True)
    rows = []
    for number in range(3):
        before = engine.gather(trainable_only=True)
        before = {name: value.clone() for name, value in before.items()}
        for micro in range(2):
            for rank in [process.rank] if process.world_size > 1 else [0, 1]:
                batch = processor.collate([data[4 * number + 2 * micro + rank]])
                accumulate(engine, batch, fault if (number, micro, rank) == (1, 0, 1) else "")
        result = engine.step()
        after = engine.gather(trainable_only=True)
        same = all(torch.equal(value, after[name]) for name, value in before.items())
        rows.append({"skipped": result.skipped, "lr": result.lr, "norm": result.grad_norm, "same": same})
    return rows


def accumulate(engine: TrainingEngine, batch: dict[str, Any], fault: str) -> None:
    if fault == "loss":
        batch["pixel_values"] = batch["pixel_values"] * torch.inf
    handle = None
    if fault == "gradient":
        victim = next(value for name, value in engine.network.named_parameters() if name.endswith("lm_head.weight"))
        handle = victim.register_hook(lambda gradient: gradient * torch.nan)
    engine.accumulate(batch)
    if handle is not None:
        handle.remove()


if __name__ == "__main__":
    main()
