"""Lengths that are counted without pixels are those that the network sees, and like ones make small padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.data.dataset import MedPLIBDataset
from model.data.lengths import LengthCheck, real_tokens
from model.data.sampling import ResumableSampler
from model.data.validate import check_file
from model.errors import MedPLIBError
from model.modeling.configuration import IMAGE_PLACEHOLDER
from model.modeling.splice import plan_splice
from model.processing.processor import MedPLIBProcessor, ProcessorSettings
from model.processing.tokens import build_tokenizer, train_tokenizer
from tests.tiny import TEXTS

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
