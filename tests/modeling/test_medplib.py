"""The whole network: losses, the same graph on every rank, generation, saving and loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from model.modeling.configuration import IGNORE_INDEX, IMAGE_PLACEHOLDER, REGION_PLACEHOLDER, MedPLIBConfig
from model.modeling.medplib import MedPLIBForCausalLM
from tests.tiny import tiny_config, tiny_model

SEG = 130


def batch() -> dict[str, Any]:
    """Two rows: a region question answered with one mask, and a plain question; the second is padded."""
    generator = torch.Generator().manual_seed(1)
    image, region = IMAGE_PLACEHOLDER, REGION_PLACEHOLDER
    ids = torch.tensor([[1, image, 5, region, 7, SEG, 8], [1, image, 9, 3, 4, 2, 0]])
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[0, 4:], labels[1, 3:6] = ids[0, 4:], ids[1, 3:6]
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": labels,
        "pixel_values": torch.randn(2, 3, 28, 28, generator=generator),
        "region_masks": torch.ones(1, 4, 4),
        "region_image": torch.tensor([0]),
        "sam_pixel_values": torch.randn(2, 3, 64, 64, generator=generator),
        "sam_sizes": [(64, 48), (64, 64)],
        "image_sizes": [(80, 60), (50, 50)],
        "mask_targets": [[(torch.rand(80, 60, generator=generator) > 0.5).float()], []],
    }


def test_loss_is_the_weighted_sum_of_its_parts() -> None:
    model = tiny_model(loss={"ce": 2.0, "dice": 3.0, "bce": 5.0, "focal": 7.0, "iou": 11.0})
    output = model(**batch())
    parts = output.losses
    expected = 2 * parts["ce"] + 3 * parts["dice"] + 5 * parts["bce"] + 7 * parts["focal"] + 11 * parts["iou"]
    torch.testing.assert_close(output.loss, expected)
    assert [tuple(mask.shape) for mask in output.mask_logits] == [(80, 60)]


def test_router_loss_is_weighted() -> None:
    moe = {"layers": (0, 1), "num_experts": (2, 2), "router_aux_loss_coef": 0.5}
    output = tiny_model(moe=moe)(**batch())
    counts = torch.stack([stats.expert_counts for stats in output.router_stats])
    assert output.losses["router_aux"] > 0
    assert (counts.sum(dim=1) == batch()["attention_mask"].sum() + 2 * (16 - 1)).all()  # padding is not routed


def test_padding_changes_nothing() -> None:
    model, together = tiny_model(), batch()
    alone = {
        "input_ids": together["input_ids"][1:, :6],
        "pixel_values": together["pixel_values"][1:],
    }
    for side in ("right", "left"):
        ids = torch.tensor([[0] * 3, [0] * 3])
        mask = torch.zeros(2, 3, dtype=torch.long)
        parts = ([together["input_ids"], ids], [together["attention_mask"], mask])
        if side == "left":
            parts = tuple(list(reversed(part)) for part in parts)
            rows = [row[row != 0] for row in together["input_ids"]]
            width = 10
            padded = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
            parts = ([padded], [(padded != 0).long()])
        output = model(
            input_ids=torch.cat(parts[0], dim=1),
            attention_mask=torch.cat(parts[1], dim=1),
            **{key: together[key] for key in ("pixel_values", "region_masks", "region_image")},
        )
        wanted = model(**alone).logits[0]
        real = model.splice(
            torch.cat(parts[0], dim=1),
            torch.cat(parts[1], dim=1),
            model.encode_images(together["pixel_values"]),
            together["region_masks"],
            together["region_image"],
        ).plan.attention_mask[1]
        torch.testing.assert_close(output.logits[1][real], wanted, rtol=1e-4, atol=1e-5)


GEOMETRIC = {"kind": "geometric", "num_init_points": 8, "num_sub_points": (4, 2), "num_neighbors": (3, 2)}
IN_CONTEXT = {"token_compressor": True, "compressed_tokens": 4, "mask_encoder": True, "mask_encoder_tokens": 4}


@pytest.mark.parametrize("text_only", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"projector": {"type": "moe_mlp2x_gelu"}, "region": GEOMETRIC},
        {"moe": {"layers": (1,), "num_experts": (3,), "top_k": 2, "use_residual": True}, "in_context": IN_CONTEXT},
    ],
)
def test_every_part_stays_in_the_graph(text_only: bool, options: dict[str, Any]) -> None:
    """Ranks of a distributed run must have the same graph, whatever is in their batch."""
    model = tiny_model(**options).train()
    inputs = {"input_ids": torch.tensor([[1, 5, 6]]), "labels": torch.tensor([[IGNORE_INDEX, 5, 6]])}
    model(**(inputs if text_only else batch())).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    unused = ("encoder.layers.1.", "post_layernorm", "mask_embed", "point_embed", "not_a_point_embed")
    assert [name for name in without if not any(part in name for part in unused)] == []
    if text_only:
        assert model.model.mask_head.query[0].weight.grad.abs().max() == 0


def test_examples_masks_enter_where_their_placeholder_stands() -> None:
    model = tiny_model(in_context=IN_CONTEXT)
    image = IMAGE_PLACEHOLDER
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor([[1, image, 5, image, 6, image, 7]]),
        "pixel_values": torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(2)),
        "visual_kinds": ["image", "mask", "image"],
    }
    masks = torch.zeros(2, 1, 1, 28, 28)
    masks[1, ..., 5:20, 5:20] = 1
    first, second = (model(**inputs, example_masks=mask).last_hidden_state for mask in masks)
    assert first.shape[1] == 4 + 3 * 4  # every visual is four tokens here
    torch.testing.assert_close(first[:, :6], second[:, :6])  # up to the mask
    assert not torch.allclose(first[:, 6:], second[:, 6:])
    with pytest.raises(ValueError, match="2 images and 1 masks"):
        model(**inputs | {"visual_kinds": ["image", "image", "image"]}, example_masks=masks[0])
    with pytest.raises(ValueError, match="without a mask encoder"):
        tiny_model()(**inputs, example_masks=masks[0])


def test_cached_features_give_the_same_output() -> None:
    model, inputs = tiny_model(), batch()
    plain = model(**inputs)
    features = model.encode_images(inputs.pop("pixel_values"))
    embeddings = model.encode_segmented_images(inputs.pop("sam_pixel_values"))
    cached = model(**inputs, image_features=features, sam_embeddings=embeddings)
    torch.testing.assert_close(cached.loss, plain.loss)


def test_missing_masks_are_refused() -> None:
    inputs = batch() | {"mask_targets": [[], []]}
    with pytest.raises(ValueError, match="1 <SEG> for 0 target masks"):
        tiny_model()(**inputs)


def test_generate_takes_images_and_regions() -> None:
    model, inputs = tiny_model(), batch()
    prompt = {key: inputs[key][:1] for key in ("input_ids", "pixel_values", "region_masks", "region_image")}
    new = model.generate(**prompt, max_new_tokens=4, do_sample=False, eos_token_id=-1)
    ids = prompt.pop("input_ids")
    for _ in range(4):  # the same without a cache
        following = model(input_ids=ids, **prompt).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, following], dim=1)
    assert new[0].tolist() == ids[0, -4:].tolist()


def test_a_prompt_with_cached_features_may_bring_its_own_cache() -> None:
    model, inputs = tiny_model(), batch()
    prompt = {key: inputs[key][:1] for key in ("input_ids", "region_masks", "region_image")}
    prompt["image_features"] = model.encode_images(inputs["pixel_values"][:1])
    cache = DynamicCache(config=model.config.text_config)
    torch.testing.assert_close(model(**prompt, past_key_values=cache).logits, model(**prompt).logits)
    assert cache.get_seq_length() == 7 - 1 + 16


def test_labels_of_ready_made_embeddings_are_refused() -> None:
    with pytest.raises(ValueError, match="labels"):
        tiny_model()(inputs_embeds=torch.zeros(1, 3, 32), labels=torch.zeros(1, 3, dtype=torch.long))


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for enabled in (False, True):
        model = tiny_model().train()
        if enabled:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        model(**batch()).loss.backward()
        gradients.append(model.model.decoder.layers[0].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(*gradients)


def test_saved_and_loaded_by_transformers(tmp_path: Path) -> None:
    model = tiny_model(mask={"geometry": "legacy"}, region={"max_points": 7})
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, MedPLIBConfig) and config.mask.geometry == "legacy" and config.region.max_points == 7
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, MedPLIBForCausalLM)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_bf16_runs() -> None:
    inputs = {key: value.bfloat16() if "pixel" in key else value for key, value in batch().items()}
    assert torch.isfinite(tiny_model().bfloat16()(**inputs).loss)


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="MaskConfig has no geometri"):
        tiny_config(mask={"geometri": "exact"})
    with pytest.raises(ValueError, match="one per layer"):
        tiny_config(moe={"layers": (0, 1), "num_experts": (2,)})
