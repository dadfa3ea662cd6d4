"""Run by every rank of ``test_distributed.py``: gradients of one step in which the ranks' batches are of other kinds.

Arguments: a recipe file, an output folder, ZeRO stages (``2x2``: ZeRO-2 with experts shared out over two ranks, each of
which writes the gradients that it has). Rank 0 gets VQA records alone, without regions and masks, and
rank 1 grounding records alone. One process (``gradients_of``) takes both batches in turn, through plain PyTorch.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from model.data.dataset import MedPLIBDataset
from model.train import Recipe, load_recipe
from model.train.distributed import Process, join, leave
from model.train.engine import TrainingEngine, make_engine
from model.train.init_weights import starting_network


def main() -> None:
    recipe, out = load_recipe(sys.argv[1]), Path(sys.argv[2])
    process = join(recipe.engine)
    for named in sys.argv[3:]:
        stage, _, shared = named.partition("x")
        engine = replace(recipe.engine, zero_stage=int(stage), expert_parallel=int(shared or 1))
        gradients = gradients_of(replace(recipe, engine=engine), process)
        if process.is_first or shared:
            save_file(gradients, out / f"{recipe.engine.kind}_{named}_{process.rank}.safetensors")
    leave()


def gradients_of(recipe: Recipe, process: Process) -> dict[str, torch.Tensor]:
    network, processor = starting_network(recipe)
    engine = make_engine(network.train(), recipe, process, lambda step: 1.0)
    kinds = recipe.data.train if process.world_size == 1 else [recipe.data.train[process.rank]]
    for path in kinds:
        data = MedPLIBDataset(path, recipe.data.images[0], processor, training=True)
        engine.accumulate(processor.collate([data[0], data[1]]))
    return read_gradients(engine)


def read_gradients(engine: TrainingEngine) -> dict[str, torch.Tensor]:
    learning = {name: value for name, value in engine.network.named_parameters() if value.requires_grad}
    if engine.recipe.engine.kind == "torch":
        found = {name: value.grad for name, value in learning.items()}
    else:
        from deepspeed.utils import safe_get_full_grad

        found = {name: safe_get_full_grad(value) for name, value in learning.items()}
    return {name: value.float().cpu().clone() for name, value in found.items() if value is not None}


if __name__ == "__main__":
    main()
