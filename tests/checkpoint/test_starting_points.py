"""Networks put together from their starting points, and stage IV's start from two stages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.checkpoint import export_published, lay_over, load, save, upcycle
from model.checkpoint.assembling import resize_vocabulary
from model.checkpoint.directories import read_settings, resolve
from model.checkpoint.loading import fresh_parts
from model.errors import MedPLIBError
from model.modeling.configuration import MoEConfig, ProjectorConfig

FFN = "model.decoder.layers.{}.mlp.{}gate_proj.weight"
MOE = MoEConfig(layers=(0, 1), num_experts=(2, 3))


@pytest.fixture
def stages(make, tmp_path: Path) -> tuple[Path, Path]:
    """Stage II natively, stage III as published code would have written it: the hand-over takes both."""
    save(*make(seed=2, experts=0), tmp_path / "stage2")
    export_published(*make(seed=3, experts=0), tmp_path / "stage3", fmt="bin")
    return tmp_path / "stage2", tmp_path / "stage3"


def test_new_rows_are_the_mean_of_the_old() -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    assert resize_vocabulary(weight, 4).tolist() == [[1, 2], [3, 6], [2, 4], [2, 4]]
    assert resize_vocabulary(weight, 1).tolist() == [[1, 2]]


def test_experts_come_from_the_two_stages(make, stages: tuple[Path, Path]) -> None:
    vqa, grounding = make(seed=2, experts=0)[0].state_dict(), make(seed=3, experts=0)[0].state_dict()
    model, _ = upcycle(*stages, moe=MOE)
    state = model.state_dict()
    for layer, experts in ((0, 2), (1, 3)):
        for expert in range(experts):
            origin = grounding if expert % 2 == 0 else vqa
            found = state[FFN.format(layer, f"experts.{expert}.")]
            assert torch.equal(found, origin[FFN.format(layer, "")])
    for name in vqa:
        if ".mlp." in name and "decoder.layers" in name:
            continue
        origin = grounding if name.startswith(("model.mask_head.", "model.sam.mask_decoder.")) else vqa
        assert torch.equal(state[name], origin[name]), name
    router = state["model.decoder.layers.1.mlp.router.weight"]
    assert router.shape == (3, 32)
    assert router.std() > 0


def test_upcycled_experts_have_memory_of_their_own(stages: tuple[Path, Path]) -> None:
    model, _ = upcycle(*stages, moe=MOE)
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    assert len(set(pointers)) == len(pointers)


def test_equal_stages_upcycle_to_the_same_function(make, tmp_path: Path) -> None:
    model, processor = make(experts=0)
    save(model, processor, tmp_path / "stage")
    options = {"moe": MoEConfig(layers=(1,), num_experts=(2,), top_k=2)}
    mixture, _ = upcycle(tmp_path / "stage", tmp_path / "stage", **options)
    ids = torch.tensor([[1, 20, 30, 40]])
    assert torch.allclose(mixture(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)


def test_projector_and_residual_expert_are_upcycled(make, stages: tuple[Path, Path]) -> None:
    vqa = make(seed=2, experts=0)[0].state_dict()
    moe = MoEConfig(layers=(1,), num_experts=(2,), use_residual=True)
    model, _ = upcycle(*stages, moe=moe, projector=ProjectorConfig(type="moe_mlp2x_gelu", num_experts=3))
    state = model.state_dict()
    assert torch.equal(state[FFN.format(1, "residual_expert.")], vqa[FFN.format(1, "")])
    assert torch.equal(state[FFN.format(0, "")], vqa[FFN.format(0, "")])
    for expert in range(3):
        found = state[f"model.projector.experts.{expert}.2.weight"]
        assert torch.equal(found, vqa["model.projector.layers.2.weight"])


def test_upcycled_network_saves_and_loads(stages: tuple[Path, Path], tmp_path: Path) -> None:
    model, processor = upcycle(*stages, moe=MOE, dtype=torch.bfloat16)
    save(model, processor, tmp_path / "stage4")
    loaded, _ = load(tmp_path / "stage4")
    assert loaded.config.moe == MOE
    assert loaded.lm_head.weight.dtype == torch.bfloat16


def test_wrong_pairs_are_refused(make, stages: tuple[Path, Path], tmp_path: Path) -> None:
    save(*make(), tmp_path / "mixture")
    with pytest.raises(MedPLIBError, match="mixture already"):
        upcycle(tmp_path / "mixture", stages[1], moe=MOE)
    with pytest.raises(MedPLIBError, match="layers 0 to 1"):
        upcycle(*stages, moe=MoEConfig(layers=(5,), num_experts=(2,)))
    model, processor = make(experts=0)
    config = model.config
    config.text_config.intermediate_size = 40
    save(type(model)(config), processor, tmp_path / "other")
    with pytest.raises(MedPLIBError, match="two stages of one model"):
        upcycle(stages[0], tmp_path / "other", moe=MOE)


def test_projector_file_is_laid_over(make, tmp_path: Path) -> None:
    model, _ = make()
    state = {f"model.mm_projector.{layer}.weight": torch.ones(32, width) for layer, width in ((0, 16), (2, 32))}
    state |= {f"model.mm_projector.{layer}.bias": torch.ones(32) for layer in (0, 2)}
    torch.save(state, tmp_path / "mm_projector.bin")
    lay_over(model, projector=tmp_path / "mm_projector.bin")
    assert model.model.projector.layers[2].bias.eq(1).all()
    torch.save({**state, "model.mm_projector.0.bias": torch.ones(7)}, tmp_path / "mm_projector.bin")
    with pytest.raises(MedPLIBError, match="1 of another shape"):
        lay_over(model, projector=tmp_path / "mm_projector.bin")
    torch.save({"lm_head.weight": torch.ones(2, 2)}, tmp_path / "mm_projector.bin")
    with pytest.raises(MedPLIBError, match="is no projector"):
        lay_over(model, projector=tmp_path / "mm_projector.bin")


def test_new_parts_never_include_the_language_model(make) -> None:
    with pytest.raises(MedPLIBError, match="language model"):
        fresh_parts(make()[0].config, ["lm_head.weight"])


def test_projector_of_a_whole_checkpoint_is_laid_over(make, tmp_path: Path) -> None:
    """Stage I writes a checkpoint; stage II on the published route takes its projector."""
    (aligned, processor), (model, _) = make(), make()
    with torch.no_grad():
        aligned.model.projector.layers[0].weight.fill_(0.25)
    save(aligned, processor, tmp_path / "stage1")
    lay_over(model, projector=tmp_path / "stage1")
    assert model.model.projector.layers[0].weight.eq(0.25).all()


def test_a_run_folder_that_is_no_checkpoint_says_what_is(tmp_path: Path) -> None:
    with pytest.raises(MedPLIBError, match="give the directory of a checkpoint"):
        read_settings(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(MedPLIBError, match="no weights yet"):
        read_settings(tmp_path)
    (tmp_path / "checkpoints" / "step_0000006").mkdir()
    (tmp_path / "checkpoints" / "step_0000009.partial").mkdir()
    with pytest.raises(MedPLIBError, match=r"its last checkpoint step_0000006; .* medplib export"):
        read_settings(tmp_path)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "config.json").write_text("{}")
    assert resolve(tmp_path) == tmp_path / "merged"
