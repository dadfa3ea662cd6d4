"""One request among others: how it ends, streams, is given up or goes wrong, and that the others do not notice."""

from __future__ import annotations

import gc
import io
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model.errors import MedPLIBError
from model.inference import schedule
from model.inference.answer import Answer
from model.inference.engine import Engine, EngineFull, EngineSettings, Request
from model.inference.generation import GenerationSettings
from model.inference.slots import SlotCache
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.processor import MedPLIBProcessor
from tests.inference.mixtures import assert_same, engine_of, pictures, plain_answer, png, random_requests, talker

LOOKAHEAD = pytest.mark.parametrize("lookahead", [False, True])


@cache
def parts() -> tuple[MedPLIBForCausalLM, MedPLIBProcessor]:
    """A network that says ``<SEG>`` often."""
    return talker("two of three experts")


def engine(**options: Any) -> Engine:
    return engine_of(*parts(), **options)


def request(question: str = "Is there a kidney in the image?", image: int = 0, **settings: Any) -> Request:
    return Request(pictures()[image], question, settings=GenerationSettings(**{"max_new_tokens": 12, **settings}))


@cache
def wanted(image: int = 0) -> Answer:
    """What a plain loop answers to ``request(image=image)``."""
    return plain_answer(*parts(), request(image=image))


def drive(one: Engine) -> None:
    while one.step():
        pass


# --- how an answer ends ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 2, 5])
def test_an_answer_has_at_most_so_many_tokens(most: int) -> None:
    found = engine().ask(request(max_new_tokens=most))
    assert (found.finish, found.new_tokens) == ("length", most)
    assert wanted().text.startswith(found.text)


@cache
def longest(seed: int = 5) -> tuple[Request, Answer]:
    """A greedy request whose answer is long and holds a ``<SEG>`` that is not its beginning."""
    for candidate in random_requests(seed, 30, max_new_tokens=14, temperature=0.0):
        answer = plain_answer(*parts(), candidate)
        if answer.new_tokens >= 9 and answer.text.find("<SEG>") > 3:
            return candidate, answer
    raise AssertionError("no answer is long enough")


@LOOKAHEAD
def test_a_stop_text_ends_the_answer_wherever_it_lies(lookahead: bool) -> None:
    """Every piece of an answer, many of which begin or end within a token, or hold or precede a ``<SEG>``."""
    asked, whole = longest()
    stops = {whole.text[begin : begin + length] for begin in range(len(whole.text)) for length in (2, 7)}
    requests = [replace(asked, settings=replace(asked.settings, stop=(stop,))) for stop in sorted(stops)]
    kinds = set()
    for place, found in engine(slots=8, lookahead=lookahead).answer_all(requests):
        assert isinstance(found, Answer)
        stop = requests[place].settings.stop[0]
        kept = whole.text[: whole.text.index(stop)].rstrip()
        assert (found.text, found.finish) == (kept, "stop"), stop
        assert found.new_tokens <= whole.new_tokens
        assert [mask.area_px for mask in found.masks] == [mask.area_px for mask in whole.masks][: kept.count("<SEG>")]
        kinds.add(len(found.masks))
    assert len(kinds) > 1


def test_the_first_of_several_stop_texts_counts() -> None:
    asked, whole = longest()
    early, late = whole.text[4:6], whole.text[-6:]
    stop = (late, "never said", early)
    found = engine().ask(replace(asked, settings=replace(asked.settings, stop=stop)))
    assert found.text == whole.text[: min(whole.text.index(early), whole.text.index(late))].rstrip()
    longer = (whole.text[4:6], whole.text[2:6], whole.text[3:6])  # complete at the same time
    found = engine().ask(replace(asked, settings=replace(asked.settings, stop=longer)))
    assert found.text == whole.text[:2].rstrip()
    never = replace(asked, settings=replace(asked.settings, stop=("never said",)))
    assert_same(engine().ask(never), whole)


@LOOKAHEAD
def test_an_answer_ends_where_its_slot_does(lookahead: bool) -> None:
    prompt = engine()._prompt(request())
    tight = engine(max_length=prompt.length + 6, lookahead=lookahead)
    found = tight.ask(request(max_new_tokens=100))
    assert (found.finish, found.new_tokens) == ("length", 5)
    assert wanted().text.startswith(found.text)


