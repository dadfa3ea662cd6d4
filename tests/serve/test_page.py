"""What the page does, without a browser: its actions, what it remembers, what it lets through."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom.data
import pytest
from PIL import Image

from model.errors import MedPLIBError
from model.inference.answer import Mask
from model.processing.masks import decode_rle
from model.serve.client import ControllerClient
from model.serve.limits import ServeLimits
from model.serve.protocol import Chunk, ErrorCode, error_chunk
from model.serve.web import view
from model.serve.web.chat import Parameters
from model.serve.web.gate import Tray
from model.serve.web.handlers import Handlers, VoteLog
from model.serve.web.state import Session, Sessions
from model.serve.web.view import find_examples
from tests.serve.scripted import ScriptedController, fail, say, say_for_ever

GREEDY = Parameters()


def png(height: int = 40, width: int = 60) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)).save(content, "PNG")
    return content.getvalue()


def disc(height: int = 40, width: int = 60) -> dict[str, Any]:
    rows, columns = np.ogrid[:height, :width]
    return Mask.from_array((rows - 20) ** 2 + (columns - 30) ** 2 < 100, "disc", 0.9).to_dict()


class Visit:
    """A visitor of a page whose controller follows a script."""

    def __init__(self, address: str, votes: VoteLog | None = None, limits: ServeLimits | None = None) -> None:
        limits = limits or ServeLimits()
        self.desk = Handlers(ControllerClient(address), votes or VoteLog(None), Tray(limits.max_image_bytes), limits)
        self.session = Session()

    def open(self, content: bytes, name: str = "scan.png") -> None:
        self.desk.open_upload(self.session, {"name": name, "size": len(content), "token": self.desk.tray.put(content)})

    def ask(self, question: str, parameters: Parameters = GREEDY) -> list[frozenset[str]]:
        return list(self.desk.ask(self.session, question, "nano", parameters))

    def box(self, *corners: list[float]) -> None:
        self.desk.mark(self.session, {"kind": "box", "points": list(corners)})

    @property
    def last(self) -> Any:
        return self.session.exchanges[-1]


@pytest.fixture
def controller() -> ScriptedController:
    return ScriptedController(say("The disc is <SEG>.", (disc(),)))


@pytest.fixture
def visit(controller: ScriptedController, serving: Any) -> Iterator[Visit]:
    with serving(controller.app) as address:
        yield Visit(address)


# --- asking -----------------------------------------------------------------------------------------------------------


def test_a_question_is_sent_with_the_pixels_alone_and_its_masks_come_back(visit, controller):
    visit.open(png())
    visit.ask("Please segment the disc.", Parameters(0.5, 0.9, 64, 0.3, "7"))
    (request,) = controller.requests
    assert request.prompt.endswith("USER: <im_start><image><im_end>\nPlease segment the disc. ASSISTANT:")
    assert (request.temperature, request.top_p, request.max_new_tokens) == (0.5, 0.9, 64)
    assert (request.threshold, request.seed, request.model) == (0.3, 7, "nano")
    sent = np.asarray(Image.open(io.BytesIO(base64.b64decode(request.images[0]))))
    assert np.array_equal(sent, np.asarray(Image.open(io.BytesIO(png()))))
    assert visit.last.state == "done" and [mask.label for mask in visit.last.masks] == ["disc"]
    (row,) = view.masks(visit.session)["rows"]
    assert (row["label"], row["score"], row["shown"]) == ("disc", "0.90", True)
    parts = view.talk(visit.session)["messages"][1]["parts"]
    assert parts[0] == {"text": "The disc is "} and parts[1]["mask"] == 1 and parts[2] == {"text": "."}


def test_regions_are_sent_as_run_lengths_and_stay_with_their_question(visit, controller):
    visit.open(png())
    visit.box([10, 5], [30, 25])
    visit.desk.mark(visit.session, {"kind": "point", "points": [[50, 30]]})
    visit.ask("What is in the region?")
    visit.ask("And now?", Parameters(remember=True))
    first, second = controller.requests
    assert "What is in the region <region></region>, <region></region>?" in first.prompt
    assert decode_rle(first.region_masks[0]).sum() == 400 and decode_rle(first.region_masks[1])[30, 50]
    assert second.region_masks == first.region_masks and second.prompt.count("<region></region>") == 2
    assert second.prompt.endswith("The disc is <SEG>.</s>USER: And now? ASSISTANT:")
    assert view.viewer(visit.session, True)["marks"] == []


def test_marks_can_be_taken_back(visit):
    visit.open(png())
    for corner in (10, 20, 30):
        visit.box([0, 0], [corner, corner])
    visit.desk.unmark(visit.session, False)
    assert [mark["points"][1] for mark in view.viewer(visit.session, True)["marks"]] == [[10, 10], [20, 20]]
    visit.desk.unmark(visit.session, True)
    assert view.viewer(visit.session, True)["marks"] == []


def test_regenerating_takes_the_answer_back(visit, controller):
    visit.open(png())
    visit.box([10, 5], [30, 25])
    visit.ask("What is it?")
    visit.ask("And this?")
    list(visit.desk.ask_again(visit.session, "nano", GREEDY))
    assert len(visit.session.exchanges) == 2
    assert controller.requests[2] == controller.requests[1]


@pytest.mark.parametrize("seed", ["-1", "1.5", "seven", "²", "9" * 20])
def test_a_seed_that_is_none_is_told(seed, visit, controller):
    visit.open(png())
    visit.ask("What is it?", Parameters(seed=seed))
    assert "the seed is" in visit.last.error and controller.requests == []


def test_no_model_chosen_takes_the_first_that_is_served(visit, controller):
    visit.open(png())
    list(visit.desk.ask(visit.session, "What is it?", "", GREEDY))
    assert controller.requests[0].model == "nano"
    controller.models = []
    list(visit.desk.ask(visit.session, "What is it?", "", GREEDY))
    assert "no model is available" in visit.last.error


def test_a_long_conversation_loses_its_oldest_questions_and_says_so(visit, controller):
    visit.open(png())
    for number in range(40):
        visit.ask(f"Question {number}?", Parameters(remember=True))
    request = controller.requests[-1]
    assert request.dropped_turns == 8 and request.prompt.count("USER:") == 32 and "Question 8?" in request.prompt
    controller.script = fail(Chunk(text="", answer="", finish="end", dropped_turns=8))
    visit.ask("And now?", Parameters(remember=True))
    message = view.talk(visit.session)["messages"][-1]
    assert message["parts"] == [{"text": "(empty answer)"}] and "8 oldest questions were left out" in message["note"]


def test_a_warning_stands_beside_its_mask(visit, controller):
    visit.open(png())
    controller.script = say("The disc is <SEG>.", ({**disc(), "warning": "asked for dragon, the answer names disc"},))
    visit.ask("Segment the dragon.")
    assert controller.requests[-1].every_target
    assert view.masks(visit.session)["rows"][0]["warning"] == "asked for dragon, the answer names disc"
    assert view.talk(visit.session)["messages"][-1]["note"] == "Asked for dragon, the answer names disc."


def test_each_question_stands_alone_unless_the_visitor_wants_otherwise(visit, controller):
    visit.open(png())
    visit.box([10, 5], [30, 25])
    visit.ask("What is it?")
    visit.ask("And this?")
    assert "What is it" not in controller.requests[1].prompt and controller.requests[1].region_masks == []


def test_clearing_forgets_the_conversation_and_keeps_the_picture(visit, controller):
    visit.open(png())
    visit.ask("What is it?")
    visit.desk.forget(visit.session)
    assert view.masks(visit.session)["rows"] == [] and view.talk(visit.session)["messages"] == []
    visit.ask("And this?")
    assert "What is it?" not in controller.requests[-1].prompt


def test_another_picture_begins_another_conversation(visit):
    visit.open(png())
    visit.ask("What is it?")
    visit.open(png(50, 50))
    assert visit.session.exchanges == [] and view.masks(visit.session)["rows"] == []


def test_stop_closes_the_connection(visit, controller, wait_until):
    controller.script = say_for_ever
    visit.open(png())
    asking = threading.Thread(target=visit.ask, args=("What is it?",))
    asking.start()
    wait_until(lambda: visit.session.exchanges and visit.last.answer, what="the answer")
    visit.ask("Another?")
    assert "still on its way" in visit.session.notice
    visit.desk.stop(visit.session)
    asking.join(30)
    wait_until(lambda: controller.left == 1, what="the notice")
    assert visit.last.state == "stopped" and view.talk(visit.session)["messages"][1]["note"] == "Stopped."
    assert not view.talk(visit.session)["busy"]


@pytest.mark.parametrize("leave", ["tab", "picture", "clear", "generator"])
def test_leaving_closes_the_connection_too(leave, visit, controller, wait_until):
    controller.script = say_for_ever
    sessions = Sessions()
    visit.session = sessions.of("tab")
    visit.open(png())
    answering = visit.desk.ask(visit.session, "What is it?", "nano", GREEDY)
    while not (visit.session.exchanges and visit.last.answer):
        next(answering)
    if leave == "tab":
        sessions.leave("tab")
    elif leave == "picture":
        visit.open(png(50, 50))
    elif leave == "clear":
        visit.desk.forget(visit.session)
    answering.close()  # type: ignore[attr-defined]
    wait_until(lambda: controller.left == 1, what="the notice")


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        (fail(error_chunk(ErrorCode.BUSY, "all workers are busy; ask again in 2 s")), "all workers are busy"),
        (fail(Chunk(text="", answer="The"), error_chunk(ErrorCode.FAILED, "the worker is gone")), "the worker is gone"),
        (fail(), "ended before it began"),
        (fail(Chunk(text="", answer="x", masks=[{"label": "no mask"}])), "malformed mask"),
        (fail(Chunk(text="", answer="x", masks=[disc(30, 30)])), "not of the image's size"),
    ],
)
def test_a_failed_answer_is_a_sentence_and_can_be_tried_again(script, sentence, visit, controller):
    good, controller.script = controller.script, script
    visit.open(png())
    visit.ask("What is it?")
    message = view.talk(visit.session)["messages"][1]
    assert sentence in message["error"].lower() and message["again"]
    controller.script = good
    list(visit.desk.ask_again(visit.session, "nano", GREEDY))
    assert visit.last.state == "done" and "What is it?" in controller.requests[-1].prompt


def test_no_controller_is_a_sentence():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    visit = Visit(address)
    visit.open(png())
    visit.ask("What is it?")
    visit.desk.look_for_models(visit.session)
    for told in (visit.last.error, visit.session.notice):
        assert "service is not available" in told and address not in told


@pytest.mark.parametrize(
    ("content", "name", "sentence"),
    [
        (b"hello", "notes.txt", "notes.txt is not a readable image"),
        (png()[:200], "scan.png", "scan.png"),
        (b"", "scan.png", "is empty"),
        (png(200, 201), "big.png", "limit of 40,000"),
        (b"\0" * 70_000, "long.png", "larger than the limit"),
        (b"\x1f\x8b" + b"\0" * 50, "../../etc/volume.nii.gz", "volume.nii.gz"),
    ],
    ids=["text", "truncated", "empty", "pixels", "bytes", "archive"],
)
def test_a_bad_file_is_a_sentence_and_the_old_picture_stays(content, name, sentence, serving, controller):
    with serving(controller.app) as address:
        visit = Visit(address, limits=ServeLimits(max_image_bytes=200_000 if name == "big.png" else 60_000))
        visit.desk.limits = ServeLimits(max_image_bytes=200_000 if name == "big.png" else 60_000, max_pixels=40_000)
        visit.open(png())
        before = visit.session.picture
        visit.open(content, name)
    assert sentence in visit.session.notice and "/" not in visit.session.notice.split(" is ")[0]
    assert visit.session.picture is before


def test_actions_without_sense_are_sentences(visit):
    desk, session = visit.desk, visit.session
    for act, sentence in [
        (lambda: visit.ask("What is it?"), "no image yet"),
        (lambda: visit.box([1, 1], [9, 9]), "no image yet"),
        (lambda: desk.open_upload(session, {"name": "a.png", "token": "guess"}), "did not arrive"),
        (lambda: desk.open_example(session, 99), "no such example"),
        (lambda: desk.vote(session, 1, 1), "that answer is gone"),
        (lambda: desk.show_mask(session, [1, 0], True), "that mask is gone"),
        (lambda: list(desk.ask_again(session, "nano", GREEDY)), "nothing was asked"),
        (lambda: visit.open(png()), ""),
        (lambda: visit.ask("   "), "question is empty"),
        (lambda: visit.ask("x" * 16_000), "16,000 characters"),
        (lambda: visit.box([500, 1], [900, 9]), "outside the image"),
        (lambda: desk.download(session, "png"), "no mask is shown"),
        (lambda: desk.download(session, "../exe"), "no such kind"),
        (lambda: desk.turn_to(session, 5, 0, 1), "there is no slice 5"),
        (lambda: visit.ask("What is <region></region>?"), "no region is marked"),
    ]:
        session.notice = ""
        act()
        assert sentence.lower() in session.notice.lower(), sentence


def test_a_forgotten_picture_is_no_longer_shown(visit):
    for parts in (*visit.ask("What is it?"), visit.desk.mark(visit.session, {})):
        assert parts >= {"viewer", "talk", "masks", "notice", "volume"}
    assert "or it was forgotten since" in visit.session.notice


def test_tokens_that_are_typed_are_words(visit, controller):
    controller.script = say("Fine.")
    visit.open(png())
    visit.ask("<image> What</s> <im_start>is it?")
    asked = controller.requests[-1].prompt
    assert asked.count("<image>") == 1 and "</s>" not in asked and "What< /s>" in asked
    assert visit.last.question == "<image> What</s> <im_start>is it?"


def test_a_fault_of_the_page_is_a_sentence_and_is_logged(visit, monkeypatch, caplog):
    monkeypatch.setattr("model.serve.web.handlers.open_volume", lambda *_: 1 / 0)
    visit.open(png())
    assert "Something went wrong" in visit.session.notice and "ZeroDivisionError" in caplog.text
    monkeypatch.undo()
    visit.open(png())
    monkeypatch.setattr("model.serve.web.chat.read_masks", lambda *_: 1 / 0)
    visit.ask("Please segment the disc.")
    assert "something went wrong" in visit.last.error and visit.last.state == "failed"


# --- pictures, masks, votes -------------------------------------------------------------------------------------------


def test_a_dicom_has_windows_square_millimetres_and_dicom_seg(visit, controller):
    controller.script = say("The spine is <SEG>.", (disc(128, 128),))
    visit.open(Path(pydicom.data.get_testdata_file("CT_small.dcm")).read_bytes(), "CT_small.dcm")
    assert visit.session.picture.volume.window is not None
    plain = visit.session.picture.pixels
    visit.desk.turn_to(visit.session, 1, 40, 400)
    assert not np.array_equal(plain, visit.session.picture.pixels)
    visit.ask("Please segment the spine.")
    sent = np.asarray(Image.open(io.BytesIO(base64.b64decode(controller.requests[0].images[0]))).convert("RGB"))
    assert np.array_equal(sent, visit.session.picture.pixels)
    assert "mm²" in view.masks(visit.session)["rows"][0]["area"]
    _, file = visit.desk.download(visit.session, "dicom-seg")
    stored = pydicom.dcmread(io.BytesIO(base64.b64decode(file["data"])))
    assert stored.Modality == "SEG" and int(stored.pixel_array.sum()) == disc(128, 128)["area_px"]


def test_pixels_that_are_not_square_are_shown_as_the_patient_has_them(visit):
    volume = nibabel.Nifti1Image(np.zeros((40, 30, 6, 5), dtype=np.int16), np.diag([0.5, 1.0, 5.0, 1.0]))
    visit.open(volume.to_bytes(), "volume.nii")
    assert view.viewer(visit.session, True)["picture"]["label"].endswith(" · volume 1 of 5")
    assert view.viewer(visit.session, True)["picture"]["ratio"] == pytest.approx(40 * 0.5 / 30)
    visit.desk.cut(visit.session, "coronal")
    shown = view.viewer(visit.session, True)["picture"]
    assert (shown["width"], shown["height"]) == (40, 6)
    assert shown["ratio"] == pytest.approx(40 * 0.5 / (6 * 5))
    visit.open(png())
    assert view.viewer(visit.session, True)["picture"]["ratio"] == 1.5


def test_masks_can_be_hidden_and_saved(visit):
    visit.open(png())
    visit.ask("Please segment the disc.")
    visit.ask("Once more.")
    rows = view.masks(visit.session)["rows"]
    assert [row["number"] for row in rows] == [1, 2] and len({row["colour"] for row in rows}) == 2
    both = view.viewer(visit.session, True)["picture"]["src"]
    visit.desk.show_mask(visit.session, rows[0]["id"], False)
    assert view.viewer(visit.session, True)["picture"]["src"] != both
    _, file = visit.desk.download(visit.session, "rle")
    saved = json.loads(base64.b64decode(file["data"]))
    assert len(saved["masks"]) == 1 and saved["masks"][0]["rle"] == disc()["rle"]
    for kind in ("png", "overlay", "nifti"):
        assert visit.desk.download(visit.session, kind)[1]["data"]
    visit.desk.shade(visit.session, 0.0, False)
    visit.desk.show_mask(visit.session, rows[0]["id"], True)
    bare = view.viewer(visit.session, True)["picture"]["src"]
    visit.desk.forget(visit.session)
    assert view.viewer(visit.session, True)["picture"]["src"] == bare


@pytest.mark.parametrize("log_conversations", [False, True])
def test_votes_are_lines_without_texts_unless_asked_for(log_conversations, tmp_path, serving, controller):
    file = tmp_path / "votes.jsonl"
    with serving(controller.app) as address:
        visit = Visit(address, VoteLog(file, log_conversations))
        visit.open(png())
        visit.ask("Please segment Mrs Smith's disc.")
        visit.desk.vote(visit.session, visit.last.number, 1)
        visit.desk.vote(visit.session, visit.last.number, -1)
        visit.desk.vote(visit.session, visit.last.number, -1)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["vote"] for line in lines] == ["up", "down", "withdrawn"]
    assert lines[0]["model"] == "nano" and lines[0]["masks"] == 1
    assert ("Smith" in file.read_text()) is log_conversations and "scan.png" not in file.read_text()
    assert file.stat().st_mode & 0o077 == 0


def test_votes_need_a_folder(tmp_path):
    with pytest.raises(MedPLIBError, match="--votes-file"):
        VoteLog(tmp_path / "none" / "votes.jsonl")


def test_examples_come_with_questions_that_fit_them():
    examples = find_examples()
    assert [example.label for example in examples][:3] == ["CT", "MR", "X-ray"] and len(examples) == 8
    assert all("<" not in question for example in examples for question in example.questions)
    assert find_examples(Path("nowhere")) == []


# --- what is remembered -------------------------------------------------------------------------------------------


def test_visitors_are_apart_and_forgotten_in_time():
    now = [0.0]
    sessions = Sessions(capacity=2, idle_seconds=1000, clock=lambda: now[0])
    first, second = sessions.of("a"), sessions.of("b")
    first.opacity = 0.9
    assert sessions.of("a") is first and second.opacity != 0.9
    sessions.of("c")  # b was silent for longest
    assert sessions.of("a") is first and len(sessions) == 2
    sessions.leave("a")
    now[0] = 299
    assert sessions.of("a") is first
    sessions.leave("a")
    now[0] = 700
    sessions.of("c")
    assert sessions.of("a") is not first


def test_a_tab_that_is_loaded_again_has_its_session(visit):
    now = [0.0]
    sessions = Sessions(idle_seconds=1000, clock=lambda: now[0])
    visit.session, found = sessions.arrive("page 1", "tab")
    assert not found and sessions.arrive("page 2", "")[1] is False
    visit.open(png())
    visit.ask("What is it?")
    visit.last.state = "running"  # and left so
    sessions.leave("page 1")
    now[0] = 299
    assert sessions.arrive("page 3", "tab") == (visit.session, True) and visit.last.state == "stopped"
    sessions.leave("page 1")  # heard of late
    now[0] = 1200
    assert sessions.of("page 3") is visit.session
    sessions.leave("page 3")
    now[0] += 301
    sessions.sweep()
    assert len(sessions) == 0 and sessions.arrive("page 4", "tab")[1] is False


def test_the_chosen_model_stays(visit, controller):
    controller.models = ["alpha", "nano"]
    visit.desk.look_for_models(visit.session, "nano")
    assert visit.session.model == "nano" and visit.desk.models == ["alpha", "nano"]
    visit.open(png())
    list(visit.desk.ask(visit.session, "What is it?", "alpha", GREEDY))
    assert visit.session.model == "alpha"


def test_text_that_reorders_or_hides_is_shown_without_it(visit, controller):
    mask = {**disc(), "label": "\u202edisc\x1b", "warning": "asked for x, the answer names \u202edisc\x1b"}
    controller.script = say("The \u202elive\u2066 \x07disc\u200f is <SEG>.\n", (mask,))
    visit.open(png())
    visit.ask("Where?")
    (row,) = view.masks(visit.session)["rows"]
    assert visit.last.answer == "The live disc is <SEG>.\n" and row["label"] == "disc"
    assert row["warning"] == "asked for x, the answer names disc"


@pytest.mark.parametrize(
    "remedy", ["install with pip install -e '.[dicom]'; set MEDPLIB_X or give --x", "make one with python -m model.x"]
)
def test_visitors_do_not_read_what_operators_do(visit, controller, caplog, remedy):
    sentence = f"a.dcm is compressed with JPEG-LS; {remedy}"
    controller.script = fail(error_chunk(ErrorCode.BAD_INPUT, sentence))
    visit.open(png())
    visit.ask("What is it?")
    assert visit.last.error == "a.dcm is compressed with JPEG-LS" and sentence in caplog.text


def test_heavy_pictures_are_forgotten_first(visit):
    sessions = Sessions(max_bytes=30_000)
    for name in "abc":
        visit.session = sessions.of(name)
        visit.open(png())  # 40 × 60 pixels
    assert all(sessions.of(name).picture for name in "abc")
    visit.session = sessions.of("d")
    visit.open(png())
    sessions.of("e")
    assert len(sessions) == 4 and sessions.of("a").picture is None
