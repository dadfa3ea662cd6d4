"""Say what a checkpoint directory holds, without reading its weights."""

from __future__ import annotations

from math import prod
from pathlib import Path

from model.checkpoint.building import empty_network
from model.checkpoint.directories import is_adapter
from model.checkpoint.loading import check
from model.checkpoint.opening import OpenedCheckpoint, open_checkpoint
from model.modeling.configuration import MedPLIBConfig


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
    report = check(opened, empty_network(opened.config))
    size = sum(path.stat().st_size for path in opened.weights.files)
    count = len(opened.weights.files)
    files = f"{opened.weights.files[0].name}" if count == 1 else f"{count} files"
    verdict = "complete" if report.fits else "does not load as it is"
    lines = [f"{directory}: a LoRA of the checkpoint below"] if is_adapter(directory) else []
    lines += [
        f"{opened.directory}: {opened.layout} layout, {files}, {_bytes(size)}, {verdict}",
        *(f"  {name:<14}{text}" for name, text in _parts(opened)),
        *str(report).splitlines(),
    ]
    return "\n".join(lines)


def _parts(opened: OpenedCheckpoint) -> list[tuple[str, str]]:
    config = opened.config
    text, vision, sam = config.text_config, config.vision_config, config.sam_config.vision_config
    dtype = str(opened.dtype).removeprefix("torch.") if opened.dtype else "type not told"
    total = sum(prod(shape) for shape in opened.shapes.values())
    region = f"{config.region.kind}, at most {config.region.max_points} points" if config.region.enabled else "none"
    return [
        ("parameters", f"{total:,} ({dtype})"),
        (
            "decoder",
            f"{text.num_hidden_layers} layers, width {text.hidden_size}, {text.num_attention_heads} heads, "
            f"FFN {text.intermediate_size}, vocabulary {text.vocab_size} (<SEG> is {config.seg_token_id})",
        ),
        ("mixture", _mixture(config)),
        (
            "vision tower",
            f"CLIP {vision.image_size} px, patch {vision.patch_size}, {vision.num_hidden_layers} layers, "
            f"width {vision.hidden_size}, hidden state {config.vision_select_layer}",
        ),
        ("projector", config.projector.type),
        ("regions", region),
        (
            "masks",
            f"SAM {sam.image_size} px, {sam.num_hidden_layers} layers, width {sam.hidden_size}, "
            f"{'with' if config.mask.adapter else 'without'} adapters; "
            f"{config.mask.geometry} geometry, threshold {config.mask.threshold}",
        ),
        ("in-context", _in_context(config)),
        ("conversation", _conversation(config.conversation_turns)),
    ]


def _mixture(config: MedPLIBConfig) -> str:
    moe = config.moe
    if not moe.enabled:
        return "none, a dense model"
    experts = sorted(set(moe.num_experts))
    residual = ", residual expert" if moe.use_residual else ""
    return (
        f"{len(moe.layers)} of {config.text_config.num_hidden_layers} layers, "
        f"{' or '.join(map(str, experts))} experts, top-{moe.top_k}, "
        f"capacity {moe.capacity_factor} (evaluation {moe.eval_capacity_factor}){residual}"
    )


def _in_context(config: MedPLIBConfig) -> str:
    parts = []
    if config.in_context.token_compressor:
        parts.append(f"token compressor to {config.in_context.compressed_tokens}")
    if config.in_context.mask_encoder:
        parts.append(f"mask encoder of {config.in_context.mask_encoder_tokens} tokens")
    return ", ".join(parts) or "none"


def _conversation(turns: int) -> str:
    return "each question stands alone" if turns == 1 else f"up to {turns} questions"


def _bytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
