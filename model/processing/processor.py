"""Processor: text, images, regions and masks to tensors, and token ids back to text."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from model.errors import MedPLIBError
from model.modeling.configuration import IGNORE_INDEX, IMAGE_PLACEHOLDER, REGION_PLACEHOLDER, MedPLIBConfig
from model.processing import encoding
from model.processing.batching import EncodedSample, collate
from model.processing.conversation import Turn, get_template
from model.processing.images import (
    CLIP_MEAN,
    CLIP_PAD_COLOUR,
    CLIP_STD,
    SAM_MEAN,
    SAM_STD,
    Size,
    check_image,
    clip_input,
    resized_size,
    sam_input,
)
from model.processing.masks import (
    check_mask,
    example_mask_input,
    random_sub_region,
    region_grid,
    sampled_region_grid,
)
from model.processing.special_tokens import IMAGE_TOKEN, REGION_MARKER, SEG_TOKEN
from model.processing.tokens import MODEL_FILE, build_tokenizer, decode_answer

CONFIG_FILE = "processor_config.json"


@dataclass(frozen=True)
class ProcessorSettings:
    """Sizes and choices of the processor; the defaults are the published model's.

    Attributes:
        clip_size, patch_size: CLIP input and its patches, in pixels.
        clip_mean, clip_std: normalisation of CLIP inputs, for values in [0, 1].
        clip_pad_colour: grey levels of CLIP's padding.
        sam_size: SAM input, in pixels.
        sam_mean, sam_std: normalisation of SAM inputs, for values in [0, 255].
        template: conversation template, see ``model.processing.conversation.TEMPLATES``.
        max_length: most tokens of a sample, an image counting as one; None for no limit.
    """

    clip_size: int = 336
    patch_size: int = 14
    clip_mean: tuple[float, ...] = CLIP_MEAN
    clip_std: tuple[float, ...] = CLIP_STD
    clip_pad_colour: tuple[int, ...] = CLIP_PAD_COLOUR
    sam_size: int = 256
    sam_mean: tuple[float, ...] = SAM_MEAN
    sam_std: tuple[float, ...] = SAM_STD
    template: str = "llava_v1"
    max_length: int | None = 2048

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):  # as JSON gives them
                object.__setattr__(self, field.name, tuple(value))
        get_template(self.template)
        for name in ("clip_size", "patch_size", "sam_size", "max_length"):
            value = getattr(self, name)
            if value is None and name == "max_length":
                continue
            if not isinstance(value, int) or value < 1:
                raise MedPLIBError(f"the processor's {name} is {value!r:.80}; give a whole number above 0")

    @property
    def grid(self) -> int:
        """Patches along one side of a CLIP input."""
        return self.clip_size // self.patch_size

    @classmethod
    def from_config(cls, config: MedPLIBConfig, **changes: Any) -> ProcessorSettings:
        """Settings that fit a network; ``changes`` override single ones."""
        sizes = {
            "clip_size": config.vision_config.image_size,
            "patch_size": config.vision_config.patch_size,
            "sam_size": config.sam_config.vision_config.image_size,
        }
        return cls(**{**sizes, **changes})


class MedPLIBProcessor:
    """Everything between what people write and what ``MedPLIBForCausalLM.forward`` takes.

    Holds no state that a call changes, so threads may share one.

    Args:
        tokenizer: from ``build_tokenizer``.
        settings: sizes and choices.
        sentencepiece_model: content of ``tokenizer.model``, saved along with the processor where known.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        settings: ProcessorSettings | None = None,
        sentencepiece_model: bytes | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.settings = settings or ProcessorSettings()
        self.sentencepiece_model = sentencepiece_model

    # --- disk -------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, settings: ProcessorSettings | None = None, **changes: Any
    ) -> MedPLIBProcessor:
        """Load a saved processor, or make one for a published directory, which holds a tokenizer alone.

        Args:
            directory: with a tokenizer and, if we wrote it, ``processor_config.json``.
            settings: used instead of the saved ones; the published defaults where neither is there.
            changes: single settings to override, e.g. ``template="v1"``.

        Raises:
            MedPLIBError: the directory has no tokenizer, or its settings are malformed.
        """
        folder = Path(directory)
        if not folder.is_dir():
            raise MedPLIBError(f"{folder} is not a directory; give the directory of a checkpoint")
        chosen = settings or read_settings(folder / CONFIG_FILE)
        model_file = folder / MODEL_FILE
        sentencepiece_model = model_file.read_bytes() if model_file.is_file() else None
        return cls(build_tokenizer(folder), replace(chosen, **changes), sentencepiece_model)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write tokenizer and settings, each file under a temporary name first."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".processor-") as name:
            staging = Path(name)
            self.tokenizer.save_pretrained(staging)
            if self.sentencepiece_model is not None:
                (staging / MODEL_FILE).write_bytes(self.sentencepiece_model)
            text = json.dumps(asdict(self.settings), indent=2) + "\n"
            (staging / CONFIG_FILE).write_text(text, encoding="utf-8")
            for path in sorted(staging.iterdir()):
                path.replace(folder / path.name)

    # --- to tensors ---------------------------------------------------------------------------------------------------

    def image_inputs(self, image: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, Size]:
        """CLIP input [3, S, S], SAM input [3, S', S'] and the (height, width) of the image in the latter.

        Raises:
            MedPLIBError: the image is not uint8 [H, W, 3].
        """
        return self.clip_input(image), *self.sam_input(image)

    def clip_input(self, image: np.ndarray) -> torch.Tensor:
        """CLIP input float32 [3, S, S] of an image uint8 [H, W, 3]."""
        chosen = self.settings
        return clip_input(image, chosen.clip_size, chosen.clip_mean, chosen.clip_std, chosen.clip_pad_colour)

    def sam_input(self, image: np.ndarray) -> tuple[torch.Tensor, Size]:
        """SAM input float32 [3, S', S'] of an image uint8 [H, W, 3], and the (height, width) of the image in it."""
        return sam_input(image, self.settings.sam_size, self.settings.sam_mean, self.settings.sam_std)

    def encode(
        self,
        turns: Sequence[Turn],
        images: Sequence[np.ndarray] = (),
        regions: Sequence[np.ndarray] = (),
        region_images: Sequence[int] | None = None,
        masks: Sequence[np.ndarray] = (),
        segment_image: int = -1,
        *,
        example_masks: Sequence[np.ndarray] = (),
        visual_kinds: Sequence[str] | None = None,
        training: bool = False,
        rng: np.random.Generator | None = None,
        pixels: bool = True,
    ) -> EncodedSample:
        """One conversation to learn from, or to score.

        Args:
            turns: alternating, human first, with ``<image>``, ``<region></region>`` and ``<SEG>`` where those stand.
            images: uint8 [H, W, 3] each, in ``<image>`` order.
            regions: [H, W] each, non-zero inside, the size of their image, in marker order.
            region_images: index into ``images`` of each region; the last image for all where absent.
            masks: [H, W] each, the size of the segmented image, in ``<SEG>`` order of the answers.
            segment_image: index into ``images`` of the image that is segmented.
            example_masks: [H, W] each; masks that stand at ``<image>`` placeholders of the kind ``mask`` (in-context).
            visual_kinds: per ``<image>`` placeholder ``image`` or ``mask``; required with ``example_masks``.
            training: regions become random sub-regions, and where no mask is asked for, ``sam_pixel_values`` are zero.
            rng: source of that randomness; required in training with regions.
            pixels: see ``encode_prompt``.

        Raises:
            MedPLIBError: text, images, regions and masks do not match, one is malformed, or the text is too long.
            ValueError: regions in training without ``rng``.
        """
        if training and rng is None and len(regions):
            raise ValueError("training on regions needs a random generator; pass rng")
        full = encoding.tokenize_conversation(self.tokenizer, turns, self.settings.template)
        ids, labels = encoding.truncate(self.tokenizer, *full, self.settings.max_length)
        drawn = rng if training else None
        sample = self._sample(
            ids,
            images,
            regions,
            region_images,
            segment_image,
            example_masks,
            visual_kinds,
            drawn,
            pixels,
            segmented=bool(len(masks)) or not training,
        )
        return replace(
            sample,
            labels=torch.tensor(labels, dtype=torch.long),
            mask_targets=self._mask_targets(ids, labels, masks, sample.image_size),
            truncated=len(ids) < len(full[0]),
        )

    def encode_prompt(
        self,
        turns: Sequence[Turn],
        images: Sequence[np.ndarray] = (),
        regions: Sequence[np.ndarray] = (),
        region_images: Sequence[int] | None = None,
        segment_image: int = -1,
        *,
        example_masks: Sequence[np.ndarray] = (),
        visual_kinds: Sequence[str] | None = None,
        pixels: bool = True,
    ) -> EncodedSample:
        """One conversation to be continued; arguments and errors as in ``encode``, the last turn is the question.

        ``pixels=False`` leaves ``pixel_values`` and ``sam_pixel_values`` zero, for a caller that has the images'
        features already: only their sizes are looked at then.
        """
        ids = encoding.encode_prompt(self.tokenizer, turns, self.settings.template, self.settings.max_length)
        return self._sample(
            ids, images, regions, region_images, segment_image, example_masks, visual_kinds, None, pixels
        )

    def _sample(
        self,
        ids: list[int],
        images: Sequence[np.ndarray],
        regions: Sequence[np.ndarray],
        region_images: Sequence[int] | None,
        segment_image: int,
        example_masks: Sequence[np.ndarray],
        visual_kinds: Sequence[str] | None,
        rng: np.random.Generator | None,
        with_pixels: bool = True,
        segmented: bool = True,
    ) -> EncodedSample:
        for image in images:
            check_image(image)
        kinds = _check_kinds(visual_kinds, len(images), len(example_masks))
        _check_count(IMAGE_TOKEN, ids.count(IMAGE_PLACEHOLDER), "images", len(images) + len(example_masks))
        _check_count(REGION_MARKER, ids.count(REGION_PLACEHOLDER), "regions", len(regions))
        indices = _region_images(region_images, len(regions), len(images))
        grids, small = self._region_grids(regions, [images[index].shape[:2] for index in indices], rng)
        clip_size, sam_size = self.settings.clip_size, self.settings.sam_size
        image_size: Size = (sam_size, sam_size)  # of a text alone
        pixels, sam = torch.zeros(len(images), 3, clip_size, clip_size), torch.zeros(3, sam_size, sam_size)
        if len(images):
            target = images[_segmented(segment_image, len(images))]
            image_size = (target.shape[0], target.shape[1])
            if with_pixels and segmented:
                sam, _ = self.sam_input(target)
            if with_pixels:
                pixels = torch.stack([self.clip_input(image) for image in images])
        examples = [example_mask_input(mask, clip_size) for mask in example_masks]
        return EncodedSample(
            input_ids=torch.tensor(ids, dtype=torch.long),
            labels=None,
            pixel_values=pixels,
            region_masks=grids,
            region_image=torch.tensor(indices, dtype=torch.long),
            sam_pixel_values=sam,
            sam_size=resized_size(image_size, sam_size),
            image_size=image_size,
            example_masks=torch.stack(examples) if examples else None,
            visual_kinds=kinds,
            approximated_regions=small,
        )

    def _region_grids(
        self, regions: Sequence[np.ndarray], sizes: Sequence[Size], rng: np.random.Generator | None
    ) -> tuple[torch.Tensor, tuple[int, ...]]:
        clip_size, grid = self.settings.clip_size, self.settings.grid
        grids, small = [], []
        for number, (region, size) in enumerate(zip(regions, sizes, strict=True)):
            mask = check_mask(region, f"region {number + 1}")
            _check_size(mask, size, f"region {number + 1}")
            cells = region_grid(mask, clip_size, grid)
            if not sampled_region_grid(mask, clip_size, grid).any():
                small.append(number)
            grids.append(cells if rng is None else random_sub_region(cells, rng))
        stacked = np.stack(grids) if grids else np.zeros((0, grid, grid), dtype=np.float32)
        return torch.from_numpy(stacked), tuple(small)

    def _mask_targets(self, ids: list[int], labels: list[int], masks: Sequence[np.ndarray], size: Size) -> torch.Tensor:
        seg = self.tokenizer.convert_tokens_to_ids(SEG_TOKEN)
        asked = sum(token == seg and label != IGNORE_INDEX for token, label in zip(ids, labels, strict=True))
        _check_count(SEG_TOKEN, asked, "masks", len(masks))
        targets = [check_mask(mask, f"mask {number + 1}") for number, mask in enumerate(masks)]
        for number, target in enumerate(targets):
            _check_size(target, size, f"mask {number + 1}")
        stacked = np.stack(targets) if targets else np.zeros((0, *size), dtype=bool)
        return torch.from_numpy(stacked).float()

    def collate(
        self,
        samples: Sequence[EncodedSample],
        padding_side: Literal["right", "left"] = "right",
        *,
        share_images: bool = False,
    ) -> dict[str, Any]:
        """A batch: exactly the arguments of ``MedPLIBForCausalLM.forward``; see ``batching.collate``."""
        return collate(samples, int(self.tokenizer.pad_token_id), padding_side, share_images=share_images)

    # --- and back ---------------------------------------------------------------------------------------------------

    def decode_text(self, ids: Iterable[int]) -> str:
        """The answer that generated ids spell; see ``model.processing.tokens.decode_answer``."""
        return decode_answer(self.tokenizer, ids)


