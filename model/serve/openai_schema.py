"""The messages of the OpenAI-compatible API: questions, answers, ``medplib``, the field we add to both, and examples.

Fields that are not named here are ignored, as clients send many, except in ``medplib``. Those that would change the
answer and are not implemented are named in ``REFUSED`` and refused with a sentence.
"""

from __future__ import annotations

from operator import not_
from typing import Annotated, Any, Literal

from fastapi.openapi.models import Example
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def _whole_characters(text: str) -> str:
    """JSON can spell half a character, which can be neither tokenised nor sent on."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError("the text holds half of a surrogate pair; send whole Unicode characters") from error
    return text


Text = Annotated[str, AfterValidator(_whole_characters)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Whole = Annotated[int, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]
Probability = Annotated[float, Field(strict=True, ge=0, le=1)]

_MAX_SEED = 2**63 - 1


class _Model(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class _Ours(BaseModel):
    """Part of our own extension, where a misspelt name is an error."""

    model_config = ConfigDict(extra="forbid")


# --- asking ---------------------------------------------------------------------------------------------------------

_ONE_OF_FOUR: dict[str, Any] = {"oneOf": [{"required": [name]} for name in ("box", "point", "rle", "mask")]}


class RunLengths(_Model):
    """COCO run-length encoding of a mask, down the columns."""

    size: list[Whole] = Field(min_length=2, max_length=2, description="height and width in pixels")
    counts: Text | list[Whole] = Field(description="run lengths, compressed as COCO does or as a list")


class Region(_Ours):
    """What is pointed at; exactly one of the four, in pixels of the image."""

    model_config = ConfigDict(json_schema_extra=_ONE_OF_FOUR)

    box: list[Number] | None = Field(default=None, min_length=4, max_length=4, description="x1, y1, x2, y2")
    point: list[Number] | None = Field(default=None, min_length=2, max_length=2, description="x, y")
    rle: RunLengths | None = None
    mask: Text | None = Field(default=None, description="data URI of a PNG of the image's size, not black inside")

    @model_validator(mode="after")
    def _exactly_one(self) -> Region:
        given = [name for name in ("box", "point", "rle", "mask") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a region is one of box, point, rle and mask; got {' and '.join(given) or 'none'}")
        return self


class AskExtension(_Ours):
    """``medplib`` in a request."""

    regions: list[Region] = Field(
        default_factory=list,
        max_length=256,
        description="regions of the last user message, after those of earlier messages that only marked their place "
        "with <region></region>",
    )
    mask_png: Flag = Field(default=False, description="send each mask as a PNG data URI too")
    threshold: Number | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="probability above which a pixel is in a mask; the checkpoint's own when absent",
    )
    no_mask_below: Probability | None = Field(
        default=None,
        description="leave a mask empty whose calibrated probability of presence is lower; needs a presence classifier",
    )


class TextPart(_Model):
    """Text of a message."""

    type: Literal["text"]
    text: Text


class ImageURL(_Model):
    """Where an image is: in the request itself."""

    url: Text = Field(description="data:…;base64,… of a PNG, JPEG, TIFF, BMP or single-frame DICOM file")


class PartExtension(_Ours):
    """``medplib`` in an image part."""

    role: Literal["image", "region"] = Field(default="image", description="region: a mask of what is pointed at")


class ImagePart(_Model):
    """The image that is asked about, or a region of it."""

    type: Literal["image_url"]
    image_url: ImageURL
    medplib: PartExtension | None = None


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class AskMessage(_Model):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="what system and developer messages say is not used: the model has one system text of its own"
    )
    content: Text | Annotated[list[Part], Field(max_length=256)] | None = None


class StreamOptions(_Model):
    """Options of a stream."""

    include_usage: Flag = Field(default=False, description="end with a chunk that counts tokens")


class ChatRequest(_Model):
    """A conversation about one image or none, ending in a question."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=(), use_attribute_docstrings=True)

    model: Text
    """One of ``/v1/models``."""
    messages: list[AskMessage] = Field(min_length=1, max_length=1024)
    """The conversation so far, as the model is to know it; the last message is the user's."""
    temperature: Number | None = Field(default=None, ge=0, le=2)
    """0, the default, is greedy."""
    top_p: Number | None = Field(default=None, gt=0, le=1)
    """Nucleus to sample from; 1 keeps all."""
    max_tokens: Whole | None = Field(default=None, ge=1)
    """Longest answer in tokens; 256 when absent."""
    max_completion_tokens: Whole | None = Field(default=None, ge=1)
    """The same under its newer name, which wins."""
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    """The answer ends before the first of these texts."""
    seed: Whole | None = Field(default=None, ge=0, le=_MAX_SEED)
    """Makes sampling repeatable."""
    stream: Flag | None = None
    """Answer in server-sent events."""
    stream_options: StreamOptions | None = None
    """Only with ``stream``."""
    medplib: AskExtension | None = None
    """Regions, and how masks come back."""
    n: Any = None
    """Only 1."""
    logprobs: Any = None
    """Only false."""
    top_logprobs: Any = None
    """Only 0."""
    tools: Any = None
    """Only empty."""
    tool_choice: Any = None
    """Only ``none`` or ``auto``."""
    functions: Any = None
    """Only empty."""
    response_format: Any = None
    """Only ``{"type": "text"}``."""
    modalities: Any = None
    """Only ``["text"]``."""
    logit_bias: Any = None
    """Only empty."""
    presence_penalty: Any = None
    """Only 0."""
    frequency_penalty: Any = None
    """Only 0."""


REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "n": ((1,), "one answer is given to a question; leave n out, or ask again with another seed"),
    "logprobs": ((False,), "log-probabilities are not told; leave logprobs out"),
    "top_logprobs": ((0,), "log-probabilities are not told; leave top_logprobs out"),
    "tools": (([],), "the model calls no tools; leave tools out"),
    "tool_choice": (("none", "auto"), "the model calls no tools; leave tool_choice out"),
    "functions": (([],), "the model calls no functions; leave functions out"),
    "response_format": (({"type": "text"},), "answers are plain text and masks; leave response_format out"),
    "modalities": ((["text"],), "answers are text and masks; leave modalities out"),
    "logit_bias": (({},), "single tokens cannot be favoured; leave logit_bias out"),
    "presence_penalty": ((0,), "repetition is not penalised; leave presence_penalty out"),
    "frequency_penalty": ((0,), "repetition is not penalised; leave frequency_penalty out"),
}
"""For each field that is not implemented, the values that ask for nothing, and what to say to the others."""


# --- answering ------------------------------------------------------------------------------------------------------


def _absent(value: Any) -> bool:
    return value is None


class AnswerMask(_Model):
    """One mask at image size."""

    label: str = Field(description="what the answer calls it; empty when it has no name")
    score: float = Field(description="the model's own estimate of the mask's IoU, 0 to 1")
    bbox: list[int] = Field(description="x1, y1, x2, y2 in pixels, right and bottom exclusive; zeros when empty")
    area_px: int
    area_mm2: float | None = Field(default=None, description="where the image knows its spacing")
    rle: RunLengths
    png: str | None = Field(default=None, description="data URI, where mask_png asked for it", exclude_if=_absent)
    presence: float | None = Field(
        default=None,
        description="calibrated probability that the target is there, where the checkpoint has a presence classifier",
        exclude_if=_absent,
    )
    warning: str = Field(
        default="", description="where it bears the name of nothing that was asked for", exclude_if=not_
    )


class AnswerExtension(_Model):
    """``medplib`` in an answer."""

    masks: list[AnswerMask] = Field(default_factory=list, description="in the order of their <SEG> in the text")
    height: int | None = Field(default=None, description="of the image, in pixels; null where there is no mask")
    width: int | None = None
    dropped_turns: int = Field(
        default=0, description="oldest questions that were left out, as not all of them fit", exclude_if=not_
    )
    notes: list[str] = Field(default_factory=list, description="what else a reader should know", exclude_if=not_)


Finish = Literal["stop", "length"]


class AnswerMessage(_Model):
    """The model's message."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None
    medplib: AnswerExtension


class Choice(_Model):
    """The one answer there is."""

    index: Literal[0] = 0
    message: AnswerMessage
    finish_reason: Finish
    logprobs: None = None


class Usage(_Model):
    """Tokens read and said; an image counts as many as it takes in the prompt."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


class ChatCompletion(_Model):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(description="seconds since 1970")
    model: str
    choices: list[Choice]
    usage: Usage


