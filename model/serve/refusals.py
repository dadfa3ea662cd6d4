"""Errors as answers over HTTP: one shape for whatever goes wrong, always with a sentence.

``{"error": sentence, "error_code": n}``; under ``/v1/`` the object that clients of OpenAI's API read.
"""

from __future__ import annotations

import json
import logging
import math
import re
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import Scope, Send

from model.errors import MedPLIBError
from model.serve.protocol import ErrorCode

_log = logging.getLogger(__name__)
_FOR_OPERATORS = re.compile(r"(?<!\w)--[a-z]|pip install|python -m|MEDPLIB_[A-Z]")
_OPERATORS_ROUTES = ("/register_worker", "/receive_heart_beat", "/drain_worker")
_OTHER_APIS = ("/completions", "/responses", "/messages", "/embeddings", "/models")
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
    """

    def __init__(
        self, code: ErrorCode, sentence: str, retry_after: float | None = None, status: int | None = None
    ) -> None:
        super().__init__(sentence)
        self.code, self.sentence, self.retry_after = code, sentence, retry_after
        self.status = status or code.http_status

    @property
    def headers(self) -> dict[str, str]:
        """Headers that the answer carries."""
        headers = {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


class ErrorAnswer(BaseModel):
    """What the body of an error looks like."""

    error: str
    error_code: ErrorCode


ERROR_ANSWERS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorAnswer}, "5XX": {"model": ErrorAnswer}}
"""For the ``responses`` of routes outside ``/v1/``."""


def error_body(path: str, sentence: str, code: ErrorCode, status: int) -> dict[str, Any]:
    """The JSON object that tells an error to who asked at ``path``."""
    if not path.startswith("/v1/"):
        return {"error": sentence, "error_code": int(code)}
    kind = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    other = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": sentence, "type": kind.get(status, other), "param": None, "code": code.name.lower()}}


def sentence_of(body: bytes) -> str:
    """The sentence of another server's error; empty where there is none."""
    try:
        said = json.loads(body)
    except ValueError:
        return ""
    error = said.get("error") if isinstance(said, dict) else None
    return error[:2000] if isinstance(error, str) else ""


async def send_refusal(refusal: Refusal, scope: Scope, send: Send) -> None:
    """Answer a request; what its client still sends is thrown away by the server, so that it comes to read this."""
    body = error_body(scope["path"], refusal.sentence, refusal.code, refusal.status)
    close = {"Connection": "close"} if refusal.code == ErrorCode.TIMEOUT else {}
    response = JSONResponse(body, refusal.status, {**refusal.headers, **close})
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body})


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
    """Have an application tell every error in the one shape."""

    def tell(request: Request, refusal: Refusal) -> JSONResponse:
        body = error_body(request.url.path, refusal.sentence, refusal.code, refusal.status)
        return JSONResponse(body, refusal.status, refusal.headers)

    async def refused(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, Refusal)
        return tell(request, error)

    async def wrong_input(request: Request, error: Exception) -> JSONResponse:
        sentence = str(error) if request.url.path in _OPERATORS_ROUTES else client_sentence(error)
        return tell(request, Refusal(ErrorCode.BAD_INPUT, sentence))

    async def malformed(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return tell(request, Refusal(ErrorCode.BAD_INPUT, validation_sentence(error)))

    async def no_route(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        path = request.url.path[:100]
        sentence = f"{request.method} {path}: {error.detail}"
        if error.status_code == 404 and path.endswith(_OTHER_APIS):
            sentence = f"there is no {path} here; questions go to POST /v1/chat/completions of the controller"
        answer = tell(request, Refusal(ErrorCode.BAD_INPUT, sentence, status=error.status_code))
        answer.headers.update(error.headers or {})
        return answer

    async def broken(request: Request, _: Exception) -> JSONResponse:
        return tell(request, Refusal(ErrorCode.FAILED, MACHINE_FAULT))

    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(MedPLIBError, wrong_input)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(HTTPException, no_route)
    app.add_exception_handler(Exception, broken)
