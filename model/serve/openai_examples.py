"""What the schema of the OpenAI-compatible API shows: requests, events and errors, by example."""

from __future__ import annotations

from typing import Any

from fastapi.openapi.models import Example

from model.serve.openai_schema import ChatChunk, ErrorAnswer

_IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo…"}}


def _question(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [_IMAGE, {"type": "text", "text": text}]}]


ASKING: dict[str, Example] = {
    "question": {
        "summary": "A question about an image",
        "value": {"model": "medplib-nano", "messages": _question("What kind of medical image is this?")},
    },
    "region": {
        "summary": "A question about a region, boxed in pixels",
        "value": {
            "model": "medplib-nano",
            "messages": _question("What is in the region?"),
            "medplib": {"regions": [{"box": [66, 81, 124, 125]}]},
        },
    },
    "mask": {
        "summary": "A mask, streamed, as PNG too",
        "value": {
            "model": "medplib-nano",
            "messages": _question("Please segment the optic disc."),
            "stream": True,
            "medplib": {"mask_png": True, "threshold": 0.5},
        },
    },
}

_EVENT = (
    'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"medplib-nano","choices":'
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


def _refusal(what: str, kind: str, code: str, message: str, **more: Any) -> dict[str, Any]:
    example = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return {"model": ErrorAnswer, "description": what, "content": {"application/json": {"example": example}}, **more}


_RETRY_AFTER = {"headers": {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}}}}
_WRONG, _BROKEN = "invalid_request_error", "server_error"

ERRORS: dict[int | str, dict[str, Any]] = {
    400: _refusal(
        "The request is malformed, or asks for what there is not",
        _WRONG,
        "bad_input",
        "the question is empty; put a text part into the last message",
    ),
    401: _refusal(
        "The client key is missing or wrong",
        "authentication_error",
        "bad_input",
        "the client key is missing or wrong; send it as Authorization: Bearer KEY",
    ),
    404: _refusal(
        "There is no such model",
        "not_found_error",
        "model_not_found",
        "there is no model 'x' here; known: medplib-nano",
    ),
    "default": _refusal(
        "Anything else: 413 a body or image too large, 429 too busy and 503 no worker (both with `Retry-After`), "
        "504 out of time, 500 and 502 a fault of this machine",
        _BROKEN,
        "no_worker",
        "no model is available at the moment; ask again later",
        **_RETRY_AFTER,
    ),
}
