"""The stable face of the model: prepare an image once, ask it many things."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.checkpoint import load
from model.checkpoint.building import Attention
from model.data.readers import ImageData, read_image
from model.errors import MedPLIBError
from model.inference.answer import Answer, Mask, mask_labels
from model.inference.generation import Generation, GenerationSettings, generate
from model.inference.regions import Region, place_region, region_to_mask
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.conversation import Turn
from model.processing.masks import threshold_mask
from model.processing.processor import MedPLIBProcessor
from model.processing.tokens import IMAGE_TOKEN

ImageSource = Any
"""A path, bytes, a file object, a PIL image or an array H×W(×3)."""


@dataclass
class PreparedImage:
    """An image whose encodings are computed once.

    Attributes:
        data: the pixels and what the file knew about them.
        image_features: CLIP patch features [1, P, Dv].
        sam_input: SAM input [1, 3, S, S]; ``sam_size`` its (height, width) before padding.
        sam_embedding: SAM embedding [1, C, s, s], computed at the first ``<SEG>``.
    """

    data: ImageData
    image_features: torch.Tensor
    sam_input: torch.Tensor
    sam_size: tuple[int, int]
    sam_embedding: torch.Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the original."""
        return self.data.pixels.shape[:2]


@dataclass
class _Clock:
    """Seconds by part; the parts are the keys of ``Answer.timing``."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":  # its work is only queued yet; the next part would be charged for it
            torch.cuda.synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class Predictor:
    """Ask a model about images.

    Example:
        >>> predictor = Predictor.from_pretrained("assets/medplib-nano")
        >>> image = predictor.set_image("scan.png")
        >>> predictor.ask(image, "What modality is used to take this image?").text
        >>> predictor.ask(image, "Please segment the liver.").masks[0].to_array()
    """

    def __init__(self, model: MedPLIBForCausalLM, processor: MedPLIBProcessor) -> None:
        self.model = model.eval()
        self.processor = processor

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        device: str | torch.device = "cpu",
        vision_tower: str | Path | None = None,
        dtype: torch.dtype | None = None,
        *,
        sam: str | Path | None = None,
        attention: Attention = "sdpa",
    ) -> Predictor:
        """Load a native or published checkpoint directory.

        Args:
            directory: the checkpoint.
            device: where the model runs, such as ``cpu``, ``cuda`` or ``cuda:1``.
            vision_tower: CLIP directory, for published checkpoints whose configuration does not tell CLIP's sizes.
            dtype: ``torch.float32`` or ``torch.bfloat16``; as stored when absent, but fp32 on a CPU.
            sam: SAM-Med2D file, for published checkpoints that hold no SAM weights.
            attention: of the decoder: ``sdpa``, ``eager`` or ``flash_attention_2`` (CUDA with flash-attn).

        Raises:
            MedPLIBError: the directory is missing, incomplete or does not fit.
        """
        device = usable_device(device)
        if dtype is None and device.type == "cpu":
            dtype = torch.float32
        model, processor = load(
            directory, vision_tower=vision_tower, sam=sam, device=device, dtype=dtype, attention=attention
        )
        return cls(model, processor)

    @torch.inference_mode()
    def set_image(self, image: ImageSource) -> PreparedImage:
        """Read and encode an image once, for many questions.

        Args:
            image: a path (PNG, JPEG, TIFF, 16-bit and palette included, single-frame DICOM), bytes, a PIL image or an
                array H×W(×3).

        Raises:
            MedPLIBError: the image cannot be read.
        """
        if isinstance(image, PreparedImage):
            return image
        data = read_image(image)
        clip, sam, sam_size = self.processor.image_inputs(data.pixels)
        features = self.model.encode_images(self._to_model(clip[None]))
        return PreparedImage(data, features, self._to_model(sam[None]), sam_size)

    @torch.inference_mode()
    def ask(
        self,
        image: ImageSource,
        question: str,
        region: Region | Sequence[Region] | None = None,
        threshold: float | None = None,
        *,
        history: Sequence[tuple[str, str]] = (),
        settings: GenerationSettings | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        """Ask one question.

        Args:
            image: anything ``set_image`` takes, or what it gave.
            question: plain text; ``<region></region>`` marks where a region is meant, if it is given.
            region: mask path, H×W array, ``("box", (x1, y1, x2, y2))`` or ``("point", (x, y))`` in image pixels, or a
                list of these.
            threshold: probability above which a pixel is in the mask, in (0, 1); the checkpoint's own when absent.
            history: earlier (question, answer) pairs about the same image.
            settings: how the answer is drawn; greedy when absent.
            on_text: called with the answer so far as it grows.

        Returns:
            The answer; its masks are in the order of the ``<SEG>`` in its text.

        Raises:
            MedPLIBError: image, question, region or threshold is malformed, or the checkpoint cannot look at regions.
        """
        threshold = self.model.config.mask.threshold if threshold is None else threshold
        if not 0 < threshold < 1:
            raise MedPLIBError(f"the threshold is {threshold}; give a number between 0 and 1")
        if not question.strip():
            raise MedPLIBError("the question is empty; ask something")
        clock, start = _Clock(self.model.device), time.perf_counter()
        with clock.part("encode"):
            prepared = self.set_image(image)
        regions = [region_to_mask(item, prepared.size) for item in _region_list(region)]
        prompt = self._prompt(prepared, question, regions, history)
        with clock.part("generate"):
            row = self._generate(prompt, settings or GenerationSettings(), on_text)
        text = self.processor.decode_text(row.token_ids)
        with clock.part("masks"):
            masks = self._masks(prepared, row, mask_labels(text, question, len(row.seg_states)), threshold)
        clock.seconds["total"] = time.perf_counter() - start
        return Answer(text, masks, clock.seconds)

    def _prompt(
        self, prepared: PreparedImage, question: str, regions: list[np.ndarray], history: Sequence[tuple[str, str]]
    ) -> dict[str, Any]:
        if regions and not self.model.config.region.enabled:
            raise MedPLIBError("this checkpoint has no region adapter; ask it about the whole image")
        asked = place_region(question, len(regions)) if regions else question
        turns = []
        for earlier, answer in history:
            turns += [Turn("human", earlier), Turn("gpt", answer)]
        turns.append(Turn("human", asked))
        turns[0] = Turn("human", f"{IMAGE_TOKEN}\n{turns[0].text}")
        encoded = self.processor.encode_prompt(turns, [prepared.data.pixels], regions=regions, pixels=False)
        batch = self.processor.collate([encoded], padding_side="left")
        names = ("input_ids", "attention_mask", "region_masks", "region_image")
        prompt = {name: self._to_model(batch[name]) for name in names if batch.get(name) is not None}
        return {**prompt, "image_features": prepared.image_features}

    def _generate(
        self, prompt: dict[str, Any], settings: GenerationSettings, on_text: Callable[[str], None] | None
    ) -> Generation:
        ids: list[int] = []

        def tell(_row: int, token: int) -> None:
            ids.append(token)
            if on_text is not None:
                on_text(self.processor.decode_text(ids))

        return generate(self.model, prompt, settings, tell if on_text else None)[0]

    def _masks(self, prepared: PreparedImage, row: Generation, labels: list[str], threshold: float) -> list[Mask]:
        count = len(row.seg_states)
        if not count:
            return []
        if prepared.sam_embedding is None:
            prepared.sam_embedding = self.model.encode_segmented_images(prepared.sam_input)
        decoded = self.model.decode_masks(
            torch.stack(row.seg_states),
            prepared.sam_embedding,
            torch.zeros(count, dtype=torch.long, device=self.model.device),
            [prepared.sam_size] * count,
            [prepared.size] * count,
        )
        scores = decoded.iou_predictions.float().flatten().tolist()
        arrays = [threshold_mask(logits, threshold) for logits in decoded.mask_logits]
        spacing = prepared.data.spacing_mm
        return [Mask.from_array(*item, spacing_mm=spacing) for item in zip(arrays, labels, scores, strict=True)]

    def _to_model(self, value: torch.Tensor) -> torch.Tensor:
        dtype = self.model.dtype if value.is_floating_point() else value.dtype
        return value.to(device=self.model.device, dtype=dtype)


def usable_device(device: str | torch.device) -> torch.device:
    """The device of a name.

    Raises:
        MedPLIBError: there is no such device here.
    """
    unusable = MedPLIBError(f"the device {str(device)!r} cannot be used here; use cpu, or cuda on a GPU machine")
    try:
        probe = torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch has one for each way to be wrong
        raise unusable from error
    if probe.is_meta:  # it holds no values
        raise unusable
    return torch.device(device)


def _region_list(region: Region | Sequence[Region] | None) -> list[Region]:
    if region is None:
        return []
    return list(region) if isinstance(region, list) else [region]  # type: ignore[list-item]
