"""Load a worker's model: check that it exists and fits the memory before its weights are read."""

from __future__ import annotations

import logging
import re
import time
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.checkpoint.directories import base_of, checkpoint_name, is_adapter
from model.checkpoint.pretrained import OpenedCheckpoint, open_checkpoint
from model.errors import MedPLIBError
from model.inference.engine import Engine, EngineSettings, Request
from model.inference.generation import GenerationSettings
from model.inference.loading import load_for_inference, usable_device
from model.inference.quantise import Scheme, weight_bytes
from model.inference.schedule import prefix_cache_bytes
from model.inference.slots import slot_bytes
from model.serve.checks import free_memory

_GIB = 2**30
_MOST_TOKENS = 2048  # of a slot by default, as the engine has it
_QUANTISED = re.compile(r"model\.decoder\.layers\..+_proj\.weight")
_QUANTISED_BYTES: dict[Scheme, float] = {"int8": 1.0, "int4": 0.5625}  # a weight, with its share of a scale

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelChoice:
    """Which model a worker answers with, and how it is kept.

    Attributes:
        directory: checkpoint, native or published; or a LoRA that ``peft`` saved.
        base: checkpoint that the LoRA was trained on.
        device: ``cpu``, ``cuda``, ``cuda:1`` …, or ``auto`` for the GPU where there is one.
        dtype: of the weights; as stored when absent, but fp32 on a CPU.
        quantisation: of the language model.
        vision_tower: CLIP directory, for published checkpoints; ``sam`` the SAM-Med2D file, for those without one.
        needs_regions: the checkpoint must be able to look at regions.
    """

    directory: Path
    base: Path | None = None
    device: str = "auto"
    dtype: torch.dtype | None = None
    quantisation: Scheme | None = None
    vision_tower: Path | None = None
    sam: Path | None = None
    needs_regions: bool = False

    @property
    def whole(self) -> Path:
        """The checkpoint of a whole network.

        Raises:
            MedPLIBError: there is a base too many, or one is missing.
        """
        return base_of(self.directory, self.base) if is_adapter(self.directory) or self.base else self.directory


def load_engine(choice: ModelChoice, settings: EngineSettings) -> Engine:
    """An engine with the model, not started.

    Raises:
        MedPLIBError: the checkpoint is not there or lacks something, the device cannot be used, or memory is too small.
    """
    begun = time.perf_counter()
    named = choice.device
    device = usable_device(("cuda" if torch.cuda.is_available() else "cpu") if named == "auto" else named)
    whole = choice.whole
    opened = open_checkpoint(whole, vision_tower=choice.vision_tower, sam=choice.sam)
    if choice.needs_regions and not opened.config.region.enabled:
        raise MedPLIBError(
            f"{opened.directory} has no region adapter; leave --add_region_feature out, or give a checkpoint with one"
        )
    dtype = choice.dtype or (torch.float32 if device.type == "cpu" else opened.dtype or torch.float32)
    weights, cache = needed_bytes(opened, dtype, choice.quantisation, settings)
    free = free_memory() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    if free is not None and weights + cache > free:
        raise MedPLIBError(
            f"{opened.directory} needs {weights / _GIB:.1f} GiB for its weights and {cache / _GIB:.1f} GiB for "
            f"{settings.slots} slots and kept prompts, and {device} has {free / _GIB:.1f} GiB free; stop other "
            "programs, take fewer --slots, or fewer bits where the GPU is not full while loading"
        )
    try:
        model, processor, presence = load_for_inference(
            whole,
            device,
            choice.vision_tower,
            dtype,
            sam=choice.sam,
            quantisation=choice.quantisation,
            lora=None if whole is choice.directory else choice.directory,
        )
        engine = Engine(model, processor, settings, presence)
        if device.type == "cuda":  # what takes long the first time, and memory that is short, are noticed now
            picture = np.zeros((64, 64, 3), dtype=np.uint8)
            engine.ask(Request(picture, "What is it?", settings=GenerationSettings(max_new_tokens=2)))
    except torch.OutOfMemoryError as error:
        raise MedPLIBError(
            f"{choice.directory} does not fit the memory of {device}; take fewer --slots, --load-8bit or --load-4bit"
        ) from error
    _log.info("%s is on %s after %.1f s", checkpoint_name(choice.directory), device, time.perf_counter() - begun)
    return engine


def needed_bytes(
    opened: OpenedCheckpoint, dtype: torch.dtype, quantisation: Scheme | None, settings: EngineSettings
) -> tuple[int, int]:
    """Bytes that the weights take, at the most while they are loaded and quantised, and that slots and kept prompts do.

    Args:
        opened: the checkpoint, whose values are not read.
        dtype: of the weights.
        quantisation: of the language model.
        settings: of the engine.
    """
    text = opened.config.text_config
    sizes = {name: prod(shape) for name, shape in opened.shapes.items()}
    whole = sum(sizes.values()) * dtype.itemsize
    length = settings.max_length or min(text.max_position_embeddings, _MOST_TOKENS)
    cache = settings.slots * slot_bytes(text, length, dtype) + prefix_cache_bytes(opened.config, dtype, settings)
    if quantisation is None:
        return whole, cache
    few = sum(size for name, size in sizes.items() if _QUANTISED.fullmatch(name))
    kept = whole - round(few * (dtype.itemsize - _QUANTISED_BYTES[quantisation]))
    return max(whole - cache, kept), cache  # the cache is made once the weights are small


def describe_engine(engine: Engine, choice: ModelChoice) -> dict[str, Any]:
    """A worker's description of its model."""
    return {
        "checkpoint": checkpoint_name(choice.directory),
        "device": str(engine.model.device),
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "quantisation": choice.quantisation,
        "weight_bytes": weight_bytes(engine.model),
        "cache_bytes": engine.cache_bytes,
        "image_cache_bytes": engine.images.max_bytes,
        "prefix_cache_bytes": engine.prefixes.max_bytes,
        "max_length": engine.max_length,
        "regions": engine.model.config.region.enabled,
        "mask_threshold": engine.model.config.mask.threshold,
        "presence_classifier": engine.presence is not None,
    }
