"""The feature cache: what is learnt from it is what is learnt from pixels, and its folder survives whatever happens."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed

from model.checkpoint import load
from model.data import features as stored
from model.data.features import FeatureStore
from model.errors import MedPLIBError
from model.train import Recipe, recipe_from, run
from model.train import datasets as filling
from model.train.datasets import cached_features, open_dataset
from model.train.distributed import Process
from model.train.init_weights import starting_network


def losses(recipe: Recipe) -> list[float]:
    return [json.loads(line)["loss"] for line in (recipe.folder / "metrics.jsonl").read_text().splitlines()]


def files(cache: Path, tower: str = "") -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.is_file() and path.relative_to(cache).parts[0] > tower)


@pytest.fixture
def data(phantoms: Path, tmp_path: Path) -> Path:
    """Phantoms of this test's own, a question without an image among them."""
    folder = tmp_path / "data"
    shutil.copytree(phantoms, folder)
    turns = [{"from": "human", "value": "Is the liver an organ?"}, {"from": "gpt", "value": "yes"}]
    text = [{"id": f"text{number}", "conversations": turns} for number in range(6)]
    (folder / "text.json").write_text(json.dumps(text))
    return folder


@pytest.fixture
def make(values: Any, data: Path, tmp_path: Path) -> Any:
    """A recipe of stage II on this test's phantoms: ``make(name, cache, **sections)``."""

    def recipe(name: str, cache: str | Path = "", **sections: Any) -> Recipe:
        given = {
            "train": [str(data / f"{kind}.json") for kind in ("grounding", "region", "vqa", "text")],
            "images": str(data),
            "feature_cache": str(cache),
        }
        chosen = {**values(2)["data"], **given, **sections.pop("data", {})}
        schedule = {"batch_size": 1, "accumulation": 2, "max_steps": 6, **sections.pop("schedule", {})}
        return recipe_from(values(2, data=chosen, schedule=schedule, output=str(tmp_path / name), **sections))

    return recipe


def test_nothing_but_the_work_changes(make: Any, tmp_path: Path, data: Path) -> None:
    """Losses and weights are those of pixels to the last bit, and pixels are not needed any more."""
    shared = {"trainable": ["lm_head", "projector", "region_adapter", "mask_decoder", "mask_head"]}
    plain, cached = make("plain", **shared), make("cached", tmp_path / "cache", **shared, data={"workers": 2})
    run(plain)
    run(cached)
    assert losses(cached) == losses(plain)
    expected = load(plain.merged)[0].state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in load(cached.merged)[0].state_dict().items())

    kept = {path: path.stat().st_mtime_ns for path in files(tmp_path / "cache")}
    for image in (data / "images").iterdir():  # blackened, unnoticed
        before = image.stat()
        image.write_bytes(bytes(before.st_size))
        os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    again = make("again", tmp_path / "cache", **shared)
    run(again)
    assert losses(again) == losses(plain)
    assert {path: path.stat().st_mtime_ns for path in files(tmp_path / "cache")} == kept


def test_batches_learn_alike_but_for_rounding(make: Any, tmp_path: Path) -> None:
    """SAM's encoder rounds otherwise in other company, with the cache and without."""
    larger = {"schedule": {"batch_size": 4, "accumulation": 1, "max_steps": 4}}
    plain, cached = make("plain", **larger), make("cached", tmp_path / "cache", **larger)
    run(plain)
    run(cached)
    assert losses(cached) == pytest.approx(losses(plain), rel=1e-5)


def test_what_learns_is_not_kept(make: Any, tmp_path: Path) -> None:
    for part in ("vision_tower", r"re:model\.vision_tower\..*bias"):
        with pytest.raises(MedPLIBError, match="vision_tower"):
            run(make("clip", tmp_path / "cache", trainable=[part]))
    adapters = {"trainable": ["sam_adapters", "mask_head"], "schedule": {"max_steps": 3}}
    plain, cached = make("plain", **adapters), make("cached", tmp_path / "cache", **adapters)
    run(plain)
    run(cached)
    assert losses(cached) == losses(plain)
    assert {path.parts[0][:4] for path in (p.relative_to(tmp_path / "cache") for p in files(tmp_path / "cache"))} == {
        "clip"
    }


def test_other_weights_pixels_and_images_are_kept_apart(make: Any, tmp_path: Path, data: Path, values: Any) -> None:
    cache = tmp_path / "cache"
    recipe = make("first", cache)

    def fill() -> set[str]:
        network, processor = starting_network(recipe)
        if changed:
            changed.pop()(network, processor)
        dataset = open_dataset(recipe, processor, training=True)
        assert cached_features(recipe, network, processor, dataset, Process(0, 1, torch.device("cpu"))) is not None
        return {str(path.relative_to(cache)) for path in files(cache)}

    def other_weights(network: Any, processor: Any) -> None:
        network.model.vision_tower.clip.pre_layrnorm.weight.data[0] += 1

    def other_pixels(network: Any, processor: Any) -> None:
        from dataclasses import replace

        processor.settings = replace(processor.settings, clip_mean=(0.1, 0.2, 0.3))

    changed: list[Any] = []
    first = fill()
    images = len(list((data / "images").iterdir()))
    assert sum(name.startswith("clip") for name in first) == images
    assert 0 < sum(name.startswith("sam") for name in first) <= images
    assert fill() == first
    for change in (other_weights, other_pixels):
        changed.append(change)
        known = {str(path.relative_to(cache)) for path in files(cache)}
        new = fill() - known
        assert len(new) == images and all(name.startswith("clip") for name in new)
    os.utime(next((data / "images").iterdir()))
    assert 1 <= len(fill() - {str(name) for name in known} - new) <= 2