def read_settings(path: Path) -> ProcessorSettings:
    """Settings of a ``processor_config.json``; the published defaults where there is none.

    Raises:
        MedPLIBError: the file is not JSON, or has keys or values that are not settings.
    """
    if not path.is_file():
        return ProcessorSettings()
    try:
        values = json.loads(path.read_bytes())
        return ProcessorSettings(**values)
    except (TypeError, ValueError) as error:  # MedPLIBError is a ValueError
        raise MedPLIBError(f"{path} holds no processor settings ({error}); save the processor again") from error


def _check_count(marker: str, marked: int, things: str, given: int) -> None:
    if marked != given:
        raise MedPLIBError(f"the text has {marked} {marker} for {given} {things}; give exactly one {marker} for each")


def _check_size(mask: np.ndarray, size: Size, what: str) -> None:
    if mask.shape != tuple(size):
        raise MedPLIBError(
            f"{what} is {mask.shape[0]}×{mask.shape[1]}, its image {size[0]}×{size[1]} (height×width); "
            "give them one size"
        )


def _check_kinds(kinds: Sequence[str] | None, images: int, masks: int) -> tuple[str, ...] | None:
    if kinds is None:
        if masks:
            raise MedPLIBError("example masks are given without visual_kinds; say per placeholder 'image' or 'mask'")
        return None
    if kinds.count("image") != images or kinds.count("mask") != masks or len(kinds) != images + masks:
        raise MedPLIBError(
            f"visual_kinds is {list(kinds)} for {images} images and {masks} masks; give one 'image' or 'mask' each"
        )
    return tuple(kinds) if masks else None


def _region_images(indices: Sequence[int] | None, regions: int, images: int) -> list[int]:
    if indices is None:
        indices = [images - 1] * regions
    if len(indices) != regions or any(not 0 <= index < images for index in indices):
        raise MedPLIBError(
            f"region_images is {list(indices)} for {regions} regions and {images} images; "
            "give the index of an image for each region"
        )
    return [int(index) for index in indices]


def _segmented(index: int, images: int) -> int:
    if not -images <= index < images:
        raise MedPLIBError(f"segment_image is {index} for {images} images; give the index of one")
    return index % images
