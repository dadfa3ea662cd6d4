"""Conversations → token ids with exact supervised spans."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from model.errors import MedPLIBError
from model.modeling.configuration import IGNORE_INDEX, IMAGE_PLACEHOLDER, REGION_PLACEHOLDER
from model.processing.conversation import Turn, render, render_pieces
from model.processing.special_tokens import SEG_TOKEN
from model.processing.tokens import tokenize


def tokenize_conversation(
    tokenizer: PreTrainedTokenizerFast, turns: Sequence[Turn], template: str = "llava_v1"
) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation at full length; see ``encode_conversation``."""
    pieces = render_pieces(turns, template)
    tokenized = tokenize(tokenizer, "".join(piece.text for piece in pieces))
    supervised = [flag for piece in pieces for flag in [piece.supervised] * len(piece.text)]  # per character
    labels = [
        token if start >= 0 and token >= 0 and supervised[start] else IGNORE_INDEX
        for token, start in zip(tokenized.ids, tokenized.starts, strict=True)
    ]
    return tokenized.ids, labels


def truncate(
    tokenizer: PreTrainedTokenizerFast, input_ids: list[int], labels: list[int], max_length: int | None
) -> tuple[list[int], list[int]]:
    """Cut a conversation off on the right, if nothing that matters is lost.

    Args:
        tokenizer: for the id of ``<SEG>``.
        input_ids, labels: of equal length.
        max_length: most tokens to keep, an image or region placeholder counting as one; None keeps all.

    Raises:
        MedPLIBError: the cut would lose an image, a region, a ``<SEG>`` or all supervision.
    """
    if max_length is None or len(input_ids) <= max_length:
        return input_ids, labels
    lost = set(input_ids[max_length:])
    names = {
        IMAGE_PLACEHOLDER: "an image",
        REGION_PLACEHOLDER: "a region",
        tokenizer.convert_tokens_to_ids(SEG_TOKEN): SEG_TOKEN,
    }
    fatal = [name for token, name in names.items() if token in lost]
    if all(label == IGNORE_INDEX for label in labels[:max_length]):
        fatal.append("all of its answer")
    if fatal:
        raise MedPLIBError(
            f"the conversation has {len(input_ids)} tokens, and cutting it to {max_length} would lose "
            f"{' and '.join(fatal)}; shorten it or raise max_length"
        )
    return input_ids[:max_length], labels[:max_length]


def encode_conversation(
    tokenizer: PreTrainedTokenizerFast,
    turns: Sequence[Turn],
    template: str = "llava_v1",
    max_length: int | None = None,
) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation to learn from.

    The whole text is tokenised at once and the answers are found again by their characters, so what a question or an
    answer says (a colon, ``ASSISTANT:``, ``</s>``) cannot shift what is supervised.

    Args:
        tokenizer: from ``build_tokenizer``.
        turns: alternating, human first; a leading gpt turn is dropped, as in the published data.
        template: a name in ``TEMPLATES``.
        max_length: see ``truncate``.

    Returns:
        Ids, with ``IMAGE_PLACEHOLDER`` and ``REGION_PLACEHOLDER`` where those stand; and labels of the same length: the
        id in each answer and at its end, ``IGNORE_INDEX`` elsewhere. An empty answer supervises its end alone.

    Raises:
        MedPLIBError: the conversation is malformed, or too long to be cut without loss.
    """
    return truncate(tokenizer, *tokenize_conversation(tokenizer, turns, template), max_length)


def encode_prompt(
    tokenizer: PreTrainedTokenizerFast,
    turns: Sequence[Turn],
    template: str = "llava_v1",
    max_length: int | None = None,
) -> list[int]:
    """Token ids of a conversation that waits for its next answer.

    Args:
        tokenizer, template: see ``encode_conversation``.
        turns: alternating; the last is the question to answer.
        max_length: most tokens it may have.

    Raises:
        MedPLIBError: the conversation is malformed, does not end in a question, or is too long.
    """
    if not turns or turns[-1].role != "human":
        raise MedPLIBError("a conversation to be continued must end with a human turn; drop the last answer")
    ids = tokenize(tokenizer, render(turns, template)).ids
    if max_length is not None and len(ids) > max_length:
        remedy = "ask something shorter" if len(turns) == 1 else "clear the conversation, or ask something shorter"
        raise MedPLIBError(f"the prompt has {len(ids)} tokens, at most {max_length} fit; {remedy}")
    return ids
