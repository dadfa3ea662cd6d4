"""The published starting points, and a published checkpoint, through the front door."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.checkpoint import assemble, export_published, load, load_with_report, save
from model.checkpoint.pretrained import read_sam
from model.errors import MedPLIBError
from model.processing.special_tokens import SPECIAL_TOKENS


@pytest.fixture(scope="module")
def start(golden: Path) -> dict[str, Path]:
    return {
        "language_model": golden / "start" / "llava-tiny",
        "vision_tower": golden / "models" / "clip-vit-tiny-patch14-336",
        "sam": golden / "start" / "sam-med2d_tiny.pth",
    }


def pickled(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


def test_assembled_network_holds_every_given_tensor(golden: Path, start: dict[str, Path]) -> None:
    torch.manual_seed(0)
    projector = golden / "start" / "mm_projector.bin"
    model, processor, report = assemble(**start, projector=projector)
    state = model.state_dict()
    llava = pickled(start["language_model"] / "pytorch_model.bin")
    assert torch.equal(state["model.decoder.layers.3.mlp.up_proj.weight"], llava["model.layers.3.mlp.up_proj.weight"])
    clip = pickled(start["vision_tower"] / "pytorch_model.bin")
    for name, value in clip.items():
        if "position_ids" not in name:
            assert torch.equal(state[name.replace("vision_model.", "model.vision_tower.clip.")], value)
    assert torch.equal(state["model.projector.layers.2.bias"], pickled(projector)["model.mm_projector.2.bias"])
    for name, value in read_sam(start["sam"])[2].items():
        assert torch.equal(state[f"model.sam.{name}"], value)
    new = {name.split(".")[1] for name in report.missing}
    assert new == {"region_adapter", "mask_head"}
    assert all(torch.isfinite(state[name]).all() for name in report.missing)
    assert model.config.mask.geometry == "exact"
    assert processor.settings.sam_size == 256


def test_vocabulary_grows_to_the_published_size(start: dict[str, Path]) -> None:
    model, processor, _ = assemble(**start)
    old = pickled(start["language_model"] / "pytorch_model.bin")
    for name, stored in (("lm_head", "lm_head.weight"), ("model.decoder.embed_tokens", "model.embed_tokens.weight")):
        weight = model.get_submodule(name).weight
        assert weight.shape[0] == len(processor.tokenizer) == 640 + len(SPECIAL_TOKENS) == 907
        assert torch.equal(weight[:640], old[stored])
        torch.testing.assert_close(weight[640:], old[stored].mean(0, keepdim=True).expand(267, -1))
    assert model.config.seg_token_id == 640


def test_projector_is_llava_s_own_without_a_file(start: dict[str, Path]) -> None:
    model, _, _ = assemble(**start)
    old = pickled(start["language_model"] / "pytorch_model.bin")
    assert torch.equal(model.model.projector.layers[0].weight, old["model.mm_projector.0.weight"])


def test_assembled_network_goes_round(start: dict[str, Path], tmp_path: Path) -> None:
    model, processor, _ = assemble(**start, dtype=torch.bfloat16)
    save(model, processor, tmp_path / "stage0")
    again, _ = load(tmp_path / "stage0")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_sections_size_what_no_file_tells(golden: Path, start: dict[str, Path]) -> None:
    model, _, report = assemble(
        start["language_model"], vision_tower=start["vision_tower"], sections={"sam_config": _small_sam()}
    )
    assert model.config.sam_config.vision_config.image_size == 64
    assert "sam" in {name.split(".")[1] for name in report.missing}


def test_swapped_files_are_one_sentence(golden: Path, start: dict[str, Path]) -> None:
    with pytest.raises(MedPLIBError, match="SAM"):
        assemble(**start | {"sam": golden / "start" / "mm_projector.bin"})
    with pytest.raises(MedPLIBError, match="is no projector"):
        assemble(**start, projector=start["sam"])
    with pytest.raises(MedPLIBError, match="is not CLIP's"):
        assemble(**start | {"vision_tower": start["language_model"]})
    with pytest.raises(MedPLIBError, match="is no LLaMA"):
        assemble(**start | {"language_model": start["vision_tower"]})


def test_projector_of_another_tower_is_refused(start: dict[str, Path], tmp_path: Path) -> None:
    torch.save(
        {"model.mm_projector.weight": torch.zeros(64, 9), "model.mm_projector.bias": torch.zeros(64)},
        tmp_path / "p.bin",
    )
    with pytest.raises(MedPLIBError, match="of another shape"):
        assemble(**start, projector=tmp_path / "p.bin")


def test_a_llava_directory_is_no_checkpoint(start: dict[str, Path]) -> None:
    with pytest.raises(MedPLIBError, match="640 rows; give a MedPLIB checkpoint, or assemble"):
        load(start["language_model"], vision_tower=start["vision_tower"])


def test_published_checkpoint_loads_and_returns_bit_for_bit(
    golden: Path, start: dict[str, Path], tmp_path: Path
) -> None:
    folder = golden / "4_generate" / "hf_checkpoint"
    model, processor, report = load_with_report(folder, vision_tower=start["vision_tower"], dtype=torch.bfloat16)
    assert report.fits
    assert report.ignored == 4
    save(model, processor, tmp_path / "native")
    export_published(*load(tmp_path / "native"), tmp_path / "published")
    original = load_file(folder / "model_bf16exact.safetensors")
    returned = load_file(tmp_path / "published" / "model.safetensors")
    assert returned.keys() == original.keys()
    for name, value in original.items():
        assert returned[name].dtype == value.dtype, name
        assert torch.equal(returned[name], value), name
    assert (tmp_path / "published" / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    assert (tmp_path / "published" / "added_tokens.json").is_file()


def _small_sam() -> dict[str, dict[str, object]]:
    return {
        "vision_config": {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 16,
            "global_attn_indexes": [1],
            "mlp_dim": 32,
        },
        "prompt_encoder_config": {"image_size": 64, "patch_size": 16},
    }
