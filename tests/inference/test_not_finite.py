"""NaN and infinite numbers: the request they are computed for fails, and nothing of them reaches another one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from model.inference.answer import Answer, Mask
from model.inference.engine import Engine, EngineSettings, Request
from model.inference.generation import GenerationSettings
from model.inference.presence import PresenceClassifier
from model.inference.requests import NotFinite
from model.inference.schedule import prefix_cache_bytes
from model.inference.slots import slot_bytes
from model.modeling.configuration import MedPLIBConfig
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.processor import MedPLIBProcessor
from tests.inference.mixtures import assert_same, engine_of, pictures, random_requests, talker

NAN = float("nan")


@cache
def parts() -> tuple[MedPLIBForCausalLM, MedPLIBProcessor]:
    return talker("two of three experts")


@cache
def asked() -> tuple[list[Request], list[Answer]]:
    """Some requests, and what an untroubled engine answers to them."""
    requests = random_requests(3, 9, max_new_tokens=8)
    found = dict(engine_of(*parts()).answer_all(requests))
    return requests, [found[place] for place in range(len(requests))]  # type: ignore[misc]


def troubled() -> Request:
    return Request(pictures(9)[0], "Is there a kidney?", settings=GenerationSettings(max_new_tokens=8))


@contextmanager
def bad_numbers(name: str, spoiled: Any) -> Iterator[None]:
    """A method of the network whose result is spoiled."""
    model = parts()[0]
    real = getattr(model, name)
    with mock.patch.object(model, name, lambda *arguments: spoiled(real(*arguments))):
        yield


@pytest.mark.parametrize("lookahead", [False, True])
def test_one_request_fails_and_the_others_do_not_notice(lookahead: bool) -> None:
    requests, wanted = asked()
    engine = engine_of(*parts(), lookahead=lookahead)
    image = engine.prepare(troubled().image)
    image.image_features = torch.full_like(parts()[0].encode_images(image.clip_input), NAN)
    found = dict(engine.answer_all([*requests[:2], replace(troubled(), image=image), *requests[2:]]))
    assert isinstance(found.pop(2), NotFinite)
    for got, want in zip(found.values(), [wanted[place - (place > 2)] for place in found], strict=True):
        assert_same(got, want)
    assert_same(engine.ask(troubled()), engine_of(*parts()).ask(troubled()))  # nothing of it was kept
    for request, want in zip(requests, wanted, strict=True):
        assert_same(engine.ask(request), want)


@pytest.mark.parametrize("bad", [NAN, float("inf"), float("-inf")])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_what_an_earlier_request_left_in_a_slot_is_not_seen(bad: float, batch_invariant: bool) -> None:
    requests, wanted = asked()
    engine = engine_of(*parts(), batch_invariant=batch_invariant)
    list(engine.answer_all(requests[:3]))
    with torch.inference_mode():
        for store in (engine._schedule.decoding.cache.keys, engine._schedule.decoding.cache.values):
            store.fill_(bad)
    for place, got in engine.answer_all(requests):
        assert isinstance(got, Answer)
        assert_same(got, wanted[place])


@pytest.mark.parametrize("classified", [False, True])
@pytest.mark.parametrize("field", ["iou_predictions", "mask_logits"])
def test_a_mask_that_is_no_number_fails_its_request(field: str, classified: bool) -> None:
    def spoil(decoded: Any) -> Any:
        value = getattr(decoded, field)
        broken = value * NAN if isinstance(value, torch.Tensor) else [one * NAN for one in value]
        return replace(decoded, **{field: broken})

    requests, wanted = asked()
    classifier = PresenceClassifier.fit([[0.9, 9, 0.9, 0.3], [0.2, -1, 0.3, 0.0]], [True, False])
    with bad_numbers("decode_masks", spoil):
        engine = Engine(*parts(), EngineSettings(slots=3), classifier if classified else None)
        found = dict(engine.answer_all(requests))
    assert {place for place, got in found.items() if isinstance(got, NotFinite)} == {
        place for place, want in enumerate(wanted) if want.masks
    }
    assert 0 < sum(isinstance(got, NotFinite) for got in found.values()) < len(requests)


def test_an_area_without_a_spacing_that_is_a_number() -> None:
    mask = Mask.from_array(np.ones((2, 3), dtype=bool), "x", 0.5, (NAN, 1.0))
    assert (mask.area_px, mask.area_mm2) == (6, None)


# --- kept openings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_image_prompts_of_any_model_are_kept(dtype: torch.dtype) -> None:
    published = MedPLIBConfig()
    opening = slot_bytes(published.text_config, published.visual_tokens + 40, dtype)
    assert opening > 256 * 2**20
    assert 4 * opening <= prefix_cache_bytes(published, dtype, EngineSettings()) < 5 * opening
    assert prefix_cache_bytes(published, dtype, EngineSettings(prefix_cache_mb=7)) == 7 * 2**20
    assert prefix_cache_bytes(parts()[0].config, dtype, EngineSettings()) == 256 * 2**20


def test_an_opening_that_cannot_be_kept_is_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    def warnings(prefix_cache_mb: int | None, size: int) -> int:
        caplog.clear()
        engine: Engine = engine_of(*parts(), prefix_cache_mb=prefix_cache_mb)
        with mock.patch("model.inference.reading.slot_bytes", lambda *_: size):
            list(engine.answer_all(asked()[0]))
        return caplog.text.count("prefix_cache_mb is")

    assert [warnings(1, 2**21), warnings(0, 2**21), warnings(None, 2**21)] == [1, 0, 0]
