"""The processor that belongs to a checkpoint: read, made for a new network, written in either layout."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from model.checkpoint.opening import OpenedCheckpoint
from model.checkpoint.tokenizer_files import write_published_tokenizer
from model.modeling.configuration import MedPLIBConfig
from model.processing.processor import CONFIG_FILE, MedPLIBProcessor, ProcessorSettings
from model.processing.tokens import MODEL_FILE

_PUBLISHED_MAX_LENGTH = 2048


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
