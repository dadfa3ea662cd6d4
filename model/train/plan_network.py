"""The network that a recipe would train, without weights: its sizes, which parameters learn, and in which types."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from model.checkpoint.building import empty_network
from model.checkpoint.directories import read_settings, resolve
from model.checkpoint.opening import is_native
from model.checkpoint.published_config import NATIVE_SECTION, text_config
from model.checkpoint.report import understanding
from model.checkpoint.starting_points import read_clip_config
from model.errors import MedPLIBError
from model.modeling.configuration import LossConfig, MedPLIBConfig, MoEConfig
from model.modeling.decoder import MedPLIBDecoderLayer
from model.modeling.medplib import MedPLIBForCausalLM
from model.modeling.moe import MoEFeedForward
from model.processing.special_tokens import SPECIAL_TOKENS
from model.train.quantised import decoder_linears
from model.train.recipe import Recipe
from model.train.starting import mixture_config, projector_config, read_sizes
from model.train.trainable import add_lora, is_lora, native_name, set_trainable
from model.yaml_files import expand, read_mapping

SIZES = Path(__file__).resolve().parents[2] / "configs" / "model"
"""Folder of the sizes that the project knows by name."""
_DEFAULT_SIZES = "7b"


@dataclass(frozen=True)
class Sizes:
    """A network's sizes.

    Attributes:
        config: they themselves, before a stage makes a mixture of it.
        origin: the files they come from.
    """

    config: MedPLIBConfig
    origin: str


@dataclass(frozen=True)
class Weight:
    """One parameter.

    Attributes:
        name: as the network calls it.
        numel: numbers in it.
        rows: its first dimension.
        trained: whether it learns.
        lora: whether it is a LoRA matrix.
        expert: whether it lies in an expert of a decoder's mixture, which ranks may share out.
        quantised: whether ``lora.quantise`` would keep it in few bits.
    """

    name: str
    numel: int
    rows: int
    trained: bool
    lora: bool
    expert: bool
    quantised: bool


def open_environment(path: Path, overrides: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """The environment, with a stand-in for every variable that the recipe wants and nobody set."""
    unset: list[str] = []

    def look(value: Any) -> None:
        if isinstance(value, str):
            expand(value, environment, unset.append)
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            look(item)

    if path.is_file():
        look(read_mapping(path, "recipe"))
    look(list(overrides))
    return {**environment, **{name: f"<{name}>" for name in unset}}


def find_sizes(recipe: Recipe, recipe_path: Path, sizes: Path | None) -> Sizes:
    """Sizes from ``sizes``, else the config.json that the recipe starts from, else those the recipe is named after.

    Args:
        sizes: a YAML file of MedPLIBConfig values, the name of one in configs/model, or a checkpoint's directory.

    Raises:
        MedPLIBError: a file that is there does not hold sizes.
    """
    if sizes is not None:
        return _named_sizes(sizes, recipe)
    base = resolve(recipe.model.base) if recipe.model.base else None
    if base is not None and (base / "config.json").is_file():
        return _directory_sizes(base, recipe)
    if recipe.model.sizes:
        return _file_sizes(Path(recipe.model.sizes), recipe)
    known = {path.stem: path for path in sorted(SIZES.glob("*.yaml"))}
    name = next((part for part in reversed(recipe_path.stem.split("_")) if part in known), _DEFAULT_SIZES)
    if name not in known:
        raise MedPLIBError("no sizes are known for this recipe; give --sizes FILE.yaml or --sizes CHECKPOINT")
    return _file_sizes(known[name], recipe)


def planned_network(recipe: Recipe, config: MedPLIBConfig) -> MedPLIBForCausalLM:
    """What ``starting_network`` gives, on the meta device: the stage's mixture, LoRA, and what learns.

    Raises:
        MedPLIBError: the recipe names parts or layers that this network does not have.
    """
    config = copy.deepcopy(config)
    config.loss = LossConfig(**asdict(recipe.losses))
    if recipe.stage == 4 and not config.moe.enabled:
        config.moe = mixture_config(recipe.mixture, config.text_config.num_hidden_layers)
        config.projector = projector_config(recipe.mixture, config.projector) or config.projector
    network = empty_network(config)
    with torch.device("meta"):
        add_lora(network, replace(recipe.lora, quantise="none"))  # counted by rule, so nothing need be installed
    set_trainable(network, recipe.trainable)
    network.to(device="meta")  # type: ignore[call-arg]
    return network


def network_problems(recipe: Recipe, recipe_path: Path) -> list[str]:
    """Parts that a recipe names and its network does not have, before that is loaded; a sentence each.

    Nothing is said of what a recipe starts from where that cannot be read.
    """
    base = resolve(recipe.model.base)
    if not recipe.model.base or not (base / "config.json").is_file():
        return []
    try:
        planned_network(recipe, find_sizes(recipe, recipe_path, None).config)
    except MedPLIBError as error:
        return [str(error)]
    return []


def weights_of(network: MedPLIBForCausalLM) -> list[Weight]:
    """Every parameter of a planned network."""
    experts = tuple(
        f"{name}.mlp.experts."
        for name, module in network.named_modules()
        if isinstance(module, MedPLIBDecoderLayer) and isinstance(module.mlp, MoEFeedForward)
    )
    quantised = {f"{native_name(f'{name}.')}weight" for name, _ in decoder_linears(network)}
    return [
        Weight(
            name=name,
            numel=parameter.numel(),
            rows=parameter.shape[0] if parameter.dim() else 1,
            trained=parameter.requires_grad,
            lora=is_lora(name),
            expert=name.startswith(experts) if experts else False,
            quantised=not is_lora(name) and native_name(name) in quantised,
        )
        for name, parameter in network.named_parameters()
    ]


def _named_sizes(sizes: Path, recipe: Recipe) -> Sizes:
    if sizes.is_dir():
        return _directory_sizes(resolve(sizes), recipe)
    known = SIZES / f"{sizes}.yaml"
    if not sizes.is_file() and not known.is_file():
        names = ", ".join(path.stem for path in sorted(SIZES.glob("*.yaml")))
        raise MedPLIBError(f"--sizes is {sizes}, expected a YAML file, a checkpoint's directory or one of {names}")
    return _file_sizes(sizes if sizes.is_file() else known, recipe)


def _file_sizes(path: Path, recipe: Recipe) -> Sizes:
    """Sizes of a YAML file; a CLIP directory that is there tells its own."""
    values, origin = read_sizes(str(path)), f"{_short(path)}"
    text = values.get("text_config")
    if isinstance(text, dict) and "vocab_size" not in text:
        values["text_config"] = {**text, "vocab_size": _vocabulary(path)}
    tower = resolve(recipe.model.vision_tower) if recipe.model.vision_tower else None
    if tower is not None and (tower / "config.json").is_file():
        values["vision_config"] = read_clip_config(tower)
        origin = f"{origin} and {tower}"
    with understanding(str(path), "correct its sizes"):
        return Sizes(MedPLIBConfig(**values), origin)


def _vocabulary(path: Path) -> int:
    """Tokens of the sizes' own tokenizer where configs/NAME/pretrain.yaml tells; else LLaMA's, and MedPLIB's."""
    made = path.resolve().parents[1] / path.stem / "pretrain.yaml"
    if made.is_file():
        tokenizer = yaml.safe_load(made.read_bytes()).get("tokenizer") or {}
        return int(tokenizer.get("vocab_size", 32000)) + len(SPECIAL_TOKENS)
    return int(MedPLIBConfig().text_config.vocab_size)


