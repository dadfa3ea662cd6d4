"""Load a checkpoint for inference: network, processor, and the presence classifier if it has one."""

from __future__ import annotations

from pathlib import Path

import torch

from model.checkpoint import load
from model.checkpoint.directories import resolve
from model.checkpoint.loading import Attention
from model.checkpoint.lora import merge_adapter
from model.errors import MedPLIBError
from model.inference.presence import PRESENCE_FILE, PresenceClassifier
from model.inference.quantise import Scheme, quantise
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.processor import MedPLIBProcessor


def load_for_inference(
    directory: str | Path,
    device: str | torch.device = "cpu",
    vision_tower: str | Path | None = None,
    dtype: torch.dtype | None = None,
    *,
    sam: str | Path | None = None,
    attention: Attention = "sdpa",
    quantisation: Scheme | None = None,
    lora: str | Path | None = None,
    base: str | Path | None = None,
) -> tuple[MedPLIBForCausalLM, MedPLIBProcessor, PresenceClassifier | None]:
    """Load a native or published checkpoint directory.

    Args:
        directory: the checkpoint, a finished run's folder, or a name in the local Hugging Face cache (``resolve``).
        device: where the model runs, such as ``cpu``, ``cuda`` or ``cuda:1``.
        vision_tower: CLIP directory, for published checkpoints whose configuration lacks CLIP's sizes.
        dtype: ``torch.float32`` or ``torch.bfloat16``; as stored when absent, but fp32 on a CPU.
        sam: SAM-Med2D file, for published checkpoints that hold no SAM weights.
        attention: of the decoder: ``sdpa``, ``eager`` or ``flash_attention_2`` (CUDA with flash-attn).
        quantisation: ``int8`` or ``int4`` keeps the decoder's linear weights so; None as they are.
        lora: directory that ``peft`` saved, merged into the checkpoint it was trained on.
        base: what that was, where ``directory`` itself is a LoRA and not of the checkpoint that it names.

    Returns:
        Network, processor, and the presence classifier if a ``presence.json`` lies in the directory.

    Raises:
        MedPLIBError: the directory is missing, incomplete or does not fit.
    """
    device = usable_device(device)
    if dtype is None and device.type == "cpu":
        dtype = torch.float32
    model, processor = load(
        directory, vision_tower=vision_tower, sam=sam, device=device, dtype=dtype, attention=attention, base=base
    )
    if lora is not None:
        merge_adapter(model, lora)
    if quantisation is not None:
        quantise(model, quantisation)
    file = (resolve(directory) if lora is None else Path(lora)) / PRESENCE_FILE  # fitted for what is loaded
    return model, processor, PresenceClassifier.load(file) if file.is_file() else None


def usable_device(device: str | torch.device) -> torch.device:
    """The device of a name.

    Raises:
        MedPLIBError: there is no such device here.
    """
    unusable = MedPLIBError(f"the device {str(device)!r:.80} cannot be used here; use cpu, or cuda on a GPU machine")
    try:
        probe = torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch has one for each way to be wrong
        raise unusable from error
    if probe.is_meta:  # it holds no values
        raise unusable
    return torch.device(device)
