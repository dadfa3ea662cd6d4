"""``medplib chat``: questions about one image, or none, in a terminal, with the engine in the same process.

Questions come from a person at a terminal or from a pipe, line by line; a line that starts with ``/`` is a command.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from io import TextIOWrapper
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from model.errors import MedPLIBError
from model.inference.answer import Answer, Mask, dropped_note
from model.inference.engine import Engine, Request
from model.inference.images import PreparedImage
from model.inference.regions import Region, place_region, region_to_mask
from model.processing.special_tokens import REGION_MARKER, as_typed
from model.visualize import mask_line, write_pictures

HELP = """\
Type a question, or one of these:
  /box X1,Y1,X2,Y2   the next question is about this box, in image pixels; several regions add up
  /point X,Y         the same for a point
  /region FILE       the same for a mask of the image's size
  /history on|off    send earlier questions along, or let each stand alone
  /clear             forget the conversation and the regions
  /image FILE        go on with another image; forgets the conversation too
  /masks             the masks so far, and their files
  /help              this list
  /quit              leave (so does Ctrl-D; Ctrl-C stops an answer)"""
_PROMPT = "you> "


@dataclass(frozen=True)
class ChatSettings:
    """What holds for every question of a chat.

    Attributes:
        out: folder of the pictures.
        request: a request whose settings and thresholds all others take.
        remember: whether earlier questions are sent along; where the model was trained on conversations when absent.
    """

    out: Path
    request: Request = field(default_factory=lambda: Request(None, "-"))
    remember: bool | None = None


class Chat:
    """One conversation: its image, what was said, the regions of the next question, the masks so far.

    Args:
        engine: that is started; it answers.
        settings: of every question.
        write: takes pieces of text for the person, as they come.
    """

    def __init__(self, engine: Engine, settings: ChatSettings, write: Callable[[str], object]) -> None:
        self.engine, self.settings, self.write = engine, settings, write
        trained = engine.model.config.conversation_turns > 1
        self.remember = trained if settings.remember is None else settings.remember
        self.image: PreparedImage | None = None
        self.stem = "image"
        self.history: list[tuple[str, str]] = []
        self.told_regions: list[np.ndarray] = []  # of the questions in the history
        self.regions: list[np.ndarray] = []  # of the next question
        self.masks: list[tuple[Mask, Path]] = []
        self._number = 0

    def open_image(self, path: Path) -> None:
        """Turn to an image; what was said about another one is forgotten.

        Raises:
            MedPLIBError: the file cannot be read.
        """
        self.image, self.stem = self.engine.prepare(path), path.stem
        self.forget()

    def forget(self) -> None:
        """Begin the conversation anew."""
        self.history, self.told_regions, self.regions = [], [], []

    def mark(self, region: Region) -> None:
        """The next question is about this region, too.

        Raises:
            MedPLIBError: it is malformed, empty or not of the image's size.
        """
        if self.image is None:
            raise MedPLIBError("there is no image yet; open one with /image FILE")
        self.regions.append(region_to_mask(region, self.image.size))

    def ask(self, question: str) -> Answer:
        """Ask, stream the answer, write its pictures; Ctrl-C ends the answer with what was said by then.

        Raises:
            MedPLIBError: there is something wrong with the question, or it does not fit; nothing is forgotten.
        """
        asked = as_typed(question)
        asked = place_region(asked, len(self.regions)) if self.regions else asked
        history = self.history if self.remember else []
        request = replace(
            self.settings.request,
            image=self.image,
            question=asked,
            regions=[*(self.told_regions if self.remember else []), *self.regions],
            history=tuple(history),
            every_target=True,
        )
        answer = self._listen(request)
        dropped = self.history[: answer.dropped_turns]  # those that did not fit, and their regions
        del self.told_regions[: sum(asked.count(REGION_MARKER) for asked, _ in dropped)]
        del self.history[: answer.dropped_turns]
        marked = np.logical_or.reduce(self.regions) if self.regions else None
        if answer.text:  # an answer that was stopped before its first word is no turn
            self.history.append((asked, answer.text))
            self.told_regions += self.regions
            self.regions = []
        if self.image is not None:
            self._write_files(self.image, question, answer, marked)
        for note in (*dropped_note(answer.dropped_turns), *answer.notes):
            self.write(f"  note: {note}\n")
        return answer

    def _listen(self, request: Request) -> Answer:
        """Wait for an answer and write its text as it grows; Ctrl-C ends it with what was said by then."""
        said = ""

        def show(text: str) -> None:
            nonlocal said
            self.write(_rest(text, said))
            said = text

        ticket = self.engine.submit(request, show)
        while True:
            try:
                answer = ticket.result()
                break
            except KeyboardInterrupt:
                ticket.cancel()
        end = " [stopped]" if answer.finish == "cancelled" else "" if answer.text else "(empty answer)"
        self.write(f"{_rest(answer.text, said)}{end}\n")
        return answer

    def _write_files(self, image: PreparedImage, question: str, answer: Answer, marked: np.ndarray | None) -> None:
        if not answer.masks and marked is None:
            return
        name = self._free_name()
        files = write_pictures(self.settings.out, name, image, answer, marked)
        self.masks += zip(answer.masks, files, strict=False)
        if answer.masks:
            record = {
                "question": question,
                "answer": answer.text,
                "masks": [mask.to_dict() for mask in answer.masks],
            }
            files.append(self.settings.out / f"{name}_masks.json")
            files[-1].write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        for mask in answer.masks:
            self.write(f"  {mask_line(mask)}\n")
        for file in files:
            self.write(f"  wrote {file}\n")

    def _free_name(self) -> str:
        """``STEM_1``, ``STEM_2`` …: an earlier chat's pictures in the same folder stay."""
        for number in count(self._number + 1):
            name = f"{self.stem}_{number}"
            if not any((self.settings.out / f"{name}_{end}").exists() for end in ("overlay.png", "masks.json")):
                self._number = number
                return name
        raise AssertionError("numbers do not end")

    # --- commands -------------------------------------------------------------------------------------------------

    def obey(self, line: str) -> None:
        """Do what a command says.

        Raises:
            MedPLIBError: there is no such command, or something is wrong with what stands behind it.
        """
        name, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        match name:
            case "/help":
                self.write(f"{HELP}\n")
            case "/box" | "/point":
                self.mark((name[1:], tuple(rest.replace(",", " ").split())))  # type: ignore[arg-type]
                self._tell_regions()
            case "/region":
                self.mark(_path(rest, line))
                self._tell_regions()
            case "/image":
                self.open_image(_path(rest, line))
                self.write(f"{self.introduction()}\n")
            case "/history":
                if rest not in ("on", "off"):
                    raise MedPLIBError(f"{line.strip()} says neither on nor off; type /history on or /history off")
                self.remember = rest == "on"
                self.write(f"{self._memory()}\n")
            case "/clear":
                self.forget()
                self.write("The conversation and its regions are forgotten.\n")
            case "/masks":
                lines = [f"{mask_line(mask)}  {path}" for mask, path in self.masks]
                self.write("\n".join(lines or ["There are no masks yet."]) + "\n")
            case _:
                raise MedPLIBError(f"there is no command {name}; /help lists them")

    def _tell_regions(self) -> None:
        several = f"{len(self.regions)} regions" if len(self.regions) > 1 else "1 region"
        self.write(f"The next question is about {several}.\n")

    def _memory(self) -> str:
        trained = self.engine.model.config.conversation_turns
        knows = "single questions" if trained == 1 else f"conversations of up to {trained} questions"
        says = "Earlier questions are sent along" if self.remember else "Each question stands alone"
        return f"{says}; the model was trained on {knows}."

    def introduction(self) -> str:
        """Which image it is about, and whether earlier questions are sent along."""
        if self.image is None:
            return f"No image is open. {self._memory()}"
        height, width = self.image.size
        return f"{self.stem}: {width}×{height} (width×height). {self._memory()}"


