"""One stage's whole configuration: typed settings, the published values of each stage, reading, checking and saving."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from annotated_types import Ge, Le

from model.checkpoint.directories import MERGED
from model.data.augmentation import AugmentationConfig
from model.data.dataset import CACHE_AND_AUGMENTATION
from model.data.schema import TASKS
from model.errors import MedPLIBError
from model.settings import Aliases, build_settings, modernized, read_settings, unknown_key
from model.train.runs import SCORES, TEACHER_FORCED

RECIPE_FILE = "recipe.yaml"
"""Name of the recipe that is saved in every run folder."""
OTHER = "other"
"""Stands in shares for all labels that are not named; they divide its share by their sizes."""
OLD_KEYS: Aliases = {
    "optimiser": "optimizer",
    "lora.quantise": "lora.quantize",
    "engine.offload": {"optimiser": "optimizer"},
}

Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
Amount = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]


@dataclass(frozen=True)
class ModelSource:
    """Where the network's starting weights lie; an empty path means "not needed at this stage"."""

    base: str = ""  # LLaMA or LLaVA directory, native or published checkpoint, or a run folder
    grounding: str = ""  # stage IV: the merged grounding model that expert 0 and the mask branch come from
    vision_tower: str = ""  # CLIP directory, where base does not hold one
    sam: str = ""  # SAM-Med2D file, where base does not hold one
    projector: str = ""  # run folder, checkpoint or mm_projector.bin whose projector replaces base's
    sizes: str = ""  # YAML of MedPLIBConfig values (configs/model) for what the starting files lack


@dataclass(frozen=True)
class Data:
    """Which records are learnt from, and how they become sequences."""

    train: tuple[str, ...] = ()  # record files: JSON, JSONL or Parquet
    images: tuple[str, ...] = ()  # folder that the records' image and mask paths start from: of all files, or of each
    validation: tuple[str, ...] = ()  # record files that are never trained on
    validation_images: tuple[str, ...] = ()  # folder of theirs, or of each; empty means the same as images
    shares: tuple[Amount, ...] = ()  # share of the draws of each train file; empty means in proportion to their sizes
    task_shares: dict[str, Amount] = field(default_factory=dict)  # share of the draws of each task; empty: by size
    modality_shares: dict[str, Amount] = field(default_factory=dict)  # the same by modality; other: all not named
    group_by_length: bool = False  # put records of like length, in tokens, into the same batch
    feature_cache: str = ""  # folder that keeps what frozen towers make of images; empty computes it at every step
    template: Literal["llava_v1", "v1", "plain"] = "llava_v1"  # conversation template
    max_length: Annotated[int, Ge(8)] = 2048  # longest sequence in tokens, an image counting as one
    conversation_turns: Count = 1  # most questions of one sequence: further records of the same images, drawn at random
    on_bad_record: Literal["refuse", "skip"] = "refuse"  # skip reports how many were left out
    workers: Natural = 4  # loader processes per rank; 0 loads in the training process


@dataclass(frozen=True)
class Schedule:
    """How much is trained."""

    epochs: Count = 1
    batch_size: Count = 16  # records per device and forward pass
    accumulation: Count = 1  # forward passes per optimizer step
    max_steps: Natural = 0  # optimizer steps, whatever epochs says; 0 means all epochs

    def epoch_steps(self, records: int, processes: int) -> float:
        """Optimizer steps of one pass over so many records; the last batch of a pass is filled up."""
        return math.ceil(records / (self.batch_size * processes)) / self.accumulation

    def total_steps(self, steps_per_epoch: float) -> int:
        """Optimizer steps of a run: ``max_steps`` where it is set, else those of all epochs."""
        return self.max_steps or math.ceil(self.epochs * steps_per_epoch)


