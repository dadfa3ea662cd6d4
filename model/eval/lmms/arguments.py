"""What lmms-eval is told about model and generation → what our engine takes; nothing is dropped in silence."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import torch

from model.errors import MedPLIBError
from model.inference.engine import EngineSettings
from model.inference.generation import GenerationSettings

DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
}
_SLOTS = 8


@dataclass(frozen=True)
class ModelArguments:
    """The model's part of a harness run (``--model_args``).

    Attributes:
        pretrained: checkpoint directory.
        loading: keywords of ``Engine.from_pretrained``: device, dtype, vision_tower, sam, attention, quantisation.
        engine: bounds of the engine.
        max_new_tokens: hard end of an answer where the task names none.
        threshold: probability above which a pixel is in a mask; the checkpoint's own where None.
        no_mask_below: probability of presence below which a mask is left empty; needs a checkpoint with a mask gate.
        seed: of sampling, where a task asks for it.
    """

    pretrained: str
    loading: Mapping[str, Any] = field(default_factory=dict)
    engine: EngineSettings = field(default_factory=EngineSettings)
    max_new_tokens: int = 256
    threshold: float | None = None
    no_mask_below: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Generation:
    """How one request is answered.

    Attributes:
        settings: length, stop texts, sampling; its seed is the run's.
        masks: whether the answer's masks follow its text, see ``answering.text_with_masks``.
        ignored: settings of the task that mean nothing here.
    """

    settings: GenerationSettings
    masks: bool = False
    ignored: tuple[str, ...] = ()


def _whole(value: Any, name: str) -> int:
    number = _number(value, name)
    if number != int(number):
        raise MedPLIBError(f"{name} is {value!r:.40}; give a whole number")
    return int(number)


def _number(value: Any, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if isinstance(value, bool) or number != number or number in (float("inf"), float("-inf")):
        raise MedPLIBError(f"{name} is {value!r:.40}; give a number")
    return number


def read_model_arguments(values: Mapping[str, Any]) -> ModelArguments:
    """Check what the harness passes to the model.

    Args:
        values: ``--model_args`` with ``batch_size``, ``max_batch_size`` and ``device`` of the command line.

    Raises:
        MedPLIBError: an argument is unknown, missing, or cannot apply.
    """
    given = {name: value for name, value in values.items() if value is not None}
    unknown = [name for name in given if name not in _ARGUMENTS]
    if unknown:
        raise MedPLIBError(f"the model has no argument {', '.join(unknown)}; known: {', '.join(_ARGUMENTS)}")
    if not given.get("pretrained"):
        raise MedPLIBError("no checkpoint is named; give --model_args pretrained=DIR")
    loading: dict[str, Any] = {name: str(given[name]) for name in _LOADING if name in given}
    loading["device"] = own_device(loading.get("device"))
    if "dtype" in given:
        loading["dtype"] = _dtype(given["dtype"])
    longest = _whole(given["max_length"], "max_length") if "max_length" in given else None
    numbers: dict[str, Any] = {name: read(given[name], name) for name, read in _NUMBERS.items() if name in given}
    return ModelArguments(
        str(given["pretrained"]), loading, EngineSettings(slots=_slots(given), max_length=longest), **numbers
    )


_LOADING = ("device", "vision_tower", "sam", "attention", "quantisation")


def own_device(name: str | None) -> str:
    """The device of this process: with several processes on one machine, each has the GPU of its place.

    Args:
        name: as given; CUDA where there is one, else the CPU, when absent.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    place = os.environ.get("LOCAL_RANK")
    return f"cuda:{place}" if name == "cuda" and place is not None else name


def _slots(given: Mapping[str, Any]) -> int:
    """Requests decoded together: ``slots``, or ``--batch_size`` where that was set (the harness always sends 1)."""
    batch = given.get("batch_size", 1)
    automatic = isinstance(batch, str) and batch.startswith("auto")
    size = 1 if automatic else _whole(batch, "batch_size")
    if "max_batch_size" in given and not automatic:
        raise MedPLIBError("max_batch_size bounds an automatic batch size; give --batch_size auto with it, or leave it")
    if "slots" in given:
        slots = _whole(given["slots"], "slots")
        if size not in (1, slots):
            raise MedPLIBError(f"slots is {slots} and batch_size {size}, which mean the same; give one of them")
        return slots
    bound = _whole(given.get("max_batch_size", _SLOTS), "max_batch_size")
    return bound if automatic else _SLOTS if size == 1 else size


def _dtype(value: Any) -> torch.dtype:
    if str(value) not in DTYPES:
        raise MedPLIBError(f"dtype is {value!r:.80}; give fp32 or bf16")
    return DTYPES[str(value)]


_NUMBERS = {"max_new_tokens": _whole, "threshold": _number, "no_mask_below": _number, "seed": _whole}
_ARGUMENTS = ("pretrained", *_LOADING, "dtype", "slots", "max_length", "batch_size", "max_batch_size", *_NUMBERS)


# --- generation -----------------------------------------------------------------------------------------------------

_ONE_WAY = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1}
"""Settings that would change the answer and that the engine has one value for."""
_READ = ("until", "max_new_tokens", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "seed", "masks")


def read_generation(values: Mapping[str, Any], arguments: ModelArguments) -> Generation:
    """Check a task's ``generation_kwargs``.

    ``do_sample: false`` means greedy whatever the temperature is, ``do_sample: true`` alone a temperature of 1, and
    a temperature alone says both.

    Args:
        values: of the task, with what ``--gen_kwargs`` changed in it.
        arguments: of the model, for what the task does not say.

    Raises:
        MedPLIBError: a value is malformed, or asks for what the engine cannot do.
    """
    given = {name: value for name, value in values.items() if value is not None}
    for name, only in _ONE_WAY.items():
        if given.get(name, only) != only:
            raise MedPLIBError(f"{name} is {given[name]}, MedPLIB answers with {only}; give --gen_kwargs {name}={only}")
    ignored = tuple(name for name in given if name not in _READ and name not in _ONE_WAY)
    longest = given.get("max_new_tokens", given.get("max_gen_toks", arguments.max_new_tokens))
    temperature = _temperature(given)
    drawn = given if temperature else {}  # a greedy answer is not
    settings = GenerationSettings(
        max_new_tokens=_whole(longest, "max_new_tokens"),
        temperature=temperature,
        top_p=_number(drawn.get("top_p", 1.0), "top_p"),
        top_k=_whole(drawn.get("top_k", 0), "top_k"),
        seed=_whole(given.get("seed", arguments.seed), "seed"),
        stop=_stop(given.get("until", ())),
    )
    if given.get("masks", "rle") != "rle":
        raise MedPLIBError(f"masks is {given['masks']!r:.80}; the masks of an answer are written as rle")
    return Generation(settings, "masks" in given, ignored)


def own_seed(seed: int, request: str) -> int:
    """The seed of one request, so that equal questions asked several times are drawn independently, yet repeatably."""
    return crc32(f"{seed} {request}".encode())


def _temperature(given: Mapping[str, Any]) -> float:
    if given.get("do_sample") is False:
        return 0.0
    return _number(given.get("temperature", 1.0 if given.get("do_sample") else 0.0), "temperature")


def _stop(until: Any) -> tuple[str, ...]:
    texts = [until] if isinstance(until, str) else until
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise MedPLIBError(f"until is {until!r:.60}; give a text or a list of texts")
    return tuple(text for text in texts if text)
