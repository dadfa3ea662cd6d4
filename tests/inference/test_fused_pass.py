"""A decoding pass by kernels gives what the plain pass gives, on a GPU or, with TRITON_INTERPRET=1, on any machine."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch.testing import assert_close

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU; TRITON_INTERPRET=1 runs the kernels without one", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed; it comes with torch's CUDA build")

from transformers import LlamaConfig

from model.inference.fused_pass import FusedPass
from model.inference.runner import DecoderRunner
from model.inference.slots import SlotCache
from model.modeling.configuration import MoEConfig
from model.modeling.decoder import MedPLIBDecoder

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTHS = [0, 3, 127, 128, 200, 255]


def decoder(key_heads: int = 4, dtype: torch.dtype = torch.float32, **moe: object) -> MedPLIBDecoder:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=key_heads,
        max_position_embeddings=256,
    )
    made = MedPLIBDecoder(config, MoEConfig(**moe))
    for parameter in made.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return made.to(DEVICE, dtype).eval()


def both(made: MedPLIBDecoder, lengths: list[int], bucket: int, few: int | None = None) -> tuple[torch.Tensor, ...]:
    """Final states, keys and values by the plain pass and by the kernels, from the same filled slots."""
    found = []
    for fused in (False, True):
        torch.manual_seed(1)
        cache = SlotCache(made.config, len(lengths), 256, made.dtype, DEVICE)
        for store in (cache.keys, cache.values):
            store.copy_(torch.randn(store.shape).bfloat16())
        runner = DecoderRunner(made, cache)
        tokens = torch.arange(len(lengths), device=DEVICE)
        at = torch.tensor(lengths, device=DEVICE)
        if fused:
            kernels = FusedPass(made, cache, runner.cos, runner.sin)
            for layer in kernels.layers:
                layer.few = layer.few if few is None else few
            found += [kernels(tokens, at, bucket), cache.keys, cache.values]
        else:
            found += [runner.decode(tokens, at, bucket).hidden, cache.keys, cache.values]
    return tuple(found)


@pytest.mark.parametrize("few", [0, 8])
@pytest.mark.parametrize("key_heads", [4, 2])
@torch.inference_mode()
def test_a_pass_over_slots_of_all_lengths(few: int, key_heads: int) -> None:
    made = decoder(key_heads, layers=(0, 1), num_experts=(2, 3))
    hidden, keys, values, fused_hidden, fused_keys, fused_values = both(made, LENGTHS, 256, few)
    assert_close(fused_hidden, hidden, rtol=1e-3, atol=1e-4)
    assert_close(fused_keys, keys, rtol=1e-3, atol=1e-4)
    assert_close(fused_values, values, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "moe",
    [
        {},
        {"layers": (1,), "num_experts": (4,), "top_k": 2},
        {"layers": (0,), "num_experts": (2,), "use_residual": True},
    ],
)
@torch.inference_mode()
def test_other_feed_forward_parts(moe: dict[str, object]) -> None:
    found = both(decoder(**moe), [5, 40, 20], 64)
    assert_close(found[3], found[0], rtol=1e-3, atol=1e-4)


@torch.inference_mode()
def test_half_precision_is_as_exact_as_plain_half_precision() -> None:
    half = decoder(dtype=torch.bfloat16, layers=(0, 1), num_experts=(2, 2))
    exact = copy.deepcopy(half).float()
    found, wanted = both(half, [5, 140], 256), both(exact, [5, 140], 256)[0]
    errors = [(hidden.float() - wanted).norm() / wanted.norm() for hidden in (found[0], found[3])]
    # Triton's interpreter cuts bfloat16 off instead of rounding it.
    assert errors[1] < (1.3 if DEVICE.type == "cuda" else 4) * errors[0]


@torch.inference_mode()
def test_a_row_depends_neither_on_its_company_nor_on_how_far_the_cache_is_read() -> None:
    made = decoder(layers=(0, 1), num_experts=(2, 2))
    alone = both(made, [130], 256)[3]
    assert torch.equal(both(made, [130], 192)[3], alone)
    torch.manual_seed(2)
    cache = SlotCache(made.config, 3, 256, made.dtype, DEVICE)
    cache.keys.normal_()
    cache.values.normal_()
    runner = DecoderRunner(made, cache)
    kernels = FusedPass(made, cache, runner.cos, runner.sin)
    tokens, lengths = torch.tensor([3, 4, 5], device=DEVICE), torch.tensor([130, 7, 250], device=DEVICE)
    together = kernels(tokens, lengths, 256)
    assert torch.equal(kernels(tokens[:1], lengths[:1], 256)[0], together[0])
