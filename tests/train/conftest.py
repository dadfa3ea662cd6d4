"""A network of four decoder layers, a tokenizer and phantoms, for runs of a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoint import save
from model.data.phantom import build_phantoms
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.processor import MedPLIBProcessor, ProcessorSettings
from model.processing.special_tokens import SEG_TOKEN
from model.processing.tokens import add_special_tokens, build_tokenizer, train_tokenizer
from tests.tiny import TEXTS, tiny_config


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense native checkpoint with four decoder layers."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = build_tokenizer(train_tokenizer(TEXTS * 20, 330, folder / "tokenizer"))
    add_special_tokens(tokenizer)
    seg = tokenizer.convert_tokens_to_ids(SEG_TOKEN)
    config = tiny_config(len(tokenizer), seg, experts=0)
    config.text_config.num_hidden_layers = 4
    torch.manual_seed(0)
    network = MedPLIBForCausalLM(config)
    save(network, MedPLIBProcessor(tokenizer, ProcessorSettings.from_config(config)), folder / "model")
    return folder / "model"


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phantom data set of a few small images."""
    folder = tmp_path_factory.mktemp("phantoms")
    build_phantoms(folder, 4, 3, size=64)
    return folder


@pytest.fixture()
def values(base: Path, phantoms: Path, tmp_path: Path) -> Any:
    """Nested recipe values of a short run: ``values(stage, files, **sections)``."""

    def make(stage: int, files: tuple[str, ...] = ("vqa", "region", "grounding"), **sections: Any) -> dict[str, Any]:
        default: dict[str, Any] = {
            "stage": stage,
            "output": str(tmp_path / f"stage{stage}"),
            "model": {"base": str(base)},
            "data": {
                "train": [str(phantoms / f"{name}.json") for name in files],
                "images": str(phantoms),
                "max_length": 1024,
                "template": "llava_v1",
                "workers": 0,
            },
            "schedule": {"batch_size": 2, "accumulation": 1, "max_steps": 2},
            "engine": {"kind": "torch", "precision": "fp32", "gradient_checkpointing": False, "device": "cpu"},
            "logging": {"progress": False, "tensorboard": False},
            "validation": {"samples": 0},
        }
        for name, value in sections.items():
            both = isinstance(value, dict) and isinstance(default.get(name), dict)
            default[name] = {**default[name], **value} if both else value
        return default

    return make
