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
from transformers import PreTrainedTokenizerFast

from model.checkpoint.directories import ADAPTER_CONFIG
from model.checkpoint.lora import MATRIX
from model.checkpoint.names import native_to_published, published_buffers
from model.checkpoint.published_config import published_settings
from model.checkpoint.shards import MAX_SHARD, WeightFormat, write_shards
from model.errors import MedPLIBError
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.processor import MedPLIBProcessor

_PUBLISHED_MAX_LENGTH = 2048
_BYTES = 256
_FIRST_PIECE = 3 + _BYTES  # after <unk>, <s>, </s> and the bytes
_UNKNOWN, _CONTROL, _NORMAL, _BYTE = 2, 3, 1, 6  # piece types of sentencepiece's format
# What a checkpoint consists of, and is therefore replaced with it; anything else in the directory stays.
_OWN_FILES = re.compile(
    r".*\.safetensors|.*\.bin|.*\.index\.json|config\.json|generation_config\.json|processor_config\.json|"
    r"preprocessor_config\.json|tokenizer.*|special_tokens_map\.json|added_tokens\.json|chat_template.*|presence\.json"
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
        settings = model.config.to_dict()
        _write_configs(folder, model, settings | {"architectures": [type(model).__name__], "dtype": _dtype_name(state)})
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
        _write_configs(folder, model, published_settings(model.config, _dtype_name(state), vision_tower))
        # The tokenizer in the published files, and our settings, which published code does not look for.
        processor.save_pretrained(folder)
        (folder / "tokenizer.json").unlink(missing_ok=True)  # of another library generation: the model file decides
        length = processor.settings.max_length or _PUBLISHED_MAX_LENGTH
        write_published_tokenizer(processor.tokenizer, folder, length, processor.sentencepiece_model)
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
    if config.mask.stem_channels:
        raise MedPLIBError(
            "the published layout has no convolutional stem (mask.stem_channels); save this network in the native one"
        )
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


def _write_configs(folder: Path, model: MedPLIBForCausalLM, settings: dict[str, Any]) -> None:
    ids = {name: getattr(model.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "config.json", settings)
    _write_json(folder / "generation_config.json", ids)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _replacing(directory: Path) -> Iterator[Path]:
    """A folder beside ``directory`` that takes its place when the block ends well, and vanishes otherwise."""
    replaceable = directory.is_dir() and ((directory / "config.json").is_file() or not any(directory.iterdir()))
    if directory.exists() and not replaceable:
        raise MedPLIBError(f"{directory} exists and is not a checkpoint; name a new directory")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".partial", dir=directory.parent))
    except OSError as error:
        raise MedPLIBError(f"cannot write in {directory.parent}: {error.strerror}") from error
    try:
        folder.chmod(0o755)
        yield folder
        old = folder.with_suffix(".replaced")
        if directory.exists():
            directory.rename(old)
        folder.rename(directory)
        if old.exists():
            for entry in old.iterdir():  # what is not part of a checkpoint stays (a model card, a recipe, pictures)
                if not _OWN_FILES.fullmatch(entry.name) and not (directory / entry.name).exists():
                    entry.rename(directory / entry.name)
            shutil.rmtree(old)
    except OSError as error:
        raise MedPLIBError(f"cannot write {directory}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# --- the tokenizer in the published layout: a sentencepiece model, and the added tokens beside it ---------------------


def write_published_tokenizer(
    tokenizer: PreTrainedTokenizerFast, directory: Path, max_length: int, model_file: bytes | None = None
) -> None:
    """Write tokenizer.model and the JSON files beside it, as published checkpoints hold them.

    Args:
        tokenizer: as ``build_tokenizer`` makes it.
        directory: an existing folder.
        max_length: ``model_max_length`` to put down, in tokens.
        model_file: content of the original tokenizer.model; rebuilt from the tokenizer when absent.
    """
    (directory / "tokenizer.model").write_bytes(model_file or sentencepiece_model(tokenizer))
    base = len(_backend(tokenizer)["vocab"])
    added = {token: number for token, number in tokenizer.get_added_vocab().items() if number >= base}
    plain = {
        name: {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        for name, token in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))
    }
    settings = {
        **{name: {"__type": "AddedToken", **token} for name, token in plain.items()},
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": max_length,
        "pad_token": None,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
    }
    for name, content in (
        ("added_tokens.json", added),
        ("special_tokens_map.json", {**plain, "pad_token": "<unk>"}),
        ("tokenizer_config.json", settings),
    ):
        _write_json(directory / name, content)


def sentencepiece_model(tokenizer: PreTrainedTokenizerFast) -> bytes:
    """The sentencepiece BPE model that a LLaMA tokenizer was made from, rebuilt from its pieces.

    A piece's score is minus its place after the bytes, as sentencepiece's BPE trainer writes it; merges follow from
    the scores, so the pieces in order are all there is to know.

    Raises:
        MedPLIBError: the vocabulary is not laid out like LLaMA's.
    """
    from sentencepiece import sentencepiece_model_pb2

    formats: Any = sentencepiece_model_pb2  # generated code, invisible to type checkers
    backend = _backend(tokenizer)
    pieces = sorted(backend["vocab"], key=backend["vocab"].get)
    expected = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(_BYTES))]
    if pieces[:_FIRST_PIECE] != expected:
        raise MedPLIBError(
            "the tokenizer is not laid out like LLaMA's (<unk>, <s>, </s>, 256 bytes, pieces), so it cannot be written "
            "for published code; save the checkpoint in the native layout"
        )
    model = formats.ModelProto()
    for place, piece in enumerate(pieces):
        entry = model.pieces.add()
        entry.piece = piece
        entry.score = float(min(0, _FIRST_PIECE - place))
        entry.type = _CONTROL if 0 < place < 3 else _BYTE if 3 <= place < _FIRST_PIECE else _NORMAL
    model.pieces[0].type = _UNKNOWN
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = formats.TrainerSpec.ModelType.BPE
    trainer.vocab_size = len(pieces)
    trainer.byte_fallback = True
    trainer.split_digits = True
    trainer.allow_whitespace_only_pieces = True
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = True
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return model.SerializeToString()


def _backend(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model.get("type") != "BPE":
        raise MedPLIBError(f"the tokenizer is of type {model.get('type')}; published checkpoints need LLaMA's BPE")
    return model
