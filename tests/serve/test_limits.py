"""Limits: what is refused before it is decoded, and that nothing sent is ever taken for a path or an address."""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image
from starlette.types import Message, Receive, Scope, Send

from model.errors import MedPLIBError
from model.processing.masks import encode_rle
from model.serve.commands import add_limit_flags
from model.serve.limits import (
    BodyLimit,
    ServeLimits,
    decode_base64,
    limits_from,
    open_image,
    open_region,
    safe_file_name,
)
from tests.conftest import ROOT

LIMITS = ServeLimits()
RNG = np.random.default_rng(0)


def encoded(pixels: np.ndarray, form: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form, **options)
    return stream.getvalue()


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is this large."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    good = encoded(np.zeros((4, 4, 3), dtype=np.uint8))
    return good[:12] + header + struct.pack(">I", zlib.crc32(header)) + good[33:]


def test_whoever_needs_only_limits_does_not_wait_for_torch() -> None:
    asked = "import sys, model.serve.limits; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", asked], cwd=ROOT, timeout=60).returncode == 0


def test_limits_are_positive() -> None:
    with pytest.raises(MedPLIBError, match="max_pixels is 0; give at least 1"):
        ServeLimits(max_pixels=0)


def test_limits_are_flags() -> None:
    parser = argparse.ArgumentParser()
    add_limit_flags(parser)
    assert limits_from(parser.parse_args([])) == LIMITS
    given = limits_from(parser.parse_args(["--max-pixels", "7", "--max-image-mib", "2", "--max-new-tokens", "9"]))
    assert given == ServeLimits(max_pixels=7, max_image_bytes=2**21, max_new_tokens=9)


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,", "data:;base64,", "DATA:image/png;charset=x;base64,"])
def test_base64_plain_in_lines_and_as_data_uri(prefix: str) -> None:
    data = RNG.bytes(5000)
    assert decode_base64(prefix + in_base64(data), LIMITS) == data
    assert decode_base64(prefix + base64.encodebytes(data).decode(), LIMITS) == data


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:1/a.png",
        "HTTPS://example.org",
        "file:///etc/passwd",
        "data:image/png,plain",
        "data:text/plain;base64",
        "/etc/passwd",
        "../../etc/passwd",
        "assets/pictures/a.png",
        "",
        "   ",
        "data:image/png;base64,",
        "AAA",
        "AAAA====AAAA",
        "ÄÄÄÄ",
        "AA\0A",
        None,
        7,
        b"AAAA",
    ],
)
def test_what_is_no_base64_is_refused_in_one_sentence(text: Any) -> None:
    with pytest.raises(MedPLIBError) as caught:
        decode_base64(text, LIMITS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["data:" + "a" * 10**6, "data:" + ";a=a" * 10**6, "a" * 10**6 + "§", "a+" * 10**6 + ":"]
)
def test_no_text_keeps_the_search_for_its_beginning_busy(text: str) -> None:
    with pytest.raises(MedPLIBError):
        decode_base64(text, LIMITS)


def test_a_name_of_a_file_that_happens_to_be_base64_is_not_opened(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "abcd").write_bytes(encoded(np.zeros((4, 4, 3), dtype=np.uint8)))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MedPLIBError, match="not a readable image"):
        open_image(decode_base64("abcd", LIMITS), LIMITS)
    with pytest.raises(MedPLIBError, match="not a readable image"):
        open_region("abcd", (4, 4), LIMITS)
    for path in ("abcd", tmp_path / "abcd"):
        with pytest.raises(MedPLIBError, match="expected the bytes"):
            open_image(path, LIMITS)  # type: ignore[arg-type]


def test_long_base64_is_refused_by_its_length() -> None:
    limits = ServeLimits(max_image_bytes=1000)
    for size in (1000, 999, 998):
        assert len(decode_base64(in_base64(RNG.bytes(size)), limits)) == size
        assert len(decode_base64(base64.encodebytes(RNG.bytes(size)).decode(), limits)) == size
    for size in (1001, 1003, 5000):
        with pytest.raises(MedPLIBError, match="larger than the limit"):
            decode_base64(in_base64(RNG.bytes(size)), limits)
    with pytest.raises(MedPLIBError, match="larger than the limit"):
        decode_base64("!" * 10_000, limits)  # not even looked at


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "BMP", "WEBP"])
def test_images_open_from_bytes(form: str) -> None:
    pixels = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    data = open_image(encoded(pixels, form), LIMITS)
    assert (data.size, data.kind, data.pixels.dtype) == ((20, 30), form.lower(), np.uint8)


def test_bombs_are_refused_by_their_header() -> None:
    for width, height in ((10_000, 10_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)):
        with pytest.raises(MedPLIBError, match="pixels"):
            open_image(claiming(width, height), LIMITS)
    with pytest.raises(MedPLIBError, match="cut short"):
        open_image(claiming(5000, 5000), LIMITS)


