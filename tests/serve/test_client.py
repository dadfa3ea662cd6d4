"""The client of a controller: chunks as they come, connections that close for good, faults as sentences."""

from __future__ import annotations

import socket
import threading

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse

from model.errors import MedPLIBError
from model.serve.client import AnswerFailed, ControllerClient
from model.serve.protocol import Chunk, ErrorCode, GenerateRequest, error_chunk
from tests.serve.scripted import ScriptedController, fail, say, say_for_ever, say_nothing

PATIENCE = 30  # seconds after which a test fails rather than waits
ASKED = GenerateRequest(model="nano", prompt="USER: What is it? ASSISTANT:")


def test_models_are_listed_and_refreshed(serving):
    controller = ScriptedController(models=("seven", "nano"))
    with serving(controller.app) as address:
        client = ControllerClient(address + "/")
        client.refresh()
        assert client.models() == ["nano", "seven"] and controller.refreshed == 1


def test_an_answer_streams_and_its_last_chunk_holds_the_masks(serving):
    mask = {"label": "disc", "rle": {"size": [1, 1], "counts": "01"}, "score": 0.9, "bbox": [0, 0, 1, 1], "area_px": 1}
    controller = ScriptedController(say("The disc is <SEG>.", (mask,)))
    with serving(controller.app) as address:
        chunks = list(ControllerClient(address).stream(ASKED))
    assert [chunk.answer for chunk in chunks][:2] == ["The", "The disc"]
    assert chunks[-1].masks == [mask] and chunks[-1].finish == "end"
    assert controller.requests == [ASKED]


def test_closing_the_iterator_closes_the_connection(serving, wait_until):
    controller = ScriptedController(say_for_ever)
    with serving(controller.app) as address:
        stream = ControllerClient(address).stream(ASKED)
        assert next(stream).answer
        stream.close()
        assert list(stream) == []
        wait_until(lambda: controller.left, what="the notice")


@pytest.mark.parametrize("script", [say_for_ever, say_nothing])
def test_another_thread_can_close_it_while_it_is_waited_on(script, serving, wait_until):
    controller = ScriptedController(script)
    with serving(controller.app) as address:
        stream = ControllerClient(address).stream(ASKED)
        reader = threading.Thread(target=lambda: list(stream))
        reader.start()
        wait_until(lambda: controller.requests, what="the request")
        stream.close()
        reader.join(PATIENCE)
        assert not reader.is_alive()
        wait_until(lambda: controller.left, what="the notice")


def test_a_stream_closed_before_it_began_asks_nothing(serving):
    controller = ScriptedController()
    with serving(controller.app) as address:
        stream = ControllerClient(address).stream(ASKED)
        stream.close()
        assert list(stream) == [] and controller.requests == []


@pytest.mark.parametrize("code", [ErrorCode.BUSY, ErrorCode.NO_WORKER, ErrorCode.FAILED])
def test_an_error_chunk_is_raised_with_its_code(code, serving):
    controller = ScriptedController(fail(Chunk(text="", answer="The"), error_chunk(code, "the worker is gone")))
    with serving(controller.app) as address:
        stream = ControllerClient(address).stream(ASKED)
        assert next(stream).answer == "The"
        with pytest.raises(AnswerFailed, match="the worker is gone") as told:
            next(stream)
    assert told.value.code is code


@pytest.mark.parametrize(
    ("script", "sentence"),
    [(fail(), "before it began"), (fail(b"<html>\0"), "not available"), (fail(b'{"no": 1}\0'), "not available")],
)
def test_streams_that_are_none(script, sentence, serving):
    controller = ScriptedController(script)
    with serving(controller.app) as address, pytest.raises(AnswerFailed, match=sentence):
        list(ControllerClient(address).stream(ASKED))


def test_a_stream_that_breaks_off_says_so():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def half_an_answer() -> None:
            connection, _ = listener.accept()
            connection.recv(65536)
            body = Chunk(text="", answer="The").encode()
            connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(body), body))
            connection.close()

        server = threading.Thread(target=half_an_answer)
        server.start()
        stream = ControllerClient(f"http://127.0.0.1:{listener.getsockname()[1]}").stream(ASKED)
        assert next(stream).answer == "The"
        with pytest.raises(AnswerFailed, match="broke"):
            next(stream)
        server.join(PATIENCE)


def test_a_controller_that_is_silent_is_given_up(serving):
    controller = ScriptedController(say_nothing)
    with serving(controller.app) as address, pytest.raises(AnswerFailed, match="took too long") as told:
        list(ControllerClient(address, silence=0.2).stream(ASKED))
    assert told.value.code is ErrorCode.TIMEOUT


def test_nobody_there(caplog):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    client = ControllerClient(address)
    for ask in (client.models, lambda: list(client.stream(ASKED))):
        with pytest.raises(AnswerFailed, match="not available at the moment") as told:
            ask()
        assert address not in str(told.value) and f"nothing answers at {address}" in caplog.text  # for the operator
        caplog.clear()


def test_a_key_is_sent_and_its_want_is_logged(serving, caplog):
    controller = ScriptedController(key="secret")
    with serving(controller.app) as address:
        assert ControllerClient(address, api_key="secret").models() == ["nano"]
        for key, logged in ((None, "asks for a key; give --client-key"), ("other", "does not take this program's key")):
            with pytest.raises(AnswerFailed, match="not available at the moment"):
                ControllerClient(address, api_key=key).models()
            assert logged in caplog.text


def test_statuses_before_the_stream_keep_the_sentence(serving):
    app = FastAPI()
    app.post("/worker_generate_stream")(lambda: JSONResponse({"error": "the worker is busy"}, 429))
    app.post("/list_models")(lambda: PlainTextResponse("what?", 418))
    with serving(app) as address:
        with pytest.raises(AnswerFailed, match="the worker is busy") as told:
            list(ControllerClient(address).stream(ASKED))
        assert told.value.code is ErrorCode.BUSY
        with pytest.raises(AnswerFailed, match="not available at the moment"):
            ControllerClient(address).models()


@pytest.mark.parametrize(
    "address", ["localhost:64000", "ftp://localhost", "http://", "file:///etc/passwd", "http://a b:x"]
)
def test_addresses_that_are_none(address):
    with pytest.raises(MedPLIBError, match="no address"):
        ControllerClient(address)
