"""Images are known by their content, encoded once, and kept within a bound."""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from model.inference.answer import Answer
from model.inference.engine import Engine, Request
from model.inference.generation import GenerationSettings
from model.inference.images import BoundedCache, content_key
from model.inference.mask_stage import encode_segmented
from tests.inference.mixtures import engine_of, pictures, png, talker

SHORT = GenerationSettings(max_new_tokens=3)


@dataclass
class Encodings:
    """How many images each tower has encoded, and in how many calls."""

    clip: int = 0
    sam: int = 0
    sam_calls: int = 0


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    return counted(monkeypatch)


def counted(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Engine:
    """An engine whose ``encodings`` are counted."""
    one = engine_of(*talker(), **options)
    one.encodings = count = Encodings()  # type: ignore[attr-defined]
    clip, sam = one.model.encode_images, one.model.encode_segmented_images

    def encode_images(pixels: torch.Tensor) -> torch.Tensor:
        count.clip += len(pixels)
        return clip(pixels)

    def encode_segmented_images(pixels: torch.Tensor) -> torch.Tensor:
        count.sam += len(pixels)
        count.sam_calls += 1
        return sam(pixels)

    monkeypatch.setattr(one.model, "encode_images", encode_images)
    monkeypatch.setattr(one.model, "encode_segmented_images", encode_segmented_images)
    return one


@pytest.fixture
def speaks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make the model say one token for ever, for questions that begin with “Segment” ``<SEG>``."""

    def choose(engine: Engine) -> None:
        seg, word = engine.model.config.seg_token_id, engine.processor.tokenizer.encode("liver")[-1]
        real = engine._schedule._choose

        def chosen(rows: Sequence[Any], *rest: Any) -> None:
            said = [seg if row.ticket.request.question.startswith("Segment") else word for row in rows]
            with monkeypatch.context() as patch:
                patch.setattr("model.inference.schedule.choose_tokens", lambda *_: torch.tensor(said))
                real(rows, *rest)

        monkeypatch.setattr(engine._schedule, "_choose", chosen)

    return choose


def ask(engine: Engine, image: Any, question: str = "What is it?") -> Answer:
    return engine.ask(Request(image, question, settings=SHORT))


# --- known by content -----------------------------------------------------------------------------------------------


def test_one_content_is_encoded_once_wherever_it_lies(engine: Engine, speaks: Any, tmp_path: Path) -> None:
    speaks(engine)
    content = png(pictures()[0])
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(content)
    sources = [tmp_path / "a.png", str(tmp_path / "b.png"), content, io.BytesIO(content)]
    found = [ask(engine, source, "Segment it.") for source in sources]
    assert [len(answer.masks) for answer in found] == [3] * 4
    assert len({answer.masks[0].rle["counts"] for answer in found}) == 1
    assert engine.encodings == Encodings(clip=1, sam=1, sam_calls=1)
    assert engine.status()["images"] == 1 and engine.status()["image_hits"] == 3


def test_questions_that_wait_together_share_the_encodings_too(engine: Engine, speaks: Any) -> None:
    speaks(engine)
    content = png(pictures()[0])
    tickets = [engine.submit(Request(content, f"Segment {name}.", settings=SHORT)) for name in "abcde"]
    while engine.step():
        pass
    assert all(ticket.result(0).masks for ticket in tickets)
    assert engine.encodings == Encodings(clip=1, sam=1, sam_calls=1)


def test_another_content_is_another_image(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    for number, picture in enumerate(pictures()[:2], start=1):
        path.write_bytes(png(picture))  # the same path, written anew
        assert engine.prepare(path).size == picture.shape[:2]
        ask(engine, path)
        assert engine.encodings.clip == number


def test_contents_are_told_apart() -> None:
    zeros = np.zeros((4, 6), np.uint8)
    arrays = [zeros, zeros.T, zeros.reshape(6, 4), zeros.astype(np.uint16), zeros + 1]
    light, dark = Image.fromarray(zeros).convert("P"), Image.fromarray(zeros).convert("P")
    light.putpalette([200] * 768)
    dark.putpalette([9] * 768)
    kinds = [Image.fromarray(zeros), Image.fromarray(zeros).convert("RGB"), light, dark]
    keys = [content_key(source) for source in [*arrays, b"", b"a", *kinds]]
    assert keys[1] == keys[2] and len(set(keys)) == len(keys) - 1  # 6×4 zeros are 6×4 zeros
    for mode in ("PA", "P"):
        assert content_key(light.convert(mode)) != content_key(dark.convert(mode))
    turned = np.arange(24, dtype=np.uint8).reshape(4, 6).T
    assert content_key(turned) == content_key(turned.copy())


def test_a_photograph_that_lies_on_its_side_is_another_one(engine: Engine) -> None:
    """The same pixels may be meant upright or turned."""
    upright = Image.fromarray(pictures()[0])
    turned = upright.copy()
    turned.getexif()[ExifTags.Base.Orientation] = 6
    assert engine.prepare(upright).size == (40, 56) and engine.prepare(turned).size == (56, 40)


# --- encoded when it must be ----------------------------------------------------------------------------------------


def test_the_segmentation_tower_rests_where_no_mask_is_spoken(engine: Engine, speaks: Any) -> None:
    speaks(engine)
    prepared = engine.prepare(pictures()[0])
    assert (prepared.image_features, prepared.sam_embedding) == (None, None) and engine.encodings == Encodings()
    ask(engine, prepared)
    ask(engine, prepared, "Is it a kidney?")
    assert engine.encodings == Encodings(clip=1)
    assert len(ask(engine, prepared, "Segment it.").masks) == 3
    assert engine.encodings == Encodings(clip=1, sam=1, sam_calls=1)
    ask(engine, prepared, "Segment the liver.")
    assert engine.encodings == Encodings(clip=1, sam=1, sam_calls=1)


def test_the_segmentation_tower_rests_where_the_answer_is_given_up(engine: Engine, speaks: Any) -> None:
    speaks(engine)
    ticket = engine.submit(Request(pictures()[0], "Segment it.", settings=GenerationSettings()))
    for _ in range(3):
        engine.step()
    ticket.cancel()
    engine.step()
    assert "<SEG>" in ticket.result(0).text and engine.encodings.sam == 0


def test_images_of_answers_that_end_together_are_encoded_together(monkeypatch: pytest.MonkeyPatch, speaks: Any) -> None:
    engine = counted(monkeypatch, slots=4, prefill_chunk=10_000)
    speaks(engine)
    questions = ("Segment it.", "Segment it.", "What is it?", "Segment it.")
    tickets = [
        engine.submit(Request(image, question, settings=SHORT))
        for image, question in zip(pictures(), questions, strict=True)
    ]
    while engine.step():
        pass
    assert [len(ticket.result(0).masks) for ticket in tickets] == [3, 3, 0, 3]
    assert engine.encodings == Encodings(clip=4, sam=3, sam_calls=1)


def test_a_second_question_reads_only_what_is_new(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    ask(engine, pictures()[0])
    runner = engine._schedule.decoding.runner
    run = runner.run
    monkeypatch.setattr(
        runner,
        "run",
        lambda pieces, *rest: read.extend(len(piece.embeds) for piece in pieces) or run(pieces, *rest),
    )
    asked = Request(pictures()[0], "Is there a kidney?", settings=SHORT)
    prompt = engine._prompt(asked)
    engine.ask(asked)
    assert sum(read) == prompt.length - prompt.prefix_length < prompt.length / 2
    assert engine.status()["prefix_hits"] == 1
    ask(engine, pictures()[1])
    assert engine.status()["prefix_hits"] == 1  # another image opens differently


# --- within a bound -------------------------------------------------------------------------------------------------


def test_the_caches_stay_within_their_bounds(monkeypatch: pytest.MonkeyPatch, speaks: Any) -> None:
    engine = counted(monkeypatch, image_cache_mb=1, prefix_cache_mb=1)
    speaks(engine)
    many = pictures(seed=3, count=24)
    first = ask(engine, many[0], "Segment it.")
    for picture in many[1:]:
        ask(engine, picture, "Segment it.")
        assert engine.images.num_bytes <= 2**20 and engine.prefixes.num_bytes <= 2**20
    assert 0 < len(engine.images) < 24 and 0 < len(engine.prefixes) < 24
    again = ask(engine, many[0], "Segment it.")  # long gone, and encoded anew
    assert engine.encodings == Encodings(clip=25, sam=25, sam_calls=25)
    assert [mask.rle for mask in again.masks] == [mask.rle for mask in first.masks]


@pytest.mark.parametrize("question", ["What is it?", "Segment it."])
def test_encodings_count_towards_the_bound(engine: Engine, speaks: Any, question: str) -> None:
    speaks(engine)
    prepared = engine.prepare(pictures()[0])
    if question == "Segment it.":
        ask(engine, prepared)
    engine.images.max_bytes = engine.images.num_bytes + 10
    ask(engine, prepared, question)
    assert len(engine.images) == 0


def test_an_image_may_outlive_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = counted(monkeypatch, image_cache_mb=0)
    prepared = engine.prepare(pictures()[0])
    assert ask(engine, prepared).text == ask(engine, prepared).text
    assert engine.encodings.clip == 1 and len(engine.images) == 0
    ask(engine, pictures()[0])
    assert engine.encodings.clip == 2


@dataclass
class Weight:
    num_bytes: int


def test_what_was_used_longest_ago_makes_room() -> None:
    cache: BoundedCache[Weight] = BoundedCache(100)
    for name in "abc":
        cache.put(name, Weight(30))
    assert cache.get("a") is not None
    cache.put("d", Weight(30))
    assert [name for name in "abcd" if cache.get(name)] == ["a", "c", "d"]
    assert (cache.hits, cache.misses, cache.num_bytes, len(cache)) == (4, 1, 90, 3)


def test_what_is_too_large_is_not_kept_and_growth_is_noticed() -> None:
    cache: BoundedCache[Weight] = BoundedCache(100)
    growing = Weight(10)
    cache.put("large", Weight(101))
    assert cache.get("large") is None
    cache.put("growing", growing)
    assert cache.get("growing") is growing
    growing.num_bytes = 101
    cache.refresh()
    assert len(cache) == 0 and cache.num_bytes == 0


def test_the_first_of_two_equal_images_is_kept() -> None:
    cache: BoundedCache[Weight] = BoundedCache(100)
    first = cache.keep("a", Weight(10))
    assert cache.keep("a", Weight(10)) is first is cache.get("a")
    assert cache.keep("b", Weight(1000)).num_bytes == 1000 and cache.get("b") is None


def test_a_cache_may_be_used_from_many_threads() -> None:
    cache: BoundedCache[Weight] = BoundedCache(50)
    together = threading.Barrier(4)

    def work(number: int) -> int:
        together.wait(10)
        for step in range(500):
            cache.put((number + step) % 13, Weight(7))
            cache.get(step % 13)
            cache.refresh()
        return cache.num_bytes

    with ThreadPoolExecutor(4) as pool:
        assert all(size <= 50 for size in pool.map(work, range(4)))
    assert cache.num_bytes == 7 * len(cache) == 49


@torch.inference_mode()
def test_encodings_made_together_hold_their_own_memory_alone(engine: Engine) -> None:
    """Else one that is kept would keep those beside it, and the bound be passed unseen."""
    images = [engine.prepare(picture) for picture in pictures()[:3]]
    encode_segmented(engine.model, images)
    for image in images:
        assert image.sam_embedding is not None
        assert image.sam_embedding.untyped_storage().nbytes() == image.sam_embedding.nbytes
