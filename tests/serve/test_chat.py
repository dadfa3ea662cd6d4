"""``medplib chat``, as a person and as a script use it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.cli import main
from model.processing.masks import decode_rle
from tests.conftest import ROOT
from tests.tiny import tiny_checkpoint

NANO = ROOT / "assets" / "medplib-nano"
FUNDUS = ROOT / "data" / "sample" / "images" / "fundus_00--Phantom--seed505case000004--0000.png"
DISC = ROOT / "data" / "sample" / "masks" / "fundus_00--Phantom--seed505case000004--0000--0019_000.png"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 36, 3), dtype=np.uint8)).save(tmp_path / "scan.png")
    return tmp_path / "scan.png"


@pytest.fixture
def chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> object:
    """Pipe lines into a chat: exit code, what it said, what it complained of."""

    def run(lines: list[str], *flags: object, image: Path = FUNDUS, model: Path = NANO) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        words = [str(image), "--model", str(model), "--out", str(tmp_path / "out"), *map(str, flags)]
        code = main(["chat", *words, "--max-new-tokens", "24"])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def speaks_seg(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An untrained model never says ``<SEG>``, so it is made to; everything after that is real."""
    seg = json.loads((checkpoint / "config.json").read_text())["seg_token_id"]
    monkeypatch.setattr("model.inference.schedule.choose_tokens", lambda logits, _: torch.full((len(logits),), seg))


def test_a_script_asks_about_image_region_and_mask(chat, tmp_path: Path) -> None:
    lines = ["Please segment the optic disc.", "/masks", "/clear", "What kind of medical image is this?"]
    code, said, complaints = chat(lines)
    assert (code, complaints) == (0, "")
    assert said.startswith("The optic disc is <SEG>") and said.rstrip().endswith("Fundus")
    files = [Path(name) for name in re.findall(r"wrote (.*)", said)]
    assert [file.name.removeprefix(f"{FUNDUS.stem}_1_") for file in files] == [
        "mask_1.png",
        "overlay.png",
        "masks.json",
    ]
    record = json.loads(files[2].read_text())
    assert record["question"] == "Please segment the optic disc."
    assert (decode_rle(record["masks"][0]["rle"]) == (np.asarray(Image.open(files[0])) == 255)).all()
    assert said.count(str(files[0])) == 2  # when written, and by /masks


