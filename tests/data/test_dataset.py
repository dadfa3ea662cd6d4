from __future__ import annotations

import logging
import pickle
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from model.data.dataset import MedPLIBDataset, MixedDataset, load_sample
from model.data.sampling import ResumableSampler
from model.data.validate import check_file
from model.errors import MedPLIBError
from model.processing.processor import MedPLIBProcessor, ProcessorSettings
from model.processing.tokens import build_tokenizer


@dataclass
class Echo:
    """Stands for the processor: gives back what it was given, with one draw of the randomness."""

    def encode(self, turns: Any, images: Any, *args: Any, **options: Any) -> dict[str, Any]:
        return {
            "text": [turn.text for turn in turns],
            "images": [image.shape for image in images],
            "draw": int(options["rng"].integers(1 << 30)),
            **{name: options[name] for name in ("regions", "region_images", "masks", "segment_image", "training")},
        }


def open_dataset(folder: Any, records: list[Any], name: str = "data.json", **options: Any) -> MedPLIBDataset:
    options = {"training": True, **options}
    return MedPLIBDataset(folder.write_records(records, name), folder.root, Echo(), **options)


def test_items_reach_the_processor_with_their_pixels(folder: Any) -> None:
    dataset = open_dataset(folder, [folder.vqa(), folder.region(), folder.grounding()])
    assert len(dataset) == 3
    assert dataset.tasks == ["vqa", "region", "grounding"]
    vqa, region, grounding = (dataset[index] for index in range(3))
    assert vqa["images"] == [(12, 16, 3)]
    assert vqa["masks"] == vqa["regions"] == ()
    assert region["text"][0] == "<image>\nWhat is in <region></region>?"
    assert (region["region_images"], region["regions"][0].shape) == ((0,), (12, 16))
    assert grounding["text"][1] == "Sure, it is <SEG>."
    assert (grounding["masks"][0].sum(), grounding["segment_image"], grounding["training"]) == (30, 0, True)
    assert dataset.sample(1).task == "region"
    loaded = load_sample(dataset.sample(2))
    assert loaded.images[0].dtype == np.uint8
    assert loaded.masks[0].dtype == np.bool_
    assert loaded.turns == loaded.sample.turns
    with pytest.raises(IndexError):
        dataset[3]


def test_a_second_read_is_the_same(folder: Any) -> None:
    dataset = open_dataset(folder, [folder.grounding()])
    first, second = dataset[0], dataset[0]
    assert first["text"] == second["text"]
    assert np.array_equal(first["masks"][0], second["masks"][0])
    assert first["draw"] == second["draw"]


def test_randomness_depends_on_seed_epoch_and_record_alone(folder: Any) -> None:
    records = [folder.vqa() for _ in range(4)]
    dataset = open_dataset(folder, records, seed=3)
    draws = [dataset[index]["draw"] for index in range(4)]
    assert len(set(draws)) == 4
    assert [dataset[index]["draw"] for index in (3, 1, 2, 0)] == [draws[index] for index in (3, 1, 2, 0)]
    dataset.set_epoch(1)
    assert set(draws).isdisjoint(dataset[index]["draw"] for index in range(4))
    assert open_dataset(folder, records, seed=4)[0]["draw"] != draws[0]
    bad_first = [folder.vqa(image="none.png"), *records[1:]]
    skipping = open_dataset(folder, bad_first, seed=3, on_bad_record="skip")
    assert [skipping[index]["draw"] for index in range(3)] == draws[1:]


def test_loader_workers_see_the_epoch_and_read_alike(folder: Any) -> None:
    dataset = open_dataset(folder, [folder.vqa() for _ in range(12)])
    sampler = ResumableSampler(np.zeros(len(dataset)), seed=0, batch_size=4)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=2, collate_fn=list, persistent_workers=True)
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        read = [item["draw"] for batch in loader for item in batch]
        assert read == [dataset[index]["draw"] for batch in sampler for index in batch]
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy[5]["draw"] == dataset[5]["draw"]


def test_bad_records_are_refused_with_their_numbers(folder: Any) -> None:
    records = [folder.vqa(), folder.vqa(image="images/none.png"), folder.record("<image>?", "<SEG>", id="x")]
    with pytest.raises(MedPLIBError) as caught:
        open_dataset(folder, records)
    for part in (
        "2 of 3 records",
        "record 1 (r): missing_image",
        "record 2 (x): seg_without_mask",
        "--on-bad-record skip",
    ):
        assert part in str(caught.value)


def test_bad_records_are_skipped_and_counted_on_demand(folder: Any, caplog: pytest.LogCaptureFixture) -> None:
    records = [folder.vqa(image="images/none.png"), folder.vqa(id="a"), folder.vqa(id="b", image=folder.image[:-4])]
    with caplog.at_level(logging.WARNING):
        dataset = open_dataset(folder, records, on_bad_record="skip")
    assert (len(dataset), dataset.skipped, dataset.repaired) == (2, 1, 1)
    assert [dataset.sample(index).id for index in range(2)] == ["a", "b"]
    assert "1 of 3 records are unusable" in caplog.text
    with pytest.raises(MedPLIBError, match="no usable record"):
        open_dataset(folder, records[:1], on_bad_record="skip")


