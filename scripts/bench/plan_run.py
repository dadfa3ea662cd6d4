"""One process of a measured run, for ``plan.py``: steps on made-up batches while a tally counts tensors.

    python scripts/bench/plan_run.py CASE.json RESULT.json

The network has random weights and the recipe's own engine; the first process writes what it measured.
"""

from __future__ import annotations

import gc
import json
import resource
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model.modeling.configuration import IGNORE_INDEX, IMAGE_PLACEHOLDER, REGION_PLACEHOLDER, MedPLIBConfig
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.batching import EncodedSample, collate
from model.train.engine import TrainingEngine, make_engine
from model.train.plan_activations import Records
from model.train.plan_network import find_sizes
from model.train.plan_tally import TensorTally, storage_bytes
from model.train.process import join, leave, resolved
from model.train.recipe import Recipe
from model.train.recipe_io import load_recipe
from model.train.starting import mixture_config
from model.train.trainable import add_lora, set_trainable

_STEPS = 2


def main(case_file: str, result_file: str) -> None:
    """Run one case."""
    torch.set_num_threads(1)
    case = json.loads(Path(case_file).read_text(encoding="utf-8"))
    recipe = load_recipe(case["recipe"], case["overrides"])
    recipe = replace(recipe, engine=resolved(recipe.engine))
    process = join(recipe.engine)
    config = find_sizes(recipe, Path(case["recipe"]), Path(case["sizes"])).config
    records = Records(**case["records"])
    before = _resident()
    tally = TensorTally("cpu")
    with tally:
        engine = make_engine(random_network(recipe, config), recipe, process, lambda step: 1.0)
        result = measure(engine, recipe, records, tally)
    result["resident"] = _resident() - before
    if process.is_first:
        Path(result_file).write_text(json.dumps(result), encoding="utf-8")
    leave()


def random_network(recipe: Recipe, config: MedPLIBConfig) -> MedPLIBForCausalLM:
    """The recipe's network with random weights, ready to learn as the training loop makes it."""
    torch.manual_seed(0)
    if recipe.stage == 4:
        config.moe = mixture_config(recipe.mixture, config.text_config.num_hidden_layers)
    network = MedPLIBForCausalLM(config)
    if recipe.engine.kind == "deepspeed" and recipe.engine.precision == "bf16":
        network = network.to(torch.bfloat16)
    add_lora(network, recipe.lora)
    set_trainable(network, recipe.trainable)
    if recipe.engine.gradient_checkpointing:
        enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return network.train()


def measure(engine: TrainingEngine, recipe: Recipe, records: Records, tally: TensorTally) -> dict[str, Any]:
    """Bytes by part, of the last step, in which everything there is exists."""
    batches = [made_up_batch(engine, recipe, records, seed) for seed in range(recipe.schedule.accumulation)]
    held = storage_bytes(value for batch in batches for value in batch.values() if isinstance(value, Tensor))
    held += storage_bytes(mask for batch in batches for mask in batch["mask_targets"])
    before, backward, update = 0, 0, 0
    for _ in range(_STEPS):
        gc.collect()
        before = tally.now - held
        tally.mark()
        for batch in batches:
            engine.accumulate(batch)
        backward = tally.mark() - held
        engine.step()
        update = tally.mark() - held
    return {
        "weights": storage_bytes(engine.network.parameters()),
        "optimiser": _optimiser_bytes(engine),
        "standing": before,
        "backward": backward + held // len(batches),  # a batch at hand is part of a pass
        "update": update,
    }


def made_up_batch(engine: TrainingEngine, recipe: Recipe, records: Records, seed: int) -> dict[str, Any]:
    """A batch whose first row is as long as records may be and whose others are a token shorter."""
    config = engine.network.config
    rng = np.random.default_rng(seed)
    rows = [_sample(config, records, records.tokens - (row > 0), rng) for row in range(recipe.schedule.batch_size)]
    return collate(rows, config.pad_token_id or 0)


def _sample(config: MedPLIBConfig, records: Records, tokens: int, rng: np.random.Generator) -> EncodedSample:
    side, grid = config.vision_config.image_size, config.vision_grid
    size = config.sam_config.vision_config.image_size
    ids = torch.from_numpy(rng.integers(10, config.seg_token_id, tokens))
    ids[1] = IMAGE_PLACEHOLDER
    ids[2 : 2 + records.regions] = REGION_PLACEHOLDER
    labels = ids.clone()
    labels[: tokens - records.supervised] = IGNORE_INDEX
    if records.masks:
        ids[-1 - records.masks : -1] = config.seg_token_id
        labels[-1 - records.masks : -1] = config.seg_token_id
    image = (records.image_size, records.image_size)
    return EncodedSample(
        input_ids=ids,
        labels=labels,
        pixel_values=torch.rand(1, 3, side, side),
        region_masks=torch.ones(records.regions, grid, grid),
        region_image=torch.zeros(records.regions, dtype=torch.long),
        sam_pixel_values=torch.rand(3, size, size),
        sam_size=(size, size),
        image_size=image,
        mask_targets=torch.ones(records.masks, *image),
    )


def _optimiser_bytes(engine: TrainingEngine) -> int:
    """Moments, and master copies that are no weights of the network."""
    found: list[Tensor] = []
    optimiser: Any = getattr(engine, "optimiser", None) or engine.engine.optimizer  # type: ignore[attr-defined]
    groups = [
        getattr(optimiser, name, []) for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
    ]
    found += [tensor for group in groups for tensor in group]
    found += [tensor for nested in getattr(optimiser, "fp32_groups", []) for tensor in nested]
    inner = getattr(optimiser, "optimizer", optimiser)
    for state in inner.state.values():
        found += [value for value in state.values() if isinstance(value, Tensor) and value.dim()]
    own = {parameter.untyped_storage()._cdata for parameter in _parameters(engine.network)}
    return storage_bytes(tensor for tensor in found if tensor.untyped_storage()._cdata not in own)


def _parameters(network: nn.Module) -> list[nn.Parameter]:
    return list(network.parameters())


def _resident() -> int:
    """Most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
