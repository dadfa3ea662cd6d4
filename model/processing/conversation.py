"""Conversations → prompts, and back. Prompts are built here and nowhere else; ``encoding.py`` makes tokens of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from model.errors import MedPLIBError
from model.processing.special_tokens import (
    CONTROL_TOKEN,
    EOS_TOKEN,
    IMAGE_END_TOKEN,
    IMAGE_START_TOKEN,
    IMAGE_TOKEN,
    WRAPPED_IMAGE,
)

_ALREADY_WRAPPED = re.compile(rf"{IMAGE_START_TOKEN}\s*{IMAGE_TOKEN}\s*{IMAGE_END_TOKEN}")
_ASKING, _ANSWERING = "USER: ", " ASSISTANT:"
_NEXT_ROUND = re.compile(rf"{EOS_TOKEN}\s*{_ASKING}")


@dataclass(frozen=True)
class Turn:
    """One utterance. ``text`` may hold ``<image>``, ``<region></region>`` and ``<SEG>`` where those stand."""

    role: Literal["human", "gpt"]
    text: str


@dataclass(frozen=True)
class Template:
    """How turns are written into one text.

    Attributes:
        system: what stands before the first turn; empty for none.
        answer_end: closes an answer and is supervised with it.
        chat: whether roles are written; without, a turn pair is its images and its answer alone.
    """

    system: str
    answer_end: str
    chat: bool = True


_SYSTEM = (
    "A chat between a curious {who} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {who}'s questions."
)
TEMPLATES: dict[str, Template] = {
    "llava_v1": Template(_SYSTEM.format(who="human"), EOS_TOKEN),
    "v1": Template(_SYSTEM.format(who="user"), EOS_TOKEN),
    "plain": Template("", "\n", chat=False),
}
"""``llava_v1``: training and use. ``v1``: what published scores were measured with. ``plain``: stage I captions."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a rendered conversation, and whether the model is to learn it."""

    text: str
    supervised: bool


def get_template(name: str) -> Template:
    """Template of a name.

    Raises:
        MedPLIBError: there is none.
    """
    if name not in TEMPLATES:
        raise MedPLIBError(f"there is no conversation template {name!r:.80}; known: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def render(turns: Sequence[Turn], template: str = "llava_v1") -> str:
    """The whole conversation as the text that is tokenised; a last human turn is followed by the opened answer."""
    return "".join(piece.text for piece in render_pieces(turns, template))


def parse_prompt(prompt: str) -> list[Turn]:
    """The turns of a prompt as ``render`` writes it with any chat template; the last one is the question to answer.

    Rendered again, they give the same prompt. The question to answer may write out ``USER:`` and ``ASSISTANT:`` itself.
    In an earlier turn an ``ASSISTANT:`` that is part of the text looks like the one where the answer begins;
    the last one is taken for that.

    Args:
        prompt: system text or none, turns, and the opened answer. Whatever is not of this form is one question.

    Returns:
        Alternating turns, human first and last; images stand as ``<image>``.
    """
    systems = (style.system for style in TEMPLATES.values() if style.chat)
    system = next((text for text in systems if prompt.startswith(text)), "")
    talk = prompt.removeprefix(system).strip()
    whole = _images_unwrapped(prompt)
    if not (talk.startswith(_ASKING) and talk[len(_ASKING) :].endswith(_ANSWERING)):
        return [Turn("human", whole)]
    *earlier, last = _NEXT_ROUND.split(talk[len(_ASKING) : -len(_ANSWERING)])
    turns = []
    for text in earlier:
        asked, opened, answer = text.rpartition(_ANSWERING)
        if not opened:
            return [Turn("human", whole)]
        turns += [Turn("human", _images_unwrapped(asked)), Turn("gpt", answer.removeprefix(" "))]
    return [*turns, Turn("human", _images_unwrapped(last))]


def _images_unwrapped(text: str) -> str:
    return _ALREADY_WRAPPED.sub(IMAGE_TOKEN, text)


def render_pieces(turns: Sequence[Turn], template: str = "llava_v1") -> list[Piece]:
    """The conversation in pieces; the supervised ones are the answers, from the character after their role on.

    Raises:
        MedPLIBError: no human turn, two turns of one side in a row, an image in an answer, or an unknown template.
    """
    style, turns = get_template(template), check_turns(turns)
    pieces = [Piece(f"{style.system} ", False)] if style.system else []
    for turn in turns:
        if turn.role == "human":
            asked = place_images(turn.text)
            text = f"{_ASKING}{asked}{_ANSWERING}" if style.chat else IMAGE_TOKEN * asked.count(IMAGE_TOKEN)
            pieces.append(Piece(text, False))
        else:
            opening = " " if style.chat and turn.text else ""
            pieces.append(Piece(f"{opening}{turn.text}{style.answer_end}", True))
    return pieces


def check_turns(turns: Sequence[Turn]) -> list[Turn]:
    """The turns from the first human one on, which must alternate.

    Raises:
        MedPLIBError: there is no human turn, a side speaks twice in a row, or an answer holds ``<image>``.
    """
    first = next((index for index, turn in enumerate(turns) if turn.role == "human"), None)
    if first is None:
        raise MedPLIBError("the conversation has no human turn; start it with a question")
    kept = list(turns[first:])
    for number, turn in enumerate(kept):
        expected = "gpt" if number % 2 else "human"
        if turn.role != expected:
            raise MedPLIBError(
                f"turn {first + number + 1} of the conversation is of {turn.role!r:.80}, expected {expected!r}; "
                "let human and gpt take turns"
            )
        if turn.role == "gpt" and IMAGE_TOKEN in turn.text:
            raise MedPLIBError(f"answer {number // 2 + 1} holds {IMAGE_TOKEN}; put images into the human turns")
    return kept


def place_images(text: str) -> str:
    """A human turn with its images between their start and end tokens.

    One image goes to the front, wherever it stood, as in the published training data. Several stay in place. (The
    published code makes one of them.) Control tokens that a user wrote out are taken apart, so that text cannot end a
    turn or pose as an image.
    """
    text = CONTROL_TOKEN.sub("< ", _images_unwrapped(text))
    count = text.count(IMAGE_TOKEN)
    if count == 0:
        return text
    if count == 1:
        rest = text.replace(IMAGE_TOKEN, "").strip()
        return f"{WRAPPED_IMAGE}\n{rest}".strip()
    return text.replace(IMAGE_TOKEN, WRAPPED_IMAGE).strip()
