"""Workers known, chosen, rested and forgotten."""

from __future__ import annotations

from collections import Counter

import pytest

from model.errors import MedPLIBError
from model.serve.auth import CheckedAddress
from model.serve.protocol import WorkerStatus
from model.serve.registry import Registry, RegistrySettings


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def make(clock):
    def registry(**settings):
        return Registry(RegistrySettings(seed=1, **settings), clock)

    return registry


def add(registry, name, models=("nano",), check_heart_beat=True, **status):
    status = WorkerStatus(model_names=list(models), **status)
    registry.register(CheckedAddress(name, (name,)), status, check_heart_beat)


def draw(registry, count, model="nano"):
    """Whom so many requests go to, each answered before the next."""
    drawn: Counter[str | None] = Counter()
    for _ in range(count):
        name = registry.choose(model)
        drawn[name] += 1
        if name:
            registry.report_success(name)
            registry.release(name)
    return drawn


def test_only_a_worker_of_the_model_is_chosen(make):
    registry = make()
    add(registry, "a", models=["nano"])
    add(registry, "b", models=["seven", "nano-2"])
    assert registry.models() == ["nano", "nano-2", "seven"]
    assert registry.choose("seven") == "b" and registry.choose("nano") == "a"
    assert registry.choose("unknown") is None and registry.choose("nano", excluded=["a"]) is None


def test_the_lottery_draws_by_speed(make):
    registry = make(dispatch_method="lottery")
    add(registry, "slow", speed=1)
    add(registry, "fast", speed=4)
    drawn = draw(registry, 2000)
    assert drawn.total() == 2000 and drawn["fast"] / drawn["slow"] == pytest.approx(4, rel=0.2)


def test_the_shortest_queue_counts_what_was_sent_since(make):
    registry = make()
    add(registry, "a", queue_length=2)
    add(registry, "b", queue_length=0)
    chosen = [registry.choose("nano") for _ in range(6)]
    assert chosen[:2] == ["b", "b"] and sorted(chosen[2:]) == ["a", "a", "b", "b"]


def test_a_fast_worker_may_have_a_longer_queue(make):
    registry = make()
    add(registry, "slow", speed=1)
    add(registry, "fast", speed=3)
    assert Counter(registry.choose("nano") for _ in range(40))["fast"] == pytest.approx(30, abs=1)


def test_a_heartbeat_says_how_long_the_queue_is_now(make):
    registry = make()
    add(registry, "a")
    add(registry, "b")
    for _ in range(4):
        registry.choose("nano")
    for name in ("a", "b"):
        registry.release(name)
        registry.release(name)
    registry.heart_beat("a", 5)  # others ask it too
    registry.heart_beat("b", 0)
    assert [registry.choose("nano") for _ in range(5)] == ["b"] * 5


def test_a_request_that_ended_is_no_longer_counted(make):
    registry = make()
    add(registry, "a")
    add(registry, "b")
    assert set(draw(registry, 40)) == {"a", "b"}  # neither looks busier for what it has done
    first = registry.choose("nano")
    assert registry.choose("nano") != first


def test_silent_workers_are_forgotten(make, clock):
    registry = make(expiry=30)
    for name in ("silent", "lively"):
        add(registry, name)
    add(registry, "trusted", check_heart_beat=False)
    clock.now += 20
    assert registry.heart_beat("lively", 1)
    clock.now += 20
    assert registry.expire() == ["silent"] and registry.expire() == []
    assert [worker.address.name for worker in registry.workers()] == ["lively", "trusted"]
    assert not registry.heart_beat("silent", 0)


def test_whoever_waits_for_a_forgotten_worker_is_told(make, clock):
    registry = make()
    add(registry, "a")
    told = []
    registry.get("a").gone.add(lambda: told.append("gone"))
    clock.now += 31
    registry.expire()
    assert told == ["gone"]


def test_a_drained_worker_gets_nothing_new(make):
    registry = make()
    add(registry, "a")
    add(registry, "b", models=["seven"])
    assert registry.drain("b") and not registry.drain("c") and not registry.drain("c", False)
    assert registry.models() == ["nano"] and registry.choose("seven") is None and registry.fit_workers() == 1
    assert registry.drain("b", False)
    assert registry.models() == ["nano", "seven"] and registry.choose("seven") == "b"