def test_changed_or_missing_image_is_reported(make: Any, tmp_path: Path, data: Path) -> None:
    recipe = make("first", tmp_path / "cache")
    network, processor = starting_network(recipe)
    dataset = open_dataset(recipe, processor, training=True)
    dataset.use_features(cached_features(recipe, network, processor, dataset, Process(0, 1, torch.device("cpu"))))
    path = dataset.sample(0).images[0]
    os.utime(path, (1, 1))
    with pytest.raises(MedPLIBError, match=r"grounding\.json, record 0 .*does not know .* changed since"):
        dataset[0]
    for file in files(tmp_path / "cache"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(MedPLIBError, match="is damaged"):
        dataset[len(dataset) - 7]
    fresh = cached_features(recipe, network, processor, dataset, Process(0, 1, torch.device("cpu")))
    assert fresh is not None and fresh.clip.read(path).isfinite().all()  # what is short is made again


def test_unreadable_images_are_refused_or_left_out(make: Any, tmp_path: Path, data: Path) -> None:
    broken = sorted((data / "images").iterdir())[0]
    broken.write_bytes(broken.read_bytes()[:80])
    with pytest.raises(MedPLIBError, match=broken.name):
        run(make("refuse", tmp_path / "cache"))
    schedule = {"batch_size": 8, "accumulation": 1, "max_steps": 4}
    recipe = make("skip", tmp_path / "cache", data={"on_bad_record": "skip"}, schedule=schedule)
    assert run(recipe).is_dir()


def test_no_room_ends_in_one_sentence(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(filling.shutil, "disk_usage", lambda folder: usage(1, 1, 1000))
    with caplog.at_level(logging.INFO), pytest.raises(MedPLIBError, match=r"needs .* kB more, but .* are free"):
        run(make("small", tmp_path / "cache"))
    assert "will take about" in caplog.text
    assert not files(tmp_path / "cache")

    monkeypatch.undo()
    written = []

    def fill_up(tensors: Any, path: Path, metadata: Any) -> None:
        written.append(path)
        if len(written) > 3:
            path.write_bytes(b"some of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(stored, "save_file", fill_up)
    with pytest.raises(MedPLIBError, match=r"cannot be written \(No space left on device\)"):
        run(make("full", tmp_path / "cache"))
    assert len(files(tmp_path / "cache")) == 3
    monkeypatch.undo()
    run(make("after", tmp_path / "cache", schedule={"max_steps": 1}))  # goes on with what is there
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(MedPLIBError, match="cannot be made"):
        run(make("blocked", tmp_path / "file" / "cache"))


def _write_often(store: FeatureStore, image: Path) -> None:
    for _ in range(30):
        store.write(image, torch.full(store.shape, 7.0), (3, 4))


def test_a_reader_never_meets_half_a_file(tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    image.write_bytes(b"any")
    store = FeatureStore(tmp_path / "clip-0", (64, 256), torch.float32)
    _write_often(store, image)
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=_write_often, args=(store, image)) for _ in range(3)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert store.read(image).eq(7).all() and store.read_size(image) == (3, 4) and store.holds(image)
    for writer in writers:
        writer.join()
    assert len(files(tmp_path / "clip-0")) == 1


def _fill_as_rank(rank: int, recipe: Recipe, meeting: Path, told: Any) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    network, processor = starting_network(recipe)
    dataset = open_dataset(recipe, processor, training=True)
    process = Process(rank, 2, torch.device("cpu"))
    found = cached_features(recipe, network, processor, dataset, process)
    told.put((rank, found is not None and all(found.clip.holds(path) for path in dataset.sample(0).images)))
    distributed.destroy_process_group()


def test_two_ranks_fill_one_cache(make: Any, tmp_path: Path, data: Path) -> None:
    recipe = make("pair", tmp_path / "cache")
    spawn = multiprocessing.get_context("spawn")  # a fork could inherit a lock that a thread of the tests holds
    told = spawn.Queue()
    ranks = [spawn.Process(target=_fill_as_rank, args=(rank, recipe, tmp_path / "meeting", told)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    assert sorted(told.get(timeout=60) for _ in ranks) == [(0, True), (1, True)]
    for rank in ranks:
        rank.join()
    clip = [path for path in files(tmp_path / "cache") if "clip-" in str(path)]
    assert len(clip) == len(list((data / "images").iterdir()))
    assert all(load_file(path)["features"].isfinite().all() for path in clip)
