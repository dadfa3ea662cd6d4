"""One way of doing the same training steps, measured in a process of its own: for ``train.py``.

``recipe`` trains as the recipe says. ``plain`` takes the same records in random order, pads each batch to its longest,
encodes every image of every row at every step, and computes logits at all positions.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from limits import Clock, Hardware, PeakMemory, active_products
from random_network import make_network
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Subset

from model.data.lengths import row_lengths
from model.data.sampling import ResumableSampler
from model.modeling.configuration import IGNORE_INDEX, LossConfig
from model.modeling.losses import TokenLosses
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.processor import MedPLIBProcessor
from model.train.datasets import item_lengths, open_dataset
from model.train.engine import TrainingEngine, make_engine
from model.train.features import cached_features
from model.train.feeding import Feed
from model.train.process import Process
from model.train.recipe import Recipe
from model.train.starting import starting_network
from model.train.trainable import add_lora, set_trainable

ARMS = ("recipe", "plain")


@dataclass(frozen=True)
class Measured:
    """What one arm did.

    Attributes:
        seconds, waited: of all counted steps, and of those spent waiting for data.
        samples, tokens, places: records, real tokens, and tokens with padding.
        operations: floating-point operations that the decoder's real tokens need, see ``decoder_operations``.
        peak: bytes of memory.
        rate: operations a second of matrix products in the type that is computed in; 0 on a CPU.
        losses: of the batch that both arms see first: ``loss`` and its parts.
        prepared: seconds that the feature cache took before the first step; 0 without.
    """

    seconds: float
    waited: float
    samples: int
    tokens: int
    places: int
    operations: float
    peak: int
    rate: float
    losses: dict[str, float]
    prepared: float


def run_arm(name: str, recipe: Recipe, size: str | None, device_name: str, steps: int, threads: int) -> Measured:
    """Do so many optimiser steps after one that is not counted.

    Args:
        size: of a network of random weights, see ``random_network.make_network``; None loads the recipe's.
    """
    torch.set_num_threads(threads)
    device, plain = torch.device(device_name), name == "plain"
    if plain:
        recipe = replace(recipe, data=replace(recipe.data, group_by_length=False, feature_cache=""))
    process = Process(0, 1, device)
    network, processor = starting_network(recipe) if size is None else _random_network(recipe, size, device)
    if recipe.engine.gradient_checkpointing:
        enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    batches, first, prepared = _batches(recipe, network, processor, process, steps, plain)
    engine = make_engine(network.train(), recipe, process, lambda step: 1.0)
    clock, peak = Clock(device, 1), PeakMemory(device)
    with all_logits() if plain else nullcontext():
        torch.manual_seed(0)
        losses = {part: float(value) for part, value in engine.accumulate(first()).items()}
        network.zero_grad(set_to_none=True)
        _step(engine, recipe, partial(next, batches), Feed(network.config.visual_tokens))
        peak.reset()
        feed, operations, samples, seconds = Feed(network.config.visual_tokens), 0.0, 0, 0.0
        for _ in range(steps):
            clock.wait()
            begun = time.perf_counter()
            taken = _step(engine, recipe, partial(next, batches), feed)
            clock.wait()
            seconds += time.perf_counter() - begun
            samples += sum(len(batch["input_ids"]) for batch in taken)
            operations += sum(decoder_operations(network, batch) for batch in taken)
    used = peak.read()
    rate = Hardware.measure(clock, torch.bfloat16).rate if device.type == "cuda" else 0.0
    return Measured(seconds, feed.waited, samples, feed.real, feed.places, operations, used, rate, losses, prepared)


def _random_network(recipe: Recipe, size: str, device: torch.device) -> tuple[MedPLIBForCausalLM, MedPLIBProcessor]:
    """Random weights that learn what the recipe says; two experts a layer at stage IV, none before."""
    dtype = torch.bfloat16 if recipe.engine.precision == "bf16" else torch.float32
    network, processor = make_network(size, device, dtype, None, 2 if recipe.stage == 4 else 0)
    network.config.loss = LossConfig(**vars(recipe.losses))
    processor.settings = replace(processor.settings, template=recipe.data.template, max_length=recipe.data.max_length)
    add_lora(network, recipe.lora)
    set_trainable(network, recipe.trainable)
    return network, processor


def _batches(
    recipe: Recipe,
    network: MedPLIBForCausalLM,
    processor: MedPLIBProcessor,
    process: Process,
    steps: int,
    plain: bool,
) -> tuple[Iterator[dict[str, Any]], Any, float]:
    """Batches of the counted steps and one more, from the same records for both arms; what makes the batch that both
    see first; and the seconds that the feature cache took.
    """
    dataset = open_dataset(recipe, processor, training=True)
    wanted = (steps + 1) * recipe.schedule.batch_size * recipe.schedule.accumulation
    chosen = np.resize(np.random.default_rng(recipe.seed).permutation(len(dataset)), wanted)
    lengths = item_lengths(recipe, dataset, network.config)[chosen]
    begun = time.perf_counter()
    dataset.use_features(cached_features(recipe, network, processor, dataset, process))
    prepared = time.perf_counter() - begun if recipe.data.feature_cache else 0.0
    sampler = ResumableSampler(
        lengths,
        seed=recipe.seed,
        batch_size=recipe.schedule.batch_size,
        group_by_length=recipe.data.group_by_length,
    )
    collate = partial(processor.collate, share_images=not plain)
    items = Subset(dataset, chosen.tolist())
    loader = DataLoader(
        items,
        batch_sampler=sampler,  # type: ignore[arg-type]
        collate_fn=collate,
        num_workers=recipe.data.workers,
        pin_memory=process.device.type == "cuda",
        generator=torch.Generator(),
    )
    return iter(loader), lambda: collate([items[index] for index in range(recipe.schedule.batch_size)]), prepared


def _step(engine: TrainingEngine, recipe: Recipe, next_batch: Any, feed: Feed) -> list[Any]:
    taken = []
    for _ in range(recipe.schedule.accumulation):
        taken.append(feed.take(next_batch))
        engine.accumulate(taken[-1])
    engine.step()
    return taken


@contextmanager
def all_logits() -> Iterator[None]:
    """The loss from logits at all positions of the sequence, padding and images too, as it is usually written."""

    def losses(hidden: Tensor, labels: Tensor, lm_head: Any) -> TokenLosses:
        logits = lm_head(hidden).float()  # [B, L, V]
        flat, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        values = functional.cross_entropy(flat, targets, ignore_index=IGNORE_INDEX, reduction="none")
        rows, places = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
        told = values.detach().view(len(labels), -1)[rows, places]
        return TokenLosses(values.sum() / max(len(rows), 1), told, rows)

    with mock.patch("model.modeling.medplib.causal_ce", losses):
        yield


def decoder_operations(network: MedPLIBForCausalLM, batch: Any) -> float:
    """Operations that the decoder needs for a batch: ``(4·P + 2·P_t)·tokens + 6·layers·width·Σ length²``.

    P are the weights of the decoder's linear layers that a token is multiplied with, P_t those of them that learn: once
    forward, once backward for the activations, once for the weights that learn. Padding, towers, logits and what
    gradient checkpointing computes again are not counted.
    """
    layers, text = network.model.decoder.layers, network.config.text_config
    active, whole = active_products(layers), sum(value.numel() for value in layers.parameters())
    learning = sum(value.numel() for value in layers.parameters() if value.requires_grad) * active / whole
    lengths = row_lengths(batch, network.config.visual_tokens).double()
    attention = 6 * text.num_hidden_layers * text.hidden_size * float((lengths**2).sum())
    return (4 * active + 2 * learning) * float(lengths.sum()) + attention
