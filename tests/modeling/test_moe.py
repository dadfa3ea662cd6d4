"""The mixture of experts: who computes what, what is dropped, what is learnt."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from model.modeling.moe import MoEFeedForward, mix_by_index, mix_by_scan, mix_of_one

WIDTH = 8


class CountingExpert(nn.Linear):
    """Remembers how many tokens each call brought."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.calls: list[int] = []

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(tokens))
        return super().forward(tokens)


def mixture(num_experts: int = 2, seed: int = 0, **options: Any) -> MoEFeedForward:
    torch.manual_seed(seed)
    return MoEFeedForward([CountingExpert() for _ in range(num_experts)], WIDTH, **options)


def one_sided(**options: Any) -> tuple[MoEFeedForward, torch.Tensor]:
    """A mixture that sends all tokens to expert 1, and ten tokens."""
    moe = mixture(**options)
    with torch.no_grad():
        moe.router.weight.zero_()[1] = 1.0
    return moe, torch.rand(10, WIDTH) + 0.1


def test_top1_output_is_the_chosen_expert_times_its_probability() -> None:
    moe = mixture(drop_tokens=False)
    tokens = torch.randn(6, WIDTH)
    probabilities = (tokens @ moe.router.weight.T).softmax(dim=-1)
    chosen = probabilities.argmax(dim=-1)
    wanted = torch.stack(
        [probabilities[i, e] * moe.experts[e](tokens[i : i + 1])[0] for i, e in enumerate(chosen.tolist())]
    )
    assert_close(moe(tokens).hidden, wanted)


def test_top2_shares_of_a_token_sum_to_one() -> None:
    moe = mixture(4, top_k=2, drop_tokens=False).eval()
    router = moe(torch.randn(3, 5, WIDTH)).router
    assert_close(router.combine.sum(dim=-1), torch.ones(15))
    assert (router.kept.sum(dim=-1) == 2).all()


def test_an_unused_expert_is_called_and_gets_a_zero_gradient() -> None:
    moe, tokens = one_sided(drop_tokens=False)
    moe(tokens).hidden.sum().backward()
    assert [expert.calls for expert in moe.experts] == [[0], [10]]
    unused = moe.experts[0].weight.grad
    assert unused is not None and not unused.any()


def test_no_token_at_all_still_calls_every_expert() -> None:
    moe = mixture(3)
    output = moe(torch.zeros(2, 0, WIDTH))
    (output.hidden.sum() + output.aux_loss).backward()
    assert output.hidden.shape == (2, 0, WIDTH)
    assert [expert.calls for expert in moe.experts] == [[0]] * 3
    assert all(parameter.grad is not None for parameter in moe.parameters())


def test_training_drops_what_exceeds_the_capacity() -> None:
    moe, tokens = one_sided(capacity_factor=1.0)
    output = moe(tokens)
    assert int(output.router.capacity) == 5
    assert int(output.router.dropped) == 5
    lost = ~output.router.kept.any(dim=-1)
    assert int(lost.sum()) == 5
    assert not output.hidden[lost].any()
    assert output.hidden[~lost].any(dim=-1).all()


def test_random_priority_varies_who_is_dropped_and_evaluation_is_first_come() -> None:
    moe, tokens = one_sided(capacity_factor=1.0, eval_capacity_factor=1.0, drop_in_evaluation=True)
    draws = {tuple(moe(tokens).router.kept[:, 1].tolist()) for _ in range(8)}
    assert len(draws) > 1
    moe.eval()
    assert moe(tokens).router.kept[:, 1].tolist() == [True] * 5 + [False] * 5


def test_without_random_priority_training_is_first_come() -> None:
    moe, tokens = one_sided(capacity_factor=1.0, random_token_priority=False)
    assert moe(tokens).router.kept[:, 1].tolist() == [True] * 5 + [False] * 5


def test_second_choices_queue_behind_first_choices() -> None:
    moe, tokens = one_sided(top_k=2, capacity_factor=0.5, drop_tokens=True)
    kept = moe(tokens).router.kept  # all choose expert 1 first, expert 0 second; each takes 5
    assert kept[:, 1].tolist() == kept[:, 0].tolist() == [True] * 5 + [False] * 5


def test_minimum_capacity_and_no_dropping() -> None:
    moe, tokens = one_sided(capacity_factor=0.2, min_capacity=8)
    assert int(moe(tokens).router.dropped) == 2
    moe.drop_tokens = False
    assert int(moe(tokens).router.dropped) == 0


