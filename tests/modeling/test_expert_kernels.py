"""The expert kernels give what the experts themselves give, on a GPU or, with TRITON_INTERPRET=1, on any machine."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU; TRITON_INTERPRET=1 runs the kernels without one", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed; it comes with torch's CUDA build")

from model.modeling.expert_kernels import FewTokenExperts
from model.modeling.moe import MoEFeedForward, mix_by_scan

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def experts(number: int, width: int, inner: int, dtype: torch.dtype = torch.float32) -> list[LlamaMLP]:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=width, intermediate_size=inner, num_attention_heads=1)
    made = [LlamaMLP(config).to(DEVICE, dtype) for _ in range(number)]
    for one in made:
        for weight in one.parameters():
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return made


@pytest.mark.parametrize(
    ("width", "inner", "dtype"),
    [(32, 48, torch.float32), (32, 48, torch.bfloat16), (32, 48, torch.float16), (24, 1030, torch.float32)],
)  # the last one needs two tiles
@torch.inference_mode()
def test_top1_is_the_chosen_expert_times_its_share(width: int, inner: int, dtype: torch.dtype) -> None:
    made = experts(2, width, inner, dtype)
    tokens = torch.randn(3, width, device=DEVICE, dtype=dtype)
    shares = torch.tensor([[0.7, 0.0], [0.0, 0.9], [0.6, 0.0]], device=DEVICE)
    wanted = torch.stack([shares[row].max() * made[e].float()(tokens[row].float()) for row, e in enumerate([0, 1, 0])])
    for one in made:
        one.to(dtype)
    found = FewTokenExperts(made, 1)(tokens, shares)
    assert found.dtype == dtype
    assert (found.float() - wanted).norm() / wanted.norm() < TOLERANCE[dtype]


@torch.inference_mode()
def test_two_choices_of_four_are_summed() -> None:
    made = experts(4, 32, 48)
    tokens = torch.randn(4, 32, device=DEVICE)
    shares = torch.tensor([[0.25, 0, 0.75, 0], [0, 0, 0.5, 0.5], [1, 0, 0, 0], [0, 0, 0, 0]], device=DEVICE)
    found = FewTokenExperts(made, 2)(tokens, shares)
    assert_close(found, mix_by_scan(tokens, shares, shares > 0, made), rtol=1e-4, atol=1e-5)
    assert not found[3].any()  # a token that nobody took


@torch.inference_mode()
def test_a_mixture_may_be_mixed_so() -> None:
    made = experts(2, 32, 48)
    moe = MoEFeedForward(made, 32).to(DEVICE).eval()
    tokens = torch.randn(4, 32, device=DEVICE)
    plain, chosen = moe.infer(tokens)
    found, same = moe.infer(tokens, FewTokenExperts(made, moe.top_k))
    assert_close(found, plain, rtol=1e-4, atol=1e-5)
    assert torch.equal(chosen, same)


@torch.inference_mode()
def test_experts_nobody_chose_are_not_read() -> None:
    """Poisoned weights of the other expert would show."""
    made = experts(2, 32, 48)
    nn.init.constant_(made[1].up_proj.weight, torch.nan)
    found = FewTokenExperts(made, 1)(torch.randn(2, 32, device=DEVICE), torch.tensor([[0.9, 0.0]] * 2, device=DEVICE))
    assert found.isfinite().all()


def test_other_experts_are_refused() -> None:
    made = experts(2, 32, 48)
    assert FewTokenExperts.fits(made)
    biased = experts(2, 32, 48)
    biased[0].up_proj = nn.Linear(32, 48)
    replaced = experts(2, 32, 48)
    replaced[1].down_proj = nn.Sequential(replaced[1].down_proj)  # type: ignore[assignment]
    mixed = [made[0], experts(1, 32, 48, torch.bfloat16)[0]]
    for unfit in (biased, replaced, mixed, [made[0], experts(1, 32, 64)[0]], [nn.Linear(32, 32)]):
        assert not FewTokenExperts.fits(unfit)
        with pytest.raises(ValueError, match="plain LLaMA"):
            FewTokenExperts(unfit, 1)
