"""A tiny network with its processor, and checkpoints made of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.checkpoint.loading import new_processor
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.processor import MedPLIBProcessor
from model.processing.special_tokens import SEG_TOKEN
from model.processing.tokens import build_tokenizer, train_tokenizer
from tests.tiny import TEXTS, tiny_model

PIECES = 330


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, PIECES, folder)
    return folder


@pytest.fixture(scope="session")
def make(tokenizer_folder: Path) -> Callable[..., tuple[MedPLIBForCausalLM, MedPLIBProcessor]]:
    """Make a network of ``tiny_config`` options whose vocabulary is the tokenizer's, and its processor."""
    tokenizer = build_tokenizer(tokenizer_folder)
    seg = tokenizer.get_added_vocab()[SEG_TOKEN]

    def build(seed: int = 0, **options) -> tuple[MedPLIBForCausalLM, MedPLIBProcessor]:
        model = tiny_model(seed, vocab_size=len(tokenizer), seg_token_id=seg, **options)
        return model, new_processor(tokenizer, model.config, tokenizer_folder)

    return build


def assert_same_weights(left: torch.nn.Module, right: torch.nn.Module) -> None:
    ours, theirs = left.state_dict(), right.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert torch.equal(value, theirs[name]), name
