"""The way from a hidden state to a prompt, and from a low-resolution mask to the image."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from model.modeling.mask_head import MaskHead, restore_masks


def upright_box(height: int, width: int) -> torch.Tensor:
    """Logits [H, W] of a box in the upper left quarter, so that flips, shifts and swaps all show."""
    mask = torch.full((height, width), -4.0)
    mask[height // 8 : height // 2, width // 8 : width // 3] = 4.0
    return mask


def pad_centred(mask: torch.Tensor, side: int) -> torch.Tensor:
    height, width = mask.shape
    top, left = (side - height) // 2, (side - width) // 2
    return functional.pad(mask, (left, side - width - left, top, side - height - top), value=-4.0)


def test_the_head_is_a_two_layer_perceptron() -> None:
    torch.manual_seed(0)
    head = MaskHead(6, 4)
    hidden = torch.randn(3, 6)
    first, second = head.query[0], head.query[2]
    expected = (hidden @ first.weight.T + first.bias).clamp(min=0) @ second.weight.T + second.bias
    torch.testing.assert_close(head(hidden), expected)
    assert head(hidden[:0]).shape == (0, 4)
    assert sorted(head.state_dict()) == ["query.0.bias", "query.0.weight", "query.2.bias", "query.2.weight"]


@pytest.mark.parametrize("size", [(64, 41), (41, 64), (64, 64), (33, 64)])
def test_exact_geometry_inverts_the_padding(size: tuple[int, int]) -> None:
    """A mask that was resized, padded centred (odd pixel last) and shrunk comes back where it was."""
    original = (size[0] * 3, size[1] * 3)
    truth = upright_box(*original)
    inner = functional.interpolate(truth[None, None], size, mode="bilinear", antialias=True)[0, 0]
    padded = pad_centred(inner, 64)
    low_res = functional.interpolate(padded[None, None], (32, 32), mode="bilinear", antialias=True)
    (restored,) = restore_masks(low_res, [size], [original], 64, "exact")
    assert restored.shape == original
    found, expected = restored > 0, truth > 0
    assert (found & expected).sum() / (found | expected).sum() > 0.85


def test_both_geometries_agree_on_square_images_at_full_resolution() -> None:
    low_res = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    exact, legacy = (restore_masks(low_res, [(32, 32)], [(50, 50)], 32, kind)[0] for kind in ("exact", "legacy"))
    torch.testing.assert_close(exact, legacy)


def test_exact_geometry_is_two_bilinear_resizings_and_a_crop() -> None:
    low_res = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = functional.interpolate(low_res, (64, 64), mode="bilinear")[..., 11:52, :]  # 23 rows of padding: 11 and 12
    (mask,) = restore_masks(low_res, [(41, 64)], [(123, 192)], 64)
    torch.testing.assert_close(mask, functional.interpolate(whole, (123, 192), mode="bilinear")[0, 0])


def test_legacy_geometry_crops_the_small_mask_by_large_sizes() -> None:
    low_res = torch.arange(64.0).expand(64, 64)[None, None]  # logits are column numbers
    (wide,) = restore_masks(low_res, [(256, 82)], [(64, 9)], 256, "legacy")
    torch.testing.assert_close(wide, torch.arange(55.0, 64.0).expand(64, 9))
    (narrow,) = restore_masks(low_res, [(256, 40)], [(64, 40)], 256, "legacy")
    torch.testing.assert_close(narrow, torch.arange(12.0, 52.0).expand(64, 40))


def test_each_mask_has_its_own_size() -> None:
    low_res = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    masks = restore_masks(low_res, [(64, 40), (20, 64)], [(100, 62), (31, 99)], 64)
    assert [tuple(mask.shape) for mask in masks] == [(100, 62), (31, 99)]
    assert restore_masks(low_res[:0], [], [], 64) == []


def test_logits_come_back_in_float32_with_gradients() -> None:
    low_res = torch.randn(1, 1, 16, 16, dtype=torch.bfloat16, requires_grad=True)
    (mask,) = restore_masks(low_res, [(64, 40)], [(100, 62)], 64)
    mask.sum().backward()
    assert mask.dtype == torch.float32
    assert low_res.grad is not None
    assert low_res.grad.abs().sum() > 0


def test_wrong_calls_say_what_is_wrong() -> None:
    low_res = torch.zeros(2, 1, 16, 16)
    with pytest.raises(ValueError, match="2 masks need as many sizes, got 1 and 2"):
        restore_masks(low_res, [(64, 64)], [(9, 9), (9, 9)], 64)
    with pytest.raises(ValueError, match="known: exact, legacy"):
        restore_masks(low_res, [(64, 64)] * 2, [(9, 9)] * 2, 64, "other")  # type: ignore[arg-type]
