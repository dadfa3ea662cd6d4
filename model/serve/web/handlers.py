"""What a visitor can do on the page. Each method changes the visitor's session and names the parts to show anew.

Nothing here knows gradio: ``page.py`` lays the parts out and calls these methods.
"""

from __future__ import annotations

import base64
import functools
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, get_args

from model.data.volumes import Volume, open_volume
from model.errors import MedPLIBError
from model.serve.client import ControllerClient
from model.serve.limits import ServeLimits, safe_file_name
from model.serve.web import chat
from model.serve.web.downloads import Kind, encode
from model.serve.web.gate import Tray
from model.serve.web.state import Exchange, Picture, Session, read_mark
from model.serve.web.view import Example

Parts = frozenset[str]
P = ParamSpec("P")

_log = logging.getLogger(__name__)
_OPENED: Parts = frozenset({"viewer", "talk", "masks", "notice", "buttons", "volume"})
_ANSWER: Parts = frozenset({"talk", "buttons"})
_ANSWERED: Parts = frozenset({"viewer", "talk", "masks", "notice", "buttons"})
_MACHINE_FAULT = "Something went wrong in the page; try again."


def shows_errors(
    method: Callable[Concatenate[Handlers, Session, P], Parts],
) -> Callable[Concatenate[Handlers, Session, P], Parts]:
    """Run a method with the session locked; what goes wrong becomes the page's notice."""

    @functools.wraps(method)
    def run(handlers: Handlers, session: Session, *arguments: P.args, **options: P.kwargs) -> Parts:
        with session.lock:
            before, session.notice = session.notice, ""
            try:
                parts = method(handlers, session, *arguments, **options)
            except MedPLIBError as error:
                session.notice = chat.as_sentence(error)
                return _after_failing(session)
            except Exception:  # noqa: BLE001 - the visitor sees any failure, and the page goes on
                _log.exception("an action failed in the page")
                session.notice = _MACHINE_FAULT
                return _after_failing(session)
            return parts | {"notice"} if before != session.notice else parts

    return run


class VoteLog:
    """A file that votes are appended to; safe to use from many threads and processes.

    Args:
        path: the file, made at the first vote and readable by its owner alone; None keeps none.
        log_conversations: write question and answer too.

    Raises:
        MedPLIBError: the file cannot be there.
    """

    def __init__(self, path: Path | None, log_conversations: bool = False) -> None:
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise MedPLIBError(f"{path} cannot hold the votes; give a file in a folder that exists with --votes-file")
        self.path, self.log_conversations = path, log_conversations
        self._lock = threading.Lock()

    def write(self, exchange: Exchange) -> None:
        """Append the exchange's vote as it is now; a full disk is logged and does not disturb the visitor."""
        if self.path is None:
            return
        entry: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "vote": {1: "up", -1: "down"}.get(exchange.vote, "withdrawn"),
            "model": exchange.model,
            "finish": exchange.finish,
            "seconds": round(exchange.seconds, 2),
            "regions": len(exchange.marks),
            "masks": len(exchange.masks),
        }
        if self.log_conversations:
            entry |= {"question": exchange.question, "answer": exchange.answer}
        line = json.dumps(entry, ensure_ascii=False) + "\n"
        try:
            with self._lock:
                number = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
                with os.fdopen(number, "w", encoding="utf-8") as stream:
                    stream.write(line)
        except OSError as error:
            _log.warning("a vote could not be written to %s: %s", self.path, error.strerror or error)