def test_a_prompt_that_is_too_long_is_one_sentence() -> None:
    tight = engine(max_length=engine()._prompt(request()).length + 1)
    ticket = tight.submit(request())
    with pytest.raises(MedPLIBError, match=r"question is too long.*fit"):
        ticket.result(0)
    assert not tight.busy


@pytest.mark.parametrize(
    "name", ["slots", "max_length", "prefill_chunk", "waiting", "image_cache_mb", "prefix_cache_mb"]
)
def test_wrong_bounds_are_one_sentence(name: str) -> None:
    with pytest.raises(MedPLIBError, match=f"^{name} is -1; give at least [01]$"):
        EngineSettings(**{name: -1})


def test_more_positions_than_the_model_knows_are_refused() -> None:
    with pytest.raises(MedPLIBError, match="512 positions"):
        engine(max_length=513)


# --- streaming ------------------------------------------------------------------------------------------------------


@LOOKAHEAD
def test_the_text_grows_and_ends_as_the_answer(lookahead: bool) -> None:
    requests = [*random_requests(8, 8), request(image=1), request(image=2)]
    streaming, heard, tickets = engine(lookahead=lookahead), [], []
    for asked in requests:
        heard.append([])
        tickets.append(streaming.submit(asked, heard[-1].append))
    drive(streaming)
    for said, ticket in zip(heard, tickets, strict=True):
        check_stream(said, ticket.result(0))
    assert sum(len(said) > 3 for said in heard) > 3


@LOOKAHEAD
def test_a_stream_does_not_run_ahead_of_a_stop_text(lookahead: bool) -> None:
    """What may be the beginning of a stop text is told when it turns out not to be one."""
    asked, whole = longest()
    false_starts = tuple(whole.text[index] + "\N{SNOWMAN}" for index in range(0, len(whole.text), 3))
    stops = [*(whole.text[begin : begin + 6] for begin in range(2, len(whole.text) - 6, 3)), whole.text[-2:] + "\n"]
    for stop in stops:
        heard: list[str] = []
        settings = replace(asked.settings, stop=(*false_starts, stop))
        answer = engine(lookahead=lookahead).ask(replace(asked, settings=settings), heard.append)
        check_stream(heard, answer)
    assert answer.text == whole.text


