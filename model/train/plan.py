"""``medplib plan``: memory of a training run by part from its recipe alone, and the settings that would make it fit.

Parameters are counted on a network without storage; activations are a formula. ``scripts/bench/plan.py`` compares both
with measured steps.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from model import shipped
from model.errors import MedPLIBError

if TYPE_CHECKING:
    from model.modeling.configuration import MedPLIBConfig
    from model.modeling.medplib import MedPLIBForCausalLM
    from model.train.recipe import Recipe

GIB = 2**30
_SIZES = shipped("configs/model")
_QUANTIZED_BYTES = {"int8": 1.0, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}  # a byte a block of 64, 4 bytes per 256 blocks
_CONTEXT, _FRAGMENTATION, _PROCESS, _LOADER = 1.0 * GIB, 0.05, 3.0 * GIB, 0.5 * GIB  # assumed, see docs/scale.md
_SLOWER: Mapping[str, Mapping[Any, float]] = {  # time of a step: rules of thumb that put advice in order
    "engine.gradient_checkpointing": {False: 1.0, True: 1.33},
    "engine.zero_stage": {0: 1.0, 1: 1.0, 2: 1.03, 3: 1.3},
    "engine.offload": {"none": 1.0, "optimizer": 1.4, "all": 3.0},
    "lora.quantize": {"none": 1.0, "int8": 1.6, "nf4": 1.35},
}


@dataclass(frozen=True)
class Machine:
    """GPUs of each node (one process each), nodes, and bytes of each GPU and of each node."""

    gpus: int
    nodes: int = 1
    gpu_memory: float = 24.0 * GIB
    host_memory: float = 256.0 * GIB
    device: str = "cuda"

    @property
    def ranks(self) -> int:
        """Processes of the run."""
        return self.gpus * self.nodes


class Records(NamedTuple):
    """The longest record: text tokens (its image counts as one), those with a loss, masks, side of its image in px."""

    tokens: int
    supervised: int
    masks: int
    image_size: int


class Weight(NamedTuple):
    """One parameter of the network."""

    name: str
    numel: int
    rows: int
    trained: bool
    lora: bool
    expert: bool
    quantized: bool


@dataclass(frozen=True)
class Memory:
    """Bytes: of each GPU by part in (backward pass, optimizer step), of each node, and of the run folder."""

    parts: Mapping[str, tuple[float, float]]
    host: Mapping[str, float]
    disk: Mapping[str, float]

    @property
    def moments(self) -> tuple[float, float]:
        """Bytes on a GPU in the backward pass and in the optimizer step."""
        return sum(part[0] for part in self.parts.values()), sum(part[1] for part in self.parts.values())

    def fits(self, machine: Machine) -> bool:
        """Whether GPUs and hosts have the memory."""
        return max(self.moments) <= machine.gpu_memory and sum(self.host.values()) <= machine.host_memory


class Planner:
    """Memory of a recipe and of its variants; its network is counted once.

    Raises:
        MedPLIBError: the recipe names parts that the network does not have.
    """

    def __init__(self, recipe: Recipe, config: MedPLIBConfig, records: Records) -> None:
        from model.train.init_weights import decoder_linears, is_lora, native_name

        self.config, self.records = config, records
        network = planned_network(recipe, config)
        quantized = {f"{native_name(f'{name}.')}weight" for name, _ in decoder_linears(network)}
        self.weights = [
            Weight(
                name,
                parameter.numel(),
                parameter.shape[0] if parameter.dim() else 1,
                parameter.requires_grad,
                is_lora(name),
                ".decoder.layers." in name and ".mlp.experts." in name,
                not is_lora(name) and native_name(name) in quantized,
            )
            for name, parameter in network.named_parameters()
        ]

    def memory(self, recipe: Recipe, machine: Machine) -> Memory:
        """Bytes of each GPU, node and run folder; what DeepSpeed 0.19 keeps was read off its tensors."""
        from model.train.engine import deepspeed_config

        recipe = recipe.resolved(machine.ranks)
        engine, on_cpu = recipe.engine, machine.device == "cpu"
        deepspeed, accumulates = recipe.engine.kind == "deepspeed", recipe.schedule.accumulation > 1
        stage, ranks, experts = engine.zero_stage if deepspeed else 0, machine.ranks, engine.expert_parallel
        bf16 = deepspeed and engine.precision == "bf16"
        size, zero = (2 if bf16 else 4), deepspeed_config(recipe)["zero_optimization"] if deepspeed else {}
        to_host, weights_to_host = "offload_optimizer" in zero, "offload_param" in zero
        learning = [weight for weight in self.weights if weight.trained]

        def held(weights: Sequence[Weight]) -> float:  # numbers on a rank that has its share of the experts
            return sum(weight.numel / (experts if weight.expert else 1) for weight in weights)

        def stored(weight: Weight) -> float:
            if weight.trained or not weight.quantized or recipe.lora.quantize == "none":
                return weight.numel * size
            scales = 4 * weight.rows if recipe.lora.quantize == "int8" else 0
            return weight.numel * _QUANTIZED_BYTES[recipe.lora.quantize] + scales

        split = ranks if stage else 1
        trained, everything = held(learning), held(self.weights)
        shared = sum(weight.numel for weight in learning) / split  # with optimizer state on this rank
        largest = max((weight.numel for weight in learning), default=0)
        groups: dict[tuple[bool, bool], float] = {}  # updated one by one
        for weight in learning:
            kind = (weight.lora, weight.expert and experts > 1)
            groups[kind] = groups.get(kind, 0.0) + weight.numel / split
        group = max(groups.values(), default=0.0)
        frozen = sum(stored(w) / (experts if w.expert else 1) for w in self.weights if not w.trained)
        spread = ranks if stage == 3 else 1
        frozen, ours = frozen / spread, trained * size / spread
        master = 4 if deepspeed and (stage or bf16) else 0
        optimizer = shared * (master + 8)

        # Gradients where activations are at their most (only of what the backward pass begins with), and at its end.
        first = sum(w.numel for w in learning if w.name.startswith(("lm_head.", "model.mask_head.", "model.sam.")))
        whole, share = trained * size, 0.0 if to_host else shared * size
        if stage == 0:
            early, late = whole if accumulates else first * size, whole
        elif stage == 3:
            early = late = share
        else:
            early = whole if stage == 1 and accumulates else share
            whole_late = stage == 1 and (accumulates or not zero.get("overlap_comm"))
            late = whole + share * accumulates if whole_late else share * (1 + accumulates)

        # Buckets, gathered weights, and gradients copied for the update.
        bucket = float(zero.get("reduce_bucket_size", 5e8)) * size
        moving, staying = 0.0, 0.0
        if deepspeed and stage == 0:
            moving = min(whole, 5e8 * size)
        elif stage == 3:
            live = min(everything, float(zero.get("stage3_max_live_parameters", 1e9)))
            ahead = min(everything, 2 * float(zero.get("stage3_prefetch_bucket_size", 5e7)))
            threshold = float(zero.get("stage3_param_persistence_threshold", 1e5))
            small = sum(weight.numel for weight in self.weights if weight.numel < threshold) * (1 - 1 / ranks)
            moving, staying = (live + ahead + min(small, everything - live)) * size + bucket, bucket
        elif deepspeed:
            staying = largest * size if to_host else 0.0
            moving = bucket * zero.get("contiguous_gradients", True) * (2 if zero.get("overlap_comm") else 1) + staying
        copies = 4 if bf16 else 0
        if to_host:
            update = 0.0
        elif stage == 0:
            update = trained * (size + copies) + 8 * largest * on_cpu
        elif stage == 3:
            group = min(group, float(zero.get("sub_group_size", 1e9)))
            update = shared * size + (4 + 8 * on_cpu) * group
        else:  # a CPU's AdamW makes its intermediate values for a whole group at once
            update = shared * size + max(group * (size + copies), (12 - size) * group * on_cpu)

        peak, tail = self._activations(recipe, machine)
        if engine.precision == "bf16" and not deepspeed:  # autocast's copies: all weights, or what learns and the head
            copied = [one for one in self.weights if re.match(r"lm_head\.|model\.decoder\.layers\.", one.name)]
            peak += 2 * sum(one.numel for one in copied if one.trained or not engine.gradient_checkpointing)
        quantized = [weight.numel for weight in self.weights if weight.quantized and recipe.lora.quantize != "none"]
        alive, gradients = max((peak + 2.0 * max(quantized, default=0), early), (tail, late), key=sum)
        parts: dict[str, tuple[float, float]] = {
            "weights, frozen": (0.0 if weights_to_host else frozen,) * 2,
            "weights, trained": (0.0 if weights_to_host else ours,) * 2,
            "optimiser": (0.0 if to_host else optimizer,) * 2,
            "gradients": (gradients, update),
            "activations": (alive, 0.0),
            "buffers": (moving, staying),
        }
        if not on_cpu:
            passing = [parts[name] for name in ("gradients", "activations", "buffers")]
            backward, step = map(sum, zip(*passing, strict=True))
            parts["fragmentation"] = (_FRAGMENTATION * backward, _FRAGMENTATION * step)
            parts["CUDA context"] = (_CONTEXT, _CONTEXT)

        loaded = float(sum(weight.numel for weight in self.weights) * size)
        host = {"processes": _PROCESS, "loader workers": _LOADER * recipe.data.workers}
        if to_host:
            in_flight = size if stage == 3 else size * (3 if accumulates else 2)
            host["optimiser and gradients"] = shared * (16 + in_flight)
            host["weights"] = frozen + ours if weights_to_host else 0.0
            loaded = max(0.0, loaded - host["optimiser and gradients"] - host["weights"])  # they come after it
        host["network while it loads"] = loaded
        one = sum(weight.numel for weight in learning) * (2 * size + master + 8)
        result = sum(weight.numel for weight in self.weights if not weight.lora) * size
        return Memory(
            {name: part for name, part in parts.items() if any(part)},
            {name: each * machine.gpus for name, each in host.items() if each},
            {"checkpoints": one * (recipe.saving.keep + 1), "result": result * (1 + recipe.saving.published)},
        )

    def _activations(self, recipe: Recipe, machine: Machine) -> tuple[float, float]:
        """Bytes that a pass keeps for its backward pass at their most, and when the decoder's are gone again."""
        text, vision, sam = self.config.text_config, self.config.vision_config, self.config.sam_config
        engine, batch, records = recipe.engine, recipe.schedule.batch_size, self.records
        width, inner, heads = text.hidden_size, text.intermediate_size, text.num_attention_heads
        a = 4.0 if engine.precision == "fp32" else 2.0 if engine.kind == "deepspeed" else 3.0  # autocast: norms in fp32
        again, visual = engine.gradient_checkpointing, self.config.vision_grid**2
        length = records.tokens + visual - 1
        tokens = batch * length

        names = [one.name for one in self.weights if one.trained and not one.lora]

        def learns(pattern: str) -> bool:
            return any(re.search(pattern, name) for name in names)

        def encoder(rows: int, depth: int, own: int, wide: int, share: float) -> float:  # of an image, kept
            return rows * a * (depth * own + 9 * own + 3 * wide if again else depth * share * (9 * own + 3 * wide))

        # A decoder layer, by token. Norms: input in float32, and output; queries, keys, values, output of attention.
        attention, feed_forward = learns("self_attn"), learns(r"decoder.layers.*mlp.*_proj")
        layer = 2 * width * (4 + a * learns("decoder.layers.*layernorm")) + a * width * (attention + feed_forward)
        layer += 4 * a * width + 4 * heads
        passing = 2 * a * inner + 3 * a * width  # gradients on their way through a layer
        if engine.attention == "eager":
            layer += heads * length * (a if a == 4 else a + 4)  # softmax in float32
            passing += heads * length * a
        elif engine.attention == "sdpa" and batch > 1:
            layer += a * length  # the padding mask as numbers
        block = a * inner * (3 + feed_forward)  # gate before and after SiLU, up, their product
        dropped = a + (a if machine.device == "cpu" else 1)  # LoRA's input after dropout, and dropout's mask
        for target in recipe.lora.targets if recipe.lora.rank else ():
            if target in ("gate", "up", "down"):
                block += dropped * (inner if target == "down" else width)
            else:
                layer += dropped * width
        top_k = recipe.mixture.top_k if recipe.stage == 4 else 0
        layer += block * max(top_k, 1) + 3 * a * width * top_k
        kept = text.num_hidden_layers * (a * width if again else layer)

        # Around the decoder: embeddings, final norm; features, projector; masks; logits of supervised tokens.
        around = tokens * 3 * a * width + batch * visual * a * (2 * vision.hidden_size + 3 * width)
        towers = masks = 0.0
        if learns("vision_tower"):
            wide = vision.intermediate_size
            towers += batch * encoder(visual + 1, vision.num_hidden_layers, vision.hidden_size, wide, 1)
        if records.masks:
            seen, side = sam.vision_config, sam.vision_config.image_size // sam.vision_config.patch_size
            if learns("sam.image_encoder"):
                towers += batch * encoder(side**2, seen.num_hidden_layers, seen.hidden_size, seen.mlp_dim, 0.5)
            masks = batch * records.masks * 4.0 * (20 * side**2 * seen.output_channels + 6 * records.image_size**2)
        head = batch * records.supervised * (text.vocab_size * (8 if a == 4 else 8 + a) + 2 * a * width)
        peak = tokens * kept + around + towers + max(tokens * (layer * again + passing), head + masks)
        return peak, towers + 3 * a * text.vocab_size * width * learns("embed_tokens")


