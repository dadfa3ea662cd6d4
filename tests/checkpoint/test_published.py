"""Published directories: sizes that config.json lacks, parts that the weights lack, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoint import describe, export_published, load, load_with_report
from model.checkpoint.published_config import NATIVE_SECTION
from model.errors import MedPLIBError
from tests.checkpoint.conftest import assert_same_weights

CLIP, SAM = "model.vision_tower.vision_tower.vision_model.", "model.visual_model."


@pytest.fixture
def published(make, tmp_path: Path) -> Path:
    """A directory as the authors' code writes it: no section of ours, no processor settings, a foreign path."""
    folder = tmp_path / "published"
    export_published(*make(), folder, vision_tower="/mnt/authors/clip-tiny")
    (folder / "processor_config.json").unlink()
    edit(folder, lambda settings: settings.pop(NATIVE_SECTION))
    return folder


@pytest.fixture
def clip_directory(make, tmp_path: Path) -> Path:
    """The CLIP of ``make()`` in a directory of its own, as transformers 4 wrote them."""
    model, _ = make()
    folder = tmp_path / "elsewhere" / "clip-tiny"
    folder.mkdir(parents=True)
    state = {f"vision_model.{name}": value for name, value in model.model.vision_tower.clip.state_dict().items()}
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    torch.save(state, folder / "pytorch_model.bin")
    settings = model.config.vision_config.to_dict() | {"model_type": "clip_vision_model"}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    settings = json.loads((folder / "config.json").read_text())
    change(settings)
    (folder / "config.json").write_text(json.dumps(settings))


def without(folder: Path, prefix: str) -> dict[str, torch.Tensor]:
    """Take a part's tensors out of the weights; gives them."""
    state = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in state.items() if not k.startswith(prefix)}, folder / "model.safetensors")
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def test_a_convolutional_stem_has_no_published_layout(make, tmp_path: Path) -> None:
    with pytest.raises(MedPLIBError, match="stem_channels"):
        export_published(*make(mask={"stem_channels": (8, 8, 8)}), tmp_path / "published")
    assert not (tmp_path / "published").exists()


def test_sizes_from_shapes_alone(make, published: Path) -> None:
    model, processor, report = load_with_report(published)
    assert_same_weights(model, make()[0])
    assert model.config.vision_config.num_attention_heads == 1  # 64 per head, said in the report
    assert any("read off the tensors" in note for note in report.notes)
    assert (processor.settings.clip_size, processor.settings.sam_size) == (28, 64)
    assert (model.config.mask.geometry, model.config.mask.threshold) == ("legacy", 0.1)
    assert model.config.seg_token_id == processor.tokenizer.get_added_vocab()["<SEG>"]


def test_sizes_from_the_given_clip_directory(make, published: Path, clip_directory: Path) -> None:
    model, _ = load(published, vision_tower=clip_directory)
    assert model.config.vision_config.num_attention_heads == 2
    original, _ = make()
    image = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.encode_images(image), original.encode_images(image))


