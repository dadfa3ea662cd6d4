from __future__ import annotations

import pickle
from collections import Counter
from typing import Any

import numpy as np
import pytest

from model.data.augmentation import AugmentationConfig
from model.data.dataset import MedPLIBDataset, MixedDataset
from model.errors import MedPLIBError
from tests.data.test_augmentation import Pixels

MASK2 = "masks/second.png"


def files(folder: Any) -> tuple[list[Any], list[Any]]:
    """Two files about one image, one record each about another image and about none."""
    folder.write_mask(MASK2, box=(0, 0, 6, 16))
    first = [folder.vqa(), folder.region(), folder.record("<image>\nIs it a kidney?", "No.")]
    second = [
        folder.grounding(),
        folder.record("<image>\nSegment the lung.", f"<SEG> here.<mask>{MASK2}</mask>"),
        folder.record(f"Is <region>{MASK2}</region> a lung? <image>", "Yes."),
        folder.vqa(image=folder.other),
        {"id": "t", "conversations": folder.record("Is the liver an organ?", "Yes.")["conversations"]},
    ]
    return first, second


def packed(
    folder: Any, turns: int = 4, weights: Any = None, longest: int | None = None, **options: Any
) -> MixedDataset:
    parts = [
        MedPLIBDataset(
            folder.write_records(records, f"{n}.json"), folder.root, Pixels(), **{"training": True, **options}
        )
        for n, records in enumerate(files(folder))
    ]
    data = MixedDataset(parts)
    data.pack(turns, weights, longest, 0)
    return data


def questions(item: Any) -> list[str]:
    return [text.replace("<image>\n", "").replace(" <image>", "") for text in item["text"][::2]]


def test_conversations_hold_one_to_n_questions_about_one_image(folder: Any) -> None:
    data = packed(folder)
    sizes, opened, places = Counter(), Counter(), Counter()
    for epoch in range(60):
        data.set_epoch(epoch)
        for index in range(6):
            item = data[index]
            asked = questions(item)
            own = questions({"text": [turn.text for turn in data.sample(index).turns]})[0]
            assert own in asked and len(set(zip(asked, item["text"][1::2], strict=True))) == len(asked) <= 4
            assert len(item["images"]) == 1 and sum("<image>" in text for text in item["text"]) == 1
            assert "<image>" in item["text"][0]
            assert item["segment_image"] == 0 and item["region_images"] == (0,) * len(item["regions"])
            sizes[len(asked)] += 1
            places[asked.index(own)] += len(asked) == 4
            opened[asked[0]] += 1
        assert [len(questions(data[index])) for index in (6, 7)] == [1, 1]
    assert set(sizes) == {1, 2, 3, 4} and min(sizes.values()) > 60  # of 360, 90 expected
    assert set(opened) and min(places[place] for place in range(4)) > 8


def test_masks_and_regions_keep_the_order_of_the_text(folder: Any) -> None:
    data = packed(folder)
    small, large = data.load(3).masks[0], data.load(4).masks[0]
    both = 0
    for epoch in range(40):
        data.set_epoch(epoch)
        item = data[3]
        text = " ".join(item["text"])
        places = [(text.find(answer), mask) for answer, mask in (("it is <SEG>", small), ("<SEG> here", large))]
        expected = [mask for place, mask in sorted(places, key=lambda pair: pair[0]) if place >= 0]
        assert [mask.tolist() for mask in item["masks"]] == [mask.tolist() for mask in expected]
        marked = [(text.find(word), mask) for word, mask in (("What is in <", small), ("Is <region>", large))]
        shown = [mask for place, mask in sorted(marked, key=lambda pair: pair[0]) if place >= 0]
        assert [mask.tolist() for mask in item["regions"]] == [mask.tolist() for mask in shown]
        both += len(expected) == 2
    assert both > 5


def test_items_are_the_same_however_they_are_read(folder: Any) -> None:
    data, other = packed(folder), packed(folder)
    assert [other[index]["text"] for index in reversed(range(8))] == [data[index]["text"] for index in range(8)][::-1]
    assert pickle.loads(pickle.dumps(data))[3]["text"] == data[3]["text"]
    whole = [data[index]["text"] for index in range(8)]
    data.set_epoch(1)
    assert [data[index]["text"] for index in range(8)] != whole


