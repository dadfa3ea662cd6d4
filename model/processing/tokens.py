"""The tokenizer: LLaMA's sentencepiece model in its legacy behaviour, plus the tokens MedPLIB adds (reference §2)."""

from __future__ import annotations

import io
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, normalizers
from transformers import AddedToken, LlamaTokenizer, PreTrainedTokenizerFast

from model.errors import MedPLIBError
from model.modeling.configuration import IMAGE_PLACEHOLDER, REGION_PLACEHOLDER
from model.processing.special_tokens import (
    BOS_TOKEN,
    EOS_TOKEN,
    IMAGE_TOKEN,
    REGION_END_TOKEN,
    REGION_START_TOKEN,
    SPECIAL_TOKENS,
    UNK_TOKEN,
)

MODEL_FILE, BACKEND_FILE = "tokenizer.model", "tokenizer.json"

_PLACEHOLDERS = re.compile(f"({re.escape(IMAGE_TOKEN)})|{re.escape(REGION_START_TOKEN)}(){re.escape(REGION_END_TOKEN)}")


def build_tokenizer(source: str | Path) -> PreTrainedTokenizerFast:
    """Tokenizer of a directory, with MedPLIB's tokens in it.

    Args:
        source: a directory holding ``tokenizer.model`` (LLaMA's, the published model's or a nano's) or, without one,
            a ``tokenizer.json`` that this function's result was saved as; or either file itself.

    Returns:
        A tokenizer that puts ``<s>`` first, pads on the right with ``<unk>``, and tokenises as the published model's
        did (``legacy=True``): whitespace around added tokens vanishes and a fresh ``▁`` follows them.

    Raises:
        MedPLIBError: there is no such file, or it is not a tokenizer.
    """
    path = _tokenizer_file(Path(source))
    try:
        tokenizer = _from_sentencepiece(path) if path.suffix == ".model" else _from_backend(path)
    except Exception as error:
        raise MedPLIBError(
            f"{path} is not a readable tokenizer ({error}); give a LLaMA sentencepiece {MODEL_FILE}"
        ) from error
    add_special_tokens(tokenizer)
    return tokenizer


def _tokenizer_file(source: Path) -> Path:
    candidates = [source / MODEL_FILE, source / BACKEND_FILE] if source.is_dir() else [source]
    for path in candidates:
        if path.is_file():
            return path
    raise MedPLIBError(f"{source} holds no tokenizer; expected {MODEL_FILE} or {BACKEND_FILE} in it")


def _from_sentencepiece(path: Path) -> PreTrainedTokenizerFast:
    # The settings that older library versions saved beside the model contradict it, so only the model is shown.
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(path, Path(folder) / MODEL_FILE)
        loaded = LlamaTokenizer.from_pretrained(folder, legacy=True, add_bos_token=True)
    return _wrap(loaded.backend_tokenizer)


def _from_backend(path: Path) -> PreTrainedTokenizerFast:
    content = path.read_bytes()  # with whatever byte order mark an editor left
    return _wrap(Tokenizer.from_str(content.decode(json.detect_encoding(content))))


