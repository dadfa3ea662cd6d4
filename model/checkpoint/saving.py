"""Write checkpoints, ours and published ones; a directory appears when it is complete, never half-written."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from model.checkpoint.directories import ADAPTER_CONFIG
from model.checkpoint.lora import MATRIX
from model.checkpoint.names import native_to_published, published_buffers
from model.checkpoint.processors import write_published_processor
from model.checkpoint.published_config import published_settings
from model.checkpoint.shards import MAX_SHARD, WeightFormat, write_shards
from model.errors import MedPLIBError
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.processor import MedPLIBProcessor

# What a checkpoint consists of, and is therefore replaced with it; anything else in the directory stays.
_OWN_FILES = re.compile(
    r".*\.safetensors|.*\.bin|.*\.index\.json|config\.json|generation_config\.json|processor_config\.json|"
    r"preprocessor_config\.json|tokenizer.*|special_tokens_map\.json|added_tokens\.json|chat_template.*"
)


def save(
    model: MedPLIBForCausalLM, processor: MedPLIBProcessor, directory: str | Path, *, max_shard: int = MAX_SHARD
) -> Path:
    """Write a native checkpoint: config.json, safetensors (shards above ``max_shard`` bytes), tokenizer, processor.

    An existing checkpoint in ``directory`` is replaced once the new one is complete; other files there stay.

    Raises:
        MedPLIBError: the directory exists and is no checkpoint, LoRA weights are unmerged, weights are quantised, or it
            cannot be written.
    """
    state = _plain_state(model)
    with _replacing(Path(directory)) as folder:
        write_shards(state, folder, max_shard=max_shard)
        settings = model.config.to_dict() | {
            "architectures": [type(model).__name__],
            "dtype": _dtype_name(state),
        }
        _write_json(folder / "config.json", settings)
        _write_json(folder / "generation_config.json", _generation_settings(model))
        processor.save_pretrained(folder)
    return Path(directory)


def export_published(
    model: MedPLIBForCausalLM,
    processor: MedPLIBProcessor,
    directory: str | Path,
    fmt: WeightFormat = "safetensors",
    *,
    vision_tower: str = "openai/clip-vit-large-patch14-336",
    max_shard: int = MAX_SHARD,
) -> Path:
    """Write the published layout (reference §7), weights bit for bit.

    Args:
        model, processor: what to write.
        directory: as for ``save``.
        fmt: ``safetensors`` or ``bin``.
        vision_tower: CLIP directory or hub name that config.json shall name.
        max_shard: bytes above which weights are split.

    Raises:
        MedPLIBError: the network has parts that the published layout has no names for (MoE projector, geometric region
            sampler), or as for ``save``.
    """
    if fmt not in ("safetensors", "bin"):
        raise MedPLIBError(f"unknown weight format {fmt!r:.80}; known: safetensors, bin")
    state = published_state(model)
    with _replacing(Path(directory)) as folder:
        write_shards(state, folder, fmt, max_shard)
        settings = published_settings(model.config, _dtype_name(state), vision_tower)
        _write_json(folder / "config.json", settings)
        _write_json(folder / "generation_config.json", _generation_settings(model))
        write_published_processor(processor, folder)
    return Path(directory)


def save_adapter(model: nn.Module, directory: str | Path, base: str) -> Path:
    """Write what a network with LoRA has learnt in ``peft``'s format; parts that were trained whole go with it.

    Args:
        model: with unmerged LoRA; what learns requires gradients.
        directory: as for ``save``; the base is not needed in it.
        base: directory or name that the adapter shall name as its base.

    Raises:
        MedPLIBError: the network has no LoRA, weights below it are trained or integers, or as for ``save``.
    """
    learnt = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    pairs = {name: MATRIX.fullmatch(name) for name in learnt}
    adapted = sorted({match["module"] for match in pairs.values() if match})
    mixed = next((name for name in learnt if ".base_layer." in name), None)
    if not adapted or mixed:
        what = f"trains {mixed} below its LoRA" if mixed else "has no LoRA, it was trained in full"
        raise MedPLIBError(f"the network {what}, so it is no adapter; use --layout native")
    (config,) = vars(model)["peft_config"].values()
    owners = sorted({name.rpartition(".")[0] for name, match in pairs.items() if not match})
    owners = [name for name in owners if not any(name.startswith(f"{other}.") for other in owners)]
    tensors = {f"{m['module']}.lora_{m['side']}.weight": learnt[name] for name, m in pairs.items() if m}
    for owner in owners:
        tensors |= {f"{owner}.{name}": value for name, value in model.get_submodule(owner).state_dict().items()}
    settings = {
        **{"peft_type": "LORA", "task_type": None, "bias": "none", "base_model_name_or_path": base},
        **{"r": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout},
        **{"target_modules": adapted, "modules_to_save": owners, "inference_mode": True},
    }
    with _replacing(Path(directory)) as folder:
        whole = {f"base_model.model.{name}": value.cpu().contiguous() for name, value in tensors.items()}
        save_file(whole, folder / "adapter_model.safetensors", {"format": "pt"})
        _write_json(folder / ADAPTER_CONFIG, settings)
    return Path(directory)


def published_state(model: MedPLIBForCausalLM) -> dict[str, Tensor]:
    """State dict under the published names, with the rotary buffers that published code expects; shares memory."""
    config = model.config
    state = _plain_state(model)
    named = {name: native_to_published(name, config.projector.type) for name in state}
    strangers = [name for name, published in named.items() if published is None]
    if strangers:
        raise MedPLIBError(
            f"the published layout has no name for {strangers[0]} ({len(strangers)} such tensors); "
            "save this network in the native layout"
        )
    output = {str(named[name]): value for name, value in state.items()}
    theta = float((config.text_config.rope_parameters or {}).get("rope_theta", 10000.0))
    for name, length in published_buffers(config).items():
        exponents = torch.arange(0, 2 * length, 2, dtype=torch.int64).float() / (2 * length)
        output[name] = 1.0 / theta**exponents
    return output


def _plain_state(model: nn.Module) -> dict[str, Tensor]:
    rounded = [name for name, module in model.named_modules() if getattr(module, "has_lost_weights", False)]
    if rounded:
        raise MedPLIBError(
            f"the network is quantised ({len(rounded)} layers, the first {rounded[0]}), and checkpoints hold whole "
            "weights; load it again without quantisation to save it"
        )
    state = {name: value.detach() for name, value in model.state_dict().items()}
    if any(".lora_" in name or ".base_layer." in name for name in state):
        raise MedPLIBError("the network holds unmerged LoRA weights; call merge_lora before saving it")
    absent = [name for name, value in state.items() if value.is_meta or not value.numel()]
    if absent:
        raise MedPLIBError(f"{absent[0]} holds no values ({len(absent)} such tensors); gather sharded weights first")
    return state


def _dtype_name(state: dict[str, Tensor]) -> str:
    """The type that holds every weight without loss."""
    dtypes = {value.dtype for name, value in state.items() if value.is_floating_point() and "inv_freq" not in name}
    widest = dtypes.pop()
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return str(widest).removeprefix("torch.")


def _generation_settings(model: MedPLIBForCausalLM) -> dict[str, Any]:
    config = model.config
    return {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _replacing(directory: Path) -> Iterator[Path]:
    """A folder beside ``directory`` that takes its place when the block ends well, and vanishes otherwise."""
    if directory.exists() and not _replaceable(directory):
        raise MedPLIBError(f"{directory} exists and is not a checkpoint; name a new directory")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".partial", dir=directory.parent))
    except OSError as error:
        raise MedPLIBError(f"cannot write in {directory.parent}: {error.strerror}") from error
    try:
        folder.chmod(0o755)
        yield folder
        _swap(folder, directory)
    except OSError as error:
        raise MedPLIBError(f"cannot write {directory}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _swap(folder: Path, directory: Path) -> None:
    if not directory.exists():
        folder.rename(directory)
        return
    old = folder.with_suffix(".replaced")
    directory.rename(old)
    folder.rename(directory)
    for entry in old.iterdir():  # what is not part of a checkpoint stays (a model card, a recipe, pictures)
        if not _OWN_FILES.fullmatch(entry.name) and not (directory / entry.name).exists():
            entry.rename(directory / entry.name)
    shutil.rmtree(old)


def _replaceable(directory: Path) -> bool:
    return directory.is_dir() and ((directory / "config.json").is_file() or not any(directory.iterdir()))
