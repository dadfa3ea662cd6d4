"""Run by ``test_distributed_start.py``: the numbers that a rank holds when DeepSpeed gets the network.

Argument: a recipe file. Written: those of whole weights, those of this rank's shares, and those of all weights.
"""

from __future__ import annotations

import sys
from typing import Any

import deepspeed
from torch import nn

from model.train import load_recipe
from model.train.distributed import join, leave
from model.train.engine import make_engine
from model.train.init_weights import starting_network


def main() -> None:
    recipe = load_recipe(sys.argv[1])
    process = join(recipe.engine)
    network, _ = starting_network(recipe)
    numbers = sum(parameter.numel() for parameter in network.parameters())
    initialize = deepspeed.initialize

    def watched(model: nn.Module, **others: Any) -> Any:
        whole = sum(parameter.numel() for parameter in model.parameters())
        shares = sum(parameter.ds_tensor.numel() for parameter in model.parameters())
        sys.stdout.write(f"held {whole} {shares} {numbers}\n")
        return initialize(model=model, **others)

    deepspeed.initialize = watched
    make_engine(network.train(), recipe, process, lambda step: 1.0)
    leave()


if __name__ == "__main__":
    main()
