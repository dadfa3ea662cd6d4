"""Load a checkpoint strictly, with one copy of its weights in memory; describe one without its weights."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Literal

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.initialization import no_init_weights

from model.checkpoint.directories import is_adapter
from model.checkpoint.lora import merge_adapter
from model.checkpoint.pretrained import OpenedCheckpoint, open_checkpoint
from model.checkpoint.report import LoadReport, Shape, compare, is_finite, refuse_faulty, understanding
from model.errors import MedPLIBError
from model.modeling.configuration import MedPLIBConfig, MoEConfig
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.processor import CONFIG_FILE, MedPLIBProcessor, ProcessorSettings
from model.processing.tokens import MODEL_FILE

logger = logging.getLogger(__name__)

Attention = Literal["sdpa", "eager", "flash_attention_2"]


def load(
    directory: str | Path,
    *,
    vision_tower: str | Path | None = None,
    sam: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    strict: bool = True,
    attention: Attention = "sdpa",
    base: str | Path | None = None,
) -> tuple[MedPLIBForCausalLM, MedPLIBProcessor]:
    """Load a native or published checkpoint directory.

    Args:
        directory: config.json, weights (safetensors or ``.bin``, whatever an index says) and tokenizer; or a LoRA,
            which is merged into its base.
        vision_tower: CLIP directory, for published checkpoints: CLIP's sizes, and its weights if they are not inside.
        sam: SAM-Med2D file, for published checkpoints without SAM weights.
        device: where the weights go.
        dtype: floating type of the weights; the one config.json names when absent.
        strict: refuse any missing, unexpected or mis-shaped tensor. Otherwise parts around the language model that are
            missing start from new values (see ``load_with_report`` for what happened).
        attention: of the decoder: ``sdpa``, ``eager`` or ``flash_attention_2`` (CUDA with flash-attn, the gpu extra).
        base: what a LoRA was trained on, where that is not what its configuration names.

    Returns:
        The network in eval mode, and its processor.

    Raises:
        MedPLIBError: the directory is no checkpoint, or something does not fit; the message lists it.
    """
    model, processor, _ = load_with_report(
        directory,
        vision_tower=vision_tower,
        sam=sam,
        device=device,
        dtype=dtype,
        strict=strict,
        attention=attention,
        base=base,
    )
    return model, processor


def load_with_report(
    directory: str | Path,
    *,
    vision_tower: str | Path | None = None,
    sam: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    strict: bool = True,
    attention: Attention = "sdpa",
    base: str | Path | None = None,
) -> tuple[MedPLIBForCausalLM, MedPLIBProcessor, LoadReport]:
    """The same as ``load``, and what was found (which is logged too)."""
    opened = open_checkpoint(directory, vision_tower=vision_tower, sam=sam, base=base)
    processor = read_processor(opened)
    model = init_empty(opened.config)
    report = check(opened, model)
    if strict:
        report.raise_unless_fits()
    dtype = dtype or opened.dtype or torch.float32
    usable = ((name, value) for name, value in opened.tensors() if name not in report.misshaped)
    state = convert(usable, device, dtype, f"the weights of {opened.directory}")
    notes, lacking = [*report.notes], [*report.missing, *report.misshaped]
    state.update(convert(fresh_parts(opened.config, lacking).items(), device, dtype))
    if lacking:
        notes.append(f"{len(lacking)} tensors start from new values")
    ties = opened.config.text_config.tie_word_embeddings
    finish(model, state, device)
    if ties and not model.config.text_config.tie_word_embeddings:
        notes.append("config.json says tie_word_embeddings, but the stored lm_head is not the embedding; it was kept")
    if is_adapter(directory):
        merge_adapter(model, directory)
        notes.append(f"the LoRA in {directory} is merged")
    report = replace(report, notes=tuple(notes))
    choose_attention(model, attention, device)
    logger.info("%s", report)
    return model, processor, report


def check(opened: OpenedCheckpoint, model: MedPLIBForCausalLM) -> LoadReport:
    """How an opened checkpoint fits a network, by names and shapes alone."""
    return compare(
        str(opened.directory),
        opened.shapes,
        network_shapes(model),
        unexpected=opened.unexpected,
        ignored=opened.ignored,
        notes=opened.notes,
    )


def finish(
    model: MedPLIBForCausalLM, state: Mapping[str, Tensor], device: str | torch.device = "cpu"
) -> MedPLIBForCausalLM:
    """Fill an empty network with a complete state dict and make it ready for use, in eval mode.

    A head that is not the embedding is never tied to it, whatever the configuration says, which is corrected.
    """
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    model.load_state_dict(dict(state), strict=False, assign=True)  # without a copy
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen and parameter.is_floating_point())
    if model.config.text_config.tie_word_embeddings:
        embedding = model.get_input_embeddings().weight
        if torch.equal(model.lm_head.weight, embedding):
            model.lm_head.weight = embedding
        else:
            model.config.text_config.tie_word_embeddings = model.config.tie_word_embeddings = False
    nn.Module.to(model, device)  # buffers; the weights are there already
    model.config.dtype = model.lm_head.weight.dtype
    model.config.architectures = [type(model).__name__]
    return model.eval()


# --- the network ------------------------------------------------------------------------------------------------------


def init_empty(config: MedPLIBConfig) -> MedPLIBForCausalLM:
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


def read_processor(opened: OpenedCheckpoint) -> MedPLIBProcessor:
    """The processor of an opened checkpoint; where its settings are not saved, they follow the network's sizes."""
    saved = (opened.directory / CONFIG_FILE).is_file()
    return MedPLIBProcessor.from_pretrained(
        opened.directory, None if saved else ProcessorSettings.from_config(opened.config)
    )


