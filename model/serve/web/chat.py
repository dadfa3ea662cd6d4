"""Conversation of a visitor: requests to the controller, streamed replies, and their display.

What a model or a visitor wrote is handed to the browser as data and becomes text there, never markup.
"""

from __future__ import annotations

import base64
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from model.errors import MedPLIBError
from model.inference.answer import dropped_note
from model.inference.regions import place_region
from model.processing.conversation import Turn, render
from model.processing.masks import encode_rle
from model.processing.special_tokens import IMAGE_TOKEN, SEG_TOKEN, as_typed
from model.serve.client import AnswerStream, ControllerClient
from model.serve.errors import client_sentence
from model.serve.limits import ServeLimits, turns_to_drop
from model.serve.protocol import Chunk, GenerateRequest
from model.serve.web.pictures import colour, plain, read_masks
from model.serve.web.state import Exchange, Session

_log = logging.getLogger(__name__)
_MACHINE_FAULT = "something went wrong in the page itself; ask again"
NO_MODEL = "no model is available at the moment; try again in a minute, or press Reload"
SHOW_SECONDS = 0.08
"""A growing answer is shown no oftener: faster is not seen, and many visitors share one process."""
_OPENINGS = frozenset({"a", "all", "an", "masks", "no", "nothing", "something", "that", "the", "there", "what"})
_MOST_EXCHANGES = 256
_NOTES = {"length": "Cut off: it reached the longest length allowed.", "cancelled": "Stopped."}


@dataclass(frozen=True)
class Parameters:
    """How an answer is drawn; see ``GenerateRequest``.

    Attributes:
        seed: a whole number as it was typed; empty for a new one each time.
        threshold: 0 stands for the checkpoint's own.
        remember: whether what was said before is sent along.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    threshold: float = 0.0
    seed: str = ""
    remember: bool = False


def begin(session: Session, question: str, limits: ServeLimits) -> Exchange:
    """Note a question about the picture and the marks that are there.

    Raises:
        MedPLIBError: there is no picture, nothing is asked, too much is, or another answer is on its way.
    """
    _check_free(session)
    question = question.strip()
    if session.picture is None:
        raise MedPLIBError("there is no image yet, or it was forgotten since; open one or pick an example, then ask")
    if not question:
        raise MedPLIBError("the question is empty; ask something")
    if len(question) > limits.max_prompt_chars // 2:  # long before, the model says how much it reads
        raise MedPLIBError(f"the question is too long: it has {len(question):,} characters; ask in a few sentences")
    marks = tuple(session.marks)
    if len(session.exchanges) >= _MOST_EXCHANGES:
        raise MedPLIBError(f"the conversation has {_MOST_EXCHANGES} questions, as many as are kept; clear it to go on")
    asked = place_region(as_typed(question), len(marks))
    exchange = Exchange(session.next_number(), session.picture, question, asked, marks)
    session.marks, session.spent = [], list(marks)
    session.exchanges.append(exchange)
    return exchange


def begin_again(session: Session) -> Exchange:
    """Take the last answer back and note its question anew.

    Raises:
        MedPLIBError: nothing was asked, another answer is on its way, or the picture is another one by now.
    """
    _check_free(session)
    if not session.exchanges:
        raise MedPLIBError("nothing was asked yet; ask something first")
    old = session.exchanges[-1]
    if session.picture is None or not session.picture.same_view(old.picture):
        raise MedPLIBError("the last question was about another view; turn back to it, or ask anew")
    exchange = Exchange(session.next_number(), old.picture, old.question, old.asked, old.marks)
    session.exchanges[-1] = exchange
    return exchange


def _check_free(session: Session) -> None:
    if session.busy:
        raise MedPLIBError("an answer is still on its way; wait for it or press Stop")


def build_request(
    session: Session, exchange: Exchange, model: str, parameters: Parameters, limits: ServeLimits
) -> GenerateRequest:
    """The question as the controller takes it; where that is wanted, behind as much about the same view as it takes."""
    earlier = [other for other in session.history() if parameters.remember and other.number < exchange.number]
    lengths = [len(other.asked) + len(other.answer) for other in (*earlier, exchange)]
    dropped = turns_to_drop(lengths, [len(other.marks) for other in (*earlier, exchange)], limits)
    earlier = earlier[dropped:]
    seed = parameters.seed.strip()
    if seed and not (seed.isascii() and seed.isdigit() and int(seed) < 2**63):
        raise MedPLIBError(f"the seed is {seed!r:.80}; give a whole number from 0 on, or leave it empty")
    picture = exchange.picture  # sent as PNG, so that nothing of a file but its pixels leaves the page
    encoded = base64.b64encode(picture.volume.png(picture.index, picture.window)).decode("ascii")
    turns: list[Turn] = []
    for other in earlier:
        turns += [Turn("human", other.asked), Turn("gpt", other.answer)]
    turns.append(Turn("human", exchange.asked))
    turns[0] = Turn("human", f"{IMAGE_TOKEN}\n{turns[0].text}")
    marks = [mark for other in (*earlier, exchange) for mark in other.marks]
    return GenerateRequest(
        model=model,
        prompt=render(turns),
        temperature=parameters.temperature,
        top_p=parameters.top_p,
        max_new_tokens=parameters.max_new_tokens,
        threshold=parameters.threshold or None,
        seed=int(seed) if seed else None,
        images=[encoded],
        region_masks=[encode_rle(mark.region) for mark in marks],
        every_target=True,
        dropped_turns=dropped,
    )


def listen(
    session: Session,
    exchange: Exchange,
    client: ControllerClient,
    model: str,
    parameters: Parameters,
    limits: ServeLimits,
) -> Iterator[None]:
    """Ask and fill the exchange as the answer comes; yields whenever there is more of it.

    Faults become the exchange's ``error``. Closing the iterator, or ``Session.stop``, closes the connection.
    """
    started = time.monotonic()
    stream: AnswerStream | None = None
    try:
        exchange.model = model = model or next(iter(client.models()), "")
        if not model:
            raise MedPLIBError(NO_MODEL)
        with client.stream(build_request(session, exchange, model, parameters, limits)) as stream:
            session.stream = stream
            yield
            shown = 0.0
            for chunk in stream:
                with session.lock:
                    _take(exchange, chunk)
                if time.monotonic() - shown >= SHOW_SECONDS:
                    yield
                    shown = time.monotonic()
            stopped = stream.closed
        with session.lock:
            exchange.state = "stopped" if stopped or exchange.finish == "cancelled" else "done"
    except MedPLIBError as error:
        exchange.state, exchange.error = "failed", client_sentence(error)
    except Exception:  # noqa: BLE001 - the visitor sees any failure, and the page goes on
        _log.exception("an answer failed in the page")
        exchange.state, exchange.error = "failed", _MACHINE_FAULT
    finally:
        if session.stream is stream:
            session.stream = None
        exchange.seconds = time.monotonic() - started
        if exchange.state == "running":  # the visitor left
            exchange.state = "stopped"


def _take(exchange: Exchange, chunk: Chunk) -> None:
    exchange.answer = plain(chunk.answer or chunk.text.rpartition("ASSISTANT:")[2].strip())  # published workers' last
    exchange.finish = chunk.finish or exchange.finish
    exchange.dropped_turns, exchange.notes = chunk.dropped_turns, tuple(chunk.notes)
    if chunk.masks:
        masks = read_masks(chunk.masks, exchange.picture.volume.spacing_mm)
        if any(tuple(mask.rle["size"]) != exchange.picture.size for mask in masks):
            raise MedPLIBError("the answer's masks are not of the image's size; ask again, or another model")
        exchange.masks = masks
        exchange.shown = [True] * len(masks)


def as_sentence(error: object) -> str:
    """What went wrong as it is shown: with a full stop, and a capital unless it begins with a file's name."""
    text = plain(client_sentence(error)).strip()
    capital = text.split(" ", 1)[0] in _OPENINGS
    return (text[:1].upper() + text[1:] if capital else text) + ("" if text.endswith((".", "!", "?")) else ".")