class Delta(_Model):
    """What is new in a chunk."""

    role: Literal["assistant"] | None = Field(default=None, exclude_if=_absent)
    content: str | None = Field(default=None, exclude_if=_absent)
    medplib: AnswerExtension | None = Field(default=None, exclude_if=_absent)


class ChunkChoice(_Model):
    """What is new in the one answer there is."""

    index: Literal[0] = 0
    delta: Delta
    finish_reason: Finish | None = None
    logprobs: None = None


class ChatChunk(_Model):
    """One event of a streamed answer."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class ModelExtension(_Model):
    """``medplib`` of a model."""

    conversation_turns: int = Field(
        description="questions of one conversation that the model was trained to answer; 1: send each alone"
    )


class ModelCard(_Model):
    """A model that can be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="when this server started, in seconds since 1970")
    owned_by: Literal["medplib"] = "medplib"
    medplib: ModelExtension


class ModelList(_Model):
    """Models that can be asked now."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorBody(_Model):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(_Model):
    """An error, as OpenAI's clients read it."""

    error: ErrorBody


# --- what the API's own schema shows ----------------------------------------------------------------------------------

_IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo…"}}


def _question(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [_IMAGE, {"type": "text", "text": text}]}]


ASKING: dict[str, Example] = {
    "question": {
        "summary": "A question about an image",
        "value": {"model": "medplib-mini", "messages": _question("What kind of medical image is this?")},
    },
    "region": {
        "summary": "A question about a region, boxed in pixels",
        "value": {
            "model": "medplib-mini",
            "messages": _question("What is in the region?"),
            "medplib": {"regions": [{"box": [66, 81, 124, 125]}]},
        },
    },
    "mask": {
        "summary": "A mask, streamed, as PNG too",
        "value": {
            "model": "medplib-mini",
            "messages": _question("Please segment the optic disc."),
            "stream": True,
            "medplib": {"mask_png": True, "threshold": 0.5},
        },
    },
}

_EVENT = (
    'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"medplib-mini","choices":'
    '[{"index":0,"delta":{"content":"Fundus"},"finish_reason":null,"logprobs":null}],"usage":null}\n\n'
    "data: [DONE]\n\n"
)


def _in_one_piece(schema: dict[str, Any]) -> dict[str, Any]:
    """A model's schema with the definitions put where they are referred to."""
    named = schema.pop("$defs", {})

    def resolve(node: Any) -> Any:
        if isinstance(node, list):
            return [resolve(one) for one in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return resolve(named[node["$ref"].rpartition("/")[2]])
        return {name: resolve(value) for name, value in node.items()}

    return resolve(schema)


_CHUNK, _ERROR = (_in_one_piece(model.model_json_schema(mode="serialization")) for model in (ChatChunk, ErrorAnswer))
_DATA = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": [_CHUNK, _ERROR]}}
STREAMED: dict[str, Any] = {
    "description": "The answer; with `stream`, in server-sent events",
    "content": {
        "text/event-stream": {
            "itemSchema": {
                "type": "object",
                "required": ["data"],
                "properties": {"data": {"anyOf": [{"const": "[DONE]"}, _DATA]}},
            },
            "example": _EVENT,
        }
    },
}


def _refusal(what: str, kind: str, code: str, message: str) -> dict[str, Any]:
    example = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return {"model": ErrorAnswer, "description": what, "content": {"application/json": {"example": example}}}


_KEY = "the client key is missing or wrong; send it as Authorization: Bearer KEY"
_LATER = "no model is available at the moment; ask again later"
_OTHERS = (
    "Anything else: 413 a body or image too large, 429 too busy and 503 no worker (both with `Retry-After`), "
    "504 out of time, 500 and 502 a fault of this machine"
)
_WRONG, _EMPTY = "invalid_request_error", "the question is empty; put a text part into the last message"
_UNKNOWN = "there is no model 'x' here; known: medplib-mini"

ERRORS: dict[int | str, dict[str, Any]] = {
    400: _refusal("The request is malformed, or asks for what there is not", _WRONG, "bad_input", _EMPTY),
    401: _refusal("The client key is missing or wrong", "authentication_error", "bad_input", _KEY),
    404: _refusal("There is no such model", "not_found_error", "model_not_found", _UNKNOWN),
    "default": _refusal(_OTHERS, "server_error", "no_worker", _LATER)
    | {"headers": {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}}}},
}
