"""Several records about one image as one conversation, and the tokens of records."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.data.augmentation import AugmentationConfig
from model.data.dataset import MedPLIBDataset, MixedDataset
from model.data.packing import LengthCheck, real_tokens
from model.data.sampling import ResumableSampler
from model.data.validate import check_file
from model.errors import MedPLIBError
from model.modeling.configuration import IMAGE_PLACEHOLDER
from model.modeling.splice import plan_splice
from model.processing.processor import MedPLIBProcessor, ProcessorSettings
from model.processing.tokens import build_tokenizer, train_tokenizer
from tests.data.test_augmentation import Pixels
from tests.tiny import TEXTS

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


PLACES = 16  # that an image takes


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return build_tokenizer(train_tokenizer(TEXTS * 20, 330, tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize(("template", "longest"), [("llava_v1", 2048), ("llava_v1", 230), ("plain", 2048)])
def test_lengths_are_those_of_the_encoded_samples(folder: Any, tokenizer: Any, template: str, longest: int) -> None:
    several = folder.record("<image>\nAnd <image>?", "Two, in 2.5 mm.", image=[folder.image, folder.other])
    talk = folder.vqa()
    talk["conversations"] += [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "It is a CT. " * 9}]
    alone = folder.record("What is a tumour?", "A mass.")
    del alone["image"]
    records = [folder.vqa(), folder.region(), folder.grounding(), talk, several, alone]
    settings = ProcessorSettings(clip_size=28, patch_size=7, sam_size=64, template=template, max_length=longest)
    processor = MedPLIBProcessor(tokenizer, settings)
    if template == "plain":
        records = [record for number, record in enumerate(records) if number not in (1, 5)]  # it drops the questions
    path, lengths = folder.write_records(records), LengthCheck.of(processor)
    dataset = MedPLIBDataset(path, folder.root, processor, training=True, lengths=lengths)
    counted = (dataset.tokens + dataset.images * (PLACES - 1)).tolist()

    batch = processor.collate([dataset[index] for index in range(len(dataset))])
    images = int((batch["input_ids"] == IMAGE_PLACEHOLDER).sum())
    plan = plan_splice(batch["input_ids"], batch["attention_mask"], [PLACES] * images)
    assert counted == plan.attention_mask.sum(dim=1).tolist()
    assert real_tokens(batch, PLACES) == (sum(counted), plan.attention_mask.numel())
    assert bool(dataset.shortened.any()) == (longest == 230)


@pytest.mark.parametrize("template", ["llava_v1", "plain"])
def test_what_is_accepted_is_encoded_and_what_is_not_dies(folder: Any, tokenizer: Any, template: str) -> None:
    """At every length around those of the records: the check says what the encoder does."""
    two = folder.record(
        "<image>\nSegment <region></region> both.".replace("></", f">{folder.mask}</"),
        f"The liver is <SEG>.<mask>{folder.mask}</mask> And, é图😀 <SEG><mask>{folder.mask}</mask> in the end.",
    )
    records = [folder.vqa(), folder.region(), folder.grounding(), two]
    path, outcomes = folder.write_records(records), set()
    for longest in (*range(3, 60, 3), *range(150, 420, 6)):
        settings = ProcessorSettings(clip_size=28, patch_size=7, sam_size=64, template=template, max_length=longest)
        processor = MedPLIBProcessor(tokenizer, settings)
        check, dataset = LengthCheck.of(processor), MedPLIBDataset(path, folder.root, processor, training=True)
        for index in range(len(records)):
            tokens, findings = check(dataset.sample(index))
            kinds = [finding.kind for finding in findings]
            try:
                encoded = dataset[index]
            except MedPLIBError:
                assert kinds in (["too_long"], ["region_not_asked"])
            else:
                assert kinds == ["answer_cut"] * encoded.truncated and tokens == len(encoded)
            outcomes.update(kinds or ["whole"])
    assert outcomes == {"whole", "too_long", "answer_cut", *(["region_not_asked"] if template == "plain" else [])}


def test_records_too_long_are_refused_before_the_first_step(folder: Any, tokenizer: Any) -> None:
    records = [folder.vqa(), folder.record("<image>\n" + "What is it? " * 400, "CT"), folder.vqa()]
    path = folder.write_records(records)
    lengths = LengthCheck(tokenizer, "llava_v1", 400)
    report = check_file(path, folder.root, lengths=lengths)
    assert [(problem.record, problem.kind) for problem in report.problems if problem.severity == "error"] == [
        (1, "too_long")
    ]
    assert "cutting it to 400 would lose all of its answer" in report.format()
    processor = MedPLIBProcessor(tokenizer, ProcessorSettings(max_length=400))
    options: dict[str, Any] = {"training": True, "lengths": lengths}
    with pytest.raises(MedPLIBError, match=r"1 of 3 records are unusable: record 1 .*too_long"):
        MedPLIBDataset(path, folder.root, processor, **options)
    assert len(MedPLIBDataset(path, folder.root, processor, on_bad_record="skip", **options)) == 2


def like_mecovqa(count: int, text_only: float, rng: np.random.Generator) -> np.ndarray:
    """Lengths of sentences on whole images (some in several rounds), words on regions, and masks."""
    kind = rng.choice(3, count, p=[0.3, 0.35, 0.35])
    questions = rng.integers(10, 40, count)
    sentences = rng.lognormal(np.log(80), 0.5, count).clip(15, 500) * np.where(rng.random(count) < 0.05, 3, 1)
    answers = np.choose(kind, [sentences, rng.lognormal(np.log(12), 0.6, count).clip(2, 80), np.full(count, 12)])
    return (45 + questions + answers).astype(np.int64) + 576 * (rng.random(count) >= text_only)


@pytest.mark.parametrize("text_only", [0.0, 0.2])
@pytest.mark.parametrize(("batch", "world_size"), [(4, 1), (16, 4), (32, 4)])
def test_grouping_leaves_little_padding_on_any_rank(text_only: float, batch: int, world_size: int) -> None:
    lengths = like_mecovqa(30_000, text_only, np.random.default_rng(0))

    def padding(**options: Any) -> float:
        real = places = 0
        for rank in range(world_size):
            shares = {"rank": rank, "world_size": world_size, "batch_size": batch}
            rows = lengths[np.array(list(ResumableSampler(lengths, seed=0, **shares, **options)))]
            real, places = real + rows.sum(), places + (rows.max(axis=1) * batch).sum()
        return 1 - real / places

    weights = np.where(lengths > 700, 3.0, 1.0)
    assert padding(group_by_length=True) < 0.05
    assert padding(group_by_length=True, weights=weights) < 0.05
    assert padding() > 0.07


def test_ranks_of_one_step_have_batches_of_like_length() -> None:
    lengths = like_mecovqa(20_000, 0.1, np.random.default_rng(1))
    ranks = [
        ResumableSampler(lengths, seed=0, rank=rank, world_size=4, batch_size=8, group_by_length=True)
        for rank in range(4)
    ]
    longest = np.stack([lengths[np.array(list(rank))].max(axis=1) for rank in ranks])  # [ranks, steps]
    assert np.mean(1 - longest.mean(axis=0) / longest.max(axis=0)) < 0.01


def test_the_sample_sets_of_the_project_are_counted_right(golden: Path) -> None:
    root = Path(__file__).resolve().parents[2] / "data" / "sample"
    processor = MedPLIBProcessor(
        build_tokenizer(golden / "2_tokenize" / "tokenizer_saved_by_upstream"), ProcessorSettings()
    )
    lengths = LengthCheck.of(processor)
    for task in ("vqa", "region", "grounding"):
        dataset = MedPLIBDataset(root / f"{task}.json", root, processor, training=True, lengths=lengths)
        for index in range(0, len(dataset), len(dataset) // 3):
            encoded = dataset[index]
            assert (dataset.tokens[index], dataset.images[index]) == (len(encoded), len(encoded.pixel_values))
