"""In-context modules: shapes for any size, empty batches, masks told apart."""

from __future__ import annotations

import torch

from model.modeling.in_context import MaskTokenEncoder, TokenCompressor


def test_compressor_shortens_to_the_asked_number() -> None:
    compressor = TokenCompressor(8, 9)
    assert compressor(torch.randn(2, 25, 8)).shape == (2, 9, 8)
    assert compressor(torch.randn(0, 25, 8)).shape == (0, 9, 8)


def test_compressor_pools_neighbours_in_order() -> None:
    compressor = TokenCompressor(4, 2)
    features = torch.randn(1, 6, 4)
    changed = features.clone()
    changed[:, 3:] = 0
    before, after = compressor(features), compressor(changed)
    assert torch.equal(before[:, 0], after[:, 0])
    assert not torch.equal(before[:, 1], after[:, 1])


def test_mask_encoder_tells_masks_apart() -> None:
    torch.manual_seed(0)
    encoder = MaskTokenEncoder(8, 16)
    masks = torch.zeros(2, 1, 64, 64)
    masks[1, :, 20:40, 20:40] = 1
    tokens = encoder(masks)
    assert tokens.shape == (2, 16, 8)
    assert not torch.allclose(tokens[0], tokens[1])
    assert encoder(masks.bool()).equal(tokens)


def test_no_mask_gives_no_token_and_a_graph() -> None:
    encoder = MaskTokenEncoder(8, 16)
    tokens = encoder(torch.zeros(0, 1, 64, 64))
    assert tokens.shape == (0, 16, 8)
    tokens.sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
