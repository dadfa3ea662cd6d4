"""A controller as its clients see it: models, and an answer as it streams in.

Whatever goes wrong is one sentence for the visitor of a page; addresses and what the operator has to do are logged.

>>> client = ControllerClient("http://localhost:64000")
>>> with client.stream(GenerateRequest(model=client.models()[0], prompt=prompt, images=[picture])) as answer:
...     for chunk in answer:
...         show(chunk.answer)
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Generator, Iterator
from typing import Any
from urllib.parse import quote

import httpx

from model.errors import MedPLIBError
from model.serve.auth import bearer
from model.serve.errors import sentence_of
from model.serve.protocol import Chunk, ChunkReader, ErrorCode, GenerateRequest

_log = logging.getLogger(__name__)
CONNECT_SECONDS = 5.0
ASK_SECONDS = 20.0
SILENCE_SECONDS = 300.0
"""An answer that sends nothing for so long is given up; workers have shorter limits of their own."""


class AnswerFailed(MedPLIBError):
    """There is no answer, or it broke off; ``code`` says whose fault that is."""

    def __init__(self, sentence: str, code: ErrorCode = ErrorCode.FAILED) -> None:
        super().__init__(sentence)
        self.code = code


class ControllerClient:
    """What a controller can be asked; safe to use from many threads.

    Args:
        address: ``http(s)://host:port``.
        api_key: the controller's client key, where it has one.
        silence: seconds without a word after which an answer is given up.

    Raises:
        MedPLIBError: the address is none.
    """

    def __init__(self, address: str, api_key: str | None = None, silence: float = SILENCE_SECONDS) -> None:
        try:
            url = httpx.URL(address)
        except httpx.InvalidURL as error:
            raise MedPLIBError(f"{address!r:.80} is no address; give http://host:port") from error
        if url.scheme not in ("http", "https") or not url.host:
            raise MedPLIBError(f"{address!r:.80} is no address of a controller; give http://host:port")
        self.address = address.rstrip("/")
        self.silence = silence
        self.mask_thresholds: dict[str, float] = {}  # of models, where they were listed with one
        self._headers = bearer(api_key)

    def models(self) -> list[str]:
        """Names of the models that workers answer for, sorted."""
        listed = self._ask("/list_models")
        names, thresholds = listed.get("models"), listed.get("mask_thresholds")
        if isinstance(thresholds, dict):
            self.mask_thresholds = {name: own for name, own in thresholds.items() if isinstance(own, float)}
        if not isinstance(names, list):
            raise _unavailable(f"what answers at {self.address} is no controller: it lists no models")
        return sorted(str(name) for name in names)

    def conversation_turns(self, model: str) -> int:
        """Questions of a conversation that a model was trained on; 1 where nobody says."""
        card = self._ask(f"/v1/models/{quote(model)}", "GET").get("medplib")
        turns = card.get("conversation_turns") if isinstance(card, dict) else None
        return turns if isinstance(turns, int) else 1

    def refresh(self) -> None:
        """Have the controller ask all workers anew what they can do."""
        self._ask("/refresh_all_workers")

    def stream(self, request: GenerateRequest) -> AnswerStream:
        """Ask; the answer comes chunk by chunk. Nothing is sent before the first chunk is drawn."""
        return AnswerStream(f"{self.address}/worker_generate_stream", self._headers, request, self.silence)

    def _ask(self, route: str, method: str = "POST") -> dict[str, Any]:
        with told_errors(self.address), _connection(self._headers, ASK_SECONDS) as client:
            response = client.request(method, self.address + route, json={} if method == "POST" else None)
            check_status(response, self.address)
            content = response.json() if response.content else {}
        return content if isinstance(content, dict) else {}


class AnswerStream(Iterator[Chunk]):
    """Chunks of one answer, on a connection of their own.

    ``close`` may be called from any thread at any time: the connection is closed, so the generator of the answer
    learns that nobody waits for it, and the iteration ends.
    """

    def __init__(self, address: str, headers: dict[str, str], request: GenerateRequest, silence: float) -> None:
        self.closed = False
        self._lock = threading.Lock()
        self._network: Any = None
        self._chunks = self._receive(address, headers, request, silence)

    def __iter__(self) -> AnswerStream:
        return self

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection and end the iteration."""
        with self._lock:
            self.closed = True
            _shut(self._network)
        with contextlib.suppress(ValueError):  # it runs in another thread, which the closed connection ends
            self._chunks.close()

    def _receive(
        self, address: str, headers: dict[str, str], request: GenerateRequest, silence: float
    ) -> Generator[Chunk, None, None]:
        if self.closed:
            return
        body = request.model_dump(exclude_none=True)
        reader, received = ChunkReader(), False
        try:
            with told_errors(address), _connection(headers, silence) as client:
                watched = client.stream("POST", address, json=body, extensions={"trace": self._watch})
                with watched as response:
                    check_status(response, address)
                    for data in response.iter_raw():
                        for chunk in reader.feed(data):
                            received = True
                            if chunk.error_code:
                                raise AnswerFailed(chunk.text, ErrorCode(chunk.error_code))
                            yield chunk
        except (MedPLIBError, httpx.HTTPError):
            if self.closed:
                return
            raise
        if not received and not self.closed:
            raise AnswerFailed("the answer ended before it began; ask again")

    def _watch(self, event: str, info: dict[str, Any]) -> None:
        """Take note of the connection, so that it can be closed while it is waited on."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            with self._lock:
                self._network = info["return_value"]
                if self.closed:
                    _shut(self._network)


def check_status(response: httpx.Response, address: str) -> None:
    """Nothing for a good status.

    Raises:
        AnswerFailed: with the server's own sentence where it has one.
    """
    if response.is_success:
        return
    sentence = sentence_of(response.read())
    if response.status_code == httpx.codes.UNAUTHORIZED:
        wrong = "does not take this program's key" if "Authorization" in response.request.headers else "asks for a key"
        raise _unavailable(f"{address} {wrong}; give --client-key or set MEDPLIB_CLIENT_KEY")
    if not sentence or response.status_code == httpx.codes.FORBIDDEN:
        raise _unavailable(f"{address} answered with status {response.status_code} ({sentence or 'no sentence'})")
    code = {400: ErrorCode.BAD_INPUT, 413: ErrorCode.BAD_INPUT, 429: ErrorCode.BUSY, 504: ErrorCode.TIMEOUT}
    raise AnswerFailed(sentence, code.get(response.status_code, ErrorCode.FAILED))


def _unavailable(detail: str) -> AnswerFailed:
    """The visitor's error where the operator has to act; the detail is logged."""
    _log.warning("%s", detail)
    return AnswerFailed("the service is not available at the moment; try again in a minute")