@dataclass(frozen=True)
class Optimizer:
    """AdamW and its learning rate (reference §6)."""

    lr: Amount = 1e-4
    betas: tuple[Share, ...] = (0.9, 0.95)
    eps: Amount = 1e-8
    weight_decay: Amount = 0.0  # of all that learns: norms, biases and LoRA too
    clip: Amount = 1.0  # largest gradient norm; 0 turns clipping off
    warmup: Share = 0.01  # share of one epoch's steps over which lr rises linearly
    decay: Literal["linear", "cosine", "constant"] = "linear"  # after the warm-up, to the last step
    max_bad_steps: Count = 10  # steps in a row with NaN or infinite gradients that end a run; ten times as many in all

    def rate_factor(self, steps_per_epoch: float, total_steps: int) -> Callable[[int], float]:
        """What the peak learning rate is multiplied by at each step, in (0, 1], for ``LambdaLR``.

        Step 0 is the first one and already learns; the last step, ``total_steps - 1``, still does.
        """
        # Steps of rising learning rate: a share of one epoch's, at least one where the share is not zero.
        warmup = max(1, int(self.warmup * steps_per_epoch)) if self.warmup else 0
        decaying = max(1, total_steps - warmup + (warmup > 0))  # the last warm-up step is the peak itself

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            if self.decay == "constant":
                return 1.0
            left = max(0.0, (total_steps - step) / decaying)
            return left if self.decay == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)

        return factor


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters inside decoder layers; rank 0 means none."""

    rank: Natural = 0
    alpha: Amount = 16.0
    dropout: Share = 0.05
    targets: tuple[str, ...] = ()  # of q, k, v, o, gate, up, down; the last three inside experts too
    quantize: Literal["none", "int8", "nf4"] = "none"  # of the frozen weights below it (QLoRA); needs bitsandbytes


@dataclass(frozen=True)
class Mixture:
    """The mixture that stage IV up-cycles; no other stage reads it (reference §5)."""

    mode: Literal["dense", "first_half", "second_half", "sparse"] = "dense"  # which layers become mixtures
    layers: tuple[Natural, ...] = ()  # explicit layer list, used instead of mode when not empty
    num_experts: tuple[int, ...] = (2,)  # one number for all layers, or one per layer
    top_k: Literal[1, 2] = 1
    capacity_factor: Amount = 1.5
    eval_capacity_factor: Amount = 2.0
    min_capacity: Natural = 0
    random_token_priority: bool = True  # which tokens a full expert keeps in training
    drop_tokens: bool = True
    use_residual: bool = False  # DeepSpeed's residual expert beside the mixture
    router_aux_loss_coef: Amount = 0.0
    projector_experts: Natural = 0  # up-cycle the projector into this many experts; 0 keeps it dense
    projector_top_k: int = 1
    projector_router_aux_loss_coef: Amount = 0.0


@dataclass(frozen=True)
class Losses:
    """Weights of the loss terms (reference §4)."""

    ce: Amount = 1.0
    dice: Amount = 0.0
    bce: Amount = 0.0
    focal: Amount = 0.0
    iou: Amount = 0.0


@dataclass(frozen=True)
class Engine:
    """What runs the steps."""

    kind: Literal["deepspeed", "torch", "auto"] = "deepspeed"  # torch: one process; auto: torch there, else deepspeed
    zero_stage: Literal[0, 1, 2, 3] = 2  # DeepSpeed ZeRO 0 to 3
    offload: Literal["none", "optimizer", "all"] = "none"  # to the host's memory; all: ZeRO-3's weights too
    expert_parallel: Count = 1  # ranks that share the experts of a mixture layer out among them; needs ZeRO 1 or 2
    deepspeed: str = ""  # JSON of further DeepSpeed settings (configs/deepspeed)
    precision: Literal["bf16", "fp32"] = "bf16"
    gradient_checkpointing: bool = True  # recompute activations in the backward pass: slower, far less memory
    attention: Literal["sdpa", "eager", "flash_attention_2"] = (
        "sdpa"  # of the decoder; the last needs flash-attn and CUDA
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True)
class Validation:
    """Scores on held-out records while training."""

    every: Natural = 0  # optimizer steps between two validations, the end apart; 0 means once an epoch
    samples: Natural = 200  # records drawn, as many of each file as it has, the same ones every time; 0 turns it off
    batch_size: Count = 4  # records per device
    max_new_tokens: Count = 128  # hard end of a generated answer
    thresholds: tuple[Share, ...] = (0.1, 0.5)  # mask read-out thresholds, published and plain
    patience: Natural = 0  # validations without a better saving.best after which the run ends; 0: never


@dataclass(frozen=True)
class Saving:
    """What a run leaves on disk beside its merged result."""

    every: Natural = 0  # optimizer steps between two checkpoints to resume from, the end apart; 0 means once an epoch
    keep: Count = 2  # newest checkpoints that stay
    best: str = ""  # score whose best checkpoint stays besides and becomes merged/, such as mDice; empty: the last step
    published: bool = False  # also export the merged result in the published layout


@dataclass(frozen=True)
class Logging:
    """What is shown while training; metrics.jsonl is always written."""

    progress: bool = True  # bar with rate and time left on rank 0
    tensorboard: bool = True
    every: Count = 10  # steps between two lines of a log, where the bar has no terminal
    router_every: Natural = 50  # steps that a row of router statistics, and of losses by modality, covers; 0: none


@dataclass(frozen=True)
class Recipe:
    """One training run of one stage."""

    stage: int = 1  # 1 alignment, 2 VQA expert, 3 grounding expert, 4 mixture
    output: str = ""  # run folder
    seed: Natural = 0
    model: ModelSource = field(default_factory=ModelSource)
    data: Data = field(default_factory=Data)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    schedule: Schedule = field(default_factory=Schedule)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lora: Lora = field(default_factory=Lora)
    trainable: tuple[str, ...] = ()  # parts trained in full, by the names in trainable.PARTS
    mixture: Mixture = field(default_factory=Mixture)
    losses: Losses = field(default_factory=Losses)
    engine: Engine = field(default_factory=Engine)
    validation: Validation = field(default_factory=Validation)
    saving: Saving = field(default_factory=Saving)
    logging: Logging = field(default_factory=Logging)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.output)

    def resolved(self, processes: int) -> Recipe:
        """With ``engine.kind: auto`` decided: torch for one process that keeps all itself, DeepSpeed otherwise."""
        if self.engine.kind != "auto":
            return self
        alone = processes == 1 and self.engine.offload == "none"
        return replace(self, engine=replace(self.engine, kind="torch" if alone else "deepspeed"))

    @property
    def merged(self) -> Path:
        """The merged native checkpoint that the run ends with."""
        return self.folder / MERGED


# --- published settings -----------------------------------------------------------------------------------------------

ATTENTION_AND_FFN = ("q", "k", "v", "o", "gate", "up", "down")

PUBLISHED: Mapping[int, Mapping[str, Any]] = {
    1: {
        "stage": 1,
        "data": {"template": "plain", "max_length": 2048},
        "schedule": {"epochs": 1, "batch_size": 32, "accumulation": 1},
        "optimizer": {"lr": 1e-3},
        "lora": {"rank": 0},
        "trainable": ("projector",),
        "losses": {"ce": 1.0},
    },
    2: {
        "stage": 2,
        "data": {"template": "llava_v1", "max_length": 2048},
        "schedule": {"epochs": 3, "batch_size": 16, "accumulation": 2},
        "optimizer": {"lr": 1e-4},
        "lora": {"rank": 16, "alpha": 16.0, "targets": ATTENTION_AND_FFN},
        "trainable": ("lm_head", "embed_tokens", "layer_norms", "projector", "region_adapter"),
        "losses": {"ce": 1.0, "dice": 5.0, "bce": 1.0},
    },
    3: {
        "stage": 3,
        "data": {"template": "llava_v1", "max_length": 2048},
        "schedule": {"epochs": 10, "batch_size": 32, "accumulation": 1},
        "optimizer": {"lr": 3e-4},
        "lora": {"rank": 8, "alpha": 16.0, "targets": ("gate", "up", "down")},
        "trainable": ("mask_decoder", "mask_head"),
        "losses": {"ce": 1.0, "dice": 5.0, "bce": 1.0, "focal": 1.0, "iou": 0.0},
    },
    4: {
        "stage": 4,
        "data": {"template": "llava_v1", "max_length": 1024},
        "schedule": {"epochs": 3, "batch_size": 4, "accumulation": 8},
        "optimizer": {"lr": 3e-4},
        "lora": {"rank": 8, "alpha": 16.0, "targets": ("gate", "up", "down", "q", "v")},
        "trainable": ("router", "lm_head", "embed_tokens", "mask_decoder", "mask_head", "region_adapter"),
        "mixture": {"mode": "dense", "num_experts": (2,), "capacity_factor": 1.5, "eval_capacity_factor": 2.0},
        "losses": {"ce": 1.0, "dice": 0.5, "bce": 2.0, "focal": 0.0, "iou": 0.0},
    },
}
"""Published settings of each stage (reference §6, arXiv 2412.09278), as a recipe's nested values.