def _directory_sizes(directory: Path, recipe: Recipe) -> Sizes:
    """Sizes of a native checkpoint, of a published one, or of a LLaMA or LLaVA; weights are not read."""
    settings = read_settings(directory)
    origin = f"{directory / 'config.json'}"
    with understanding(origin, "correct it, or give --sizes"):
        if is_native(settings):
            return Sizes(MedPLIBConfig.from_dict(settings), origin)
        if isinstance(settings.get(NATIVE_SECTION), dict):
            return Sizes(MedPLIBConfig(**settings[NATIVE_SECTION]), origin)
        below = _file_sizes(Path(recipe.model.sizes or SIZES / f"{_DEFAULT_SIZES}.yaml"), recipe)
        text = text_config(settings, {}, [])
    published = settings.get("model_type") == "medplib_moe_llama"
    if not published:  # a language model's vocabulary grows by MedPLIB's tokens
        text.vocab_size += len(SPECIAL_TOKENS)
    config = copy.deepcopy(below.config)
    config.text_config = text
    if published and (settings.get("moe") or {}).get("moe_enable") and recipe.stage != 4:
        config.moe = _published_mixture(settings["moe"])
    return Sizes(config, f"{origin} and {below.origin}")


def _published_mixture(settings: Mapping[str, Any]) -> MoEConfig:
    layers = tuple(settings.get("moe_layers_idx") or ())
    experts = tuple(settings.get("num_experts") or ())
    counts = experts * len(layers) if len(experts) == 1 else experts
    return replace(MoEConfig(), layers=layers, num_experts=counts, top_k=int(settings.get("top_k_experts") or 1))


def _short(path: Path) -> str:
    inside = path.resolve()
    root = SIZES.parents[1]
    return str(inside.relative_to(root)) if inside.is_relative_to(root) else str(path)
