"""A saved LoRA directory merges into its network, by our names and by the published ones; another one's is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from model.checkpoint.directories import is_adapter
from model.checkpoint.lora import merge_adapter, merge_lora
from model.checkpoint.names import native_to_published
from model.errors import MedPLIBError
from model.inference.loading import load_for_inference
from tests.tiny import tiny_checkpoint, tiny_model

TARGETS = r".*decoder\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.experts\.\d+\.(gate|up|down)_proj)"
IDS = torch.tensor([[1, 20, 30, 40]])


def saved(folder: Path, **options: Any) -> torch.Tensor:
    """Save a LoRA of the tiny network; gives the logits with it."""
    torch.manual_seed(1)
    model = get_peft_model(tiny_model(), LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(str(folder))
    return merge_lora(model.eval())(input_ids=IDS).logits


def rename(folder: Path, change: Callable[[str], str]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({change(name): value for name, value in load_file(file).items()}, file)


def published(name: str) -> str:
    inner = name.removeprefix("base_model.model.")
    module, _, matrix = inner.partition(".lora_")
    whole = native_to_published(f"{module}.weight")
    assert whole is not None
    return f"base_model.model.{whole.removesuffix('.weight')}.lora_{matrix}"


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}, {"use_rslora": True}])
def test_a_saved_lora_merges_as_peft_merges_it(tmp_path: Path, options: dict[str, Any]) -> None:
    wanted = saved(tmp_path, **options)
    model = tiny_model()
    assert not torch.allclose(model(input_ids=IDS).logits, wanted, atol=1e-2)
    assert is_adapter(tmp_path)
    assert merge_adapter(model, tmp_path) is model
    assert torch.allclose(model(input_ids=IDS).logits, wanted, atol=1e-4)


def test_published_names_and_weights_trained_whole(tmp_path: Path) -> None:
    wanted = saved(tmp_path)
    rename(tmp_path, published)
    model = tiny_model()
    merge_adapter(model, tmp_path)
    assert torch.allclose(model(input_ids=IDS).logits, wanted, atol=1e-4)
    weight = torch.randn_like(model.model.projector.layers[0].weight)
    torch.save({"base_model.model.model.mm_projector.0.weight": weight}, tmp_path / "non_lora_trainables.bin")
    merge_adapter(tiny := tiny_model(), tmp_path)
    assert torch.equal(tiny.model.projector.layers[0].weight, weight)


def test_what_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    saved(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = next(iter(tensors))
    wrong = {
        "another name": {**tensors, "base_model.model.model.other.lora_A.weight": torch.ones(4, 4)},
        "half": {key: value for key, value in tensors.items() if key != name},
        "another size": {**tensors, name: torch.ones(4, 7)},
        "another rank": {**tensors, name: torch.ones(3, tensors[name].shape[1])},
    }
    model, plain = tiny_model(), tiny_model().state_dict()
    for content in wrong.values():
        save_file(content, tmp_path / "adapter_model.safetensors")
        with pytest.raises(MedPLIBError, match="of another network"):
            merge_adapter(model, tmp_path)
    save_file({"lm_head.weight": model.lm_head.weight.detach().clone()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(MedPLIBError, match="no LoRA weights"):
        merge_adapter(model, tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(MedPLIBError, match="holds no adapter_model"):
        merge_adapter(model, tmp_path)
    assert all(torch.equal(value, plain[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("change", [{"use_dora": True}, {"peft_type": "IA3"}, {"bias": "all"}, {"r": 0}, {"r": "x"}])
def test_other_methods_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    saved(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(MedPLIBError, match="LoRA"):
        merge_adapter(tiny_model(), tmp_path)


def test_a_network_is_loaded_with_its_lora_and_quantised_after(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base")
    plain, _, _ = load_for_inference(base)
    torch.manual_seed(1)
    model = get_peft_model(plain, LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS, init_lora_weights=False))
    model.save_pretrained(str(tmp_path / "lora"))
    wanted = merge_lora(model.eval())(input_ids=IDS).logits
    found, _, _ = load_for_inference(base, lora=tmp_path / "lora")
    assert torch.allclose(found(input_ids=IDS).logits, wanted, atol=1e-4)
    few, _, _ = load_for_inference(base, lora=tmp_path / "lora", quantisation="int8")
    near = (few(input_ids=IDS).logits - wanted).norm() / wanted.norm()
    assert 0 < near < 0.1