@contextlib.contextmanager
def told_errors(address: str) -> Iterator[None]:
    """Faults of the network as sentences.

    Raises:
        AnswerFailed: in place of whatever httpx raises.
    """
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise _unavailable(f"nothing answers at {address}; start the controller, or check the address") from error
    except httpx.TimeoutException as error:
        _log.warning("%s was silent for too long", address)
        raise AnswerFailed("the answer took too long; ask again", ErrorCode.TIMEOUT) from error
    except httpx.HTTPError as error:
        _log.warning("the connection to %s broke (%s)", address, type(error).__name__)
        raise AnswerFailed("the connection to the service broke; ask again") from error
    except MedPLIBError:
        raise
    except ValueError as error:  # no JSON, or a chunk that is none
        raise _unavailable(f"what {address} sent cannot be read; is a controller there?") from error


def _connection(headers: dict[str, str], silence: float) -> httpx.Client:
    limits = httpx.Timeout(silence, connect=CONNECT_SECONDS)
    return httpx.Client(headers=headers, timeout=limits, trust_env=False, follow_redirects=False)


def _shut(network: Any) -> None:
    """End a connection for good, whichever thread waits on it."""
    raw = network.get_extra_info("socket") if network is not None else None
    if raw is not None:
        with contextlib.suppress(OSError):  # it is closed already
            raw.shutdown(socket.SHUT_RDWR)