def _path(text: str, line: str) -> Path:
    if not text:
        raise MedPLIBError(f"{line.strip()} needs a file behind it")
    return Path(text).expanduser()


def _rest(text: str, said: str) -> str:
    """What of a text was not said yet, without anything that would steer a terminal."""
    fresh = text[len(said) :] if text.startswith(said) else f"\n{text}"
    return "".join(sign if sign.isprintable() or sign == "\n" else "�" for sign in fresh)


def run_chat(
    engine: Engine, image: Path | None, settings: ChatSettings, regions: Sequence[Region] = (), lines: Any = None
) -> int:
    """Talk until the questions end.

    Args:
        engine: not yet started.
        image: what it is about; None for a conversation in words alone.
        settings: of every question.
        regions: of the first question.
        lines: where questions come from; standard input when absent.

    Returns:
        0; 2 where questions came from a pipe and one of them, or a command, failed.

    Raises:
        MedPLIBError: image or regions cannot be read.
    """
    source = sys.stdin if lines is None else lines
    person = source.isatty()
    with engine:
        chat = Chat(engine, settings, _write)
        if image is not None:
            chat.open_image(image)
        for region in regions:
            chat.mark(region)
        if chat.remember and engine.model.config.conversation_turns == 1:
            sys.stderr.write("medplib: the model was trained on single questions; with earlier ones it answers worse\n")
        if person:
            _write(f"{chat.introduction()} Ask; /help lists the commands. For research only.\n")
        failures = sum(not _turn(chat, line, person) for line in _lines(source, person, chat))
    return 2 if failures and not person else 0


def _turn(chat: Chat, line: str, person: bool) -> bool:
    """Run one question or command; False after an error."""
    try:
        if line.startswith("/"):
            chat.obey(line)
        else:
            chat.ask(line)
    except MedPLIBError as error:
        sys.stdout.flush()
        sys.stderr.write(f"medplib: {error}\n")
        return False
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        sys.stderr.write(f"medplib: {chat.settings.out}: {error.strerror or error}; name another folder with --out\n")
        return False
    except KeyboardInterrupt:  # between answers: a person meant the line, a script is to end
        if not person:
            raise
        _write("\n")
    return True


def _lines(source: Any, person: bool, chat: Chat) -> Iterator[str]:
    """Questions and commands without the empty ones, until one leaves or there are no more."""
    if person:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - makes input() edit its line and remember others
    elif isinstance(source, TextIOWrapper):
        source.reconfigure(errors="surrogateescape")  # what is no text is refused with its question, not with the chat
    while True:
        try:
            line = input(_PROMPT) if person else source.readline()
        except EOFError:  # Ctrl-D
            _write("\n")
            return
        except KeyboardInterrupt:
            if not person:
                raise
            _write("\n(/quit or Ctrl-D leaves)\n")
            continue
        if not person and not line:
            return
        line = line.strip()
        if line in ("/quit", "/exit"):
            return
        if line:
            yield line


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