# --- the network that a recipe trains ---------------------------------------------------------------------------------


def find_sizes(recipe: Recipe, recipe_path: Path, sizes: Path | None = None) -> tuple[MedPLIBConfig, str]:
    """Sizes of a recipe's network and where they come from: ``sizes``, else its starting checkpoint, else its name.

    ``sizes`` is a YAML file of MedPLIBConfig values, the name of one in configs/model, or a checkpoint's directory.

    Raises:
        MedPLIBError: a file that is there does not hold sizes.
    """
    from model.checkpoint.directories import read_settings, resolve
    from model.checkpoint.pretrained import is_native, read_clip_config
    from model.checkpoint.published_config import NATIVE_SECTION, text_config
    from model.checkpoint.report import understanding
    from model.modeling.configuration import MedPLIBConfig
    from model.processing.special_tokens import SPECIAL_TOKENS
    from model.train.init_weights import read_sizes

    def of_file(path: Path) -> tuple[MedPLIBConfig, str]:
        path = path.resolve()
        values, own = read_sizes(str(path)), path.parents[1] / path.stem / "pretrain.yaml"
        if isinstance(text := values.get("text_config"), dict) and "vocab_size" not in text and own.is_file():
            tokens = (read_sizes(str(own)).get("tokenizer") or {}).get("vocab_size", 32000)
            values["text_config"] = {**text, "vocab_size": tokens + len(SPECIAL_TOKENS)}
        if recipe.model.vision_tower and (Path(recipe.model.vision_tower) / "config.json").is_file():
            values["vision_config"] = read_clip_config(Path(recipe.model.vision_tower))
        root = _SIZES.parents[1]
        with understanding(str(path), "correct its sizes"):
            return MedPLIBConfig(**values), str(path.relative_to(root) if path.is_relative_to(root) else path)

    known = {path.stem: path for path in sorted(_SIZES.glob("*.yaml"))}
    base = resolve(recipe.model.base) if recipe.model.base else Path()
    fallback = Path(recipe.model.sizes) if recipe.model.sizes else known["7b"]
    if sizes is not None:
        place = sizes if sizes.exists() else known.get(str(sizes))
        if place is None:
            names = ", ".join(known)
            raise MedPLIBError(f"--sizes is {sizes}, expected a YAML file, a checkpoint's directory or one of {names}")
    elif (base / "config.json").is_file():
        place = base
    else:
        named = next((part for part in reversed(recipe_path.stem.split("_")) if part in known), "7b")
        place = fallback if recipe.model.sizes else known[named]
    if not place.is_dir():
        return of_file(place)
    settings, origin = read_settings(resolve(place)), str(resolve(place) / "config.json")
    with understanding(origin, "correct it, or give --sizes"):
        if is_native(settings):
            return MedPLIBConfig.from_dict(settings), origin
        if isinstance(settings.get(NATIVE_SECTION), dict):
            return MedPLIBConfig(**settings[NATIVE_SECTION]), origin
        config, other = of_file(fallback)
        config.text_config = text_config(settings, {}, [])
        moe = settings.get("moe") or {}
        if settings.get("model_type") != "medplib_moe_llama":  # a language model's vocabulary grows by our tokens
            config.text_config.vocab_size += len(SPECIAL_TOKENS)
        elif moe.get("moe_enable") and recipe.stage != 4:
            layers, experts = tuple(moe.get("moe_layers_idx") or ()), tuple(moe.get("num_experts") or ())
            experts = experts * len(layers) if len(experts) == 1 else experts
            top_k = int(moe.get("top_k_experts") or 1)
            config.moe = replace(config.moe, layers=layers, num_experts=experts, top_k=top_k)
        return config, f"{origin} and {other}"