def test_one_turn_is_the_record_alone(folder: Any) -> None:
    data, plain = packed(folder, turns=1), MixedDataset(packed(folder).datasets)
    for dataset in plain.datasets:
        dataset.conversation = None
    for index in range(8):
        assert len(questions(data[index])) == 1 and data[index]["draw"] == plain[index]["draw"]


def test_weights_and_length_choose_the_further_questions(folder: Any) -> None:
    rare = np.array([1, 0, 1, 1, 0, 1, 1, 1], float)
    data = packed(folder, weights=rare)
    met = Counter()
    for epoch in range(40):
        data.set_epoch(epoch)
        met.update(questions(data[0]))
    assert not {"What is in <region></region>?", "Segment the lung."} & set(met)
    assert {"Is it a kidney?", "Segment the liver.", "Is <region></region> a lung?"} <= set(met)
    short = packed(folder, longest=100)
    short.datasets[0].tokens[:] = short.datasets[1].tokens[:] = 40
    short.tokens[:] = 40
    short.pack(4, None, 100, 0)
    lengths = set()
    for epoch in range(20):
        short.set_epoch(epoch)
        lengths.add(len(questions(short[0])))
    assert lengths == {1, 2}


def test_no_question_comes_twice(folder: Any) -> None:
    again = [folder.vqa() for _ in range(5)]
    again.append(folder.record("<image>\n which MODALITY  is this?", "CT."))
    data = MixedDataset([MedPLIBDataset(folder.write_records(again), folder.root, Pixels(), training=True)])
    data.pack(4, None, None, 0)
    assert all(len(questions(data[index])) == 1 for index in range(6))


def test_a_damaged_companion_leaves_the_record_alone(folder: Any) -> None:
    data = packed(folder, on_bad_record="skip")
    (folder.root / MASK2).write_bytes((folder.root / MASK2).read_bytes()[:30])
    seen = Counter()
    for epoch in range(20):
        data.set_epoch(epoch)
        seen.update(questions(data[0]))
    assert "Segment the lung." not in seen and len(seen) > 2 and data.datasets[0].skipped == 0
    strict = packed(folder)
    (folder.root / MASK2).write_bytes((folder.root / MASK2).read_bytes()[:30])
    with pytest.raises(MedPLIBError, match=r"0\.json, record 0"):
        for epoch in range(20):
            strict.set_epoch(epoch)
            strict[0]


def test_one_change_of_the_picture_serves_the_whole_conversation(folder: Any) -> None:
    flip = AugmentationConfig(horizontal_flip=(1,))
    data = packed(folder, augmentation=flip)
    plain = packed(folder)
    image = data.load(0).images[0]
    masks = {text: data.load(index).masks[0] for index, text in ((3, "it is <SEG>"), (4, "<SEG> here"))}
    for epoch in range(10):
        data.set_epoch(epoch)
        plain.set_epoch(epoch)
        item = data[3]
        assert item["text"] == plain[3]["text"]
        assert np.array_equal(item["pixels"][0], image[:, ::-1])
        wanted = [masks[name] for answer in item["text"][1::2] for name in masks if name in answer]
        assert all(np.array_equal(m, w[:, ::-1]) for m, w in zip(item["masks"], wanted, strict=True))


def test_one_question_about_sides_forbids_flips_for_all(folder: Any) -> None:
    sided = [folder.grounding(), folder.record("<image>\nIs the liver on the left?", "Yes.")]
    flip = AugmentationConfig(horizontal_flip=(1,))
    path = folder.write_records(sided)
    data = MixedDataset([MedPLIBDataset(path, folder.root, Pixels(), training=True, augmentation=flip)])
    data.pack(2, None, None, 0)
    image, flipped = data.load(0).images[0], Counter()
    for epoch in range(20):
        data.set_epoch(epoch)
        item = data[0]
        together = len(questions(item)) == 2
        assert np.array_equal(item["pixels"][0], image if together else image[:, ::-1])
        flipped[together] += 1
    assert min(flipped[True], flipped[False]) > 2
