"""The road from an empty disk to the checkpoint that stage I starts from, very small."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from model.checkpoint import load
from model.data.phantom.scenes import CLASS_IDS
from model.errors import MedPLIBError
from model.inference.engine import Engine, Request
from model.inference.generation import GenerationSettings
from model.modeling.medplib import MedPLIBForCausalLM
from model.train.pretrain.__main__ import NanoPretraining
from model.train.pretrain.language import ALL_KINDS, KINDS, AttentionGuide, Lessons, pool_regions, run_packed
from model.train.pretrain.pools import ScenePool
from model.train.pretrain.towers import soft_labels

SIZES = {
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "max_position_embeddings": 512,
    },
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        "projection_dim": 16,
    },
    "sam_config": {
        "vision_config": {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 256,
            "patch_size": 16,
            "output_channels": 16,
            "num_pos_feats": 8,
            "window_size": 8,
            "global_attn_indexes": [1],
            "mlp_dim": 32,
        },
        "prompt_encoder_config": {"hidden_size": 16, "image_size": 256, "patch_size": 16},
        "mask_decoder_config": {"hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
    },
}
SHORT = {"steps": 2, "batch_size": 2}


@pytest.fixture(scope="module")
def pretraining(tmp_path_factory: pytest.TempPathFactory) -> NanoPretraining:
    """Everything made, two steps of each kind, from 24 scenes."""
    folder = tmp_path_factory.mktemp("pretrain")
    sizes = folder / "sizes.yaml"
    sizes.write_text(yaml.safe_dump(SIZES), encoding="utf-8")
    settings = {
        "sizes": str(sizes),
        "seed": 3,
        "pool": {"train": 24, "train_seed": 1, "held_out": 8, "held_out_seed": 2},
        "tokenizer": {"scenes": 24, "vocab_size": 500},
        **dict.fromkeys(("vision", "sam", "language", "align", "seen", "mask_head"), SHORT),
    }
    config = folder / "pretrain.yaml"
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    made = NanoPretraining(config, folder / "out")
    for step in NanoPretraining.steps:
        made.make(step)
    return made


@pytest.fixture(scope="module")
def lessons(pretraining: NanoPretraining) -> Lessons:
    return pretraining.lessons(pretraining.pool)


@pytest.fixture(scope="module")
def model(pretraining: NanoPretraining) -> MedPLIBForCausalLM:
    return load(pretraining.out / "base")[0].eval()


def test_base_is_a_checkpoint_that_answers(pretraining: NanoPretraining) -> None:
    engine = Engine.from_pretrained(pretraining.out / "base")
    image = pretraining.pool.images[0].copy()
    answer = engine.ask(Request(image, "Is there a tumor?", settings=GenerationSettings(max_new_tokens=3)))
    assert (answer.finish, answer.new_tokens) == ("length", 3) or answer.finish == "end"


def test_parts_come_from_their_own_steps(pretraining: NanoPretraining, model: MedPLIBForCausalLM) -> None:
    sam, seen = pretraining.load_part("sam"), pretraining.load_part("seen")
    assert torch.equal(model.model.sam.image_encoder.pos_embed, sam["sam.image_encoder.pos_embed"])
    assert torch.equal(model.lm_head.weight, seen["lm_head.weight"])


def test_steps_need_what_comes_before(pretraining: NanoPretraining, tmp_path: Path) -> None:
    config = pretraining.out.parent / "pretrain.yaml"
    empty = NanoPretraining(config, tmp_path)
    (tmp_path / "tokenizer").symlink_to(pretraining.out / "tokenizer")
    with pytest.raises(MedPLIBError, match="run the pre-training step 'seen' first"):
        empty.make("base")


def test_only_the_kinds_that_are_wanted_are_taught(
    pretraining: NanoPretraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = yaml.safe_load((pretraining.out.parent / "pretrain.yaml").read_text(encoding="utf-8"))
    few = {**SHORT, "kinds": ["modality", "presence"]}
    settings |= {"language": few, "seen": few, "mask_head": {"steps": 0}}
    config = tmp_path / "pretrain.yaml"
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    for part in ("pool", "pool_held_out", "tokenizer", "vision.safetensors", "sam.safetensors"):
        (tmp_path / part).symlink_to(pretraining.out / part)
    taught = []
    monkeypatch.setattr(
        "model.train.pretrain.language.run_packed",
        lambda model, batch, *rest: taught.append(batch) or run_packed(model, batch, *rest),
    )
    monkeypatch.setattr("model.train.pretrain.language.score", lambda *_: {})  # which asks everything
    asked = NanoPretraining(config, tmp_path)
    for step in ("language", "seen", "base"):
        asked.make(step)
    assert {KINDS[int(kind)] for batch in taught for kind in batch.kinds} == {"modality", "presence"}
    assert (tmp_path / "base" / "config.json").is_file()

    settings["language"] = {**SHORT, "kinds": ["modalty"]}
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    with pytest.raises(MedPLIBError, match="no questions of kind modalty; give some of modality, "):
        NanoPretraining(config, tmp_path).make("language")


def test_pool_opens_with_the_same_content(pretraining: NanoPretraining) -> None:
    again = ScenePool(pretraining.out / "pool")
    assert len(again) == 24
    assert again.questions[5] == pretraining.pool.questions[5]
    assert {int(found) for found in np.unique(again.labels[5])} - {0} == {
        CLASS_IDS[question.about] for question in again.questions[5] if question.kind == "grounding"
    }


def test_patch_shares_count_pixels() -> None:
    labels = np.zeros((1, 256, 256), np.uint8)
    labels[0, :64, :32] = 5
    shares = soft_labels(labels, 4)
    assert shares.shape[:2] == (1, 16)
    assert shares[0, 0, 5] == pytest.approx(0.5)
    assert torch.allclose(shares.sum(-1), torch.ones(1, 16))


def test_a_name_is_one_place_in_a_question(lessons: Lessons) -> None:
    asked = lessons.pool.questions[0]
    prepared = lessons.questions(0)
    number = next(index for index, question in enumerate(asked) if question.kind == "grounding")
    assert {class_id for _, class_id in prepared[number].names} == {CLASS_IDS[asked[number].about]}


def test_packed_questions_do_not_see_each_other(lessons: Lessons, model: MedPLIBForCausalLM) -> None:
    torch.manual_seed(0)
    tokens = torch.randn(1, lessons.grid**2, 32)
    region = torch.randn(1, 32)
    questions = [question for question in lessons.questions(0) if not question.region][:3]
    together = run_packed(model, lessons.packer.pack([questions]), tokens, region)
    alone = run_packed(model, lessons.packer.pack([questions[2:]]), tokens, region)
    length = len(questions[2].ids)
    torch.testing.assert_close(together.hidden[0, -length:], alone.hidden[0, -length:], rtol=1e-4, atol=1e-5)


def test_guide_rewards_looking_at_the_named_structure(lessons: Lessons, model: MedPLIBForCausalLM) -> None:
    rng = np.random.default_rng(0)
    rows = np.arange(2)
    batch, weights = lessons.batch(rows, ALL_KINDS, 4, rng)
    shares = lessons.shares[rows].float()
    tokens = torch.randn(2, lessons.grid**2, 32)
    guide = AttentionGuide(model.model.decoder, layers=(1,))
    parameters = [*model.model.decoder.layers[1].self_attn.q_proj.parameters()]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    parameters[0].requires_grad_(True)
    losses = []
    for _ in range(6):
        run_packed(model, batch, tokens, pool_regions(batch, weights, tokens))
        loss = guide.loss(batch, shares)
        (gradient,) = torch.autograd.grad(loss, parameters)
        parameters[0].data -= 0.5 * gradient
        losses.append(float(loss.detach()))
    guide.remove()
    assert 0 <= losses[-1] < losses[0]