# --- how it is shown --------------------------------------------------------------------------------------------------


def messages(session: Session) -> list[dict[str, Any]]:
    """The conversation as the browser shows it, oldest first."""
    first_mask: dict[int, int] = {}
    for number, exchange, place in session.masks():
        first_mask.setdefault(exchange.number, number - place)
    messages: list[dict[str, Any]] = []
    for exchange in session.exchanges:
        about = []
        if exchange.marks:
            about.append("1 region" if len(exchange.marks) == 1 else f"{len(exchange.marks)} regions")
        if exchange.picture.volume.num_slices > 1:
            about.append(f"{exchange.picture.volume.plane or 'slice'} {exchange.picture.index + 1}")
        messages.append({"id": exchange.number, "role": "you", "parts": [{"text": exchange.question}], "about": about})
        messages.append(
            {
                "id": exchange.number,
                "role": "model",
                "parts": _parts(exchange, first_mask.get(exchange.number, 0)),
                "state": exchange.state,
                "error": as_sentence(exchange.error) if exchange.error else "",
                "note": _note(exchange),
                "vote": exchange.vote,
                "again": exchange is session.exchanges[-1] and exchange.state != "running",
            }
        )
    return messages


def _parts(exchange: Exchange, first: int) -> list[dict[str, Any]]:
    """The answer's text with a chip where a mask stands."""
    parts: list[dict[str, Any]] = []
    for place, text in enumerate(exchange.answer.split(SEG_TOKEN)):
        if place:
            red, green, blue = colour(first + place - 1)
            there = place <= len(exchange.masks)
            parts.append({"mask": first + place if there else 0, "colour": f"rgb({red},{green},{blue})"})
        if text:
            parts.append({"text": text})
    return parts or ([{"text": "(empty answer)"}] if exchange.state == "done" else [])


def _note(exchange: Exchange) -> str:
    if exchange.state == "running":
        return ""
    if exchange.state == "stopped":
        return "Stopped."
    known = [_NOTES[exchange.finish]] if exchange.finish in _NOTES else []
    empty = [mask for mask in exchange.masks if not mask.area_px]
    if empty and len(empty) == len(exchange.masks):
        known.append("The mask is empty: the model found nothing there.")
    remarks = [*dropped_note(exchange.dropped_turns), *dict.fromkeys(mask.warning for mask in exchange.masks)]
    known += [as_sentence(note[:1].upper() + note[1:]) for note in (*remarks, *exchange.notes) if note]
    return " ".join(known)
