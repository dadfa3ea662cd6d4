"""A worker on the shipped nano, over real sockets: its answers are the engine's own."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import json
import math
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pydicom
import pytest
from PIL import Image

from model.inference.answer import Answer
from model.inference.engine import Engine, EngineSettings, Request
from model.inference.generation import GenerationSettings
from model.processing.masks import decode_rle, encode_rle
from model.serve.protocol import ErrorCode
from model.serve.worker_app import WorkerSettings, make_worker_app
from tests.conftest import ROOT
from tests.serve.asking import CT, MASK, ask, in_base64, message, prompt, read_chunks, refused

NANO = ROOT / "assets" / "medplib-nano"
OUTLINE = "Please segment the vertebra and the kidney in this CT image."


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.from_pretrained(NANO, EngineSettings(slots=4, waiting=16)) as engine:
        yield engine


@pytest.fixture(scope="module")
def url(engine: Engine, serving: Any) -> Iterator[str]:
    with serving(make_worker_app(engine, WorkerSettings(("nano", "medplib"), capacity=20))) as url:
        yield url


def direct(engine: Engine, question: str, **options: Any) -> Answer:
    return engine.ask(Request(CT, question, **options))


def said(answer: Answer) -> list[dict[str, Any]]:
    return [mask.to_dict() for mask in answer.masks]


@pytest.mark.parametrize("question", ["What does this image show?", "Mark the liver, please.", OUTLINE])
def test_a_streamed_answer_is_the_engines_own(url: str, engine: Engine, question: str) -> None:
    wanted = direct(engine, question)
    body = message(question)
    chunks = ask(url, body)
    last = chunks[-1]
    assert last.answer == wanted.text
    assert last.masks == said(wanted)
    assert (last.finish, last.error_code, last.mask) == ("end", 0, [])
    assert last.usage == {"prompt_tokens": wanted.prompt_tokens, "completion_tokens": wanted.new_tokens}
    assert last.timing and last.timing["total"] > 0
    assert (last.height, last.width) == (("256", "256") if wanted.masks else ("", ""))
    for before, after in itertools.pairwise(chunks):
        assert after.answer.startswith(before.answer)
        assert (before.error_code, before.masks, before.finish) == (0, [], None)
    assert all(chunk.text == body["prompt"] + chunk.answer for chunk in chunks)


@pytest.mark.parametrize("method", ["decode_masks", "encode_images"])
def test_nan_is_an_error_of_the_worker_and_never_json(
    url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def spoiled(*arguments: Any) -> Any:
        result = real(*arguments)
        if method == "encode_images":
            return result * math.nan
        return dataclasses.replace(result, iou_predictions=result.iou_predictions * math.nan)

    real, body = getattr(engine.model, method), message(OUTLINE)
    wanted = ask(url, body)[-1].masks
    engine.images._values.clear()
    engine.prefixes._values.clear()
    with monkeypatch.context() as patch:
        patch.setattr(engine.model, method, spoiled)
        raw = httpx.post(f"{url}/worker_generate_stream", json=body, timeout=30)
        last = [json.loads(chunk, parse_constant=pytest.fail) for chunk in raw.content.split(b"\0") if chunk][-1]
    sentence = last["text"] if raw.status_code == 200 else last["error"]
    assert sentence.endswith("NaN or infinite numbers for this question")  # what to do about it is for the log
    assert last["error_code"] == ErrorCode.FAILED
    assert raw.status_code in (200, 500)
    assert ask(url, body)[-1].masks == wanted


def test_there_are_masks_and_none(engine: Engine) -> None:
    assert [len(direct(engine, question).masks) for question in (OUTLINE, "Mark the liver, please.")] == [2, 0]


def test_chunks_are_json_objects_each_ended_by_a_nul(url: str) -> None:
    content = httpx.post(f"{url}/worker_generate_stream", json=message(OUTLINE), timeout=30).content
    assert content.endswith(b"\0")
    pieces = [json.loads(piece) for piece in content[:-1].split(b"\0")]
    assert all({"text", "error_code", "mask", "height", "width"} <= set(piece) for piece in pieces)


def test_masks_as_pixels_and_as_png(url: str, engine: Engine) -> None:
    wanted = [decode_rle(mask["rle"]) for mask in said(direct(engine, OUTLINE))]
    last = ask(url, message(OUTLINE, mask_format="pixels", mask_png=True))[-1]
    union = np.zeros(wanted[0].shape, dtype=bool)
    union[tuple(np.array(last.mask).T)] = True
    assert np.array_equal(union, wanted[0] | wanted[1])
    assert len(last.mask) == union.sum()
    for mask, inside in zip(last.masks, wanted, strict=True):
        kind, _, data = mask["png"].partition(",")
        assert kind == "data:image/png;base64"
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) > 0, inside)
        assert decode_rle(mask["rle"]).tolist() == inside.tolist()


@pytest.mark.parametrize("form", ["png", "data uri", "rle", "rows"])
def test_regions_in_every_form(url: str, engine: Engine, form: str) -> None:
    inside = np.asarray(Image.open(MASK)) > 0
    forms = {
        "png": in_base64(MASK),
        "data uri": "data:image/png;base64," + in_base64(MASK),
        "rle": encode_rle(inside),
        "rows": inside.astype(int).tolist(),
    }
    question = "What is in the region <region></region>?"
    wanted = direct(engine, question, regions=[MASK])
    assert ask(url, message(question, region_masks=[forms[form]]))[-1].answer == wanted.text
    assert wanted.text.lower() == "vertebra"


def test_several_turns_with_a_region_in_the_first(url: str, engine: Engine) -> None:
    history = [("What is in the region <region></region>?", "Vertebra"), ("Sure?", "Yes, it is <SEG>.")]
    question = "Does <region></region> lie in the upper or the lower half?"
    corner = np.zeros((256, 256), dtype=bool)
    corner[200:240, 100:140] = True
    wanted = direct(engine, question, history=history, regions=[MASK, corner])
    body = message(region_masks=[in_base64(MASK), encode_rle(corner)])
    body["prompt"] = prompt(question, *history)
    assert ask(url, body)[-1].answer == wanted.text
    body["prompt"] = body["prompt"].replace("curious human", "curious user").replace("the human's", "the user's")
    assert ask(url, body)[-1].answer == wanted.text  # the published templates are one conversation


def test_a_bare_question_is_taken_too(url: str, engine: Engine) -> None:
    body = {"prompt": "What does this image show?", "images": ["data:image/png;base64," + in_base64(CT)]}
    last = ask(url, body)[-1]
    assert last.answer == direct(engine, "What does this image show?").text
    assert last.text == body["prompt"] + last.answer


def test_settings_reach_the_engine(url: str, engine: Engine) -> None:
    drawn = GenerationSettings(max_new_tokens=12, temperature=2.0, top_p=0.9, top_k=50, seed=7)
    fields = {"max_new_tokens": 12, "temperature": 2.0, "top_p": 0.9, "top_k": 50, "seed": 7}
    assert ask(url, message(**fields))[-1].answer == direct(engine, "What does this image show?", settings=drawn).text
    short = ask(url, message(max_new_tokens=2))[-1]
    assert (short.finish, short.usage["completion_tokens"]) == ("length", 2)  # type: ignore[index]
    stopped = ask(url, message(stop=["and", "</s>"]))[-1]
    assert stopped.finish == "stop"
    assert "and" not in stopped.answer
    large, small = (ask(url, message(OUTLINE, threshold=value))[-1].masks[0] for value in (0.05, 0.95))
    assert large["area_px"] > small["area_px"]
    ask(url, message(top_k=10**30, max_new_tokens=10**30))  # greedy, so that it ends
    ask(url, message(temperature=1e300, max_new_tokens=8))


def test_spacing_of_a_dicom_becomes_an_area_and_its_tags_stay(url: str, caplog: Any) -> None:
    pixels = np.asarray(Image.open(CT).convert("L"))
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.BitsAllocated, data.BitsStored, data.HighBit = 1, 8, 8, 7
    data.PixelRepresentation, data.PhotometricInterpretation = 0, "MONOCHROME2"
    data.PixelSpacing, data.PatientName, data.PixelData = [0.5, 2.0], "Roe^Jane", pixels.tobytes()
    data.preamble = b"\0" * 128
    stream = io.BytesIO()
    pydicom.dcmwrite(stream, data)
    last = ask(url, message(OUTLINE, images=[in_base64(stream.getvalue())]))[-1]
    assert [mask["area_mm2"] for mask in last.masks] == [mask["area_px"] * 1.0 for mask in last.masks]
    assert "Roe" not in last.model_dump_json() + caplog.text


def test_words_alone_are_answered(url: str, engine: Engine) -> None:
    body = message(prompt="What is a CT?", images=[], dropped_turns=2)
    last = ask(url, body)[-1]
    assert last.answer == engine.ask(Request(None, "What is a CT?")).text and last.dropped_turns == 2


def test_every_target_is_answered_where_it_is_asked_for(url: str, engine: Engine) -> None:
    question = "Segment the vertebra, the dragon, the kidney and the liver."
    chunks = ask(url, message(question, every_target=True))
    assert {"vertebra", "kidney"} <= {mask["label"] for mask in chunks[-1].masks if "warning" not in mask}
    assert chunks[-1].answer == direct(engine, question, every_target=True).text


# --- what is refused ----------------------------------------------------------------------------------------------


def malformed() -> dict[str, tuple[dict[str, Any], str]]:
    square = encode_rle(np.ones((4, 4), dtype=bool))
    good = in_base64(CT)
    return {
        "no image": ({"images": []}, "about an image and holds none"),
        "two images": ({"images": [good, good]}, "2 images; send one"),
        "an address": ({"images": ["http://127.0.0.1/a.png"]}, "not opened"),
        "a path": ({"images": [str(CT)]}, "base64"),
        "no picture": ({"images": [in_base64(b"hello there")]}, "not a readable image"),
        "a cut picture": ({"images": [in_base64(CT.read_bytes()[:300])]}, "damaged or cut short"),
        "another size": ({"region_masks": [square]}, "a region is 4×4, the image 256×256"),
        "too many regions": ({"region_masks": [square] * 17}, "17 regions, and 16 are taken"),
        "markers without regions": ({"prompt": prompt("What is <region></region>?")}, "region"),
        "another model": ({"model": "gpt-7"}, "there is no model 'gpt-7' here; there is nano, medplib"),
        "a long prompt": ({"prompt": "a" * 20_001}, "20,001 characters"),
        "a very long prompt": ({"prompt": "a b " * 4000}, "tokens"),
        "many turns": ({"prompt": prompt("a", *[("b", "c")] * 32)}, "33 turns, and 32 are taken"),
        "two markers of images": ({"prompt": prompt("<image> and this?")}, "more than once"),
        "nothing asked": ({"prompt": prompt(" ")}, "empty"),
        "a negative temperature": ({"temperature": -1}, "temperature"),
        "an infinite temperature": ({"temperature": "inf"}, "temperature"),
        "a large seed": ({"seed": 2**64}, "seed"),
        "no tokens": ({"max_new_tokens": 0}, "max_new_tokens"),
        "many stops": ({"stop": ["a"] * 17}, "stop texts"),
        "a threshold of one": ({"threshold": 1.0}, "threshold"),
        "no presence classifier": ({"no_mask_below": 0.5}, "presence classifier"),
        "another mask format": ({"mask_format": "svg"}, "mask_format"),
        "images that are no list": ({"images": good}, "images"),
    }


@pytest.mark.parametrize("name", list(malformed()))
def test_what_is_malformed_is_a_400_with_a_sentence(url: str, name: str) -> None:
    fields, expected = malformed()[name]
    status, sentence, _ = refused(url, message(**fields))
    assert status == 400
    assert re.search(re.escape(expected), sentence), sentence
    assert in_base64(CT)[:40] not in sentence


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"prompt": "\xff"}', b"[" * 100_000, b'{"prompt": 7}'])
def test_what_is_no_message_is_a_400_with_a_sentence(url: str, body: bytes) -> None:
    assert refused(url, body)[0] == 400


def test_too_long_a_body_is_a_413(engine: Engine, serving: Any) -> None:
    from model.serve.limits import ServeLimits

    limits = ServeLimits(max_body_bytes=1000)
    with serving(make_worker_app(engine, WorkerSettings(("nano",), limits=limits))) as url:
        assert refused(url, message())[0] == 413


def test_too_many_pixels_to_list_is_a_sentence(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.serve.worker_requests.MAX_LISTED_PIXELS", 10)
    chunks = ask(url, message(OUTLINE, mask_format="pixels"))
    assert chunks[-1].error_code == 2
    assert "read the masks' run lengths" in chunks[-1].text


def test_unknown_routes_and_methods(url: str) -> None:
    assert httpx.get(f"{url}/worker_generate_stream").status_code == 405
    assert httpx.get(f"{url}/nothing").status_code == 404
    assert httpx.get(f"{url}/openapi.json").status_code == 404


# --- many at once -------------------------------------------------------------------------------------------------


def test_many_at_once_get_what_each_would_get_alone(url: str, engine: Engine) -> None:
    questions = ["What does this image show?", "Name the imaging technique of this picture.", OUTLINE] * 4
    wanted = {question: direct(engine, question) for question in set(questions)}
    with ThreadPoolExecutor(len(questions)) as pool:
        answers = list(pool.map(lambda question: ask(url, message(question))[-1], questions))
    for question, last in zip(questions, answers, strict=True):
        assert last.answer == wanted[question].text
        assert [mask["label"] for mask in last.masks] == [mask.label for mask in wanted[question].masks]


def test_an_image_is_encoded_once_for_many_questions(url: str, engine: Engine) -> None:
    ask(url, message())
    known = len(engine.images)
    for question in ("What does this image show?", "Is there a kidney in this image?"):
        ask(url, message(question))
    assert len(engine.images) == known


# --- what it says of itself ---------------------------------------------------------------------------------------


def test_status_health_and_metrics(url: str, wait_until: Any) -> None:
    before = httpx.post(f"{url}/worker_get_status").json()
    ask(url, message())
    refused(url, message(images=[]))
    wait_until(lambda: httpx.post(f"{url}/worker_get_status").json()["queue_length"] == 0)
    status = httpx.post(f"{url}/worker_get_status").json()
    assert (status["model_names"], status["queue_length"], status["capacity"]) == (["nano", "medplib"], 0, 20)
    assert status["speed"] > 0
    assert status["draining"] is False
    assert status["details"]["answered"] == before["details"]["answered"] + 1
    assert status["details"]["requests"] == before["details"]["requests"] + 2
    assert status["details"]["slots"] == 4
    assert httpx.get(f"{url}/livez").status_code == 200
    assert httpx.get(f"{url}/readyz").status_code == 200
    told = httpx.get(f"{url}/metrics").text
    for line in ('worker_requests_total{outcome="end"}', 'worker_requests_total{outcome="bad_input"}'):
        assert f"medplib_{line}" in told
    for name in ("first_token_seconds_count", "answer_seconds_count", "tokens_total", "waiting", "running"):
        assert re.search(rf"^medplib_worker_{name} \d", told, re.MULTILINE), name


def test_a_reader_can_start_before_the_answer_is_complete(url: str) -> None:
    heard = threading.Event()
    with httpx.stream("POST", f"{url}/worker_generate_stream", json=message(OUTLINE), timeout=30) as response:
        for chunk in read_chunks(response):
            if chunk.finish is None and chunk.answer:
                heard.set()
    assert heard.is_set()