What is not named is the dataclass's default. The recipes in configs/stages repeat them for the reader.
"""
PUBLISHED_GPUS = 4
"""That the published settings were used on."""
STAGE_NAMES: Mapping[int, str] = {1: "alignment", 2: "VQA expert", 3: "grounding expert", 4: "mixture of experts"}

PARTS: Mapping[str, str] = {
    "lm_head": r"lm_head\.",
    "embed_tokens": r"model\.decoder\.embed_tokens\.",
    "layer_norms": r"model\.decoder\.layers\.\d+\.(input|post_attention)_layernorm\.",
    "final_norm": r"model\.decoder\.norm\.",
    "attention": r"model\.decoder\.layers\.\d+\.self_attn\.",
    "feed_forward": r"model\.decoder\.layers\.\d+\.mlp\.(?!router\.)",  # experts included
    "router": r"model\.decoder\.layers\.\d+\.mlp\.(router|residual_coefficient)\.",
    "decoder": r"model\.decoder\.",
    "projector": r"model\.projector\.",
    "region_adapter": r"model\.region_adapter\.",
    "mask_head": r"model\.mask_head\.",
    "mask_decoder": r"model\.sam\.mask_decoder\.",
    "prompt_encoder": r"model\.sam\.prompt_encoder\.",
    "sam_adapters": r"model\.sam\.image_encoder\.layers\.\d+\.adapter\.",
    "sam_image_encoder": r"model\.sam\.image_encoder\.",
    "vision_tower": r"model\.vision_tower\.",
    "token_compressor": r"model\.token_compressor\.",
    "mask_encoder": r"model\.mask_encoder\.",
}
"""Names that a recipe's ``trainable`` list takes, and the parameters (native names) that each means.