@dataclass
class Handlers:
    """Actions of visitors.

    Attributes:
        client: the controller's.
        votes: where votes are kept.
        tray: where uploads wait.
        limits: of files and conversations.
        examples: pictures to try.
        models: that were served when last looked.
    """

    client: ControllerClient
    votes: VoteLog
    tray: Tray = field(default_factory=Tray)
    limits: ServeLimits = field(default_factory=ServeLimits)
    examples: list[Example] = field(default_factory=list)
    models: list[str] = field(default_factory=list)

    @shows_errors
    def open_upload(self, session: Session, upload: Any) -> Parts:
        """Look at a file whose bytes wait in the tray."""
        name = safe_file_name(str(upload.get("name", "")), "the file")
        size = upload.get("size")
        most = self.limits.max_upload_bytes
        if isinstance(size, int) and size > most:
            _log.info("an upload was refused as larger than --max-image-mib and --max-volume-mib allow")
            raise MedPLIBError(f"{name} is larger than the limit of {most / 2**20:.3g} MiB; give a smaller file")
        content = self.tray.take(upload.get("token"))
        if content is None:
            raise MedPLIBError(f"{name} did not arrive; open it again")
        return self._look_at(session, content, name)

    @shows_errors
    def open_example(self, session: Session, index: Any) -> Parts:
        """Look at an example."""
        if not isinstance(index, int) or not 0 <= index < len(self.examples):
            raise MedPLIBError("there is no such example; pick one of those shown")
        path = self.examples[index].path
        return self._look_at(session, path.read_bytes(), path.name)

    def _look_at(self, session: Session, content: bytes, name: str) -> Parts:
        volume = open_volume(content, name, self.limits)
        middle = volume.num_slices // 2
        session.show(Picture(volume, volume.slice(middle), middle, file=session.next_number()))
        return _OPENED

    @shows_errors
    def turn_to(self, session: Session, slice_number: float, centre: float, width: float) -> Parts:
        """Look at a slice (as people count, from 1) through a window."""
        picture = _picture(session)
        volume = picture.volume
        window = (float(centre), float(width)) if volume.window is not None else None
        if window == volume.window:
            window = None  # the file's own
        index = volume.checked(int(slice_number) - 1)
        session.show(Picture(volume, volume.slice(index, window), index, window, picture.file))
        return Parts({"viewer", "masks", "talk"})

    @shows_errors
    def cut(self, session: Session, plane: Any) -> Parts:
        """Look at the volume in slices of another plane."""
        picture = _picture(session)
        volume: Volume = picture.volume.along(plane)
        middle = volume.num_slices // 2
        session.show(Picture(volume, volume.slice(middle, picture.window), middle, picture.window, picture.file))
        return Parts({"viewer", "masks", "talk", "volume"})

    @shows_errors
    def mark(self, session: Session, drawn: Any) -> Parts:
        """Add what was drawn to the regions of the next question."""
        picture = _picture(session)
        if len(session.marks) >= self.limits.max_regions:
            raise MedPLIBError(f"at most {self.limits.max_regions} regions can be marked; ask about them first")
        session.marks.append(read_mark(drawn, picture.size))
        return Parts({"viewer", "talk"})

    @shows_errors
    def unmark(self, session: Session, everything: bool) -> Parts:
        """Take the last mark back, or all of them."""
        session.spent = []
        del session.marks[0 if everything else -1 :]
        return Parts({"viewer", "talk"})

    def ask(self, session: Session, question: str, model: str, parameters: chat.Parameters) -> Iterator[Parts]:
        """Ask; yields the parts to show anew whenever more of the answer is there."""
        return self._answer(session, lambda: chat.begin(session, question, self.limits), model, parameters)

    def ask_again(self, session: Session, model: str, parameters: chat.Parameters) -> Iterator[Parts]:
        """Have the last question answered anew."""
        return self._answer(session, lambda: chat.begin_again(session), model, parameters)

    def _answer(
        self, session: Session, begin: Callable[[], Exchange], model: str, parameters: chat.Parameters
    ) -> Iterator[Parts]:
        exchange = None
        with session.lock:
            session.notice, session.model, session.remembers[model] = "", model, parameters.remember
            try:
                exchange = begin()
            except MedPLIBError as error:
                session.notice = chat.as_sentence(error)
        if exchange is None:
            yield _after_failing(session)
            return
        yield _ANSWERED | {"question"}
        for _ in chat.listen(session, exchange, self.client, model, parameters, self.limits):
            yield _ANSWER
        yield _ANSWERED

    def stop(self, session: Session) -> Parts:
        """Give up the answer that is on its way."""
        session.stop()
        return Parts()

    @shows_errors
    def forget(self, session: Session) -> Parts:
        """Clear the conversation and its masks."""
        session.forget()
        return _ANSWERED

    @shows_errors
    def vote(self, session: Session, number: Any, vote: Any) -> Parts:
        """Vote for or against an answer; the same vote again takes it back."""
        exchange = next((one for one in session.exchanges if one.number == number), None)
        if exchange is None or vote not in (1, -1):
            raise MedPLIBError("that answer is gone; vote for one that is shown")
        exchange.vote = 0 if exchange.vote == vote else vote
        self.votes.write(exchange)
        return Parts({"talk"})

    @shows_errors
    def show_mask(self, session: Session, place: Any, shown: Any) -> Parts:
        """Lay a mask over the picture, or take it off."""
        for _, exchange, number in session.masks():
            if [exchange.number, number] == place:
                exchange.shown[number] = bool(shown)
                return Parts({"viewer", "masks"})
        raise MedPLIBError("that mask is gone; choose one that is shown")

    @shows_errors
    def shade(self, session: Session, opacity: float, contour: bool) -> Parts:
        """How masks are laid over the picture."""
        session.opacity, session.contour = min(max(float(opacity), 0.0), 1.0), bool(contour)
        return Parts({"viewer"})

    def download(self, session: Session, kind: Any) -> tuple[Parts, dict[str, Any] | None]:
        """The masks of this slice that are shown, as a file: its name and its bytes in base64."""
        made: dict[str, Any] = {}
        return self._write(session, kind, made), made or None

    @shows_errors
    def _write(self, session: Session, kind: Any, made: dict[str, Any]) -> Parts:
        picture = _picture(session)
        if kind not in get_args(Kind):
            raise MedPLIBError("there is no such kind of file; choose one of the buttons")
        here = {number for number, _, _ in session.masks_here()}
        every = [
            (exchange.masks[place], number in here and exchange.shown[place])
            for number, exchange, place in session.masks()
        ]
        if not any(shown for _, shown in every):
            raise MedPLIBError("no mask is shown to be saved; tick one in the list, or ask for one")
        name, content = encode(
            kind,
            [mask for mask, _ in every],
            picture.volume,
            picture.index,
            shown=[shown for _, shown in every],
            opacity=session.opacity,
            contour=session.contour,
            window=picture.window,
        )
        made |= {"name": name, "data": base64.b64encode(content).decode("ascii"), "key": session.next_number()}
        return Parts({"masks"})

    @shows_errors
    def choose_model(self, session: Session, model: Any) -> Parts:
        """Ask this model from now on."""
        session.model = str(model or "")
        return Parts({"models"})

    @shows_errors
    def look_for_models(self, session: Session, chosen: str | None = None, refresh: bool = True) -> Parts:
        """List the models anew, keeping the choice; ``refresh`` has the controller ask its workers first."""
        session.model = chosen or ""
        try:
            if refresh:
                self.client.refresh()
            self.models = self.client.models()
        except MedPLIBError:
            self.models = []
            raise
        if not self.models:
            raise MedPLIBError(chat.NO_MODEL)
        return Parts({"models"})

    def conversation_turns(self, model: str) -> int:
        """Questions of a conversation that a model was trained on; 1 where the controller cannot be asked."""
        try:
            return self.client.conversation_turns(model)
        except MedPLIBError:
            return 1


def _after_failing(session: Session) -> Parts:
    """What to show anew: all of it where there is no picture, as a browser may still show one that was forgotten."""
    return _OPENED if session.picture is None else Parts({"notice", "viewer"})


def _picture(session: Session) -> Picture:
    if session.picture is None:
        raise MedPLIBError("there is no image yet, or it was forgotten since; open one or pick an example")
    return session.picture
