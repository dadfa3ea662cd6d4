"""The tokenizer we export is the one we had, for the published code and for us."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model.checkpoint.saving import sentencepiece_model, write_published_tokenizer
from model.processing.tokens import build_tokenizer, train_tokenizer
from tests.tiny import TEXTS

AWKWARD = [
    "",
    " ",
    "  two  spaces",
    "tab\tnewline\n",
    "naïve café µm²",
    "肝臓 🫀",
    "1234 5.6",
    "<SEG> in text<SEG>.",
    "</s>",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, 330, folder)
    return build_tokenizer(folder)


def test_written_tokenizer_reads_back_the_same(tokenizer, tmp_path: Path) -> None:
    write_published_tokenizer(tokenizer, tmp_path, 2048)
    again = build_tokenizer(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    for text in [*TEXTS, *AWKWARD]:
        assert again(text).input_ids == tokenizer(text).input_ids, text


def test_rebuilt_model_is_sentencepiece_for_sentencepiece_too(tokenizer, tmp_path: Path) -> None:
    import sentencepiece

    model = tmp_path / "m.model"
    model.write_bytes(sentencepiece_model(tokenizer))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for text in TEXTS:
        assert processor.encode(text) == tokenizer(text, add_special_tokens=False).input_ids


def test_rebuilding_the_published_model_file_loses_nothing(golden: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2 as formats

    folder = golden / "4_generate" / "hf_checkpoint"
    published, ours = formats.ModelProto(), formats.ModelProto()
    published.ParseFromString((folder / "tokenizer.model").read_bytes())
    ours.ParseFromString(sentencepiece_model(build_tokenizer(folder)))

    def entries(model) -> list[tuple[str, float, int]]:
        return [(entry.piece, entry.score, entry.type) for entry in model.pieces]

    assert entries(ours) == entries(published)


def test_added_tokens_are_those_of_the_published_files(golden: Path, tmp_path: Path) -> None:
    folder = golden / "4_generate" / "hf_checkpoint"
    write_published_tokenizer(build_tokenizer(folder), tmp_path, 2048)
    for name in ("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((folder / name).read_text())