A list entry ``re:PATTERN`` names parameters by a regular expression of its own.
"""

_ATTENTION = r"model\.decoder\.layers\.\d+\.self_attn\.{}_proj"
_FEED_FORWARD = r"model\.decoder\.layers\.\d+\.mlp\.(experts\.\d+\.|residual_expert\.)?{}_proj"
LORA_TARGETS: Mapping[str, str] = {
    **{name: _ATTENTION.format(name) for name in ("q", "k", "v", "o")},
    **{name: _FEED_FORWARD.format(name) for name in ("gate", "up", "down")},
}
"""Names that ``lora.targets`` takes, and the modules that each means."""


# --- reading, saving, comparing ---------------------------------------------------------------------------------------


def load_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    also: Callable[[Recipe], list[str]] | None = None,
) -> Recipe:
    """Read a recipe file (with at least ``stage``), apply overrides and check all; see ``settings.read_settings``.

    Values not in the file are the published ones of its stage. ``also`` finds more problems, such as paths that do not
    exist, which are reported with the others.

    Raises:
        MedPLIBError: listing every unknown key, wrong type, wrong value and unset variable.
    """
    if not Path(path).exists():
        raise MedPLIBError(f"there is no recipe at {path}; the project's own are in configs/stages")
    return read_settings(
        Recipe,
        Path(path),
        overrides,
        what="recipe",
        environment=environment,
        defaults=_published,
        aliases=OLD_KEYS,
        check=lambda recipe: check_values(recipe) + (also(recipe) if also else []),
    )


def recipe_from(values: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Recipe:
    """A checked recipe from nested plain values, over the published settings of its ``stage``.

    Raises:
        MedPLIBError: as ``load_recipe``.
    """
    return build_settings(
        Recipe, modernized(values, OLD_KEYS, "the recipe"), "the recipe", (), environment, _published, check_values
    )


def _published(values: Mapping[str, Any], problems: list[str]) -> Mapping[str, Any]:
    stage = values.get("stage")
    if isinstance(stage, int) and stage in PUBLISHED:
        return PUBLISHED[stage]
    problems.append(f"stage is {stage!r:.80}, expected one of {', '.join(map(str, PUBLISHED))}")
    return PUBLISHED[1]


def save_recipe(recipe: Recipe, folder: Path) -> Path:
    """Write ``recipe`` into ``folder`` as ``recipe.yaml``, complete, and return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{RECIPE_FILE}.partial"
    partial.write_text(recipe_text(recipe), encoding="utf-8")
    return partial.replace(folder / RECIPE_FILE)