def test_padding_is_neither_routed_nor_counted() -> None:
    moe = mixture(capacity_factor=1.0, eval_capacity_factor=1.0, drop_in_evaluation=True).eval()
    tokens = torch.randn(6, WIDTH)
    padded = torch.cat([tokens[None], torch.randn(1, 20, WIDTH)], dim=1)
    mask = torch.tensor([[1] * 6 + [0] * 20])
    alone, together = moe(tokens[None]), moe(padded, token_mask=mask)
    assert_close(together.hidden[:, :6], alone.hidden)
    assert not together.hidden[:, 6:].any()
    assert_close(together.aux_loss, alone.aux_loss)
    assert torch.equal(together.router.capacity, alone.router.capacity)
    assert int(together.router.expert_counts.sum()) == 6


@pytest.mark.parametrize("num_experts", [2, 4])
def test_evaluation_does_not_depend_on_the_batch(num_experts: int) -> None:
    moe = mixture(num_experts, eval_capacity_factor=0.5).eval()
    rows = torch.randn(5, 7, WIDTH)
    together = moe(rows).hidden
    for row, got in zip(rows, together, strict=True):
        assert_close(moe(row).hidden, got)


def test_load_balancing_loss_is_one_when_even_and_e_when_one_sided() -> None:
    moe = mixture(4)
    with torch.no_grad():
        moe.router.weight.copy_(torch.eye(4, WIDTH) * 50)
    even = torch.eye(WIDTH)[:4].repeat(3, 1)
    assert_close(moe(even).aux_loss, torch.tensor(1.0))
    assert_close(moe(torch.eye(WIDTH)[:1].repeat(9, 1)).aux_loss, torch.tensor(4.0))


def test_training_on_the_load_balancing_loss_evens_out_the_load() -> None:
    moe = mixture(4, drop_tokens=False)
    tokens = torch.randn(256, WIDTH)
    with torch.no_grad():
        tokens[:, 0] += 3
        moe.router.weight[2, 0] += 1
    optimizer = torch.optim.Adam(moe.router.parameters(), lr=0.05)
    before = moe(tokens).router.expert_counts.max()
    for _ in range(50):
        optimizer.zero_grad()
        moe(tokens).aux_loss.backward()
        optimizer.step()
    assert moe(tokens).router.expert_counts.max() < 0.6 * before


@pytest.mark.parametrize("top_k", [1, 2])
def test_both_ways_of_mixing_agree(top_k: int) -> None:
    moe = mixture(3, top_k=top_k, capacity_factor=0.7)
    tokens = torch.randn(11, WIDTH)
    router = moe(tokens).router
    arguments = (tokens, router.combine, router.kept, moe.experts)
    assert_close(mix_by_scan(*arguments), mix_by_index(*arguments))


@pytest.mark.parametrize("top_k", [1, 2])
@torch.inference_mode()
def test_one_token_is_mixed_as_among_many(top_k: int) -> None:
    moe = mixture(3, top_k=top_k)
    for token in torch.randn(9, 1, WIDTH):
        router = moe(token).router
        for kept in (router.kept, torch.zeros_like(router.kept)):
            arguments = (token, router.combine * kept, kept, moe.experts)
            assert_close(mix_of_one(*arguments), mix_by_index(*arguments), rtol=0, atol=0)


def test_router_computes_in_float32_whatever_the_model_runs_in() -> None:
    moe = mixture().to(torch.bfloat16)
    output = moe(torch.randn(5, WIDTH, dtype=torch.bfloat16))
    assert output.hidden.dtype == torch.bfloat16
    assert output.router.combine.dtype == output.aux_loss.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mixture().router(torch.randn(5, WIDTH)).dtype == torch.float32


def test_residual_expert_takes_its_share() -> None:
    moe = mixture(drop_tokens=False, residual_expert=nn.Linear(WIDTH, WIDTH))
    tokens = torch.randn(4, WIDTH)
    with torch.no_grad():
        moe.residual_coefficient.weight.zero_()
        moe.residual_coefficient.bias.copy_(torch.tensor([-50.0, 50.0]))
    assert_close(moe(tokens).hidden, moe.residual_expert(tokens))


def test_renormalised_top1_of_equal_experts_is_the_dense_output_and_still_teaches_the_router() -> None:
    dense = nn.Linear(WIDTH, WIDTH)
    moe = MoEFeedForward([dense, copy.deepcopy(dense)], WIDTH, drop_tokens=False, renormalise=True)
    tokens = torch.randn(6, WIDTH)
    output = moe(tokens).hidden
    assert_close(output, dense(tokens))
    output.square().sum().backward()
    assert moe.router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("num_experts", "top_k"), [(2, 3), (2, 0), (1, 2)])
def test_impossible_choices_are_refused(num_experts: int, top_k: int) -> None:
    with pytest.raises(ValueError, match="top_k"):
        mixture(num_experts, top_k=top_k)
