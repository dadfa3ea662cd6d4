"""Checkpoint directories of the reference's weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="session")
def published_directories(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The reference's two sets of weights as published checkpoint directories."""
    models = golden / "models"
    dense = load_file(models / "lisa_stage2.safetensors")
    mixture = {key: value for key, value in dense.items() if ".mlp." not in key or not key.startswith("model.layers.")}
    mixture |= load_file(models / "moe_delta_over_lisa_stage2.safetensors")
    config = json.loads((models / "moe_config.json").read_text())
    found = {}
    for name, state in (("lisa", dense), ("moe", mixture)):
        directory = tmp_path_factory.mktemp(name)
        shutil.copytree(golden / "2_tokenize" / "tokenizer_saved_by_upstream", directory, dirs_exist_ok=True)
        sections = config if name == "moe" else {key: value for key, value in config.items() if key != "moe"}
        (directory / "config.json").write_text(json.dumps(sections))
        save_file(state, directory / "model.safetensors")
        found[name] = directory
    return found
