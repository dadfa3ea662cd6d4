"""Plain generation, which ``infer.py`` sets beside the engine: transformers' ``generate``, then the answer's masks.

One request at a time, everything anew for each: read, encode, prefill, decode over a dynamic cache, paint.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from model.data.image_io import read_image, read_mask
from model.inference.answer import Mask
from model.inference.requests import Request
from model.inference.targets import mask_labels
from model.modeling.medplib import MedPLIBForCausalLM
from model.processing.batching import EncodedSample
from model.processing.conversation import Turn
from model.processing.masks import threshold_mask
from model.processing.processor import MedPLIBProcessor
from model.processing.special_tokens import IMAGE_TOKEN

_INPUTS = ("input_ids", "attention_mask", "pixel_values", "region_masks", "region_image")
Inputs = dict[str, torch.Tensor]


@dataclass
class Plain:
    """Plain generation with one network.

    Attributes:
        model: the network, in eval mode.
        processor: its processor.
    """

    model: MedPLIBForCausalLM
    processor: MedPLIBProcessor

    def encode(self, request: Request) -> EncodedSample:
        """A request as the processor gives it."""
        pixels = read_image(request.image).pixels
        regions = [read_mask(path) for path in request.regions]  # type: ignore[arg-type]
        turns = [Turn("human", f"{IMAGE_TOKEN}\n{request.question}")]
        return self.processor.encode_prompt(turns, [pixels], regions=regions)

    def inputs(self, encoded: Sequence[EncodedSample]) -> Inputs:
        """What ``generate`` takes, on the device, prompts padded on the left; also ``sam_pixel_values``."""
        batch = self.processor.collate(list(encoded), padding_side="left")
        names = (*_INPUTS, "sam_pixel_values")
        return {name: self._placed(batch[name]) for name in names if batch.get(name) is not None}

    def _placed(self, value: torch.Tensor) -> torch.Tensor:
        dtype = self.model.dtype if value.is_floating_point() else value.dtype
        return value.to(self.model.device, dtype)

    def generate(self, inputs: Inputs, tokens: int) -> torch.Tensor:
        """New tokens, long [B, n]."""
        given = {name: value for name, value in inputs.items() if name != "sam_pixel_values"}
        ends = {"eos_token_id": 2, "pad_token_id": 0}
        return self.model.generate(**given, max_new_tokens=tokens, do_sample=False, **ends)

    def answer(self, request: Request) -> tuple[str, list[Mask]]:
        """Text and masks of one request."""
        encoded = self.encode(request)
        inputs = self.inputs([encoded])
        states: list[torch.Tensor] = []
        norm = self.model.model.decoder.norm
        hook = norm.register_forward_hook(lambda _module, _inputs, out: states.append(out[0, -1]))
        try:
            ids = self.generate(inputs, request.settings.max_new_tokens)[0].tolist()
        finally:
            hook.remove()
        text = self.processor.decode_text(ids)
        places = [place for place, token in enumerate(ids) if token == self.model.config.seg_token_id]
        if not places:
            return text, []
        masks = self._paint(encoded, inputs, torch.stack([states[place] for place in places]))
        labels = mask_labels(text, request.question, len(places))
        return text, [Mask.from_array(mask, label, score) for (mask, score), label in zip(masks, labels, strict=True)]

    def _paint(self, encoded: EncodedSample, inputs: Inputs, states: torch.Tensor) -> list[tuple]:
        """Mask and score of every ``<SEG>`` state [n, D]."""
        count = len(states)
        decoded = self.model.decode_masks(
            states,
            self.model.encode_segmented_images(inputs["sam_pixel_values"]),
            torch.zeros(count, dtype=torch.long, device=self.model.device),
            [encoded.sam_size] * count,
            [encoded.image_size] * count,
        )
        scores = decoded.iou_predictions.float().flatten().tolist()
        threshold = self.model.config.mask.threshold
        masks = [threshold_mask(logits, threshold) for logits in decoded.mask_logits]
        return list(zip(masks, scores, strict=True))

    def seconds_per_step(self, inputs: Inputs, steps: int) -> float:
        """Mean seconds of a decoding step of a batch of prompts, the prefill not counted; no row may end early."""
        cuda = self.model.device.type == "cuda"
        begin: list[float] = []

        def prefilled(*_: object) -> None:
            if not begin:
                if cuda:
                    torch.cuda.synchronize()
                begin.append(time.perf_counter())

        hook = self.model.lm_head.register_forward_hook(prefilled)
        try:
            ids = self.generate(inputs, steps + 1)
            if cuda:
                torch.cuda.synchronize()
            end = time.perf_counter()
        finally:
            hook.remove()
        assert ids.shape[1] == steps + 1, "an answer ended before its time"
        return (end - begin[0]) / steps
