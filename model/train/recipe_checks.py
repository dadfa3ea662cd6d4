"""Recipes that are well formed and still no good: values out of range, contradictions, settings that nobody reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from model.data.dataset import CACHE_AND_AUGMENTATION
from model.train.balance import check_shares
from model.train.journal import SCORES, TEACHER_FORCED
from model.train.recipe import Mixture, Recipe
from model.train.trainable import LORA_TARGETS, PARTS
from model.yaml_files import unknown_key

_LOWEST: Mapping[str, float] = {
    "seed": 0,
    "data.max_length": 8,
    "data.conversation_turns": 1,
    "data.shares": 0,
    "data.task_shares": 0,
    "data.modality_shares": 0,
    "data.workers": 0,
    "schedule.epochs": 1,
    "schedule.batch_size": 1,
    "schedule.accumulation": 1,
    "schedule.max_steps": 0,
    "optimiser.lr": 0,
    "optimiser.betas": 0,
    "optimiser.eps": 0,
    "optimiser.weight_decay": 0,
    "optimiser.clip": 0,
    "optimiser.warmup": 0,
    "optimiser.max_bad_steps": 1,
    "lora.rank": 0,
    "lora.alpha": 0,
    "lora.dropout": 0,
    "engine.expert_parallel": 1,
    "mixture.layers": 0,
    "mixture.capacity_factor": 0,
    "mixture.eval_capacity_factor": 0,
    "mixture.min_capacity": 0,
    "mixture.projector_experts": 0,
    "losses.ce": 0,
    "losses.dice": 0,
    "losses.bce": 0,
    "losses.focal": 0,
    "losses.iou": 0,
    "validation.every": 0,
    "validation.samples": 0,
    "validation.batch_size": 1,
    "validation.max_new_tokens": 1,
    "validation.patience": 0,
    "validation.thresholds": 0,
    "saving.every": 0,
    "saving.keep": 1,
    "logging.every": 1,
    "logging.router_every": 0,
}
_SHARES = ("optimiser.betas", "optimiser.warmup", "lora.dropout", "validation.thresholds")
"""Keys whose values lie between 0 and 1."""


def check_values(recipe: Recipe) -> list[str]:
    """Everything about a recipe of the right types that no run can use, a sentence each."""
    problems = []
    if not recipe.output:
        problems.append("output is empty; give the run folder, output=DIR")
    if not recipe.data.train:
        problems.append("data.train is empty; give at least one record file")
    problems += [
        unknown_key(f"trainable part {part}", (f"trainable part {known}" for known in PARTS))
        for part in recipe.trainable
        if part not in PARTS and not part.startswith("re:")
    ]
    problems += [
        f"lora target {target} is unknown; known: {', '.join(LORA_TARGETS)}"
        for target in recipe.lora.targets
        if target not in LORA_TARGETS
    ]
    if recipe.lora.rank and not recipe.lora.targets:
        problems.append("lora.rank is set but lora.targets is empty")
    if not recipe.lora.rank and not recipe.trainable:
        problems.append("nothing would be trained; name parts in trainable or set lora.rank")
    if recipe.data.feature_cache and "vision_tower" in recipe.trainable:
        problems.append("data.feature_cache is set, but trainable names vision_tower, whose features change; drop one")
    if recipe.data.conversation_turns > 1 and recipe.data.template == "plain":
        problems.append("data.conversation_turns is above 1, but the template plain writes no questions; use llava_v1")
    problems += recipe.augmentation.problems()
    if recipe.data.feature_cache and not recipe.augmentation.problems() and recipe.augmentation.active:
        problems.append(CACHE_AND_AUGMENTATION)
    problems += [
        f"trainable pattern {part} is no regular expression" for part in recipe.trainable if not _compiles(part)
    ]
    return problems + _check_best(recipe) + _check_ranges(recipe) + _check_mixture(recipe) + _check_scale(recipe)


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


def _compiles(part: str) -> bool:
    try:
        re.compile(part.removeprefix("re:"))
    except re.error:
        return False
    return True


def _check_ranges(recipe: Recipe) -> list[str]:
    problems = [
        f"{name} is {value:g}, expected at least {low:g}"
        for name, low in _LOWEST.items()
        for value in _values(recipe, name)
        if value < low
    ]
    problems += [
        f"{name} is {value:g}, expected at most 1" for name in _SHARES for value in _values(recipe, name) if value > 1
    ]
    data = recipe.data
    for name, roots, files in (
        ("images", data.images, len(data.train)),
        ("validation_images", data.validation_images, len(data.validation)),
    ):
        if len(roots) not in (0, 1, files):
            problems.append(f"data.{name} has {len(roots)} folders for {files} files; give one, or one each")
    if len(data.images) > 1 and data.validation and not data.validation_images:
        problems.append("data.images has a folder for each train file, so data.validation_images must be given, too")
    shares = recipe.data.shares
    if shares and len(shares) != len(recipe.data.train):
        problems.append(f"data.shares has {len(shares)} numbers for {len(recipe.data.train)} train files")
    if shares and not sum(shares):
        problems.append("data.shares are all 0; leave them empty to draw in proportion to the files' sizes")
    problems += check_shares(recipe.data)
    if any(beta == 1 for beta in recipe.optimiser.betas):
        problems.append("optimiser.betas holds 1, expected less")
    if len(recipe.optimiser.betas) != 2:
        problems.append(f"optimiser.betas has {len(recipe.optimiser.betas)} numbers, expected 2")
    if recipe.engine.zero_stage not in (0, 1, 2, 3):
        problems.append(f"engine.zero_stage is {recipe.engine.zero_stage}, expected 0, 1, 2 or 3")
    return problems


def _values(recipe: Recipe, name: str) -> tuple[float, ...]:
    """The number, or the numbers, of a dotted key."""
    value: Any = recipe
    for part in name.split("."):
        value = getattr(value, part)
    if isinstance(value, Mapping):
        return tuple(value.values())
    return value if isinstance(value, tuple) else (value,)


def _check_mixture(recipe: Recipe) -> list[str]:
    """Settings of stage IV that contradict one another, or that stand where nobody reads them."""
    mixture, problems = recipe.mixture, []
    if recipe.stage != 4:
        problems += ["mixture is set, but only stage 4 reads it"] if mixture != Mixture() else []
        return problems + (["model.grounding is set, but only stage 4 reads it"] if recipe.model.grounding else [])
    if recipe.model.grounding:
        unread = [name for name in ("projector", "sizes") if getattr(recipe.model, name)]
        problems += [f"model.{name} is set, but stage 4 takes it from model.base" for name in unread]
    if mixture.top_k not in (1, 2):
        problems.append(f"mixture.top_k is {mixture.top_k}, expected 1 or 2")
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


_QUANTISED_PARTS = ("attention", "feed_forward", "decoder")
"""Trainable parts whose weights ``lora.quantise`` turns into integers."""


def _check_scale(recipe: Recipe) -> list[str]:
    """Ways of saving memory that contradict one another."""
    engine, lora, problems = recipe.engine, recipe.lora, []
    if engine.kind == "torch":
        set_ones = [name for name, off in (("offload", "none"), ("expert_parallel", 1)) if getattr(engine, name) != off]
        problems += [f"engine.{name} is set, but engine.kind is torch; use deepspeed" for name in set_ones]
    if engine.offload == "all" and engine.zero_stage != 3:
        problems.append(f"engine.offload is all, which needs engine.zero_stage=3, got {engine.zero_stage}")
    if engine.offload == "optimiser" and engine.zero_stage == 0:
        problems.append("engine.offload is optimiser, which needs engine.zero_stage 1, 2 or 3, got 0")
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
    if lora.quantise != "none":
        problems += [] if lora.rank else [f"lora.quantise is {lora.quantise}, but lora.rank is 0; give it a rank"]
        problems += [
            f"trainable names {part}, whose weights lora.quantise={lora.quantise} freezes; leave one of them out"
            for part in recipe.trainable
            if part in _QUANTISED_PARTS
        ]
        if engine.zero_stage == 3 and engine.kind != "torch":
            problems.append(f"lora.quantise is {lora.quantise}, which ZeRO-3 cannot share out; use engine.zero_stage=2")
        if engine.expert_parallel > 1:
            problems.append("lora.quantise and engine.expert_parallel do not go together; use one of them")
    return problems
