"""Token compressor and mask encoder against the published modules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from model.modeling.in_context import MaskTokenEncoder, TokenCompressor

Arrays = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def arrays(golden: Path) -> Arrays:
    with np.load(golden / "8_icl" / "modules.npz") as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored.files}


def load(module: nn.Module, golden: Path, prefix: str) -> nn.Module:
    weights = load_file(golden / "8_icl" / "icl_extra_modules.safetensors")
    module.load_state_dict({k.removeprefix(prefix): v.float() for k, v in weights.items() if k.startswith(prefix)})
    return module


def test_token_compressor_is_reproduced(golden: Path, arrays: Arrays) -> None:
    compressor = load(TokenCompressor(64, 256), golden, "model.mm_token_compressor.")
    assert_close(compressor(arrays["compressor_in"]), arrays["compressor_out"], rtol=1e-5, atol=1e-6)


def test_mask_encoder_is_reproduced(golden: Path, arrays: Arrays) -> None:
    encoder = load(MaskTokenEncoder(64, 64), golden, "model.mask_encoder.")
    masks = torch.from_numpy(np.unpackbits(arrays["mask_in_packed"].numpy())).view(2, 1, 336, 336)
    assert_close(encoder(masks), arrays["mask_out"], rtol=1e-5, atol=1e-5)
