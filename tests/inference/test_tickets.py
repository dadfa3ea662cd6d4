"""Tickets tell whoever listens that they are done; images that were read already are taken as they are."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch

from model.data.image_io import ImageData, read_image
from model.inference import mask_stage
from model.inference.answer import Answer
from model.inference.engine import Engine
from model.inference.generation import GenerationSettings
from model.inference.images import content_key, prepare_image
from model.inference.requests import Request, Ticket
from model.processing.processor import MedPLIBProcessor
from tests.conftest import ROOT

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def ticket() -> Ticket:
    return Ticket(Request(PIXELS, "What is it?"))


def test_listeners_are_told_once_and_late_ones_at_once() -> None:
    one, told = ticket(), []
    one.when_done(lambda: told.append(one.done()))
    assert told == []
    one.settle(Answer("a liver"))
    assert told == [True]
    one.when_done(lambda: told.append(one.result().text))
    one.settle(ValueError("too late"))
    assert told == [True, "a liver"]


@pytest.mark.parametrize("attempt", range(20))
def test_no_listener_is_missed_while_the_ticket_is_settled(attempt: int) -> None:
    one, told, start = ticket(), threading.Semaphore(0), threading.Barrier(2)

    def settle() -> None:
        start.wait()
        one.settle(Answer(""))

    thread = threading.Thread(target=settle)
    thread.start()
    start.wait()
    for _ in range(10):
        one.when_done(told.release)
    thread.join()
    assert all(told.acquire(timeout=5) for _ in range(10))
    assert not told.acquire(blocking=False)


def test_an_image_that_was_read_is_not_read_again_and_keeps_its_spacing() -> None:
    processor = MedPLIBProcessor.from_pretrained(ROOT / "assets" / "medplib-nano")
    spaced = ImageData(PIXELS, (0.5, 0.7), "dicom")
    prepared = prepare_image(spaced, processor)
    assert prepared.data is spaced
    assert (prepared.clip_input == prepare_image(PIXELS, processor).clip_input).all()
    keys = {content_key(source) for source in (spaced, ImageData(PIXELS, None, "dicom"), PIXELS, PIXELS[::-1])}
    assert len(keys) == 4
    assert content_key(ImageData(PIXELS.copy(), (0.5, 0.7), "png")) == content_key(spaced)
    assert content_key(read_image(PIXELS[::-1])) not in keys


def test_an_answer_tells_how_long_its_prompt_was() -> None:
    engine = Engine.from_pretrained(ROOT / "assets" / "medplib-nano")
    short = GenerationSettings(max_new_tokens=1)
    one = engine.ask(Request(PIXELS, "What?", settings=short))
    two = engine.ask(Request(PIXELS, "What?", history=[("What is it?", "liver")], settings=short))
    assert one.prompt_tokens > engine.model.config.vision_grid**2
    assert two.prompt_tokens > one.prompt_tokens


def test_masks_of_large_images_are_decoded_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = ROOT / "data" / "sample" / "images" / "ct_00--Phantom--seed505case000000--0000.png"
    asked = Request(sample, "Please segment the vertebra and the kidney in this CT image.")
    engine, passes = Engine.from_pretrained(ROOT / "assets" / "medplib-nano"), []
    decode = engine.model.decode_masks

    def counted(states: torch.Tensor, *rest: Any) -> Any:
        passes.append(len(states))
        return decode(states, *rest)

    monkeypatch.setattr(engine.model, "decode_masks", counted)
    together = engine.ask(asked).masks
    for pixels in (1, 256 * 256, 2 * 256 * 256):
        monkeypatch.setattr(mask_stage, "PIXELS_AT_ONCE", pixels)
        apart = engine.ask(asked).masks
        assert [mask.area_px for mask in apart] == pytest.approx([mask.area_px for mask in together], abs=3)
    assert passes == [2, 1, 1, 1, 1, 2]