def planned_network(recipe: Recipe, config: MedPLIBConfig) -> MedPLIBForCausalLM:
    """What training starts with, on the meta device: the stage's mixture, LoRA, and what learns.

    Raises:
        MedPLIBError: the recipe names parts or layers that this network does not have.
    """
    import torch

    from model.checkpoint.loading import init_empty
    from model.train.init_weights import add_lora, mixture_config, projector_config, set_trainable

    config = copy.deepcopy(config)
    if recipe.stage == 4 and not config.moe.enabled:
        config.moe = mixture_config(recipe.mixture, config.text_config.num_hidden_layers)
        config.projector = projector_config(recipe.mixture, config.projector) or config.projector
    network = init_empty(config)
    with torch.device("meta"):
        add_lora(network, replace(recipe.lora, quantize="none"))  # counted by rule, so nothing need be installed
    set_trainable(network, recipe.trainable)
    return network


def network_problems(recipe: Recipe, recipe_path: Path) -> list[str]:
    """Parts that a recipe names and its network does not have, before that is loaded; none where it cannot be read."""
    from model.checkpoint.directories import resolve

    try:
        if recipe.model.base and (resolve(recipe.model.base) / "config.json").is_file():
            planned_network(recipe, find_sizes(recipe, recipe_path)[0])
    except MedPLIBError as error:
        return [str(error)]
    return []