@LOOKAHEAD
def test_a_stream_waits_for_the_bytes_of_a_character(lookahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spelled byte by byte, two characters in a row cannot be read in between, the first no more than the second."""
    script = [3 + byte for byte in "\N{SNOWMAN}\N{SNOWMAN}".encode()]

    def choose(logits: torch.Tensor, draws: Any) -> torch.Tensor:
        return torch.tensor([(script * 2)[one.step] for one in draws])

    monkeypatch.setattr("model.inference.schedule.choose_tokens", choose)
    heard: list[str] = []
    answer = engine(lookahead=lookahead).ask(request(max_new_tokens=6), heard.append)
    assert heard == ["\N{SNOWMAN}", "\N{SNOWMAN}\N{SNOWMAN}"] and heard[-1] == answer.text


def check_stream(said: list[str], answer: Answer) -> None:
    assert all(later.startswith(earlier) for earlier, later in pairwise(said)), said
    assert (said[-1] if said else "") == answer.text


def test_waiting_for_the_device_counts_as_generating(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes are only launched there; their time is spent where their tokens are fetched."""
    fetched: list[None] = []  # as many as seconds have passed
    device, pending = SimpleNamespace(synchronize=lambda: fetched.append(None)), schedule._Pending
    monkeypatch.setattr("time.perf_counter", lambda: float(len(fetched)))
    monkeypatch.setattr(schedule, "_Pending", lambda *values: pending(*values[:-1], device))
    timing = engine().ask(request(max_new_tokens=3)).timing
    assert timing["generate"] == 3


# --- giving up ------------------------------------------------------------------------------------------------------


def step_until(one: Engine, reached: Callable[[Engine], bool]) -> None:
    for _ in range(1000):
        if reached(one):
            return
        one.step()
    raise AssertionError("never reached")


def second(row: Any) -> bool:
    """Whether a row is that of the second picture."""
    return row is not None and row.ticket.request.image.shape[0] == 31


STAGES: dict[str, Callable[[Engine], bool]] = {
    "waiting": lambda one: bool(one._schedule.running),
    "in prefill": lambda one: any(map(second, one._schedule.reading)),
    "decoding": lambda one: any(second(row) and len(row.ids) > 2 for row in one._schedule.running),
}


@LOOKAHEAD
@pytest.mark.parametrize("stage", STAGES)
def test_a_cancelled_request_frees_its_slot_and_disturbs_nobody(stage: str, lookahead: bool) -> None:
    slots = 1 if stage == "waiting" else 3
    several = engine(slots=slots, prefill_chunk=20, lookahead=lookahead)
    tickets = [several.submit(request(image=image)) for image in range(3)]
    step_until(several, STAGES[stage])
    assert not tickets[1].done()
    tickets[1].cancel()
    several.step()
    given_up = tickets[1].result(0)
    schedule = several._schedule
    assert not any(map(second, (*schedule.waiting, *schedule.reading, *schedule.running)))
    assert given_up.finish == "cancelled" and given_up.masks == []
    assert wanted(1).text.startswith(given_up.text) and bool(given_up.text) == (stage == "decoding")
    drive(several)
    for image in (0, 2):
        assert_same(tickets[image].result(0), wanted(image))
    assert several.status()["running"] == 0


def test_the_next_request_takes_the_freed_slot_at_once() -> None:
    single = engine(slots=1, prefill_chunk=1000)
    first, second = single.submit(request(max_new_tokens=200)), single.submit(request(image=1))
    single.step()
    assert single.status()["waiting"] == 1
    first.cancel()
    single.step()
    assert first.done() and single.status()["waiting"] == 0
    drive(single)
    assert_same(second.result(0), wanted(1))


def test_cancelling_an_answered_request_changes_nothing() -> None:
    one = engine()
    ticket = one.submit(request())
    drive(one)
    ticket.cancel()
    one.step()
    assert_same(ticket.result(0), wanted())


def test_answers_nobody_waits_for_are_given_up() -> None:
    """Whoever stops drawing answers frees the slots."""
    one = engine(slots=2)
    answers = one.answer_all([request(image=image, max_new_tokens=60) for image in range(3)] * 2)
    next(answers)
    answers.close()
    one.step()
    assert not one.busy
    assert_same(one.ask(request()), wanted())


# --- too much, and wrong --------------------------------------------------------------------------------------------


def test_only_so_many_may_wait() -> None:
    small = engine(slots=1, waiting=2)
    tickets = [small.submit(request()), small.submit(request(image=1))]
    with pytest.raises(EngineFull, match="2 requests"):
        small.submit(request(image=2))
    small.step()  # the first has left the queue
    tickets.append(small.submit(request(image=2)))
    with pytest.raises(EngineFull):
        small.submit(request())
    drive(small)
    for image, ticket in enumerate(tickets):
        assert_same(ticket.result(0), wanted(image))


def test_a_stream_of_requests_is_never_too_much() -> None:
    found = dict(engine(slots=1, waiting=1).answer_all(request(image=number % 3) for number in range(7)))
    for number, answer in found.items():
        assert isinstance(answer, Answer)
        assert_same(answer, wanted(number % 3))
    assert len(found) == 7


class Unreadable(io.BytesIO):
    def read(self, *_: Any) -> bytes:
        raise OSError("the disk is gone")


BAD = {
    "a missing image": Request("missing.png", "What is it?"),
    "a name that no file can have": Request("x" * 5000, "What is it?"),
    "no image": Request(b"no image", "What is it?"),
    "a region of nothing": Request(None, "What is it?", [("point", (1, 1))]),
    "a file of text": Request(io.StringIO("text"), "What is it?"),
    "a file that cannot be read": Request(Unreadable(), "What is it?"),
    "a damaged image": Request(Image.open(io.BytesIO(png(pictures()[0])[:-3000])), "What is it?"),
    "a region outside": Request(pictures()[0], "What is in the region?", [("box", (0, 0, 999, 9))]),
    "markers without regions": Request(pictures()[0], "What is <region></region>?"),
    "an image in the question": Request(pictures()[0], "What about <image>?"),
    "no presence classifier": Request(pictures()[0], "Segment it.", no_mask_below=0.5),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_a_request_is_its_own_matter(name: str) -> None:
    several = engine(slots=2)
    good, bad = several.submit(request()), several.submit(BAD[name])
    with pytest.raises(MedPLIBError) as raised:
        bad.result(0)
    assert "\n" not in str(raised.value)
    drive(several)
    assert_same(good.result(0), wanted())


def test_a_stream_goes_on_behind_a_bad_request() -> None:
    requests = [request(), *BAD.values(), request(image=1)]
    found = dict(engine(slots=2).answer_all(requests))
    assert sorted(found) == list(range(len(requests)))
    assert all(isinstance(found[place], MedPLIBError) for place in range(1, len(BAD) + 1))
    assert_same(found[0], wanted(0))  # type: ignore[arg-type]
    assert_same(found[len(BAD) + 1], wanted(1))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"question": ""},
        {"question": " \n"},
        {"question": "half a character \ud800"},
        {"question": None},
        {"history": [("What is it?", None)]},
        {"threshold": 0.0},
        {"threshold": float("nan")},
        {"thresholds": (0.5, 1.0)},
        {"no_mask_below": 1.1},
    ],
)
def test_a_request_that_makes_no_sense_cannot_be_made(options: dict[str, Any]) -> None:
    with pytest.raises(MedPLIBError) as raised:
        Request(**{"image": pictures()[0], "question": "What is it?", **options})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "part", ["encode_images", "encode_segmented_images", "decode_masks", "lm_head", "take_prefix", "move", "swap"]
)
@LOOKAHEAD
def test_an_error_of_the_machine_settles_every_ticket(
    part: str, lookahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever memory runs out, nobody waits in vain, and the engine can be asked again."""

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    several = engine(slots=3, lookahead=lookahead, prefill_chunk=20)
    # Of the first two prompts that are read side by side the second is done first, and they change places.
    asked = [request("Is it? " * 20), *(request(image=number % 3) for number in range(1, 6))]
    tickets = [several.submit(one) for one in asked]
    with monkeypatch.context() as patch:
        if hasattr(SlotCache, part):
            patch.setattr(SlotCache, part, fail)
        elif part == "lm_head":
            patch.setattr(parts()[0].lm_head, "forward", fail)
        else:
            patch.setattr(parts()[0], part, fail)
        with pytest.raises(torch.OutOfMemoryError):
            drive(several)
    assert not several.busy
    answered = 0
    for ticket in tickets:
        assert ticket.done()
        try:
            answered += ticket.result(0).finish in ("end", "length")
        except torch.OutOfMemoryError:
            continue
    assert answered < 6
    assert_same(several.ask(request()), wanted())


# --- nothing is left behind -----------------------------------------------------------------------------------------


def footprint(root: object) -> int:
    """Members of all containers that the engine's own objects hold."""
    seen: set[int] = set()
    members, open_objects = 0, [root]
    while open_objects:
        one = open_objects.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, dict | list | deque | set | tuple):
            members += len(one)
            open_objects += [*one.values()] if isinstance(one, dict) else [*one]
        elif type(one).__module__.startswith("model.inference"):
            open_objects.append(vars(one))
    return members


@LOOKAHEAD
def test_nothing_grows_with_the_number_of_requests(lookahead: bool) -> None:
    several = engine(slots=2, lookahead=lookahead)
    requests = random_requests(2, 8)
    sizes = []
    for _ in range(3):
        for _ in several.answer_all([*requests, BAD["a missing image"]]):
            pass
        several.submit(request(image=1)).cancel()
        drive(several)
        sizes.append(footprint(several))
    assert sizes[0] == sizes[1] == sizes[2]


def test_a_request_is_forgotten_once_it_is_answered() -> None:
    one = engine()
    ticket = one.submit(request(image=3), lambda text: None)
    drive(one)
    gone = [weakref.ref(ticket), weakref.ref(ticket.request), weakref.ref(ticket.result(0))]
    del ticket
    gc.collect()
    assert [reference() for reference in gone] == [None, None, None]


def test_the_memory_of_the_slots_is_what_was_stated() -> None:
    one = engine(slots=5, max_length=300)
    stated = one.cache_bytes
    one.ask(request())
    cache = one._schedule.decoding.cache
    assert cache.num_bytes == stated
    assert stated == 2 * np.prod([2, 5, 2, 300, 16]) * 4  # layers, slots, heads, length, width, fp32