def recipe_text(recipe: Recipe) -> str:
    """The complete recipe as YAML, which ``load_recipe`` reads back as the same."""
    plain = json.loads(json.dumps(asdict(recipe)))  # tuples as lists
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


_MAY_CHANGE = (
    *("output", "logging", "saving", "validation"),
    *("data.workers", "data.feature_cache", "optimizer.max_bad_steps", "schedule.epochs", "schedule.max_steps"),
    *("engine.device", "engine.attention"),
)


def differences(old: Recipe, new: Recipe) -> list[str]:
    """Keys whose values differ, but for those that a resumed run may change."""
    changed = []
    before, after = asdict(old), asdict(new)
    for section, value in before.items():
        if not isinstance(value, dict):
            changed += [section] if value != after[section] else []
        else:
            changed += [f"{section}.{key}" for key in value if value[key] != after[section][key]]
    return [key for key in changed if key not in _MAY_CHANGE and key.split(".")[0] not in _MAY_CHANGE]


# --- values that no run can use ---------------------------------------------------------------------------------------


def check_values(recipe: Recipe) -> list[str]:
    """Everything about a recipe of the right types that no run can use, a sentence each."""
    return (
        _check_training(recipe)
        + _check_data(recipe)
        + _check_best(recipe)
        + _check_mixture(recipe)
        + _check_memory(recipe)
    )


def _check_training(recipe: Recipe) -> list[str]:
    lora, betas = recipe.lora, recipe.optimizer.betas
    problems = [] if recipe.output else ["output is empty; give the run folder, output=DIR"]
    for part in recipe.trainable:
        if part.startswith("re:"):
            try:
                re.compile(part.removeprefix("re:"))
            except re.error:
                problems.append(f"trainable pattern {part} is no regular expression")
        elif part not in PARTS:
            problems.append(unknown_key(f"trainable part {part}", (f"trainable part {known}" for known in PARTS)))
    problems += [
        f"lora target {target} is unknown; known: {', '.join(LORA_TARGETS)}"
        for target in lora.targets
        if target not in LORA_TARGETS
    ]
    if lora.rank and not lora.targets:
        problems.append("lora.rank is set but lora.targets is empty")
    if not lora.rank and not recipe.trainable:
        problems.append("nothing would be trained; name parts in trainable or set lora.rank")
    if any(beta == 1 for beta in betas):
        problems.append("optimizer.betas holds 1, expected less")
    if len(betas) != 2:
        problems.append(f"optimizer.betas has {len(betas)} numbers, expected 2")
    return problems


def _check_data(recipe: Recipe) -> list[str]:
    data, problems = recipe.data, recipe.augmentation.problems()
    if not data.train:
        problems.append("data.train is empty; give at least one record file")
    if data.feature_cache and "vision_tower" in recipe.trainable:
        problems.append("data.feature_cache is set, but trainable names vision_tower, whose features change; drop one")
    if data.feature_cache and not recipe.augmentation.problems() and recipe.augmentation.active:
        problems.append(CACHE_AND_AUGMENTATION)
    if data.conversation_turns > 1 and data.template == "plain":
        problems.append("data.conversation_turns is above 1, but the template plain writes no questions; use llava_v1")
    for name, files in (("images", data.train), ("validation_images", data.validation)):
        roots = getattr(data, name)
        if len(roots) not in (0, 1, len(files)):
            problems.append(f"data.{name} has {len(roots)} folders for {len(files)} files; give one, or one each")
    if len(data.images) > 1 and data.validation and not data.validation_images:
        problems.append("data.images has a folder for each train file, so data.validation_images must be given, too")
    if data.shares and len(data.shares) != len(data.train):
        problems.append(f"data.shares has {len(data.shares)} numbers for {len(data.train)} train files")
    if data.shares and not sum(data.shares):
        problems.append("data.shares are all 0; leave them empty to draw in proportion to the files' sizes")
    known = (*TASKS, OTHER)
    problems += [
        unknown_key(f"data.task_shares.{task}", (f"data.task_shares.{one}" for one in known))
        for task in data.task_shares
        if task not in known
    ]
    for name in ("task_shares", "modality_shares"):
        shares = getattr(data, name)
        if shares and not sum(shares.values()):
            problems.append(f"data.{name} are all 0; leave them empty to draw by size")
    return problems


