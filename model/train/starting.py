"""Build the network that a stage starts from (reference §6, and §5 for stage IV's up-cycling)."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import assemble, lay_over, load, upcycle
from model.checkpoint.directories import read_settings, resolve
from model.checkpoint.loading import choose_attention
from model.checkpoint.pretrained import open_checkpoint
from model.checkpoint.shards import find_weights
from model.errors import MedPLIBError, shown
from model.modeling.configuration import LossConfig, MedPLIBConfig, MoEConfig, ProjectorConfig
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.processor import MedPLIBProcessor
from model.train.recipe import Mixture, Recipe
from model.train.trainable import add_lora, missing_library, quantise_decoder, set_trainable
from model.yaml_files import read_mapping

logger = logging.getLogger(__name__)


def starting_network(recipe: Recipe) -> tuple[MedPLIBForCausalLM, MedPLIBProcessor]:
    """Load or assemble what ``recipe.model`` names, up-cycle at stage IV, add LoRA and choose what learns.

    New values (routers, LoRA, parts that no file holds) are drawn from ``recipe.seed``, so every rank builds the same.

    Raises:
        MedPLIBError: listing every path that is missing, or saying what does not fit.
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
    source, data_set = recipe.model, recipe.data
    named = {f"model.{name}": value for name, value in asdict(source).items()}
    problems = [] if source.base else ["model.base is empty; name what the stage starts from"]
    problems += missing_library(recipe.lora.quantise)
    if data:
        for key in ("images", "validation_images", "train", "validation"):
            named |= {f"data.{key}[{index}]": path for index, path in enumerate(getattr(data_set, key))}
        named["engine.deepspeed"] = recipe.engine.deepspeed
        problems += [] if data_set.images else ["data.images is empty; name the folder of the images"]
    missing = [
        f"{key} is {shown(path, quoted=False)}, which does not exist"
        for key, path in named.items()
        if path and not resolve(path).exists()
    ]
    problems += missing
    starts = {"base": source.base, "grounding": source.grounding}
    for key, path in starts.items():  # weights are not read
        if path and resolve(path).exists():
            try:
                read_settings(resolve(path))
            except MedPLIBError as error:
                problems.append(f"model.{key} is no checkpoint: {error}")
    if not missing and recipe.stage == 4 and source.grounding:
        for key, path in starts.items():
            with suppress(MedPLIBError):  # the loader reports what cannot be read
                if open_checkpoint(resolve(path)).config.moe.enabled:
                    problems.append(
                        f"model.{key} is {path}, a mixture already; stage 4 makes one of two dense checkpoints, or "
                        "goes on with the one that model.base names, with model.grounding= left empty"
                    )
    return problems


def _source(recipe: Recipe) -> tuple[MedPLIBForCausalLM, MedPLIBProcessor]:
    source, base = recipe.model, resolve(recipe.model.base)
    # The torch engine keeps float32 weights and computes under autocast.
    bf16 = recipe.engine.precision == "bf16" and recipe.engine.kind == "deepspeed"
    dtype = torch.bfloat16 if bf16 else torch.float32
    towers: dict[str, Any] = {"vision_tower": source.vision_tower or None, "sam": source.sam or None}
    if recipe.stage == 4 and source.grounding:
        sizes = open_checkpoint(base).config
        return upcycle(
            base,
            resolve(source.grounding),
            moe=mixture_config(recipe.mixture, sizes.text_config.num_hidden_layers),
            projector=projector_config(recipe.mixture, sizes.projector),
            dtype=dtype,
            **towers,
        )
    projector = resolve(source.projector) if source.projector else None
    names = find_weights(base).shapes()  # of a MedPLIB, or of a language model alone
    if any("text_hidden_fcs" in name or name.startswith("model.mask_head.") for name in names):
        model, processor = load(base, dtype=dtype, **towers)
        if recipe.stage == 4 and not model.config.moe.enabled:
            raise MedPLIBError("stage IV needs model.grounding, the merged grounding model that expert 0 comes from")
        if recipe.stage == 4:
            _log_unused(recipe.mixture, model.config)
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


def _log_unused(mixture: Mixture, config: MedPLIBConfig) -> None:
    """Say which settings of a recipe a mixture that is there already does not take up."""
    wanted, held = asdict(mixture), asdict(config.moe)
    if len(mixture.num_experts) == 1:
        wanted["num_experts"] = mixture.num_experts * len(held["layers"])
    depth = config.text_config.num_hidden_layers
    wanted["layers"] = tuple(sorted(mixture.layers)) or MoEConfig.layers_for(mixture.mode, depth)
    unused = [f"{name} stays {held[name]}" for name in wanted if name in held and held[name] != wanted[name]]
    if unused:
        logger.info("model.base is a mixture already, whose settings are kept: mixture.%s", ", mixture.".join(unused))


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
    shared = {name: value for name, value in asdict(mixture).items() if name in MoEConfig.__dataclass_fields__}
    return MoEConfig(**{**shared, "layers": layers, "num_experts": experts})


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


def read_sizes(path: str) -> dict[str, Any]:
    """The values of a YAML file of sizes; none without a file."""
    return read_mapping(Path(path), "model.sizes") if path else {}
