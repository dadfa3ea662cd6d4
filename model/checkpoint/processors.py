"""The processor that belongs to a checkpoint: read, made for a new network, written in either layout.

The published code reads a sentencepiece model, and the added tokens beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from model.checkpoint.opening import OpenedCheckpoint
from model.errors import MedPLIBError
from model.modeling.configuration import MedPLIBConfig
from model.processing.processor import CONFIG_FILE, MedPLIBProcessor, ProcessorSettings
from model.processing.tokens import MODEL_FILE

_PUBLISHED_MAX_LENGTH = 2048
_BYTES = 256
_FIRST_PIECE = 3 + _BYTES  # after <unk>, <s>, </s> and the bytes
_UNKNOWN, _CONTROL, _NORMAL, _BYTE = 2, 3, 1, 6  # piece types of sentencepiece's format


def read_processor(opened: OpenedCheckpoint) -> MedPLIBProcessor:
    """The processor of an opened checkpoint; where its settings are not saved, they follow the network's sizes."""
    if (opened.directory / CONFIG_FILE).is_file():
        return MedPLIBProcessor.from_pretrained(opened.directory)
    return MedPLIBProcessor.from_pretrained(opened.directory, ProcessorSettings.from_config(opened.config))


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


def write_published_processor(processor: MedPLIBProcessor, directory: Path) -> None:
    """Write the tokenizer in the published files, and our settings, which published code does not look for."""
    processor.save_pretrained(directory)
    (directory / "tokenizer.json").unlink(missing_ok=True)  # of another library generation: the model file decides
    length = processor.settings.max_length or _PUBLISHED_MAX_LENGTH
    write_published_tokenizer(processor.tokenizer, directory, length, processor.sentencepiece_model)


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
        text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
        (directory / name).write_text(text + "\n", encoding="utf-8")


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
        entry.type = _piece_type(place)
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


def _piece_type(place: int) -> int:
    if place == 0:
        return _UNKNOWN
    if place < 3:
        return _CONTROL
    return _BYTE if place < _FIRST_PIECE else _NORMAL


def _backend(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model.get("type") != "BPE":
        raise MedPLIBError(f"the tokenizer is of type {model.get('type')}; published checkpoints need LLaMA's BPE")
    return model