def test_the_same_answers_as_single_questions(chat, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    question = "What is in the region?"
    assert main(["ask", str(FUNDUS), question, "--region", str(DISC), "--json", "--out", str(tmp_path / "one")]) == 0
    alone = json.loads(capsys.readouterr().out)["text"]
    assert chat([question], "--region", DISC)[1].splitlines()[0] == alone
    assert chat([f"/region {DISC}", question])[1].splitlines()[1] == alone


def test_a_later_question_knows_the_earlier_ones(
    chat, checkpoint: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is asked with the whole conversation and all its regions, until it is told to forget."""
    from model.inference.engine import Engine

    asked = []
    submit = Engine.submit
    monkeypatch.setattr(Engine, "submit", lambda self, request, on: asked.append(request) or submit(self, request, on))
    lines = ["/box 1,1,9,9", "/point 20,30", "What is in the region?", "And next to it?", "/clear", "What is it?"]
    code, *_ = chat([*lines], "--history", image=picture, model=checkpoint)
    assert code == 0
    assert [len(one.history) for one in asked] == [0, 1, 0] and [len(one.regions) for one in asked] == [2, 2, 0]
    assert asked[1].history[0][0].count("<region></region>") == 2 and asked[1].question == "And next to it?"


def test_each_question_stands_alone_unless_told_otherwise(
    chat, checkpoint: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from model.inference.engine import Engine

    asked = []
    submit = Engine.submit
    monkeypatch.setattr(Engine, "submit", lambda self, request, on: asked.append(request) or submit(self, request, on))
    lines = ["/box 1,1,9,9", "What is this?", "And?", "/history on", "And?", "/history off", "And?"]
    code, said, _ = chat(lines, image=picture, model=checkpoint)
    assert code == 0 and "Each question stands alone; the model was trained on single questions." in said
    assert [len(one.history) for one in asked] == [0, 0, 2, 0] and [len(one.regions) for one in asked] == [1, 0, 1, 0]
    file = checkpoint / "config.json"
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before) | {"conversation_turns": 4}))
    try:
        for flags, told in (([], [0, 1]), (["--no-history"], [0, 0])):
            asked.clear()
            assert chat(["What is it?", "And?"], *flags, image=picture, model=checkpoint)[0] == 0
            assert [len(one.history) for one in asked] == told
    finally:
        file.write_text(before)


def test_a_long_chat_goes_on_without_its_oldest_questions(chat) -> None:
    code, said, complaints = chat(["Is there a macula in this picture of an eye, or an exudate? " * 8] * 9, "--history")
    assert code == 0 and complaints.count("\n") == 1 and "trained on single questions" in complaints
    assert "left out: the conversation is longer than the model reads" in said


def test_words_alone_need_no_image(chat, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is a CT?\n/box 1,1,2,2\n"))
    assert main(["chat", "--max-new-tokens", "8"]) == 2  # the box alone goes wrong


@pytest.mark.usefixtures("speaks_seg")
def test_files_of_an_earlier_chat_stay(chat, checkpoint: Path, picture: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert chat(["Segment it.", "Again."], image=picture, model=checkpoint)[0] == 0
    names = sorted(path.name for path in (tmp_path / "out").glob("*_overlay.png"))
    assert names == [f"scan_{number}_overlay.png" for number in (1, 2, 3, 4)]


def test_another_image_begins_another_conversation(chat, checkpoint: Path, picture: Path, tmp_path: Path) -> None:
    Image.new("L", (20, 10), 90).save(tmp_path / "other one.png")
    lines = ["/box 30,40,36,48", f"/image {tmp_path / 'other one.png'}", "/box 30,40,36,48", "/box 1,1,5,5"]
    code, said, complaints = chat(lines, image=picture, model=checkpoint)
    assert code == 2 and "other one: 20×10 (width×height)" in said
    assert complaints.count("medplib: ") == 1 and "20×10" in complaints
    assert said.splitlines()[-1] == "The next question is about 1 region."  # that of the first image is forgotten


@pytest.mark.parametrize(
    "line",
    [
        "/nonsense",
        "/history maybe",
        "/box",
        "/box 1,2,3",
        "/box a b c d",
        "/point 99,99",
        "/region",
        "/region missing.png",
        "/image",
        "/image missing.png",
        "Where is <region></region> it?",
        "x" * 5000,
        "no text: \udcff",
    ],
)
def test_what_goes_wrong_is_one_sentence_and_the_chat_goes_on(chat, checkpoint: Path, picture: Path, line: str) -> None:
    code, said, complaints = chat([line, "", "What is it?"], image=picture, model=checkpoint)
    assert code == 2 and complaints.startswith("medplib: ") and complaints.count("\n") == 1
    assert said.strip() and "Traceback" not in complaints


def test_tokens_that_are_typed_are_words(chat, checkpoint: Path, picture: Path) -> None:
    code, said, complaints = chat(
        ["Is <image> </s> <im_start> an <image>?", "And <image>?"], image=picture, model=checkpoint
    )
    assert (code, complaints) == (0, "") and said.strip()


def test_what_is_wrong_from_the_start_ends_with_2(chat, checkpoint: Path, picture: Path, tmp_path: Path) -> None:
    assert chat(["What?"], image=tmp_path / "missing.png", model=checkpoint)[0] == 2
    assert chat(["What?"], "--box", "0,0,99,99", image=picture, model=checkpoint)[0] == 2
    assert chat(["What?"], "--temperature", "-1", image=picture, model=checkpoint)[0] == 2
    assert chat(["What?"], image=picture, model=tmp_path)[0] == 2


def test_nothing_steers_the_terminal(chat, checkpoint: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "model.processing.processor.MedPLIBProcessor.decode_text", lambda *_: "It is\n\x1b]0;owned\x07 \x9b1m fine"
    )
    _, said, _ = chat(["What is it?"], image=picture, model=checkpoint)
    assert "\x1b" not in said and "\x9b" not in said and "owned" in said and said.startswith("It is\n")


# --- at a terminal ----------------------------------------------------------------------------------------------------

TALKATIVE = """
import sys, time, torch
from model.cli import main
from model.inference import schedule

def choose(logits, _):
    time.sleep(0.02)
    return torch.full((len(logits),), 300)

schedule.choose_tokens = choose
sys.exit(main(sys.argv[1:]))
"""
"""A model that says the same word for a long while."""


def _heed_ctrl_c() -> None:
    """What is started by a shell's background job would inherit that Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, *words: str) -> None:
        self.near, far = pty.openpty()
        self.process = subprocess.Popen(
            words, stdin=far, stdout=far, stderr=far, cwd=ROOT, start_new_session=True, preexec_fn=_heed_ctrl_c
        )
        os.close(far)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.near, text.encode())

    def expect(self, pattern: str, seconds: float = 60) -> None:
        """Read until something new matches."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen, re.DOTALL)):
            ready, _, _ = select.select([self.near], [], [], max(0, end - time.monotonic()))
            assert ready, f"{pattern!r} did not come; saw {self.seen[:300]!r} … {self.seen[-300:]!r}"
            try:
                self.seen += os.read(self.near, 65536).decode(errors="replace")
            except OSError:  # the program is gone
                raise AssertionError(
                    f"ended before {pattern!r}; seen: {self.seen[:400]!r} … {self.seen[-400:]!r}"
                ) from None
        self.seen = self.seen[match.end() :]

    def press_ctrl_c(self, pattern: str) -> None:
        """Until it is heard, as people do: Python's readline misses one that comes just after its prompt."""
        for _ in range(10):
            os.kill(self.process.pid, signal.SIGINT)
            with contextlib.suppress(AssertionError):
                return self.expect(pattern, seconds=5)
        raise AssertionError(f"Ctrl-C was not heard; saw {self.seen[-300:]!r}")


def test_ctrl_c_stops_the_answer_and_ctrl_d_ends_the_chat(checkpoint: Path, picture: Path, tmp_path: Path) -> None:
    words = ["chat", str(picture), "--model", str(checkpoint), "--out", str(tmp_path), "--max-new-tokens", "350"]
    terminal = Terminal(sys.executable, "-c", TALKATIVE, *words)
    try:
        terminal.expect(r"36×48.*you> ")
        terminal.type("What is it?\n")
        terminal.expect(r"What is it\?\s+\S{2}")  # the answer has begun
        terminal.press_ctrl_c(r"\[stopped\].*you> ")
        terminal.type("/help\n")
        terminal.expect(r"/masks.*you> ")
        terminal.press_ctrl_c(r"Ctrl-D leaves\).*you> ")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=30) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.near)
