"""From a trained network to the one the next stage starts from: LoRA merged, native names, on rank 0."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from model.checkpoint import merge_lora
from model.checkpoint.building import empty_network
from model.checkpoint.loading import finish
from model.checkpoint.lora import merge_lora_state
from model.errors import MedPLIBError
from model.modeling.configuration import MedPLIBConfig
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.processor import MedPLIBProcessor
from model.train.checkpoints import FOLDER, WEIGHTS, checkpoint_of, list_checkpoints, load_trainable
from model.train.engine import TrainingEngine
from model.train.quantised import is_quantised, merge_quantised
from model.train.recipe import Recipe
from model.train.recipe_io import RECIPE_FILE, load_recipe
from model.train.run_record import read_record
from model.train.starting import starting_network


def shares_weights(recipe: Recipe) -> bool:
    """Whether a rank's network holds only a share of the weights."""
    return recipe.engine.kind == "deepspeed" and (recipe.engine.zero_stage == 3 or recipe.engine.expert_parallel > 1)


def merged_network(
    engine: TrainingEngine, config: MedPLIBConfig, recipe: Recipe, checkpoint: Path | None = None
) -> MedPLIBForCausalLM | None:
    """The trained network without LoRA on rank 0, None elsewhere. Called by every rank.

    Where ranks share weights out it is a copy; elsewhere it is the engine's network, which cannot train any more.

    Args:
        engine, config, recipe: of the run.
        checkpoint: one of the run's, whose learnt weights are taken instead of the engine's.
    """
    if shares_weights(recipe):
        state = engine.gather(trainable_only=False)
        if not engine.process.is_first:
            return None
        if checkpoint is not None:
            state |= load_file(checkpoint / WEIGHTS)
        scaling = recipe.lora.alpha / recipe.lora.rank if recipe.lora.rank else 1.0
        return finish(empty_network(config), merge_lora_state(state, scaling))
    if not engine.process.is_first:
        return None
    if checkpoint is not None:
        load_trainable(engine.network, checkpoint)
    return _merged(engine.network)


def network_of_run(folder: Path) -> tuple[MedPLIBForCausalLM, MedPLIBProcessor]:
    """The merged network of an unfinished run, see ``unmerged_network``."""
    network, processor, _ = unmerged_network(folder)
    return _merged(network), processor


def unmerged_network(folder: Path) -> tuple[MedPLIBForCausalLM, MedPLIBProcessor, Recipe]:
    """The network of a run with its LoRA apart, from the checkpoint that ``merged/`` is of, or else the newest.

    Args:
        folder: a run folder, or one ``step_…`` folder of its checkpoints.

    Returns:
        The network, its processor, and the recipe of the run.

    Raises:
        MedPLIBError: there is no checkpoint, or its starting points are gone.
    """
    run_folder = folder.parent.parent if folder.parent.name == FOLDER else folder
    checkpoint = folder if run_folder is not folder else next(reversed(list_checkpoints(folder)), None)
    best = (read_record(folder).get("merged") or {}).get("step")
    if best is not None and checkpoint_of(folder, best) in list_checkpoints(folder):
        checkpoint = checkpoint_of(folder, best)
    if checkpoint is None or not (run_folder / RECIPE_FILE).is_file():
        raise MedPLIBError(f"{folder} holds no training checkpoint; expected {RECIPE_FILE} and {FOLDER}/step_…")
    recipe = load_recipe(run_folder / RECIPE_FILE)
    engine = replace(recipe.engine, attention="sdpa")  # merging needs no attention, and may happen without a GPU
    network, processor = starting_network(replace(recipe, engine=engine))
    load_trainable(network, checkpoint)
    return network, processor, recipe


def remove_half_merged(run_folder: Path) -> None:
    """Remove what a run left that was killed while it wrote its result."""
    for left in (*run_folder.glob(".*.partial"), *run_folder.glob(".*.replaced")):
        if left.is_dir():
            shutil.rmtree(left)


def _merged(network: nn.Module) -> MedPLIBForCausalLM:
    if is_quantised(network):
        merge_quantised(network)
        network.to("cpu")
    plain = merge_lora(network)
    assert isinstance(plain, MedPLIBForCausalLM)
    plain.eval().requires_grad_(False)
    return plain