# --- advice ---------------------------------------------------------------------------------------------------------


class Change(NamedTuple):
    """A variant of a recipe: its overrides, itself, its memory, and about how many times as long its step lasts."""

    overrides: tuple[str, ...]
    recipe: Recipe
    memory: Memory
    slower: float

    def plain(self) -> dict[str, Any]:
        """What the command prints of it."""
        peak = round(max(self.memory.moments))
        return {"overrides": list(self.overrides), "peak": peak, "slower": round(self.slower, 2)}


def advise(planner: Planner, recipe: Recipe, machine: Machine, most: int = 4) -> list[Change]:
    """The few changes at the same global batch that make a recipe fit, cheapest first; the best of each set of keys."""
    from model.train.recipe import check_values

    engine, lora, schedule, gpu = recipe.engine, recipe.lora, recipe.schedule, machine.device != "cpu"
    deepspeed, offloads, schemes = engine.kind == "deepspeed", ["none", "optimizer", "all"], ["none", "int8", "nf4"]
    shares = {1, *(n for n in range(2, min(recipe.mixture.num_experts) + 1) if machine.ranks % n == 0)}
    found: list[Change] = []
    for batch, again, stage, offload, scheme, share in itertools.product(
        [schedule.batch_size // 2**n for n in range(20) if schedule.batch_size % 2**n == 0],
        {engine.gradient_checkpointing, True},
        range(engine.zero_stage, 4) if deepspeed else [engine.zero_stage],
        offloads[offloads.index(engine.offload) :] if deepspeed and gpu else [engine.offload],
        schemes if lora.rank and lora.quantize == "none" and gpu else [lora.quantize],
        shares if recipe.stage == 4 and deepspeed and engine.expert_parallel == 1 else [engine.expert_parallel],
    ):
        after: dict[str, Any] = {
            "schedule.batch_size": batch,
            "schedule.accumulation": schedule.accumulation * schedule.batch_size // batch,
            "engine.expert_parallel": share,
            "engine.gradient_checkpointing": again,
            "engine.zero_stage": stage,
            "engine.offload": offload,
            "lora.quantize": scheme,
        }
        sections: dict[str, Any] = {}
        for key, value in after.items():
            section, name = key.split(".")
            sections[section] = replace(sections.get(section) or getattr(recipe, section), **{name: value})
        variant = replace(recipe, **sections)
        before = {key: attrgetter(key)(recipe) for key in after}
        overrides = tuple(f"{key}={str(after[key]).lower()}" for key in after if after[key] != before[key])
        if overrides and not check_values(variant):
            slower = 1.04 ** math.log2(schedule.batch_size / batch) * (1.15 if share > engine.expert_parallel else 1.0)
            slower *= math.prod(times[after[key]] / times[before[key]] for key, times in _SLOWER.items())
            found.append(Change(overrides, variant, planner.memory(variant, machine), slower))
    chosen: dict[frozenset[str], Change] = {}
    for change in sorted(found, key=lambda one: (one.slower, len(one.overrides), max(one.memory.moments))):
        small = any({*other.overrides} <= {*change.overrides} for other in chosen.values())
        if change.memory.fits(machine) and not small:
            chosen.setdefault(frozenset(text.partition("=")[0] for text in change.overrides), change)
    return list(chosen.values())[:most]


def more_gpus(planner: Planner, recipe: Recipe, machine: Machine) -> tuple[Machine, Change | None] | None:
    """The fewest GPUs, by doubling up to 64, on which a recipe fits: as it is (no change), or with the cheapest one."""
    records = recipe.schedule.batch_size * recipe.schedule.accumulation * machine.ranks
    while machine.ranks * 2 <= 64:
        less = machine.gpus < 8
        machine = replace(machine, gpus=machine.gpus * (1 + less), nodes=machine.nodes * (2 - less))
        each, left = divmod(records, machine.ranks)
        if left or not each:
            return None
        batch = next(size for size in range(min(recipe.schedule.batch_size, each), 0, -1) if each % size == 0)
        schedule = replace(recipe.schedule, batch_size=batch, accumulation=each // batch)
        recipe = replace(recipe, schedule=schedule, engine=replace(recipe.engine, kind="deepspeed"))
        if planner.memory(recipe, machine).fits(machine):
            return machine, None
        if found := advise(planner, recipe, machine, 1):
            return machine, found[0]
    return None


# --- the command ----------------------------------------------------------------------------------------------------


def add_plan_command(commands: argparse._SubParsersAction) -> None:
    """``medplib plan RECIPE [key=value …] --gpus N --gpu-mem GIB``."""

    def above_0(read: type, most: float) -> Any:
        def number(text: str) -> Any:
            value = read(text)
            if not 0 < value <= most or math.isinf(value):
                raise argparse.ArgumentTypeError(f"expected a number above 0, at most {most:g}, got {text!r}")
            return value

        return number

    plan = commands.add_parser(
        "plan",
        help="say whether a training recipe fits into memory",
        description="Estimate the memory of a training run; neither weights nor data nor a GPU are needed. "
        "Exit code 0 if it fits, 1 if it does not, 2 after wrong input.",
    )
    plan.add_argument("recipe", type=Path, help="YAML file; the project's own are in configs/stages")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="recipe values, as for medplib train")
    for flag, default, metavar, what in (
        ("--gpus", None, "N", "GPUs of each node"),
        ("--nodes", 1, "M", "nodes (default 1)"),
        ("--gpu-mem", 24.0, "GIB", "memory of each GPU (default 24)"),
        ("--host-mem", 256.0, "GIB", "memory of each node (default 256)"),
        ("--length", None, "TOKENS", "longest record; data.max_length when absent"),
        ("--image-size", 512, "PX", "side of images on disk (default 512)"),
        ("--supervised", 0.5, "SHARE", "tokens that carry a loss (default 0.5)"),
    ):
        number: Any = above_0(float if isinstance(default, float) else int, 1 if metavar == "SHARE" else math.inf)
        plan.add_argument(flag, type=number, required=flag == "--gpus", default=default, metavar=metavar, help=what)
    plan.add_argument("--sizes", type=Path, metavar="WHAT", help="7b, nano, a YAML file, or a checkpoint's folder")
    plan.add_argument("--json", action="store_true", help="print one JSON object, bytes in all of it")
    plan.set_defaults(run=run_plan)


def run_plan(options: argparse.Namespace) -> int:
    """The command: exit 1 when the recipe does not fit."""
    from model.train.recipe import load_recipe

    given = re.sub(r"#.*", "", options.recipe.read_text(encoding="utf-8")) if options.recipe.is_file() else ""
    unset = sorted({*re.findall(r"\$\{(?:oc\.env:)?(\w+)\}", "\n".join([given, *options.overrides]))} - {*os.environ})
    recipe = load_recipe(options.recipe, options.overrides, {**os.environ, **{name: f"<{name}>" for name in unset}})
    device = "cpu" if recipe.engine.device == "cpu" else "cuda"
    machine = Machine(options.gpus, options.nodes, options.gpu_mem * GIB, options.host_mem * GIB, device)
    recipe = recipe.resolved(machine.ranks)
    if recipe.engine.kind == "torch" and machine.ranks > 1:
        raise MedPLIBError(
            f"engine.kind=torch trains in one process, but there are {machine.ranks} GPUs; use engine.kind=deepspeed"
        )
    config, origin = find_sizes(recipe, options.recipe, options.sizes)
    planner = Planner(recipe, config, records_of(recipe, options.length, options.supervised, options.image_size))
    memory = planner.memory(recipe, machine)
    fits, moment = memory.fits(machine), memory.moments.index(max(memory.moments))
    changes = [] if fits else advise(planner, recipe, machine)
    more = None if fits or changes else more_gpus(planner, recipe, machine)
    plan = {
        "fits": fits,
        "peak": round(max(memory.moments)),
        "gpu_memory": round(machine.gpu_memory),
        "largest": max(memory.parts, key=lambda name: memory.parts[name][moment]),
        "parts": [{"name": n, "backward": round(b), "update": round(u)} for n, (b, u) in memory.parts.items()],
        "host": {name: round(size) for name, size in memory.host.items()},
        "disk": {name: round(size) for name, size in memory.disk.items()},
        "weights": sum(weight.numel for weight in planner.weights),
        "trained": sum(weight.numel for weight in planner.weights if weight.trained),
        "records_per_step": recipe.schedule.batch_size * recipe.schedule.accumulation * machine.ranks,
        "steps": _steps(recipe, machine),
        "sizes": origin,
        "records": planner.records._asdict(),
        "unset": unset,
        "changes": [change.plain() for change in changes],
        "fits_on": more and {"gpus": more[0].gpus, "nodes": more[0].nodes, "change": more[1] and more[1].plain()},
    }
    text = json.dumps(plan, indent=2) if options.json else "\n".join(_lines(plan, recipe, machine, memory))
    sys.stdout.write(f"{text}\n")
    return int(not fits)


def records_of(recipe: Recipe, tokens: int | None = None, supervised: float = 0.5, image_size: int = 512) -> Records:
    """The longest records of a recipe; those of stages III and IV have a mask."""
    tokens = min(tokens or recipe.data.max_length, recipe.data.max_length)
    losses = max(1, min(tokens - 1, math.ceil(tokens * supervised)))
    return Records(tokens, losses, int(recipe.stage > 2), image_size)


def _steps(recipe: Recipe, machine: Machine) -> int | None:
    """Optimizer steps of the run; None where its records are not here."""
    from model.data.records import open_records

    paths = [Path(path) for path in recipe.data.train]
    if not paths or not all(path.is_file() for path in paths):
        return None
    records = sum(len(open_records(path)) for path in paths)
    return recipe.schedule.total_steps(recipe.schedule.epoch_steps(records, machine.ranks))


def _lines(plan: dict[str, Any], recipe: Recipe, machine: Machine, memory: Memory) -> list[str]:
    """A plan on one screen."""

    def shown(one: dict[str, Any]) -> str:
        return f"{' '.join(one['overrides'])}  → {_gib(one['peak'])} GiB, about {one['slower']:.2f} × the time"

    engine, records = recipe.engine, plan["records"]
    traits = [f"ZeRO-{engine.zero_stage}" if engine.kind == "deepspeed" else "torch", engine.precision]
    traits += [f"offload {engine.offload}", f"quantise {recipe.lora.quantize}", engine.attention]
    traits += [f"experts over {engine.expert_parallel}"] * (engine.expert_parallel > 1)
    traits += [f"{'' if engine.gradient_checkpointing else 'no '}gradient checkpointing"]
    steps = "steps unknown, as the data are not here" if plan["steps"] is None else f"{plan['steps']:,} steps"
    host, disk = sum(memory.host.values()), sum(memory.disk.values())
    lines = [
        f"stage {recipe.stage}, sizes of {plan['sizes']}: {plan['weights'] / 1e6:,.1f} M weights, "
        f"{plan['trained'] / 1e6:,.1f} M trained",
        f"{', '.join(traits)}; {machine.nodes} × {machine.gpus} × {_gib(machine.gpu_memory)} GiB",
        f"{plan['records_per_step']} records a step, each at most {records['tokens']} text tokens "
        f"({records['supervised']} supervised), {records['masks']} masks of {records['image_size']} px; {steps}",
        *([f"not set, and not needed here: {', '.join(plan['unset'])}"] if plan["unset"] else []),
        "",
        f"{'GiB on each ' + ('process' if machine.device == 'cpu' else 'GPU'):<22}backward   update",
    ]
    for name, (backward, update) in (*memory.parts.items(), ("together", memory.moments)):
        lines.append(f"  {name:<20}{backward / GIB:>8.2f} {update / GIB:>8.2f}")
    for name, total, parts in (("host of each node", host, memory.host), ("disk", disk, memory.disk)):
        lines.append(
            f"{name:<20}{_gib(total)} GiB: {', '.join(f'{part} {_gib(size)}' for part, size in parts.items())}"
        )
    spare, part = machine.gpu_memory - plan["peak"], f"the largest part is {plan['largest']}"
    if plan["fits"]:
        return [*lines, "", f"FITS: {_gib(plan['peak'])} GiB, {_gib(spare)} to spare; {part}."]
    if spare < 0:
        lines += ["", f"DOES NOT FIT: {_gib(plan['peak'])} GiB, {_gib(-spare)} more than there is; {part}."]
    else:
        lines += ["", f"DOES NOT FIT into the host's memory: {_gib(host)} GiB a node; on the GPU {part}."]
    if plan["changes"]:
        return [*lines, "It fits with (times are rules of thumb):", *(f"  {shown(one)}" for one in plan["changes"])]
    if (found := plan["fits_on"]) is None:
        return [*lines, "It fits on no number of GPUs up to 64 at this global batch."]
    how = f"with {shown(found['change'])}" if found["change"] else "as it is, at the same global batch"
    return [*lines, f"It fits on {found['nodes']} × {found['gpus']} GPUs {how}."]


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f}"
