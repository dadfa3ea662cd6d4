"""Messages between controller, workers and clients: those of LLaVA and FastChat, and additions.

Requests are JSON. An answer is a stream of JSON objects, each ended by a NUL byte; each holds the whole text so far,
and the last one the masks (reference §10). A field that the published programs do not know is optional everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from enum import IntEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

HEARTBEAT_SECONDS = 15.0
EXPIRY_SECONDS = 30.0
"""A worker that was silent for so long is forgotten."""
END_OF_CHUNK = b"\0"


class ErrorCode(IntEnum):
    """``error_code`` of a chunk; 0 and 1 are the published ones."""

    NONE = 0
    FAILED = 1  # the machine's fault
    BAD_INPUT = 2  # the client's; asking again unchanged is of no use
    BUSY = 3  # ask again later
    TIMEOUT = 4
    NO_WORKER = 5
    DRAINING = 6  # this worker takes nothing new; another one may

    @classmethod
    def _missing_(cls, value: object) -> ErrorCode:
        return cls.FAILED  # a code of a later version

    @property
    def http_status(self) -> int:
        """Status of an answer that failed before its first chunk."""
        return {0: 200, 2: 400, 3: 429, 4: 504, 5: 503, 6: 503}.get(int(self), 500)


class Message(BaseModel):
    """A request's body; fields that nobody knows are ignored, as published clients send some."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class WorkerStatus(Message):
    """What a worker can do and how busy it is.

    Attributes:
        model_names: models it answers for.
        speed: its weight in the lottery, > 0.
        queue_length: requests waiting and running.
        capacity: requests it takes at most, waiting and running; None where it does not say.
        draining: it finishes what it has and takes nothing new.
        conversation_turns: questions of a conversation that its models were trained on; 1: each stands alone.
        details: device, dtype, version … for people.
    """

    model_names: list[str]
    speed: float = Field(default=1.0, gt=0)
    queue_length: int = Field(default=0, ge=0)
    capacity: int | None = None
    draining: bool = False
    conversation_turns: int = Field(default=1, ge=1)
    details: dict[str, Any] = Field(default_factory=dict)


class RegisterWorker(Message):
    """``/register_worker``: ``worker_name`` is the address the worker is reached at, ``http://host:port``."""

    worker_name: str
    check_heart_beat: bool = True
    worker_status: WorkerStatus | None = None


class HeartBeat(Message):
    """``/receive_heart_beat``; answered by ``{"exist": bool}``: a worker that does not exist registers anew."""

    worker_name: str
    queue_length: int = Field(default=0, ge=0)


class ModelQuery(Message):
    """``/get_worker_address``; answered by ``{"address": str}``, empty where no worker has the model."""

    model: str


class GenerateRequest(Message):
    """``/worker_generate_stream``, of the controller and of a worker.

    Attributes:
        model: whose answer.
        prompt: the whole conversation as ``processing.conversation.render`` writes it, ending in an opened answer.
        temperature, top_p, max_new_tokens, stop: how it is drawn; temperature 0 is greedy.
        images: encoded files in base64 or as data URIs; one, or none for words alone.
        region_masks: one for each region marker of the prompt: base64 PNG, COCO RLE, or rows of 0 and 1.
        mask_format: ``rle``, or ``pixels`` for the published list of (row, column) pairs.
        mask_png: send each mask as a PNG data URI too.
        threshold: probability above which a pixel is in a mask, in (0, 1); the checkpoint's own when absent.
        no_mask_below: leave a mask empty whose calibrated probability of presence is lower.
        seed, top_k: of sampling.
        every_target: answer each target of a segmentation request, in further passes where the first leaves some out.
        dropped_turns: oldest questions that the client has left out of the prompt already.
        timeout: seconds the answer may take; the worker's own limit when absent or larger.
    """

    model: str = ""
    prompt: str
    temperature: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int = Field(default=256, ge=1)
    stop: str | list[str] | None = None
    images: list[str] = Field(default_factory=list)
    region_masks: list[Any] = Field(default_factory=list)
    mask_format: Literal["rle", "pixels"] = "rle"
    mask_png: bool = False
    threshold: float | None = Field(default=None, gt=0, lt=1)
    no_mask_below: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = Field(default=None, ge=0)
    top_k: int = Field(default=0, ge=0)
    timeout: float | None = Field(default=None, gt=0)
    every_target: bool = False
    dropped_turns: int = Field(default=0, ge=0)


class Chunk(Message):
    """One object of an answer's stream.

    Attributes:
        text: prompt and answer so far, or what went wrong.
        error_code: 0, or why there is no answer.
        answer: the answer so far alone.
        mask: every foreground pixel of all masks as [row, column]; filled only where ``mask_format`` is ``pixels``.
        height, width: of the image, as text, as published; empty until there are masks.
        masks: in the last chunk, ``inference.answer.Mask.to_dict()`` of each, and ``png`` where asked for.
        finish: in the last chunk, what ended the answer: ``end``, ``length``, ``stop``, ``cancelled``.
        usage: in the last chunk, ``prompt_tokens`` and ``completion_tokens``.
        timing: in the last chunk, seconds by part.
        dropped_turns, notes: in the last chunk, see ``inference.answer.Answer``; what the client left out is counted.
    """

    text: str
    error_code: int = 0
    answer: str = ""
    mask: list[tuple[int, int]] = Field(default_factory=list)
    height: str = ""
    width: str = ""
    masks: list[dict[str, Any]] = Field(default_factory=list)
    finish: str | None = None
    usage: dict[str, int] | None = None
    timing: dict[str, float] | None = None
    dropped_turns: int = 0
    notes: list[str] = Field(default_factory=list)

    def encode(self) -> bytes:
        """The chunk as it goes over the wire, with its NUL."""
        return json.dumps(self.model_dump(), ensure_ascii=False, separators=(",", ":")).encode() + END_OF_CHUNK


def error_chunk(code: ErrorCode, sentence: str) -> Chunk:
    """A chunk that ends a stream because of an error."""
    return Chunk(text=sentence, error_code=int(code))


class ChunkReader:
    """Bytes as they arrive → chunks.

    Args:
        max_bytes: a chunk may have; a stream that never ends one must not fill the memory.
    """

    def __init__(self, max_bytes: int = 256 * 2**20) -> None:
        self.max_bytes = max_bytes
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[Chunk]:
        """Chunks that are complete with these bytes.

        Raises:
            ValueError: a chunk is no JSON object of ours, or too long.
        """
        self._rest += data
        while (end := self._rest.find(END_OF_CHUNK)) >= 0:
            piece = bytes(self._rest[:end])
            del self._rest[: end + 1]
            if piece.strip():
                yield Chunk.model_validate_json(piece)
        if len(self._rest) > self.max_bytes:
            raise ValueError(f"a chunk is longer than {self.max_bytes} bytes")