def test_odd_and_broken_files() -> None:
    pixels = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    good = encoded(pixels)
    cmyk = io.BytesIO()
    Image.fromarray(pixels).convert("CMYK").save(cmyk, "JPEG")
    assert open_image(cmyk.getvalue(), LIMITS).size == (20, 30)
    assert open_image(encoded((pixels[:, :, 0].astype(np.uint16)) * 200), LIMITS).size == (20, 30)
    assert np.array_equal(open_image(good + b"PK\x03\x04 trailing", LIMITS).pixels, pixels)
    two = good[:128] + b"DICM" + good[132:]
    for broken in (good[:60], good[: len(good) // 2], b"PK\x03\x04zip", b"%PDF-1.4", b"%!PS-Adobe-3.0 EPSF", b"<svg/>"):
        with pytest.raises(MedPLIBError):
            open_image(broken, LIMITS)
    with pytest.raises(MedPLIBError, match="at once"):
        open_image(two, LIMITS)
    frames = [Image.fromarray(pixels), Image.fromarray(255 - pixels)]
    for form in ("GIF", "TIFF", "PNG", "WEBP"):
        stream = io.BytesIO()
        frames[0].save(stream, form, save_all=True, append_images=frames[1:])
        with pytest.raises(MedPLIBError, match="holds several images"):
            open_image(stream.getvalue(), LIMITS)


def test_a_file_of_very_many_pages_is_not_read_through() -> None:
    """Each page costs as many steps as there are pages before it."""
    tags = ((256, 1), (257, 1), (258, 8), (259, 1), (262, 1), (273, 4), (277, 1), (278, 1), (279, 1))
    entries = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags)
    page = struct.pack("<H", len(tags)) + entries
    pages = b"".join(page + struct.pack("<I", 8 + (number + 1) * (len(page) + 4)) for number in range(200_000))
    with pytest.raises(MedPLIBError, match="holds several images"):
        open_image(b"II*\0" + struct.pack("<I", 8) + pages + page + bytes(4), LIMITS)


def test_regions_in_each_form_are_the_same() -> None:
    mask = RNG.random((12, 17)) > 0.5
    runs = encode_rle(mask)
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff([0, *edges, len(flat)]).tolist()
    values: list[Any] = [
        in_base64(encoded(mask)),
        "data:image/png;base64," + in_base64(encoded(mask.astype(np.uint8) * 255)),
        runs,
        {"size": [12, 17], "counts": [0, *lengths] if flat[0] else lengths},
        mask.astype(int).tolist(),
        mask.tolist(),
    ]
    for value in values:
        found = open_region(json.loads(json.dumps(value)), (12, 17), LIMITS)
        assert found.dtype == bool
        assert np.array_equal(found, mask)


def test_boxes_and_points_are_regions_of_the_image() -> None:
    box = open_region({"box": [1, 2, 4.5, 6]}, (10, 20), LIMITS)
    assert box.shape == (10, 20)
    assert box[2:6, 1:5].all() and box.sum() == 16
    assert open_region({"point": [19.5, 0]}, (10, 20), LIMITS)[0, 19]


def wrong_regions() -> Iterator[Any]:
    for numbers in (None, [], [1, 2, 3], ["0", "0", "2", "2"], [0, 0, 2, float("nan")], [0, 0, 2, 10**400], {"0": 1}):
        yield from ({"box": numbers}, {"point": numbers})
    yield from ({"box": [0, 0, 7, 4]}, {"box": [3, 0, 3, 4]}, {"point": [6, 0]}, {"point": [True, 0]})
    yield {"point": [1, 1], "box": [0, 0, 2, 2]}
    full, runs = np.ones((4, 6), dtype=bool), encode_rle(np.ones((4, 6), dtype=bool))
    yield from (None, 7, 1.5, True, "", "AAAA", "http://localhost/a.png", [], {}, [[]], [1, 0], ["ab"] * 4)
    yield in_base64(encoded(full.T))
    yield in_base64(claiming(60_000, 60_000))
    yield in_base64(encoded(full & False))
    yield {**runs, "size": [6, 4]}
    yield {**runs, "size": [4]}
    yield {**runs, "size": ["4", "6"]}
    yield {**runs, "size": [2**40, 2**40]}
    yield {"size": [4, 6]}
    for counts in (10**12, None, {"a": 1}, [1.5, 22], [-1, 25], ["24"], [0, 25], "zzzz~", "é", "0" * 1000):
        yield {"size": [4, 6], "counts": counts}
    yield {"size": [4, 6], "counts": [24]}
    yield full.astype(int).tolist()[:3]
    yield [[1] * 6, [1] * 6, [1] * 5, [1] * 6]
    for value in (2, -1, 0.5, "1", None, [1], 10**30):
        yield [[1] * 6, [1] * 6, [1] * 6, [1] * 5 + [value]]
    yield [[0] * 6] * 4


@pytest.mark.parametrize("value", list(wrong_regions()), ids=lambda value: repr(value)[:40])
def test_every_malformed_region_is_one_sentence(value: Any) -> None:
    with pytest.raises(MedPLIBError) as caught:
        open_region(value, (4, 6), LIMITS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("scan.png", "scan.png"),
        ("../../etc/passwd", "passwd"),
        ("C:\\temp\\a b.dcm", "a_b.dcm"),
        ("...hidden", "hidden"),
        ("-rf", "rf"),
        ("a\0b\n.png", "a_b_.png"),
        ("", "file"),
        ("..", "file"),
        ("///", "file"),
        ("NUL.png", "file_NUL.png"),
        ("Müller.png", "Müller.png"),
        ("a; rm *.png", "a_rm_.png"),
        ("x" * 300 + ".nii.gz", "x" * 97 + ".gz"),
    ],
)
def test_file_names_are_one_name_in_one_folder(name: str, safe: str) -> None:
    assert safe_file_name(name) == safe
    assert len(safe) <= 100


