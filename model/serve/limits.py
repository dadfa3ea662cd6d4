"""Request limits, checked before anything is decoded, and the functions that open a request's data.

Nothing that a client sends is ever taken for a path or an address: images come as bytes in base64, regions as bytes,
run lengths or rows. A program that answers over HTTP puts ``BodyLimit`` in front of everything else.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model.data.image_io import ImageData, ReadLimits, read_image, read_mask
from model.errors import MedPLIBError
from model.serve.commands import LIMITS, PAGE_LIMITS, REQUEST_LIMITS
from model.serve.errors import Refusal
from model.serve.protocol import ErrorCode

_MIB = 2**20
_DATA_URI = re.compile(r"data:[\w.+-]*/?[\w.+-]*(?:;[\w.+-]+=[\w.+-]*)*;base64,", re.IGNORECASE)
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # device names on Windows
_MAX_NAME, _MAX_HEAD = 100, 200


@dataclass(frozen=True)
class ServeLimits:
    """What one request may cost.

    Attributes:
        max_image_bytes: of an encoded image or region.
        max_volume_bytes: of an encoded DICOM or NIfTI file, which the page alone takes apart slice by slice.
        max_pixels: of an image.
        max_frames: of a volume.
        max_regions: marked in a conversation.
        max_turns: questions of a conversation, the one to answer included.
        max_prompt_chars: of the whole conversation.
        max_new_tokens: an answer may have.
        max_body_bytes: of a request as it comes over the wire.
    """

    max_image_bytes: int = 64 * _MIB
    max_volume_bytes: int = 512 * _MIB
    max_pixels: int = 40_000_000
    max_frames: int = 2000
    max_regions: int = 16
    max_turns: int = 32
    max_prompt_chars: int = 20_000
    max_new_tokens: int = 1024
    max_body_bytes: int = 96 * _MIB

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise MedPLIBError(f"{field.name} is {getattr(self, field.name)}; give at least 1")

    @property
    def max_upload_bytes(self) -> int:
        """Of a file that is opened on the page."""
        return max(self.max_image_bytes, self.max_volume_bytes)

    @property
    def reading(self) -> ReadLimits:
        """The same for the readers of image files."""
        return ReadLimits(self.max_image_bytes, self.max_pixels)


def limits_from(options: argparse.Namespace) -> ServeLimits:
    """The limits that parsed flags mean.

    Raises:
        MedPLIBError: one is not positive.
    """
    given = {}
    for flag in (*LIMITS, *REQUEST_LIMITS, *PAGE_LIMITS):
        name = f"max_{flag.replace('-', '_')}"
        value = getattr(options, name, None)
        if value is not None:
            given[name.replace("_mib", "_bytes")] = value * _MIB if flag.endswith("mib") else value
    return ServeLimits(**given)


def turns_to_drop(lengths: Sequence[int], regions: Sequence[int], limits: ServeLimits) -> int:
    """Oldest questions of a conversation to leave out, so that the rest keeps the limits; never the last one.

    Args:
        lengths: characters of each question with its answer.
        regions: marked in each.
        limits: of turns, characters (of the prompt, which has words of its own) and regions.
    """
    for dropped in range(len(lengths)):
        whole = 300 + sum(length + 30 for length in lengths[dropped:])
        marked = sum(regions[dropped:])
        if (
            len(lengths) - dropped <= limits.max_turns
            and whole <= limits.max_prompt_chars
            and marked <= limits.max_regions
        ):
            return dropped
    return len(lengths) - 1


def decode_base64(text: str, limits: ServeLimits) -> bytes:
    """Bytes of plain base64 or of a ``data:…;base64,`` URI; its length is checked before it is decoded.

    Raises:
        MedPLIBError: it is an address, is no base64, is empty, or is longer than ``limits.max_image_bytes``.
    """
    if not isinstance(text, str):
        raise MedPLIBError(f"expected an image in base64, got {type(text).__name__}")
    start = 0
    if match := _DATA_URI.match(text[:_MAX_HEAD]):  # a search in the whole of a long text could take for ever
        start = match.end()
    elif _ADDRESS.match(text[:_MAX_HEAD]):
        raise MedPLIBError("an image is sent in base64 or as a data:…;base64, URI; addresses and paths are not opened")
    if (len(text) - start) * 3 // 4 > limits.max_image_bytes + 2 * len(text) // 64:  # line ends may be among them
        raise _too_long(limits)
    try:
        data = base64.b64decode("".join(text[start:].split()), validate=True)
    except (binascii.Error, ValueError) as error:  # the latter where a character is not ASCII
        raise MedPLIBError("an image is not valid base64; encode the file's bytes, or send a data URI") from error
    if not data:
        raise MedPLIBError("an image is empty; send the bytes of a file in base64")
    if len(data) > limits.max_image_bytes:
        raise _too_long(limits)
    return data


def _too_long(limits: ServeLimits) -> MedPLIBError:
    return MedPLIBError(f"an image is larger than the limit of {limits.max_image_bytes / _MIB:.3g} MiB; shrink it")


def open_image(data: bytes, limits: ServeLimits) -> ImageData:
    """Decode an image file's bytes; sizes are checked before pixels are decoded.

    Raises:
        MedPLIBError: too large, damaged, several frames, two formats at once, or no image at all.
    """
    if not isinstance(data, bytes):  # a text would be taken for a path
        raise MedPLIBError(f"expected the bytes of an image file, got {type(data).__name__}")
    return read_image(data, limits.reading)


def open_region(value: Any, size: tuple[int, int], limits: ServeLimits) -> np.ndarray:
    """A region as clients send one.

    Args:
        value: base64 or data URI of a mask's PNG, COCO run lengths ``{"size": [h, w], "counts": …}``, h rows of w
            zeros and ones, ``{"box": [x1, y1, x2, y2]}`` or ``{"point": [x, y]}`` in pixels.
        size: (height, width) of the image it is marked in.
        limits: of the request.

    Returns:
        bool [h, w].

    Raises:
        MedPLIBError: it is malformed, of another size than the image, or empty.
    """
    if isinstance(value, str):
        mask = read_mask(decode_base64(value, limits), limits.reading)
    elif isinstance(value, Mapping) and len(value) == 1 and (shape := next(iter(value))) in ("box", "point"):
        mask = _from_numbers(shape, value[shape], size)
    elif isinstance(value, Mapping):
        mask = _from_run_lengths(value, size)
    elif isinstance(value, list):
        mask = _from_rows(value, size)
    else:
        raise MedPLIBError(
            f"a region is a PNG in base64, COCO run lengths, rows of 0 and 1, box or point; got {type(value).__name__}"
        )
    _check_size(mask.shape, size)
    if not mask.any():
        raise MedPLIBError("a region is empty; mark at least one pixel")
    return mask


def _from_numbers(shape: str, numbers: Any, size: tuple[int, int]) -> np.ndarray:
    from model.inference.regions import region_to_mask  # takes a while to import

    proper = isinstance(numbers, list) and all(type(one) in (int, float) and abs(one) < 2**31 for one in numbers)
    return region_to_mask((shape, tuple(numbers) if proper else ()), size)


def _from_run_lengths(value: Mapping[str, Any], size: tuple[int, int]) -> np.ndarray:
    from model.processing.masks import decode_rle  # brings torch and transformers, which a controller does without

    stored, counts = value.get("size"), value.get("counts")
    sides = isinstance(stored, list) and len(stored) == 2 and all(type(side) is int for side in stored)
    runs = isinstance(counts, str) or (isinstance(counts, list) and all(type(run) is int for run in counts))
    if not sides or not runs:
        raise MedPLIBError("a region's run lengths are malformed; expected COCO's {'size': [h, w], 'counts': …}")
    _check_size(tuple(stored), size)  # type: ignore[arg-type]
    return decode_rle(value)


def _from_rows(rows: list[Any], size: tuple[int, int]) -> np.ndarray:
    widths = {len(row) if isinstance(row, list) else -1 for row in rows}
    if len(widths) != 1 or -1 in widths:
        raise MedPLIBError("a region's rows are malformed; expected lists of 0 and 1 of one length, one for each row")
    _check_size((len(rows), *widths), size)
    if not all(type(value) in (bool, int) and value in (0, 1) for row in rows for value in row):
        raise MedPLIBError("a region's rows hold something other than 0 and 1; mark what is inside with 1")
    return np.array(rows, dtype=bool)


def _check_size(got: tuple[int, ...], size: tuple[int, int]) -> None:
    if got != size:
        shape = "×".join(str(side) for side in got)
        raise MedPLIBError(f"a region is {shape}, the image {size[0]}×{size[1]} (height×width); give them one size")


def safe_file_name(name: str, default: str = "file") -> str:
    """A name that is one file in whatever folder it is put: no folders, no control characters, at most 100 characters.

    Args:
        name: what somebody called a file.
        default: taken where nothing of it is left.
    """
    last = re.split(r"[/\\]", unicodedata.normalize("NFC", str(name)))[-1]
    kept = re.sub(r"[^\w.-]+", "_", last).lstrip("._-").rstrip("._ ")
    if len(kept) > _MAX_NAME:  # the suffix is the file's type
        stem, dot, ending = kept.rpartition(".")
        ending = f".{ending[:16]}" if dot else ""
        kept = (stem or kept)[: _MAX_NAME - len(ending)] + ending
    if not kept:
        return default
    return f"{default}_{kept}" if _RESERVED.fullmatch(kept) else kept


class BodyLimit:
    """ASGI middleware: no request's body is longer, stays away longer, or is kept beside more others than this.

    Answers 413, 408 and 429 with a sentence; a body whose declared length is too large is not read at all.

    Args:
        app: the program behind it.
        max_bytes: of one body.
        max_total_bytes: of all bodies whose requests have not begun to be answered; four of the largest when absent.
        idle_seconds: the next piece of a body may take.
    """

    def __init__(
        self, app: ASGIApp, max_bytes: int, *, max_total_bytes: int | None = None, idle_seconds: float = 30.0
    ) -> None:
        self.app, self.max_bytes, self.idle_seconds = app, max_bytes, idle_seconds
        self.max_total_bytes = max_total_bytes or 4 * max_bytes
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on while it keeps the limits."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if _told_length(scope) > self.max_bytes:
            await self._too_long().response(scope["path"])(scope, receive, send)
            return
        await self._pass_on(scope, receive, send)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        length, complete, begun = 0, False, False
        refusal: Refusal | None = None

        async def limited_receive() -> Message:
            nonlocal length, complete, refusal
            if complete:  # only the client's leaving can follow, which may take as long as the answer
                return await receive()
            try:
                message = await self._next_piece(receive, length)
            except Refusal as reason:
                refusal = reason
                raise
            length += len(message.get("body", b""))
            self._held += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            return message

        async def noting_send(message: Message) -> None:
            nonlocal begun, length
            if refusal is not None and not begun:  # the program's own words about an error it does not know
                return
            begun = True
            self._held -= length
            length = 0
            await send(message)

        try:
            await self.app(scope, limited_receive, noting_send)
        except Exception:
            if refusal is None or begun:
                raise
        finally:
            self._held -= length
        if refusal is not None and not begun:
            await refusal.response(scope["path"])(scope, receive, send)

    async def _next_piece(self, receive: Receive, length: int) -> Message:
        """The next piece of a body of which ``length`` bytes are here."""
        try:
            message = await asyncio.wait_for(receive(), self.idle_seconds)
        except TimeoutError:
            sentence = f"the request stopped coming for {self.idle_seconds:g} s; send it again"
            raise Refusal(ErrorCode.TIMEOUT, sentence, status=408) from None
        size = len(message.get("body", b""))
        if length + size > self.max_bytes:
            raise self._too_long()
        if self._held + size > self.max_total_bytes and self._held > length:  # alone, it is within its own limit
            raise Refusal(ErrorCode.BUSY, "too many large requests are being read; ask again later", retry_after=1)
        return message

    def _too_long(self) -> Refusal:
        sentence = f"the request is longer than {self.max_bytes / _MIB:.3g} MiB; send a smaller image"
        return Refusal(ErrorCode.BAD_INPUT, sentence, status=413)


def _told_length(scope: Scope) -> int:
    """What ``Content-Length`` says; 0 where it says nothing that can be read."""
    declared = next((value for name, value in scope["headers"] if name.lower() == b"content-length"), b"")
    return int(declared) if declared.isdigit() and len(declared) < 20 else 0
