"""The processor as training, evaluation and serving use it."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.errors import MedPLIBError
from model.modeling.configuration import IGNORE_INDEX, IMAGE_PLACEHOLDER
from model.processing.conversation import Turn
from model.processing.processor import MedPLIBProcessor, ProcessorSettings
from tests.tiny import tiny_config

ASK = [Turn("human", "<image>\nPlease segment the liver.")]
SEGMENT = [*ASK, Turn("gpt", "Sure, the liver is <SEG>.")]
REGION = [Turn("human", "<image>\nWhat is <region></region>?"), Turn("gpt", "the kidney")]


def spot(size: tuple[int, int] = (40, 60), corner: int = 10) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    mask[corner : corner + 20, corner : corner + 30] = True
    return mask


def test_sample_has_one_tensor_for_everything_forward_takes(processor: MedPLIBProcessor, image: np.ndarray) -> None:
    sample = processor.encode(SEGMENT, [image], masks=[spot()])
    assert sample.pixel_values.shape == (1, 3, 28, 28)
    assert sample.sam_pixel_values.shape == (3, 64, 64)
    assert (sample.sam_size, sample.image_size) == ((43, 64), (40, 60))
    assert sample.region_masks.shape == (0, 4, 4)
    assert sample.mask_targets is not None
    np.testing.assert_array_equal(sample.mask_targets[0].numpy(), spot())
    assert sample.labels is not None
    assert (sample.labels != IGNORE_INDEX).any()
    assert not sample.truncated


def test_prompt_is_the_same_without_answer(processor: MedPLIBProcessor, image: np.ndarray) -> None:
    prompt = processor.encode_prompt(ASK, [image])
    full = processor.encode(SEGMENT, [image], masks=[spot()])
    assert prompt.labels is None
    assert full.input_ids[: len(prompt)].equal(prompt.input_ids)
    assert prompt.pixel_values.equal(full.pixel_values)


@pytest.mark.parametrize(
    ("turns", "options", "message"),
    [
        (ASK, {"images": 0}, "1 <image> for 0 images"),
        ([Turn("human", "What?")], {}, "0 <image> for 1 images"),
        ([Turn("human", "<image>\nignore that, here is <image>")], {}, "2 <image> for 1 images"),
        (SEGMENT, {}, "1 <SEG> for 0 masks"),
        ([*ASK, Turn("gpt", "There is none.")], {"masks": [spot()]}, "0 <SEG> for 1 masks"),
        (REGION, {}, "1 <region></region> for 0 regions"),
        (REGION, {"regions": [spot((5, 5), 1)]}, "region 1 is 5×5, its image 40×60"),
        (REGION, {"regions": [np.zeros((40, 60), bool)]}, "empty"),
        (REGION, {"regions": [spot()], "region_images": [1]}, "region_images"),
        (SEGMENT, {"masks": [spot((60, 40), 1)]}, "mask 1 is 60×40"),
        (SEGMENT, {"masks": [spot()], "segment_image": 3}, "segment_image is 3 for 1 images"),
        (ASK, {"visual_kinds": ["mask"]}, "visual_kinds"),
    ],
)
def test_mismatch_of_text_and_pixels_is_one_sentence(
    processor: MedPLIBProcessor, image: np.ndarray, turns: list[Turn], options: dict, message: str
) -> None:
    images = [image] * options.pop("images", 1)
    with pytest.raises(MedPLIBError) as error:
        processor.encode(turns, images, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_question_that_names_seg_asks_for_no_mask(processor: MedPLIBProcessor, image: np.ndarray) -> None:
    turns = [Turn("human", "<image>\nWhat does <SEG> mean?"), Turn("gpt", "a mask")]
    sample = processor.encode(turns, [image])
    assert sample.mask_targets is not None
    assert sample.mask_targets.shape == (0, 40, 60)


def test_region_is_fixed_at_inference_and_random_in_training(processor: MedPLIBProcessor, image: np.ndarray) -> None:
    processor.settings = replace(processor.settings, clip_size=336, patch_size=14)
    fixed = [processor.encode(REGION, [image], [spot()]).region_masks for _ in range(2)]
    assert fixed[0].equal(fixed[1])
    drawn = [
        processor.encode(REGION, [image], [spot()], training=True, rng=np.random.default_rng(seed)).region_masks
        for seed in (1, 1, 2)
    ]
    assert drawn[0].equal(drawn[1])
    assert not drawn[0].equal(drawn[2])
    assert (drawn[0] <= fixed[0]).all()
    with pytest.raises(ValueError, match="rng"):
        processor.encode(REGION, [image], [spot()], training=True)


def test_tiny_region_is_flagged(processor: MedPLIBProcessor, image: np.ndarray) -> None:
    tiny = np.zeros((40, 60), dtype=bool)
    tiny[22, 33] = True
    sample = processor.encode_prompt(REGION[:1], [image], [tiny])
    assert sample.approximated_regions == (0,)
    assert sample.region_masks.sum() == 1
    assert processor.encode_prompt(REGION[:1], [image], [spot()]).approximated_regions == ()


def test_several_images_and_regions_keep_their_order(processor: MedPLIBProcessor, image: np.ndarray) -> None:
    turns = [
        Turn("human", "Here <image> and there <image>\nIs <region></region> like <region></region>?"),
        Turn("gpt", "no, the left is <SEG>"),
    ]
    other = np.zeros((30, 30, 3), dtype=np.uint8)
    regions, masks = [spot((30, 30), 5), spot()], [spot()]
    sample = processor.encode(turns, [image, other], regions, [1, 0], masks, segment_image=0)
    assert sample.region_image.tolist() == [1, 0]
    assert sample.image_size == (40, 60)
    assert sample.pixel_values[1].equal(processor.clip_input(other))
    assert (sample.input_ids == IMAGE_PLACEHOLDER).sum() == 2


def test_text_alone_makes_a_sample_without_images(processor: MedPLIBProcessor) -> None:
    sample = processor.encode([Turn("human", "Is a kidney left?"), Turn("gpt", "yes")])
    assert sample.pixel_values.shape == (0, 3, 28, 28)
    assert sample.sam_pixel_values.shape == (3, 64, 64)


def test_long_answer_is_flagged_as_truncated(processor: MedPLIBProcessor, image: np.ndarray) -> None:
    sample = processor.encode([*ASK, Turn("gpt", "no kidney " * 300)], [image])
    assert sample.truncated
    assert len(sample) == 400


def test_batch_is_padded_on_the_asked_side_and_counts_images_over_rows(
    processor: MedPLIBProcessor, image: np.ndarray
) -> None:
    samples = [
        processor.encode(SEGMENT, [image], masks=[spot()]),
        processor.encode([Turn("human", "Hello?"), Turn("gpt", "yes")]),
        processor.encode(REGION, [image], [spot()]),
    ]
    right, left = processor.collate(samples), processor.collate(samples, padding_side="left")
    longest = max(map(len, samples))
    for row, sample in enumerate(samples):
        length = len(sample)
        assert right["attention_mask"][row].tolist() == [1] * length + [0] * (longest - length)
        assert right["input_ids"][row, :length].equal(sample.input_ids)
        assert left["input_ids"][row, longest - length :].equal(sample.input_ids)
        assert left["attention_mask"][row].sum() == length
        assert (right["labels"][row, length:] == IGNORE_INDEX).all()
    assert right["pixel_values"].shape == (2, 3, 28, 28)
    assert right["region_image"].tolist() == [1]  # the third row's image is the second of the batch
    assert [len(targets) for targets in right["mask_targets"]] == [1, 0, 0]
    assert right["sam_sizes"] == [(43, 64), (64, 64), (43, 64)]
    assert right["image_sizes"] == [(40, 60), (64, 64), (40, 60)]
    assert "visual_kinds" not in right


def test_batch_of_prompts_has_no_labels_and_mixing_is_refused(processor: MedPLIBProcessor, image: np.ndarray) -> None:
    prompt = processor.encode_prompt(ASK, [image])
    assert {"labels", "mask_targets"}.isdisjoint(processor.collate([prompt]))
    with pytest.raises(ValueError, match="mixes"):
        processor.collate([prompt, processor.encode(SEGMENT, [image], masks=[spot()])])


def test_in_context_masks_stand_at_their_placeholders(processor: MedPLIBProcessor, image: np.ndarray) -> None:
    turns = [Turn("human", "Example <image> mask <image> query <image>"), Turn("gpt", "it is <SEG>")]
    sample = processor.encode(
        turns, [image, image], masks=[spot()], example_masks=[spot()], visual_kinds=["image", "mask", "image"]
    )
    plain = processor.encode(SEGMENT, [image], masks=[spot()])
    batch = processor.collate([plain, sample])
    assert batch["example_masks"].shape == (1, 1, 28, 28)
    assert batch["visual_kinds"] == ["image", "image", "mask", "image"]
    assert len(batch["pixel_values"]) == 3


def test_saved_processor_comes_back_whole(processor: MedPLIBProcessor, image: np.ndarray, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    again = MedPLIBProcessor.from_pretrained(tmp_path)
    assert again.settings == processor.settings
    assert again.encode_prompt(ASK, [image]).input_ids.equal(processor.encode_prompt(ASK, [image]).input_ids)
    assert MedPLIBProcessor.from_pretrained(tmp_path, template="v1").settings.template == "v1"


def test_directory_of_a_tokenizer_alone_gets_published_settings(tokenizer_folder: Path, tmp_path: Path) -> None:
    loaded = MedPLIBProcessor.from_pretrained(tokenizer_folder)
    assert loaded.settings == ProcessorSettings()
    assert (loaded.settings.clip_size, loaded.settings.grid, loaded.settings.sam_size) == (336, 24, 256)
    loaded.save_pretrained(tmp_path)
    original = (tokenizer_folder / "tokenizer.model").read_bytes()
    assert (tmp_path / "tokenizer.model").read_bytes() == original


@pytest.mark.parametrize("content", ["{", "[]", '{"clip": 3}', '{"clip_size": 0}', '{"template": "x"}'])
def test_malformed_settings_are_told(processor: MedPLIBProcessor, tmp_path: Path, content: str) -> None:
    processor.save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text(content)
    with pytest.raises(MedPLIBError, match="processor_config"):
        MedPLIBProcessor.from_pretrained(tmp_path)


def test_settings_follow_the_network(tmp_path: Path, processor: MedPLIBProcessor) -> None:
    settings = ProcessorSettings.from_config(tiny_config(), template="v1")
    assert (settings.clip_size, settings.grid, settings.sam_size, settings.template) == (28, 4, 64, "v1")
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["clip_size"] == 28


def test_threads_may_share_a_processor(processor: MedPLIBProcessor, image: np.ndarray) -> None:
    turns = [[Turn("human", f"<image>\nIs it {'a kidney ' * number}?")] for number in range(24)]
    alone = [processor.encode_prompt(one, [image]).input_ids for one in turns]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda one: processor.encode_prompt(one, [image]).input_ids, turns))
    assert all(torch.equal(first, second) for first, second in zip(alone, together, strict=True))


def test_answer_text_comes_back_as_it_was_taught(processor: MedPLIBProcessor, image: np.ndarray) -> None:
    sample = processor.encode(SEGMENT, [image], masks=[spot()])
    assert sample.labels is not None
    answer = sample.labels[sample.labels != IGNORE_INDEX]
    assert processor.decode_text(answer.tolist()) == "Sure, the liver is <SEG>."


def test_equal_images_of_a_batch_are_kept_once_where_asked(processor: MedPLIBProcessor, image: np.ndarray) -> None:
    other = 255 - image
    samples = [
        processor.encode(SEGMENT, [image], masks=[spot()]),
        processor.encode(REGION, [other], [spot()]),
        processor.encode([Turn("human", "Hello?"), Turn("gpt", "yes")]),
        processor.encode(REGION, [image.copy()], [spot()]),
    ]
    plain, shared = processor.collate(samples), processor.collate(samples, share_images=True)
    assert shared["image_index"].tolist() == [0, 1, 0]
    assert shared["sam_index"].tolist() == [0, 1, 2, 0]
    for pixels, index in (("pixel_values", "image_index"), ("sam_pixel_values", "sam_index")):
        assert shared.pop(pixels)[shared.pop(index)].equal(plain.pop(pixels))
    assert shared.keys() == plain.keys()
    assert shared["region_image"].equal(plain["region_image"])
    assert "image_index" not in processor.collate(samples[:3], share_images=True)


def test_features_stand_for_the_pixels_of_a_batch(processor: MedPLIBProcessor, image: np.ndarray) -> None:
    blank = np.broadcast_to(np.uint8(0), image.shape)
    sample = processor.encode(SEGMENT, [blank], masks=[spot()], pixels=False)
    known = replace(sample, image_features=torch.ones(1, 16, 4), sam_embedding=torch.ones(4, 2, 2))
    batch = processor.collate([known, known])
    assert batch["image_features"].shape == (2, 16, 4)
    assert batch["sam_embeddings"].shape == (2, 4, 2, 2)
    assert {"pixel_values", "sam_pixel_values"}.isdisjoint(batch)
    with_pixels = processor.encode(SEGMENT, [image], masks=[spot()])
    assert known.sam_size == with_pixels.sam_size and known.image_size == with_pixels.image_size
    with pytest.raises(ValueError, match="features"):
        processor.collate([known, with_pixels])