def _wrap(backend: object) -> PreTrainedTokenizerFast:
    backend.normalizer = normalizers.Sequence(  # type: ignore[attr-defined]
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.pre_tokenizer = None  # type: ignore[attr-defined]
    backend.no_padding()  # type: ignore[attr-defined]
    backend.no_truncation()  # type: ignore[attr-defined]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        unk_token=UNK_TOKEN,
        pad_token=UNK_TOKEN,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def add_special_tokens(tokenizer: PreTrainedTokenizerFast) -> int:
    """Add the tokens of ``SPECIAL_TOKENS`` that are absent, in order; returns how many were added."""
    known = tokenizer.get_added_vocab()
    missing = [
        AddedToken(token, lstrip=True, rstrip=True, normalized=False, special=True)
        for token in SPECIAL_TOKENS
        if token not in known
    ]
    return tokenizer.add_tokens(missing, special_tokens=True)


@dataclass(frozen=True)
class Tokenized:
    """Token ids of a text and, for each, where it starts in the text (in characters; −1 for ``<s>``)."""

    ids: list[int]
    starts: list[int]


def tokenize(tokenizer: PreTrainedTokenizerFast, text: str, *, add_bos: bool = True) -> Tokenized:
    """Token ids of a text in which ``<image>`` and ``<region></region>`` stand for images and regions.

    Goes to the backend directly: calls through the wrapper change its padding and truncation, which threads share.
    """
    backend = tokenizer.backend_tokenizer
    ids = [int(tokenizer.bos_token_id)] if add_bos else []
    starts = [-1] * len(ids)

    def add_text(begin: int, end: int) -> None:
        encoding = backend.encode(text[begin:end], add_special_tokens=False)
        ids.extend(encoding.ids)
        starts.extend(begin + offset[0] for offset in encoding.offsets)

    for begin, end, placeholder in _stretches(text):
        add_text(begin, end)
        if placeholder is not None:
            ids.append(placeholder)
            starts.append(end)
    return Tokenized(ids, starts)


def _stretches(text: str) -> Iterator[tuple[int, int, int | None]]:
    """Begin and end of each stretch of plain text, and the placeholder that follows it (None at the end)."""
    done = 0
    for match in _PLACEHOLDERS.finditer(text):
        is_image = match.group(1) is not None
        at, resume = match.span() if is_image else match.span(2)  # a region goes between its two tokens
        yield done, at, IMAGE_PLACEHOLDER if is_image else REGION_PLACEHOLDER
        done = resume
    yield done, len(text), None


class TokenCounter:
    """Says how many tokens ``tokenize`` makes of a text; a stretch of text that comes again is not tokenised again.

    Args:
        tokenizer: from ``build_tokenizer``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._count = lru_cache(maxsize=1 << 16)(self._encode)

    def __call__(self, text: str) -> int:
        """Tokens of a text, ``<s>`` counted and an image or region placeholder counting as one."""
        stretches = _stretches(text)
        return 1 + sum(self._count(text[begin:end]) + (held is not None) for begin, end, held in stretches)

    def _encode(self, text: str) -> int:
        return len(self._backend.encode(text, add_special_tokens=False).ids)


def train_tokenizer(texts: Iterable[str], vocab_size: int, out_dir: str | Path) -> Path:
    """Train a small LLaMA-style sentencepiece model (BPE, byte fallback); the same texts give the same file.

    Args:
        texts: what the tokenizer shall spell well, any number of strings.
        vocab_size: pieces of the base vocabulary, before MedPLIB's own tokens; at least 300.
        out_dir: folder for ``tokenizer.model``, made if absent.

    Returns:
        Path of the written file; ``build_tokenizer`` takes it or its folder.

    Raises:
        MedPLIBError: the texts are too few or too uniform for so many pieces.
    """
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=written,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentence_length=1 << 20,
            shuffle_input_sentence=False,
            num_threads=1,  # with more, ties between merges may fall differently
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise MedPLIBError(
            f"no tokenizer of {vocab_size} pieces can be trained on {len(lines)} lines ({reason}); "
            "give more text or ask for another size"
        ) from error
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{MODEL_FILE}.part"
    temporary.write_bytes(written.getvalue())
    return temporary.replace(folder / MODEL_FILE)


_OPENING = tuple("([{\"'“‘")
_CLOSING = re.compile(r"[.,;:!?)\]}\"'”’%]")


def decode_answer(tokenizer: PreTrainedTokenizerFast, ids: Iterable[int]) -> str:
    """The text that answer ids spell, as it was before it was tokenised.

    Ends at the first ``</s>``; ``<s>`` and padding are dropped. Tokenising removed the whitespace around added tokens;
    here they stand apart from words and close to punctuation ("… is <SEG>."), which undoes it for ordinary writing.

    Args:
        ids: token ids; placeholders (negative) are skipped.
    """
    added = tokenizer.get_added_vocab()
    names = {token_id: token for token, token_id in added.items()}
    dropped = {tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    text = ""
    run: list[int] = []

    def flush() -> None:
        nonlocal text, run
        if run:
            piece = tokenizer.backend_tokenizer.decode(run, skip_special_tokens=False)
            # runs end at added tokens, so whatever stands before this one ends with such a token
            text += f" {piece}" if text and not _CLOSING.match(piece) else piece
            run = []

    for token_id in map(int, ids):
        if token_id == tokenizer.eos_token_id:
            break
        if token_id < 0 or token_id in dropped:
            continue
        if token_id not in names:
            run.append(token_id)
            continue
        spelled = bool(run)
        flush()
        apart = spelled and text and not text.endswith((*_OPENING, " ", "\n"))
        text += f" {names[token_id]}" if apart else names[token_id]
    flush()
    return text.rstrip("\ufffd").strip()
