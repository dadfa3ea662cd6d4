"""HTTP error replies: one JSON form with a sentence for every error.

``{"error": sentence, "error_code": n}``; under ``/v1/`` the object that clients of OpenAI's API read.
"""

from __future__ import annotations

import json
import logging
import math
import re
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from model.errors import MedPLIBError
from model.serve.protocol import ErrorCode

_log = logging.getLogger(__name__)
_FOR_OPERATORS = re.compile(r"(?<!\w)--[a-z]|pip install|python -m|MEDPLIB_[A-Z]")
_OPERATORS_ROUTES = ("/register_worker", "/receive_heart_beat", "/drain_worker")
_OTHER_APIS = ("/completions", "/responses", "/messages", "/embeddings", "/models")
_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_CLIENT_LEFT = 499  # nobody reads it; it is what logs call it
MACHINE_FAULT = "this server failed on the request; ask again"


def client_sentence(error: object) -> str:
    """An error for those who ask: without the clauses that name flags, packages or variables, which are logged."""
    sentence = str(error)
    if not _FOR_OPERATORS.search(sentence):
        return sentence
    _log.warning("%s", sentence)
    return "; ".join(part for part in sentence.split("; ") if not _FOR_OPERATORS.search(part)) or MACHINE_FAULT


class Refusal(Exception):
    """Why there is no answer.

    Args:
        code: whose fault it is.
        sentence: what went wrong, for people.
        retry_after: seconds after which asking again may help.
        status: HTTP status where it is not the code's own.
        param: field of the request that it is about, for OpenAI's clients.
        name: what they read as the code where it is not the code's own name.
    """

    def __init__(
        self,
        code: ErrorCode,
        sentence: str,
        retry_after: float | None = None,
        status: int | None = None,
        param: str | None = None,
        name: str = "",
    ) -> None:
        super().__init__(sentence)
        self.code, self.sentence, self.retry_after, self.param = code, sentence, retry_after, param
        self.status, self.name = status or code.http_status, name or code.name.lower()

    def body(self, path: str) -> dict[str, Any]:
        """The JSON body of an error reply to a request for ``path``."""
        if not path.startswith("/v1/"):
            return {"error": self.sentence, "error_code": int(self.code)}
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.sentence, "type": kind, "param": self.param, "code": self.name}}

    def response(self, path: str) -> JSONResponse:
        """The whole answer to who asked at ``path``."""
        headers = {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        elif self.status == 408:  # what its client still sends is not waited for
            headers["Connection"] = "close"
        return JSONResponse(self.body(path), self.status, headers)


class ErrorAnswer(BaseModel):
    """What the body of an error looks like."""

    error: str
    error_code: ErrorCode


ERROR_ANSWERS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorAnswer}, "5XX": {"model": ErrorAnswer}}
"""For the ``responses`` of routes outside ``/v1/``."""


def sentence_of(body: bytes) -> str:
    """The sentence of another server's error; empty where there is none."""
    try:
        said = json.loads(body)
    except ValueError:
        return ""
    error = said.get("error") if isinstance(said, dict) else None
    if isinstance(error, dict):  # as OpenAI's API nests it
        error = error.get("message")
    return error[:2000] if isinstance(error, str) else ""


def validation_sentence(error: RequestValidationError) -> str:
    """What is wrong with a request's first malformed field; never what was in it."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    if first["type"] == "json_invalid":
        return "the request's body is no valid JSON; send an object of this route's fields"
    if not where:
        return "the request's body is missing or no JSON object; send one with Content-Type application/json"
    return f"the request's field {where} is malformed: {first['msg']}"


def answer_errors(app: FastAPI) -> None:
    """Make an application answer every error in the same form."""

    async def reply(request: Request, error: Exception) -> Response:
        path = request.scope["path"]
        match error:
            case ClientDisconnect():
                return Response(status_code=_CLIENT_LEFT)
            case Refusal():
                refusal = error
            case MedPLIBError():
                sentence = str(error) if path in _OPERATORS_ROUTES else client_sentence(error)
                refusal = Refusal(ErrorCode.BAD_INPUT, sentence)
            case RequestValidationError():
                refusal = Refusal(ErrorCode.BAD_INPUT, validation_sentence(error))
            case HTTPException():
                sentence = f"{request.method} {path[:100]}: {error.detail}"
                if error.status_code == 404 and path[:100].endswith(_OTHER_APIS):
                    sentence = (
                        f"there is no {path[:100]} here; questions go to POST /v1/chat/completions of the controller"
                    )
                refusal = Refusal(ErrorCode.BAD_INPUT, sentence, status=error.status_code)
            case _:
                refusal = Refusal(ErrorCode.FAILED, MACHINE_FAULT)
        response = refusal.response(path)
        if isinstance(error, HTTPException) and error.headers:
            response.headers.update(error.headers)
        return response

    for kind in (ClientDisconnect, Refusal, MedPLIBError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, reply)
