"""Weights are found by what exists; damaged or doubled ones are refused in a sentence."""

from __future__ import annotations

import json
import resource
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model.checkpoint.shards import find_weights, read_pickled, write_shards
from model.errors import MedPLIBError

STATE = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.zeros(1)}


def read(directory: Path) -> dict[str, torch.Tensor]:
    return dict(find_weights(directory).tensors())


def assert_same(found: dict[str, torch.Tensor]) -> None:
    assert found.keys() == STATE.keys()
    for name, value in STATE.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


@pytest.mark.parametrize("weight_format", ["safetensors", "bin"])
@pytest.mark.parametrize("max_shard", [5_000_000_000, 24])
def test_written_weights_read_back(tmp_path: Path, weight_format, max_shard: int) -> None:
    write_shards(STATE, tmp_path, weight_format, max_shard)
    files = list(tmp_path.glob(f"*.{weight_format}"))
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in files)  # others may read them
    assert (len(files) > 1) == (max_shard == 24)
    assert_same(read(tmp_path))
    assert find_weights(tmp_path).shapes() == {name: tuple(value.shape) for name, value in STATE.items()}
    assert not find_weights(tmp_path).notes


def test_index_that_names_other_files_is_overruled(tmp_path: Path) -> None:
    write_shards(STATE, tmp_path, max_shard=24)
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / "pytorch_model.bin.index.json")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(STATE, "pytorch_model-00001-of-00001.bin")}))
    assert_same(read(tmp_path))
    assert "names files" in find_weights(tmp_path).notes[0]


def test_shards_without_index_and_with_any_name(tmp_path: Path) -> None:
    save_file({"a": STATE["a"]}, tmp_path / "left.safetensors")
    save_file({"b": STATE["b"], "c": STATE["c"]}, tmp_path / "right.safetensors")
    assert_same(read(tmp_path))


def test_safetensors_win_over_bin_and_the_report_says_so(tmp_path: Path) -> None:
    write_shards(STATE, tmp_path)
    torch.save({"a": torch.zeros(9)}, tmp_path / "pytorch_model.bin")
    assert_same(read(tmp_path))
    assert "left unread" in find_weights(tmp_path).notes[0]


def test_complete_bin_wins_over_incomplete_safetensors(tmp_path: Path) -> None:
    write_shards(STATE, tmp_path, "bin")
    save_file({"a": torch.zeros(9)}, tmp_path / "model-00001-of-00002.safetensors")
    assert_same(read(tmp_path))
    assert "model-00002-of-00002.safetensors" in find_weights(tmp_path).notes[0]


def test_other_pickles_are_not_weights(tmp_path: Path) -> None:
    write_shards(STATE, tmp_path, "bin")
    torch.save({"x": torch.zeros(1)}, tmp_path / "mm_projector.bin")
    torch.save({"x": 1}, tmp_path / "training_args.bin")
    assert_same(read(tmp_path))


def test_missing_shard_is_named(tmp_path: Path) -> None:
    write_shards(STATE, tmp_path, max_shard=24)
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(MedPLIBError, match="model-00002-of-"):
        find_weights(tmp_path)


def test_two_sets_side_by_side_are_refused(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    save_file(STATE, tmp_path / "old.safetensors")
    with pytest.raises(MedPLIBError, match="remove one"):
        find_weights(tmp_path)


def test_empty_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MedPLIBError, match="holds no weights"):
        find_weights(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_damaged_files_are_one_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04 not weights at all")
    with pytest.raises(MedPLIBError, match=f"{name} cannot be read"):
        read(tmp_path)


def test_pointer_file_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(MedPLIBError, match="Git LFS"):
        read(tmp_path)


@pytest.mark.parametrize("junk", ["._model.safetensors", "._pytorch_model.bin", ".DS_Store", "._x.index.json"])
def test_what_a_mac_leaves_beside_weights_is_passed_over(tmp_path: Path, junk: str) -> None:
    write_shards(STATE, tmp_path)
    (tmp_path / junk).write_bytes(b"\0\5\26\7" + bytes(200))
    assert_same(read(tmp_path))
    assert not find_weights(tmp_path).notes


def test_compressed_archives_are_refused_unread(tmp_path: Path) -> None:
    """torch stores entries plainly; a deflated one of a few megabytes may inflate to any size."""
    torch.save(STATE, tmp_path / "plain.bin")
    with zipfile.ZipFile(tmp_path / "plain.bin") as plain, zipfile.ZipFile(tmp_path / "model.bin", "w", 8) as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, bytes(300_000_000) if entry.filename.endswith("pkl") else plain.read(entry))
    (tmp_path / "plain.bin").unlink()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(MedPLIBError, match="compressed archive"):
        read(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_an_index_names_only_its_neighbours(tmp_path: Path, file: str) -> None:
    write_shards(STATE, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(MedPLIBError, match="names weights elsewhere"):
        find_weights(tmp_path)


def header(**tensors: dict) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**62) + b"{}",
        header(a={"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}),
        header(a={"dtype": "F32", "shape": [4], "data_offsets": [0, 4]}) + bytes(4),
        header(a={"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}) + bytes(2),
        header(a={"dtype": "Q9", "shape": [1], "data_offsets": [0, 4]}) + bytes(4),
        struct.pack("<Q", 2) + b"[]",
        b"",
    ],
)
def test_lying_headers_are_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(MedPLIBError, match="cannot be read as weights"):
        find_weights(tmp_path).shapes()


def test_code_in_a_pickle_is_never_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    torch.save({"a": Bomb()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(MedPLIBError, match="cannot be read"):
        read(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_state_dict_may_be_nested(tmp_path: Path) -> None:
    torch.save({"model": STATE}, tmp_path / "sam.pth")
    assert_same(read_pickled(tmp_path / "sam.pth"))


def test_file_without_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "sam.pth")
    with pytest.raises(MedPLIBError, match="no state dict"):
        read_pickled(tmp_path / "sam.pth")


def test_absent_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(MedPLIBError, match="does not exist"):
        read_pickled(tmp_path / "sam.pth")


def test_tied_weights_are_written_whole(tmp_path: Path) -> None:
    shared = torch.arange(4.0)
    write_shards({"a": shared, "b": shared}, tmp_path)
    assert torch.equal(read(tmp_path)["b"], shared)