def test_a_worker_that_says_it_drains_gets_nothing_new(make):
    registry = make()
    add(registry, "a")
    add(registry, "a", draining=True)
    assert registry.choose("nano") is None and registry.models() == []
    add(registry, "a")
    assert registry.choose("nano") == "a"


def test_a_failing_worker_rests_and_is_tried_by_one_request(make, clock):
    registry = make(max_failures=3, cool_down=10)
    add(registry, "a")
    for _ in range(3):
        assert registry.choose("nano") == "a"
        registry.report_failure("a")
        registry.release("a")
    assert registry.choose("nano") is None and registry.fit_workers() == 0
    assert registry.models() == ["nano"] and registry.retry_after("nano") == pytest.approx(10)
    clock.now += 10
    assert registry.choose("nano") == "a"
    assert registry.choose("nano") is None  # one trial at a time
    registry.report_failure("a")
    registry.release("a")
    clock.now += 9
    assert registry.choose("nano") is None
    clock.now += 1
    assert registry.choose("nano") == "a"
    registry.report_success("a")
    registry.release("a")
    assert draw(registry, 5) == {"a": 5}


def test_failures_count_only_in_a_row(make):
    registry = make(max_failures=2)
    add(registry, "a")
    for _ in range(5):
        registry.report_failure("a")
        registry.report_success("a")
    assert registry.choose("nano") == "a"


def test_a_trial_that_nothing_is_heard_of_is_followed_by_another(make, clock):
    registry = make(max_failures=1, cool_down=10)
    add(registry, "a")
    registry.report_failure("a")
    clock.now += 10
    assert registry.choose("nano") == "a" and registry.choose("nano") is None
    clock.now += 10
    assert registry.choose("nano") == "a"


def test_registering_anew_forgets_what_was(make):
    registry = make(max_failures=1)
    add(registry, "a")
    registry.report_failure("a")
    registry.drain("a")
    assert registry.choose("nano") is None
    add(registry, "a", models=["seven"])
    assert registry.choose("seven") == "a" and registry.models() == ["seven"] and len(registry.workers()) == 1


@pytest.mark.parametrize("models", [[], [""], [" a"], ["a\n"], ["a" * 300], ["a"] * 100])
def test_malformed_models_are_refused(make, models):
    with pytest.raises(MedPLIBError, match="models"):
        add(make(), "a", models=models)


def test_so_many_workers_and_no_more(make):
    registry = make(max_workers=2)
    add(registry, "a")
    add(registry, "b")
    add(registry, "a")
    with pytest.raises(MedPLIBError, match="2 workers"):
        add(registry, "c")


def test_what_is_reported_of_a_forgotten_worker_is_ignored(make):
    registry = make()
    add(registry, "a")
    name = registry.choose("nano")
    registry.remove(name, "a test")
    for report in (registry.report_failure, registry.report_success, registry.release, registry.rest):
        report(name)
    registry.remove(name, "twice")
    assert registry.status() == []


def test_each_worker_is_told_of(make, clock):
    registry = make()
    add(registry, "a", speed=2, queue_length=3, capacity=8, details={"device": "cuda"})
    registry.choose("nano")
    clock.now += 4
    (told,) = registry.status()
    assert told["worker_name"] == "a" and told["running"] == 1 and told["silent_for"] == 4
    assert told["queue_length"] == 3 and told["details"] == {"device": "cuda"} and not told["resting"]


def test_an_unknown_way_of_choosing_is_refused():
    with pytest.raises(MedPLIBError, match="lottery or shortest_queue"):
        RegistrySettings(dispatch_method="round_robin")


def test_a_worker_under_another_name_takes_its_own_place(make):
    registry = make()
    for name in ("http://localhost:1", "http://2130706433:1", "http://[::ffff:127.0.0.1]:1", "http://other:1"):
        place = "http://10.0.0.2:1" if "other" in name else "http://127.0.0.1:1"
        registry.register(CheckedAddress(name, (place,)), WorkerStatus(model_names=["nano"]))
    assert [one["worker_name"] for one in registry.status()] == ["http://[::ffff:127.0.0.1]:1", "http://other:1"]
