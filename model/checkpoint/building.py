"""Build a network without its weights taking memory, and give it tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from model.checkpoint.report import Shape, understanding
from model.errors import MedPLIBError
from model.modeling.configuration import MedPLIBConfig, MoEConfig
from model.modeling.medplib import MedPLIBForCausalLM

Attention = Literal["sdpa", "eager", "flash_attention_2"]


def empty_network(config: MedPLIBConfig) -> MedPLIBForCausalLM:
    """A network whose parameters are on the meta device; its buffers (positions, rotary frequencies) are real.

    Raises:
        MedPLIBError: a size is impossible, or the sizes contradict one another.
    """
    with (
        understanding("the checkpoint's configuration", "correct its config.json"),
        no_init_weights(),
        init_empty_weights(include_buffers=False),
    ):
        return MedPLIBForCausalLM(config)


def network_shapes(model: nn.Module) -> dict[str, Shape]:
    """Shape of every parameter and stored buffer by name."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def take_over(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put tensors in place of the parameters of the same names, without a copy; the rest stays as it is.

    Trainability of each parameter is kept.
    """
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    model.load_state_dict(dict(state), strict=False, assign=True)
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
        elif name in state:
            parameter.requires_grad_(parameter.is_floating_point())


def choose_attention(model: MedPLIBForCausalLM, attention: Attention, device: str | torch.device) -> None:
    """Choose how the decoder computes attention; CLIP and SAM keep torch's own.

    Args:
        model: the network, in place.
        attention: ``sdpa`` (torch's fused one), ``eager`` (plain arithmetic), or ``flash_attention_2`` (flash-attn).
        device: where the network will run.

    Raises:
        MedPLIBError: flash-attn is not installed, or the device is no CUDA device.
    """
    if attention == "sdpa":
        return
    if attention == "flash_attention_2" and torch.device(device).type != "cuda":
        raise MedPLIBError(f"attention {attention} runs on CUDA devices alone, got {device}; use sdpa")
    try:
        model.model.decoder.set_attn_implementation(attention)
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise MedPLIBError(
            f"attention {attention} cannot be used here ({reason}); use sdpa, or install the gpu extra"
        ) from error


def convert(
    tensors: Iterable[tuple[str, Tensor]],
    device: str | torch.device,
    dtype: torch.dtype | None,
    source: str = "the weights",
) -> dict[str, Tensor]:
    """Move tensors one at a time, floating ones to ``dtype`` (their own where None).

    Raises:
        MedPLIBError: naming the tensors that hold NaN, infinities, no floating numbers, or numbers beyond ``dtype``.
    """
    converted, faults = {}, []
    for name, stored in tensors:
        value = stored.to(device=device, dtype=dtype if stored.is_floating_point() else stored.dtype)
        if not is_finite(value):
            faults.append(f"{name} (beyond {value.dtype})" if is_finite(stored) else name)
        converted[name] = value
    refuse_faulty(faults, source)
    return converted


def is_finite(value: Tensor) -> bool:
    """Whether a tensor holds floating numbers alone, neither NaN nor infinite; reads it once, without a copy."""
    if not value.is_floating_point():
        return False
    if not value.numel() or value.dtype.itemsize == 1:  # no kernel reads eight-bit floats; they are converted first
        return True
    low, high = value.aminmax()  # NaN comes through
    return bool(low.isfinite() & high.isfinite())


def refuse_faulty(names: Sequence[str], source: str) -> None:
    """Raise a ``MedPLIBError`` that names tensors whose values are no finite numbers, if there are any."""
    if names:
        shown = ", ".join(names[:6]) + (", …" if len(names) > 6 else "")
        raise MedPLIBError(
            f"{source} hold NaN, infinite or whole numbers in {len(names)} tensors ({shown}), expected finite ones; "
            "fetch them again, or take an earlier checkpoint of the run"
        )


def fresh_parts(config: MedPLIBConfig, names: Iterable[str]) -> dict[str, Tensor]:
    """Newly initialised float32 tensors of parts around the decoder, drawn from torch's generator.

    Args:
        config: the network's sizes.
        names: our names of the parameters wanted; none of the decoder or of ``lm_head``.

    Raises:
        MedPLIBError: a name belongs to the language model, which is never started from nothing beside loaded parts.
    """
    wanted = list(names)
    lost = [name for name in wanted if name.startswith(("model.decoder.", "lm_head."))]
    if lost:
        raise MedPLIBError(f"the language model's {lost[0]} is in none of the given files ({len(lost)} such tensors)")
    if not wanted:
        return {}
    small = copy.deepcopy(config)  # the parts around the decoder have their sizes whatever its depth
    small.moe = MoEConfig()
    small.text_config.num_hidden_layers = 1
    small.text_config.vocab_size = 2
    small.text_config.intermediate_size = 1
    small.text_config.pad_token_id = 0
    state = MedPLIBForCausalLM(small).state_dict()
    return {name: state[name].detach() for name in wanted}