def new_processor(tokenizer: PreTrainedTokenizerFast, config: MedPLIBConfig, source: Path) -> MedPLIBProcessor:
    """A processor with the published preprocessing at the sizes of a network.

    Args:
        tokenizer: with MedPLIB's tokens.
        config: the network's.
        source: directory the tokenizer came from; its sentencepiece model is kept.
    """
    model_file = source / MODEL_FILE
    content = model_file.read_bytes() if model_file.is_file() else None
    return MedPLIBProcessor(tokenizer, ProcessorSettings.from_config(config), content)


# --- what a checkpoint holds ------------------------------------------------------------------------------------------


def describe(
    directory: str | Path,
    *,
    vision_tower: str | Path | None = None,
    sam: str | Path | None = None,
    base: str | Path | None = None,
) -> str:
    """A readable summary: layout, files, sizes of the parts, what fits and what does not.

    Args:
        directory: native or published checkpoint, or a LoRA, whose base is described.
        vision_tower, sam, base: as for ``load``.

    Raises:
        MedPLIBError: the directory is no checkpoint.
    """
    opened = open_checkpoint(directory, vision_tower=vision_tower, sam=sam, base=base)
    report = check(opened, init_empty(opened.config))
    size = sum(path.stat().st_size for path in opened.weights.files)
    count = len(opened.weights.files)
    files = f"{opened.weights.files[0].name}" if count == 1 else f"{count} files"
    shown = f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
    verdict = "complete" if report.fits else "does not load as it is"
    lines = [f"{directory}: a LoRA of the checkpoint below"] if is_adapter(directory) else []
    lines += [
        f"{opened.directory}: {opened.layout} layout, {files}, {shown}, {verdict}",
        *(f"  {name:<14}{text}" for name, text in _parts(opened).items()),
        *str(report).splitlines(),
    ]
    return "\n".join(lines)


def _parts(opened: OpenedCheckpoint) -> dict[str, str]:
    config = opened.config
    text, vision, sam = config.text_config, config.vision_config, config.sam_config.vision_config
    dtype = str(opened.dtype).removeprefix("torch.") if opened.dtype else "type not told"
    total = sum(prod(shape) for shape in opened.shapes.values())
    moe, mixture = config.moe, "none, a dense model"
    if moe.enabled:
        mixture = (
            f"{len(moe.layers)} of {text.num_hidden_layers} layers, "
            f"{' or '.join(map(str, sorted(set(moe.num_experts))))} experts, top-{moe.top_k}, capacity "
            f"{moe.capacity_factor} (evaluation {moe.eval_capacity_factor})" + ", residual expert" * moe.use_residual
        )
    examples = []
    if config.in_context.token_compressor:
        examples.append(f"token compressor to {config.in_context.compressed_tokens}")
    if config.in_context.mask_encoder:
        examples.append(f"mask encoder of {config.in_context.mask_encoder_tokens} tokens")
    region, turns = config.region, config.conversation_turns
    return {
        "parameters": f"{total:,} ({dtype})",
        "decoder": f"{text.num_hidden_layers} layers, width {text.hidden_size}, {text.num_attention_heads} heads, "
        f"FFN {text.intermediate_size}, vocabulary {text.vocab_size} (<SEG> is {config.seg_token_id})",
        "mixture": mixture,
        "vision tower": f"CLIP {vision.image_size} px, patch {vision.patch_size}, {vision.num_hidden_layers} layers, "
        f"width {vision.hidden_size}, hidden state {config.vision_select_layer}",
        "projector": config.projector.type,
        "regions": f"{region.kind}, at most {region.max_points} points" if region.enabled else "none",
        "masks": f"SAM {sam.image_size} px, {sam.num_hidden_layers} layers, width {sam.hidden_size}, "
        f"{'with' if config.mask.adapter else 'without'} adapters; "
        f"{config.mask.geometry} geometry, threshold {config.mask.threshold}",
        "in-context": ", ".join(examples) or "none",
        "conversation": "each question stands alone" if turns == 1 else f"up to {turns} questions",
    }
