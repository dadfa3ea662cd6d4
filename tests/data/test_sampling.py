from __future__ import annotations

import pickle
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from model.data.sampling import ResumableSampler, balanced_weights
from model.errors import MedPLIBError


def steps(samplers: list[ResumableSampler]) -> list[list[int]]:
    """Records of each global batch, sorted, over all ranks."""
    return [sorted(record for batch in step for record in batch) for step in zip(*samplers, strict=True)]


def ranks(world_size: int, batch_size: int, count: int = 103, **options: object) -> list[ResumableSampler]:
    lengths = np.arange(count) % 37
    return [
        ResumableSampler(lengths, seed=5, rank=rank, world_size=world_size, batch_size=batch_size, **options)  # type: ignore[arg-type]
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 8), (2, 4), (4, 2), (3, 5)])
def test_every_record_is_seen_and_only_padding_is_seen_twice(world_size: int, batch_size: int, group: bool) -> None:
    samplers = ranks(world_size, batch_size, group_by_length=group)
    batches = steps(samplers)
    seen = Counter(record for batch in batches for record in batch)
    assert set(seen) == set(range(103))
    assert sum(seen.values()) - 103 == samplers[0].padded < samplers[0].global_batch
    assert max(seen.values()) <= 2
    assert all(len(batch) == world_size * batch_size for batch in batches)
    assert len(batches) == len(samplers[0])


@pytest.mark.parametrize("group", [False, True])
def test_same_global_batch_gives_same_steps_on_any_ranks(group: bool) -> None:
    one, two, eight = (steps(ranks(size, 8 // size, group_by_length=group)) for size in (1, 2, 8))
    assert one == two == eight


def test_epochs_differ_and_repeat_exactly() -> None:
    sampler = ranks(1, 8)[0]
    first = list(sampler)
    sampler.epoch = 1
    second = list(sampler)
    assert first != second
    sampler.epoch = 0
    assert list(sampler) == first
    other = ResumableSampler(np.zeros(103), seed=6, batch_size=8)
    assert list(other) != first


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"group_by_length": True},
        {"weights": np.arange(1, 104)},
        {"group_by_length": True, "weights": np.arange(1, 104)},
    ],
)
def test_resuming_goes_on_exactly_where_training_stood(options: dict[str, object]) -> None:
    straight = ranks(2, 4, **options)[1]
    expected: list[list[int]] = []
    while straight.epoch < 3:
        for batch in list(straight):
            expected.append(batch)
            straight.advance()
    for stop in (1, 7, len(straight), len(straight) + 3):
        before = ranks(2, 4, **options)[1]
        used: list[list[int]] = []
        while len(used) < stop:
            for batch in before:  # a loader would have run ahead here
                used.append(batch)
                before.advance()
                if len(used) == stop:
                    break
        after = ranks(2, 4, **options)[1]
        after.load_state_dict(before.state_dict())
        while after.epoch < 3:
            for batch in list(after):
                used.append(batch)
                after.advance()
        assert used == expected


def test_resuming_on_other_hardware_loses_nothing_of_the_epoch() -> None:
    before = ranks(2, 5)
    used = []
    for batch in steps(before)[:4]:
        used += batch
        for sampler in before:
            sampler.advance()
    after = ranks(3, 4)
    for sampler in after:
        sampler.load_state_dict(before[0].state_dict())
    rest = [record for batch in steps(after) for record in batch]
    assert set(used) | set(rest) == set(range(103))
    assert len(used) + len(rest) < 103 + after[0].global_batch
    for _ in steps(after):
        for sampler in after:
            sampler.advance()
    assert all(sampler.epoch == 1 and sampler.consumed == 0 for sampler in after)


def test_a_state_of_another_run_is_refused() -> None:
    sampler = ResumableSampler(np.zeros(10), seed=0, batch_size=2)
    with pytest.raises(MedPLIBError, match="seed 1"):
        sampler.load_state_dict({**sampler.state_dict(), "seed": 1})
    with pytest.raises(MedPLIBError, match="records 11"):
        sampler.load_state_dict({**sampler.state_dict(), "records": 11})


