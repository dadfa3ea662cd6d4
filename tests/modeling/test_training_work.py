"""What a training step computes, and what it leaves alone: logits nobody learns from, towers that learn nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from model.modeling.configuration import IGNORE_INDEX, IMAGE_PLACEHOLDER
from model.modeling.medplib import MedPLIBForCausalLM
from tests.tiny import tiny_model

SEG = 130


@contextmanager
def calls(modules: dict[str, nn.Module]) -> Iterator[Counter[str]]:
    """Rows that each module gets while this lasts, backward passes included."""
    rows: Counter[str] = Counter()
    hooks = [
        module.register_forward_pre_hook(lambda _, given, name=name: rows.update({name: len(given[0])}))
        for name, module in modules.items()
    ]
    yield rows
    for hook in hooks:
        hook.remove()


def batch(images: int = 2) -> dict[str, Any]:
    """Two rows, of an image each, that answer in four tokens, one of them a mask."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 100, (2, 20), generator=generator)
    ids[:, 1] = IMAGE_PLACEHOLDER
    labels = torch.full_like(ids, IGNORE_INDEX)
    ids[:, -2] = SEG
    labels[:, -4:] = ids[:, -4:]
    pixels = torch.randn(images, 3, 28, 28, generator=generator)
    sam = torch.randn(images, 3, 64, 64, generator=generator)
    targets = [(torch.rand(1, 40, 64, generator=generator) > 0.5).float() for _ in range(2)]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "pixel_values": pixels,
        "sam_pixel_values": sam,
        "sam_sizes": [(40, 64)] * 2,
        "image_sizes": [(40, 64)] * 2,
        "mask_targets": targets,
    }


def network(trained: str, checkpointing: bool = False) -> MedPLIBForCausalLM:
    """In training, everything frozen but what starts with one of the names."""
    model = tiny_model(experts=0).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(trained.split())))
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_supervised_positions_get_logits(checkpointing: bool) -> None:
    model = network("lm_head model.decoder", checkpointing)
    with calls({"lm_head": model.lm_head}) as rows:
        output = model(**batch())
        output.loss.backward()
    assert rows == {"lm_head": 8}
    assert output.logits is None
    with calls({"lm_head": model.lm_head}) as rows:  # whoever asks for all of them gets them
        assert model(**batch(), return_logits=True).logits.shape[:2] == (2, 35)
    assert rows["lm_head"] == 8 + 2


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("trained", ["model.decoder", "model.decoder model.vision_tower model.sam"])
def test_a_frozen_tower_runs_once_a_step(trained: str, checkpointing: bool) -> None:
    model = network(trained, checkpointing)
    towers = {
        "clip": model.model.vision_tower.clip.encoder.layers[0].mlp,
        "sam": model.model.sam.image_encoder.layers[0].mlp,
        "decoder": model.model.decoder.layers[0].mlp,
    }
    with calls(towers) as rows:
        model(**batch()).loss.backward()
    again = 2 if checkpointing else 1
    learning = again if "vision_tower" in trained else 1
    assert rows == {"clip": 2 * learning, "sam": 2 * learning, "decoder": 2 * again}


@pytest.mark.parametrize("trained", ["model.decoder", "model.decoder model.vision_tower model.sam model.projector"])
def test_an_image_of_several_rows_is_encoded_once_and_learnt_from_alike(trained: str) -> None:
    model = network(trained)
    shared = batch(images=1)
    index = torch.zeros(2, dtype=torch.long)
    apart = {**shared, **{name: shared[name][index] for name in ("pixel_values", "sam_pixel_values")}}
    towers = {"clip": model.model.vision_tower.clip.pre_layrnorm, "sam": model.model.sam.image_encoder}
    found = {}
    for name, given in (("apart", apart), ("shared", {**shared, "image_index": index, "sam_index": index})):
        model.zero_grad()
        with calls(towers) as rows:
            output = model(**given)
        assert rows == dict.fromkeys(towers, 1 if name == "shared" else 2)
        output.loss.backward()
        gradients = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
        found[name] = (output.loss, gradients)
    torch.testing.assert_close(found["shared"], found["apart"], rtol=1e-4, atol=1e-5)
    assert any("vision_tower" in name for name in found["shared"][1]) == ("vision_tower" in trained)


def test_features_made_before_give_the_same_step() -> None:
    model = network("model.decoder model.projector model.region_adapter model.mask_head model.sam.mask_decoder")
    given = batch()
    with torch.no_grad():
        features = model.encode_images(given.pop("pixel_values"))
        embeddings = model.encode_segmented_images(given.pop("sam_pixel_values"))
    with calls({"clip": model.model.vision_tower.clip.pre_layrnorm, "sam": model.model.sam.image_encoder}) as rows:
        loss = model(**given, image_features=features, sam_embeddings=embeddings).loss
    assert not rows
    assert torch.equal(loss, model(**batch()).loss)
