"""SAM-Med2D's behaviour at a tiny size: shapes, batching, prompts, gradients, precision."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import SamConfig

from model.modeling.configuration import MaskConfig, MedPLIBConfig
from model.modeling.sam_med2d import SamMed2D

WIDTH, SIDE, GRID = 32, 64, 4


def tiny_config(**vision: Any) -> SamConfig:
    return SamConfig(
        vision_config={
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": 16,
            "output_channels": WIDTH,
            "num_pos_feats": WIDTH // 2,
            "window_size": 3,
            "global_attn_indexes": [1],
            **vision,
        },
        prompt_encoder_config={"hidden_size": WIDTH, "image_size": SIDE, "patch_size": 16},
        mask_decoder_config={"hidden_size": WIDTH, "mlp_dim": 48, "iou_head_hidden_dim": WIDTH},
    )


@pytest.fixture
def sam() -> SamMed2D:
    torch.manual_seed(0)
    return SamMed2D(tiny_config(), MaskConfig()).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def queries() -> torch.Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(2))


def decoder_parameters(sam: SamMed2D) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return sam.mask_decoder.named_parameters()


def test_shapes_follow_the_configuration(sam: SamMed2D, images: torch.Tensor, queries: torch.Tensor) -> None:
    embeddings = sam.encode_image(images)
    masks, iou = sam.decode(embeddings, queries, torch.tensor([0, 1, 1]))
    assert embeddings.shape == (2, WIDTH, GRID, GRID)
    assert masks.shape == (3, 1, 4 * GRID, 4 * GRID)
    assert iou.shape == (3, 1)


@torch.no_grad()
def test_a_batch_decodes_each_mask_as_if_alone(sam: SamMed2D, images: torch.Tensor, queries: torch.Tensor) -> None:
    index = torch.tensor([1, 0, 1])
    masks, iou = sam.decode(sam.encode_image(images), queries, index)
    for row, image in enumerate(index.tolist()):
        embeddings = sam.encode_image(images[image : image + 1])
        mask, score = sam.decode(embeddings, queries[row : row + 1], torch.tensor([0]))
        torch.testing.assert_close(masks[row : row + 1], mask, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(iou[row : row + 1], score, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(masks[0], masks[2], atol=1e-3)  # the query matters
    other, _ = sam.decode(sam.encode_image(images), queries, torch.tensor([0, 0, 1]))
    assert not torch.allclose(masks[0], other[0], atol=1e-3)  # and so does the image


def test_no_masks_keep_the_decoder_in_the_graph(sam: SamMed2D, images: torch.Tensor) -> None:
    queries = torch.zeros(0, WIDTH, requires_grad=True)
    masks, iou = sam.decode(sam.encode_image(images), queries, torch.zeros(0, dtype=torch.long))
    assert masks.shape == (0, 1, 4 * GRID, 4 * GRID)
    assert iou.shape == (0, 1)
    (masks.sum() + iou.sum()).backward()
    missing = [name for name, parameter in decoder_parameters(sam) if parameter.grad is None]
    assert missing == []
    assert all(parameter.grad.eq(0).all() for _, parameter in decoder_parameters(sam) if parameter.grad is not None)
    assert queries.grad is not None


def test_a_mask_reaches_the_same_parameters_as_no_mask(
    sam: SamMed2D, images: torch.Tensor, queries: torch.Tensor
) -> None:
    reached = []
    for rows in (queries, queries[:0]):
        sam.zero_grad(set_to_none=True)
        masks, iou = sam.decode(sam.encode_image(images), rows, torch.zeros(len(rows), dtype=torch.long))
        (masks.sum() + iou.sum()).backward()
        reached.append({name for name, parameter in sam.named_parameters() if parameter.grad is not None})
    assert reached[0] - reached[1] <= {name for name in reached[0] if name.startswith("image_encoder.")}
    assert {name for name in reached[0] if name.startswith(("mask_decoder.", "prompt_encoder."))} <= reached[1]


def test_no_images_and_no_masks(sam: SamMed2D) -> None:
    for trained in (True, False):
        sam.image_encoder.requires_grad_(trained)
        embeddings = sam.encode_image(torch.zeros(0, 3, SIDE, SIDE))
        masks, _ = sam.decode(embeddings, torch.zeros(0, WIDTH), torch.zeros(0, dtype=torch.long))
        assert embeddings.shape == (0, WIDTH, GRID, GRID)
        assert embeddings.requires_grad is trained
        assert masks.shape == (0, 1, 4 * GRID, 4 * GRID)


def test_a_frozen_encoder_records_no_gradients(sam: SamMed2D, images: torch.Tensor) -> None:
    assert sam.encode_image(images).requires_grad
    sam.image_encoder.requires_grad_(False)
    assert not sam.encode_image(images).requires_grad
    sam.image_encoder.layers[0].adapter.requires_grad_(True)
    sam.encode_image(images).sum().backward()
    assert sam.image_encoder.layers[0].adapter.spatial[0].weight.grad.abs().sum() > 0


@torch.no_grad()
def test_the_adapter_is_a_choice_and_matters(images: torch.Tensor) -> None:
    torch.manual_seed(0)
    plain, adapted = SamMed2D(tiny_config(), MaskConfig(adapter=False)), SamMed2D(tiny_config(), MaskConfig())
    report = adapted.load_state_dict(plain.state_dict(), strict=False)
    assert report.unexpected_keys == []
    assert {key.split(".")[3] for key in report.missing_keys} == {"adapter"}
    assert not torch.allclose(plain.encode_image(images), adapted.encode_image(images), atol=1e-3)


@torch.no_grad()
def test_boxes_and_points_prompt_with_or_without_text(
    sam: SamMed2D, images: torch.Tensor, queries: torch.Tensor
) -> None:
    embeddings, index = sam.encode_image(images), torch.tensor([0, 1, 1])
    boxes = torch.tensor([[4.0, 4, 30, 30], [10, 2, 60, 40], [0, 0, 63, 63]])
    points = torch.tensor([[[5.0, 6], [20, 20]], [[30, 10], [1, 1]], [[40, 40], [60, 3]]])
    labels = torch.tensor([[1, 0], [1, 1], [1, -10]])
    results = [
        sam.decode(embeddings, queries, index),
        sam.decode(embeddings, queries, index, boxes=boxes),
        sam.decode(embeddings, None, index, boxes=boxes),
        sam.decode(embeddings, None, index, points=points),
        sam.decode(embeddings, None, index, points=points, point_labels=labels),
        sam.decode(embeddings, queries, index, boxes=boxes, points=points, point_labels=labels),
    ]
    for first in range(len(results)):
        assert results[first][0].shape == (3, 1, 4 * GRID, 4 * GRID)
        for second in range(first):
            assert not torch.allclose(results[first][0], results[second][0], atol=1e-4)
    empty, _ = sam.decode(embeddings, None, index[:0], boxes=boxes[:0], points=points[:0])
    assert len(empty) == 0


def test_a_mask_needs_a_prompt(sam: SamMed2D, images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="queries, boxes or points"):
        sam.decode(sam.encode_image(images), None, torch.tensor([0]))


@torch.no_grad()
def test_bfloat16_stays_near_float32(sam: SamMed2D, images: torch.Tensor, queries: torch.Tensor) -> None:
    index = torch.tensor([0, 1, 1])
    masks, iou = sam.decode(sam.encode_image(images), queries, index)
    half = sam.bfloat16()
    low_masks, low_iou = half.decode(half.encode_image(images), queries, index)
    assert low_masks.dtype == low_iou.dtype == torch.bfloat16
    assert (low_masks.float() - masks).abs().max() < 0.1 * masks.abs().max()
    torch.testing.assert_close(low_iou.float(), iou, rtol=0.1, atol=0.05)


def test_the_fourier_matrix_is_never_trained(sam: SamMed2D) -> None:
    sam.requires_grad_(True)
    assert "prompt_encoder.shared_embedding.positional_embedding" in sam.state_dict()
    assert not any("positional_embedding" in name for name, _ in sam.named_parameters())


def test_gradient_checkpointing_changes_nothing(sam: SamMed2D, images: torch.Tensor) -> None:
    sam.train()
    gradients = []
    for checkpointed in (False, True):
        for layer in sam.image_encoder.layers:
            layer.gradient_checkpointing = checkpointed
            layer._gradient_checkpointing_func = lambda call, *inputs: torch.utils.checkpoint.checkpoint(
                call, *inputs, use_reentrant=False
            )
        sam.zero_grad(set_to_none=True)
        sam.encode_image(images).square().sum().backward()
        gradients.append(sam.image_encoder.patch_embed.projection.weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("width", "depth", "heads", "global_layers"),
    [(768, 12, 12, (2, 5, 8, 11)), (1024, 24, 16, (5, 11, 17, 23)), (1280, 32, 16, (7, 15, 23, 31))],
    ids=["ViT-B", "ViT-L", "ViT-H"],
)
def test_published_sizes_build(width: int, depth: int, heads: int, global_layers: tuple[int, ...]) -> None:
    config = MedPLIBConfig(
        sam_config={
            "vision_config": {
                "hidden_size": width,
                "num_hidden_layers": depth,
                "num_attention_heads": heads,
                "global_attn_indexes": list(global_layers),
                "image_size": 256,
            },
            "prompt_encoder_config": {"image_size": 256},
        }
    )
    with torch.device("meta"):
        sam = SamMed2D(config.sam_config, config.mask)
        masks, _ = sam.decode(
            sam.encode_image(torch.empty(1, 3, 256, 256)), torch.empty(2, 256), torch.zeros(2, dtype=torch.long)
        )
    assert len(sam.image_encoder.layers) == depth
    assert [index for index, layer in enumerate(sam.image_encoder.layers) if layer.window_size == 0] == [*global_layers]
    assert masks.shape == (2, 1, 64, 64)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"output_channels": 16}, "output_channels is 16"),
        ({"num_pos_feats": 8}, "num_pos_feats is 16"),
        ({"image_size": 128}, "image and patch size 128 and 16"),
    ],
)
def test_sizes_that_do_not_fit_are_named(change: dict[str, int], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        SamMed2D(tiny_config(**change), MaskConfig())


def test_the_adapter_needs_an_even_grid() -> None:
    config = tiny_config(image_size=48)
    config.prompt_encoder_config.image_size = 48
    with pytest.raises(ValueError, match="even grid"):
        SamMed2D(config, MaskConfig())


def test_the_given_configuration_is_left_alone() -> None:
    config = tiny_config()
    before = config.vision_config._attn_implementation
    SamMed2D(config, MaskConfig())
    assert config.vision_config._attn_implementation == before


@pytest.fixture
def with_stem() -> SamMed2D:
    torch.manual_seed(0)
    return SamMed2D(tiny_config(), MaskConfig(stem_channels=(8, 8, 16))).eval()


def test_stem_doubles_mask_resolution(with_stem: SamMed2D, images: torch.Tensor, queries: torch.Tensor) -> None:
    embeddings = with_stem.encode_image(images)
    masks, iou = with_stem.decode(embeddings, queries, torch.tensor([0, 1, 1]))
    assert embeddings.shape[1:] == with_stem.embedding_shape
    assert masks.shape == (3, 1, SIDE // 2, SIDE // 2) and iou.shape == (3, 1)


def test_stem_masks_are_the_same_alone_and_batched(
    with_stem: SamMed2D, images: torch.Tensor, queries: torch.Tensor
) -> None:
    both, _ = with_stem.decode(with_stem.encode_image(images), queries, torch.tensor([0, 1, 1]))
    alone, _ = with_stem.decode(with_stem.encode_image(images[1:]), queries[2:], torch.tensor([0]))
    torch.testing.assert_close(both[2:], alone, atol=1e-4, rtol=1e-4)


def test_skip_features_carry_single_pixels(with_stem: SamMed2D, images: torch.Tensor, queries: torch.Tensor) -> None:
    changed = images.clone()
    changed[:, :, 20:22, 30:32] += 5.0
    index = torch.tensor([0, 1, 1])
    before, _ = with_stem.decode(with_stem.encode_image(images), queries, index)
    after, _ = with_stem.decode(with_stem.encode_image(changed), queries, index)
    near = (after - before).abs()[:, 0, 8:14, 13:18].amax(dim=(1, 2))
    far = (after - before).abs()[:, 0, 24:, :8].mean(dim=(1, 2))
    assert (near > 2 * far).all()


def test_every_parameter_of_the_stem_learns(with_stem: SamMed2D, images: torch.Tensor, queries: torch.Tensor) -> None:
    masks, iou = with_stem.decode(with_stem.encode_image(images), queries, torch.tensor([0, 1, 1]))
    (masks.square().mean() + iou.sum()).backward()
    without = {
        name
        for name, parameter in with_stem.named_parameters()
        if parameter.grad is None and not name.startswith("prompt_encoder.")
    }
    assert not without


def test_stem_channels_must_fit() -> None:
    with pytest.raises(ValueError, match="three multiples of 8"):
        MaskConfig(stem_channels=(16, 32))
    with pytest.raises(ValueError, match="multiple of 8"):
        SamMed2D(tiny_config(hidden_size=20), MaskConfig(stem_channels=(8, 8, 8)))


@pytest.mark.parametrize("stem", [(), (8, 8, 16)])
def test_an_earlier_mask_is_corrected(stem: tuple[int, ...], images: torch.Tensor) -> None:
    torch.manual_seed(0)
    sam = SamMed2D(tiny_config(), MaskConfig(stem_channels=stem)).eval()
    embeddings, index = sam.encode_image(images), torch.tensor([0, 1])
    points = torch.tensor([[[10.0, 12.0]], [[40.0, 30.0]]])
    earlier = torch.full((2, 1, 4 * GRID, 4 * GRID), -4.0)
    earlier[0, :, 2:6, 2:6] = 4.0
    plain, _ = sam.decode(embeddings, None, index, points=points)
    corrected, _ = sam.decode(embeddings, None, index, points=points, masks=earlier)
    assert corrected.shape == plain.shape and not torch.allclose(corrected, plain)
