"""The network a stage starts from, made ready to learn (reference §6, and §5 for stage IV's up-cycling)."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import assemble, lay_over, load, upcycle
from model.checkpoint.building import choose_attention
from model.checkpoint.directories import read_settings, resolve
from model.checkpoint.shards import find_weights
from model.errors import MedPLIBError, shown
from model.modeling.configuration import LossConfig, MedPLIBConfig, MoEConfig, ProjectorConfig
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.processor import MedPLIBProcessor
from model.train.quantised import missing_library, quantise_decoder
from model.train.recipe import Mixture, Recipe
from model.train.trainable import add_lora, set_trainable
from model.yaml_files import read_mapping

logger = logging.getLogger(__name__)


def starting_network(recipe: Recipe) -> tuple[MedPLIBForCausalLM, MedPLIBProcessor]:
    """Load or assemble what ``recipe.model`` names, up-cycle at stage IV, add LoRA and choose what learns.

    New values (routers, LoRA, parts that no file holds) are drawn from ``recipe.seed``, so every rank builds the same.

    Raises:
        MedPLIBError: listing every path that is missing, or telling what does not fit.
    """
    check_paths(recipe, data=False)
    torch.manual_seed(recipe.seed)
    model, processor = _source(recipe)
    model.config.loss = LossConfig(**asdict(recipe.losses))
    if recipe.data.conversation_turns > 1:  # else the network keeps what it was trained on before
        model.config.conversation_turns = recipe.data.conversation_turns
    processor.settings = replace(processor.settings, template=recipe.data.template, max_length=recipe.data.max_length)
    runs_on = "cuda" if recipe.engine.device != "cpu" and torch.cuda.is_available() else "cpu"
    choose_attention(model, recipe.engine.attention, runs_on)
    quantise_decoder(model, recipe.lora.quantise, runs_on)
    add_lora(model, recipe.lora)
    set_trainable(model, recipe.trainable)
    return model, processor


def check_paths(recipe: Recipe, *, data: bool = True) -> None:
    """Refuse missing starting points and, unless only weights are wanted, missing data; all at once.

    Raises:
        MedPLIBError: naming each missing path and its recipe key.
    """
    problems = path_problems(recipe, data=data)
    if problems:
        raise MedPLIBError(f"stage {recipe.stage} cannot start: {'; '.join(problems)}")


def path_problems(recipe: Recipe, *, data: bool = True) -> list[str]:
    """What ``check_paths`` refuses, a sentence each."""
    named = {f"model.{name}": value for name, value in asdict(recipe.model).items()}
    problems = [] if recipe.model.base else ["model.base is empty; name what the stage starts from"]
    problems += missing_library(recipe.lora.quantise)
    if data:
        named |= _data_paths(recipe)
        problems += [] if recipe.data.images else ["data.images is empty; name the folder of the images"]
    missing = [
        f"{key} is {shown(path, quoted=False)}, which does not exist"
        for key, path in named.items()
        if path and not resolve(path).exists()
    ]
    return problems + missing + _no_checkpoints(recipe) + ([] if missing else _mixtures_to_be_mixed(recipe))


def _no_checkpoints(recipe: Recipe) -> list[str]:
    """What a stage would start from although it is no checkpoint, a sentence each; weights are not read."""
    problems = []
    for key, path in (("base", recipe.model.base), ("grounding", recipe.model.grounding)):
        if path and resolve(path).exists():
            try:
                read_settings(resolve(path))
            except MedPLIBError as error:
                problems.append(f"model.{key} is no checkpoint: {error}")
    return problems


def _mixtures_to_be_mixed(recipe: Recipe) -> list[str]:
    """What stage IV would make a mixture of although it is one, a sentence each."""
    if recipe.stage != 4 or not recipe.model.grounding:
        return []
    return [
        f"model.{key} is {path}, a mixture already; stage 4 makes one of two dense checkpoints, or goes on with the "
        "one that model.base names, with model.grounding= left empty"
        for key, path in (("base", recipe.model.base), ("grounding", recipe.model.grounding))
        if _is_mixture(resolve(path))
    ]


def _is_mixture(directory: Path) -> bool:
    """As far as its configuration says; what cannot be read is told by whoever loads it."""
    try:
        return _config_of(directory).moe.enabled
    except MedPLIBError:
        return False


def _data_paths(recipe: Recipe) -> dict[str, str]:
    """What training reads besides weights, by recipe key."""
    data = recipe.data
    return {
        **{f"data.images[{index}]": path for index, path in enumerate(data.images)},
        **{f"data.validation_images[{index}]": path for index, path in enumerate(data.validation_images)},
        **{f"data.train[{index}]": path for index, path in enumerate(data.train)},
        **{f"data.validation[{index}]": path for index, path in enumerate(data.validation)},
        "engine.deepspeed": recipe.engine.deepspeed,
    }


def _source(recipe: Recipe) -> tuple[MedPLIBForCausalLM, MedPLIBProcessor]:
    source, base = recipe.model, resolve(recipe.model.base)
    dtype = _dtype(recipe)
    towers: dict[str, Any] = {"vision_tower": source.vision_tower or None, "sam": source.sam or None}
    if recipe.stage == 4 and source.grounding:
        sizes = _config_of(base)
        return upcycle(
            base,
            resolve(source.grounding),
            moe=mixture_config(recipe.mixture, sizes.text_config.num_hidden_layers),
            projector=projector_config(recipe.mixture, sizes.projector),
            dtype=dtype,
            **towers,
        )
    projector = resolve(source.projector) if source.projector else None
    if holds_whole_network(base):
        model, processor = load(base, dtype=dtype, **towers)
        if recipe.stage == 4 and not model.config.moe.enabled:
            raise MedPLIBError("stage IV needs model.grounding, the merged grounding model that expert 0 comes from")
        if recipe.stage == 4:
            _tell_unused(recipe.mixture, model.config)
        if projector is not None:
            lay_over(model, projector=projector)
        return model, processor
    if recipe.stage == 4:
        raise MedPLIBError(f"stage IV starts from trained MedPLIB models; {base} is a language model alone")
    model, processor, report = assemble(
        base, projector=projector, sections=read_sizes(source.sizes), dtype=dtype, **towers
    )
    logger.info("%s", report)
    return model, processor


def _tell_unused(mixture: Mixture, config: MedPLIBConfig) -> None:
    """Say which settings of a recipe a mixture that is there already does not take up."""
    wanted, held = asdict(mixture), asdict(config.moe)
    if len(mixture.num_experts) == 1:
        wanted["num_experts"] = mixture.num_experts * len(held["layers"])
    depth = config.text_config.num_hidden_layers
    wanted["layers"] = tuple(sorted(mixture.layers)) or MoEConfig.layers_for(mixture.mode, depth)
    unused = [f"{name} stays {held[name]}" for name in wanted if name in held and held[name] != wanted[name]]
    if unused:
        logger.info("model.base is a mixture already, whose settings are kept: mixture.%s", ", mixture.".join(unused))


def holds_whole_network(directory: Path) -> bool:
    """Whether a directory holds a MedPLIB, native or published, rather than a language model alone."""
    names = find_weights(directory).shapes()
    return any("text_hidden_fcs" in name or name.startswith("model.mask_head.") for name in names)


def mixture_config(mixture: Mixture, depth: int) -> MoEConfig:
    """The mixture of a recipe, for a decoder of ``depth`` layers.

    Raises:
        MedPLIBError: the number of expert counts is neither 1 nor the number of mixture layers.
    """
    layers = tuple(sorted(mixture.layers)) or MoEConfig.layers_for(mixture.mode, depth)
    experts = mixture.num_experts * len(layers) if len(mixture.num_experts) == 1 else mixture.num_experts
    if len(experts) != len(layers):
        raise MedPLIBError(
            f"mixture.num_experts has {len(experts)} numbers for {len(layers)} layers; give one, or one each"
        )
    return MoEConfig(
        layers=layers,
        num_experts=experts,
        top_k=mixture.top_k,
        capacity_factor=mixture.capacity_factor,
        eval_capacity_factor=mixture.eval_capacity_factor,
        min_capacity=mixture.min_capacity,
        random_token_priority=mixture.random_token_priority,
        drop_tokens=mixture.drop_tokens,
        use_residual=mixture.use_residual,
        router_aux_loss_coef=mixture.router_aux_loss_coef,
    )


def projector_config(mixture: Mixture, dense: ProjectorConfig) -> ProjectorConfig | None:
    """The projector as a mixture of ``dense`` ones; None where the recipe keeps it dense."""
    if not mixture.projector_experts:
        return None
    return replace(
        dense,
        type=f"moe_{dense.type}",
        num_experts=mixture.projector_experts,
        top_k=mixture.projector_top_k,
        router_aux_loss_coef=mixture.projector_router_aux_loss_coef,
    )


def _config_of(directory: Path) -> MedPLIBConfig:
    from model.checkpoint.opening import open_checkpoint

    return open_checkpoint(directory).config


def read_sizes(path: str) -> dict[str, Any]:
    """The values of a YAML file of sizes; none without a file."""
    return read_mapping(Path(path), "model.sizes") if path else {}


def _dtype(recipe: Recipe) -> torch.dtype:
    """Type of the weights; the torch engine keeps float32 ones and computes under autocast."""
    bf16 = recipe.engine.precision == "bf16" and recipe.engine.kind == "deepspeed"
    return torch.bfloat16 if bf16 else torch.float32