@pytest.mark.parametrize("place", ["beside", "inside", "working directory"])
def test_named_clip_directory_is_found_where_it_lies(
    published: Path, clip_directory: Path, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = {"beside": published.parent, "inside": published, "working directory": tmp_path / "work"}[place]
    folder.mkdir(exist_ok=True)
    shutil.copytree(clip_directory, folder / "clip-tiny")
    monkeypatch.chdir(folder if place == "working directory" else tmp_path / "elsewhere" / "..")
    model, _, report = load_with_report(published)
    assert model.config.vision_config.num_attention_heads == 2
    assert any(str(folder / "clip-tiny") in note for note in report.notes)


def test_a_clip_named_by_its_hub_name_comes_from_the_local_cache(
    published: Path, clip_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub" / "models--openai--clip-tiny" / "snapshots" / "12ab"
    shutil.copytree(clip_directory, snapshot)
    without(published, CLIP)
    edit(published, lambda settings: settings.update(mm_vision_tower="openai/clip-tiny"))
    for given in (None, "openai/clip-tiny", Path("openai/clip-tiny@12ab")):
        model, _, report = load_with_report(published, vision_tower=given)
        assert model.config.vision_config.num_attention_heads == 2
        assert f"CLIP's sizes come from {snapshot}" in report.notes


@pytest.mark.parametrize(
    "nulls",
    [
        {"mm_vision_select_layer": None, "mm_vision_select_feature": None, "vocab_size": None, "rope_scaling": None},
        {"moe": {"top_k_experts": None, "capacity_factor": None, "num_experts": None, "moe_layers_idx": None}},
        {"moe": None, "max_sample_point": None, "eos_token_id": None, "rms_norm_eps": None},
    ],
)
def test_nulls_of_a_published_config_mean_defaults(published: Path, nulls: dict[str, Any]) -> None:
    edit(published, lambda settings: [settings.pop(name, None) for name in nulls])
    wanted = load(published)[0].config.to_dict()
    edit(published, lambda settings: settings.update(nulls))
    found = load(published)[0].config.to_dict()
    assert found == wanted


def test_another_clip_is_refused_when_given_and_left_when_found(published: Path, clip_directory: Path) -> None:
    edit(clip_directory, lambda settings: settings.update(num_hidden_layers=5))
    with pytest.raises(MedPLIBError, match="another CLIP: its num_hidden_layers is 5"):
        load(published, vision_tower=clip_directory)
    shutil.copytree(clip_directory, published.parent / "clip-tiny")
    _, _, report = load_with_report(published)
    assert any("was not used" in note for note in report.notes)


def test_clip_weights_come_from_the_directory_when_absent(make, published: Path, clip_directory: Path) -> None:
    without(published, CLIP)
    with pytest.raises(MedPLIBError, match="--vision_tower"):
        load(published)
    assert_same_weights(load(published, vision_tower=clip_directory)[0], make()[0])


def test_sam_weights_come_from_the_file_when_absent(make, published: Path, tmp_path: Path) -> None:
    torch.save({"model": without(published, SAM)}, tmp_path / "sam.pth")
    with pytest.raises(MedPLIBError, match="--vision_pretrained"):
        load(published)
    assert_same_weights(load(published, sam=tmp_path / "sam.pth")[0], make()[0])


def test_the_checkpoint_s_own_sam_wins(make, published: Path, tmp_path: Path) -> None:
    model, _, report = load_with_report(published, sam=tmp_path / "not-even-there.pth")
    assert_same_weights(model, make()[0])
    assert any("was not read" in note for note in report.notes)


def test_dense_checkpoint_is_told_by_its_tensors(make, tmp_path: Path) -> None:
    model, processor = make(experts=0)
    export_published(model, processor, tmp_path / "dense")
    edit(tmp_path / "dense", lambda settings: settings.update(moe={"moe_enable": True, "num_experts": [2]}))
    edit(tmp_path / "dense", lambda settings: settings.pop(NATIVE_SECTION))
    loaded, _, report = load_with_report(tmp_path / "dense")
    assert_same_weights(loaded, model)
    assert any("the weights decide" in note for note in report.notes)


def test_unmerged_lora_weights_are_refused(published: Path) -> None:
    state = load_file(published / "model.safetensors")
    state["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"] = torch.zeros(1)
    save_file(state, published / "model.safetensors")
    with pytest.raises(MedPLIBError, match="unmerged LoRA"):
        load(published)


def test_tokenizer_that_does_not_fit_is_refused(make, published: Path) -> None:
    state = load_file(published / "model.safetensors")
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"][:330].clone()
    save_file(state, published / "model.safetensors")
    with pytest.raises(MedPLIBError, match="330 rows"):
        load(published)


def test_contradicting_token_ids_are_refused(published: Path) -> None:
    listed = json.loads((published / "added_tokens.json").read_text())
    (published / "added_tokens.json").write_text(json.dumps(listed | {"<SEG>": 7}))
    with pytest.raises(MedPLIBError, match="<SEG> the id 7"):
        load(published)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("hidden_size", "wide"),
        ("mm_vision_select_layer", "last"),
        ("moe", {"top_k_experts": "two"}),
        ("rope_scaling", 7),
    ],
)
def test_settings_that_are_no_numbers_are_one_sentence(published: Path, setting: str, value: object) -> None:
    edit(published, lambda settings: settings.update({setting: value}))
    with pytest.raises(MedPLIBError, match=r"config\.json is not understood") as raised:
        load(published)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", ["{", "[1, 2]", "5"])
def test_damaged_token_list_is_one_sentence(published: Path, content: str) -> None:
    (published / "added_tokens.json").write_text(content)
    with pytest.raises(MedPLIBError, match=r"added_tokens\.json is not understood"):
        load(published)


def test_clip_path_of_the_authors_may_be_out_of_reach(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path below somebody's home may not even be looked at; CLIP's sizes then come from the tensors."""
    real = Path.is_file

    def guarded(path: Path) -> bool:
        if str(path).startswith("/mnt/authors"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "is_file", guarded)
    _, _, report = load_with_report(published)
    assert any("read off the tensors" in note for note in report.notes)


def test_description(published: Path) -> None:
    text = describe(published)
    assert "published layout" in text
    assert "legacy geometry, threshold 0.1" in text