# --- bodies -----------------------------------------------------------------------------------------------------------


async def echo_length(scope: Scope, receive: Receive, send: Send) -> None:
    length, more = 0, True
    while more:
        message = await receive()
        length += len(message.get("body", b""))
        more = message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(length).encode()})


async def call(app: Any, pieces: list[bytes], told: int | None = None, ends: bool = True) -> tuple[int, bytes, int]:
    """Status and body of the answer, and how many pieces were read."""
    sent: list[Message] = []
    read = 0

    async def receive() -> Message:
        nonlocal read
        if read == len(pieces):
            await asyncio.Event().wait()  # nothing more comes, and the connection stays
        read += 1
        return {"type": "http.request", "body": pieces[read - 1], "more_body": read < len(pieces) or not ends}

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [] if told is None else [(b"content-length", str(told).encode())]
    await app({"type": "http", "path": "/", "headers": headers}, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent), read


def test_bodies_pass_up_to_the_limit_and_not_beyond() -> None:
    app = BodyLimit(echo_length, 100)
    assert asyncio.run(call(app, [b"a" * 60, b"b" * 40])) == (200, b"100", 2)
    status, body, read = asyncio.run(call(app, [b"a" * 60, b"b" * 41, b"c"]))
    assert (status, read) == (413, 2)
    assert "longer than" in json.loads(body)["error"]
    status, _, read = asyncio.run(call(app, [b"a" * 101], told=101))
    assert (status, read) == (413, 0)
    assert asyncio.run(call(app, [b"a"], told=1))[0] == 200


def test_a_program_with_words_of_its_own_does_not_hide_why() -> None:
    program = FastAPI()
    program.add_middleware(BodyLimit, max_bytes=100)

    @program.post("/")
    async def take(body: dict[str, str]) -> int:
        return len(body)

    with TestClient(program) as client:
        assert client.post("/", json={"a": "b"}).json() == 1
        reply = client.post("/", content=(piece for piece in [b'{"a": "', b"x" * 200, b'"}']))
        assert reply.status_code == 413
        assert "longer than" in reply.json()["error"]
        assert client.post("/", json={"a": "x" * 200}).status_code == 413


@pytest.mark.parametrize("told", [True, False])
def test_a_client_that_sends_far_too_much_reads_why(serving: Any, told: bool) -> None:
    content = b"a" * 2**24
    with serving(BodyLimit(echo_length, 2**20)) as url, httpx.Client() as client:
        for _ in range(2):
            reply = client.post(url, content=content if told else iter([content[: 2**22]] * 4))
            assert reply.status_code == 413
            assert "longer than 1 MiB" in reply.json()["error"]
        assert client.post(url, content=b"a" * 2**20).text == str(2**20)


def test_a_body_that_stops_coming_is_given_up() -> None:
    status, body, _ = asyncio.run(call(BodyLimit(echo_length, 100, idle_seconds=0.01), [b"a"], ends=False))
    assert status == 408
    assert "stopped coming" in json.loads(body)["error"]


def test_bodies_together_are_bounded_and_forgotten_afterwards() -> None:
    app = BodyLimit(echo_length, 100, max_total_bytes=150, idle_seconds=0.2)

    async def several() -> list[int]:
        held = asyncio.create_task(call(app, [b"a" * 100], ends=False))
        await asyncio.sleep(0)
        busy = await call(app, [b"a" * 60])
        fits = await call(app, [b"a" * 50])
        return [busy[0], fits[0], (await held)[0], (await call(app, [b"a" * 100]))[0]]

    assert asyncio.run(several()) == [429, 200, 408, 200]


def test_what_is_no_request_passes() -> None:
    seen = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    asyncio.run(BodyLimit(app, 1)({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert seen == ["lifespan"]
