"""The network that a stage starts from: its weights (reference §6; §5 for up-cycling), LoRA, QLoRA, and what learns.

Under LoRA the frozen decoder weights may be kept in 8 or 4 bits (QLoRA, Dettmers et al. 2023), by bitsandbytes: the
linear layers of attention, feed-forward networks and experts; routers, projector, embeddings and ``lm_head`` stay. LoRA
is trained against the rounded weights, so merging adds it to those, dequantized: the checkpoint computes what was
trained.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from model.checkpoint import assemble, lay_over, load, upcycle
from model.checkpoint.directories import read_settings, resolve
from model.checkpoint.loading import choose_attention
from model.checkpoint.pretrained import open_checkpoint
from model.checkpoint.shards import find_weights
from model.errors import MedPLIBError, shown
from model.modeling.configuration import LossConfig, MedPLIBConfig, MoEConfig, ProjectorConfig
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.processor import MedPLIBProcessor
from model.settings import read_mapping
from model.train.recipe import LORA_TARGETS, PARTS, Lora, Mixture, Recipe

logger = logging.getLogger(__name__)

Scheme = Literal["none", "int8", "nf4"]

_KEPT = ("residual_coefficient",)  # like routers, a gate of a few numbers that decides much
_OUTLIERS = 6.0
"""On CUDA, int8 rounds activations too, but for those above (LLM.int8's own value); a CPU rounds weights alone."""
_LORA_PARAMETER = re.compile(r"\.lora_[AB]\.")


def starting_network(recipe: Recipe) -> tuple[MedPLIBForCausalLM, MedPLIBProcessor]:
    """Load or assemble what ``recipe.model`` names, up-cycle at stage IV, add LoRA and choose what learns.

    New values (routers, LoRA, parts that no file holds) are drawn from ``recipe.seed``, so every rank builds the same.

    Raises:
        MedPLIBError: listing every path that is missing, or saying what does not fit.
    """
    if problems := path_problems(recipe, data=False):
        raise MedPLIBError(f"stage {recipe.stage} cannot start: {'; '.join(problems)}")
    torch.manual_seed(recipe.seed)
    model, processor = _source(recipe)
    model.config.loss = LossConfig(**asdict(recipe.losses))
    # Whatever the base was trained on: a network that then sees single questions soon answers worse after others.
    model.config.conversation_turns = recipe.data.conversation_turns
    processor.settings = replace(processor.settings, template=recipe.data.template, max_length=recipe.data.max_length)
    runs_on = "cuda" if recipe.engine.device != "cpu" and torch.cuda.is_available() else "cpu"
    choose_attention(model, recipe.engine.attention, runs_on)
    quantize_decoder(model, recipe.lora.quantize, runs_on)
    add_lora(model, recipe.lora)
    set_trainable(model, recipe.trainable)
    return model, processor


def path_problems(recipe: Recipe, *, data: bool = True) -> list[str]:
    """Missing starting points and, unless only weights are wanted, missing data, a sentence each."""
    source, data_set = recipe.model, recipe.data
    named = {f"model.{name}": value for name, value in asdict(source).items()}
    problems = [] if source.base else ["model.base is empty; name what the stage starts from"]
    problems += missing_library(recipe.lora.quantize)
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
    """Log the settings of a recipe that differ from those of the mixture it goes on with."""
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


# --- what learns ------------------------------------------------------------------------------------------------------


def add_lora(model: nn.Module, lora: Lora) -> list[str]:
    """Put LoRA adapters into the network in place, and return the adapted modules; rank 0 adds none.

    Raises:
        MedPLIBError: the targets match nothing.
    """
    if not lora.rank:
        return []
    from peft import LoraConfig, inject_adapter_in_model

    patterns = [re.compile(LORA_TARGETS[target]) for target in lora.targets]
    names = [name for name, _ in model.named_modules() if any(pattern.fullmatch(name) for pattern in patterns)]
    if not names:
        raise MedPLIBError(f"lora.targets ({', '.join(lora.targets)}) match no module of this network")
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names)  # type: ignore[arg-type]
    loaded = {"is_loaded_in_8bit": lora.quantize == "int8", "is_loaded_in_4bit": lora.quantize == "nf4"}  # for peft
    vars(model).update(loaded)
    inject_adapter_in_model(config, model, adapter_name="default")
    for name in loaded:
        delattr(model, name)
    return names


def set_trainable(model: nn.Module, parts: Iterable[str]) -> None:
    """Freeze everything but LoRA weights and the named parts.

    Raises:
        MedPLIBError: a part matches no parameter of this network.
    """
    patterns = {part: re.compile(part.removeprefix("re:") if part.startswith("re:") else PARTS[part]) for part in parts}
    used: set[str] = set()
    for name, parameter in model.named_parameters():
        native = native_name(name)
        matching = [part for part, pattern in patterns.items() if pattern.match(native)]
        used.update(matching)
        if matching and not parameter.is_floating_point():
            raise MedPLIBError(f"trainable names {matching[0]}, but lora.quantize keeps {native} as integers")
        parameter.requires_grad_(bool(matching) or is_lora(name))
    unused = [part for part in patterns if part not in used]
    if unused:
        raise MedPLIBError(f"trainable names {', '.join(unused)}, which this network does not have")