def test_grouped_order_of_other_batches_is_refused_mid_epoch() -> None:
    begun = ranks(2, 4, group_by_length=True)[0]
    fresh = begun.state_dict()
    begun.advance()
    state = begun.state_dict()
    with pytest.raises(MedPLIBError, match="global_batch 8, this run 12"):
        ranks(3, 4, group_by_length=True)[0].load_state_dict(state)
    with pytest.raises(MedPLIBError, match="unknown"):
        begun.load_state_dict(ranks(2, 4)[0].state_dict() | {"consumed": 8})
    ranks(3, 4, group_by_length=True)[0].load_state_dict(fresh)
    ranks(1, 8, group_by_length=True)[0].load_state_dict(state)


def test_weights_give_each_record_its_share_rounded() -> None:
    weights = np.array([1.0] * 50 + [3.0] * 50)
    sampler = ResumableSampler(np.zeros(100), seed=0, batch_size=10, weights=weights)
    draws = Counter(sampler.epoch_order(0).tolist())
    assert sum(draws.values()) == 100
    assert all(draws[record] in (0, 1) for record in range(50))
    assert all(draws[record] in (1, 2) for record in range(50, 100))
    heavy = sum(count for record, count in draws.items() if record >= 50)
    assert heavy in (74, 75, 76)
    never = ResumableSampler(np.zeros(4), seed=0, batch_size=2, weights=[0, 1, 0, 1])
    assert set(never.epoch_order(0).tolist()) == {1, 3}


def test_repeated_draws_of_an_epoch_tell_their_number() -> None:
    sampler = ResumableSampler(np.zeros(10), seed=0, batch_size=2, weights=[8, *[1] * 9])
    draws = [record for batch in sampler for record in batch]
    heavy = [getattr(record, "earlier", 0) for record in draws if record == 0]
    assert heavy == list(range(len(heavy))) and len(heavy) > 3
    assert all(getattr(record, "earlier", 0) == 0 for record in draws if record)
    sampler.consumed = 4
    rest = [record for batch in sampler for record in batch]
    assert [getattr(record, "earlier", 0) for record in rest] == [getattr(record, "earlier", 0) for record in draws[4:]]
    copy = pickle.loads(pickle.dumps(draws))
    assert [getattr(record, "earlier", 0) for record in copy if record == 0] == heavy


def test_balanced_weights_even_out_labels() -> None:
    labels = ["vqa"] * 90 + ["grounding"] * 9 + [None]
    weights = balanced_weights(labels)
    assert weights.sum() == pytest.approx(1)
    assert weights[:90].sum() == pytest.approx(1 / 3)
    weights = balanced_weights(labels, {"vqa": 1, "grounding": 3})
    assert weights[90:99].sum() == pytest.approx(0.75)
    assert weights[99] == 0
    with pytest.raises(MedPLIBError, match="labelled region"):
        balanced_weights(labels, {"region": 1})


def test_grouping_joins_like_lengths_and_shuffles_batches() -> None:
    lengths = np.random.default_rng(0).integers(10, 1000, 4096)
    spread = {}
    for group in (False, True):
        sampler = ResumableSampler(lengths, seed=0, batch_size=16, group_by_length=group)
        spread[group] = np.mean([np.ptp(lengths[batch]) for batch in sampler])
        if group:
            means = [lengths[batch].mean() for batch in sampler]
            falls = sum(later < earlier for earlier, later in pairwise(means))
            assert 0.3 < falls / len(means) < 0.7
    assert spread[True] < spread[False] / 8


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"batch_size": 1, "rank": 2, "world_size": 2}, {"batch_size": 1, "weights": [1.0]}]
)
def test_impossible_settings_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(MedPLIBError):
        ResumableSampler(np.zeros(5), seed=0, **options)  # type: ignore[arg-type]
    with pytest.raises(MedPLIBError, match="no records"):
        ResumableSampler([], seed=0, batch_size=2)
    with pytest.raises(MedPLIBError, match="not all zero"):
        ResumableSampler(np.zeros(2), seed=0, batch_size=1, weights=[0.0, 0.0])