def _check_best(recipe: Recipe) -> list[str]:
    """A best checkpoint, or an end without one, that no validation could find."""
    best, problems = recipe.saving.best, []
    if recipe.validation.patience and not best:
        problems.append("validation.patience is set, but saving.best names no score; give saving.best=mDice, say")
    if best and not (recipe.data.validation and recipe.validation.samples):
        problems.append(f"saving.best is {best}, which needs data.validation and validation.samples")
    known = [*SCORES, f"{TEACHER_FORCED}ce"]
    known += [f"{name}@{t:g}" for name in ("mDice", f"{TEACHER_FORCED}dice") for t in recipe.validation.thresholds]
    if best and best not in known and not any(best.startswith(f"{name}/") for name in known):
        problems.append(f"saving.best is {best:.80}, expected {', '.join(known)}, or mDice/ct, mDice/FILE …")
    return problems


def _check_mixture(recipe: Recipe) -> list[str]:
    """Settings of stage IV that contradict one another, or that stand where nobody reads them."""
    mixture, problems = recipe.mixture, []
    if recipe.stage != 4:
        problems += ["mixture is set, but only stage 4 reads it"] if mixture != Mixture() else []
        return problems + (["model.grounding is set, but only stage 4 reads it"] if recipe.model.grounding else [])
    if recipe.model.grounding:
        unread = [name for name in ("projector", "sizes") if getattr(recipe.model, name)]
        problems += [f"model.{name} is set, but stage 4 takes it from model.base" for name in unread]
    if any(count < mixture.top_k for count in mixture.num_experts) or not mixture.num_experts:
        problems.append(
            f"mixture.num_experts is {list(mixture.num_experts)}, expected at least top_k ({mixture.top_k})"
        )
    if mixture.projector_experts and not 1 <= mixture.projector_top_k <= min(2, mixture.projector_experts):
        problems.append(
            f"mixture.projector_top_k is {mixture.projector_top_k}, expected 1 or 2 and no more than experts"
        )
    if mixture.projector_experts and not any(
        part == "projector" or part.startswith("re:") for part in recipe.trainable
    ):
        problems.append("mixture.projector_experts is set, but trainable lacks projector, so they would never differ")
    return problems


def _check_memory(recipe: Recipe) -> list[str]:
    """Ways of saving memory that contradict one another."""
    engine, lora, problems = recipe.engine, recipe.lora, []
    if engine.kind == "torch":
        set_ones = [name for name, off in (("offload", "none"), ("expert_parallel", 1)) if getattr(engine, name) != off]
        problems += [f"engine.{name} is set, but engine.kind is torch; use deepspeed" for name in set_ones]
    if engine.offload == "all" and engine.zero_stage != 3:
        problems.append(f"engine.offload is all, which needs engine.zero_stage=3, got {engine.zero_stage}")
    if engine.offload == "optimizer" and engine.zero_stage == 0:
        problems.append("engine.offload is optimizer, which needs engine.zero_stage 1, 2 or 3, got 0")
    if engine.expert_parallel > 1 and engine.zero_stage not in (1, 2):
        problems.append(
            f"engine.expert_parallel is {engine.expert_parallel}, which needs engine.zero_stage 1 or 2, got "
            f"{engine.zero_stage}: DeepSpeed keeps experts apart in these two alone"
        )
    if recipe.stage == 4 and any(count % max(engine.expert_parallel, 1) for count in recipe.mixture.num_experts):
        problems.append(
            f"engine.expert_parallel is {engine.expert_parallel}, expected a divisor of mixture.num_experts "
            f"{list(recipe.mixture.num_experts)}"
        )
    if lora.quantize != "none":
        problems += [] if lora.rank else [f"lora.quantize is {lora.quantize}, but lora.rank is 0; give it a rank"]
        problems += [
            f"trainable names {part}, whose weights lora.quantize={lora.quantize} freezes; leave one of them out"
            for part in recipe.trainable
            if part in ("attention", "feed_forward", "decoder")
        ]
        if engine.zero_stage == 3 and engine.kind != "torch":
            problems.append(f"lora.quantize is {lora.quantize}, which ZeRO-3 cannot share out; use engine.zero_stage=2")
        if engine.expert_parallel > 1:
            problems.append("lora.quantize and engine.expert_parallel do not go together; use one of them")
    return problems