def is_lora(name: str) -> bool:
    """Whether a parameter is a LoRA matrix."""
    return bool(_LORA_PARAMETER.search(name))


def native_name(name: str) -> str:
    """A parameter's name without what LoRA puts in it: ``q_proj.base_layer.weight`` is ``q_proj.weight``."""
    return name.replace(".base_layer.", ".")


def count_trainable(model: nn.Module) -> dict[str, int]:
    """Trainable parameters of each part, LoRA apart, with their ``total``; parts without any are left out."""
    counts: dict[str, int] = {}
    narrow_first = sorted(PARTS, key=lambda part: -len(PARTS[part]))
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        native = native_name(name)
        part = "lora" if is_lora(name) else next((p for p in narrow_first if re.match(PARTS[p], native)), "other")
        size = getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 keeps the true size apart
        size *= getattr(parameter, "ranks_of_experts", 1)  # as many again lie on each of the other ranks
        counts[part] = counts.get(part, 0) + size
    counts["total"] = sum(counts.values())
    return counts


# --- frozen weights in few bits ---------------------------------------------------------------------------------------


def missing_library(scheme: Scheme) -> list[str]:
    """The error where bitsandbytes is wanted and absent; empty otherwise."""
    if scheme == "none" or find_spec("bitsandbytes"):
        return []
    return [
        f"lora.quantize is {scheme}, which needs bitsandbytes, and that is not installed; install the gpu extra "
        "(pip install -e .[gpu]) or set lora.quantize=none"
    ]


def quantize_decoder(network: nn.Module, scheme: Scheme, device: str) -> None:
    """Quantize the decoder's linear layers in place, one at a time, before LoRA is added; they stay on ``device``.

    ``int8`` has a scale per output, ``nf4`` 4 bits, a scale per 64 weights, and those scales in 8 bits.

    Raises:
        MedPLIBError: bitsandbytes is not installed.
    """
    if scheme == "none":
        return
    if problems := missing_library(scheme):
        raise MedPLIBError(problems[0])
    for name, linear in list(decoder_linears(network)):
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, _rounded(linear, scheme, device).to(device))


def is_quantized(network: nn.Module) -> bool:
    """Whether ``quantize_decoder`` rounded weights of this network."""
    return any(_is_rounded(module) for module in network.modules())


@torch.no_grad()
def merge_quantized(network: nn.Module) -> None:
    """Turn quantized layers, and LoRA on them, back into plain linear layers on the CPU, in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.integrations import dequantize_bnb_weight

    dtype = network.get_parameter("lm_head.weight").dtype
    for name, module in list(network.named_modules()):
        adapted = isinstance(module, BaseTunerLayer)
        base = module.get_base_layer() if adapted else module
        if not _is_rounded(base) or (not adapted and name.endswith(".base_layer")):
            continue
        layer: Any = base
        weight = dequantize_bnb_weight(layer.weight, state=getattr(layer, "state", None)).detach().float().clone()
        if adapted:
            for adapter in module.active_adapters:
                weight += module.get_delta_weight(adapter).float()
        parent, _, child = name.rpartition(".")
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None, device="meta")
        plain.weight = nn.Parameter(weight.to(dtype).cpu(), requires_grad=False)
        if layer.bias is not None:
            plain.bias = nn.Parameter(layer.bias.detach().cpu(), requires_grad=False)
        setattr(network.get_submodule(parent), child, plain)


def decoder_linears(network: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers that ``quantize_decoder`` rounds, by name."""
    root = "model.decoder.layers"
    for name, module in network.get_submodule(root).named_modules(prefix=root):
        if type(module) is nn.Linear and name.rpartition(".")[2] not in _KEPT:
            yield name, module


def _rounded(linear: nn.Linear, scheme: Scheme, device: str) -> nn.Module:
    import bitsandbytes

    layers: Any = bitsandbytes.nn
    sizes = (linear.in_features, linear.out_features, linear.bias is not None)
    if scheme == "int8":
        threshold = 0.0 if device == "cpu" else _OUTLIERS
        layer = layers.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=threshold, device="meta")
        layer.weight = layers.Int8Params(linear.weight.detach(), requires_grad=False, has_fp16_weights=False)
    else:
        layer = layers.Linear4bit(*sizes, compute_dtype=linear.weight.dtype, quant_type="nf4", device="meta")
        layer.support_avx512bf16_for_cpu = False  # it would round the scales anew at the first validation
        layer.weight = layers.Params4bit(linear.weight.detach(), requires_grad=False, quant_type="nf4", module=layer)
    layer.bias = linear.bias
    return layer


def _is_rounded(module: nn.Module) -> bool:
    return type(module).__module__.startswith("bitsandbytes.") and hasattr(module, "weight")
