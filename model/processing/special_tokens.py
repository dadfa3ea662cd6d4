"""Markers in texts, and special tokens of the tokenizer (reference §2)."""

from __future__ import annotations

import re

SEG_TOKEN = "<SEG>"
REGION_START_TOKEN, REGION_END_TOKEN = "<region>", "</region>"
IMAGE_START_TOKEN, IMAGE_END_TOKEN = "<im_start>", "<im_end>"
IMAGE_TOKEN = "<image>"
"""Written where an image stands in a text; never a token, it becomes ``IMAGE_PLACEHOLDER``."""
REGION_MARKER = REGION_START_TOKEN + REGION_END_TOKEN
"""Written where a region stands in a text; ``REGION_PLACEHOLDER`` goes between its two tokens."""
WRAPPED_IMAGE = IMAGE_START_TOKEN + IMAGE_TOKEN + IMAGE_END_TOKEN
BOS_TOKEN, EOS_TOKEN, UNK_TOKEN = "<s>", "</s>", "<unk>"
CONTROL_TOKENS = (BOS_TOKEN, EOS_TOKEN, UNK_TOKEN, IMAGE_START_TOKEN, IMAGE_END_TOKEN)
"""What begins, ends or fills a sequence or stands around an image; a text that a person wrote must not hold them."""

SPECIAL_TOKENS: tuple[str, ...] = (
    SEG_TOKEN,
    "<ref>",
    "</ref>",
    REGION_START_TOKEN,
    REGION_END_TOKEN,
    "<sr>",
    "</sr>",
    "<mask>",
    "</mask>",
    *(f"<gen_{number}>" for number in range(1, 257)),
    IMAGE_START_TOKEN,
    IMAGE_END_TOKEN,
)
"""Added after the base vocabulary, in this order: 32000 + 267 rows in the published model."""

CONTROL_TOKEN = re.compile("<(?=" + "|".join(token[1:] for token in CONTROL_TOKENS) + ")")
_STEERING = re.compile(f"{CONTROL_TOKEN.pattern}|<(?={IMAGE_TOKEN[1:]})")


def as_typed(text: str) -> str:
    """What somebody typed, so that none of it stands for an image or ends a turn; region markers may be typed."""
    return _STEERING.sub("< ", text)
