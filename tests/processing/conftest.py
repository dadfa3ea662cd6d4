"""A tokenizer and a processor small enough to make on the spot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from model.processing.processor import MedPLIBProcessor, ProcessorSettings
from model.processing.tokens import build_tokenizer, train_tokenizer
from tests.tiny import TEXTS


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, 330, folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerFast:
    return build_tokenizer(tokenizer_folder)


@pytest.fixture
def processor(tokenizer: PreTrainedTokenizerFast) -> MedPLIBProcessor:
    return MedPLIBProcessor(tokenizer, ProcessorSettings(clip_size=28, patch_size=7, sam_size=64, max_length=400))


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
