"""The tokenizer: what it adds, how it survives disk, and the way back to text."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
from transformers import PreTrainedTokenizerFast

from model.errors import MedPLIBError
from model.modeling.configuration import IMAGE_PLACEHOLDER, REGION_PLACEHOLDER
from model.processing.special_tokens import SEG_TOKEN, SPECIAL_TOKENS
from model.processing.tokens import (
    TokenCounter,
    add_special_tokens,
    build_tokenizer,
    decode_answer,
    tokenize,
    train_tokenizer,
)
from tests.tiny import TEXTS

AWKWARD = [*TEXTS, "", " ", "  a  b ", "a\n", "\na", "约 5 µm", "a<SEG> b", "x </s>y", "<im_end>\nWhat", "12,345"]


def test_added_tokens_follow_the_vocabulary_in_published_order(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(SPECIAL_TOKENS) == 267
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == list(range(330, 597))
    assert tokenizer.pad_token_id == tokenizer.unk_token_id == 0
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.padding_side) == (1, 2, "right")


def test_special_tokens_are_added_once(tokenizer: PreTrainedTokenizerFast) -> None:
    assert add_special_tokens(tokenizer) == 0


def test_ordinary_text_tokenises_as_sentencepiece_does(
    tokenizer: PreTrainedTokenizerFast, tokenizer_folder: Path
) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_folder / "tokenizer.model"))
    for text in TEXTS:
        assert tokenize(tokenizer, text).ids == [1, *reference.encode(text)]


@pytest.mark.parametrize("keep_model", [True, False])
def test_saved_and_reloaded_tokenizer_gives_the_same_ids(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, keep_model: bool
) -> None:
    tokenizer.save_pretrained(tmp_path)
    if not keep_model:
        (tmp_path / "tokenizer.model").unlink(missing_ok=True)
    again = build_tokenizer(tmp_path)
    again.save_pretrained(tmp_path)
    twice = build_tokenizer(tmp_path)
    for text in AWKWARD:
        assert tokenize(again, text) == tokenize(tokenizer, text) == tokenize(twice, text)
        assert tokenizer(text).input_ids == tokenize(tokenizer, text).ids
    assert len(twice) == len(tokenizer)


def test_training_is_repeatable_and_spells_anything(tmp_path: Path) -> None:
    first = train_tokenizer(iter(TEXTS), 320, tmp_path / "a").read_bytes()
    assert first == train_tokenizer(TEXTS, 320, tmp_path / "b").read_bytes()
    tokenizer = build_tokenizer(tmp_path / "a" / "tokenizer.model")
    ids = tokenize(tokenizer, "Ärztin 约 🫁").ids
    assert tokenizer.unk_token_id not in ids
    assert decode_answer(tokenizer, ids) == "Ärztin 约 🫁"


def test_too_little_text_for_a_vocabulary_is_told(tmp_path: Path) -> None:
    with pytest.raises(MedPLIBError, match="give more text"):
        train_tokenizer(["a b"], 5000, tmp_path)
    assert not (tmp_path / "tokenizer.model").exists()


def test_directory_without_tokenizer_and_damaged_file_are_told(tmp_path: Path) -> None:
    with pytest.raises(MedPLIBError, match=r"tokenizer\.model"):
        build_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x00nonsense")
    with pytest.raises(MedPLIBError, match="not a readable tokenizer"):
        build_tokenizer(tmp_path)


def test_placeholders_stand_for_images_and_inside_region_markers(tokenizer: PreTrainedTokenizerFast) -> None:
    begin, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<region>", "</region>"))
    ids = tokenize(tokenizer, "a <image> b <region></region> c <region> </region>").ids
    assert ids.count(IMAGE_PLACEHOLDER) == 1
    assert ids.count(REGION_PLACEHOLDER) == 1  # only the closed pair is a marker
    place = ids.index(REGION_PLACEHOLDER)
    assert ids[place - 1 : place + 2] == [begin, REGION_PLACEHOLDER, end]


@pytest.mark.parametrize(
    "answer",
    [
        "Sure, the liver is <SEG>.",
        "<SEG>",
        "<SEG> is the liver.",
        "The liver is <SEG>, the left kidney (<SEG>) and the tumour is <SEG>!",
        "<ref> liver </ref> here",
        "No.",
        "Line one.\nLine two.",
        "3.5 cm × 4 cm — 约 5 µm",
        "a  b",
        "size > 3 and < 5",
        "ratio: 12,345",
    ],
)
def test_decoding_gives_the_training_answer_back(tokenizer: PreTrainedTokenizerFast, answer: str) -> None:
    ids = tokenize(tokenizer, f"{answer}</s>").ids
    assert decode_answer(tokenizer, [*ids, 0, 0]) == answer


def test_decoding_ends_at_the_end_token_and_skips_what_is_no_text(tokenizer: PreTrainedTokenizerFast) -> None:
    yes = tokenize(tokenizer, "yes", add_bos=False).ids
    assert decode_answer(tokenizer, [1, IMAGE_PLACEHOLDER, *yes, 2, *yes]) == "yes"
    assert decode_answer(tokenizer, []) == ""


def test_a_character_cut_in_the_middle_leaves_no_rubbish(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenize(tokenizer, "5 约", add_bos=False).ids
    assert decode_answer(tokenizer, ids[:-1]) == "5"


def test_seg_is_one_token_wherever_it_stands(tokenizer: PreTrainedTokenizerFast) -> None:
    seg = tokenizer.convert_tokens_to_ids(SEG_TOKEN)
    for text in ("<SEG>", "a<SEG>b", "a <SEG> b", "(<SEG>)."):
        assert tokenize(tokenizer, text).ids.count(seg) == 1


def test_tokens_are_counted_as_they_are_made(tokenizer: PreTrainedTokenizerFast) -> None:
    count = TokenCounter(tokenizer)
    marked = [f"{text}<image>{text}<region></region> {text}<im_start><image><im_end>\n{text}" for text in AWKWARD]
    for text in [*AWKWARD, *marked, *marked]:
        assert count(text) == len(tokenize(tokenizer, text).ids)
