"""A checkpoint is found where people point at it, and its config.json is read as they have it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoint import load, load_with_report, save
from model.checkpoint.directories import checkpoint_name, read_settings, resolve
from model.errors import MedPLIBError
from tests.checkpoint.conftest import assert_same_weights


def cached(hub: Path, name: str, commits: tuple[str, ...] = ("1234abcd",), main: str | None = "1234abcd") -> Path:
    """A repository of the Hugging Face cache, its files links to blobs; gives its first snapshot."""
    repository = hub / f"models--{name.replace('/', '--')}"
    (repository / "blobs").mkdir(parents=True)
    for commit in commits:
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "blobs" / commit).write_text(json.dumps({"commit": commit}))
        (repository / "snapshots" / commit / "config.json").symlink_to(f"../../blobs/{commit}")
    if main:
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(main)
    return repository / "snapshots" / commits[0]


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


# --- where it lies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value", "hub"),
    [
        ("HF_HUB_CACHE", "hub", "hub"),
        ("TRANSFORMERS_CACHE", "old", "old"),
        ("HF_HOME", "hf", "hf/hub"),
        ("XDG_CACHE_HOME", "xdg", "xdg/huggingface/hub"),
        (None, None, "home/.cache/huggingface/hub"),
    ],
)
def test_hub_names_are_looked_up_in_the_local_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None, value: str | None, hub: str
) -> None:
    snapshot = cached(tmp_path / hub, "openai/clip-vit-large-patch14-336")
    if variable:
        monkeypatch.setenv(variable, str(tmp_path / str(value)))
    for spelling in ("openai/clip-vit-large-patch14-336", Path("openai/clip-vit-large-patch14-336")):
        assert resolve(spelling) == snapshot
    assert checkpoint_name("openai/clip-vit-large-patch14-336") == "clip-vit-large-patch14-336"
    assert read_settings(snapshot) == {"commit": "1234abcd"}


def test_revisions_of_a_cached_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    first = cached(tmp_path, "a/two", ("aaaa1111", "bbbb2222"), main="bbbb2222")
    (tmp_path / "models--a--two" / "refs" / "v1.0").write_text("aaaa1111")
    assert resolve("a/two").name == "bbbb2222"
    assert resolve("a/two@v1.0") == resolve("a/two@aaaa") == resolve(first) == first
    assert resolve("a/two@other") == Path("a/two@other")
    assert resolve(tmp_path / "models--a--two").name == "bbbb2222"  # the repository itself, as people copy it
    assert resolve(cached(tmp_path, "a/one", main=None).parents[1]).name == "1234abcd"
    cached(tmp_path, "a/many", ("aaaa", "bbbb"), main=None)
    assert resolve("a/many") == Path("a/many")  # nothing says which
    with pytest.raises(MedPLIBError, match="no local Hugging Face cache"):
        read_settings(resolve("a/many"))


def test_a_directory_that_is_there_wins_over_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    cached(tmp_path / "hub", "a/b")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert resolve("a/b") == Path("a/b")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/liver/merged", "liver"),
        ("runs/liver", "liver"),
        ("runs/stage4/checkpoint-700", "stage4_checkpoint-700"),
        ("runs/stage4/checkpoints/step_0000007", "stage4_step_0000007"),
        ("nano", "nano"),
    ],
)
def test_a_checkpoint_is_called_after_its_run(tmp_path: Path, path: str, name: str) -> None:
    (tmp_path / "runs" / "liver" / "merged").mkdir(parents=True)
    (tmp_path / "runs" / "liver" / "merged" / "config.json").write_text("{}")
    assert checkpoint_name(tmp_path / path) == name


def test_a_run_folder_loads_as_its_network(make, tmp_path: Path) -> None:
    model, processor = make()
    save(model, processor, tmp_path / "run" / "merged")
    (tmp_path / "run" / "recipe.yaml").write_text("stage: 3\n")
    assert_same_weights(load(tmp_path / "run")[0], model)


@pytest.mark.parametrize("path", ["\0", "x" * 5000, ".", "", "a/b/c", "org/name@", "/dev/null", "~/nothing"])
def test_odd_paths_come_back_as_they_are(path: str) -> None:
    assert resolve(path) == Path(path)


def test_looking_for_a_directory_needs_no_torch() -> None:
    code = "import sys, model.checkpoint.directories; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


# --- its config.json ------------------------------------------------------------------------------------------------


def edited(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    settings = json.loads((folder / "config.json").read_text())
    change(settings)
    (folder / "config.json").write_text(json.dumps(settings))


def steer(settings: dict[str, Any]) -> None:
    for section in (settings, settings["text_config"], settings["vision_config"], settings["sam_config"]):
        section |= {"attn_implementation": "evil/kernels", "_attn_implementation": "eager", "auto_map": {"A": "b--c"}}
        section |= {"output_attentions": True, "per_layer_config": {"0": {"hidden_size": 3}}, "dtype": None}


def blank(settings: dict[str, Any]) -> None:
    settings |= dict.fromkeys(("loss", "in_context", "vision_select_layer", "vision_select_feature"))
    settings["moe"] |= dict.fromkeys(("top_k", "capacity_factor"))
    settings["mask"] |= dict.fromkeys(("geometry", "threshold"))
    settings["text_config"] |= dict.fromkeys(("rms_norm_eps", "hidden_act", "num_key_value_heads"))


@pytest.mark.parametrize("change", [steer, blank])
def test_nulls_mean_defaults_and_a_file_steers_nothing(make, tmp_path: Path, change: Any) -> None:
    model, processor = make()
    save(model, processor, tmp_path / "native")
    edited(tmp_path / "native", change)
    loaded, _ = load(tmp_path / "native", attention="sdpa")
    assert_same_weights(loaded, model)
    assert loaded.model.decoder.config._attn_implementation == "sdpa"
    assert loaded.config.to_dict()["mask"] == model.config.to_dict()["mask"]
    ids = torch.arange(1, 9)[None]
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_read(make, tmp_path: Path, encoding: str) -> None:
    """As editors on Windows and PowerShell write them, in every JSON file of a checkpoint."""
    model, processor = make()
    save(model, processor, tmp_path / "native", max_shard=2000)
    (tmp_path / "native" / "tokenizer.model").unlink()
    for path in (tmp_path / "native").glob("*.json"):
        path.write_text(path.read_text(encoding="utf-8"), encoding=encoding)
    loaded, read, report = load_with_report(tmp_path / "native")
    assert_same_weights(loaded, model)
    assert read.settings == processor.settings
    assert not report.notes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "not JSON"),
        (b'{"a":' * 900 + b"1" + b"}" * 900, "config"),
        (b'{"model_type": "medplib", "rope_theta": NaN}', "NaN is no number"),
        (b'{"x": -Infinity}', "-Infinity is no number"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"", "not JSON"),
    ],
)
def test_broken_settings_are_one_sentence(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(MedPLIBError, match=message) as raised:
        load(tmp_path)
    assert "\n" not in str(raised.value)


# --- directories that are none --------------------------------------------------------------------------------------


def pipe(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    socket.socket(socket.AF_UNIX).bind(str(path))


def loop(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("make_it", [pipe, unix_socket, Path.mkdir, loop, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.model", "sam.pth"])
def test_what_is_no_file_is_never_opened(make, tmp_path: Path, name: str, make_it: Callable[[Path], None]) -> None:
    folder = tmp_path / "n"
    save(*make(), folder)
    for path in folder.glob("tokenizer.json" if name == "tokenizer.model" else name):
        path.unlink()
    (folder / name).unlink(missing_ok=True)
    make_it(folder / name)
    if name == "sam.pth":
        from model.checkpoint.pretrained import read_sam

        with pytest.raises(MedPLIBError, match=r"is no file|does not exist"):
            read_sam(folder / name)
        return
    with pytest.raises(MedPLIBError, match=r"holds no (weights .*left unread|config|tokenizer)") as raised:
        load(folder)
    assert "\n" not in str(raised.value)