def damaged(folder: Any) -> list[Any]:
    """Records whose files exist but do not fit: found only by decoding."""
    (folder.root / "images/damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n junk")
    folder.write_mask("masks/empty.png", box=(0, 0, 0, 0))
    folder.write_mask("masks/small.png", size=(5, 5))
    answers = [f"<SEG><mask>masks/{name}.png</mask>" for name in ("empty", "small")]
    return [
        folder.vqa(image="images/damaged.png"),
        *(folder.record("<image>\nSegment it.", answer) for answer in answers),
        folder.vqa(),
    ]


def test_damaged_files_stop_training_or_give_way(folder: Any) -> None:
    records = damaged(folder)
    strict = open_dataset(folder, records)
    for index, word in enumerate(("not a readable image", "no foreground", "same size")):
        with pytest.raises(MedPLIBError, match=f"record {index} .*{word}"):
            strict[index]
    lenient = open_dataset(folder, records, on_bad_record="skip")
    assert lenient.skipped == 0
    loader = DataLoader(lenient, batch_size=2, num_workers=2, collate_fn=list)
    assert [item["text"][1] for batch in loader for item in batch] == ["CT"] * 4
    assert lenient.skipped == 3  # noted by the workers, told by the main process


def test_in_context_records_and_wrong_options_are_refused(folder: Any) -> None:
    shown = {
        "image": folder.other,
        "target_mask": folder.mask,
        "icl_examples": [{"image": folder.image, "mask": folder.mask}],
    }
    with pytest.raises(MedPLIBError, match="in_context"):
        open_dataset(folder, [shown])
    with pytest.raises(MedPLIBError, match="refuse or skip"):
        open_dataset(folder, [folder.vqa()], on_bad_record="ignore")
    with pytest.raises(MedPLIBError, match="does not exist"):
        MedPLIBDataset(folder.write_records([folder.vqa()]), folder.root / "none", Echo(), training=True)


def test_a_mixture_keeps_its_parts_apart_and_weighs_them(folder: Any) -> None:
    small = open_dataset(folder, [folder.grounding(id=f"g{number}") for number in range(2)], "a.json")
    large = open_dataset(folder, [folder.vqa(id=f"v{number}") for number in range(6)], "b.json")
    mixture = MixedDataset([small, large], shares=[1, 1])
    assert len(mixture) == 8
    assert [mixture.sample(index).id for index in (0, 1, 2, 7, -1)] == ["g0", "g1", "v0", "v5", "v5"]
    assert mixture.tasks == ["grounding"] * 2 + ["vqa"] * 6
    assert mixture.weights is not None
    assert mixture.weights[:2].sum() == pytest.approx(0.5)
    assert mixture[3]["text"][1] == "CT"
    before = mixture[0]["draw"]
    mixture.set_epoch(2)
    assert mixture[0]["draw"] != before
    assert MixedDataset([small, large]).weights is None
    with pytest.raises(IndexError):
        mixture[8]
    for wrong in ([1.0], [0, 0], [-1, 2]):
        with pytest.raises(MedPLIBError, match="shares"):
            MixedDataset([small, large], shares=wrong)
    with pytest.raises(MedPLIBError, match="at least one"):
        MixedDataset([])


def test_epoch_is_an_integer_tensor_shared_between_processes(folder: Any) -> None:
    dataset = open_dataset(folder, [folder.vqa()])
    assert all(value.is_shared() for value in vars(dataset).values() if isinstance(value, torch.Tensor))


def test_records_the_processor_refuses_are_named_or_skipped(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Echo.encode

    def refuse_long(self: Echo, turns: Any, *args: Any, **options: Any) -> Any:
        if "too long" in turns[1].text:
            raise MedPLIBError("the text is too long")
        return plain(self, turns, *args, **options)

    monkeypatch.setattr(Echo, "encode", refuse_long)
    records = [folder.record("<image>?", "far too long", id="long"), folder.vqa()]
    with pytest.raises(MedPLIBError, match=r"record 0 \(long\): the text is too long"):
        open_dataset(folder, records)[0]
    lenient = open_dataset(folder, records, on_bad_record="skip")
    assert (lenient[0]["text"][1], lenient.skipped) == ("CT", 1)


def test_shortened_answers_are_counted(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a loader process cut them."""
    cut = SimpleNamespace(truncated=True)
    monkeypatch.setattr(Echo, "encode", lambda self, turns, *args, **options: cut if "long" in turns[1].text else None)
    dataset = open_dataset(folder, [folder.record("<image>?", "very long"), folder.vqa(), folder.vqa()])
    assert not dataset.shortened.any()
    list(DataLoader(dataset, num_workers=1, collate_fn=list))
    assert MixedDataset([dataset, dataset]).shortened.tolist() == [True, False, False] * 2


def test_the_sample_data_set_goes_all_the_way_to_batches(golden: Path) -> None:
    """Every record in the project's own sample set through the real processor, and into one padded batch each kind."""
    root = Path(__file__).resolve().parents[2] / "data" / "sample"
    processor = MedPLIBProcessor(
        build_tokenizer(golden / "2_tokenize" / "tokenizer_saved_by_upstream"), ProcessorSettings()
    )
    for task in ("vqa", "region", "grounding"):
        report = check_file(root / f"{task}.json", root)
        assert report.ok, report.format()
        dataset = MedPLIBDataset(report.path, root, processor, training=True)
        assert set(dataset.tasks) == {task}
        items = [dataset[index] for index in range(0, len(dataset), max(len(dataset) // 4, 1))]
        batch = processor.collate(items)
        assert len(batch["input_ids"]) == len(items)
        assert (batch["region_masks"].shape[0] > 0) == (task == "region")
        assert any(len(masks) for masks in batch["mask_targets"]) == (task == "grounding")
