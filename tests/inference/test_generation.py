"""How tokens are chosen: the arg-max, or an exact sample that is a row's own, whatever it is batched with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from model.errors import MedPLIBError
from model.inference.generation import Draw, GenerationSettings, choose_tokens, gumbel_noise, seed_of

LOGITS = torch.tensor([0.0, 1.5, 1.0, -2.0, 0.5, -0.5])
CHI_SQUARE = {2: 13.82, 3: 16.27, 5: 20.52, 25: 52.62}
"""What a χ² variable of so many degrees of freedom exceeds once in a thousand times."""


def draw(logits: Tensor, count: int, seed: int = 1, **options: Any) -> np.ndarray:
    """``count`` tokens drawn from the same logits [V] at successive steps."""
    settings = GenerationSettings(**{"temperature": 1.0, **options})
    draws = [Draw(settings, seed, step) for step in range(count)]
    return choose_tokens(logits.expand(count, -1), draws).numpy()


def chi_square(tokens: np.ndarray, probabilities: Tensor) -> float:
    """Distance of drawn tokens from what they were drawn from; tokens of no probability must be absent."""
    counts = np.bincount(tokens, minlength=len(probabilities))
    possible = probabilities.numpy() > 0
    assert counts[~possible].sum() == 0
    expected = probabilities.double().numpy()[possible] * len(tokens)
    return float(((counts[possible] - expected) ** 2 / expected).sum())


# --- the distribution -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_the_distribution(temperature: float) -> None:
    probabilities = (LOGITS / temperature).softmax(-1)
    tokens = draw(LOGITS, 20_000, temperature=temperature)
    assert chi_square(tokens, probabilities) < CHI_SQUARE[5]
    assert chi_square(tokens, LOGITS.softmax(-1).flip(0)) > 10 * CHI_SQUARE[5]  # the distance can tell


def test_draws_of_many_seeds_follow_it_too() -> None:
    """Requests that come with seeds 0, 1, 2 … are as independent as any."""
    settings = GenerationSettings(temperature=1.0)
    draws = [Draw(settings, seed, 7) for seed in range(20_000)]
    assert chi_square(choose_tokens(LOGITS.expand(20_000, -1), draws).numpy(), LOGITS.softmax(-1)) < CHI_SQUARE[5]


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_successive_draws_are_independent(seed: int) -> None:
    tokens = draw(LOGITS, 20_000, seed=seed)
    pairs = tokens[:-1:2] * len(LOGITS) + tokens[1::2]
    joint = torch.outer(LOGITS.softmax(-1), LOGITS.softmax(-1)).flatten()
    margins = chi_square(tokens[:-1:2], LOGITS.softmax(-1)) + chi_square(tokens[1::2], LOGITS.softmax(-1))
    assert chi_square(pairs, joint) - margins < CHI_SQUARE[25]


def test_the_most_likely_tokens_share_all_draws() -> None:
    kept = torch.zeros(6).index_copy(0, torch.tensor([1, 2, 4]), LOGITS.softmax(-1)[[1, 2, 4]])
    assert chi_square(draw(LOGITS, 20_000, top_k=3), kept / kept.sum()) < CHI_SQUARE[2]
    assert set(draw(LOGITS, 100, top_k=1)) == {1}
    assert chi_square(draw(LOGITS, 20_000, top_k=100), LOGITS.softmax(-1)) < CHI_SQUARE[5]


def test_the_nucleus_shares_all_draws() -> None:
    probabilities = LOGITS.softmax(-1)  # 0.10, 0.44, 0.27, 0.01, 0.16, 0.06: the nucleus ends in its fourth token
    kept = probabilities * (probabilities > 0.08)
    assert chi_square(draw(LOGITS, 20_000, top_p=0.9), kept / kept.sum()) < CHI_SQUARE[3]
    assert set(draw(LOGITS, 100, top_p=1e-6)) == {1}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("top_k", "top_p", "temperature"), [(3, 0.7, 1.0), (8, 0.5, 2.0), (0, 0.9, 0.5), (40, 1.0, 1)])
def test_what_may_be_drawn_is_what_transformers_keeps(seed: int, top_k: int, top_p: float, temperature: float) -> None:
    """``top_k`` first, then the nucleus of what it leaves, renormalised."""
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(seed))
    kept = TopKLogitsWarper(top_k or 40)(None, logits / temperature)
    kept = TopPLogitsWarper(top_p)(None, kept).softmax(-1)[0]
    tokens = draw(logits[0], 40_000, top_k=top_k, top_p=top_p, temperature=temperature)
    assert set(tokens) == set(np.flatnonzero((kept > 2e-4).numpy())) | (set(tokens) & set(np.flatnonzero(kept.numpy())))
    found = np.bincount(tokens, minlength=40) / len(tokens)
    np.testing.assert_allclose(found, kept.numpy(), atol=0.012)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_choose_nothing(bad: float) -> None:
    logits = LOGITS.repeat(3, 1)
    logits[1, 4] = bad
    for temperature in (0.0, 1.0):
        settings = GenerationSettings(temperature=temperature)
        chosen = choose_tokens(logits, [Draw(settings, 1, 0)] * 3).tolist()
        assert chosen[1] == -1
        assert chosen[0] == chosen[2] >= 0
    assert choose_tokens(torch.full((1, 4), -torch.inf), [Draw(GenerationSettings(), 1, 0)]).tolist() == [-1]


def test_the_nucleus_and_the_most_likely_both_count() -> None:
    assert set(draw(LOGITS, 500, top_p=0.9, top_k=2)) == {1, 2}
    assert set(draw(LOGITS, 500, top_p=0.5, top_k=5)) == {1, 2}


def test_impossible_tokens_are_never_drawn() -> None:
    logits = LOGITS.clone()
    logits[[0, 3]] = -torch.inf
    assert set(draw(logits, 2000, temperature=50.0)) == {1, 2, 4, 5}


@pytest.mark.parametrize("temperature", [1e-6, 1e-38, 1e-300])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    assert set(draw(20 * LOGITS, 100, temperature=temperature)) == {1}


@pytest.mark.parametrize("temperature", [1e6, 1e300])
def test_a_high_temperature_is_uniform(temperature: float) -> None:
    assert chi_square(draw(LOGITS, 20_000, temperature=temperature), torch.full((6,), 1 / 6)) < CHI_SQUARE[5]


def test_noise_is_standard_gumbel() -> None:
    steps, tokens = torch.arange(400)[:, None], torch.arange(500)
    noise = gumbel_noise(torch.tensor([[5]]), steps, tokens)
    assert noise.shape == (400, 500) and noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(np.pi**2 / 6, abs=0.03)
    assert noise.flatten().unique().numel() == noise.numel()


# --- rows of a batch ------------------------------------------------------------------------------------------------


def mixed_rows(count: int = 24) -> tuple[Tensor, list[Draw]]:
    """Rows of different logits and all kinds of settings, every third of them greedy."""
    generator = torch.Generator().manual_seed(4)
    logits = 3 * torch.randn(count, 50, generator=generator)
    kinds = [
        GenerationSettings(),
        GenerationSettings(temperature=1.0),
        GenerationSettings(temperature=1.3, top_p=0.8),
        GenerationSettings(temperature=0.0, top_p=0.5, top_k=3),
        GenerationSettings(temperature=0.7, top_k=5),
        GenerationSettings(temperature=2.0, top_k=9, top_p=0.95),
    ]
    return logits, [Draw(kinds[row % 6], 1000 + row // 2, row % 5) for row in range(count)]


def test_a_draw_is_the_same_alone_and_in_any_batch() -> None:
    logits, draws = mixed_rows()
    together = choose_tokens(logits, draws)
    alone = [int(choose_tokens(logits[row : row + 1], draws[row : row + 1])) for row in range(len(draws))]
    assert together.tolist() == alone
    order = torch.randperm(len(draws), generator=torch.Generator().manual_seed(1))
    assert choose_tokens(logits[order], [draws[row] for row in order]).equal(together[order])


def test_greedy_rows_of_a_mixed_batch_take_the_arg_max() -> None:
    logits, draws = mixed_rows()
    greedy = torch.tensor([draw.settings.temperature == 0 for draw in draws])
    chosen, best = choose_tokens(logits, draws), logits.argmax(-1)
    assert chosen[greedy].equal(best[greedy]) and not chosen[~greedy].equal(best[~greedy])
    assert choose_tokens(logits[greedy], [one for one in draws if one.settings.temperature == 0]).equal(best[greedy])


def test_a_draw_depends_on_seed_and_step_alone() -> None:
    first = draw(LOGITS, 200, seed=3)
    assert (first == draw(LOGITS, 200, seed=3)).all()
    assert (first != draw(LOGITS, 200, seed=4)).any()
    assert len(set(first[:50])) > 1


def test_reduced_precision_is_drawn_from_too() -> None:
    logits, draws = mixed_rows()
    rounded = logits.to(torch.bfloat16)
    assert choose_tokens(rounded, draws).equal(choose_tokens(rounded.float(), draws))


def test_a_fresh_seed_is_another_one_every_time() -> None:
    assert seed_of(GenerationSettings(seed=11)) == 11
    fresh = {seed_of(GenerationSettings()) for _ in range(100)}
    assert len(fresh) == 100 and all(0 <= seed < 2**63 for seed in fresh)


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0},
        {"top_p": 1.01},
        {"top_p": float("nan")},
        {"top_k": -1},
        {"seed": -1},
        {"seed": 2**63},
        {"stop": "a bare text"},
        {"stop": ("",)},
    ],
)
def test_wrong_settings_are_one_sentence(options: dict[str, Any]) -> None:
    with pytest.raises(MedPLIBError) as raised:
        GenerationSettings(**options)
    assert "\n" not in str(raised.value)


def test_stop_texts_may_come_as_a_list() -> None:
    assert GenerationSettings(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]
